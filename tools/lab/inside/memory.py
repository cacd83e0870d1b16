"""Using the memory of one NUMA node: by system calls, libnuma need not be there; and by a pool.

Layer: tool.
"""

import ctypes
import mmap
import os
import re
from pathlib import Path
from typing import Any, Final

import numpy as np

import kvfs
from kvfs.config import parse_device_url
from kvfs.devices.place import look
from kvfs.emulation import UNKNOWN
from lab.inside.tools import StepError, call
from tests.crash.victim import LAYOUT, SPACE

_MBIND: Final = 237
_MPOL_BIND: Final = 2
_BYTES: Final = 8 << 20
_BLOCKS: Final = 512  # 8 MiB


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


def pool(node: int, root: Path) -> dict[str, Any]:
    """Make a pool of memory of the node, put blocks and read them; see where its pages lie.

    Raises:
        StepError: Blocks are missing or have other bytes, or the memory is of another node.
    """
    url = f"cxl:node={node}?size=64MiB&segment=16MiB"
    before = _shared_kib(node)
    with kvfs.create_pool(root, [url]) as made:
        space = made.namespace(SPACE, LAYOUT)
        keys, _ = space.keys(np.arange(4 * _BLOCKS, dtype=np.uint32))
        data = np.random.default_rng(1).integers(0, 256, (_BLOCKS, LAYOUT.block_bytes), np.uint8)
        space.put(keys, data, durability="none")
        out = np.zeros_like(data)
        if not space.read_into(keys, out).all() or not np.array_equal(out, data):
            raise StepError("blocks are missing or have other bytes")
        taken = _shared_kib(node) - before
        there, elsewhere = _pages_of_device(node)
    kvfs.destroy_pool(root)
    if taken < 64 << 10 or elsewhere or not there:
        raise StepError(
            f"expected 64 MiB of node {node} alone, found {taken} KiB of it; of mapped pages "
            f"{there} lie there, {elsewhere} elsewhere"
        )
    figures = look(parse_device_url(url)).figures
    speed = f"{figures.read_latency_ns} ns and {figures.read_bytes_per_s / 1e9:.1f} GB/s"
    return {
        "node": node, "blocks": _BLOCKS, "pages there": there, "elsewhere": elsewhere,
        "firmware says": "nothing" if figures == UNKNOWN else speed,
    }  # fmt: skip


def _shared_kib(node: int) -> int:
    info = Path(f"/sys/devices/system/node/node{node}/meminfo").read_text()
    found = re.search(r"Shmem:\s+(\d+) kB", info)
    return int(found[1]) if found else 0


def _pages_of_device(node: int) -> tuple[int, int]:
    """Return how many mapped pages of the pool's device lie on the node, and how many do not."""
    there = elsewhere = 0
    for line in Path("/proc/self/numa_maps").read_text().splitlines():
        if re.search(r"memfd:kvfs-cxl0(?![\w-])", line):  # not its label, which is no block's
            for number, count in re.findall(r"\bN(\d+)=(\d+)", line):
                there += int(count) * (int(number) == node)
                elsewhere += int(count) * (int(number) != node)
    return there, elsewhere
