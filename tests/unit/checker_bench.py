"""A small pool on a real directory, for breaking it and checking what is found."""

import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from kvfs.clock import ManualClock
from kvfs.config import PoolOptions
from kvfs.devices.directory import DirectoryDevice
from kvfs.devices.osfs import OSFileSystem
from kvfs.engine.catalog import Catalog
from kvfs.engine.catalog_schema import ROOT_NODE_ID, DeviceRow
from kvfs.engine.checker import check_devices
from kvfs.engine.log import load_segment
from kvfs.engine.recovery import Owner, claim_device, format_device
from kvfs.layout import Layout
from kvfs.pool import Pool
from kvfs.tree import Tree

SEGMENT_BYTES = 64 << 10
POOL_UUID = uuid.UUID(int=7)
DEVICE_UUID = uuid.UUID(int=11)
OWNER = Owner(bytes(16), bytes(16), 4242)
SMALL = Layout("uint8", (1024,), 4, model="small")  # blocks of 4 KiB
BLOCKS = 30
SMALL_FILE = 10_000  # 3 blocks, in the log
LARGE_FILE = 40_001  # 10 blocks, a file segment


class Bench:
    """A pool with small segments on a real directory, closed between the steps of a test."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.clock = ManualClock()
        (root / "pool").mkdir()
        self.catalog_path = root / "pool" / "catalog.sqlite"
        self.content = np.random.default_rng(5).integers(0, 256, (BLOCKS, 4096), np.uint8)
        self.small = os.urandom(SMALL_FILE)
        self.large = os.urandom(LARGE_FILE)
        device = self.device()
        catalog = Catalog.create(self.catalog_path, POOL_UUID)
        state = format_device(device, POOL_UUID, device.location(), OWNER, self.clock)
        catalog.add_device(DeviceRow(0, DEVICE_UUID.bytes, "dir0", "dir:/x", 2, "online"))
        with self._pool(catalog, state) as pool:
            space = pool.namespace("s", SMALL)
            self.keys, parents = space.keys(np.arange(BLOCKS * 4))
            space.put(self.keys, self.content, parents=parents, durability="sync")
            self.write(pool, "small", self.small)
            self.write(pool, "large", self.large)

    def device(self) -> DirectoryDevice:
        return DirectoryDevice(
            OSFileSystem(str(self.root / "dev")),
            index=0,
            uuid=DEVICE_UUID,
            capacity_bytes=32 * SEGMENT_BYTES,
            segment_bytes=SEGMENT_BYTES,
            name="dir0",
        )

    def _pool(self, catalog: Catalog, state) -> Pool:
        return Pool(self.root / "pool", catalog, [state], options=PoolOptions(), clock=self.clock)

    def open(self) -> Pool:
        device = self.device()
        state = claim_device(device, POOL_UUID, device.location(), OWNER, self.clock)
        return self._pool(Catalog.open(self.catalog_path), state)

    def write(self, pool: Pool, name: str, content: bytes) -> None:
        folder = pool.namespace("s").info.root_node_id
        node = Tree(pool).create_file(folder, name, 0o644, 0, 0)
        handle = pool.files.open_write(node, truncate=True)
        pool.files.write(handle, 0, content)
        pool.files.close_write(handle)

    def read(self, pool: Pool, name: str) -> bytes | None:
        node = pool.catalog.resolve(ROOT_NODE_ID, f"s/{name}")
        if node is None:
            return None
        reader = pool.files.open_read(node)
        content = pool.files.read(reader, 0, node.size_bytes)
        pool.files.close_read(reader)
        return bytes(content)

    def check(self, *, data: bool = False, repair: bool = False, progress=None):
        device, catalog = self.device(), Catalog.open(self.catalog_path)
        try:
            return check_devices([device], catalog, data=data, repair=repair, progress=progress)
        finally:
            device.close()
            catalog.close()

    def codes(self, *, data: bool = False) -> list[tuple[str, str]]:
        return [(f.severity.name, f.code) for f in self.check(data=data).findings]

    # --- places

    def path(self, name: str) -> Path:
        return self.root / "dev" / name

    def segments(self, *, sealed: bool, files: bool = False) -> list[Path]:
        """Return the payload files of segments, or the sidecars of file segments."""
        device = self.device()
        found = []
        for name in device.segments():
            handle = device.attach(name)
            if name.is_file == files and load_segment(device, handle).is_sealed == sealed:
                stem = f"segments/{name.slot:08x}-{name.generation:08x}"
                found.append(self.path(f"{stem}.sum" if files else f"{stem}.seg"))
            device.release(handle)
        device.close()
        return found

    def flip(self, path: Path, offset: int, bit: int = 3) -> None:
        with path.open("r+b") as file:
            file.seek(offset, os.SEEK_SET if offset >= 0 else os.SEEK_END)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ (1 << bit)]))

    def snapshot(self) -> dict[str, bytes]:
        return {
            str(path.relative_to(self.root)): path.read_bytes()
            for path in sorted(self.root.rglob("*"))
            if path.is_file() and path.name not in ("kvfs.lock", "lock")
        }

    def assert_repaired(self, *, data: bool = True) -> None:
        """Repair; then nothing is found any more, and the pool opens without a complaint."""
        report = self.check(data=data, repair=True)
        assert report.is_repaired
        assert report.remaining == []
        assert report.exit_code == 0
        assert self.check(data=data).findings == []
        with self.open() as pool:
            assert pool.recovery.problems == []
            self.assert_right(pool)

    def assert_right(self, pool: Pool) -> int:
        """Whatever is served is right; return how many blocks were."""
        space = pool.namespace("s")
        out = np.zeros_like(self.content)
        hits = space.read_into(self.keys, out)
        assert (out[hits] == self.content[hits]).all()
        for name, content in (("small", self.small), ("large", self.large)):
            assert self.read(pool, name) in (content, None)
        return int(hits.sum())


@contextmanager
def checker_bench() -> Iterator[Bench]:
    """In memory where there is some: every step of a pool waits for the medium."""
    folder = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="kvfs-checker-", dir=folder) as root:
        yield Bench(Path(root))
