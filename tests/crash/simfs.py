"""A filesystem in memory that writes down all that is done to it.

Files are memfds, so that native reads, writes and maps work as on a real one. Every change goes
into the journal.
"""

import ctypes
import errno
import os
import random
from dataclasses import dataclass

import numpy as np

from kvfs import _native
from kvfs.devices.filesystem import RAW, SEGMENTS, STAGING, File, FileSystem, is_own_name
from kvfs.units import PAGE, align_up
from tests.crash.events import (
    Create,
    Event,
    FailedSync,
    Journal,
    Rename,
    Resize,
    Sync,
    SyncNames,
    Unlink,
    Write,
)

LOCATION = 0x10CA7104


@dataclass(slots=True, eq=False)
class _Inode:
    """`medium`: what uncached reads see after a failed sync; None: the same as the memfd."""

    number: int
    fd: int
    handles: int = 0
    links: int = 1
    medium: bytearray | None = None

    def note_write(self, offset: int, raw: bytes) -> None:
        """Let uncached reads see a later write: they write dirty pages out first."""
        if self.medium is not None:
            end = offset + len(raw)
            self.medium.extend(bytes(max(0, end - len(self.medium))))
            self.medium[offset:end] = raw


class SimFile(File):
    """An open file; `fd` is a duplicate of the inode's memfd."""

    def __init__(self, files: "SimFileSystem", inode: _Inode, *, writable: bool = True) -> None:
        self._files = files
        self._inode = inode
        if writable:
            self.fd = os.dup(inode.fd)
        else:
            self.fd = os.open(f"/proc/self/fd/{inode.fd}", os.O_RDONLY | os.O_CLOEXEC)
        inode.handles += 1

    def write(self, offset: int, data: bytes | memoryview) -> None:
        raw = bytes(data)
        fails = self._files.takes_failing_write()
        if fails:
            raw = raw[: self._files.random.randrange(len(raw) + 1)]
        assert os.pwrite(self.fd, raw, offset) == len(raw)
        self._inode.note_write(offset, raw)
        self._files.note(Write(self._files.disk, self._inode.number, offset, raw))
        if fails:
            raise OSError(errno.EIO, "injected failure of pwrite")

    def write_hashed(self, offsets, sources, lengths, digests, statuses) -> int:
        failed = _native.pwrite_hash(self.fd, offsets, sources, lengths, digests, statuses, PAGE)
        if self._files.takes_failing_write():
            statuses[self._files.random.randrange(len(statuses))] = -errno.EIO
            failed += 1
        for i in range(len(offsets)):
            if statuses[i] == 0:
                nbytes = int(lengths[i])
                raw = ctypes.string_at(int(sources[i]), nbytes).ljust(align_up(nbytes, PAGE), b"\0")
                self._inode.note_write(int(offsets[i]), raw)
                event = Write(self._files.disk, self._inode.number, int(offsets[i]), raw)
                self._files.note(event)
        return failed

    def resize(self, nbytes: int) -> None:
        os.ftruncate(self.fd, nbytes)
        self._files.note(Resize(self._files.disk, self._inode.number, nbytes))

    def clear(self) -> None:
        nbytes = os.fstat(self.fd).st_size
        for size in (0, nbytes):
            self.resize(size)

    def sync(self) -> None:
        self._files.sync_inode(self._inode)

    def has_writers(self) -> bool | None:
        self._files.refused_seals -= 1
        return self._files.refused_seals >= 0

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
            self._inode.handles -= 1
            self._files.collect(self._inode)


class SimFileSystem(FileSystem):
    """One disk. `journal` None records nothing (a recovery that nobody crashes)."""

    def __init__(self, disk: int = 0, journal: Journal | None = None) -> None:
        self.disk = disk
        self.journal = journal
        self.place = LOCATION
        self.failing_syncs = 0
        self.failing_writes = 0
        self.refused_seals = 0  # how often `File.has_writers` will say yes
        self.random = random.Random(0)
        self._names: dict[str, _Inode] = {}
        self._next = 1

    # --- images

    @classmethod
    def restore(
        cls, files: dict[str, bytes], disk: int = 0, journal: Journal | None = None
    ) -> "SimFileSystem":
        """Make a disk that holds exactly these files; inodes are numbered from 1 by path."""
        made = cls(disk, journal)
        for path in sorted(files):
            fd = os.memfd_create("sim", os.MFD_CLOEXEC)
            _fill(fd, files[path])
            made._names[path] = _Inode(made._next, fd)
            made._next += 1
        return made

    def files(self) -> dict[str, bytes]:
        """Return path and contents of every file, as a process without a power cut sees them."""
        return {path: self._content(inode) for path, inode in self._names.items()}

    def note(self, event: Event) -> None:
        if self.journal is not None:
            self.journal.add(event)

    def takes_failing_write(self) -> bool:
        """Say whether this write is to fail."""
        if not self.failing_writes:
            return False
        self.failing_writes -= 1
        return True

    def sync_inode(self, inode: _Inode) -> None:
        """Sync, or fail as a kernel does: part of the pages written, all of them marked clean."""
        if not self.failing_syncs:
            self.note(Sync(self.disk, inode.number))
            return
        self.failing_syncs -= 1
        if self.journal is not None:
            from tests.crash.medium import Medium  # the model reads this module's events

            state = Medium.replay(self.journal).disks[self.disk].inodes[inode.number]
            kept = tuple(i for i in range(len(state.pending)) if self.random.random() < 0.5)
            inode.medium = bytearray(state.content(kept))
            self.note(FailedSync(self.disk, inode.number, kept))
        raise OSError(errno.EIO, "injected failure of fdatasync")

    # --- FileSystem

    def make_directory(self, path: str) -> None:
        """Directories are always there."""

    def list(self, path: str) -> list[tuple[str, int]]:
        prefix = "" if path == "." else f"{path}/"
        return sorted(
            (name[len(prefix) :], os.fstat(inode.fd).st_size)
            for name, inode in self._names.items()
            if name.startswith(prefix) and "/" not in name[len(prefix) :]
        )

    def create(self, path: str, nbytes: int = 0) -> SimFile:
        if path in self._names:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
        inode = _Inode(self._next, os.memfd_create("sim", os.MFD_CLOEXEC))
        self._next += 1
        self._names[path] = inode
        self.note(Create(self.disk, inode.number, path))
        if nbytes:
            os.ftruncate(inode.fd, nbytes)
            self.note(Resize(self.disk, inode.number, nbytes))
        return SimFile(self, inode)

    def open(self, path: str, *, writable: bool = False) -> SimFile:
        return SimFile(self, self._find(path), writable=writable)

    def read(self, path: str) -> bytes | None:
        inode = self._names.get(path)
        return None if inode is None else self._content(inode)

    def read_uncached(self, path: str, offset: int, nbytes: int) -> bytes:
        inode = self._find(path)
        if inode.medium is not None:
            return bytes(inode.medium[offset : offset + nbytes])
        return os.pread(inode.fd, nbytes, offset)

    def rename(self, source: str, target: str) -> None:
        inode = self._find(source)
        old = self._names.get(target)
        del self._names[source]
        self._names[target] = inode
        if old is not None:
            old.links -= 1
            self.collect(old)
        self.note(Rename(self.disk, inode.number, source, target))

    def unlink(self, path: str) -> None:
        inode = self._find(path)
        del self._names[path]
        inode.links -= 1
        self.note(Unlink(self.disk, inode.number, path))
        self.collect(inode)

    def sync_directory(self, path: str) -> None:
        self.note(SyncNames(self.disk, path))

    def remove_tree(self) -> None:
        for path in [path for path in self._names if is_own_name(path)]:
            self.unlink(path)
        for folder in (SEGMENTS, STAGING, RAW, "."):  # a directory that is gone takes names along
            self.sync_directory(folder)

    def location(self) -> int:
        return self.place

    def close(self) -> None:
        """Keep the files: a disk outlives the process that used it. See `discard`."""

    def discard(self) -> None:
        """Forget everything; handles still open keep their own descriptors."""
        for inode in self._names.values():
            if inode.fd >= 0:
                os.close(inode.fd)
                inode.fd = -1
        self._names.clear()

    # --- inside

    def collect(self, inode: _Inode) -> None:
        """Close the memfd of an inode without names and handles."""
        if inode.links == 0 and inode.handles == 0 and inode.fd >= 0:
            os.close(inode.fd)
            inode.fd = -1

    def _find(self, path: str) -> _Inode:
        inode = self._names.get(path)
        if inode is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return inode

    def _content(self, inode: _Inode) -> bytes:
        return os.pread(inode.fd, os.fstat(inode.fd).st_size, 0)


def used_pages(raw: bytes) -> list[int]:
    """Return the numbers of the whole pages that are not zero."""
    whole = len(raw) // PAGE
    pages = np.frombuffer(raw, np.uint64, whole * PAGE // 8).reshape(whole, PAGE // 8)
    return np.flatnonzero(pages.any(axis=1)).tolist()


def fill_pages(fd: int, pages: dict[int, bytes]) -> None:
    """Write pages by number, those that follow each other at once."""
    run: list[int] = []
    for page in [*sorted(pages), -1]:
        if run and page != run[-1] + 1:
            os.pwrite(fd, b"".join(pages[number] for number in run), run[0] * PAGE)
            run = []
        run.append(page)


def _fill(fd: int, raw: bytes) -> None:
    """Write the pages that hold something, so that the rest stays a hole."""
    os.ftruncate(fd, len(raw))
    fill_pages(fd, {page: raw[page * PAGE : (page + 1) * PAGE] for page in used_pages(raw)})
    if len(raw) % PAGE:
        os.pwrite(fd, raw[len(raw) // PAGE * PAGE :], len(raw) // PAGE * PAGE)
