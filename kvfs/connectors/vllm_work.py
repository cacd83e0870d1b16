"""Threads that do the work behind the scheduler's back, and lookups that answer later.

Layer: L5, without vLLM.

vLLM calls a tier in the scheduler's thread, which must not wait: whatever touches the pool is a
task of one of these queues.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from kvfs.errors import BusyError

Task = Callable[[], None]
_log = logging.getLogger("kvfs.vllm")
_END_TIMEOUT_S: Final = 60.0


class Workers:
    """A first-in, first-out queue of tasks, and the threads that take them. Thread-safe.

    Tasks report their failures themselves; one that raises is logged and forgotten.
    """

    def __init__(self, name: str, threads: int) -> None:
        """Start the threads, which do not keep the process from ending."""
        self._name = name
        self._lock = threading.Lock()
        self._arrived = threading.Condition(self._lock)
        self._settled = threading.Condition(self._lock)
        self._tasks: deque[Task] = deque()
        self._running = 0
        self._is_ending = False
        self._threads = [
            threading.Thread(target=self._work, name=f"kvfs-vllm-{name}-{number}", daemon=True)
            for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, task: Task, *, limit: int | None = None) -> bool:
        """Queue a task; False if `limit` others wait already, or the queue has ended."""
        with self._lock:
            if self._is_ending or (limit is not None and len(self._tasks) >= limit):
                return False
            self._tasks.append(task)
            self._arrived.notify()
        return True

    def wait_idle(self) -> None:
        """Wait until nothing is queued or running."""
        with self._lock:
            self._settled.wait_for(lambda: not self._tasks and not self._running)

    def end(self) -> None:
        """Do what is queued, then end the threads; idempotent.

        Raises:
            BusyError: A task did not end in time; it may still be copying.
        """
        with self._lock:
            self._is_ending = True
            self._arrived.notify_all()
        for thread in self._threads:
            thread.join(_END_TIMEOUT_S)
            if thread.is_alive():
                raise BusyError(f"kvfs is still at work: {thread.name}; its device may be stalled")

    def _work(self) -> None:
        while True:
            with self._lock:
                self._arrived.wait_for(lambda: bool(self._tasks) or self._is_ending)
                if not self._tasks:
                    return
                task = self._tasks.popleft()
                self._running += 1
            try:
                task()
            except Exception:  # noqa: BLE001 - the thread has other tasks
                _log.exception("a task of %s raised", self._name)
            finally:
                del task  # what it holds is not kept until the next one comes
                with self._lock:
                    self._running -= 1
                    self._settled.notify_all()


class _Probe:
    """One key being looked up. `is_found` is written once by the worker, then by `mark`."""

    __slots__ = ("is_found", "requests")

    def __init__(self) -> None:
        self.is_found: bool | None = None
        self.requests: set[str] = set()


class Lookups:
    """Answers that come a step later, all keys of a step in one batch.

    Called by one thread at a time (vLLM's scheduler, or whoever holds the manager's lock). A
    verdict stays until the requests that asked for it have finished.
    """

    def __init__(self, find: Callable[[Sequence[bytes]], Sequence[bool]]) -> None:
        """Start; `find` says of each key whether it is stored, and runs in a thread."""
        self._find = find
        self._workers = Workers("lookup", 1)
        self._probes: dict[bytes, _Probe] = {}
        self._keys_of: dict[str, set[bytes]] = {}
        self._batch: list[tuple[bytes, _Probe]] = []

    def ask(self, key: bytes, request: str) -> bool | None:
        """Return whether a key is stored, or None: ask again in the next step."""
        probe = self._probes.get(key)
        if probe is None:
            probe = self._probes[key] = _Probe()
            self._batch.append((key, probe))
        probe.requests.add(request)
        self._keys_of.setdefault(request, set()).add(key)
        return probe.is_found

    def flush(self) -> None:
        """Start looking for the keys of this step."""
        batch, self._batch = [one for one in self._batch if one[1].requests], []
        if batch:
            self._workers.submit(lambda: self._settle(batch))

    def mark(self, keys: Sequence[bytes], *, is_found: bool) -> None:
        """Change the verdict on keys, for all who asked: stored meanwhile, or not to be loaded.

        Without the latter the scheduler would try the same load for ever.
        """
        for key in keys:
            probe = self._probes.get(key)
            if probe is not None and probe.is_found is not None:
                probe.is_found = is_found

    def forget(self, request: str) -> None:
        """Let go of what a finished request asked for."""
        for key in self._keys_of.pop(request, ()):
            probe = self._probes.get(key)
            if probe is not None:
                probe.requests.discard(request)
                if not probe.requests:
                    del self._probes[key]

    def end(self) -> None:
        """Stop the thread."""
        self._workers.end()

    def _settle(self, batch: list[tuple[bytes, _Probe]]) -> None:
        found: Sequence[bool] = [False] * len(batch)
        try:
            found = self._find([key for key, _ in batch])
        finally:
            for (_, probe), is_found in zip(batch, found, strict=True):
                probe.is_found = bool(is_found)
