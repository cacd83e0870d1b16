"""Open files and directories of a mount, and what the kernel remembers of inodes.

Layer: L5.

- Everything here is used by the mount's loop alone, without locks.
- An inode whose name is gone lives on in its handles: getattr finds it here.
- Two handles of one inode with different content must not share the kernel's page cache: the later
  one is opened past it (`must_bypass_cache`).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from kvfs.engine.catalog_schema import Node
from kvfs.file_reading import FileReader
from kvfs.files import WriteHandle

Identity = tuple[int, int, int]
"""Version, size and mtime: what tells contents of one inode apart."""


@dataclass(slots=True, eq=False)
class ReadHandle:
    """A file open for reading."""

    node: Node
    reader: FileReader
    identity: Identity
    is_direct: bool
    """Opened past the kernel's page cache."""


@dataclass(slots=True, eq=False)
class WritingHandle:
    """A file open for writing."""

    node: Node
    file: WriteHandle


@dataclass(slots=True, eq=False)
class StaticHandle:
    """A virtual file, as it was at open."""

    inode: int
    content: bytes


@dataclass(slots=True, eq=False)
class DirectoryHandle:
    """An open directory.

    Attributes:
        inode: The directory.
        names: The names handed out so far. Entry n carries n as its position, and what follows it
            is what comes after `names[n - 1]`, whatever was made or removed meanwhile.
    """

    inode: int
    names: list[str] = field(default_factory=list)


Handle = ReadHandle | WritingHandle | StaticHandle | DirectoryHandle


class Handles:
    """All open handles by number."""

    def __init__(self) -> None:
        self._by_number: dict[int, Handle] = {}
        self._by_inode: dict[int, list[ReadHandle | WritingHandle]] = {}
        self._last_number = 0

    def __len__(self) -> int:
        return len(self._by_number)

    def __iter__(self) -> Iterator[Handle]:
        return iter(list(self._by_number.values()))

    def add(self, handle: Handle) -> int:
        """Give a handle a number."""
        self._last_number += 1
        self._by_number[self._last_number] = handle
        if isinstance(handle, (ReadHandle, WritingHandle)):
            self._by_inode.setdefault(handle.node.node_id, []).append(handle)
        return self._last_number

    def __getitem__(self, number: int) -> Handle:
        return self._by_number[number]

    def directory(self, number: int) -> DirectoryHandle:
        """Return the handle of an open directory."""
        handle = self._by_number[number]
        assert isinstance(handle, DirectoryHandle)
        return handle

    def pop(self, number: int) -> Handle:
        """Forget a handle and return it."""
        handle = self._by_number.pop(number)
        if isinstance(handle, (ReadHandle, WritingHandle)):
            others = self._by_inode[handle.node.node_id]
            others.remove(handle)
            if not others:
                del self._by_inode[handle.node.node_id]
        return handle

    def of_inode(self, inode: int) -> list[ReadHandle | WritingHandle]:
        """Return the handles of a file, oldest first."""
        return self._by_inode.get(inode, [])

    def drain(self) -> list[Handle]:
        """Forget all handles and return them."""
        handles = list(self._by_number.values())
        self._by_number.clear()
        self._by_inode.clear()
        return handles

    def must_bypass_cache(self, inode: int, identity: Identity | None) -> bool:
        """Say whether a handle with this content (None: a writer's) needs its own view of bytes."""
        return any(
            isinstance(other, WritingHandle) or other.identity != identity
            for other in self.of_inode(inode)
        )


class Inodes:
    """What the kernel knows: lookup counts, and which content its page cache holds."""

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self._cached: dict[int, Identity] = {}

    def __len__(self) -> int:
        return len(self._counts)

    def __contains__(self, inode: int) -> bool:
        return inode in self._counts

    def add(self, inode: int) -> None:
        """Count one lookup that was answered."""
        self._counts[inode] = self._counts.get(inode, 0) + 1

    def forget(self, inode: int, count: int) -> bool:
        """Take back lookups; return whether the kernel has forgotten the inode."""
        left = self._counts.get(inode, 0) - count
        if left > 0:
            self._counts[inode] = left
            return False
        self._counts.pop(inode, None)
        self._cached.pop(inode, None)
        return True

    def may_keep_cache(self, inode: int, identity: Identity) -> bool:
        """Note what is opened; say whether cached pages hold the same."""
        is_same = self._cached.get(inode) == identity
        self._cached[inode] = identity
        return is_same

    def drop_cache(self, inode: int) -> None:
        """Note that cached pages, if any, are of no known content."""
        self._cached.pop(inode, None)
