"""Writing files through a mount: create, write, close, rename, as engines do.

Layer: L5.

- Against the same calls in a directory of the same file system. A file is written by one call and
  never synced; what the system has not put on the medium by itself is not in the figure.
- `bytes written`: what core and owner have let the kernel write to the disk (write_bytes of
  /proc/PID/io: pages made dirty count at once), catalog included, over the bytes of the files.
- `files beyond segments`: files on the device, less one for each segment that is full.
"""

import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from kvfs.bench.figure import Figure, Samples, Unit, at_most
from kvfs.bench.mounted import Mounted, mounted, new_pool, opened
from kvfs.bench.race import PASSES, Race
from kvfs.bench.session import Session
from kvfs.units import KIB, MIB

_LARGE_BYTES: Final = 4 * MIB
_TINY_BYTES: Final = 4 * KIB
_TINY_FILES: Final = 200
_LARGE_MAX: Final = 16
_BACKING: Final = "backing file system"
_GOAL: Final = 0.6
_WRITTEN_MAX: Final = 1.05
_FILES_MAX: Final = 10
# (what the figure is called, bytes of a file, flags of open)
_CASES: Final = (
    ("4 MiB, buffered", _LARGE_BYTES, 0),
    ("4 MiB, O_DIRECT", _LARGE_BYTES, os.O_DIRECT),
    ("4 KiB, buffered", _TINY_BYTES, 0),
)


def measure(session: Session) -> Iterator[Figure]:
    """Measure files of 4 MiB and of 4 KiB on disk and on tmpfs; what is written for them."""
    count = max(2, min(_LARGE_MAX, session.scale.size_bytes // _LARGE_BYTES // 16))
    passes = PASSES * (session.scale.repeats + 1)
    nbytes = 2 * count * passes * _LARGE_BYTES
    with session.directory() as root:
        yield from _race(session, root, count, nbytes, "disk")
    with session.directory() as root:
        yield from _amounts(session, root, count)
    with session.tmpfs(3 * nbytes) as root:
        yield from _race(session, root, count, nbytes, "tmpfs")


def _race(session: Session, root: Path, count: int, nbytes: int, medium: str) -> Iterator[Figure]:
    with new_pool(session, root / "write", nbytes + nbytes // 2):
        pass
    with mounted(root / "write") as mount:
        processes = {"mount": mount.processes, _BACKING: {}}
        for number, (case, size, flags) in enumerate(_CASES):
            is_large = size == _LARGE_BYTES
            files = count if is_large else session.scale.share_of(_TINY_FILES)
            amount, unit = (files * size, Unit.BYTES_PER_S) if is_large else (files, Unit.OPS_PER_S)
            race = Race(session, f"mount-write {medium} {case}", unit, amount, processes)
            with ExitStack() as stack:
                fds = {}
                for way, base in (("mount", mount.path), (_BACKING, root / "plain")):
                    directory = base / f"d{number}"
                    directory.mkdir(parents=True)
                    fds[way] = stack.enter_context(opened(directory, os.O_DIRECTORY))
                payload = _payload(session, size)
                try:
                    race.run({way: _writer(fd, files, payload, flags) for way, fd in fds.items()})
                except OSError as error:
                    session.leave_out(f"mount-write {medium} {case}", str(error))
                    continue
            goal = _GOAL if is_large and medium == "disk" else None
            yield from race.figures("mount write, rename", f"{case}, {medium}", "mount",
                                    {_BACKING: goal})  # fmt: skip


def _payload(session: Session, size: int) -> mmap.mmap:
    """Return bytes to write, aligned as O_DIRECT wants them."""
    payload = mmap.mmap(-1, size)
    payload[:] = session.memory.private[:size].tobytes()
    return payload


def _writer(directory: int, count: int, payload: mmap.mmap, flags: int) -> Callable[[int], None]:
    """Return what writes so many files into a directory, under names of their pass."""

    def write(turn: int) -> None:
        for number in range(count):
            # Content that is there already would be stored once.
            payload[:16] = f"{turn:07} {number:07} ".encode()
            name = f"{turn}-{number}"
            fd = os.open(f".{name}", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | flags,
                         0o600, dir_fd=directory)  # fmt: skip
            try:
                done = os.write(fd, payload)
                assert done == len(payload), "short write"
            finally:
                os.close(fd)
            os.rename(f".{name}", name, src_dir_fd=directory, dst_dir_fd=directory)

    return write


def _amounts(session: Session, root: Path, count: int) -> Iterator[Figure]:
    """Measure what reaches the device for files of 4 MiB."""
    scale = session.scale
    stored = count * PASSES * _LARGE_BYTES
    with new_pool(session, root / "amount", stored * scale.repeats * 3 // 2):
        pass
    factors, beyond = [], []
    with mounted(root / "amount") as mount:
        directory = mount.path / "d"
        directory.mkdir()
        with opened(directory, os.O_DIRECTORY) as fd:
            write = _writer(fd, count, _payload(session, _LARGE_BYTES), 0)
            os.fsync(fd)
            for repeat in range(scale.repeats):
                session.progress.note("mount-write amounts", repeat, scale.repeats)
                before = _written(mount)
                for turn in range(PASSES):
                    write(repeat * PASSES + turn)
                os.fsync(fd)
                factors.append((_written(mount) - before) / stored)
                full = (repeat + 1) * stored // scale.segment_bytes
                beyond.append(float(_count_files(mount.device) - full))
    case = f"4 MiB, {scale.repeats * stored // _LARGE_BYTES} files"
    if any(factors):
        yield Figure("mount write, bytes written per byte", case, Unit.FACTOR,
                     Samples(tuple(factors)), goal=at_most(_WRITTEN_MAX))  # fmt: skip
    else:
        session.leave_out("mount-write bytes written", f"{root} is on no disk")
    yield Figure("mount write, files beyond segments", case, Unit.COUNT, Samples(tuple(beyond)),
                 goal=at_most(_FILES_MAX))  # fmt: skip


def _written(mount: Mounted) -> int:
    """Return the bytes that a mount's processes have caused to be written to disks."""
    total = 0
    for pids in mount.processes.values():
        for pid in pids:
            lines = Path(f"/proc/{pid}/io").read_text().splitlines()
            fields = dict(line.split(": ") for line in lines)
            total += int(fields["write_bytes"]) - int(fields["cancelled_write_bytes"])
    return total


def _count_files(device: Path) -> int:
    return sum(len(files) for _, _, files in os.walk(device))
