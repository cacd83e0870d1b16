"""Open files and directories of a mount, and what the kernel remembers of inodes.

Layer: L5.

- Everything here is used by the mount's loop alone, without locks.
- An inode whose name is gone lives on in its handles: getattr finds it here.
- Two handles of one inode with different content must not share the kernel's page cache: the later
  one gets another inode number (`fuse.places`), or is opened past it (`must_bypass_cache`). All
  handles of a raw file share it, and so do all writers of a file.
- While the kernel reads an inode's file itself (passthrough), every handle of the inode must be
  opened so, and on the same file; else it gets another inode number.
- Another number is the node's id with a small number above it, so that each leads back to its node.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

from kvfs.engine.catalog_schema import Node, Origin
from kvfs.errors import BusyError, UnavailableError
from kvfs.file_reading import FileReader
from kvfs.files import WriteHandle

Identity = tuple[int, int, int]
"""Version, size and mtime: what tells contents of one inode apart."""

RAW: Final[Identity] = (-1, 0, 0)
"""Of a raw file: all handles have the same content, which is what it is."""

WRITTEN: Final[Identity] = (-2, 0, 0)
"""Of a file that is being written: what its writers see."""

_VERSION_SHIFT: Final = 48  # handle numbers: the low bits of the content's version above a count
_ALIAS_SHIFT: Final = 56  # node ids stay below 2**53
_ALIASES: Final = 31  # virtual inodes begin at 2**62
_ALIASED_MAX: Final = 1 << 16


def identity_of(reader: FileReader, node: Node) -> Identity:
    """Return what tells apart what a reader of this node has open.

    A version of a file is for ever the same bytes; a context's tail may be replaced.
    """
    if reader.raw is not None:
        return RAW
    mtime_ns = 0 if node.origin is Origin.FILE else node.mtime_ns
    return reader.version, reader.size_bytes, mtime_ns


def node_of(inode: int) -> int:
    """Return the node that an inode number means."""
    return inode & ((1 << _ALIAS_SHIFT) - 1)


def numbers_of(node_id: int) -> list[int]:
    """Return all inode numbers of a node, the first of which is its id."""
    return [number << _ALIAS_SHIFT | node_id for number in range(_ALIASES + 1)]


def is_version(number: int, version: int) -> bool:
    """Say whether a reader's handle number was given to content of this version."""
    return number >> _VERSION_SHIFT == version & 0xFFFF


@dataclass(slots=True, eq=False)
class ReadHandle:
    """A file open for reading.

    Attributes:
        is_direct: Opened past the kernel's page cache.
        is_passthrough: The kernel reads the file itself, or is about to.
        read_count: Reads that came to this side.
    """

    inode: int
    node: Node
    reader: FileReader
    identity: Identity
    is_direct: bool = False
    is_passthrough: bool = False
    read_count: int = 0

    @property
    def content(self) -> Identity:
        """What it holds."""
        return self.identity

    @property
    def size_bytes(self) -> int:
        """How long the file is for its reader."""
        raw = self.reader.raw
        return self.reader.size_bytes if raw is None else raw.size_bytes


@dataclass(slots=True, eq=False)
class WritingHandle:
    """A file open for writing.

    Attributes:
        is_direct: Opened past the kernel's page cache.
        may_be_mapped: Opened for reading, too.
    """

    inode: int
    node: Node
    file: WriteHandle
    is_direct: bool = False
    may_be_mapped: bool = False

    @property
    def identity(self) -> Identity:
        """What the file holds: all who write it see the same."""
        return RAW if self.file.writer.is_raw else WRITTEN

    @property
    def content(self) -> Identity:
        """What it holds now: of a file of which all was adopted, the same as for readers."""
        writer = self.file.writer
        if writer.is_raw or writer.is_dirty or writer.is_granted:
            return self.identity
        return writer.kept_version, writer.kept_bytes, 0

    @property
    def size_bytes(self) -> int:
        """How long the file is for its writers."""
        return self.file.writer.size_bytes


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


@dataclass(slots=True, eq=False)
class FormerHandle:
    """A file that a former owner opened and this one cannot: it was written, or is gone.

    The kernel has it open still.
    """

    inode: int
    is_writing: bool
    is_passthrough: bool

    @property
    def size_bytes(self) -> int:
        """How long it may be."""
        return 1 << 63


Handle = ReadHandle | WritingHandle | StaticHandle | DirectoryHandle | FormerHandle
_OfInode = ReadHandle | WritingHandle | FormerHandle


class Handles:
    """All open handles by number."""

    def __init__(self, first_number: int = 0) -> None:
        """Give out numbers above the first, which must be above those of an owner that died."""
        self._by_number: dict[int, Handle] = {}
        self._by_inode: dict[int, list[_OfInode]] = {}
        self._expected: dict[int, list[Identity]] = {}
        self._last_number = first_number

    def __len__(self) -> int:
        return len(self._by_number)

    def items(self) -> list[tuple[int, Handle]]:
        """Return all handles with their numbers, as of now."""
        return list(self._by_number.items())

    def values(self) -> list[Handle]:
        """Return all handles, as of now."""
        return list(self._by_number.values())

    def add(self, handle: Handle) -> int:
        """Give a handle a number."""
        number = self.next_number()
        if isinstance(handle, ReadHandle):
            number |= (handle.reader.version & 0xFFFF) << _VERSION_SHIFT
        self.put(number, handle)
        return number

    def next_number(self) -> int:
        """Return a number for a handle that is yet to be made."""
        self._last_number = (self._last_number + 1) & ((1 << _VERSION_SHIFT) - 1)
        return self._last_number

    def put(self, number: int, handle: Handle) -> None:
        """Let a number mean this handle from now on."""
        if number in self._by_number:
            self.pop(number)
        self._by_number[number] = handle
        if isinstance(handle, _OfInode):
            self._by_inode.setdefault(handle.inode, []).append(handle)

    def __getitem__(self, number: int) -> Handle:
        """Return a handle.

        Raises:
            UnavailableError: It was opened by an owner that died, and cannot go on.
        """
        try:
            return self._by_number[number]
        except KeyError:
            raise UnavailableError(f"handle of a former owner: {number}; open it again") from None

    def inode_of(self, number: int) -> int:
        """Return the inode of a handle, or 0 if there is none of this number."""
        handle = self._by_number.get(number)
        return 0 if handle is None else handle.inode

    def directory(self, number: int) -> DirectoryHandle:
        """Return the handle of an open directory."""
        handle = self[number]
        assert isinstance(handle, DirectoryHandle)
        return handle

    def pop(self, number: int) -> Handle | None:
        """Forget a handle and return it; None if a former owner gave it out."""
        handle = self._by_number.pop(number, None)
        if isinstance(handle, _OfInode):
            others = self._by_inode[handle.inode]
            others.remove(handle)
            if not others:
                del self._by_inode[handle.inode]
        return handle

    def of_inode(self, inode: int) -> list[_OfInode]:
        """Return the handles of a file, oldest first."""
        return self._by_inode.get(inode, [])

    def opened(self, inode: int) -> list[ReadHandle | WritingHandle]:
        """Return the handles of a file that were opened here, oldest first."""
        return [h for h in self.of_inode(inode) if not isinstance(h, FormerHandle)]

    def drain(self) -> list[tuple[int, Handle]]:
        """Forget all handles and return them with their numbers."""
        handles = self.items()
        self._by_number.clear()
        self._by_inode.clear()
        return handles

    def of_other_content(self, inode: int, identity: Identity) -> list[_OfInode]:
        """Return the handles of an inode that have, or may have, other content than this."""
        return [
            other
            for other in self.of_inode(inode)
            if isinstance(other, FormerHandle) or other.identity != identity
        ]

    @contextmanager
    def expecting(self, inode: int, identity: Identity) -> Iterator[None]:
        """Keep a place for a handle that is about to be opened: its like may join, others not."""
        expected = self._expected.setdefault(inode, [])
        expected.append(identity)
        try:
            yield
        finally:
            expected.remove(identity)
            if not expected:
                self._expected.pop(inode, None)

    def must_bypass_cache(self, inode: int, identity: Identity) -> bool:
        """Say whether a handle with this content needs its own view of bytes."""
        is_expected = any(other != identity for other in self._expected.get(inode, ()))
        return is_expected or bool(self.of_other_content(inode, identity))

    def where(self, node_id: int, identity: Identity) -> int | None:
        """Return the inode number by which handles of a node have this content open, if any do."""
        for inode in numbers_of(node_id):
            if any(handle.identity == identity for handle in self.opened(inode)):
                return inode
        return None

    def has_cached_writing(self, inode: int, but: WritingHandle | None = None) -> bool:
        """Say whether the page cache holds what the writers of an inode see, for another handle."""
        return any(
            isinstance(other, WritingHandle) and other is not but and not other.is_direct
            for other in self.of_inode(inode)
        )

    def is_written(self, inode: int) -> bool:
        """Say whether an inode is open for writing."""
        return any(isinstance(h, WritingHandle) for h in self.of_inode(inode))

    def size_of(self, inode: int) -> int:
        """Return the size that the handles of an open inode share: that of its writers, if any."""
        handles = self.opened(inode)
        cached = [handle for handle in handles if not handle.is_direct]
        writing = [handle for handle in handles if isinstance(handle, WritingHandle)]
        return (writing or cached or handles)[0].size_bytes

    def is_passthrough(self, inode: int) -> bool:
        """Say whether the kernel reads an inode's file itself."""
        return any(
            not isinstance(other, WritingHandle) and other.is_passthrough
            for other in self.of_inode(inode)
        )

    def may_pass_through(self, inode: int, identity: Identity) -> bool:
        """Say whether a handle may be opened for passthrough: alone, or with its like."""
        return inode not in self._expected and all(
            isinstance(other, ReadHandle) and other.is_passthrough and other.identity == identity
            for other in self.of_inode(inode)
        )


class Inodes:
    """What the kernel knows: numbers of nodes, lookup counts, what its page cache holds."""

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self._namespaces: dict[int, int] = {}
        self._cached: dict[int, Identity] = {}
        self._sizes: dict[int, int] = {}
        self._aliases: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._counts)

    def __contains__(self, inode: int) -> bool:
        return inode in self._counts

    def current(self, node_id: int) -> int:
        """Return the inode number by which a node is found now."""
        return self._aliases.get(node_id, node_id)

    def renumber(self, node_id: int) -> None:
        """Let a node be found by its next number that the kernel does not know.

        It stays so when the kernel forgets that number, as it does at once when it finds that it is
        another; the oldest of many give way.

        Raises:
            BusyError: It knows them all, or has been asked for them all.
        """
        first = self.current(node_id) >> _ALIAS_SHIFT
        for inode in numbers_of(node_id)[first + 1 :]:
            if inode not in self._counts:
                self.point(node_id, inode)
                return
        self._aliases.pop(node_id, None)  # perhaps the first are free again
        raise BusyError(f"file was rewritten {_ALIASES} times while open; close it: {node_id}")

    def point(self, node_id: int, inode: int) -> None:
        """Let a node be found by this number of its."""
        self._aliases.pop(node_id, None)
        if inode == node_id:
            return
        if len(self._aliases) >= _ALIASED_MAX:
            del self._aliases[next(iter(self._aliases))]
        self._aliases[node_id] = inode

    def fresh(self, node_id: int, is_free: Callable[[int], bool]) -> int:
        """Return a number of a node that the kernel does not know, and that is free.

        Raises:
            BusyError: There is none.
        """
        for inode in numbers_of(node_id):
            if inode not in self._counts and inode != self.current(node_id) and is_free(inode):
                return inode
        raise BusyError(f"file was rewritten {_ALIASES} times while open; close it: {node_id}")

    def add(self, inode: int, namespace_id: int = 0) -> None:
        """Count one lookup that was answered. `namespace_id`: whose the inode is."""
        self._counts[inode] = self._counts.get(inode, 0) + 1
        self._namespaces[inode] = namespace_id

    def namespace_of(self, inode: int) -> int:
        """Return whose an inode is that the kernel has looked up, else 0."""
        return self._namespaces.get(inode, 0)

    def forget(self, inode: int, count: int) -> bool:
        """Take back lookups; return whether the kernel has forgotten the inode."""
        left = self._counts.get(inode, 0) - count
        if left > 0:
            self._counts[inode] = left
            return False
        self._counts.pop(inode, None)
        self._cached.pop(inode, None)
        self._sizes.pop(inode, None)
        self._namespaces.pop(inode, None)
        return True

    def may_keep_cache(self, inode: int, identity: Identity) -> bool:
        """Note what is opened; say whether cached pages hold the same."""
        is_same = self._cached.get(inode) == identity
        self._cached[inode] = identity
        return is_same

    def tell(self, inode: int, nbytes: int) -> None:
        """Note the size that the kernel takes a file to have."""
        if inode in self._counts:
            self._sizes[inode] = nbytes

    def is_told(self, inode: int, nbytes: int) -> bool:
        """Say whether the kernel takes a file to have this size, as far as is known.

        It ends reads through its cache at the size that it was told last, until it asks again.
        """
        return self._sizes.get(inode, nbytes) == nbytes

    def drop_cache(self, inode: int) -> None:
        """Note that cached pages, if any, are of no known content."""
        self._cached.pop(inode, None)
