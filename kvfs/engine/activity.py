"""Operations under way: what closing a pool and destroying a namespace wait for.

Layer: L3.

- Native calls run without the GIL on addresses and descriptors of segments. Nothing may be
  unmapped or closed under them, so every operation is counted from its start to its end, by
  namespace.
- A process that was forked from the owner is no owner: its operations are refused.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from kvfs.errors import BusyError, ClosedError, NotFoundError

EVERYTHING: Final = 0  # the namespace of operations that concern all of them


class Activity:
    """Counts operations; `lock` is the engine's."""

    def __init__(self, lock: threading.RLock) -> None:
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

    @contextmanager
    def during(self, namespace_id: int = EVERYTHING) -> Iterator[None]:
        """Count an operation while the block runs.

        Raises:
            ClosedError: The pool is closed, or was opened before a fork.
            NotFoundError: The namespace was destroyed.
        """
        self.require()
        with self._condition:
            self.require()
            if namespace_id in self._ended:
                raise NotFoundError(f"namespace was destroyed: {namespace_id:#x}")
            self._running[namespace_id] = self._running.get(namespace_id, 0) + 1
        try:
            yield
        finally:
            with self._condition:
                self._running[namespace_id] -= 1
                if not self._running[namespace_id]:
                    del self._running[namespace_id]
                    self._condition.notify_all()

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
