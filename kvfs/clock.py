"""Time as an argument, so that tests and simulations own it.

Layer: L0.
"""

import time
from typing import Protocol


class Clock(Protocol):
    """A source of time. All values are integers in nanoseconds."""

    def monotonic_ns(self) -> int:
        """Return time that never goes back; its zero means nothing."""

    def wall_ns(self) -> int:
        """Return nanoseconds since 1970-01-01 UTC; may jump."""


class SystemClock:
    """The clock of this machine."""

    # CLOCK_MONOTONIC; without a call of its own, because every operation asks twice.
    monotonic_ns = staticmethod(time.monotonic_ns)

    def wall_ns(self) -> int:
        """Return CLOCK_REALTIME."""
        return time.time_ns()


class ManualClock:
    """A clock that moves only when told."""

    def __init__(self, start_ns: int = 1_700_000_000_000_000_000) -> None:
        self.now_ns = start_ns

    def advance(self, nanoseconds: int) -> None:
        """Move both clocks forward."""
        assert nanoseconds >= 0
        self.now_ns += nanoseconds

    def monotonic_ns(self) -> int:
        """Return the time set."""
        return self.now_ns

    def wall_ns(self) -> int:
        """Return the time set."""
        return self.now_ns
