"""What a power cut may leave of a filesystem on a block device.

The model is weaker than any filesystem kvfs runs on, so that what survives here survives there:

- Contents: what the last sync of a file covered is there. Each later write may have reached the
  medium or not, whole or in pieces of 4 KiB or 64 B, in any order. So may each change of size.
- Names: what the last sync of a directory covered is there. Each later creation, renaming and
  unlinking may have reached the medium or not, in any order. A renaming inside one directory is
  atomic. One between two directories may leave both names, but never takes the old name without
  giving the new one.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from tests.crash.domain import Blob, Cache, Domain, Files, Slot, Tear, blob_of
from tests.crash.events import (
    Create,
    FailedSync,
    FileEvent,
    Rename,
    Resize,
    Sync,
    SyncNames,
    Unlink,
    Write,
    folder_of,
)


@dataclass(frozen=True, slots=True)
class NameChange:
    """A pending change of names: `removed` leaves, `added` comes; both in `folder`.

    `after`: serial number of the change without which this one cannot have happened.
    """

    serial: int
    folder: str
    inode: int
    added: str = ""
    removed: str = ""
    after: int = -1

    def apply(self, names: dict[str, int]) -> None:
        if self.removed and names.get(self.removed) == self.inode:
            del names[self.removed]
        if self.added:
            names[self.added] = self.inode


@dataclass(slots=True)
class InodeState:
    """A file's contents: what is persisted, and the operations since."""

    base: bytes = b""
    pending: list[Write | Resize] = field(default_factory=list)

    def content(self, kept: Iterable[int], tears: dict[int, Tear] | None = None) -> bytes:
        """Return the contents with some of the pending operations done."""
        raw = bytearray(self.base)
        for i in kept:
            change = self.pending[i]
            if isinstance(change, Resize):
                _resize(raw, change.nbytes)
            else:
                _write(raw, change, (tears or {}).get(i))
        return bytes(raw)

    def settle(self, kept: Iterable[int]) -> None:
        self.base = self.content(kept)
        self.pending = []


@dataclass(slots=True)
class DiskState(Domain):
    """One filesystem on a block device."""

    inodes: dict[int, InodeState] = field(default_factory=dict)
    names: dict[str, int] = field(default_factory=dict)
    changes: list[NameChange] = field(default_factory=list)
    serial: int = 0

    @classmethod
    def of(cls, files: Files) -> "DiskState":
        """Start from files that are all persisted."""
        state = cls()
        for number, path in enumerate(sorted(files), 1):
            state.inodes[number] = InodeState(files[path])
            state.names[path] = number
        return state

    def live_inodes(self) -> list[int]:
        """Return the inodes that a name may reach after a power cut, in order."""
        reachable = set(self.names.values()) | {c.inode for c in self.changes if c.added}
        return sorted(reachable)

    def apply(self, event: FileEvent) -> None:
        """Advance by one event."""
        if isinstance(event, (Write, Resize)):
            self.inodes[event.inode].pending.append(event)
        elif isinstance(event, Sync):
            state = self.inodes[event.inode]
            state.settle(range(len(state.pending)))
        elif isinstance(event, FailedSync):
            self.inodes[event.inode].settle(event.kept)
        elif isinstance(event, SyncNames):
            for change in self.changes:
                if change.folder == event.folder:
                    change.apply(self.names)
            self.changes = [c for c in self.changes if c.folder != event.folder]
        else:
            self._rename(event)

    def _rename(self, event: Create | Rename | Unlink) -> None:
        def add(folder: str, **fields: object) -> None:
            self.changes.append(NameChange(self.serial, folder, event.inode, **fields))
            self.serial += 1

        if isinstance(event, Create):
            self.inodes[event.inode] = InodeState()
            add(folder_of(event.path), added=event.path)
        elif isinstance(event, Unlink):
            add(folder_of(event.path), removed=event.path)
        elif folder_of(event.source) == folder_of(event.target):
            add(folder_of(event.target), added=event.target, removed=event.source)
        else:
            add(folder_of(event.target), added=event.target)
            add(folder_of(event.source), removed=event.source, after=self.serial - 1)

    # --- Domain

    def slots(self) -> list[Slot]:
        """Return every pending write or change of size, and every change of names."""
        slots: list[Slot] = []
        for inode in self.live_inodes():
            slots += [("content", inode, i) for i in range(len(self.inodes[inode].pending))]
        return slots + [("name", change.inode, i) for i, change in enumerate(self.changes)]

    def can_tear(self, slot: Slot) -> bool:
        """Contents are written in pieces, names are not."""
        return slot[0] == "content"

    def files(self, kept: Sequence[Slot], tears: dict[Slot, Tear], cache: Cache) -> dict[str, Blob]:
        """Return the files by path."""
        done: dict[int, list[int]] = {}
        changed = []
        for kind, inode, i in kept:
            if kind == "content":
                done.setdefault(inode, []).append(i)
            else:
                changed.append(i)
        torn: dict[int, dict[int, Tear]] = {}
        for (_, inode, i), tear in tears.items():
            torn.setdefault(inode, {})[i] = tear
        files = {}
        for path, inode in self._names_after(changed).items():
            state, writes = self.inodes[inode], tuple(done.get(inode, ()))
            if inode in torn:
                files[path] = blob_of(state.content(writes, torn[inode]))
                continue
            tag = (id(self), inode, writes)
            if tag not in cache:
                cache[tag] = blob_of(state.content(writes))
            files[path] = cache[tag]
        return files

    def _names_after(self, changed: list[int]) -> dict[str, int]:
        names = dict(self.names)
        done = set()
        pending = {change.serial for change in self.changes}
        for i in changed:
            change = self.changes[i]
            if change.after < 0 or change.after in done or change.after not in pending:
                change.apply(names)
                done.add(change.serial)
        return names


def _resize(raw: bytearray, nbytes: int) -> None:
    if nbytes < len(raw):
        del raw[nbytes:]
    else:
        raw.extend(bytes(nbytes - len(raw)))


def _write(raw: bytearray, change: Write, tear: Tear | None) -> None:
    end = change.offset + len(change.data)
    if end > len(raw):
        raw.extend(bytes(end - len(raw)))
    if tear is None:
        raw[change.offset : end] = change.data
        return
    unit, seed = tear
    rng = random.Random(seed)
    share = rng.choice((0.2, 0.5, 0.8))
    start = change.offset
    while start < end:
        stop = min(end, start - start % unit + unit)
        if rng.random() < share:
            raw[start:stop] = change.data[start - change.offset : stop - change.offset]
        start = stop
