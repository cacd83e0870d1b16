"""A stopwatch for ways of doing the same thing that take turns.

Layer: L5.

The turns are short (tens of milliseconds) and their order rotates, so that what else the machine
does, and what one way leaves in the caches, falls on all of them alike.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Final, TypeVar

from kvfs.bench.figure import Samples, rates
from kvfs.clock import Clock, SystemClock

STEPS_PER_TURN: Final = 4
T = TypeVar("T")


class Stopwatch:
    """Sums up the time of each way over a repeat; a repeat is one sample."""

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = clock or SystemClock()
        self._running: dict[str, int] = {}
        self._laps: dict[str, list[int]] = {}

    def time(self, name: str, operation: Callable[[], T]) -> T:
        """Run an operation, add its time to that of the present repeat, return what it returned."""
        start_ns = self._clock.monotonic_ns()
        result = operation()
        elapsed_ns = self._clock.monotonic_ns() - start_ns
        self._running[name] = self._running.get(name, 0) + elapsed_ns
        return result

    def race(self, ways: Mapping[str, Callable[[int], object]], steps: int) -> None:
        """Let every way do steps 0 to `steps` - 1, some at a time, another one first each turn."""
        names = list(ways)
        for turn, start in enumerate(range(0, steps, STEPS_PER_TURN)):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                for step in range(start, min(start + STEPS_PER_TURN, steps)):
                    self.time(name, partial(ways[name], step))

    def lap(self) -> None:
        """End the repeat."""
        for name, nanoseconds in self._running.items():
            self._laps.setdefault(name, []).append(nanoseconds)
        self._running.clear()

    def times(self, name: str) -> list[int]:
        """Return the nanoseconds of each repeat."""
        return self._laps[name]

    def rates(self, name: str, amount: float) -> Samples:
        """Return amount per second, per repeat."""
        return rates(amount, self._laps[name])

    def per_item(self, name: str, count: int) -> Samples:
        """Return nanoseconds per item, per repeat."""
        return Samples(tuple(time / count for time in self._laps[name]))
