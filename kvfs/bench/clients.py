"""A pool used by other processes: lookups, puts and reads of 1, 2 and 4 clients.

Layer: L5.

- `client lookup` times the public call in another process, a batch of 1,000 resident keys in random
  order; the median of all batches is a sample, the 99th percentile another.
- `clients put` and `clients read_into` move a repeat's bytes in blocks of 1 MiB, shared out among
  the processes; from the first that begins to the last that ends. The baseline is one thread in the
  owner that moves the same bytes. `put, shared` puts from memory that the owner has mapped.
- `owner` is the processor time of the owner meanwhile, 100 % is one processor.
"""

import contextlib
import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np

from kvfs.bench.figure import Baseline, Figure, Goal, GoalKind, Samples, Unit
from kvfs.bench.session import Session, drop_all, fill
from kvfs.clients.server import ClientServer
from kvfs.clock import SystemClock
from kvfs.errors import KvfsError
from kvfs.keys import KeyArray
from kvfs.namespace import Namespace
from kvfs.pool import Pool
from kvfs.units import MIB, PAGE, format_bytes

BATCH_KEYS: Final = 1000
LOOKUP_GOAL: Final = Goal(GoalKind.VALUE_AT_MOST, 100e3)
PROCESSES: Final = (1, 2, 4)
_LOOKUPS_BLOCKS_MAX: Final = 200_000
_CHILD: Final = "kvfs.bench.clients_child"


class _Clients:
    """Child processes that wait for work."""

    def __init__(self, kind: str, pool: Pool, count: int, block_bytes: int, batch: int) -> None:
        command = [sys.executable, "-m", _CHILD, kind, str(pool.path), str(block_bytes), str(batch)]
        self._folder = pool.path.parent
        self._children = [
            subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            for _ in range(count)
        ]
        for child in self._children:
            self._answer(child)

    def run(self, keys: KeyArray) -> list[dict[str, Any]]:
        """Share keys out, let all work at once, return what each said."""
        parts = np.array_split(keys, len(self._children))
        for number, (child, part) in enumerate(zip(self._children, parts, strict=True)):
            path = Path(self._folder) / f"keys{number}.npy"
            np.save(path, np.ascontiguousarray(part))
            assert child.stdin is not None
            child.stdin.write(f"{path}\n")
            child.stdin.flush()
        return [json.loads(self._answer(child)) for child in self._children]

    def close(self) -> None:
        """End them."""
        for child in self._children:
            child.communicate()

    @staticmethod
    def _answer(child: "subprocess.Popen[str]") -> str:
        assert child.stdout is not None
        line = child.stdout.readline()
        if not line:
            raise KvfsError(f"child failed: {_CHILD}; see its output")
        return line


def measure(session: Session) -> Iterator[Figure]:
    """Measure clients of a pool in memory."""
    yield from _lookups(session)
    size = session.scale.size_bytes
    block_bytes = min(MIB, session.scale.block_sizes()[-1])
    with session.memory_pool(block_bytes, size) as (pool, namespace), ClientServer(pool):
        for kind in ("put", "put-shared", "read"):
            keys = fill(session, namespace, size) if kind == "read" else None
            for count in PROCESSES:
                yield from _moves(session, pool, namespace, kind, count, keys)


def _lookups(session: Session) -> Iterator[Figure]:
    blocks = min(session.scale.block_count, _LOOKUPS_BLOCKS_MAX) // BATCH_KEYS * BATCH_KEYS
    with session.memory_pool(PAGE, blocks * PAGE) as (pool, namespace), ClientServer(pool):
        keys = session.shuffled(fill(session, namespace, blocks * PAGE))
        medians, worst = [], []
        with contextlib.closing(_Clients("lookup", pool, 1, PAGE, BATCH_KEYS)) as clients:
            for repeat in range(-1, session.scale.repeats):  # the first one warms up
                session.progress.note("client lookup", max(0, repeat), session.scale.repeats)
                times = np.array(clients.run(keys)[0]["times_ns"])
                if repeat >= 0:
                    medians.append(float(np.median(times)))
                    worst.append(float(np.percentile(times, 99)))
    case = f"{BATCH_KEYS} of {blocks}"
    yield Figure("client lookup", case, Unit.NANOSECONDS, Samples(tuple(medians)),
                 goal=LOOKUP_GOAL)  # fmt: skip
    yield Figure("client lookup, p99", case, Unit.NANOSECONDS, Samples(tuple(worst)))


def _moves(
    session: Session, pool: Pool, namespace: Namespace, kind: str, count: int,
    resident: KeyArray | None,
) -> Iterator[Figure]:  # fmt: skip
    block_bytes = namespace.layout.stride
    batch = max(1, session.memory.batch_bytes // block_bytes // 4)
    rows = session.memory.private[: batch * block_bytes].reshape(batch, block_bytes)
    own, together, shares = [], [], []
    nbytes = session.scale.size_bytes // block_bytes * block_bytes
    with contextlib.closing(_Clients(kind, pool, count, block_bytes, batch)) as clients:
        for repeat in range(-1, session.scale.repeats):
            session.progress.note(f"{count} clients {kind}", max(0, repeat), session.scale.repeats)
            keys = session.new_keys(namespace, nbytes // block_bytes)
            own_ns = _in_process(namespace, keys if resident is None else resident, rows, resident)
            if resident is None:
                drop_all(pool, namespace, keys)
            before_s = _processor_s()
            answers = clients.run(keys if resident is None else resident)
            used_s = _processor_s() - before_s
            if resident is None:
                drop_all(pool, namespace, keys)
            elapsed_ns = max(a["end_ns"] for a in answers) - min(a["begin_ns"] for a in answers)
            if repeat >= 0:
                own.append(nbytes * 1e9 / own_ns)
                together.append(nbytes * 1e9 / elapsed_ns)
                shares.append(used_s * 1e9 / elapsed_ns)
    name = {"put": "clients put", "put-shared": "clients put, shared", "read": "clients read_into"}
    case = f"{count} x {format_bytes(block_bytes)}"
    yield Figure(name[kind], case, Unit.BYTES_PER_S, Samples(tuple(together)),
                 Baseline("in the owner", Samples(tuple(own))))  # fmt: skip
    yield Figure(f"{name[kind]}: owner", case, Unit.CPU_SHARE, Samples(tuple(shares)))


def _in_process(namespace: Namespace, keys: KeyArray, rows: Any, resident: KeyArray | None) -> int:
    """Move all bytes with one thread here; return the nanoseconds."""
    clock = SystemClock()
    start_ns = clock.monotonic_ns()
    for start in range(0, len(keys), len(rows)):
        part = keys[start : start + len(rows)]
        if resident is None:
            namespace.put(part, rows[: len(part)], durability="none")
        else:
            assert namespace.read_into(part, rows[: len(part)]).all(), "every block is resident"
    return clock.monotonic_ns() - start_ns


def _processor_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
