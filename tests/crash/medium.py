"""What a power cut may leave of a sequence of operations on all media of a pool.

`block` and `lines` have the rules of each kind of medium; what is volatile leaves nothing. Of the
catalog any prefix of its commits is found that contains those synced.
"""

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations

from kvfs import _native
from tests.crash.block import DiskState
from tests.crash.domain import Cache, Files, Slot, Tear, blob_of
from tests.crash.events import Commit, Event, Journal, SyncCatalog
from tests.crash.lines import MemoryState

_SINGLES_MAX = 24
_EXHAUSTIVE_MAX = 4
_TEAR_UNITS = (4096, 64)
Place = tuple[int, Slot]  # disk and slot on it


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
    kept: tuple[tuple[Slot, ...], ...]
    tears: tuple[dict[Slot, Tear], ...]


@dataclass(slots=True)
class Medium:
    """The state of all media of a pool after some prefix of its journal."""

    disks: list[DiskState | MemoryState]
    commits: list[bytes | None]
    synced: int = 0

    @classmethod
    def of(cls, journal: Journal) -> "Medium":
        """Start from what a journal begins with, all of it persisted."""
        before: Iterable[Files] = journal.before or [{} for _ in journal.kinds]
        states = [
            DiskState.of(files) if kind == "dir" else MemoryState.of(files, is_file=kind == "file")
            for kind, files in zip(journal.kinds, before, strict=True)
        ]
        return cls(states, [journal.catalog])

    @classmethod
    def replay(cls, journal: Journal) -> "Medium":
        """Start from what the journal began with and apply all its events."""
        made = cls.of(journal)
        for event in journal.events:
            made.apply(event)
        return made

    def apply(self, event: Event) -> None:
        """Advance by one event."""
        if isinstance(event, Commit):
            self.commits.append(event.image)
        elif isinstance(event, SyncCatalog):
            self.synced = len(self.commits) - 1
        else:
            self.disks[event.disk].apply(event)  # type: ignore[arg-type]

    # --- choices

    def catalogs(self) -> range:
        """Return which commits may be the last one found."""
        return range(self.synced, len(self.commits))

    def choices(self, seed: str, random_count: int, turn: int = 0) -> Iterator[Choice]:
        """Yield the choices to try: all, none, each alone, all but each, and seeded random ones.

        Where few operations are pending: all subsets. Turns after the first leave out singles and
        subsets.
        """
        places = self._places()
        yield self._pick("all", set(places))
        if not places:
            return
        yield self._pick("none", set())
        if turn == 0 and 1 < len(places) <= _EXHAUSTIVE_MAX:
            for count in range(1, len(places)):
                for i, some in enumerate(combinations(places, count)):
                    yield self._pick(f"{count} of {len(places)} {i}", set(some))
        elif turn == 0 and len(places) > 1:
            rng = random.Random(f"{seed}/singles")
            singles = places if len(places) <= _SINGLES_MAX else rng.sample(places, _SINGLES_MAX)
            for i, place in enumerate(singles):
                yield self._pick(f"drop {i}", set(places) - {place})
                yield self._pick(f"keep {i}", {place})
        for i in range(random_count):
            yield self._random(f"random {i}", places, random.Random(f"{seed}/{i}"))

    def random_choice(self, rng: random.Random) -> tuple[Choice, int]:
        """Return one random choice, and the last commit found."""
        return self._random("random", self._places(), rng), rng.choice(self.catalogs())

    def _places(self) -> list[Place]:
        return [(number, slot) for number, disk in enumerate(self.disks) for slot in disk.slots()]

    def _random(self, label: str, places: list[Place], rng: random.Random) -> Choice:
        share = rng.choice((0.1, 0.3, 0.5, 0.7, 0.9, 1.0))
        kept = {place for place in places if rng.random() < share}
        tearing = rng.choice((0.0, 0.3, 0.9))
        tears: dict[Place, Tear] = {}
        for disk, slot in sorted(kept):
            if self.disks[disk].can_tear(slot) and rng.random() < tearing:
                tears[disk, slot] = (rng.choice(_TEAR_UNITS), rng.getrandbits(32))
        return self._pick(label, kept, tears)

    def _pick(self, label: str, kept: set[Place], tears: dict[Place, Tear] | None = None) -> Choice:
        done: list[list[Slot]] = [[] for _ in self.disks]
        torn: list[dict[Slot, Tear]] = [{} for _ in self.disks]
        for disk, slot in sorted(kept):
            done[disk].append(slot)
        for (disk, slot), tear in (tears or {}).items():
            torn[disk][slot] = tear
        return Choice(label, tuple(map(tuple, done)), tuple(torn))

    # --- images

    def image(self, choice: Choice, catalog: int, cache: Cache) -> Image:
        """Return what a choice leaves, with the database of one commit.

        `cache` holds contents and digests between calls at one point of the journal.
        """
        database = cache.get(("catalog", catalog))
        if database is None:
            database = cache["catalog", catalog] = blob_of(self.commits[catalog] or b"")
        disks, parts = [], []
        for number, disk in enumerate(self.disks):
            files = disk.files(choice.kept[number], choice.tears[number], cache)
            for path in sorted(files):
                parts += [path.encode(), files[path][1]]
            parts.append(b"|")
            disks.append({path: blob[0] for path, blob in files.items()})
        parts.append(database[1])
        return Image(tuple(disks), self.commits[catalog], _native.xxh3_128(b"\0".join(parts)))
