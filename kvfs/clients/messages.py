"""What a client and the owner of a pool say to each other; docs/PROTOCOL.md explains it.

Layer: L4.

- Fields are added, never changed; a reader skips those it does not know.
- Keys, places, ranges and digests travel as the bytes of little-endian arrays. Names are bytes,
  because a name need not be UTF-8.
- Sizes in bytes, times in nanoseconds since 1970 UTC.
"""

from typing import Annotated, Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

import kvfs.errors
from kvfs.durability import PutResult
from kvfs.engine.catalog_schema import NamespaceInfo, Node, NodeKind, NodeState, Origin
from kvfs.errors import KvfsError, UsageError
from kvfs.layout import Layout
from kvfs.statistics import PoolStatistics

VERSION: Final = 1
VERSION_MIN: Final = 1  # the oldest that is still understood
KEYS_MAX: Final = 65536  # in one message
PLACES_MAX: Final = 64  # segments asked for at once, each answered with a descriptor
TRAY_BYTES: Final = 8 << 20  # of memory in which fetched blocks come
TRAY_ALIGNMENT: Final = 64
REGIONS_MAX: Final = 64  # of memory that one connection may share
REQUEST_BYTES_MAX: Final = 16 << 20
REPLY_BYTES_MAX: Final = 16 << 20


Number = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]


class Request(msgspec.Struct, frozen=True, tag_field="request", tag=str.lower):
    """Base of what a client says."""


class Hello(Request, frozen=True):
    """The first message of a session: which versions the client speaks, and who it is."""

    version_min: int
    version: int
    command: str = ""


class Join(Request, frozen=True):
    """The first message of another connection of a session."""

    token: bytes


class Ping(Request, frozen=True):
    """Are you there?"""


class NamespaceList(Request, frozen=True):
    """Which namespaces may I read?"""


class NamespaceOpen(Request, frozen=True):
    """Which namespace is this? With a layout it is made if it is not there."""

    name: bytes
    layout: str = ""
    retention: str = "cache"


class Attach(Request, frozen=True):
    """Let me read a namespace: answered with a descriptor of its index."""

    namespace_id: Number


class Segments(Request, frozen=True):
    """Let me map these segments: answered with a descriptor for each that is there.

    `places`: u64[n], as in a lease page. `known`: places of earlier answers that are still mapped.
    """

    namespace_id: Number
    places: bytes
    known: bytes = b""


class Verify(Request, frozen=True):
    """Verify these blocks, from the medium if need be; `again`: they did not hold for me."""

    namespace_id: Number
    keys: bytes
    again: bool = False


class Fetch(Request, frozen=True):
    """Copy parts of blocks to the connection's tray. `offsets`, `lengths`: u64[n], inside blocks.

    They lie there in order, each from the next multiple of TRAY_ALIGNMENT on. `phase`: of
    inference, see `kvfs.phase`.
    """

    namespace_id: Number
    keys: bytes
    offsets: bytes
    lengths: bytes
    phase: int = 0


class Share(Request, frozen=True):
    """Map this memory: comes with a descriptor; its ranges can be put from this connection."""

    nbytes: int


class Unshare(Request, frozen=True):
    """Forget shared memory."""

    region: int


class Put(Request, frozen=True, kw_only=True):
    """Store blocks from shared memory. `regions`: u32[n]; `offsets`, `lengths`: u64[n].

    `parents`: empty for none; `counts`: u32[n], tokens per block.
    """

    namespace_id: Number
    keys: bytes
    parents: bytes
    regions: bytes
    offsets: bytes
    lengths: bytes
    counts: bytes
    durability: str


class ContextOpen(Request, frozen=True):
    """Which node is at this path below the namespace?"""

    namespace_id: Number
    path: bytes
    create: bool


class ContextList(Request, frozen=True):
    """Which contexts are there? `skip`: so many were told before."""

    namespace_id: Number
    skip: Number = 0


class ContextNode(Request, frozen=True):
    """How is a context now?"""

    node_id: Number


class ContextPath(Request, frozen=True):
    """What is its path, with its namespace's name in front?"""

    node_id: Number


class ContextKeys(Request, frozen=True):
    """Which are its keys from `start` on?"""

    node_id: Number
    start: Number


class ContextTokens(Request, frozen=True):
    """Which are its token ids, from `start` on?"""

    node_id: Number
    start: Number


class ContextAppend(Request, frozen=True, kw_only=True):
    """Store blocks as `put` says, then name them at the end of a context.

    `tokens`: u32 token ids, or None if they are not known.
    """

    node_id: Number
    put: Put
    tokens: bytes | None
    replace_tail: bool


class ContextLink(Request, frozen=True):
    """Name blocks that are stored at the end of a context, up to the first that is not."""

    node_id: Number
    keys: bytes


class ContextPin(Request, frozen=True):
    """Keep its blocks from eviction, or stop doing so."""

    node_id: Number
    is_pinned: bool


class ContextDrop(Request, frozen=True):
    """Remove its name."""

    node_id: Number


class Flush(Request, frozen=True):
    """Persist all blocks."""


class Sync(Request, frozen=True):
    """Make everything done so far survive a power cut."""


class Status(Request, frozen=True):
    """How is the pool?"""


AnyRequest = (
    Hello | Join | Ping | NamespaceList | NamespaceOpen | Attach | Segments | Verify | Fetch
    | Share | Unshare | Put | ContextOpen | ContextList | ContextNode | ContextPath | ContextKeys
    | ContextTokens | ContextAppend | ContextLink | ContextPin | ContextDrop | Flush | Sync | Status
)  # fmt: skip


# --- answers


class Welcome(msgspec.Struct, frozen=True, kw_only=True):
    """The session; with descriptors of lease page, notice and access ring."""

    version: int
    kvfs_version: str
    owner_pid: int
    token: bytes
    name: str
    pool_name: str
    pool_uuid: str
    verify_reads: bool
    heartbeat_ms: int
    ranks: bytes


class Done(msgspec.Struct, frozen=True):
    """It is done."""


class NamespaceAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """A namespace."""

    namespace_id: int
    name: bytes
    layout: str
    fingerprint: bytes
    retention: str
    root_node_id: int
    created_ns: int


class NamespaceListAnswer(msgspec.Struct, frozen=True):
    """Namespaces."""

    namespaces: list[NamespaceAnswer]


class SegmentAnswer(msgspec.Struct, frozen=True):
    """A segment; its descriptor comes with the answer, in order.

    `is_log`: its summary is at its end, else `digests` are those of all its entries, 16 bytes each.
    `needs_verify`: blocks that the index does not call verified must be verified by the owner.
    """

    place: int
    nbytes: int
    is_log: bool
    needs_verify: bool
    digests: bytes = b""


class SegmentsAnswer(msgspec.Struct, frozen=True):
    """The segments that are there, of the first `done` places; which `known` ones are no more.

    `fetched`: u64[n], places of those that cannot be mapped, but fetched.
    """

    segments: list[SegmentAnswer]
    done: int
    gone: bytes
    fetched: bytes = b""


class VerifyAnswer(msgspec.Struct, frozen=True):
    """Which blocks hold what they should: u8[n]."""

    good: bytes


class FetchAnswer(msgspec.Struct, frozen=True):
    """Which parts lie in the tray: u8[n]. A connection's first answer brings its descriptor."""

    good: bytes


class ShareAnswer(msgspec.Struct, frozen=True):
    """The number of shared memory."""

    region: int


class PutAnswer(msgspec.Struct, frozen=True):
    """What a put did."""

    result: PutResult


class LinkAnswer(msgspec.Struct, frozen=True):
    """How many blocks were named."""

    count: int


class NodeAnswer(msgspec.Struct, frozen=True, array_like=True):
    """A node; fields as in `kvfs.engine.catalog_schema.Node`."""

    node_id: int
    parent_id: int
    namespace_id: int
    name: bytes
    kind: int
    origin: int
    state: int
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


class ContextAnswer(msgspec.Struct, frozen=True):
    """A node, or None."""

    node: NodeAnswer | None


class ContextListAnswer(msgspec.Struct, frozen=True):
    """Some contexts, and whether there are more."""

    nodes: list[NodeAnswer]
    has_more: bool


class PathAnswer(msgspec.Struct, frozen=True):
    """A path."""

    path: bytes


class ArrayAnswer(msgspec.Struct, frozen=True):
    """Part of an array: keys or token ids, how many there are in all; `raw` None: not known."""

    raw: bytes | None
    total: int


class StatusAnswer(msgspec.Struct, frozen=True):
    """A pool in figures."""

    statistics: PoolStatistics


class Failure(msgspec.Struct, frozen=True):
    """Why a request was not answered: a class of kvfs.errors, and its message."""

    error: str
    message: str


class Reply(msgspec.Struct, frozen=True):
    """An answer, or why there is none; `fd_count` descriptors come with it."""

    answer: msgspec.Raw = msgspec.Raw(b"\xc0")  # nil
    failure: Failure | None = None
    fd_count: int = 0


ANSWERS: Final[dict[type[Request], Any]] = {
    Hello: Welcome, Join: Done, Ping: Done, NamespaceList: NamespaceListAnswer,
    NamespaceOpen: NamespaceAnswer, Attach: NamespaceAnswer, Segments: SegmentsAnswer,
    Verify: VerifyAnswer, Fetch: FetchAnswer, Share: ShareAnswer, Unshare: Done,
    Put: PutAnswer,
    ContextOpen: ContextAnswer, ContextList: ContextListAnswer, ContextNode: ContextAnswer,
    ContextPath: PathAnswer, ContextKeys: ArrayAnswer, ContextTokens: ArrayAnswer,
    ContextAppend: PutAnswer, ContextLink: LinkAnswer, ContextPin: Done, ContextDrop: Done,
    Flush: Done, Sync: Done, Status: StatusAnswer,
}  # fmt: skip


def tray_places(lengths: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Return where in a tray parts of these lengths lie.

    Raises:
        UsageError: They do not fit.
    """
    units = (np.minimum(lengths, TRAY_BYTES + 1) + (TRAY_ALIGNMENT - 1)) // TRAY_ALIGNMENT
    ends = np.cumsum(units.astype(np.uint64)) * np.uint64(TRAY_ALIGNMENT)
    if len(ends) and int(ends[-1]) > TRAY_BYTES:
        raise UsageError(f"parts of blocks do not fit: at most {TRAY_BYTES} bytes at a time")
    return ends - units.astype(np.uint64) * np.uint64(TRAY_ALIGNMENT)


def failure_of(error: BaseException) -> Failure:
    """Describe an error for the other side; one that is not kvfs's own is a bug of the owner."""
    if isinstance(error, KvfsError):
        name = next(
            kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "kvfs.errors"
        )
        return Failure(name, printable(str(error)))
    text = f"the pool's owner failed: {type(error).__name__}: {error}; see its log"
    return Failure("DeviceError" if isinstance(error, OSError) else "KvfsError", printable(text))


def error_of(failure: Failure) -> KvfsError:
    """Return the exception that the other side raised."""
    kind = getattr(kvfs.errors, failure.error, None)
    if isinstance(kind, type) and issubclass(kind, KvfsError):
        return kind(failure.message)
    return KvfsError(failure.message)


def printable(text: str) -> str:
    """Return text that can be sent: what is no Unicode is escaped."""
    return text.encode("utf-8", "backslashreplace").decode()


def to_name(text: str) -> bytes:
    """Return a name as bytes."""
    return text.encode("utf-8", "surrogateescape")


def from_name(raw: bytes) -> str:
    """Return a name as text."""
    return raw.decode("utf-8", "surrogateescape")


def from_node(node: Node) -> NodeAnswer:
    """Encode a node."""
    values = [getattr(node, name) for name in NodeAnswer.__struct_fields__]
    values[3] = to_name(node.name)
    return NodeAnswer(*values)


def to_node(answer: NodeAnswer) -> Node:
    """Decode a node.

    Raises:
        ValueError: Kind, origin or state is of a later version.
    """
    values = [getattr(answer, name) for name in NodeAnswer.__struct_fields__]
    values[3:7] = [
        from_name(answer.name), NodeKind(answer.kind), Origin(answer.origin),
        NodeState(answer.state),
    ]  # fmt: skip
    return Node(*values)


def from_info(info: NamespaceInfo) -> NamespaceAnswer:
    """Encode a namespace."""
    return NamespaceAnswer(
        namespace_id=info.namespace_id, name=to_name(info.name), layout=info.layout.to_json(),
        fingerprint=info.fingerprint, retention=info.retention, root_node_id=info.root_node_id,
        created_ns=info.created_ns,
    )  # fmt: skip


def to_info(answer: NamespaceAnswer) -> NamespaceInfo:
    """Decode a namespace."""
    return NamespaceInfo(
        answer.namespace_id, from_name(answer.name), Layout.from_json(answer.layout),
        answer.fingerprint, "durable" if answer.retention == "durable" else "cache",
        answer.root_node_id, answer.created_ns,
    )  # fmt: skip
