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
    for turn in range(batches):
        # Three ways, three parts of the source: none finds in the cache what another one read.
        blocks = memory.window(memory.private, turn)[: per_batch * block_bytes]
        others = [memory.window(memory.private, turn + i)[: len(blocks)] for i in (1, 2)]
        target = memory.window(memory.arena, turn)[: len(blocks)]
        part = keys[turn * per_batch : (turn + 1) * per_batch]
        rows = blocks.reshape(per_batch, block_bytes)
        ways = {
            "put": lambda part=part, rows=rows: namespace.put(part, rows, durability="none"),
            "stream copy": lambda to=target, source=others[0]: stream_copy(to, source),
            "memmove": lambda to=target, source=others[1]: library_copy(to, source),
        }
        watch.take_turns(ways, turn)
    if drop:
        drop_all(pool, namespace, keys)
    return batches * per_batch * block_bytes
