"""Pool.sync tells every thread that may have relied on lost blocks, each once."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import kvfs
from kvfs.devices.wrappers import Fault, FaultyDevice, Verb
from kvfs.errors import DeviceError
from kvfs.metrics import Counters, LossReports
from tests.unit.small_pools import BLOCK_TOKENS, payloads, small_namespace, small_pool


class Threads:
    """Threads by name, each of which lives on."""

    def __init__(self) -> None:
        self._threads: dict[str, ThreadPoolExecutor] = {}

    def run(self, name: str, call: Callable[[], object]) -> object:
        thread = self._threads.setdefault(name, ThreadPoolExecutor(1))
        return thread.submit(call).result(timeout=60)

    def end(self) -> None:
        for thread in self._threads.values():
            thread.shutdown()


def lose_what_is_not_persisted(pool: kvfs.Pool) -> None:
    [device] = pool.store.state.devices
    [log] = device.logs.values()
    log.device = FaultyDevice(log.device, [Fault(Verb.PERSIST, operation="persist")])
    with pytest.raises(DeviceError, match="persist failed"):
        pool.flush()  # as the background does


def test_each_that_put_hears_of_it_once(tmp_path: Path) -> None:
    with small_pool(tmp_path) as pool:
        space, threads = small_namespace(pool), Threads()
        keys, _ = space.keys(np.arange(2 * BLOCK_TOKENS))
        for i, name in enumerate("ab"):
            threads.run(name, lambda i=i: space.put(keys[i : i + 1], payloads(1)))
        lose_what_is_not_persisted(pool)
        for name in "ab":
            with pytest.raises(DeviceError, match="2 blocks were lost by failed persists"):
                threads.run(name, pool.sync)
            threads.run(name, pool.sync)
        threads.run("late", pool.sync)
        with pytest.raises(DeviceError, match="2 blocks were lost"):
            pool.sync()  # who opened the pool may have them put by others
        pool.sync()
        threads.end()


def test_what_nobody_has_heard_of_is_told_to_the_first() -> None:
    counters, threads = Counters(), Threads()
    reports = LossReports(counters)
    counters.blocks_lost = 3
    assert threads.run("first", lambda: reports.listen().news()) == 3
    assert threads.run("second", lambda: reports.listen().news()) == 0
    counters.blocks_lost = 4
    assert [threads.run(n, lambda: reports.listen().news()) for n in ("second", "first")] == [1, 1]
    threads.end()
