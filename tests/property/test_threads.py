"""Many threads at one full store: bytes stay right, tables stay in step, nothing hangs."""

import os
import random
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kvfs.clock import SystemClock
from kvfs.errors import BusyError, NoSpaceError
from kvfs.keys import KeyArray
from kvfs.units import PAGE
from tests.unit.engine_bench import SPACE, Engine, chain, content_of, disk, memory

_THREADS = 5
_OPERATIONS = 120
_CHAINS = 30
Step = Callable[[], None]


class Worker(threading.Thread):
    """Does random operations; `failure` is what went wrong."""

    def __init__(self, engine: Engine, seed: int, *, drops: bool) -> None:
        super().__init__()
        self.engine = engine
        self.drops = drops
        self.random = random.Random(seed)
        self.failure: BaseException | None = None
        self.refused = 0

    def run(self) -> None:
        steps: list[Step] = [
            self.put, self.put, self.put, self.read, self.read, self.hold, self.pin,
            self.drop if self.drops else self.read, self.engine.store.flush,
        ]  # fmt: skip
        try:
            for _ in range(_OPERATIONS):
                try:
                    self.random.choice(steps)()
                except (NoSpaceError, BusyError):
                    self.refused += 1
        except BaseException as error:  # noqa: BLE001 - shown by the test
            self.failure = error

    def keys(self) -> tuple[KeyArray, KeyArray]:
        """Return part of one of the chains that all threads share, and its parents."""
        keys, parents = chain(12, self.random.randrange(_CHAINS) * 100)
        count = self.random.randint(1, 12)
        return keys[:count], parents[:count]

    def put(self) -> None:
        keys, parents = self.keys()
        durability = self.random.choice(("none", "async", "sync"))
        self.engine.put(keys, parents, durability=durability)

    def read(self) -> None:
        self.engine.read(self.keys()[0])

    def hold(self) -> None:
        """Bytes under a lease are right for as long as it lasts."""
        keys, _ = self.keys()
        lease = self.engine.store.lease(SPACE, keys)
        try:
            fds = {
                (s.handle.device_index, s.handle.slot, s.handle.generation): s.handle.fd
                for s in lease.segments
            }
            for _ in range(2):
                for record in lease.records[lease.records["length"] > 0]:
                    place = (record["device"], record["segment"], record["generation"])
                    fd = fds[tuple(int(number) for number in place)]
                    raw = os.pread(fd, int(record["length"]), int(record["page"]) * PAGE)
                    assert raw == content_of(record["key"].tobytes())
                self.put()
        finally:
            self.engine.store.release(lease)

    def pin(self) -> None:
        """What is pinned and resident stays resident, unless somebody drops it by key."""
        keys, _ = self.keys()
        nbytes = self.engine.store.pin(SPACE, keys)
        try:
            resident = keys[np.array(self.engine.resident(keys))]
            self.put()
            assert self.drops or all(self.engine.resident(resident))
        finally:
            self.engine.store.unpin(SPACE, keys, nbytes)

    def drop(self) -> None:
        self.engine.store.drop(SPACE, self.keys()[0])


@pytest.mark.parametrize("drops", [True, False])
@pytest.mark.parametrize("frames", [0, 6])
def test_threads_at_a_full_store(tmp_path: Path, seed: int, frames: int, *, drops: bool) -> None:
    devices = [disk(tmp_path, 8), *([memory(frames)] if frames else [])]
    engine = Engine(devices, clock=SystemClock())  # type: ignore[arg-type]
    engine.clock.advance = lambda _: None  # type: ignore[attr-defined]
    workers = [Worker(engine, seed + i, drops=drops) for i in range(_THREADS)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert not worker.is_alive(), "a thread hangs"
    for worker in workers:
        if worker.failure is not None:
            raise worker.failure
    assert sum(worker.refused for worker in workers) < _THREADS * _OPERATIONS / 4
    for device in engine.state.devices:
        assert not any(segment.leases for segment in device.segments.values())
    engine.check()
    assert not engine.state.pins
    engine.store.flush()
    everything = np.concatenate([chain(12, i * 100)[0] for i in range(_CHAINS)])
    resident = engine.resident(everything)
    assert engine.read(everything) == resident
    engine.close()
