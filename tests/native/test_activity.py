"""Operations under way: counted, refused, waited for and timed."""

import gc
import os
import threading
import weakref
from collections.abc import Callable

import pytest

from kvfs._native import Gate, Histogram


class Bench:
    """A gate with a clock that stands still."""

    def __init__(self) -> None:
        self.now_ns = 1000
        self.woken = 0
        self.gate = Gate(lambda: self.now_ns, self.refuse, self.wake)

    def refuse(self, namespace_id: int) -> None:
        raise PermissionError(f"namespace {namespace_id}")

    def wake(self) -> None:
        self.woken += 1

    def call(self, histogram: Histogram, took_ns: int) -> None:
        with self.gate.during(1, histogram):
            self.now_ns += took_ns


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_operations_are_counted_by_namespace(bench: Bench) -> None:
    gate = bench.gate
    with gate.during(1), gate.during(1), gate.during(2**63):
        assert (gate.running(1), gate.running(2**63), gate.running(7)) == (2, 1, 0)
        assert gate.running() == 3
    assert gate.running() == 0
    with pytest.raises(ZeroDivisionError), gate.during(1):
        raise ZeroDivisionError
    assert gate.running() == 0
    assert bench.woken == 0


def test_what_has_ended_is_refused_and_waited_for(bench: Bench) -> None:
    gate = bench.gate
    with gate.during(1), gate.during(2):
        gate.end(1)
        gate.wait(1)
        with pytest.raises(PermissionError, match="namespace 1"), gate.during(1):
            pass
        with pytest.raises(PermissionError):
            gate.require(1)
        gate.require(2)
        assert (gate.running(1), bench.woken) == (1, 0)
    assert bench.woken == 2  # each namespace's last
    gate.wait(-1)
    with gate.during(2):
        pass
    assert bench.woken == 2
    gate.close()
    for namespace_id in (0, 2):
        with pytest.raises(PermissionError), gate.during(namespace_id):
            pass
    assert gate.running() == 0


def test_a_refusal_that_does_not_raise_is_one_all_the_same() -> None:
    gate = Gate(None, lambda _: None, lambda: None)
    gate.close()
    with pytest.raises(RuntimeError, match="lets nobody in"), gate.during(1):
        pass


def test_a_forked_child_is_refused(bench: Bench) -> None:
    pid = os.fork()
    if not pid:
        code = 1
        try:
            bench.gate.require(1)
        except PermissionError:
            code = 0 if bench.gate.is_forked else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert not bench.gate.is_forked
    bench.gate.require(1)


def test_long_operations_are_all_timed(bench: Bench) -> None:
    histogram = Histogram()
    for took_ns in (1 << 14, 1 << 20, 1 << 14):
        bench.call(histogram, took_ns)
    assert (histogram.count, histogram.sum_ns) == (3, (2 << 14) + (1 << 20))
    assert (histogram.counts[15], histogram.counts[21]) == (2, 1)


def test_of_short_operations_some_are_timed_and_all_are_counted(bench: Bench) -> None:
    histogram = Histogram()
    bench.call(histogram, 100)
    for _ in range(15):
        bench.call(histogram, 1 << 30)  # not looked at
    assert (histogram.count, histogram.sum_ns) == (16, 1600)
    assert histogram.counts[7] == 16
    bench.call(histogram, 1 << 20)
    assert (histogram.counts[7], histogram.counts[21], histogram.count) == (16, 1, 17)
    bench.call(histogram, 100)
    for _ in range(15):
        bench.call(histogram, 0)
    bench.call(histogram, 200)  # stands for those since the last look, when nobody has looked
    assert (histogram.count, histogram.counts[8]) == (34, 16)
    other = Histogram()
    bench.call(other, 100)
    bench.call(other, 100)
    histogram.add(other)
    assert (histogram.count, histogram.counts[7]) == (36, 19)
    with pytest.raises(TypeError):
        histogram.add(5)  # type: ignore[arg-type]


def test_wrong_arguments(bench: Bench) -> None:
    for wrong in ((), ("1",), (1, 2), (1, None, 3)):
        with pytest.raises(TypeError):
            bench.gate.during(*wrong)  # type: ignore[arg-type]
    for nanoseconds in (-1, 1 << 64):
        with pytest.raises((ValueError, OverflowError)):
            Histogram().note(nanoseconds)


def test_a_clock_that_fails(bench: Bench) -> None:
    gate, histogram = Gate(lambda: 1 // 0, bench.refuse, bench.wake), Histogram()
    with pytest.raises(ZeroDivisionError), gate.during(1, histogram):
        pass
    assert gate.running() == 0


def test_a_gate_does_not_keep_its_owner() -> None:
    class Owner:
        def __init__(self) -> None:
            self.gate = Gate(None, self.refuse, self.wake)

        def refuse(self, _: int) -> None:
            """Stay silent."""

        def wake(self) -> None:
            """Stay silent."""

    gone = weakref.ref(Owner())
    gc.collect()
    assert gone() is None


def test_threads_leave_nothing_behind(bench: Bench) -> None:
    gate, histogram = Gate(None, bench.refuse, bench.wake), Histogram()

    def many(work: Callable[[], object]) -> None:
        for _ in range(5000):
            with gate.during(1, histogram):
                work()

    threads = [threading.Thread(target=many, args=(lambda: sum(range(20)),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (gate.running(), histogram.count) == (0, 20000)
