#!/bin/bash
# Installs the CPU build of torch: the plain one from PyPI brings gigabytes of CUDA along.
#
#   tools/install_torch.sh PYTHON
#
# In this order, the first that works:
# 1. whatever pip is set up to find (a mirror, find-links) that has the "+cpu" build;
# 2. the index TORCH_INDEX, by default PyTorch's own for CPU builds; a directory of wheels will do,
#    as file:///path;
# 3. the plain build from PyPI, said loudly; KVFS_TORCH_PLAIN=0 fails here instead.
set -euo pipefail

PYTHON=${1:?usage: tools/install_torch.sh PYTHON}
VERSION=2.13.0
INDEX=${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}
LOG=$(mktemp)
trap 'rm -f "$LOG"' EXIT

say() { echo "torch: $*" >&2; }

try() {
    PIP_DISABLE_PIP_VERSION_CHECK=1 "$PYTHON" -m pip install -q --only-binary=torch "$@" \
        >"$LOG" 2>&1
}

has_torch() {
    "$PYTHON" -c "import importlib.metadata as m
assert m.version('torch').partition('+')[0] == '$VERSION'" 2>/dev/null
}

if has_torch; then
    exit 0
fi
say "installing torch $VERSION for the CPU (about 200 MB)"
if try "torch==$VERSION+cpu"; then
    exit 0
fi
say "pip's own indexes have no CPU build; trying TORCH_INDEX=$INDEX"
source=(--extra-index-url "$INDEX")
case $INDEX in
file://*) source+=(--find-links "$INDEX") ;;
esac
if try --retries 1 --timeout 20 "${source[@]}" "torch==$VERSION+cpu"; then
    exit 0
fi
say "$INDEX did not help (last lines of pip below)"
tail -n 5 "$LOG" >&2
if [ "${KVFS_TORCH_PLAIN:-1}" = 0 ]; then
    say "set TORCH_INDEX to an index that has torch $VERSION+cpu, and run make again"
    exit 1
fi
say "falling back to the plain torch $VERSION, which may bring several GB of CUDA libraries;"
say "to avoid that: stop, and set TORCH_INDEX to an index that has torch $VERSION+cpu"
if ! try "torch==$VERSION"; then
    tail -n 20 "$LOG" >&2
    exit 1
fi
