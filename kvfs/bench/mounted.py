"""Pools mounted by processes of their own, and what is read from them.

Layer: L5.

- The mounting process is a child in a session of its own: Ctrl-C in a terminal ends the bench, and
  the bench ends its mounts. It is asked to unmount, killed if it does not, and what is left of the
  mount is taken away, before anything below it is removed.
- A file of a mount is `file` (one contiguous file, written through the mount), `context` (blocks of
  1 MiB that lie in another order than they are read) or `small`.
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from kvfs.bench.session import Session, SkipError
from kvfs.config import PoolOptions
from kvfs.errors import UnavailableError
from kvfs.fuse.mountpoint import detach, entry_at
from kvfs.layout import Layout
from kvfs.lifecycle import create_pool
from kvfs.pool import Pool
from kvfs.units import KIB, MIB

FILE: Final = "file"
SMALL: Final = "small"
NAMESPACE: Final = "bench"
CONTEXT: Final = f"{NAMESPACE}/context"
SMALL_BYTES: Final = 64 * KIB
PLAIN: Final = "plain pyfuse3"
_FILE_BYTES_MIN: Final = 16 * MIB
_FILE_BYTES_MAX: Final = 512 * MIB
_DEVICE: Final = "device"
_END_S: Final = 60.0
_POLL_S: Final = 0.02
_FUSE: Final = Path("/dev/fuse")


@dataclass(frozen=True, slots=True)
class Mounted:
    """A mounted pool. `core` is None where requests go straight to the owner."""

    path: Path
    device: Path
    owner: int
    core: int | None

    @property
    def processes(self) -> dict[str, list[int]]:
        """Ids of its processes by role."""
        return {"owner": [self.owner], **({} if self.core is None else {"core": [self.core]})}

    def status(self) -> dict[str, Any]:
        """Return what the mount says of itself."""
        status: dict[str, Any] = json.loads((self.path / ".kvfs/status.json").read_bytes())
        return status

    def extents(self, name: str) -> list[tuple[Path, int, int]]:
        """Return where a file's bytes lie: (path, offset, length), in the order of the file."""
        found, attribute = [], "user.kvfs.extents"
        while attribute:
            parts = json.loads(os.getxattr(self.path / name, attribute))
            attribute = parts[-1].get("next", "")
            parts = parts[:-1] if attribute else parts
            found += [(Path(part["path"]), part["offset"], part["length"]) for part in parts]
        return found


def file_bytes(session: Session) -> int:
    """Return the size of the large files: half of what a repeat moves, at most 512 MiB."""
    nbytes = min(_FILE_BYTES_MAX, max(_FILE_BYTES_MIN, session.scale.size_bytes // 2))
    return nbytes // MIB * MIB


def lane_of(fd: int) -> str:
    """Return who answers the reads of an open file."""
    return os.getxattr(fd, "user.kvfs.lane").decode()


@contextlib.contextmanager
def opened(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    """Open a file for a while."""
    fd = os.open(path, flags | os.O_CLOEXEC, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


# --- pools and mounts


@contextlib.contextmanager
def new_pool(session: Session, root: Path, nbytes: int) -> Iterator[Pool]:
    """Make a pool below a directory, with one device there that has room for `nbytes`."""
    capacity = session.scale.capacity_for(nbytes, MIB)
    root.mkdir()
    url = f"dir:{root / _DEVICE}?size={capacity}&segment={session.scale.segment_bytes}"
    with create_pool(root / "pool", [url], options=PoolOptions(copy_to_dram=False)) as pool:
        yield pool


def fill_context(session: Session, pool: Pool, nbytes: int) -> None:
    """Make a context whose blocks lie in another order than they are read."""
    namespace = pool.namespace(NAMESPACE, Layout(token_shape=(MIB,)))
    keys = session.new_keys(namespace, nbytes // MIB)
    source = session.memory.private.reshape(-1, MIB)
    rows = np.arange(len(keys)) % len(source)
    order = np.random.default_rng(3).permutation(len(keys))
    step = max(1, session.scale.batch_bytes // MIB)
    for start in range(0, len(keys), step):
        part = order[start : start + step]
        namespace.put(keys[part], source[rows[part]])
    context = namespace.context("context")
    for start in range(0, len(keys), step):
        context.append(keys[start : start + step], source[rows[start : start + step]])


@contextlib.contextmanager
def mounted(root: Path, *flags: str) -> Iterator[Mounted]:
    """Mount the pool below `root` that `new_pool` made; unmount it in the end.

    Raises:
        SkipError: It cannot be mounted.
        UnavailableError: The mount did not end as it should.
    """
    if not os.access(_FUSE, os.R_OK | os.W_OK):
        raise SkipError(f"{_FUSE} cannot be opened")
    mount_point, log = root / "mount", root / "log"
    mount_point.mkdir()
    command = [sys.executable, "-m", "kvfs.cli.kvfs", "mount", "--foreground", *flags,
               str(root / "pool"), str(mount_point)]  # fmt: skip
    with log.open("w") as log_file:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log_file, stderr=log_file,
            start_new_session=True,
        )  # fmt: skip
    try:
        _wait_ready(process, log, root / "pool")
        yield Mounted(mount_point, root / _DEVICE, process.pid, _core_of(process.pid))
        _stop(process)
        if process.returncode:
            raise UnavailableError(f"mount ended with {process.returncode}: {_last_line(log)}")
    finally:
        _stop(process)
        if entry_at(mount_point) is not None:
            detach(mount_point)


@contextlib.contextmanager
def pair(
    session: Session, root: Path, name_count: int = 0, files: Sequence[str] = (FILE, SMALL)
) -> Iterator[tuple[Mounted, Mounted]]:
    """Mount two pools of the same content: as usual, and served by plain pyfuse3 handlers.

    Each has the context; `files` says what it has beside, `name_count` how many names lie in the
    directory `bench/many`.
    """
    nbytes = file_bytes(session)
    with contextlib.ExitStack() as stack:
        found = []
        for name, flags in (("core", ()), ("plain", ("--no-core",))):
            session.progress.note(f"mount: fill {name}", 0, 1)
            with new_pool(session, root / name, 4 * nbytes) as pool:
                fill_context(session, pool, nbytes)
                namespace = pool.namespace(NAMESPACE)
                for number in range(name_count):
                    namespace.context(f"many/{number:06}")
            mount = stack.enter_context(mounted(root / name, *flags))
            for file in files:
                write_file(session, mount.path / file, nbytes if file == FILE else SMALL_BYTES)
            read_once(mount.path / CONTEXT)
            found.append(mount)
        usual, plain = found
        if usual.core is None:
            raise SkipError("kvfs-core cannot run here; 'kvfs mount -v' says why")
        yield usual, plain


def write_file(session: Session, path: Path, nbytes: int) -> None:
    """Write a file, 1 MiB a call, and have it on its medium."""
    with path.open("wb", buffering=0) as file:
        source = session.memory.private
        for start in range(0, nbytes, MIB):
            offset = start % len(source)
            file.write(source[offset : offset + min(MIB, nbytes - start)].data)
        os.fsync(file.fileno())


def read_once(path: Path) -> None:
    """Read a file, so that the blocks in a former owner's open segment are verified, too."""
    with path.open("rb", buffering=0) as file:
        while file.read(MIB):
            pass


def _wait_ready(process: subprocess.Popen[bytes], log: Path, pool: Path) -> None:
    """Wait until a mount's process says that it is mounted.

    Raises:
        SkipError: It has ended instead.
    """
    while f"mounted {pool}" not in log.read_text():
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_POLL_S)
            raise SkipError(f"kvfs mount failed: {_last_line(log)}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a mount's process; nothing if it has ended."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(_END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(_END_S)


def _core_of(owner: int) -> int | None:
    for children in Path(f"/proc/{owner}/task").glob("*/children"):
        for pid in children.read_text().split():
            if Path(f"/proc/{pid}/comm").read_text() == "kvfs-core\n":
                return int(pid)
    return None


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"
