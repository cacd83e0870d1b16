"""Reading large files of a mount: in order by read(2), through a mapping, and past the page cache.

Layer: L5.

- `measure_file`: one contiguous file, which the kernel reads itself (passthrough), against the file
  of the device that holds its bytes. Both have their pages in the page cache, except for O_DIRECT.
- `measure_context`: a context of scattered blocks, which kvfs-core reads (native), against a mount
  of the same content that is served by plain pyfuse3 handlers, and against reading the segments'
  files at the places of the blocks. The pages of the mounts are dropped before each pass, so that
  every byte comes from who answers; those of the segments are memory. On tmpfs, and for information
  on XFS over a loop device, where content may be passed through although it is scattered.
- `measure_cache`: how much of the page cache such reads take, while the file is open and after.
"""

import ctypes
import mmap
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from threading import Event
from typing import Final

import numpy as np

from kvfs.bench.figure import Figure, Samples, Unit
from kvfs.bench.mounted import (
    CONTEXT,
    FILE,
    PLAIN,
    file_bytes,
    fill_context,
    lane_of,
    mounted,
    new_pool,
    opened,
    pair,
    read_once,
    write_file,
)
from kvfs.bench.race import Race
from kvfs.bench.session import Session, SkipError
from kvfs.units import KIB, MIB, PAGE

BACKING: Final = "backing file"
_PASSTHROUGH: Final = "passthrough"
_NATIVE: Final = "native"
_READ, _MMAP, _DIRECT = "read 1 MiB", "mmap sum", "O_DIRECT 1 MiB"
_FILE_GOALS: Final = {_READ: 0.90, _MMAP: 0.90, _DIRECT: 0.90}
_CONTEXT_GOALS: Final = {_READ: 1.1, _MMAP: 1.15, _DIRECT: 1.6}
_MEMINFO: Final = Path("/proc/meminfo")
_RELEASE_S: Final = 0.3  # the kernel tells of a last close after it
Pieces = Sequence[tuple[int, int, int]]
"""(descriptor, offset, length), in the order of a file."""


def measure_file(session: Session) -> Iterator[Figure]:
    """Measure one contiguous file on disk."""
    nbytes = file_bytes(session)
    with session.directory() as root:
        with new_pool(session, root / "file", 2 * nbytes):
            pass
        with mounted(root / "file") as mount:
            write_file(session, mount.path / FILE, nbytes)
            with opened(mount.path / FILE) as fd:
                if (lane := lane_of(fd)) != _PASSTHROUGH:
                    raise SkipError(f"no passthrough, the file is in the {lane} lane: it needs "
                                    "root, Linux 6.9, and kvfs-core")  # fmt: skip
            ((backing, _, _),) = mount.extents(FILE)
            paths = {"mount": mount.path / FILE, BACKING: backing}
            for what, goal in _FILE_GOALS.items():
                race = Race(session, f"mount-file {what}", Unit.BYTES_PER_S, nbytes,
                            {"mount": mount.processes, BACKING: {}})  # fmt: skip
                with ExitStack() as stack:
                    flags = os.O_DIRECT if what == _DIRECT else 0
                    try:
                        fds = {way: stack.enter_context(opened(path, os.O_RDONLY | flags))
                               for way, path in paths.items()}  # fmt: skip
                    except OSError as error:
                        session.leave_out(f"mount-file {what}", f"{root}: {error.strerror}")
                        continue
                    race.run({way: _reader(what, [(fd, 0, nbytes)]) for way, fd in fds.items()})
                yield from race.figures(f"mount {what}", "file, passthrough lane", "mount",
                                        {BACKING: goal})  # fmt: skip


def measure_context(session: Session) -> Iterator[Figure]:
    """Measure a context of scattered blocks on tmpfs, and on XFS, which can share extents."""
    nbytes = file_bytes(session)
    with session.tmpfs(3 * nbytes) as root:
        yield from _context(session, root, "tmpfs", _CONTEXT_GOALS)
    try:
        with session.loop_xfs(4 * nbytes) as root:
            yield from _context(session, root, "XFS", dict.fromkeys(_CONTEXT_GOALS))
    except SkipError as reason:
        session.leave_out("mount-context on XFS", str(reason))


def _context(
    session: Session, root: Path, medium: str, goals: Mapping[str, float | None]
) -> Iterator[Figure]:
    """Measure on one medium, in the lane that the context gets there. Goals are for native."""
    nbytes = file_bytes(session)
    with pair(session, root, files=()) as (usual, plain):
        for what, goal in goals.items():
            title = f"mount-context {medium} {what}"
            flags = os.O_RDONLY | (os.O_DIRECT if what == _DIRECT else 0)
            processes = {"mount": usual.processes, PLAIN: plain.processes, BACKING: {}}
            race = Race(session, title, Unit.BYTES_PER_S, nbytes, processes)
            with ExitStack() as stack:
                paths = {"mount": usual.path / CONTEXT, PLAIN: plain.path / CONTEXT}
                extents = usual.extents(CONTEXT)
                try:
                    fds = {way: stack.enter_context(opened(path, flags))
                           for way, path in paths.items()}  # fmt: skip
                    segments = {path: stack.enter_context(opened(path, flags))
                                for path in {path for path, _, _ in extents}}  # fmt: skip
                except OSError as error:
                    session.leave_out(title, f"{root}: {error.strerror}")
                    continue
                lane = lane_of(fds["mount"])
                if goal is not None and lane != _NATIVE:
                    raise SkipError(f"the context is in the {lane} lane, not in the native one")
                pieces = [(segments[path], offset, length) for path, offset, length in extents]
                ways = {way: _reader(what, [(fd, 0, nbytes)]) for way, fd in fds.items()}
                ways[BACKING] = _reader(what, pieces)
                race.run(ways, partial(_drop, fds))
            yield from race.figures(f"mount {what}", f"scattered, {lane} lane, {medium}", "mount",
                                    {PLAIN: goal, BACKING: None})  # fmt: skip


def measure_cache(session: Session) -> Iterator[Figure]:
    """Measure what a mount's pages add to the page cache, in the native lane."""
    nbytes = file_bytes(session)
    with session.tmpfs(2 * nbytes) as root:
        with new_pool(session, root / "cache", nbytes) as pool:
            fill_context(session, pool, nbytes)
        with mounted(root / "cache") as mount:
            path = mount.path / CONTEXT
            read_once(path)
            lane, while_open, after_close = "", list[float](), list[float]()
            for repeat in range(session.scale.repeats):
                session.progress.note("mount-cache", repeat, session.scale.repeats)
                with opened(path) as fd:
                    _drop({"": fd}, "")
                    lane = lane_of(fd)
                    _reader(_READ, [(fd, 0, nbytes)])(0)
                    resident = _resident_bytes(fd, nbytes)
                    before = _cached_bytes()
                Event().wait(_RELEASE_S)
                freed = min(resident, max(0, before - _cached_bytes()))
                while_open.append(float(resident))
                after_close.append(float(resident - freed))
    case = f"{nbytes // MIB} MiB read, {lane} lane"
    yield Figure("mount page cache, open", case, Unit.BYTES, Samples(tuple(while_open)))
    yield Figure("mount page cache, closed", case, Unit.BYTES, Samples(tuple(after_close)))


# --- ways of reading


def _reader(what: str, pieces: Pieces) -> Callable[[int], None]:
    """Return what reads all pieces once in a certain way."""
    if what == _MMAP:
        return lambda _: _sum_mapped(pieces)
    buffer = mmap.mmap(-1, MIB)  # aligned, as O_DIRECT wants it
    return lambda _: _read(pieces, buffer)


def _read(pieces: Pieces, buffer: mmap.mmap) -> None:
    view = memoryview(buffer)
    for fd, first, length in pieces:
        for offset in range(0, length, MIB):
            wanted = min(MIB, length - offset)
            done = os.preadv(fd, [view[:wanted]], first + offset)
            assert done == wanted, "short read"


def _sum_mapped(pieces: Pieces) -> None:
    """Read every byte through fresh maps, one per file."""
    ends: dict[int, int] = {}
    for fd, offset, length in pieces:
        ends[fd] = max(ends.get(fd, 0), offset + length)
    maps = {fd: mmap.mmap(fd, end, prot=mmap.PROT_READ) for fd, end in ends.items()}
    for fd, offset, length in pieces:
        np.frombuffer(maps[fd], np.uint64, length // 8, offset).sum()
    for mapped in maps.values():
        mapped.close()


def _drop(fds: dict[str, int], way: str) -> None:
    """Take a mount's pages of a file out of the page cache."""
    if way in fds:
        os.posix_fadvise(fds[way], 0, 0, os.POSIX_FADV_DONTNEED)


# --- the page cache


def _resident_bytes(fd: int, nbytes: int) -> int:
    """Return how many bytes of a file the page cache has."""
    libc = ctypes.CDLL(None, use_errno=True)
    pages = np.zeros(nbytes // PAGE, np.uint8)
    with mmap.mmap(fd, nbytes, prot=mmap.PROT_READ) as mapped:
        address = np.frombuffer(mapped, np.uint8).ctypes.data
        arguments = (ctypes.c_void_p(address), ctypes.c_size_t(nbytes))
        if libc.mincore(*arguments, ctypes.c_void_p(pages.ctypes.data)):
            raise OSError(ctypes.get_errno(), "mincore")
    return int((pages & 1).sum()) * PAGE


def _cached_bytes() -> int:
    """Return the size of the machine's page cache of files, tmpfs aside."""
    fields = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
    kib = int(fields["Cached"].split()[0]) - int(fields["Shmem"].split()[0])
    return kib * KIB
