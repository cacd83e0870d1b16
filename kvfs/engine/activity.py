"""Operations under way: what closing a pool and destroying a namespace wait for.

Layer: L3.

- Native calls run without the GIL on addresses and descriptors of segments. Nothing may be
  unmapped or closed under them, so every operation is counted from its start to its end, by
  namespace.
- How long an operation took is counted on the way, by whoever wants to know.
- A process that was forked from the owner is no owner: its operations are refused.
"""

import threading
from typing import Final

from kvfs import _native
from kvfs.clock import Clock, SystemClock
from kvfs.errors import BusyError, ClosedError, NotFoundError

EVERYTHING: Final = 0  # the namespace of operations that concern all of them


class Activity:
    """Counts operations; `lock` is the engine's, which only those who wait need.

    Counting itself is native: `_native.Gate`.
    """

    def __init__(self, lock: threading.RLock, clock: Clock) -> None:
        self._condition = threading.Condition(lock)
        now = None if isinstance(clock, SystemClock) else clock.monotonic_ns
        self._gate = _native.Gate(now, self._refuse, self._wake)
        self._is_closed = False
        self._during = self._gate.during

    def require(self) -> None:
        """Raise ClosedError unless the pool is open in this process."""
        self._gate.require(EVERYTHING)

    def during(
        self, namespace_id: int = EVERYTHING, histogram: _native.Histogram | None = None
    ) -> _native.Operation:
        """Count an operation while the block runs, and in the end how long it took.

        Entered and left by the same thread, once. The block's begin raises:
            ClosedError: The pool is closed, or was opened before a fork.
            NotFoundError: The namespace was destroyed.
        """
        return self._during(namespace_id, histogram)

    def end(self, namespace_id: int) -> None:
        """Refuse new operations on a namespace, and wait for those under way."""
        with self._condition:
            self._gate.end(namespace_id)
            self._wait_until_none(None, namespace_id)

    def close(self, timeout_s: float) -> None:
        """Refuse new operations, and wait for those under way.

        Raises:
            BusyError: Some did not end in time; they still use the devices.
        """
        with self._condition:
            self._is_closed = True
            self._gate.close()
            if not self._wait_until_none(timeout_s):
                count = self._gate.running()
                raise BusyError(
                    f"{count} operations are still at work after {timeout_s:.0f} s; "
                    "the devices stay open until the process ends"
                )

    def _wait_until_none(self, timeout_s: float | None, *namespace_id: int) -> bool:
        """Wait for the operations on a namespace, or all. REQUIRES: the condition.

        From the announcement on, whoever ends the last operation takes the lock to wake us.
        """
        self._gate.wait(1)
        try:
            return self._condition.wait_for(
                lambda: not self._gate.running(*namespace_id), timeout_s
            )
        finally:
            self._gate.wait(-1)

    def _wake(self) -> None:
        with self._condition:
            self._condition.notify_all()

    def _refuse(self, namespace_id: int) -> None:
        """Say why an operation is refused."""
        if self._is_closed:
            raise ClosedError("the pool is closed")
        if self._gate.is_forked:
            raise ClosedError("the pool belongs to the parent process: open it after the fork")
        raise NotFoundError(f"namespace was destroyed: {namespace_id:#x}")
