"""A store on small devices, without a pool or a catalog around it."""

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from kvfs.buffers import addresses_of
from kvfs.clock import ManualClock
from kvfs.config import PoolOptions
from kvfs.devices.base import Device
from kvfs.devices.directory import DirectoryDevice
from kvfs.devices.memory import MemoryDevice
from kvfs.devices.osfs import OSFileSystem
from kvfs.devices.wrappers import Fault, FaultyDevice
from kvfs.durability import Durability, PutResult
from kvfs.engine.device_state import DeviceState, NamespaceSpec
from kvfs.engine.recovery import Owner, claim_device, format_device
from kvfs.engine.segment_table import SegmentState
from kvfs.engine.state import EngineState
from kvfs.engine.store import Store
from kvfs.keys import KeyArray, chain_keys
from kvfs.layout import Layout
from tests.invariants import check_engine

SEGMENT = 64 << 10
BLOCK = 4096
BLOCKS_PER_SEGMENT = 13  # 64 KiB less two headers and one page of entries
SPACE = 0x51
POOL_UUID, OWNER = uuid.UUID(int=0xB00C), Owner(b"h" * 16, b"b" * 16, 7)
LAYOUT = Layout("uint8", (BLOCK,))


def spec(namespace_id: int = SPACE, *, is_durable: bool = False) -> NamespaceSpec:
    return NamespaceSpec(
        namespace_id=namespace_id, name=f"space{namespace_id}", layout_json=LAYOUT.to_json(),
        digest=LAYOUT.fingerprint(), block_bytes=LAYOUT.block_bytes, stride=LAYOUT.stride,
        is_durable=is_durable,
    )  # fmt: skip


def disk(root: Path, segments: int = 16, *, index: int = 0, name: str = "dir0") -> DirectoryDevice:
    return DirectoryDevice(
        OSFileSystem(str(root / name)), index=index, uuid=uuid.UUID(int=0xD0 + index),
        capacity_bytes=segments * SEGMENT, segment_bytes=SEGMENT, name=name,
    )  # fmt: skip


def memory(segments: int = 16, *, index: int = 1, name: str = "dram0") -> MemoryDevice:
    return MemoryDevice(
        index=index, uuid=uuid.UUID(int=0xD0 + index), capacity_bytes=segments * SEGMENT,
        segment_bytes=SEGMENT, name=name,
    )  # fmt: skip


def faulty(device: Device, *faults: Fault) -> FaultyDevice:
    return FaultyDevice(device, faults)


@dataclass(slots=True)
class Names:
    """A catalog's answers: the keys that names reach, and no files."""

    reached: list[KeyArray] = field(default_factory=list)

    def reachable_keys(self, namespace_id: int) -> list[KeyArray]:
        del namespace_id
        return self.reached

    def forget_files(self, lost: KeyArray) -> list[KeyArray]:
        del lost
        return []


def content_of(key: bytes, nbytes: int = BLOCK) -> bytes:
    """Return the payload that belongs to a key."""
    seed = int.from_bytes(key[8:16], "little")
    return np.random.default_rng(seed).bytes(nbytes)


def chain(count: int, start: int = 0, *, namespace_id: int = SPACE) -> tuple[KeyArray, KeyArray]:
    """Return keys and parents of a chain; another `start` is another chain."""
    return chain_keys(namespace_id, np.arange(start, start + count), 1)


@dataclass(eq=False)
class Engine:
    """A store with its devices; everything that was put is known by its key."""

    devices: Sequence[Device]
    options: PoolOptions = field(default_factory=PoolOptions)
    clock: ManualClock = field(default_factory=ManualClock)
    names: Names = field(default_factory=Names)
    is_durable: bool = False

    def __post_init__(self) -> None:
        self._open([self._claim(device) for device in self.devices])

    def _claim(self, device: Device) -> DeviceState:
        if device.read_superblock() is None:
            return format_device(device, POOL_UUID, 0, OWNER, self.clock)
        return claim_device(device, POOL_UUID, 0, OWNER, self.clock)

    def _open(self, states: list[DeviceState]) -> None:
        self.state = EngineState(POOL_UUID, states, self.names, self.options, self.clock)
        self.state.add_namespace(spec(is_durable=self.is_durable))
        self.store = Store(self.state)
        self.report = self.store.load()

    def reopen(self, *makers: Callable[[], Device], crash: bool = False) -> "Engine":
        """Close, or let go as a killed process does, and open again on these devices."""
        self.abandon() if crash else self.store.close()
        devices = [make() for make in makers]
        return Engine(devices, self.options, self.clock, self.names, self.is_durable)

    def abandon(self) -> None:
        """Let go of all descriptors; nothing is flushed. Idempotent."""
        for device in self.devices:
            device.close()
        for index in self.state.indexes.values():
            index.close()

    def put(
        self, keys: KeyArray, parents: KeyArray | None = None, *, durability: str = "sync",
        nbytes: int = BLOCK,
    ) -> PutResult:  # fmt: skip
        buffers = [content_of(key.tobytes(), nbytes) for key in keys]
        addresses, lengths = addresses_of(buffers, len(keys))
        self.clock.advance(1000)
        return self.store.put(
            SPACE, keys, addresses, lengths, parents=parents, durability=Durability(durability)
        )

    def fill(self, segments: int, *, start: int = 1 << 20, durability: str = "sync") -> KeyArray:
        """Put unrelated blocks that fill so many segments; return their keys."""
        chains = [chain(1, start + i)[0] for i in range(segments * BLOCKS_PER_SEGMENT)]
        keys = np.concatenate(chains)
        for first in range(0, len(keys), BLOCKS_PER_SEGMENT):
            self.put(keys[first : first + BLOCKS_PER_SEGMENT], durability=durability)
        return keys

    def read(self, keys: KeyArray, nbytes: int = BLOCK) -> list[bool]:
        """Return which blocks can be read; what is read is what was put."""
        room = np.zeros((len(keys), nbytes), np.uint8)
        self.clock.advance(1000)
        good = self.store.read_into(SPACE, keys, *addresses_of(room, len(keys), writable=True))
        for key, raw in zip(keys[good], room[good], strict=True):
            assert raw.tobytes() == content_of(key.tobytes(), nbytes)
        return good.tolist()

    def resident(self, keys: KeyArray, device: int | None = None) -> list[bool]:
        """Return which blocks the index knows, on one device or on any."""
        return (self.state.index(SPACE).lookup(keys, device)["length"] > 0).tolist()

    def segment_of(self, key: np.ndarray, device: int | None = None) -> SegmentState:
        """Return the segment that holds a block."""
        record = self.state.index(SPACE).lookup(key.reshape(1, -1), device)[0]
        segment = self.state.segment_of(
            int(record["device"]), int(record["segment"]), int(record["generation"])
        )
        assert segment is not None
        return segment

    @property
    def counters(self) -> dict[str, int]:
        return self.state.counters.snapshot()

    def check(self) -> None:
        check_engine(self.state)

    def close(self) -> None:
        self.check()
        self.store.close()


MakeEngine = Callable[..., Engine]


def flip(engine: Engine, key: np.ndarray, root: Path) -> None:
    """Change one byte of a block's payload on the medium of device 0, which is below `root`."""
    record = engine.state.index(SPACE).lookup(key.reshape(1, -1), 0)[0]
    name = f"{int(record['segment']):08x}-{int(record['generation']):08x}.seg"
    with (root / "dir0" / "segments" / name).open("r+b") as file:
        file.seek(int(record["page"]) * BLOCK + 17)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
