"""Storing blocks in files: `put` into a directory device against `pwrite` of the same bytes.

Layer: L5.

No goals: what a filesystem does with fresh files is most of the figure. `put` has handed its bytes
to the kernel on return, as `pwrite` has; `put sync` has them on the disk, as `pwrite` and one
`fdatasync` per batch have. Each repeat writes fresh files on both sides, in turns, and the page
cache takes them as it does in use.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kvfs.bench.figure import Baseline, Figure, Unit
from kvfs.bench.session import Session, SkipError, drop_all
from kvfs.bench.stopwatch import Stopwatch
from kvfs.namespace import Namespace
from kvfs.pool import Pool
from kvfs.units import MIB, format_bytes

_BLOCK_BYTES = MIB


def measure(session: Session) -> Iterator[Figure]:
    """Measure puts of 1 MiB blocks into a directory on tmpfs and on disk."""
    capacity = session.scale.capacity_for(session.scale.size_bytes, _BLOCK_BYTES)
    try:
        with session.tmpfs(2 * capacity) as root:
            yield _race(session, root, "tmpfs", "async")
    except SkipError:
        session.progress.note("put directory: no tmpfs with enough room", 0, 0)
    with session.directory() as root:
        yield _race(session, root, "disk", "async")
    with session.directory() as root:
        yield _race(session, root, "disk", "sync")


def _race(session: Session, root: Path, medium: str, durability: str) -> Figure:
    scale = session.scale
    name = "put directory" if durability == "async" else "put directory sync"
    case = f"{medium}, {format_bytes(_BLOCK_BYTES)}"
    capacity = scale.capacity_for(scale.size_bytes, _BLOCK_BYTES)
    url = f"dir:{root / 'device'}?size={capacity}&segment={scale.segment_bytes}"
    watch, warm_up = Stopwatch(), Stopwatch()
    moved = 0
    with session.pool(root / "pool", url, _BLOCK_BYTES) as (pool, namespace):
        for repeat in range(-1, scale.repeats):
            session.progress.note(f"{name} {case}", max(0, repeat), scale.repeats)
            current = watch if repeat >= 0 else warm_up
            moved = _write(session, pool, namespace, root / "plain", durability, current)
            current.lap()
    against = "pwrite" if durability == "async" else "pwrite, fdatasync"
    return Figure(
        name, case, Unit.BYTES_PER_S, watch.rates("put", moved),
        Baseline(against, watch.rates("plain", moved)),
    )  # fmt: skip


def _write(
    session: Session, pool: Pool, namespace: Namespace, plain: Path, durability: str,
    watch: Stopwatch,
) -> int:  # fmt: skip
    """Write a repeat's bytes both ways, in turns; return how many."""
    memory = session.memory
    per_batch = memory.batch_bytes // _BLOCK_BYTES
    batches = max(1, session.scale.size_bytes // memory.batch_bytes)
    keys = session.new_keys(namespace, batches * per_batch)
    windows = memory.windows(memory.private)
    is_synced = durability == "sync"
    fd = os.open(plain, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        ways = {
            "put": lambda i: namespace.put(
                keys[i * per_batch : (i + 1) * per_batch],
                windows[i % len(windows)].reshape(per_batch, _BLOCK_BYTES),
                durability=durability,
            ),
            "plain": lambda i: _pwrite(
                fd, windows[i % len(windows)], i * memory.batch_bytes, is_synced=is_synced
            ),
        }
        watch.race(ways, batches)
        drop_all(pool, namespace, keys)
    finally:
        os.close(fd)
        plain.unlink()
    return batches * memory.batch_bytes


def _pwrite(fd: int, data: npt.NDArray[np.uint8], offset: int, *, is_synced: bool) -> None:
    """Write all of it, a block per call."""
    view = data.data
    for start in range(0, len(view), _BLOCK_BYTES):
        done = os.pwrite(fd, view[start : start + _BLOCK_BYTES], offset + start)
        assert done == _BLOCK_BYTES, "short write"
    if is_synced:
        os.fdatasync(fd)
