"""What a power cut may leave of a sequence of file operations.

The model is weaker than any filesystem kvfs runs on, so that what survives here survives there:

- Contents: what the last sync of a file covered is there. Each later write may have reached the
  medium or not, whole or in pieces of 4 KiB or 64 B, in any order. So may each change of size.
- Names: what the last sync of a directory covered is there. Each later creation, renaming and
  unlinking may have reached the medium or not, in any order. A renaming inside one directory is
  atomic. One between two directories may leave both names, but never takes the old name without
  giving the new one.
- Catalog: any prefix of its commits that contains those synced.
"""

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from kvfs import _native
from tests.crash.simfs import (
    Commit,
    Create,
    Event,
    FailedSync,
    Journal,
    Rename,
    Resize,
    Sync,
    SyncCatalog,
    SyncNames,
    Unlink,
    Write,
    folder_of,
)

_SINGLES_MAX = 24
_TEAR_UNITS = (4096, 64)
Files = dict[str, bytes]
Blob = tuple[bytes, bytes]  # contents and their digest
Tear = tuple[int, int]  # unit in bytes, seed of the choice of units


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
class DiskState:
    """One filesystem."""

    inodes: dict[int, InodeState] = field(default_factory=dict)
    names: dict[str, int] = field(default_factory=dict)
    changes: list[NameChange] = field(default_factory=list)

    def live_inodes(self) -> list[int]:
        """Return the inodes that a name may reach after a power cut, in order."""
        reachable = set(self.names.values()) | {c.inode for c in self.changes if c.added}
        return sorted(reachable)


@dataclass(frozen=True, slots=True)
class Image:
    """What is found after a power cut: files of each disk, and the catalog's database."""

    disks: tuple[Files, ...]
    catalog: bytes | None
    digest: bytes


@dataclass(frozen=True, slots=True)
class Choice:
    """Which pending operations reached the medium. `label` names the choice for people."""

    label: str
    contents: dict[tuple[int, int], tuple[int, ...]]
    names: dict[int, tuple[int, ...]]
    tears: dict[tuple[int, int], dict[int, Tear]] = field(default_factory=dict)


@dataclass(slots=True)
class Medium:
    """The state of all media of a pool after some prefix of its journal."""

    disks: list[DiskState]
    commits: list[bytes | None]
    synced: int = 0
    serial: int = 0

    @classmethod
    def of(cls, disks: Iterable[Files], catalog: bytes | None) -> "Medium":
        """Start from files that are all persisted."""
        states = []
        for files in disks:
            state = DiskState()
            for number, path in enumerate(sorted(files), 1):
                state.inodes[number] = InodeState(files[path])
                state.names[path] = number
            states.append(state)
        return cls(states, [catalog])

    @classmethod
    def replay(cls, journal: Journal) -> "Medium":
        """Start from what the journal began with and apply all its events."""
        count = 1 + max((getattr(event, "disk", 0) for event in journal.events), default=0)
        made = cls.of(journal.before or [{} for _ in range(count)], journal.catalog)
        for event in journal.events:
            made.apply(event)
        return made

    def apply(self, event: Event) -> None:
        """Advance by one event."""
        if isinstance(event, Commit):
            self.commits.append(event.image)
            return
        if isinstance(event, SyncCatalog):
            self.synced = len(self.commits) - 1
            return
        disk = self.disks[event.disk]
        if isinstance(event, (Write, Resize)):
            disk.inodes[event.inode].pending.append(event)
        elif isinstance(event, Sync):
            state = disk.inodes[event.inode]
            state.settle(range(len(state.pending)))
        elif isinstance(event, FailedSync):
            disk.inodes[event.inode].settle(event.kept)
        elif isinstance(event, SyncNames):
            for change in disk.changes:
                if change.folder == event.folder:
                    change.apply(disk.names)
            disk.changes = [c for c in disk.changes if c.folder != event.folder]
        else:
            self._rename(disk, event)

    def _rename(self, disk: DiskState, event: Create | Rename | Unlink) -> None:
        def add(folder: str, **fields: object) -> None:
            disk.changes.append(NameChange(self.serial, folder, event.inode, **fields))
            self.serial += 1

        if isinstance(event, Create):
            disk.inodes[event.inode] = InodeState()
            add(folder_of(event.path), added=event.path)
        elif isinstance(event, Unlink):
            add(folder_of(event.path), removed=event.path)
        elif folder_of(event.source) == folder_of(event.target):
            add(folder_of(event.target), added=event.target, removed=event.source)
        else:
            add(folder_of(event.target), added=event.target)
            add(folder_of(event.source), removed=event.source, after=self.serial - 1)

    # --- choices

    def catalogs(self) -> range:
        """Return which commits may be the last one found."""
        return range(self.synced, len(self.commits))

    def choices(self, seed: str, random_count: int, turn: int = 0) -> Iterator[Choice]:
        """Yield the choices to try: all, none, each alone, all but each, and seeded random ones.

        Turns after the first leave out the singles.
        """
        slots = self._slots()
        yield self._pick("all", set(slots))
        if not slots:
            return
        yield self._pick("none", set())
        if turn == 0 and len(slots) > 1:
            rng = random.Random(f"{seed}/singles")
            singles = slots if len(slots) <= _SINGLES_MAX else rng.sample(slots, _SINGLES_MAX)
            for i, slot in enumerate(singles):
                yield self._pick(f"drop {i}", set(slots) - {slot})
                yield self._pick(f"keep {i}", {slot})
        for i in range(random_count):
            yield self._random(f"random {i}", slots, random.Random(f"{seed}/{i}"))

    def random_choice(self, rng: random.Random) -> tuple[Choice, int]:
        """Return one random choice, and the last commit found."""
        return self._random("random", self._slots(), rng), rng.choice(self.catalogs())

    def _slots(self) -> list[tuple[str, int, int, int]]:
        """Return every pending operation as (kind, disk, inode, position)."""
        slots = []
        for number, disk in enumerate(self.disks):
            for inode in disk.live_inodes():
                count = len(disk.inodes[inode].pending)
                slots += [("content", number, inode, i) for i in range(count)]
            slots += [("name", number, c.inode, i) for i, c in enumerate(disk.changes)]
        return slots

    def _random(
        self, label: str, slots: list[tuple[str, int, int, int]], rng: random.Random
    ) -> Choice:
        share = rng.choice((0.1, 0.3, 0.5, 0.7, 0.9, 1.0))
        kept = {slot for slot in slots if rng.random() < share}
        tearing = rng.choice((0.0, 0.3, 0.9))
        tears: dict[tuple[int, int], dict[int, Tear]] = {}
        for kind, disk, inode, i in sorted(kept):
            if kind == "content" and rng.random() < tearing:
                tear = (rng.choice(_TEAR_UNITS), rng.getrandbits(32))
                tears.setdefault((disk, inode), {})[i] = tear
        return self._pick(label, kept, tears)

    def _pick(
        self, label: str, kept: set[tuple[str, int, int, int]],
        tears: dict[tuple[int, int], dict[int, Tear]] | None = None,
    ) -> Choice:  # fmt: skip
        contents: dict[tuple[int, int], list[int]] = {}
        names: dict[int, list[int]] = {}
        for kind, disk, inode, i in sorted(kept):
            if kind == "content":
                contents.setdefault((disk, inode), []).append(i)
            else:
                names.setdefault(disk, []).append(i)
        return Choice(
            label,
            {place: tuple(found) for place, found in contents.items()},
            {disk: tuple(found) for disk, found in names.items()},
            tears or {},
        )

    # --- images

    def image(self, choice: Choice, catalog: int, cache: dict[object, Blob]) -> Image:
        """Return what a choice leaves, with the database of one commit.

        `cache` holds contents and digests between calls at one point of the journal.
        """
        disks = [self._files(i, disk, choice, cache) for i, disk in enumerate(self.disks)]
        database = cache.get(("catalog", catalog))
        if database is None:
            database = cache["catalog", catalog] = _blob(self.commits[catalog] or b"")
        parts = []
        for files in disks:
            for path in sorted(files):
                parts += [path.encode(), files[path][1]]
            parts.append(b"|")
        parts.append(database[1])
        return Image(
            tuple({path: blob[0] for path, blob in files.items()} for files in disks),
            self.commits[catalog],
            _native.xxh3_128(b"\0".join(parts)),
        )

    def _files(
        self, number: int, disk: DiskState, choice: Choice, cache: dict[object, Blob]
    ) -> dict[str, Blob]:
        names = dict(disk.names)
        done = set()
        pending = {change.serial for change in disk.changes}
        for i in choice.names.get(number, ()):
            change = disk.changes[i]
            if change.after < 0 or change.after in done or change.after not in pending:
                change.apply(names)
                done.add(change.serial)
        files = {}
        for path, inode in names.items():
            kept, tears = (
                choice.contents.get((number, inode), ()),
                choice.tears.get((number, inode)),
            )
            state = disk.inodes[inode]
            if tears:
                files[path] = _blob(state.content(kept, tears))
                continue
            tag = (number, inode, kept)
            if tag not in cache:
                cache[tag] = _blob(state.content(kept))
            files[path] = cache[tag]
        return files


def _blob(raw: bytes) -> Blob:
    return raw, _native.xxh3_128(raw) + len(raw).to_bytes(8, "little")


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
