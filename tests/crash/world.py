"""Pools on simulated disks, opened by the code that opens real ones, and looking at them."""

import sqlite3
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from kvfs.clock import ManualClock
from kvfs.config import PoolOptions
from kvfs.devices.base import Device
from kvfs.devices.dax import DaxDevice
from kvfs.devices.dax_layout import HEADER_BYTES
from kvfs.devices.dax_source import ALIGNMENT
from kvfs.devices.directory import DirectoryDevice
from kvfs.devices.memory import MemoryDevice
from kvfs.engine.catalog import Catalog
from kvfs.engine.catalog_schema import DeviceRow, NodeState, Origin
from kvfs.engine.device_state import DeviceState
from kvfs.engine.recovery import Owner, claim_device, format_device
from kvfs.layout import Layout
from kvfs.pool import Pool
from kvfs.units import align_up
from tests.crash.domain import Files
from tests.crash.events import Commit, Journal, SyncCatalog
from tests.crash.simdax import SimDax
from tests.crash.simfs import LOCATION, SimFileSystem
from tests.oracle import ContextValue, FileValue, NamespaceValue, Value
from tests.oracle import Path as Name

SEGMENT_BYTES = 64 << 10
SMALL = Layout("uint8", (1024,), 4, model="small")  # blocks of 4 KiB, stride 4 KiB
LARGE = Layout("uint8", (3000,), 4, model="large")  # blocks of 12000 bytes, stride 12 KiB
POOL_UUID = uuid.UUID(int=0x6B766673 << 64)
OWNER = Owner(bytes(range(16)), bytes(16), 4242)


@dataclass(frozen=True, slots=True)
class Geometry:
    """The devices of a pool: segments on each disk, and frames of memory (0: none).

    The last `dax` of the disks are mapped memory that stays, or files in its place, the others
    directories.
    """

    disks: tuple[int, ...] = (16,)
    frames: int = 0
    dax: int = 0
    are_files: bool = False

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kind of each disk, as in a journal."""
        mapped = "file" if self.are_files else "dax"
        return ("dir",) * (len(self.disks) - self.dax) + (mapped,) * self.dax

    @property
    def is_small(self) -> bool:
        """Whether the disks of a kind are so few segments that a random history fills them."""
        pairs = list(zip(self.kinds, self.disks, strict=True))
        return any(sum(n for k, n in pairs if k == kind) < 16 for kind in set(self.kinds))

    @property
    def takes_files(self) -> bool:
        """Whether a disk takes files; else all go into the log."""
        return "dir" in self.kinds


@dataclass(slots=True, eq=False)
class World:
    """A pool, its disks and its time."""

    geometry: Geometry
    options: PoolOptions = field(default_factory=lambda: PoolOptions(device_failures_max=1000))
    clock: ManualClock = field(default_factory=ManualClock)
    journal: Journal | None = None
    disks: list[SimFileSystem | SimDax] = field(default_factory=list)
    _pool: Pool | None = None

    @property
    def pool(self) -> Pool:
        assert self._pool is not None
        return self._pool

    def format(self) -> None:
        """Make a new pool on empty disks."""
        self.restore(tuple({} for _ in self.geometry.disks))
        catalog = self._catalog(None)
        states = []
        for device in self._devices():
            states.append(self._format(device))
            info = device.info
            catalog.add_device(
                DeviceRow(info.index, info.uuid.bytes, info.name, info.url, info.tier, "online")
            )
        catalog.sync()
        self._open(catalog, states)

    def recover(self, files: tuple[Files, ...], catalog: bytes | None) -> None:
        """Open what a power cut left."""
        self.restore(files)
        self.open(catalog)

    def restore(self, files: tuple[Files, ...]) -> None:
        """Make disks that hold these files."""
        self.disks = []
        for number, (kind, found) in enumerate(zip(self.geometry.kinds, files, strict=True)):
            if kind != "dir":
                segments = self.geometry.disks[number] * SEGMENT_BYTES
                nbytes = align_up(HEADER_BYTES + segments, ALIGNMENT)
                self.disks.append(
                    SimDax.restore(found, nbytes, number, self.journal, is_file=kind == "file")
                )
            else:
                self.disks.append(SimFileSystem.restore(found, number, self.journal))

    def open(self, catalog: bytes | None) -> None:
        """Open the pool on its disks."""
        states = [
            claim_device(device, POOL_UUID, LOCATION, OWNER, self.clock)
            if device.info.is_persistent
            else self._format(device)
            for device in self._devices()
        ]
        self._open(self._catalog(catalog), states)

    def open_parts(self, catalog: bytes | None) -> tuple[list[Device], Catalog]:
        """Open persistent devices and catalog without making a pool of them."""
        return self._lasting_devices(), self._catalog(catalog)

    def abandon(self) -> None:
        """Let go of all descriptors, as a killed process does: nothing is flushed."""
        if self._pool is not None:
            state = self._pool.store.state
            for device in state.devices:
                device.device.close()
            for index in state.indexes.values():
                index.close()
            self._pool.catalog.close()
            self._pool = None

    def discard(self) -> None:
        """Abandon the pool and its disks."""
        self.abandon()
        for disk in self.disks:
            disk.discard()

    def _open(self, catalog: Catalog, states: list[DeviceState]) -> None:
        self._pool = Pool(
            Path("/simulated"), catalog, states, options=self.options, clock=self.clock
        )

    def _format(self, device: Device) -> DeviceState:
        return format_device(device, POOL_UUID, LOCATION, OWNER, self.clock)

    def _catalog(self, image: bytes | None) -> Catalog:
        """Open a database in memory; its commits and syncs go into the journal."""
        connection = sqlite3.connect(":memory:", check_same_thread=False)
        if image is not None:
            connection.deserialize(image)
        journal = self.journal
        if journal is None:
            return Catalog.from_connection(connection, pool_uuid=POOL_UUID)
        return Catalog.from_connection(
            connection,
            lambda: journal.add(Commit(connection.serialize())),
            lambda: journal.add(SyncCatalog()),
            pool_uuid=POOL_UUID,
        )

    def _devices(self) -> list[Device]:
        made = self._lasting_devices()
        if self.geometry.frames:
            number = len(made)
            memory = MemoryDevice(
                index=number,
                uuid=uuid.UUID(int=0xD7A1 << 32 | number),
                capacity_bytes=self.geometry.frames * SEGMENT_BYTES,
                segment_bytes=SEGMENT_BYTES,
                name="dram0",
            )
            made.append(memory)
        return made

    def _lasting_devices(self) -> list[Device]:
        made: list[Device] = []
        for number, disk in enumerate(self.disks):
            kind, medium = self.geometry.kinds[number], disk
            make = DirectoryDevice
            if isinstance(disk, SimDax):
                make, medium = DaxDevice, disk.source()
            device = make(
                medium,
                index=number,
                uuid=uuid.UUID(int=0xD15C << 32 | number),
                capacity_bytes=self.geometry.disks[number] * SEGMENT_BYTES,
                segment_bytes=SEGMENT_BYTES,
                name=f"{kind}{number}",
            )
            made.append(device)
        return made


# --- looking at a pool


def resident_keys(pool: Pool, *, persistent: bool = True) -> set[bytes]:
    """Return the keys in the index that have a copy on a device of this kind."""
    state = pool.store.state
    wanted = [d.info.index for d in state.devices if d.info.is_persistent == persistent]
    found: set[bytes] = set()
    for index in state.indexes.values():
        records = index.snapshot()
        keys = records["key"][np.isin(records["device"], wanted)]
        found.update(key.tobytes() for key in keys)
    return found


def names_of(pool: Pool) -> dict[Name, Value]:
    """Return every name and what it stands for; files are read."""
    found: dict[Name, Value] = {}
    for info in pool.catalog.namespaces():
        found[info.name, ""] = NamespaceValue(info.namespace_id, info.retention)
        for node in pool.walk(info.root_node_id):
            if node.state is not NodeState.ACTIVE:
                continue
            path = pool.catalog.path_of(node.node_id).partition("/")[2]
            if node.origin is Origin.FILE:
                reader = pool.files.open_read(node)
                nbytes = pool.files.current(node).size_bytes
                content = bytes(pool.files.read(reader, 0, nbytes))
                pool.files.close_read(reader)
                found[info.name, path] = FileValue(content)
            else:
                keys = tuple(key.tobytes() for key in pool.catalog.keys(node.node_id))
                tokens = pool.catalog.tokens(node.node_id)
                shown = tuple(tokens.tolist()) if tokens is not None else None
                found[info.name, path] = ContextValue(keys, shown, node.is_pinned)
    return found


def files_of(pool: Pool) -> dict[Name, set[bytes]]:
    """Return the names of all published files with the keys of their blocks."""
    return {
        (info.name, pool.catalog.path_of(node.node_id).partition("/")[2]): {
            key.tobytes() for key in pool.catalog.keys(node.node_id)
        }
        for info in pool.catalog.namespaces()
        for node in pool.walk(info.root_node_id)
        if node.origin is Origin.FILE and node.state is NodeState.ACTIVE
    }


def file_names(pool: Pool) -> set[Name]:
    """Return the names of all published files."""
    return {
        (info.name, pool.catalog.path_of(node.node_id).partition("/")[2])
        for info in pool.catalog.namespaces()
        for node in pool.walk(info.root_node_id)
        if node.origin is Origin.FILE and node.state is NodeState.ACTIVE
    }
