"""Views: what it costs to stitch blocks together, and to read through the stitches.

Layer: L5.

- The blocks of a view are in random order, so that no two neighbours lie side by side: each is an
  extent of its own, one mmap. `in order` is as a context writes them: neighbours merge, one extent
  per segment is left (the time is still given per block).
- A sample of `view open, per extent` opens 1,000 extents or more, in several views if these are
  small, back to back. `view open, whole` is a single view opened after a gigabyte was read, with
  nothing of kvfs left in the processor's caches: for few extents that is what counts.
- The sum reads every byte in order (numpy, 64-bit words); the baseline reads the same memory
  through an ordinary mmap of each segment. `first sum` has the page faults of a fresh map in it, on
  both sides; `sum` has not.
"""

import mmap
from collections.abc import Iterator
from functools import partial

import numpy as np
import numpy.typing as npt

from kvfs.bench.figure import Baseline, Figure, Goal, GoalKind, Unit, ratio_at_least
from kvfs.bench.session import Session, fill
from kvfs.bench.stopwatch import Stopwatch
from kvfs.keys import KeyArray
from kvfs.namespace import Namespace
from kvfs.pool import Pool
from kvfs.units import format_bytes

EXTENT_GOAL = Goal(GoalKind.VALUE_AT_MOST, 5000.0)
SUM_GOAL = 0.95
_SAMPLE_EXTENTS = 1000
_EXTENTS_MAX = 60_000  # a process may have 65,530 maps


def measure(session: Session) -> Iterator[Figure]:
    """Measure opening, summing and closing views at each block size."""
    scale = session.scale
    for block_bytes in scale.block_sizes():
        case = format_bytes(block_bytes)
        nbytes = min(scale.size_bytes, _EXTENTS_MAX * block_bytes)
        with session.memory_pool(block_bytes, nbytes) as (pool, namespace):
            keys = fill(session, namespace, nbytes)
            shuffled = session.shuffled(keys)
            yield from _figures(case, block_bytes, len(keys),
                                _race(session, pool, namespace, shuffled, case))  # fmt: skip
            if block_bytes == scale.block_sizes()[0]:
                case = f"{case} in order"
                yield from _figures(case, block_bytes, len(keys),
                                    _race(session, pool, namespace, keys, case))  # fmt: skip


def _figures(case: str, block_bytes: int, count: int, watch: Stopwatch) -> Iterator[Figure]:
    opened = watch.per_item("open", count * _views(count))
    yield Figure("view open, per extent", case, Unit.NANOSECONDS, opened, goal=EXTENT_GOAL)
    whole = watch.per_item("open whole", 1)
    yield Figure("view open, whole", case, Unit.NANOSECONDS, whole)
    closed = watch.per_item("close", count)
    yield Figure("view close, per extent", case, Unit.NANOSECONDS, closed)
    moved = count * block_bytes
    for name in ("first sum", "sum"):
        baseline = Baseline("mmap", watch.rates(f"mmap {name}", moved))
        own = watch.rates(f"view {name}", moved)
        goal = ratio_at_least(SUM_GOAL)
        yield Figure(f"view {name}", case, Unit.BYTES_PER_S, own, baseline, goal)


def _views(count: int) -> int:
    """Return how many views of `count` extents a sample opens."""
    return -(-_SAMPLE_EXTENTS // count)


def _race(
    session: Session, pool: Pool, namespace: Namespace, keys: KeyArray, case: str
) -> Stopwatch:
    segments = [
        (segment.handle.fd, segment.payload_end)
        for segment in pool.store.state.devices[0].segments.values()
    ]
    assert sum(end for _, end in segments) == len(keys) * namespace.layout.stride
    watch, warm_up = Stopwatch(), Stopwatch()
    for repeat in range(-1, session.scale.repeats):
        session.progress.note(f"view {case}", max(0, repeat), session.scale.repeats)
        current = watch if repeat >= 0 else warm_up
        view = current.time("open whole", partial(namespace.view, keys))
        assert view.is_zero_copy, "these blocks can be mapped"
        maps = [mmap.mmap(fd, end, mmap.MAP_SHARED, mmap.PROT_READ) for fd, end in segments]
        _sum_both(view.numpy(np.uint64), maps, session.memory.batch_bytes, current)
        for mapped in maps:
            mapped.close()
        current.time("close", view.close)
        for _ in range(_views(len(keys))):
            current.time("open", partial(namespace.view, keys)).close()
        current.lap()
    return watch


def _sum_both(
    words: npt.NDArray[np.uint64], maps: list[mmap.mmap], piece_bytes: int, watch: Stopwatch
) -> None:
    """Sum a view and maps of as many bytes, some megabytes of one and the other in turns."""
    others = [
        np.frombuffer(mapped, np.uint64, min(piece_bytes, len(mapped) - start) // 8, start)
        for mapped in maps
        for start in range(0, len(mapped), piece_bytes)
    ]
    ends = np.cumsum([len(other) for other in others]).tolist()
    own = [words[end - len(other) : end] for end, other in zip(ends, others, strict=True)]
    for name in ("first sum", "sum"):
        ways = {f"view {name}": lambda i: own[i].sum(), f"mmap {name}": lambda i: others[i].sum()}
        watch.race(ways, len(own))
