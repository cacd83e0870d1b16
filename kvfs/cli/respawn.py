"""How a new owner of a mounted pool takes over from one that died.

Layer: L5.

    python -m kvfs.cli.respawn PLAN      started by kvfs-core, with its sockets in the environment

- The mount is kvfs-core's and outlives its owner. The new one opens the pool, which is what it is
  after any crash, and serves the requests that have waited meanwhile.
- It has no terminal and nobody to tell: what it has to say goes to the log.
"""

import fcntl
import logging
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Final

import msgspec

from kvfs.cli import notify
from kvfs.cli.daemon import end_on_sigterm
from kvfs.cli.estate import Estate
from kvfs.cli.logs import start_logging
from kvfs.cli.service import Service
from kvfs.errors import BusyError, KvfsError
from kvfs.pool_lock import LOCK_NAME

if TYPE_CHECKING:
    from kvfs.fuse.mount import MountOptions

_TAKE_OVER_S: Final = 10.0


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What a mount's owner must know; paths are absolute."""

    service: Service
    directory: str
    allow_other: bool
    core: bool
    passthrough: bool
    page_cache_bytes: int | None
    stays_mounted: bool = False

    def mount_options(
        self, *, allow_nonempty: bool = False, is_daemon: bool = True
    ) -> "MountOptions":
        """Return how to mount. A daemon that dies is replaced; others have somebody who sees it."""
        from kvfs.fuse.mount import MountOptions

        command = (sys.executable, "-m", __spec__.name, msgspec.json.encode(self).decode())
        return MountOptions(
            allow_other=self.allow_other, allow_nonempty=allow_nonempty, core=self.core,
            passthrough=self.passthrough, page_cache_bytes=self.page_cache_bytes,
            respawn=command if is_daemon else (),
        )  # fmt: skip


def wait_closed(pool_path: Path, timeout_s: float) -> None:
    """Wait until nobody owns the pool.

    Raises:
        BusyError: Somebody still does after `timeout_s`.
    """

    def give_up(number: int, frame: FrameType | None) -> None:
        del number, frame
        raise TimeoutError

    try:
        fd = os.open(pool_path / LOCK_NAME, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    previous = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, timeout_s)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH)
    except TimeoutError:
        raise BusyError(
            f"the owner has not closed the pool after {timeout_s:g} s: {pool_path}"
        ) from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        os.close(fd)


def main() -> int:
    """Serve the mount that this process was started for."""
    from kvfs.cli.mounting import own_mounted

    plan = msgspec.json.decode(sys.argv[1], type=Plan)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    end_on_sigterm(is_daemon=True)
    service = plan.service
    start_logging(
        service.log, service.log_format, is_foreground=False, is_verbose=service.is_verbose
    )
    log = logging.getLogger("kvfs")
    log.warning("owner of %s died; another takes over: pid %d", plan.directory, os.getpid())
    try:
        wait_closed(Path(service.pool), _TAKE_OVER_S)
        own_mounted(
            plan, Estate.of_manager(), plan.mount_options(),
            lambda: notify.tell_ready(f"mounted {service.pool} on {plan.directory}"),
            is_respawned=True,
        )  # fmt: skip
    except KeyboardInterrupt:
        return 0
    except KvfsError as error:
        log.error("%s", error)  # noqa: TRY400 - its traceback would tell no more
        return error.exit_code
    except Exception:
        log.critical("owner failed", exc_info=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
