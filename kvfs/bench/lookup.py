"""Finding blocks: `lookup` and `match_prefix`, in batches of 1,000 keys.

Layer: L5.

All keys are resident and asked for in random order, so that every key is a miss of the processor's
caches; the public calls are timed, in Python. The baseline gathers one 64-byte record per key from
an array, at random too: what the memory alone would allow.
"""

from collections.abc import Iterator

import numpy as np

from kvfs.bench.figure import Baseline, Figure, Goal, GoalKind, Unit
from kvfs.bench.session import Session, fill
from kvfs.bench.stopwatch import Stopwatch
from kvfs.engine.index import RECORD
from kvfs.keys import KeyArray
from kvfs.namespace import Namespace
from kvfs.units import PAGE

BATCH_KEYS = 1000
GOAL = Goal(GoalKind.VALUE_AT_LEAST, 10e6)


def measure(session: Session) -> Iterator[Figure]:
    """Measure lookups in an index of `block_count` blocks of 4 KiB."""
    scale = session.scale
    session.progress.note(f"lookup: {scale.block_count} blocks of 4 KiB", 0, scale.repeats)
    nbytes = scale.block_count * PAGE
    with session.memory_pool(PAGE, nbytes) as (_, namespace):
        keys = session.shuffled(fill(session, namespace, nbytes))
        watch = _race(session, namespace, keys)
    case = f"{len(keys)} blocks"
    count = _whole(keys)
    for name in ("lookup", "match_prefix"):
        baseline = Baseline("gather", watch.rates("gather", count))
        yield Figure(name, case, Unit.KEYS_PER_S, watch.rates(name, count), baseline, GOAL)


def _whole(keys: KeyArray) -> int:
    return len(keys) // BATCH_KEYS * BATCH_KEYS


def _race(session: Session, namespace: Namespace, keys: KeyArray) -> Stopwatch:
    table = np.zeros(len(keys), f"V{RECORD.itemsize}")
    table.view(np.uint8)[:] = 1
    order = np.random.default_rng(3).permutation(len(keys))
    starts = range(0, _whole(keys), BATCH_KEYS)
    batches = [keys[start : start + BATCH_KEYS] for start in starts]
    # The two ask for other keys at any time: none finds in the caches what the other one fetched.
    others = batches[len(batches) // 2 :] + batches[: len(batches) // 2]
    rows = [order[start : start + BATCH_KEYS] for start in starts]
    ways = {
        "lookup": lambda i: namespace.lookup(batches[i]),
        "match_prefix": lambda i: namespace.match_prefix(others[i]),
        "gather": lambda i: table[rows[i]],
    }
    watch, warm_up = Stopwatch(), Stopwatch()
    for repeat in range(-1, session.scale.repeats):
        session.progress.note("lookup", max(0, repeat), session.scale.repeats)
        current = watch if repeat >= 0 else warm_up
        current.race(ways, len(batches))
        current.lap()
    assert namespace.match_prefix(keys) == len(keys), "every block is resident"
    return watch
