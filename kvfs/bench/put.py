"""Storing blocks: `put` against copies of the same bytes without checksum, key or log.

Layer: L5.

- Source: private memory, warm. Target: the pool's arena, populated, segments recycled. The
  baselines copy between the same kinds of memory; the whole public call is timed.
- `put` is what a pool with room does; `put evicting` is the same into a full pool, where each
  segment that is opened must first be taken from other blocks.
"""

from collections.abc import Iterator

from kvfs.bench.figure import Baseline, Figure, Unit, ratio_at_least
from kvfs.bench.session import Session, drop_all, library_copy, stream_copy
from kvfs.bench.stopwatch import Stopwatch
from kvfs.namespace import Namespace
from kvfs.pool import Pool
from kvfs.units import format_bytes

GOAL = 0.80


def measure(session: Session) -> Iterator[Figure]:
    """Measure `put` at each block size."""
    size = session.scale.size_bytes
    for block_bytes in session.scale.block_sizes():
        case = format_bytes(block_bytes)
        with session.memory_pool(block_bytes, size) as (pool, namespace):
            watch, moved = Stopwatch(), 0
            for repeat in range(-1, session.scale.repeats):  # the first one warms up
                session.progress.note(f"put {case}", max(0, repeat), session.scale.repeats)
                moved = _fill(session, pool, namespace, watch if repeat >= 0 else Stopwatch())
                watch.lap()
            evicting = Stopwatch()
            for repeat in range(session.scale.repeats):
                session.progress.note(f"put evicting {case}", repeat, session.scale.repeats)
                _fill(session, pool, namespace, evicting, drop=False)
                evicting.lap()
        for name, against, goal in (("put", "stream copy", ratio_at_least(GOAL)),
                                    ("put", "memmove", None)):  # fmt: skip
            baseline = Baseline(against, watch.rates(against, moved))
            yield Figure(name, case, Unit.BYTES_PER_S, watch.rates("put", moved), baseline, goal)
        yield Figure(
            "put evicting", case, Unit.BYTES_PER_S, evicting.rates("put", moved),
            Baseline("stream copy", evicting.rates("stream copy", moved)),
        )  # fmt: skip


def _fill(
    session: Session, pool: Pool, namespace: Namespace, watch: Stopwatch, *, drop: bool = True
) -> int:
    """Put a repeat's bytes, copies taking turns with it; return how many."""
    memory, scale = session.memory, session.scale
    block_bytes = namespace.layout.stride
    per_batch = memory.batch_bytes // block_bytes
    batches = max(1, scale.size_bytes // memory.batch_bytes)
    keys = session.new_keys(namespace, batches * per_batch)
    moved = per_batch * block_bytes
    rows = [part[:moved].reshape(per_batch, block_bytes) for part in memory.windows(memory.private)]
    targets = [part[:moved] for part in memory.windows(memory.arena)]

    def put(step: int) -> None:
        part = keys[step * per_batch : (step + 1) * per_batch]
        namespace.put(part, rows[step % len(rows)], durability="none")

    ways = {
        "put": put,
        "stream copy": lambda i: stream_copy(targets[i % len(targets)], rows[i % len(rows)]),
        "memmove": lambda i: library_copy(targets[i % len(targets)], rows[i % len(rows)]),
    }
    watch.race(ways, batches)
    if drop:
        drop_all(pool, namespace, keys)
    return batches * moved
