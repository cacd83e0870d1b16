"""Views: what it costs to stitch blocks together, and to read through the stitches.

Layer: L5.

- The blocks of a view are in random order, so that no two neighbours lie side by side: each is an
  extent of its own, one mmap. Blocks that a context wrote in one go merge, and cost less.
- The sum reads every byte in order (numpy, 64-bit words), the baseline the same number of bytes
  through one ordinary mmap of a populated memfd. `first sum` has the page faults of a fresh map in
  it, on both sides; `sum` has not.
"""

import mmap
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from kvfs import _native
from kvfs.bench.figure import Baseline, Figure, Goal, GoalKind, Unit, ratio_at_least
from kvfs.bench.session import Session, fill
from kvfs.bench.stopwatch import Stopwatch
from kvfs.keys import KeyArray
from kvfs.namespace import Namespace
from kvfs.units import format_bytes

if TYPE_CHECKING:
    from kvfs.views import View

EXTENT_GOAL = Goal(GoalKind.VALUE_AT_MOST, 5000.0)
SUM_GOAL = 0.95
_EXTENTS_MAX = 60_000  # a process may have 65,530 maps


def measure(session: Session) -> Iterator[Figure]:
    """Measure opening, summing and closing views at each block size."""
    scale = session.scale
    for block_bytes in scale.block_sizes():
        case = format_bytes(block_bytes)
        with session.memory_pool(block_bytes, scale.size_bytes) as (_, namespace):
            keys = session.shuffled(fill(session, namespace, scale.size_bytes))[:_EXTENTS_MAX]
            watch = _race(session, namespace, keys, case)
        moved = len(keys) * block_bytes
        opened = watch.per_item("open", len(keys))
        yield Figure("view open, per extent", case, Unit.NANOSECONDS, opened, goal=EXTENT_GOAL)
        closed = watch.per_item("close", len(keys))
        yield Figure("view close, per extent", case, Unit.NANOSECONDS, closed)
        for name in ("first sum", "sum"):
            baseline = Baseline("mmap", watch.rates(f"mmap {name}", moved))
            own = watch.rates(f"view {name}", moved)
            goal = ratio_at_least(SUM_GOAL)
            yield Figure(f"view {name}", case, Unit.BYTES_PER_S, own, baseline, goal)


def _race(session: Session, namespace: Namespace, keys: KeyArray, case: str) -> Stopwatch:
    nbytes = len(keys) * namespace.layout.stride
    watch, warm_up = Stopwatch(), Stopwatch()
    fd = _native.memfd("kvfs-bench-plain", nbytes)
    try:
        filled = _native.Arena(fd, nbytes, populate=True)
        for repeat in range(-1, session.scale.repeats):
            session.progress.note(f"view {case}", max(0, repeat), session.scale.repeats)
            current = watch if repeat >= 0 else warm_up
            sides = [lambda w=current: _view(namespace, keys, w),
                     lambda w=current: _plain(fd, nbytes, w)]  # fmt: skip
            for side in sides if repeat % 2 else reversed(sides):
                side()
            current.lap()
        filled.close()
    finally:
        os.close(fd)
    return watch


def _view(namespace: Namespace, keys: KeyArray, watch: Stopwatch) -> None:
    opened: list[View] = []
    watch.time("open", lambda: opened.append(namespace.view(keys)))
    view = opened[0]
    assert view.is_zero_copy, "these blocks can be mapped"
    words = view.numpy(np.uint64)
    watch.time("view first sum", words.sum)
    watch.time("view sum", words.sum)
    del words
    watch.time("close", view.close)


def _plain(fd: int, nbytes: int, watch: Stopwatch) -> None:
    with mmap.mmap(fd, nbytes, mmap.MAP_SHARED, mmap.PROT_READ) as mapped:
        words = np.frombuffer(mapped, np.uint64)
        watch.time("mmap first sum", words.sum)
        watch.time("mmap sum", words.sum)
        del words
