"""Ways of doing the same thing on mounts, in turns, with the processor time that each took.

Layer: L5.

In every repeat each way does a pass in order, then, unless passes are long, one in reverse order.
Processor time is that of the processes, all threads and system calls included; work that the kernel
does for them in its own threads is not in it.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Final, TypeVar

from kvfs.bench.figure import Baseline, Cost, Figure, Unit, ratio_at_least
from kvfs.bench.session import Session
from kvfs.bench.stopwatch import Stopwatch
from kvfs.units import GIB

PASSES: Final = 2
Processes = Mapping[str, Sequence[int]]
"""Ids of processes by their role: 'core', 'owner', 'reader'."""
_NONE: Final[Processes] = {}
_PER: Final = {Unit.BYTES_PER_S: (GIB, "GiB")}
_PER_OTHERS: Final = (1000, "1000 ops")
_CPUCLOCK_SCHED: Final = 2
T = TypeVar("T")


def cpu_ns(pid: int) -> int:
    """Return the processor time that a process has taken, in nanoseconds."""
    return time.clock_gettime_ns((~pid << 3) | _CPUCLOCK_SCHED)


class MeteredStopwatch(Stopwatch):
    """Takes the processor time of the processes behind each way as well."""

    def __init__(self, processes: Mapping[str, Processes]) -> None:
        """Measure; `processes` by way. The reader is this process unless it says otherwise."""
        super().__init__()
        own = {"reader": [os.getpid()]}
        self._processes = {way: {**own, **roles} for way, roles in processes.items()}
        self._spent: dict[str, dict[str, int]] = {}

    def time(self, name: str, operation: Callable[[], T]) -> T:
        """Add the processor time of an operation, too."""
        roles = self._processes[name]
        before = {role: _sum(pids) for role, pids in roles.items()}
        result = super().time(name, operation)
        spent = self._spent.setdefault(name, dict.fromkeys(roles, 0))
        for role, pids in roles.items():
            spent[role] += _sum(pids) - before[role]
        return result

    def cost(self, name: str, amount: float, per: str) -> Cost:
        """Return the processor time per unit of work; `amount`: units in one repeat."""
        spent, work = self._spent[name], amount * len(self.times(name)) * 1e9
        seconds = {role: nanoseconds / work for role, nanoseconds in spent.items()}
        return Cost(per, seconds["reader"], seconds.get("owner"), seconds.get("core"))


class Race:
    """Ways that take turns; then their figures."""

    def __init__(
        self, session: Session, title: str, unit: Unit, amount: float,
        processes: Mapping[str, Processes], *, passes: int = PASSES,
    ) -> None:  # fmt: skip
        """Prepare. `amount`: bytes or operations of a pass; `processes`: those behind each way."""
        self._session, self._title, self._unit = session, title, unit
        self._amount = amount * passes
        self._passes = passes
        self._processes = processes
        self._watch = MeteredStopwatch(processes)

    def run(
        self, ways: Mapping[str, Callable[[int], object]],
        prepare: Callable[[str], object] | None = None,
    ) -> None:  # fmt: skip
        """Let them race: a repeat to warm up, then those that count.

        Each way is given the number of its pass, from 0 on. `prepare` is called with the way's name
        before every pass and takes no part in the time.
        """
        assert set(ways) == set(self._processes), "processes of every way must be known"
        repeats, names = self._session.scale.repeats, list(ways)
        warm_up = MeteredStopwatch(self._processes)
        for repeat in range(-1, repeats):
            self._session.progress.note(self._title, max(0, repeat), repeats)
            watch = self._watch if repeat >= 0 else warm_up
            first = repeat % len(names)
            order = names[first:] + names[:first]
            for number, pass_order in enumerate([order, order[::-1]][: self._passes]):
                for name in pass_order:
                    if prepare is not None:
                        prepare(name)
                    turn = (repeat + 1) * PASSES + number
                    watch.time(name, partial(ways[name], turn))
            watch.lap()

    def figures(
        self, name: str, case: str, way: str, against: Mapping[str, float | None]
    ) -> Iterator[Figure]:
        """Yield a figure of a way for each other one, with its goal; or one without any."""
        watch, unit = self._watch, self._unit
        divisor, per = _PER.get(unit, _PER_OTHERS)
        work = self._amount / divisor
        samples, cost = watch.rates(way, self._amount), watch.cost(way, work, per)
        if not against:
            yield Figure(name, case, unit, samples, cost=cost)
        for other, value in against.items():
            baseline = Baseline(
                other, watch.rates(other, self._amount), watch.cost(other, work, per)
            )
            goal = None if value is None else ratio_at_least(value)
            yield Figure(name, case, unit, samples, baseline, goal, cost)


def _sum(pids: Sequence[int]) -> int:
    return sum(cpu_ns(pid) for pid in pids)
