"""Owning a pool until somebody has taken it over, or this process is to end.

Layer: L5.

- An heir may fail after the pool was closed for it. The pool is opened again then. While that
  cannot be done (a device is gone; the heir was of a later release, and has upgraded the catalog)
  this process keeps memory, lock and mount, says why, tries again, and gives all to the next heir
  that asks. Only its own end gives them up, or leaves them to the service manager.
"""

import contextlib
import logging
import os
import select
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

from kvfs.admin import messages as msg
from kvfs.cli import notify
from kvfs.cli.estate import Estate
from kvfs.cli.takeover import Heirs
from kvfs.clock import Clock
from kvfs.errors import UnavailableError

if TYPE_CHECKING:
    from kvfs.admin.operations import Owner
    from kvfs.pool import Pool

_PAUSES_S: Final = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
_log = logging.getLogger("kvfs.service")


@dataclass
class ClosedPool:
    """What a pool's control socket must know while the pool cannot be opened. `why`: for people."""

    path: Path
    name: str
    uuid: UUID
    clock: Clock
    why: str = ""

    def answer(self, pool: Any, owner: "Owner", question: msg.Request) -> Any:
        """Refuse, and say what can be done.

        Raises:
            UnavailableError: Always.
        """
        del pool, owner, question
        raise UnavailableError(
            f"pid {os.getpid()} has closed the pool for an heir that failed, and cannot open it "
            f"again: {self.why}; it keeps memory and mount, and tries again: mend that, or take "
            "over with --takeover and a release that can open it"
        )


class Succession:
    """Owning one pool, again after each heir that did not take it."""

    def __init__(
        self, estate: Estate, heirs: Heirs, *, mount: str = "", end_fd: Callable[[], int]
    ) -> None:
        """Own nothing yet; see `run`.

        Args:
            estate: What passes on.
            heirs: Who may take over.
            mount: Where the pool is mounted, empty if it is not.
            end_fd: Returns a descriptor that is readable when this process is to end; -1: a signal
                raises.
        """
        self._estate = estate
        self._heirs = heirs
        self._mount = mount
        self._end_fd = end_fd

    def run(
        self, opened: Callable[[], "AbstractContextManager[Pool]"], work: Callable[["Pool"], None]
    ) -> None:
        """Open the pool, work, close it; return when that was all, or an heir has it.

        Args:
            opened: Opens the pool and everything through which others reach it.
            work: Opens `heirs` when it is ready; returns when the pool is to be closed.

        Raises:
            Exception: The pool cannot be opened the first time, or it or `work` fails later; or
                this process is to end before the pool could be opened again.
        """
        closed: ClosedPool | None = None
        is_again, failures = False, 0
        while True:
            try:
                with opened() as pool:
                    closed = ClosedPool(pool.path, pool.name, pool.uuid, pool.clock)
                    if failures:
                        _log.info("%s is open again", closed.path)
                        notify.tell(f"STATUS=opened {closed.path} again")
                    work(pool)
                    failures = 0
            except Exception as error:
                if not is_again or closed is None or self._heirs.is_open:
                    raise
                closed.why = str(error) or type(error).__name__
                self._wait(closed, _PAUSES_S[min(failures, len(_PAUSES_S) - 1)])
                failures += 1
                if not self._heirs.has_one:
                    if self._is_to_end():
                        raise
                    continue
            if not self._heirs.has_one or self._heirs.give(self._estate, self._end_fd()):
                return
            is_again = True

    def _wait(self, closed: ClosedPool, seconds: float) -> None:
        """Wait for an heir, the end, or some time; whoever asks is told why."""
        wake_fd = os.eventfd(0, os.EFD_CLOEXEC)
        try:
            self._heirs.open(lambda: os.eventfd_write(wake_fd, 1))
            with notify.Watchdog(lambda: None), self._door(closed):
                _log.error(
                    "%s cannot be opened again: %s; its memory is kept here, and passes to whoever "
                    "takes over; trying again in %g s", closed.path, closed.why, seconds,
                )  # fmt: skip
                notify.tell(f"STATUS=cannot open {closed.path}: {closed.why}")
                poll = select.poll()
                for fd in (wake_fd, self._end_fd()):
                    if fd >= 0:
                        poll.register(fd, select.POLLIN)
                poll.poll(seconds * 1000)
        finally:
            self._heirs.close()
            os.close(wake_fd)

    @contextlib.contextmanager
    def _door(self, closed: ClosedPool) -> Iterator[None]:
        """Let heirs in while the block runs, as far as that can be done."""
        from kvfs.control import ControlServer

        server = ControlServer(closed, mount=self._mount, heirs=self._heirs, answers=closed.answer)
        try:
            server.start()
        except OSError as error:
            _log.warning("nobody can take %s over: %s", closed.path, error)
        try:
            yield
        finally:
            server.stop()

    def _is_to_end(self) -> bool:
        fd = self._end_fd()
        if fd < 0:
            return False
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        return bool(poll.poll(0))
