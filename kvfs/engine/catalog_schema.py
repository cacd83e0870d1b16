"""The catalog's tables, the values its rows become, and the errors of a tree.

Layer: L2, pure.

- Every name is kept once: a namespace's name is the name of its root directory.
- Names are bytes, compared as bytes; a name that is no UTF-8 becomes text by surrogateescape.
- Ids and versions are never used twice, also not after a crash that took the last commits with it
  (see `epoch` below): keys of files are made from them, and a block that comes back after a crash
  must not be taken for one of another file.
- Blocks may be gone while the catalog names them. That is a normal state, never corruption.
"""

import errno
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final, Literal

from kvfs.errors import (
    CorruptionError,
    ExistsError,
    NoSpaceError,
    NotFoundError,
    RefusedError,
    UsageError,
)
from kvfs.layout import Layout

SCHEMA_VERSION: Final = 2
APPLICATION_ID: Final = 0x6B766673  # 'kvfs', so that file(1) and `open` know the file
ROOT_NODE_ID: Final = 1
ROW_KEYS: Final = 512
NAME_BYTES_MAX: Final = 255
ATTRIBUTE_NAME_BYTES_MAX: Final = 255
ATTRIBUTE_BYTES_MAX: Final = 64 << 10  # of one value; and of all of a node, names included
DEADLINE_ATTRIBUTE: Final = b"user.kvfs.deadline_ms"  # of a namespace's directory
RAW_ATTRIBUTE: Final = b"user.kvfs.raw"  # of a file, or of the directory files are made in
DEFAULT_NAMESPACE: Final = "default"  # files at the very root belong to it
STATUS_NAME: Final = ".kvfs"  # the mount's own directory; no node may take its name
EPOCH_MAX: Final = (1 << 20) - 1
EPOCH_NODE_BITS: Final = 32  # node ids of an epoch; with 20 bits of epoch they stay below 2**53
DEADLINE_MS_MIN, DEADLINE_MS_MAX = 10, 3_600_000
EPOCH_VERSION_BITS: Final = 12  # versions of one node per epoch; with the epoch they fill 32 bits

Retention = Literal["cache", "durable"]
Row = tuple[Any, ...]

TABLES: Final = ("meta", "devices", "namespaces", "nodes", "context_rows", "attributes")
# Extended attributes. Not WITHOUT ROWID, as with the rows of contexts.
_ATTRIBUTES: Final = """
CREATE TABLE attributes (
    node_id INTEGER NOT NULL,
    name BLOB NOT NULL,    -- with its prefix 'user.', at most 255 bytes. Of 'user.kvfs.*' only
                           -- 'user.kvfs.raw' is kept here, the others are computed
    value BLOB NOT NULL,   -- at most 64 KiB, as are all names and values of a node together
    PRIMARY KEY (node_id, name)
)"""
UPGRADES: Final = {1: (_ATTRIBUTES,)}
"""What turns a catalog of a former version into one of the next; nodes were all of kinds 1, 2."""
SCHEMA: Final = (
    """
CREATE TABLE meta (
    -- Facts about the pool as a whole. 'pool_uuid': the pool's id. 'epoch': how many sessions have
    -- written. The first transaction of a session persists epoch + 1 before anything else is
    -- written; node ids start at epoch << 32 and versions at epoch << 12 from there on. So a commit
    -- lost in a crash takes no id with it that could be given again.
    key TEXT PRIMARY KEY,
    value TEXT NOT NULL
) WITHOUT ROWID""",
    """
CREATE TABLE devices (
    device_index INTEGER PRIMARY KEY, -- number in extents and superblock; never given again
    uuid BLOB NOT NULL UNIQUE,        -- 16 bytes, as in the superblock: what tells devices apart
    name TEXT NOT NULL UNIQUE,        -- how people call it
    url TEXT NOT NULL,                -- where it was last; may change, the uuid decides
    tier INTEGER NOT NULL,            -- 0 is the fastest
    state TEXT NOT NULL               -- a word of the pool's ('online', ...); opaque here
)""",
    """
CREATE TABLE namespaces (
    namespace_id INTEGER PRIMARY KEY,      -- 63 random bits, never given again; 0 is the root's
    root_node_id INTEGER NOT NULL UNIQUE,  -- its directory below the root; that node has the name
    layout TEXT NOT NULL,                  -- Layout.to_json()
    fingerprint BLOB NOT NULL,             -- 16 bytes of the layout, as in every segment header;
                                           -- kept beside it to notice a layout changed by hand
    is_durable INTEGER NOT NULL,           -- 1: what a name reaches is not dropped
    created_ns INTEGER NOT NULL            -- wall clock
)""",
    """
CREATE TABLE nodes (
    node_id INTEGER PRIMARY KEY,      -- inode number, never given again; 1 is the root
    parent_id INTEGER NOT NULL,       -- the directory; 0 for the root alone
    namespace_id INTEGER NOT NULL,    -- 0 for the root alone. Kept in every node because files at
                                      -- the root lie outside their namespace's directory
    name BLOB NOT NULL,               -- bytes, so that order and equality are the kernel's; the
                                      -- root's is empty
    kind INTEGER NOT NULL,            -- NodeKind
    origin INTEGER NOT NULL,          -- Origin
    state INTEGER NOT NULL,           -- NodeState; directories are ACTIVE
    mode INTEGER NOT NULL,            -- permission bits alone, at most 0o7777
    uid INTEGER NOT NULL,
    gid INTEGER NOT NULL,
    size_bytes INTEGER NOT NULL,      -- (block_count - 1) * stride + tail_bytes; 0 when empty.
                                      -- Kept because stat(2) must not read the rows. Of a raw
                                      -- file: what it was when it was last closed
    block_count INTEGER NOT NULL,     -- keys in context_rows
    token_count INTEGER NOT NULL,     -- tokens of all blocks; 0 without token metadata
    tail_bytes INTEGER NOT NULL,      -- logical bytes of the last block; 0 when empty
    tail_tokens INTEGER NOT NULL,     -- tokens of the last block
    version INTEGER NOT NULL,         -- content version, grows; 0: never replaced. Part of a
                                      -- file's block keys, 32 bits
    is_pinned INTEGER NOT NULL,       -- 1: its blocks must not be dropped
    mtime_ns INTEGER NOT NULL,        -- wall clock. No atime: each read would be a write here
    ctime_ns INTEGER NOT NULL
)""",
    # Serves lookup and listing; unique names are its invariant.
    "CREATE UNIQUE INDEX nodes_by_name ON nodes (parent_id, name)",
    "CREATE INDEX nodes_by_namespace ON nodes (namespace_id)",
    # Partial: holds the few rows that are asked for, and costs the others nothing. PENDING nodes
    # have none: each new file would go in and out of it (10 us), to spare one scan at open.
    "CREATE INDEX nodes_pinned ON nodes (node_id) WHERE is_pinned = 1",
    # Not WITHOUT ROWID: that keeps whole rows in inner pages too, at most four a page; reading a
    # row of 300 keys took 56 us instead of 10 us.
    """
CREATE TABLE context_rows (
    node_id INTEGER NOT NULL,
    version INTEGER NOT NULL,      -- the node's version; rows of no other are ever committed
    row_index INTEGER NOT NULL,    -- from 0 without gaps
    token_count INTEGER NOT NULL,  -- tokens of these blocks, so that cutting reads one row only
    keys BLOB NOT NULL,            -- n * 32 bytes, n = 512 in every row but the last
    tokens BLOB,                   -- zstd of token_count little-endian u4 ids; NULL: not known
    PRIMARY KEY (node_id, version, row_index)
)""",
    _ATTRIBUTES,
)


class NodeKind(IntEnum):
    """What a node is. Zero is never written."""

    DIRECTORY = 1
    CONTEXT = 2
    RAW = 3
    """A raw file: its bytes lie in the file of a device whose number is the node's id."""


class Origin(IntEnum):
    """Who made a node; zero is never written. What POSIX made is whole or absent, always."""

    API = 1
    FILE = 2


class NodeState(IntEnum):
    """Whether a context's content is in the catalog. Zero is never written."""

    ACTIVE = 1
    PENDING = 2
    """Made through the mount; its bytes lie in a staging file, which a crash takes with it."""


class NotDirectoryError(UsageError):
    """Raised if a path leads through a context, or a directory would replace one."""

    errno = errno.ENOTDIR


class TargetIsDirectoryError(UsageError):
    """Raised if a context is needed where a directory is."""

    errno = errno.EISDIR


class NoAttributeError(NotFoundError):
    """Raised if a node has no extended attribute of a name."""

    errno = errno.ENODATA


class AttributeTooLargeError(UsageError):
    """Raised if the value of an extended attribute has more than 64 KiB."""

    errno = errno.E2BIG


class AttributesFullError(NoSpaceError):
    """Raised if the extended attributes of one node would have more than 64 KiB."""


class NameTooLongError(UsageError):
    """Raised if a name has more than 255 bytes, or a path more than 4096."""

    errno = errno.ENAMETOOLONG


class DirectoryNotEmptyError(ExistsError, RefusedError):
    """Raised if a directory that holds something would be removed or replaced."""

    errno = errno.ENOTEMPTY


class CrossNamespaceError(RefusedError):
    """Raised if a rename would leave the namespace; copy instead, as mv(1) does on EXDEV."""

    errno = errno.EXDEV


@dataclass(frozen=True, slots=True)
class DeviceRow:
    """A device as the pool remembers it."""

    index: int
    uuid: bytes
    name: str
    url: str
    tier: int
    state: str


@dataclass(frozen=True, slots=True)
class NamespaceInfo:
    """A namespace. `fingerprint` is the 16-byte digest of `layout`."""

    namespace_id: int
    name: str
    layout: Layout
    fingerprint: bytes
    retention: Retention
    root_node_id: int
    created_ns: int


@dataclass(frozen=True, slots=True)
class Node:
    """A directory or context as it was when read; the columns of `nodes` explain the fields."""

    node_id: int
    parent_id: int
    namespace_id: int
    name: str
    kind: NodeKind
    origin: Origin
    state: NodeState
    mode: int
    uid: int
    gid: int
    size_bytes: int
    block_count: int
    token_count: int
    tail_bytes: int
    tail_tokens: int
    version: int
    is_pinned: bool
    mtime_ns: int
    ctime_ns: int

    @property
    def is_directory(self) -> bool:
        """Whether it may have children."""
        return self.kind is NodeKind.DIRECTORY

    @property
    def is_raw(self) -> bool:
        """Whether its bytes lie in a raw file."""
        return self.kind is NodeKind.RAW


@dataclass(frozen=True, slots=True)
class CatalogStatistics:
    """Counts and sizes, for people and metrics."""

    node_count: int
    context_count: int
    pending_count: int
    namespace_count: int
    database_bytes: int
    wal_bytes: int
    epoch: int
    is_poisoned: bool


NODE_COLUMNS: Final = (
    "node_id, parent_id, namespace_id, name, kind, origin, state, mode, uid, gid, size_bytes, "
    "block_count, token_count, tail_bytes, tail_tokens, version, is_pinned, mtime_ns, ctime_ns"
)
INSERT_NODE: Final = (
    f"INSERT INTO nodes ({NODE_COLUMNS}) VALUES ({', '.join('?' * len(NODE_COLUMNS.split(',')))})"
)
ROOT_NODE: Final = Node(
    node_id=ROOT_NODE_ID, parent_id=0, namespace_id=0, name="", kind=NodeKind.DIRECTORY,
    origin=Origin.API, state=NodeState.ACTIVE, mode=0o755, uid=0, gid=0, size_bytes=0,
    block_count=0, token_count=0, tail_bytes=0, tail_tokens=0, version=0, is_pinned=False,
    mtime_ns=0, ctime_ns=0,
)  # fmt: skip
_KINDS: Final = {int(kind): kind for kind in NodeKind}
_ORIGINS: Final = {int(origin): origin for origin in Origin}
_STATES: Final = {int(state): state for state in NodeState}


def node_from_row(row: Row) -> Node:
    """Turn a row of NODE_COLUMNS into a Node.

    Raises:
        CorruptionError: An enum has a value that was never written.
    """
    (
        node_id, parent_id, namespace_id, name, kind, origin, state, mode, uid, gid, size_bytes,
        block_count, token_count, tail_bytes, tail_tokens, version, pinned, mtime_ns, ctime_ns,
    ) = row  # fmt: skip
    try:
        return Node(
            node_id, parent_id, namespace_id, name.decode("utf-8", "surrogateescape"),
            _KINDS[kind], _ORIGINS[origin], _STATES[state], mode, uid, gid, size_bytes,
            block_count, token_count, tail_bytes, tail_tokens, version, pinned == 1, mtime_ns,
            ctime_ns,
        )  # fmt: skip
    except (KeyError, AttributeError) as error:
        raise CorruptionError(
            f"catalog node not understood: node {node_id}: found kind {kind}, origin {origin}, "
            f"state {state}; run 'kvfs-admin check'"
        ) from error


def node_to_row(node: Node) -> Row:
    """Return the values of NODE_COLUMNS."""
    return (
        node.node_id, node.parent_id, node.namespace_id, name_bytes(node.name), int(node.kind),
        int(node.origin), int(node.state), node.mode, node.uid, node.gid, node.size_bytes,
        node.block_count, node.token_count, node.tail_bytes, node.tail_tokens, node.version,
        int(node.is_pinned), node.mtime_ns, node.ctime_ns,
    )  # fmt: skip


def checked_deadline_ms(value: bytes) -> int:
    """Return a deadline, or raise UsageError."""
    text = value.decode("ascii", "replace")
    if not text.isdecimal() or not DEADLINE_MS_MIN <= int(text) <= DEADLINE_MS_MAX:
        raise UsageError(
            f"deadline_ms {text[:32]!r}: expected a whole number of milliseconds, "
            f"{DEADLINE_MS_MIN} to {DEADLINE_MS_MAX}"
        )
    return int(text)


def checked_retention(value: str) -> Retention:
    """Return a retention, or raise UsageError."""
    if value not in ("cache", "durable"):
        raise UsageError(f"retention {value[:32]!r}: expected 'cache' or 'durable'")
    return "durable" if value == "durable" else "cache"


def name_bytes(name: str) -> bytes:
    """Return the bytes a name is stored as; the inverse is in `node_from_row`.

    Raises:
        UsageError: It is no text, or holds surrogates that escape no byte.
    """
    if not isinstance(name, str):
        raise UsageError(f"name not understood: expected text, found {name!r:.80}")
    try:
        return name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise UsageError(
            f"name not understood: {name!r}: expected UTF-8 or escaped bytes"
        ) from error


def encode_name(name: str, parent_id: int) -> bytes:
    """Return the bytes of a name that a node may have.

    Raises:
        NameTooLongError: It has more than 255 bytes.
        UsageError: It can be no file's name, or not below this parent.
    """
    raw = name_bytes(name)
    if not raw or raw in (b".", b"..") or b"/" in raw or b"\0" in raw:
        raise UsageError(f"no valid name: {name!r}: expected a file name without '/' or NUL")
    if len(raw) > NAME_BYTES_MAX:
        raise NameTooLongError(
            f"name too long: {name[:32]!r}...: expected at most {NAME_BYTES_MAX} bytes, "
            f"found {len(raw)}"
        )
    if parent_id == ROOT_NODE_ID and name == STATUS_NAME:
        raise UsageError(
            f"name is taken: {name!r} at the root shows the pool's status; use another"
        )
    return raw
