"""A quick figure of how fast a place is: seconds, not a benchmark.

Layer: L1.

A directory is measured with one file without a name, which is gone when this ends, whatever ends
it. Memory is measured by copying to and from it on one thread. Nothing is written to a device that
has no filesystem.
"""

import errno
import mmap
import os
from typing import Final

import numpy as np

from kvfs import _native
from kvfs.clock import Clock, SystemClock
from kvfs.devices.numa import Node, bind
from kvfs.units import MIB

_FILE_BYTES: Final = 256 * MIB
_STEP_BYTES: Final = 4 * MIB
_MEMORY_BYTES: Final = 256 * MIB


def bench_directory(
    root: str, *, nbytes: int = _FILE_BYTES, clock: Clock | None = None
) -> tuple[int, int]:
    """Return bytes per second of a sequential write (with its sync) and of a read from the medium.

    Past the page cache where the filesystem can, else through it: then reads are of memory.

    Args:
        root: A directory that can be written to.
        nbytes: How much; a multiple of 4 MiB.
        clock: Time; the system's when missing.
    """
    clock = clock or SystemClock()
    flags = os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC
    try:
        fd = os.open(root, flags | os.O_DIRECT, 0o600)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        fd = os.open(root, flags, 0o600)
    try:
        os.posix_fallocate(fd, 0, nbytes)
        with mmap.mmap(-1, _STEP_BYTES) as buffer:
            buffer.write(np.random.default_rng(1).bytes(_STEP_BYTES))
            started = clock.monotonic_ns()
            for offset in range(0, nbytes, _STEP_BYTES):
                if os.pwritev(fd, [buffer], offset) != _STEP_BYTES:
                    raise OSError(errno.EIO, "short write", root)
            os.fdatasync(fd)
            written = clock.monotonic_ns()
            for offset in range(0, nbytes, _STEP_BYTES):
                if os.preadv(fd, [buffer], offset) != _STEP_BYTES:
                    raise OSError(errno.EIO, "short read", root)
            done = clock.monotonic_ns()
    finally:
        os.close(fd)
    return _rate(nbytes, written - started), _rate(nbytes, done - written)


def bench_node(
    node: Node, *, nbytes: int = _MEMORY_BYTES, clock: Clock | None = None
) -> tuple[int, int]:
    """Return bytes per second of copying to a node's memory, and from it, on one thread.

    The other end lies where this thread's memory lies.
    """
    clock = clock or SystemClock()
    fd = _native.memfd("kvfs-bench", nbytes)
    try:
        bind(fd, nbytes, node, "bench")
        arena = _native.Arena(fd, nbytes, populate=True)
        local = np.ones(nbytes, np.uint8)
        rates = []
        for target, source in ((arena.address, local.ctypes.data),
                               (local.ctypes.data, arena.address)):  # fmt: skip
            starts = np.arange(0, nbytes, _STEP_BYTES, dtype=np.uint64)
            lengths = np.full(len(starts), _STEP_BYTES, np.uint64)
            started = clock.monotonic_ns()
            _native.copy_verify(
                starts + np.uint64(target), starts + np.uint64(source), lengths, None,
                np.zeros(len(starts), np.int32),
            )  # fmt: skip
            rates.append(_rate(nbytes, clock.monotonic_ns() - started))
        arena.close()
    finally:
        os.close(fd)
    return rates[0], rates[1]


def _rate(nbytes: int, elapsed_ns: int) -> int:
    return nbytes * 1_000_000_000 // max(1, elapsed_ns)
