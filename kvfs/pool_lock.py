"""The lock of a pool: who has it owns the pool, and nobody else.

Layer: L4.

- A flock(2) on `<pool>/lock`, which says for people whose it is. It belongs to the open file, not
  to the process: who is given a duplicate of the descriptor has it, too, and it is free when the
  last duplicate is closed. So it passes from an owner to the next without ever being free.
- Only the owner's user may open the file: whoever can read it can lock it, and clients of other
  users reach the pool's directory.
"""

import contextlib
import fcntl
import json
import os
import sys
from pathlib import Path
from typing import Final

from kvfs.errors import BusyError, RefusedError

LOCK_NAME: Final = "lock"
_MODE: Final = 0o600


def take(root: Path) -> int:
    """Take the lock; return its descriptor.

    Raises:
        BusyError: Another process has it.
    """
    fd = os.open(root / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, _MODE)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        content = _content(fd)
        os.close(fd)
        raise BusyError(
            f"pool is in use: {root}: held by pid {content.get('pid', 'unknown')} "
            f"({content.get('command', 'unknown')}); unmount or stop it first"
        ) from None
    _sign(fd)
    return fd


def inherit(root: Path, fd: int) -> int:
    """Take over a descriptor that the last owner gave; return it. It is closed if it is no lock.

    Raises:
        RefusedError: It is not the lock of this pool.
    """
    try:
        if not os.path.samestat(os.fstat(fd), os.stat(root / LOCK_NAME)):
            raise RefusedError(f"not the lock of this pool: {root}; give the path its owner has")
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # changes nothing if it is held
        _sign(fd)
    except BaseException:
        os.close(fd)
        raise
    return fd


def is_signed(root: Path) -> bool:
    """Say whether an owner of the pool has left its name in the lock file."""
    try:
        fd = os.open(root / LOCK_NAME, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        return {"pid", "command"} <= _content(fd).keys()
    finally:
        os.close(fd)


def _sign(fd: int) -> None:
    with contextlib.suppress(PermissionError):  # another user's, who let this one in
        os.fchmod(fd, _MODE)  # made by an earlier release
    command = Path(sys.argv[0]).name if sys.argv and sys.argv[0] else "python"
    text = json.dumps({"pid": os.getpid(), "command": command})
    os.ftruncate(fd, 0)
    os.pwrite(fd, text.encode(), 0)


def _content(fd: int) -> dict[str, object]:
    try:
        content = json.loads(os.pread(fd, 4096, 0))
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
