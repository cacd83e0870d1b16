"""What the kernel knows of mountpoints: checks before mounting, stale mounts, read-ahead.

Layer: L5.

- A mount whose process was killed stays in the tree and answers ENOTCONN. The next mount there
  takes it away.
- Nothing here looks into a mount that this process serves: that could wait for itself.
"""

import contextlib
import ctypes
import errno
import logging
import os
import re
import select
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kvfs.errors import BusyError, NotFoundError, RefusedError, UnavailableError, UsageError

FILESYSTEM_TYPE: Final = "fuse.kvfs"
_MNT_DETACH: Final = 2
_UNMOUNT_TIMEOUT_S: Final = 30
_STALE_MAX: Final = 16  # mounts left on top of each other
_log = logging.getLogger("kvfs.fuse")


@dataclass(frozen=True, slots=True)
class MountEntry:
    """One line of /proc/self/mountinfo."""

    device: str
    path: str
    filesystem: str
    source: str


def mount_entries() -> list[MountEntry]:
    """Return the mounts this process sees, oldest first."""
    entries = []
    text = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
    for line in text.splitlines():
        head, _, tail = line.partition(" - ")
        fields, rest = head.split(" "), tail.split(" ")
        entries.append(MountEntry(fields[2], _unescape(fields[4]), rest[0], _unescape(rest[1])))
    return entries


def entry_at(path: Path) -> MountEntry | None:
    """Return the mount on top at a path, or None."""
    found = None
    for entry in mount_entries():
        if entry.path == str(path):
            found = entry
    return found


def path_of_device(minor: int) -> Path:
    """Return where a FUSE filesystem is mounted.

    Raises:
        NotFoundError: Nowhere any more.
    """
    for entry in mount_entries():
        if entry.device == f"0:{minor}" and entry.filesystem == FILESYSTEM_TYPE:
            return Path(entry.path)
    raise NotFoundError(f"not mounted: device 0:{minor}")


def real_path(path: Path) -> Path:
    """Return where a mount at a path is in the tree, without looking at the mount."""
    return _resolve_parent(Path(os.path.abspath(path)))


def wait_gone(path: Path, seconds: float) -> None:
    """Wait for a mount to be taken away, at most so long."""
    with open("/proc/self/mountinfo", encoding="ascii", errors="surrogateescape") as table:
        poll = select.poll()
        poll.register(table, select.POLLPRI)  # whenever something is mounted or taken away
        while entry_at(real_path(path)) is not None and poll.poll(seconds * 1000):
            pass


def prepare(path: Path, *, allow_nonempty: bool) -> Path:
    """Check that a mount can go here, taking away a stale one; return the real path.

    Raises:
        NotFoundError: There is no such directory.
        UsageError: It is no directory.
        BusyError: A kvfs mount is there and alive.
        RefusedError: It holds something.
        UnavailableError: The kernel has no FUSE here.
    """
    path = Path(os.path.abspath(path))
    path = _resolve_parent(path)
    entry = entry_at(path)
    for _ in range(_STALE_MAX):
        if not _is_stale(path, entry):
            break
        _log.warning("stale mount taken away: %s", path)
        detach(path)
        entry = entry_at(path)
    if entry is not None and entry.filesystem == FILESYSTEM_TYPE:
        raise BusyError(f"already mounted: {path}; run 'kvfs umount {path}' first")
    if not path.exists():
        raise NotFoundError(f"no such mountpoint: {path}; make the directory first")
    if not path.is_dir():
        raise UsageError(f"mountpoint is not a directory: {path}")
    if not allow_nonempty and any(path.iterdir()):
        raise RefusedError(
            f"mountpoint is not empty: {path}; choose another, or hide what it holds with "
            "--allow-nonempty"
        )
    if not os.path.exists("/dev/fuse"):
        raise UnavailableError("no /dev/fuse: load the module 'fuse', or give the container it")
    return path.resolve()


def unmount(mountpoint: str | os.PathLike[str], *, lazy: bool = True) -> bool:
    """Unmount; return whether at once, or only detached because somebody still uses it.

    Args:
        mountpoint: Where a kvfs mount is, alive or stale.
        lazy: Detach a mount that is in use: it ends when it is used no more.

    Raises:
        NotFoundError: Nothing of kvfs is mounted there.
        BusyError: It is in use and `lazy` is false.
    """
    path = _resolve_parent(Path(os.path.abspath(mountpoint)))
    entry = entry_at(path)
    if entry is None or not entry.filesystem.startswith("fuse"):
        raise NotFoundError(f"not mounted: {path}")
    failure = _unmount_once(path, lazy=False)
    if not failure:
        return True
    if not lazy:
        raise BusyError(
            f"mount is in use{_by_whom(path)}: {path}: {failure}; close its files first"
        )
    _log.warning(
        "mount is in use%s, detached: %s: it ends when its files are closed", _by_whom(path), path
    )
    detach(path)
    return False


def holders_of(path: Path) -> list[int]:
    """Return the processes that have something below a mountpoint open, mapped, or are there.

    Asks /proc alone, never the mount. Of other users' processes only root sees these things.
    """
    return sorted(
        int(process.name)
        for process in Path("/proc").iterdir()
        if process.name.isdigit() and _is_holder(process, os.fspath(path))
    )


def detach(path: Path) -> None:
    """Take a mount out of the tree, whoever uses it.

    Raises:
        BusyError: It stays.
    """
    failure = _unmount_once(path, lazy=True)
    if failure:
        raise BusyError(f"mount cannot be taken away: {path}: {failure}")


def set_read_ahead(path: Path, read_ahead_kb: int) -> bool:
    """Let the kernel read ahead further than a FUSE mount does by itself (128 KiB).

    Returns whether it could: without CAP_SYS_ADMIN, or in a container, the file is not writable.
    """
    entry = entry_at(path)
    if entry is None or not read_ahead_kb:
        return False
    try:
        file = Path(f"/sys/class/bdi/{entry.device}/read_ahead_kb")
        file.write_text(str(read_ahead_kb), encoding="ascii")
    except OSError as error:
        _log.debug("read-ahead stays as it is: %s", error)
        return False
    return True


def mount_fusectl(path: Path) -> None:
    """Mount the filesystem of FUSE's controls, where connections can be aborted.

    Raises:
        OSError: It cannot be mounted.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"fusectl", os.fsencode(path), b"fusectl", 0, None):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


# --- internals


def _by_whom(path: Path) -> str:
    pids = holders_of(path)
    return f" by {', '.join(map(str, pids))}" if pids else ""


def _is_holder(process: Path, path: str) -> bool:
    def is_below(target: str) -> bool:
        return target == path or target.startswith(f"{path}/")

    with contextlib.suppress(OSError):  # it has ended, or is somebody else's
        links = [process / "cwd", process / "root", *(process / "fd").iterdir()]
        if any(is_below(os.readlink(link)) for link in links):
            return True
        maps = (process / "maps").read_text(errors="replace")
        return any(is_below(line[line.find("/") :]) for line in maps.splitlines() if "/" in line)
    return False


def _resolve_parent(path: Path) -> Path:
    """Resolve links above the last component: the mountpoint itself may not answer."""
    return path.parent.resolve() / path.name if path.name else path


def _is_stale(path: Path, entry: MountEntry | None) -> bool:
    if entry is None or not entry.filesystem.startswith("fuse"):
        return False
    try:
        os.statvfs(path)  # asks the mount, where stat may be answered from the kernel's memory
    except OSError as error:
        return error.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    return False


def _unmount_once(path: Path, *, lazy: bool) -> str:
    """Unmount by system call, or with fusermount3's help; return why it did not work."""
    libc = ctypes.CDLL(None, use_errno=True)  # releases the GIL, which the mount's loop may need
    if libc.umount2(os.fsencode(path), _MNT_DETACH if lazy else 0) == 0:
        return ""
    failure = os.strerror(ctypes.get_errno())
    helper = shutil.which("fusermount3")
    if ctypes.get_errno() != errno.EPERM or helper is None:
        return failure
    command = [helper, "-u", *(["-z"] if lazy else []), "--", str(path)]
    with contextlib.suppress(subprocess.TimeoutExpired):
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=_UNMOUNT_TIMEOUT_S, check=False
        )
        return "" if result.returncode == 0 else result.stderr.strip() or failure
    return "fusermount3 did not answer"


def _unescape(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)
