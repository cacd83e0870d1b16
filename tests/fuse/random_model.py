"""What a file of the mount holds for whom, beside a plain copy on tmpfs: the model's extra rules.

The copy on tmpfs has what the file's writers see. The mount differs from it in this, and only this
(README, "As files"):

- A reader keeps the content it opened. When the file is changed meanwhile, a read beyond what has
  become of it may end early or fail with ESTALE; it never returns other bytes.
- What a writer changed is there for others once nobody who wrote has yet to close ("adopted").
  Until then an open for reading finds the former content, or fails with EBUSY if there is none.
- Through raw files everybody sees everything at once, as on tmpfs.
- A private map of a file of which another handle has other content may have no pages (SIGBUS).
- A crash takes what was not adopted. Of what was adopted since the last sync it may take the newest
  versions, and of a file made since then the name.
"""

import os
import zlib
from dataclasses import dataclass, field

Version = tuple[int, int]


def version_of(content: bytes) -> Version:
    """Return what tells contents apart."""
    return len(content), zlib.crc32(content)


@dataclass(eq=False)
class Slot:
    """A file open on both sides. `real`, `copy`: the descriptors."""

    real: int
    copy: int
    flags: int
    file: "File"
    is_active: bool = False
    """Wrote since it was opened."""
    snapshot: bytes | None = None
    """What a reader keeps; None: what the file holds."""
    is_outdated: bool = False
    """The file has been changed since a reader opened it."""

    @property
    def is_writer(self) -> bool:
        return self.flags & os.O_ACCMODE != os.O_RDONLY

    @property
    def may_read(self) -> bool:
        return self.flags & os.O_ACCMODE != os.O_WRONLY

    @property
    def is_direct(self) -> bool:
        return bool(self.flags & os.O_DIRECT)


@dataclass(eq=False)
class File:
    """A file, known by the inode number of its copy."""

    is_raw: bool = False
    will_be_raw: bool = False
    is_dirty: bool = False
    is_written: bool = False
    is_extended: bool = False
    """Its size was set beyond what was written: it must not become raw by that."""
    committed: bytes | None = None
    """While it is dirty: what others see. None: nothing yet."""
    slots: list[Slot] = field(default_factory=list)
    versions: set[Version] = field(default_factory=set)
    """Earlier ones that a crash may bring back."""
    may_vanish: bool = False
    """The name may go in a crash."""

    @property
    def is_busy(self) -> bool:
        return any(slot.is_active for slot in self.slots)

    @property
    def is_published(self) -> bool:
        """Whether others may see it. REQUIRES: a sync since it was changed."""
        return not self.is_dirty or self.committed is not None

    @property
    def is_shared(self) -> bool:
        """Whether handles with different content may be on one inode number.

        Those of small files are, for the sake of locks: where one is mapped, pages are refused.
        """
        return len(self.slots) > 1 and any(slot.snapshot is not None for slot in self.slots)

    @property
    def writers(self) -> list[Slot]:
        return [slot for slot in self.slots if slot.is_writer]

    @property
    def readers(self) -> list[Slot]:
        return [slot for slot in self.slots if not slot.is_writer]

    def begin(self, copy_fd: int) -> None:
        """Note that a writer is about to change it. `copy_fd` can be read."""
        if self.is_raw:
            return
        if not self.is_dirty:
            self.committed = content_of(copy_fd)
            self.versions.add(version_of(self.committed))
            self.is_dirty = True
        for reader in self.readers:
            if reader.snapshot is None:
                reader.snapshot = self.committed
            reader.is_outdated = True

    def adopt(self) -> None:
        """Note that all see now what its writers see."""
        self.is_dirty = self.is_written = False
        self.committed = None
        if self.will_be_raw:
            self.is_raw = True

    def flush(self, slot: Slot) -> None:
        """Note that a descriptor was closed."""
        slot.is_active = False
        if self.is_dirty and self.is_written and not self.is_busy:
            self.adopt()

    def look(self) -> bool:
        """Note that somebody opens it to read; return whether there is something to be read."""
        if self.is_dirty and not self.is_busy:
            self.adopt()
        return self.is_raw or not self.is_dirty or self.committed is not None

    def note_sync(self) -> None:
        """Note that what was adopted is durable."""
        self.versions.clear()
        if self.committed is not None:
            self.versions.add(version_of(self.committed))
        self.may_vanish = self.is_dirty and self.committed is None

    def after_crash(self, content: bytes) -> tuple[set[Version], bool]:
        """Forget what was not adopted; return what may be left, and whether nothing may be.

        Args:
            content: What its writers saw.
        """
        left = set(self.versions)
        now = self.committed if self.is_dirty else content
        if now is not None:
            left.add(version_of(now))
        if self.is_raw:
            left.add(version_of(content))
        may_vanish = self.may_vanish
        self.is_dirty = self.is_written = self.is_extended = False
        self.committed = None
        return left, may_vanish


def content_of(fd: int) -> bytes:
    """Return all bytes of an open file."""
    return os.pread(fd, os.fstat(fd).st_size, 0)
