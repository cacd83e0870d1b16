"""Reading through the mount: a file of `kvfs mount` against the file that holds its bytes.

Layer: L5.

No goals. One large file is written through a mount in a process of its own; `user.kvfs.extents`
says which file of the device holds it. Both are then read in turns: in order, 1 MiB a call, and
4 KiB at random places. `cached`: the kernel has the pages of both. `first`: it has those of the
backing file only, as when an engine opens a context that kvfs wrote. `cold`: it has none, and the
disk is part of the figure. Pages are dropped by POSIX_FADV_DONTNEED, file by file, so that no other
process of the machine is disturbed.
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from kvfs.bench.figure import Baseline, Figure, Unit
from kvfs.bench.session import Session, SkipError
from kvfs.bench.stopwatch import Stopwatch
from kvfs.lifecycle import create_pool, destroy_pool
from kvfs.units import MIB, PAGE

_FUSE = Path("/dev/fuse")
_FILE_BYTES_MAX = 512 * MIB
_READS = 2000
# (case, drop the pages of the mount, drop those of the backing file)
_CASES = (("cached", False, False), ("first", True, False), ("cold", True, True))


def measure(session: Session) -> Iterator[Figure]:
    """Measure reads of one large file."""
    if not os.access(_FUSE, os.R_OK | os.W_OK):
        raise SkipError(f"{_FUSE} cannot be opened")
    nbytes = min(_FILE_BYTES_MAX, session.scale.size_bytes)
    with session.directory() as root, _mounted(session, root, nbytes) as mount_point:
        path = mount_point / "bench"
        session.progress.note("mount: write", 0, 1)
        _write(session, path, nbytes)
        (extent,) = json.loads(os.getxattr(path, "user.kvfs.extents"))
        lane = os.getxattr(path, "user.kvfs.lane").decode()
        with _opened(path) as own, _opened(Path(extent["path"])) as backing:
            for case in _CASES:
                yield from _race(session, own, backing, nbytes, case, lane)


@contextlib.contextmanager
def _mounted(session: Session, root: Path, nbytes: int) -> Iterator[Path]:
    """Mount a new pool with room for a file; unmount and destroy it in the end."""
    mount_point = root / "mount"
    mount_point.mkdir()
    capacity = session.scale.capacity_for(2 * nbytes, MIB)
    url = f"dir:{root / 'device'}?size={capacity}&segment={session.scale.segment_bytes}"
    create_pool(root / "pool", [url]).close()
    try:
        _command("mount", str(root / "pool"), str(mount_point), "--log", str(root / "log"))
        try:
            yield mount_point
        finally:
            _command("umount", str(mount_point))
    finally:
        destroy_pool(root / "pool")


def _command(*arguments: str) -> None:
    command = [sys.executable, "-m", "kvfs.cli.kvfs", *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SkipError(f"kvfs {arguments[0]} failed: {done.stderr.strip()}")


def _write(session: Session, path: Path, nbytes: int) -> None:
    """Write the file through the mount and let kvfs take it over."""
    with path.open("wb", buffering=0) as file:
        source = session.memory.private
        for start in range(0, nbytes, MIB):
            offset = start % len(source)
            file.write(source[offset : offset + min(MIB, nbytes - start)].data)
        os.fsync(file.fileno())


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _race(
    session: Session, own: int, backing: int, nbytes: int, case: tuple[str, bool, bool], lane: str
) -> Iterator[Figure]:
    name, drops_own, drops_backing = case
    pages = np.random.default_rng(5).integers(0, nbytes // PAGE, _READS)
    places = (pages * PAGE).tolist()
    watch, warm_up = Stopwatch(), Stopwatch()
    for repeat in range(-1, session.scale.repeats):
        session.progress.note(f"mount read {name}", max(0, repeat), session.scale.repeats)
        current = watch if repeat >= 0 else warm_up
        for reads, label in ((_in_order, "order"), (_at_random, "random")):
            for side in ("own", "backing") if repeat % 2 else ("backing", "own"):
                # Only the side whose turn it is, so that a cold read finds both caches empty.
                if drops_own:
                    _drop(own)
                if drops_backing:
                    _drop(backing)
                fd = own if side == "own" else backing
                current.time(f"{side} {label}", partial(reads, fd, nbytes, places))
        current.lap()
    case_text = f"{name}, {lane} lane"
    for label, text, amount, unit in (
        ("order", "mount read, in order", nbytes, Unit.BYTES_PER_S),
        ("random", "mount read, at random", _READS, Unit.READS_PER_S),
    ):
        baseline = Baseline("backing file", watch.rates(f"backing {label}", amount))
        yield Figure(text, case_text, unit, watch.rates(f"own {label}", amount), baseline)


def _drop(fd: int) -> None:
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def _in_order(fd: int, nbytes: int, _: list[int]) -> None:
    buffer = bytearray(MIB)
    for offset in range(0, nbytes, MIB):
        done = os.preadv(fd, [buffer], offset)
        assert done == min(MIB, nbytes - offset), "short read"


def _at_random(fd: int, _: int, places: list[int]) -> None:
    buffer = bytearray(PAGE)
    for place in places:
        done = os.preadv(fd, [buffer], place)
        assert done == PAGE, "short read"
