"""What is written down of all that is done to the media of a pool.

One `Journal` is shared by all devices and the catalog of a pool, so that one sequence orders
everything. `tests.crash.medium` turns a prefix of that sequence into what a power cut may leave.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Create:
    disk: int
    inode: int
    path: str


@dataclass(frozen=True, slots=True)
class Write:
    disk: int
    inode: int
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Resize:
    disk: int
    inode: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Sync:
    disk: int
    inode: int


@dataclass(frozen=True, slots=True)
class FailedSync:
    """A sync that failed: `kept` of the pending operations reached the medium, no other will."""

    disk: int
    inode: int
    kept: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Rename:
    disk: int
    inode: int
    source: str
    target: str


@dataclass(frozen=True, slots=True)
class Unlink:
    disk: int
    inode: int
    path: str


@dataclass(frozen=True, slots=True)
class SyncNames:
    disk: int
    folder: str


@dataclass(frozen=True, slots=True)
class Store:
    """Stores to mapped memory; `is_streamed`: past the caches, a fence is all that is missing."""

    disk: int
    offset: int
    data: bytes
    is_streamed: bool


@dataclass(frozen=True, slots=True)
class WriteBack:
    """The lines of a range are on their way out of the caches; a fence waits for them."""

    disk: int
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Fence:
    """What was streamed or written back of this memory is persistent."""

    disk: int


@dataclass(frozen=True, slots=True)
class Commit:
    """A committed transaction of the catalog; `image` is the whole database after it."""

    image: bytes


@dataclass(frozen=True, slots=True)
class SyncCatalog:
    """All commits so far survive."""


FileEvent = Create | Write | Resize | Sync | FailedSync | Rename | Unlink | SyncNames
MemoryEvent = Store | WriteBack | Fence
Event = FileEvent | MemoryEvent | Commit | SyncCatalog


@dataclass(slots=True)
class Journal:
    """What was done to all media of a pool, in order.

    Attributes:
        kinds: Of the disks: "dir", "dax", or "file": one in place of a DAX device.
        before: The disks it began with.
        catalog: The database it began with.
    """

    kinds: tuple[str, ...] = ("dir",)
    before: tuple[dict[str, bytes], ...] = ()
    catalog: bytes | None = None
    events: list[Event] = field(default_factory=list)

    def add(self, event: Event) -> None:
        self.events.append(event)

    def __len__(self) -> int:
        return len(self.events)

    def last_commit(self) -> bytes | None:
        """Return the catalog's database as it is now."""
        commits = (event.image for event in reversed(self.events) if isinstance(event, Commit))
        return next(commits, self.catalog)


def folder_of(path: str) -> str:
    return path.rpartition("/")[0] or "."
