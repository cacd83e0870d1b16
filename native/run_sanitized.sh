#!/bin/sh
# Run the native core under sanitizers.
#
#   native/run_sanitized.sh asan [pytest arguments]   ASan + UBSan under tests/native
#   native/run_sanitized.sh tsan [changes]            TSan under native/tests/*_stress.c
#   native/run_sanitized.sh core-asan [pytest arguments]   kvfs-core under tests/core
#   native/run_sanitized.sh core-tsan [pytest arguments]
#   native/run_sanitized.sh fuzz [seed [seconds]]     ASan + UBSan under arbitrary messages
#
# Builds into build/asan or build/tsan and touches no installed module.
set -eu
cd "$(dirname "$0")/.."
what=${1:-asan}
mode=${what#core-}
[ "$what" = fuzz ] && mode=asan
[ $# -gt 0 ] && shift
python=${PYTHON:-$PWD/.venv/bin/python}
cmake=$(command -v "$(dirname "$python")/cmake" || command -v cmake)

configure() {
    "$cmake" -S native -B "build/$mode" -DCMAKE_BUILD_TYPE=Debug -DKVFS_SANITIZE="$1" \
        -DPython_EXECUTABLE="$python" >/dev/null
}

# Run the tests of the core against the build in build/$mode.
test_core() {
    program="$PWD/build/$mode/kvfs-core"
    if [ "$mode" = tsan ]; then # see below
        printf '#!/bin/sh\nexec setarch %s -R %s "$@"\n' "$(uname -m)" "$program" >"$program.sh"
        chmod +x "$program.sh"
        program="$program.sh"
    fi
    KVFS_CORE=$program exec "$python" -m pytest tests/core -p no:cacheprovider -q "$@"
}

case $what in
fuzz)
    configure "address;undefined"
    "$cmake" --build "build/$mode" --target kvfs-core-fuzz >/dev/null
    # The guard handles SIGBUS itself.
    export ASAN_OPTIONS=handle_sigbus=0:detect_stack_use_after_return=1
    export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
    exec "build/$mode/kvfs-core-fuzz" "$@"
    ;;
core-asan)
    configure "address;undefined"
    "$cmake" --build "build/$mode" --target kvfs-core
    export ASAN_OPTIONS=handle_sigbus=0:detect_stack_use_after_return=1
    export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
    test_core "$@"
    ;;
core-tsan)
    configure thread
    "$cmake" --build "build/$mode" --target kvfs-core
    export TSAN_OPTIONS=second_deadlock_stack=1
    test_core "$@"
    ;;
asan)
    configure "address;undefined"
    "$cmake" --build "build/$mode" --target _native
    # Loaded first, the build stands in for whatever kvfs._native is installed.
    mkdir -p "build/$mode/path"
    cat >"build/$mode/path/sitecustomize.py" <<END
import importlib.util, sys
spec = importlib.util.spec_from_file_location("kvfs._native", "$PWD/build/$mode/_native.abi3.so")
sys.modules["kvfs._native"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["kvfs._native"])
END
    # Python leaks by design; handle_sigbus would take the guard's signal away.
    export ASAN_OPTIONS=detect_leaks=0:handle_sigbus=0:handle_segv=1:detect_stack_use_after_return=1
    export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
    export PYTHONMALLOC=malloc PYTHONPATH="$PWD/build/$mode/path"
    LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)"
    export LD_PRELOAD
    exec "$python" -m pytest tests/native -p no:cacheprovider -q "$@"
    ;;
tsan)
    configure thread
    "$cmake" --build "build/$mode" --target index_stress lease_stress
    # Without address randomisation: GCC 12's TSan cannot place its shadow where
    # vm.mmap_rnd_bits is large.
    export TSAN_OPTIONS=halt_on_error=1
    setarch "$(uname -m)" -R "build/$mode/index_stress" "${1:-200000}"
    exec setarch "$(uname -m)" -R "build/$mode/lease_stress" "${1:-200000}"
    ;;
*)
    echo "usage: $0 asan|tsan|core-asan|core-tsan|fuzz [arguments]" >&2
    exit 2
    ;;
esac
