"""A DAX device in memory that writes down every store, write-back and fence.

It is a memfd, so that native copies and maps work as on a real one. `SimMemory` stands in for the
map of `DaxDevice`; what it notes of each verb is what the native code does.
"""

import ctypes
import errno
import os
import random

import numpy as np

from kvfs.devices.base import AddressArray, DigestArray, StatusArray
from kvfs.devices.dax_memory import DaxMemory
from kvfs.devices.dax_source import DaxSource
from kvfs.units import PAGE, align_up
from tests.crash.domain import Files
from tests.crash.events import Event, FailedSync, Fence, Journal, Store, Sync, WriteBack
from tests.crash.lines import page_of, path_of
from tests.crash.medium import Medium
from tests.crash.simfs import LOCATION, fill_pages, used_pages


class SimMemory(DaxMemory):
    """The map of a simulated device."""

    def __init__(self, disk: "SimDax", nbytes: int) -> None:
        super().__init__(disk.fd, nbytes, lambda _fd: disk.sync())
        self._disk = disk

    def store(self, offset: int, data: bytes) -> None:
        super().store(offset, data)
        self.note_store(offset, bytes(data), is_streamed=False)
        self.write_back(offset, len(data))
        self.fence()

    def copy_payloads(
        self, targets: AddressArray, sources: AddressArray, lengths: AddressArray,
        digests: DigestArray, statuses: StatusArray,
    ) -> int:  # fmt: skip
        failed = super().copy_payloads(targets, sources, lengths, digests, statuses)
        for i in np.flatnonzero(statuses == 0) if self._disk.journal is not None else ():
            nbytes, start = int(lengths[i]), int(targets[i]) - self.address
            raw = ctypes.string_at(int(sources[i]), nbytes).ljust(align_up(nbytes, PAGE), b"\0")
            self.note_store(start, raw, is_streamed=True)
        self.fence()
        return failed

    def touch(self, offset: int, nbytes: int) -> None:
        super().touch(offset, nbytes)
        for page in range(offset // PAGE * PAGE, offset + nbytes, PAGE):
            self.note_store(page, self.read(page, 8), is_streamed=False)

    # --- what of a verb reaches the medium; a test may take one away

    def note_store(self, offset: int, data: bytes, *, is_streamed: bool) -> None:
        self._disk.note(Store(self._disk.disk, offset, data, is_streamed))

    def write_back(self, offset: int, nbytes: int) -> None:
        self._disk.note(WriteBack(self._disk.disk, offset, nbytes))

    def fence(self) -> None:
        self._disk.note(Fence(self._disk.disk))


class SimSource(DaxSource):
    """What a device is opened on."""

    disk: "SimDax"

    def map(self, nbytes: int = 0) -> SimMemory:
        return SimMemory(self.disk, nbytes or self.nbytes)


class SimDax:
    """One DAX device, or a file in its place, which only a sync persists.

    `journal` None records nothing (a recovery that nobody crashes).
    """

    def __init__(
        self, nbytes: int, disk: int = 0, journal: Journal | None = None, *, is_file: bool = False
    ) -> None:
        self.nbytes = nbytes
        self.is_file = is_file
        self.disk = disk
        self.journal = journal
        self.place = LOCATION
        self.failing_syncs = 0
        self.refused_seals = 0  # it takes no files
        self.random = random.Random(0)
        self.fd = os.memfd_create("sim", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, nbytes)

    @classmethod
    def restore(
        cls, files: Files, nbytes: int, disk: int = 0, journal: Journal | None = None, *,
        is_file: bool = False,
    ) -> "SimDax":  # fmt: skip
        """Make a device that holds exactly these pages."""
        made = cls(nbytes, disk, journal, is_file=is_file)
        fill_pages(made.fd, {page_of(path): raw for path, raw in files.items()})
        return made

    def files(self) -> Files:
        """Return the pages that are not zero, as a process without a power cut sees them."""
        raw = os.pread(self.fd, self.nbytes, 0)
        return {path_of(page): raw[page * PAGE :][:PAGE] for page in used_pages(raw)}

    def source(self) -> SimSource:
        """Open it, with a descriptor of its own."""
        persistence = "page" if self.is_file else "memory_controller"
        opened = SimSource(
            os.dup(self.fd), self.nbytes, persistence, self.is_file, location=self.place
        )
        object.__setattr__(opened, "disk", self)  # as the rest, it does not change
        return opened

    def note(self, event: Event) -> None:
        if self.journal is not None:
            self.journal.add(event)

    def sync(self) -> None:
        """Sync, or fail: of a file, as a kernel does, part of the lines written, no other will."""
        if not self.failing_syncs:
            if self.is_file:
                self.note(Sync(self.disk, 0))
            return
        self.failing_syncs -= 1
        if self.is_file and self.journal is not None:
            pending = Medium.replay(self.journal).disks[self.disk].slots()
            kept = tuple(number for _, number, _ in pending if self.random.random() < 0.5)
            self.note(FailedSync(self.disk, 0, kept))
        raise OSError(errno.EIO, "injected failure of a sync")

    def discard(self) -> None:
        """Forget everything; maps stay what they are."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
