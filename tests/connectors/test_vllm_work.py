"""The plug-in's threads and its lookups, by themselves."""

import threading
from collections.abc import Sequence

import pytest

from kvfs.connectors.vllm_work import Lookups, Workers


def test_tasks_run_in_order_and_all_of_them() -> None:
    workers, done = Workers("test", 1), list[int]()
    for number in range(100):
        assert workers.submit(lambda number=number: done.append(number))
    workers.end()
    workers.end()
    assert done == list(range(100))
    assert not workers.submit(lambda: done.append(100))


def test_idle_means_that_nothing_runs() -> None:
    workers, gate, is_idle = Workers("test", 2), threading.Event(), threading.Event()
    workers.submit(gate.wait)

    def wait() -> None:
        workers.wait_idle()
        is_idle.set()

    waiter = threading.Thread(target=wait)
    waiter.start()
    ran = threading.Event()
    workers.submit(ran.set)  # the other thread takes it
    ran.wait()
    assert not is_idle.is_set()
    gate.set()
    waiter.join()
    workers.end()


def test_limit_counts_those_that_wait() -> None:
    workers, started, gate = Workers("test", 1), threading.Event(), threading.Event()

    def hold() -> None:
        started.set()
        gate.wait()

    workers.submit(hold)
    started.wait()
    assert [workers.submit(gate.wait, limit=2) for _ in range(3)] == [True, True, False]
    gate.set()
    workers.end()


def test_task_that_raises_is_logged_and_the_next_one_runs(expected_warnings: list[str]) -> None:
    expected_warnings.append("a task of test raised")
    workers, ran = Workers("test", 1), threading.Event()

    def broken() -> None:
        raise RuntimeError("broken")

    workers.submit(broken)
    workers.submit(ran.set)
    workers.wait_idle()
    assert ran.is_set()
    workers.end()


@pytest.mark.parametrize("is_broken", [False, True])
def test_one_probe_serves_all_who_ask(is_broken: bool, expected_warnings: list[str]) -> None:
    expected_warnings.append("a task of lookup raised")
    batches = list[Sequence[bytes]]()

    def find(keys: Sequence[bytes]) -> Sequence[bool]:
        batches.append(keys)
        if is_broken:
            raise RuntimeError("broken")
        return [key == b"a" for key in keys]

    lookups = Lookups(find)
    assert [lookups.ask(key, who) for key in (b"a", b"b") for who in ("r", "s")] == [None] * 4
    lookups.flush()
    lookups.flush()
    lookups._workers.wait_idle()
    assert batches == [[b"a", b"b"]]
    assert [lookups.ask(key, "r") for key in (b"a", b"b")] == [not is_broken, False]
    lookups.forget("r")
    lookups.forget("nobody")
    assert lookups.ask(b"b", "s") is False  # still wanted by another request
    lookups.forget("s")
    assert lookups.ask(b"b", "t") is None
    lookups.mark([b"a", b"b"], is_found=True)  # neither has a verdict
    assert lookups.ask(b"b", "t") is None
    lookups.end()
