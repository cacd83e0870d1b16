"""How a mount passes from one owner to the next: kvfs-core goes on, its owner changes.

Layer: L5.

- The door leads to the core: a socket by which another owner comes in. Whoever has it can be the
  next one; once nobody has, the core takes the mount away when its owner is gone.
- An owner that leaves has the core hold what comes from the kernel, answers what it was sent
  before, and lets go. Files that the core reads are read on; what was being written is given up.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from kvfs.clock import Clock
from kvfs.errors import KvfsError
from kvfs.fuse import mountpoint as mountpoints
from kvfs.fuse.core import Core

_DETACH_S: Final = 5.0
_log = logging.getLogger("kvfs.fuse")


@dataclass(slots=True)
class Passing:
    """What a mount needs to be passed on.

    Attributes:
        keep_door: Called with a descriptor of the door when a core was started; takes it. With -1
            when the door it had leads nowhere.
        door_fd: Of the door to a core that has the mount already; -1: there is none.
        stays: SIGTERM leaves the mount to whoever has the door, instead of taking it away.
        is_left: The mount goes on without this process.
    """

    keep_door: Callable[[int], None]
    door_fd: int = -1
    stays: bool = False
    is_left: bool = False
    _leave: list[Callable[[], None]] = field(default_factory=list)

    def bind(self, leave: Callable[[], None]) -> None:
        """Note how to leave the mount."""
        self._leave = [leave]

    def leave(self) -> None:
        """Let the mount go on without this process, soon; `mount` then returns. Any thread."""
        for leave in self._leave:
            leave()

    def enter(self, path: Path, clock: Clock, respawn: Sequence[str]) -> Core | None:
        """Return the core that has the mount already; None if it is to be made.

        Args:
            path: Where it is to be.
            clock: For deadlines.
            respawn: See `Core.start`.
        """
        if self.door_fd < 0:
            return None
        reason = "it is mounted elsewhere"
        try:
            core = Core.enter(self.door_fd, clock, respawn=respawn)
            if core.mountpoint == mountpoints.real_path(path):
                return core
            core.leave()
        except KvfsError as error:
            reason = str(error)
        _log.warning("mounted anew, open files are lost: %s: %s", path, reason)
        self.keep_door(-1)  # nobody has the door now, so that the core takes its mount away
        mountpoints.wait_gone(path, _DETACH_S)
        return None
