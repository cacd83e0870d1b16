#!/bin/bash
# Makes .venv, and installs the system packages that kvfs needs and that are not there yet.
#
#   tools/setup.sh VENV
#
# - PYTHON names the interpreter (at least 3.11); without it, one is looked for.
# - apt-get is called only when something is missing, with sudo when not root; KVFS_YES=1 does not
#   ask. Nothing is installed on a machine that has everything.
# - cmake and ninja are not asked of the system: they come from PyPI, into the venv.
set -euo pipefail

VENV=${1:?usage: tools/setup.sh VENV}

say() { echo "setup: $*" >&2; }

die() {
    say "$*"
    exit 1
}

is_python_fit() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

# Prints the path of a fitting interpreter, or nothing.
find_python() {
    local name
    if [ -n "${PYTHON:-}" ]; then
        is_python_fit "$PYTHON" || die "PYTHON=$PYTHON is not a Python of at least 3.11"
        command -v "$PYTHON"
        return
    fi
    for name in python3.11 python3.12 python3.13 python3.14 python3 /usr/bin/python3; do
        if is_python_fit "$name"; then
            command -v "$name"
            return
        fi
    done
}

has_header() {
    "$1" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))'
}

can_compile() {
    echo '#include <pthread.h>
int main(void) { return 0; }' | cc -x c -o /dev/null - 2>/dev/null
}

# Prints the Debian packages that are missing, one per line.
missing_packages() {
    local python=$1 version=3
    if [ -z "$python" ]; then
        printf '%s\n' python3 python3-venv python3-dev
    else
        # The versioned packages of Debian belong to Debian's interpreter; others bring theirs.
        version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
        "$python" -c 'import venv, ensurepip' 2>/dev/null || echo "python$version-venv"
        has_header "$python" || echo "python$version-dev"
    fi
    can_compile || printf '%s\n' gcc libc6-dev
    command -v pkg-config >/dev/null || echo pkg-config
    pkg-config --exists 'fuse3 >= 3.2' 2>/dev/null || echo libfuse3-dev
    command -v fusermount3 >/dev/null || echo fuse3
    command -v getfattr >/dev/null || echo attr
    # For the tests of shared extents alone, on images that they mount.
    PATH=$PATH:/usr/sbin:/sbin command -v mkfs.xfs >/dev/null || echo xfsprogs
    PATH=$PATH:/usr/sbin:/sbin command -v mkfs.btrfs >/dev/null || echo btrfs-progs
}

install_packages() {
    local root=()
    if ! command -v apt-get >/dev/null; then
        say "this is not Debian or Ubuntu; install what these packages hold, then run make again:"
        say "  $*"
        die "(a C compiler, Python's headers and venv, fuse3 with its headers, pkg-config, attr,
         xfsprogs, btrfs-progs)"
    fi
    if [ "$(id -u)" -ne 0 ]; then
        command -v sudo >/dev/null || die "run this as root: apt-get install $*"
        root=(sudo)
    fi
    say "missing: $*"
    say "going to run: ${root[*]} apt-get install --no-install-recommends $*"
    if [ "${#root[@]}" -gt 0 ] && [ -t 0 ] && [ -z "${KVFS_YES:-}" ]; then
        read -r -p "setup: go on? [Y/n] " answer
        [[ "$answer" =~ ^([Yy].*)?$ ]] || die "stopped; nothing was installed"
    fi
    "${root[@]}" apt-get update -q || say "apt-get update failed; trying with the lists at hand"
    "${root[@]}" env DEBIAN_FRONTEND=noninteractive \
        apt-get install -q -y --no-install-recommends "$@" ||
        die "apt-get failed; install by hand, then run make again: $*"
}

main() {
    local python missing still
    python=$(find_python)
    missing=$(missing_packages "$python")
    if [ -n "$missing" ]; then
        # shellcheck disable=SC2086  # one word per package is meant
        install_packages $missing
        python=$(find_python)
        [ -n "$python" ] || die "no Python of at least 3.11 found; set PYTHON=/path/to/python3.11"
        still=$(missing_packages "$python" | tr '\n' ' ')
        [ -z "$still" ] || die "still missing after the installation: $still"
    fi
    if [ ! -e /dev/fuse ]; then
        say "note: /dev/fuse is not there; mounting will not work (modprobe fuse, or give the" \
            "container --device /dev/fuse --cap-add SYS_ADMIN)"
    fi
    if ! is_python_fit "$VENV/bin/python"; then
        say "making $VENV with $python ($("$python" --version 2>&1))"
        rm -rf "$VENV"
        "$python" -m venv "$VENV"
    fi
}

main
