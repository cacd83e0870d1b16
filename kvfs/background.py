"""The pool's background thread: a trio loop that persists what waits, within a bounded delay.

Layer: L4.

- The data plane is synchronous; this is the one place where a pool runs an event loop of its own.
  Later background work (migration, scrubbing) joins its nursery.
- A failing step is logged and tried again after the delay, then after twice that, and so on up to
  10 s: whatever failed, the thread goes on. What could not be persisted for good has been dropped
  and counted by the engine; then there is nothing left to do.
"""

import logging
import math
import threading
from collections.abc import Callable
from typing import Final

import trio

from kvfs.errors import KvfsError

_RETRY_S_MAX: Final = 10.0
_log = logging.getLogger("kvfs.background")


class Background:
    """Runs `step` soon after each `wake`, at most once per delay, in a thread of its own."""

    def __init__(self, step: Callable[[], None], delay_ms: int) -> None:
        self._step = step
        self._delay_s = delay_ms / 1000
        self._thread = threading.Thread(target=self._main, name="kvfs-background", daemon=True)
        self._started = threading.Event()
        self._is_dirty = False
        self._is_stopping = False
        self._failures = 0  # in a row
        self._token: trio.lowlevel.TrioToken | None = None
        self._wake: trio.Event | None = None

    def start(self) -> None:
        """Start the thread; returns when it runs."""
        self._thread.start()
        self._started.wait()

    def wake(self) -> None:
        """Say that there is something to do. Cheap when that is known already; any thread."""
        if self._is_dirty or self._token is None:
            return
        self._is_dirty = True
        self._notify()

    def stop(self) -> None:
        """Stop after the step under way; does not run another. Any thread but its own."""
        self._is_stopping = True
        self._notify()
        self._thread.join()

    def _notify(self) -> None:
        assert self._token is not None
        try:
            self._token.run_sync_soon(self._set)
        except trio.RunFinishedError:
            return

    def _set(self) -> None:
        assert self._wake is not None
        self._wake.set()

    def _main(self) -> None:
        trio.run(self._run)

    async def _run(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._wake = trio.Event()
        self._started.set()
        while not self._is_stopping:
            with trio.move_on_after(self._retry_s()):
                await self._wake.wait()
            if self._is_stopping:
                return
            # Half the bound for gathering a group, half for the persist itself.
            with trio.move_on_after(self._delay_s / 2):
                await self._wait_stopping()
            self._wake = trio.Event()
            self._is_dirty = False
            if not self._is_stopping:
                await trio.to_thread.run_sync(self._guarded_step)

    async def _wait_stopping(self) -> None:
        while not self._is_stopping:
            self._wake = trio.Event()
            await self._wake.wait()

    def _retry_s(self) -> float:
        """Return how long to wait before a step that nobody asked for."""
        if not self._failures:
            return math.inf
        return float(min(_RETRY_S_MAX, self._delay_s * 2 ** min(self._failures - 1, 30)))

    def _guarded_step(self) -> None:
        try:
            self._step()
        except KvfsError as error:
            self._failures += 1
            _log.warning("background persist failed: %s", error)
        except Exception:  # noqa: BLE001 - the thread must outlive whatever a step does
            self._failures += 1
            _log.exception("background persist failed unexpectedly; it is tried again")
        else:
            self._failures = 0
