"""Operations under way: what closing a pool and destroying a namespace wait for.

Layer: L3.

- Native calls run without the GIL on addresses and descriptors of segments. Nothing may be
  unmapped or closed under them, so every operation is counted from its start to its end, by
  namespace.
- How long an operation took is counted on the way, by whoever wants to know.
- A process that was forked from the owner is no owner: its operations are refused.
"""

import os
import threading
from types import TracebackType
from typing import Final

from kvfs.clock import Clock
from kvfs.errors import BusyError, ClosedError, NotFoundError
from kvfs.metrics import Histogram

EVERYTHING: Final = 0  # the namespace of operations that concern all of them


class Activity:
    """Counts operations; `lock` is the engine's."""

    def __init__(self, lock: threading.RLock, clock: Clock) -> None:
        self._lock = lock
        self._clock = clock
        self._condition = threading.Condition(lock)
        self._running: dict[int, int] = {}
        self._ended: set[int] = set()
        self._is_closed = False
        self._pid = os.getpid()

    def require(self) -> None:
        """Raise ClosedError unless the pool is open in this process."""
        if self._is_closed:
            raise ClosedError("the pool is closed")
        if os.getpid() != self._pid:
            raise ClosedError("the pool belongs to the parent process: open it after the fork")

    def during(
        self, namespace_id: int = EVERYTHING, histogram: Histogram | None = None
    ) -> "Operation":
        """Count an operation while the block runs, and in the end how long it took.

        The block's begin raises:
            ClosedError: The pool is closed, or was opened before a fork.
            NotFoundError: The namespace was destroyed.
        """
        return Operation(self, namespace_id, histogram)

    def end(self, namespace_id: int) -> None:
        """Refuse new operations on a namespace, and wait for those under way."""
        with self._condition:
            self._ended.add(namespace_id)
            self._condition.wait_for(lambda: namespace_id not in self._running)

    def close(self, timeout_s: float) -> None:
        """Refuse new operations, and wait for those under way.

        Raises:
            BusyError: Some did not end in time; they still use the devices.
        """
        with self._condition:
            self._is_closed = True
            if not self._condition.wait_for(lambda: not self._running, timeout_s):
                count = sum(self._running.values())
                raise BusyError(
                    f"{count} operations are still at work after {timeout_s:.0f} s; "
                    "the devices stay open until the process ends"
                )


class Operation:
    """One operation under way. A class, not a generator: half the time of a short lookup was that.

    Entered and left by the same thread, once.
    """

    __slots__ = ("_activity", "_begin_ns", "_histogram", "_namespace_id")

    def __init__(self, activity: Activity, namespace_id: int, histogram: Histogram | None) -> None:
        self._activity = activity
        self._namespace_id = namespace_id
        self._histogram = histogram

    def __enter__(self) -> None:
        activity, namespace_id = self._activity, self._namespace_id
        activity.require()
        with activity._lock:
            if activity._is_closed:
                raise ClosedError("the pool is closed")
            if namespace_id in activity._ended:
                raise NotFoundError(f"namespace was destroyed: {namespace_id:#x}")
            running = activity._running
            running[namespace_id] = running.get(namespace_id, 0) + 1
        self._begin_ns = activity._clock.monotonic_ns()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        activity, namespace_id = self._activity, self._namespace_id
        histogram = self._histogram
        took_ns = activity._clock.monotonic_ns() - self._begin_ns
        with activity._lock:
            running = activity._running
            left = running[namespace_id] - 1
            if left:
                running[namespace_id] = left
            else:
                del running[namespace_id]
                activity._condition.notify_all()
            if histogram is not None:  # as `note` does, without a call
                histogram.counts[took_ns.bit_length()] += 1
                histogram.sum_ns += took_ns
