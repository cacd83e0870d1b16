"""Questions to a pool and their answers.

Layer: L5.

- Fields are added, never changed; a reader skips those it does not know.
- Sizes in bytes, times in nanoseconds since 1970 UTC.
- Names are bytes in questions, because a file name need not be UTF-8; answers carry them printable.
"""

from typing import Final

import msgspec

PROTOCOL_VERSION: Final = 1


class Request(msgspec.Struct, frozen=True, tag_field="request", tag=str.lower):
    """Base of all questions."""


class Hello(Request, frozen=True):
    """Who are you?"""


class PoolStatus(Request, frozen=True):
    """How is the pool?"""


class DeviceList(Request, frozen=True):
    """Which devices does the pool have?"""


class ContextList(Request, frozen=True):
    """Which contexts are there?

    `namespace` empty: in all of them.
    """

    namespace: bytes = b""
    limit: int = 100_000


class ContextShow(Request, frozen=True):
    """What is known of one context? `name` begins with its namespace."""

    name: bytes


class ContextDropPlan(Request, frozen=True):
    """What would dropping these contexts do? Changes nothing."""

    names: list[bytes]


class DeviceAdd(Request, frozen=True):
    """Format a device and take it into the pool; with `is_dry` only say what would be done."""

    url: bytes
    is_dry: bool = False


class DeviceSet(Request, frozen=True):
    """Take a device into service, or out of it: then it is read, and takes no writes."""

    name: str
    is_online: bool


class DeviceEvacuate(Request, frozen=True):
    """Move about so many bytes from a device to the others; asked again until nothing is left.

    The device is out of service from the first question on. With `is_dry` only say what lies there.
    """

    name: str
    nbytes: int
    is_dry: bool = False


class DeviceRemove(Request, frozen=True):
    """Take a device out of the pool for good; with `is_dry` only say what would be lost."""

    name: str
    is_dry: bool = False
    allow_data_loss: bool = False


class TakeOver(Request, frozen=True):
    """Give me the pool. What follows the answer: kvfs.cli.takeover.

    `memory_version`: of memory that the asker reads (kvfs.devices.keeper); `core_version`: of the
    control protocol it speaks with kvfs-core; `mount`: where it will mount, empty if it will not.
    """

    memory_version: int
    core_version: int
    mount: str = ""


class DropItem(msgspec.Struct, frozen=True):
    """One context of a plan. `version` and `mtime_ns`: as it was when the plan was made."""

    node_id: int
    name: str
    version: int
    mtime_ns: int
    blocks: int
    size_bytes: int
    is_pinned: bool


class DropPlan(msgspec.Struct, frozen=True):
    """What a drop will do."""

    items: list[DropItem]


class ContextDrop(Request, frozen=True):
    """Do what the plan says."""

    plan: DropPlan


class HelloAnswer(msgspec.Struct, frozen=True):
    """The process that owns the pool. `mount`: where it is mounted, empty if it is not."""

    kvfs_version: str
    pid: int
    command: str
    pool_name: str
    pool_uuid: str
    pool_path: str
    mount: str
    opened_ns: int


class RangeAnswer(msgspec.Struct, frozen=True):
    """A part of a device. Bytes."""

    offset: int
    nbytes: int


class DeviceAnswer(msgspec.Struct, frozen=True):
    """One device. `failures`: writes and persists that failed since the pool was opened.

    `persistence`, `filesystem`, `cache`, `io`: see DeviceInfo. `bad_bytes`: of the medium, known to
    be bad and used no more; `bad_ranges` says where. `bytes_stored`: of `bytes_written`, not moved
    to make room. Speeds are what the kernel or an emulation tells, 0 if nothing does.
    `energy_joules`: of emulated devices.
    """

    index: int
    name: str
    kind: str
    tier: int
    state: str
    url: str
    uuid: str
    is_persistent: bool
    capacity_bytes: int
    used_bytes: int
    live_bytes: int
    segment_bytes: int
    segment_count: int
    block_count: int
    bytes_written: int
    failures: int
    persistence: str
    filesystem: str
    cache: str
    io: str
    bad_bytes: int
    bad_ranges: list[RangeAnswer] = []
    bytes_stored: int = 0
    energy_joules: float = 0.0
    read_bytes_per_s: int = 0
    write_bytes_per_s: int = 0
    read_latency_ns: int = 0
    write_latency_ns: int = 0


class DeviceListAnswer(msgspec.Struct, frozen=True):
    """All devices."""

    pool_name: str
    devices: list[DeviceAnswer]


class PoolStatusAnswer(msgspec.Struct, frozen=True):
    """A pool in figures.

    `owner_pid`: 0 if it was opened only to be asked. `problems`: sentences for the operator.
    `counters`: since it was opened. `clients`: processes that use it, besides the owner;
    `client_segments`: segments they hold; `client_revocations`: times that was taken from one.
    """

    pool_name: str
    pool_uuid: str
    pool_path: str
    state: str
    mount: str
    owner_pid: int
    owner_command: str
    opened_ns: int
    namespaces: int
    contexts: int
    capacity_bytes: int
    used_bytes: int
    live_bytes: int
    devices: list[DeviceAnswer]
    counters: dict[str, int]
    problems: list[str]
    clients: int = 0
    client_segments: int = 0
    client_revocations: int = 0


class ContextAnswer(msgspec.Struct, frozen=True):
    """One context. `origin`: 'api' or 'file'."""

    node_id: int
    name: str
    namespace: str
    origin: str
    size_bytes: int
    blocks: int
    tokens: int
    is_pinned: bool
    modified_ns: int


class ContextListAnswer(msgspec.Struct, frozen=True):
    """Contexts in the order of their paths. `is_truncated`: there are more than the limit."""

    contexts: list[ContextAnswer]
    is_truncated: bool = False


class PlaceAnswer(msgspec.Struct, frozen=True):
    """How much of a context lies on one device; the fastest copy of each block counts."""

    device: str
    tier: int
    blocks: int
    stored_bytes: int


class ContextShowAnswer(msgspec.Struct, frozen=True):
    """One context in detail. `resident_blocks`: leading blocks that are in the pool."""

    context: ContextAnswer
    resident_blocks: int
    block_tokens: int
    block_bytes: int
    layout: str
    fingerprint: str
    retention: str
    first_key: str
    last_key: str
    places: list[PlaceAnswer]


class DeviceAddAnswer(msgspec.Struct, frozen=True):
    """The device as it was planned, or made."""

    name: str
    url: str
    kind: str
    tier: int
    capacity_bytes: int
    segment_bytes: int
    is_added: bool


class DeviceSetAnswer(msgspec.Struct, frozen=True):
    """The device's state."""

    name: str
    state: str


class DeviceEvacuateAnswer(msgspec.Struct, frozen=True):
    """What was moved now, and what is left; `held_segments` of it wait for who reads them."""

    name: str
    moved_blocks: int
    moved_bytes: int
    left_segments: int
    left_bytes: int
    held_segments: int
    raw_files: int


class DeviceRemoveAnswer(msgspec.Struct, frozen=True):
    """What lay there. `lost_blocks`: without a copy elsewhere."""

    pool_name: str
    name: str
    url: str
    live_bytes: int
    block_count: int
    lost_blocks: int
    is_removed: bool


class ContextDropAnswer(msgspec.Struct, frozen=True):
    """What a drop did. `skipped`: changed or removed since the plan was made."""

    dropped: list[str]
    skipped: list[str]


class TakeOverAnswer(msgspec.Struct, frozen=True):
    """Who gives it, after closing it."""

    pid: int
    kvfs_version: str


AnyRequest = (
    Hello | PoolStatus | DeviceList | ContextList | ContextShow | ContextDropPlan | ContextDrop
    | DeviceAdd | DeviceSet | DeviceEvacuate | DeviceRemove | TakeOver
)  # fmt: skip
ANSWERS: Final[dict[type[Request], type]] = {
    Hello: HelloAnswer,
    PoolStatus: PoolStatusAnswer,
    DeviceList: DeviceListAnswer,
    ContextList: ContextListAnswer,
    ContextShow: ContextShowAnswer,
    ContextDropPlan: DropPlan,
    ContextDrop: ContextDropAnswer,
    DeviceAdd: DeviceAddAnswer,
    DeviceSet: DeviceSetAnswer,
    DeviceEvacuate: DeviceEvacuateAnswer,
    DeviceRemove: DeviceRemoveAnswer,
    TakeOver: TakeOverAnswer,
}


class Question(msgspec.Struct, frozen=True):
    """The envelope of a question."""

    version: int
    question: AnyRequest


class Failure(msgspec.Struct, frozen=True):
    """Why there is no answer. `error`: name of a class of kvfs.errors, or 'InternalError'."""

    error: str
    code: int
    message: str


class Reply(msgspec.Struct, frozen=True):
    """The envelope of an answer: either `failure`, or `answer` of the type in ANSWERS."""

    version: int
    failure: Failure | None = None
    answer: msgspec.Raw = msgspec.Raw(b"\xc0")  # nil


def printable(text: str) -> str:
    """Return text that can be encoded; bytes that were no UTF-8 appear as escapes."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
