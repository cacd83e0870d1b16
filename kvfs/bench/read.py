"""Reading blocks into the caller's memory: `read_into` against copies of the same bytes.

Layer: L5.

Source: the pool's arena. Target: private memory, warm. `read_into` verifies each block's checksum
in the same pass; the copies do not.
"""

from collections.abc import Iterator

from kvfs.bench.figure import Baseline, Figure, Unit, ratio_at_least
from kvfs.bench.session import Session, fill, library_copy, stream_copy
from kvfs.bench.stopwatch import Stopwatch
from kvfs.keys import KeyArray
from kvfs.namespace import Namespace
from kvfs.units import format_bytes

GOAL = 0.90


def measure(session: Session) -> Iterator[Figure]:
    """Measure `read_into` at each block size."""
    scale = session.scale
    for block_bytes in scale.block_sizes():
        case = format_bytes(block_bytes)
        with session.memory_pool(block_bytes, scale.size_bytes) as (_, namespace):
            keys = fill(session, namespace, scale.size_bytes)
            watch, moved = Stopwatch(), 0
            for repeat in range(-1, scale.repeats):  # the first one warms up
                session.progress.note(f"read_into {case}", max(0, repeat), scale.repeats)
                moved = _read_all(session, namespace, keys, watch if repeat >= 0 else Stopwatch())
                watch.lap()
        for against, goal in (("memmove", ratio_at_least(GOAL)), ("stream copy", None)):
            yield Figure(
                "read_into", case, Unit.BYTES_PER_S, watch.rates("read_into", moved),
                Baseline(against, watch.rates(against, moved)), goal,
            )  # fmt: skip


def _read_all(session: Session, namespace: Namespace, keys: KeyArray, watch: Stopwatch) -> int:
    """Read every block once, copies taking turns with it; return the bytes."""
    memory = session.memory
    block_bytes = namespace.layout.stride
    per_batch = memory.batch_bytes // block_bytes
    batches = len(keys) // per_batch
    moved = per_batch * block_bytes
    rows = [part[:moved].reshape(per_batch, block_bytes) for part in memory.windows(memory.private)]
    sources = [part[:moved] for part in memory.windows(memory.arena)]

    def read(step: int) -> None:
        part = keys[step * per_batch : (step + 1) * per_batch]
        done = namespace.read_into(part, rows[step % len(rows)])
        assert done.all(), "every block is resident"

    ways = {
        "read_into": read,
        "memmove": lambda i: library_copy(rows[i % len(rows)], sources[i % len(sources)]),
        "stream copy": lambda i: stream_copy(rows[i % len(rows)], sources[i % len(sources)]),
    }
    watch.race(ways, batches)
    return batches * moved
