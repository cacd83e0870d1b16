#!/bin/bash
# Installs Debian's fio where it can; without it `make interop` reports fio as not available.
set -uo pipefail

root=()
if ! command -v apt-get >/dev/null; then
    echo "interop: this is not Debian or Ubuntu; install fio by hand" >&2
    exit 0
fi
if [ "$(id -u)" -ne 0 ]; then
    root=(sudo -n)
fi
echo "interop: installing fio" >&2
"${root[@]}" apt-get update -q >/dev/null || true
"${root[@]}" env DEBIAN_FRONTEND=noninteractive \
    apt-get install -q -y --no-install-recommends fio >/dev/null ||
    echo "interop: run this as root, then make interop again: apt-get install fio" >&2
exit 0
