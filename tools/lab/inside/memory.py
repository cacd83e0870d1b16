"""Using the memory of one NUMA node, by system calls: libnuma need not be there.

Layer: tool.
"""

import ctypes
import mmap
import os
import re
from pathlib import Path
from typing import Any, Final

import numpy as np

from lab.inside.tools import StepError, call

_MBIND: Final = 237
_MPOL_BIND: Final = 2
_BYTES: Final = 8 << 20


def probe(node: int) -> dict[str, Any]:
    """Bind memory to a node, fill it, read it, and see that the pages lie there.

    Raises:
        StepError: They do not, or hold other bytes.
    """
    info = Path(f"/sys/devices/system/node/node{node}/meminfo").read_text()
    found = re.search(r"MemTotal:\s+(\d+) kB", info)
    total = int(found[1]) if found else 0
    if not total:
        raise StepError(f"node {node} has no memory: daxctl did not put it online")
    area = mmap.mmap(-1, _BYTES)
    view = np.frombuffer(area, np.uint64)
    address = view.ctypes.data
    mask = ctypes.c_ulong(1 << node)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(
        _MBIND, ctypes.c_void_p(address), ctypes.c_ulong(_BYTES), _MPOL_BIND, ctypes.byref(mask),
        ctypes.c_ulong(64), 0,
    ):  # fmt: skip
        raise StepError(f"mbind: {os.strerror(ctypes.get_errno())}")
    expected = np.arange(len(view), dtype=np.uint64)
    view[:] = expected
    if not np.array_equal(view, expected):
        raise StepError(f"memory of node {node} holds other bytes than were stored")
    pages = _pages_on(address, node)
    if pages * 4096 < _BYTES:
        raise StepError(f"expected {_BYTES >> 12} pages on node {node}, found {pages}")
    return {"MiB": total >> 10, "pages used": pages, "nodes": _nodes()}


def _pages_on(address: int, node: int) -> int:
    """Return how many 4 KiB pages of the area at an address lie on a node."""
    for line in Path("/proc/self/numa_maps").read_text().splitlines():
        if line.startswith((f"{address:x} ", f"{address:08x} ")):
            found = re.search(rf"\bN{node}=(\d+)", line)
            size = re.search(r"kernelpagesize_kB=(\d+)", line)
            return int(found[1]) * (int(size[1]) // 4 if size else 1) if found else 0
    return 0


def _nodes() -> str:
    return call("cat /sys/devices/system/node/has_memory").strip()
