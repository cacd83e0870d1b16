"""The checker: each kind of damage is found, named, and repaired; nothing else is touched."""

import os
import tempfile
import uuid
from pathlib import Path

import numpy as np
import pytest

import kvfs
from kvfs import _native
from kvfs.clock import ManualClock
from kvfs.config import PoolOptions
from kvfs.devices.directory import DirectoryDevice
from kvfs.devices.osfs import OSFileSystem
from kvfs.engine import format as fmt
from kvfs.engine.catalog import Catalog
from kvfs.engine.catalog_schema import ROOT_NODE_ID, DeviceRow
from kvfs.engine.checker import ActionKind, Severity, apply_plan, check_devices, check_pool
from kvfs.engine.format import ENTRY, HEADERS_BYTES
from kvfs.engine.log import load_segment
from kvfs.engine.recovery import Owner, claim_device, format_device
from kvfs.errors import BusyError, NotFoundError
from kvfs.layout import Layout
from kvfs.pool import Pool
from kvfs.tree import Tree
from kvfs.units import PAGE

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


@pytest.fixture
def bench():
    """In memory where there is some: every step of a pool waits for the medium."""
    folder = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="kvfs-checker-", dir=folder) as root:
        yield Bench(Path(root))


def sign(entry, generation: int, slot: int) -> bytes:
    _native.sign_entries(entry, fmt.entry_seed(DEVICE_UUID, slot, generation))
    return entry.tobytes()


def names_of(path: Path) -> tuple[int, int]:
    slot, _, generation = path.stem.partition("-")
    return int(slot, 16), int(generation, 16)


# --- sound pools


def test_clean(bench):
    report = bench.check(data=True)
    assert report.is_clean
    assert report.exit_code == 0
    assert report.was_closed
    counts = report.counts
    assert (counts.devices, counts.files) == (1, 2)
    assert counts.blocks == BLOCKS + 3 + 10
    assert counts.verified_blocks == counts.blocks
    assert counts.verified_bytes == BLOCKS * 4096 + SMALL_FILE + LARGE_FILE
    assert counts.sealed_segments >= 3


def test_open_pool(bench):
    with bench.open() as pool:
        devices = [state.device for state in pool.store.state.devices]
        assert check_devices(devices, pool.catalog).is_clean


def test_killed_owner(bench):
    pool = bench.open()
    for state in pool.store.state.devices:
        state.device.close()
    pool.catalog.close()
    for index in pool.store.state.indexes.values():
        index.close()
    report = bench.check(data=True)
    assert not report.was_closed
    assert report.exit_code == 0


def test_nothing_is_modified(bench):
    bench.flip(bench.segments(sealed=True)[0], -1)
    bench.path("staging/left").write_bytes(b"x")
    before = bench.snapshot()
    assert bench.check(data=True).plan
    assert bench.snapshot() == before


def test_progress(bench):
    calls = []
    bench.check(data=True, progress=lambda done, total: calls.append((done, total)))
    assert calls == sorted(calls)
    assert {total for _, total in calls} == {BLOCKS * 4096 + SMALL_FILE + LARGE_FILE}


# --- headers


def test_open_header(bench):
    bench.flip(bench.segments(sealed=True)[0], -100)
    assert ("ERROR", "segment-header-damaged") in bench.codes()
    assert bench.check().exit_code == 14
    bench.assert_repaired()


def test_open_header_lost(bench):
    path = bench.segments(sealed=True)[0]
    os.truncate(path, SEGMENT_BYTES - PAGE)
    os.truncate(path, SEGMENT_BYTES)
    assert ("ERROR", "segment-header-damaged") in bench.codes()
    bench.assert_repaired()


def test_seal_header(bench):
    bench.flip(bench.segments(sealed=True)[0], -PAGE - 100)
    assert bench.codes() == [("WARNING", "seal-damaged")]
    assert bench.check().exit_code == 3
    bench.assert_repaired()
    with bench.open() as pool:
        assert bench.assert_right(pool) == BLOCKS
        assert bench.read(pool, "small") == bench.small


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"pool_uuid": uuid.UUID(int=99)}, "segment-foreign"),
        ({"device_uuid": uuid.UUID(int=99)}, "segment-foreign"),
        ({"segment_kind": fmt.SegmentKind.FILE}, "segment-foreign"),
        ({"segment_bytes": 2 * SEGMENT_BYTES}, "segment-truncated"),
        ({"layout_digest": bytes(16)}, "segment-layout-mismatch"),
        ({"slot": 31}, "segment-header-damaged"),
    ],
)
def test_header_that_disagrees(bench, change, code):
    import dataclasses

    path = bench.segments(sealed=True)[0]
    raw = path.read_bytes()
    header = fmt.decode_header(raw[-PAGE:], fmt.HeaderKind.OPEN, "here")
    forged = fmt.encode_header(dataclasses.replace(header, **change))
    path.write_bytes(raw[:-PAGE] + forged)
    assert ("ERROR", code) in bench.codes()
    bench.assert_repaired()


def test_truncated_segment(bench):
    os.truncate(bench.segments(sealed=True)[0], SEGMENT_BYTES // 2)
    assert bench.check().exit_code == 14
    bench.assert_repaired()


def test_segment_of_another_slot(bench):
    path = bench.segments(sealed=True)[0]
    path.rename(path.with_name("0000001e-00000fff.seg"))
    assert ("ERROR", "segment-header-damaged") in bench.codes()
    bench.assert_repaired()


def test_copied_segment(bench):
    path = bench.segments(sealed=True)[0]
    slot, _ = names_of(path)
    path.with_name(f"{slot:08x}-00000fff.seg").write_bytes(path.read_bytes())
    assert ("ERROR", "segment-header-damaged") in bench.codes()
    bench.assert_repaired()


def test_other_format_version_is_left_alone(bench):
    path = bench.segments(sealed=True)[0]
    raw = bytearray(path.read_bytes()[-PAGE:])
    raw[8:12] = (9).to_bytes(4, "little")
    raw[-8:] = _native.xxh3_64(bytes(raw[:-8])).to_bytes(8, "little")
    path.write_bytes(path.read_bytes()[:-PAGE] + raw)
    report = bench.check()
    assert [f.code for f in report.findings if f.code == "format-version"]
    assert not [a for a in report.plan if a.slot == names_of(path)[0] and a.device_index == 0]


def test_never_started(bench):
    bench.path("segments/0000001e-00000001.seg").write_bytes(bytes(SEGMENT_BYTES))
    bench.path("segments/0000001d-00000001.seg").write_bytes(b"")
    assert bench.codes() == [("NOTE", "segment-never-started")] * 2
    assert bench.check().exit_code == 0
    bench.assert_repaired()


# --- entries


@pytest.mark.parametrize("sealed", [True, False])
def test_damaged_entry(bench, sealed):
    path = bench.segments(sealed=sealed)[0]
    bench.flip(path, -fmt.entry_position(1) + 40)
    codes = bench.codes()
    assert ("ERROR", "entry-damaged") in codes
    assert (("WARNING", "seal-damaged") in codes) == sealed
    bench.assert_repaired()
    with bench.open() as pool:
        assert bench.assert_right(pool) >= BLOCKS - 1


def test_last_entry_of_an_open_segment(bench):
    path = bench.segments(sealed=False)[0]
    raw = path.read_bytes()
    count = 0
    while any(raw[-fmt.entry_position(count) :][: fmt.ENTRY_BYTES]):
        count += 1
    bench.flip(path, -fmt.entry_position(count - 1) + 8)
    assert bench.codes()[0] == ("ERROR", "entry-damaged")
    bench.assert_repaired()


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"offset": SEGMENT_BYTES - HEADERS_BYTES}, "entry-out-of-bounds"),
        ({"offset": 2**64 - PAGE}, "entry-out-of-bounds"),
        ({"offset": 13 * PAGE + 8}, "entry-misaligned"),
        ({"stored_bytes": 0}, "entry-size"),
        ({"stored_bytes": 8192, "logical_bytes": 8192}, "entry-size"),
        ({"logical_bytes": 4000}, "entry-size"),
        ({"stored_bytes": 2**64 - 1}, "entry-out-of-bounds"),
        ({"codec": 7}, "entry-codec"),
        ({"key": np.full(32, 255, np.uint8)}, "entry-foreign"),
        ({"offset": 0}, "entry-overlap"),
    ],
)
def test_forged_entry(bench, change, code):
    """Entries whose checksum holds, but which no kvfs would write."""
    path = bench.segments(sealed=False)[0]
    slot, generation = names_of(path)
    raw = bytearray(path.read_bytes())
    start = len(raw) - fmt.entry_position(1)
    entry = np.frombuffer(bytes(raw[start : start + fmt.ENTRY_BYTES]), ENTRY).copy()
    for name, value in change.items():
        entry[name] = value
    raw[start : start + fmt.ENTRY_BYTES] = sign(entry, generation, slot)
    path.write_bytes(raw)
    assert ("ERROR", code) in bench.codes(data=True)
    bench.assert_repaired()


def test_entry_of_a_former_life_is_not_valid(bench):
    path = bench.segments(sealed=False)[0]
    slot, generation = names_of(path)
    raw = bytearray(path.read_bytes())
    start = len(raw) - fmt.entry_position(1)
    entry = np.frombuffer(bytes(raw[start : start + fmt.ENTRY_BYTES]), ENTRY).copy()
    raw[start : start + fmt.ENTRY_BYTES] = sign(entry, generation - 1, slot)
    path.write_bytes(raw)
    assert ("ERROR", "entry-damaged") in bench.codes()
    bench.assert_repaired()


# --- payloads


def test_payload_of_a_sealed_segment(bench):
    bench.flip(bench.segments(sealed=True)[0], 2 * PAGE + 17)
    assert bench.codes() == []
    assert bench.codes(data=True) == [("ERROR", "payload-corrupt")]
    bench.assert_repaired()
    with bench.open() as pool:
        assert bench.assert_right(pool) == BLOCKS - 1


def test_payload_of_an_open_segment(bench):
    bench.flip(bench.segments(sealed=False)[0], 17)
    codes = bench.codes(data=True)
    assert codes[0] == ("WARNING", "payload-corrupt")
    bench.assert_repaired()


def test_payload_of_a_file_segment(bench):
    bench.flip(bench.segments(sealed=True, files=True)[0].with_suffix(".file"), 20_000)
    codes = bench.codes(data=True)
    assert codes == [("ERROR", "payload-corrupt"), ("WARNING", "file-not-whole")]
    bench.assert_repaired()
    with bench.open() as pool:
        assert bench.read(pool, "large") is None
        assert bench.read(pool, "small") == bench.small


# --- file segments and names


@pytest.mark.parametrize("place", [-100, -PAGE - 100, -fmt.entry_position(2) + 5])
def test_sidecar(bench, place):
    bench.flip(bench.segments(sealed=True, files=True)[0], place)
    report = bench.check()
    assert report.exit_code == 14
    assert "file-not-whole" in [finding.code for finding in report.findings]
    bench.assert_repaired()
    with bench.open() as pool:
        assert bench.read(pool, "large") is None


def test_sidecar_missing(bench):
    bench.segments(sealed=True, files=True)[0].unlink()
    assert ("NOTE", "segment-never-started") in bench.codes()
    bench.assert_repaired()


def test_payload_file_missing(bench):
    bench.segments(sealed=True, files=True)[0].with_suffix(".file").unlink()
    codes = bench.codes()
    assert ("NOTE", "staging-leftover") in codes
    assert ("WARNING", "file-not-whole") in codes
    bench.assert_repaired()


def test_payload_file_truncated(bench):
    os.truncate(bench.segments(sealed=True, files=True)[0].with_suffix(".file"), 30_000)
    assert ("ERROR", "segment-truncated") in bench.codes()
    bench.assert_repaired()


def test_unnamed_file_segment(bench):
    catalog = Catalog.open(bench.catalog_path)
    catalog.remove_nodes([catalog.resolve(ROOT_NODE_ID, "s/large").node_id])
    catalog.close()
    assert bench.codes() == [("NOTE", "file-segment-unnamed")]
    bench.assert_repaired()
    assert not list(bench.path("segments").glob("*.file"))


def test_namespace_that_is_gone(bench):
    catalog = Catalog.open(bench.catalog_path)
    catalog.drop_namespace(catalog.namespace_by_name("s").namespace_id)
    catalog.close()
    assert set(bench.codes()) == {("NOTE", "segment-namespace-unknown")}


def test_catalog_that_contradicts_itself(bench):
    import sqlite3

    with sqlite3.connect(bench.catalog_path) as connection:
        connection.execute("UPDATE nodes SET parent_id = 4711 WHERE name = x'6c61726765'")
    connection.close()
    report = bench.check()
    assert ("ERROR", "catalog") in [(f.severity.name, f.code) for f in report.findings]
    assert report.exit_code == 14


# --- superblock


def test_superblock_damaged(bench):
    bench.flip(bench.path("kvfs.superblock"), 100)
    assert bench.codes() == [("ERROR", "superblock-damaged")]
    bench.assert_repaired()
    with bench.open() as pool:
        assert bench.assert_right(pool) == BLOCKS
        assert bench.read(pool, "large") == bench.large


def test_superblock_table_damaged(bench):
    bench.flip(bench.path("kvfs.superblock"), PAGE + 20)
    assert bench.codes() == [("ERROR", "superblock-damaged")]
    bench.assert_repaired()


def test_superblock_missing(bench):
    bench.path("kvfs.superblock").unlink()
    assert bench.codes() == [("ERROR", "superblock-missing")]
    bench.assert_repaired()


def test_empty_directory_is_not_made_a_device(bench):
    """A filesystem that is not mounted must not be taken for a device that lost its superblock."""
    for path in [*bench.path("segments").iterdir(), bench.path("kvfs.superblock")]:
        path.unlink()
    report = bench.check(repair=True)
    assert [f.code for f in report.remaining] == ["superblock-missing"]
    assert "mount" in report.remaining[0].remedy
    assert not bench.path("kvfs.superblock").exists()


def superblock(bench, **changes):
    import dataclasses

    path = bench.path("kvfs.superblock")
    found = fmt.decode_superblock(path.read_bytes(), "here")
    path.write_bytes(fmt.encode_superblock(dataclasses.replace(found, **changes)))


def test_superblock_of_another_pool(bench):
    superblock(bench, pool_uuid=uuid.UUID(int=1))
    report = bench.check(repair=True)
    assert (report.findings[0].severity.name, report.findings[0].code) == (
        "ERROR",
        "superblock-foreign",
    )
    assert bench.check().exit_code == 14


def test_superblock_with_other_geometry(bench):
    superblock(bench, capacity_bytes=64 * SEGMENT_BYTES)
    assert bench.codes() == [("WARNING", "superblock-mismatch")]
    bench.assert_repaired()


def test_superblock_older_than_segments(bench):
    superblock(bench, generation_limit=2)
    codes = set(bench.codes())
    assert codes == {("ERROR", "generation-beyond-limit")}
    bench.assert_repaired()
    limit = fmt.decode_superblock(bench.path("kvfs.superblock").read_bytes(), "").generation_limit
    assert limit > 1 << 20


def test_device_that_was_moved(bench):
    superblock(bench, location=1)
    assert bench.codes() == [("WARNING", "device-moved")]


# --- the tree


def test_leftovers(bench):
    bench.path("staging/left").write_bytes(b"x")
    bench.path("segments/0000001e-00000001.sum").write_bytes(b"x")
    assert bench.codes() == [("NOTE", "staging-leftover")]
    bench.assert_repaired()
    assert not list(bench.path("staging").iterdir())


def test_unknown_files_are_never_touched(bench):
    bench.path("notes.txt").write_bytes(b"mine")
    bench.path("segments/README").write_bytes(b"mine")
    bench.path("segments/00ffffff-00000001.seg").write_bytes(b"")
    found = bench.check(repair=True)
    assert sorted(f.code for f in found.findings) == [
        "segment-out-of-range", "unknown-file", "unknown-file",
    ]  # fmt: skip
    assert found.exit_code == 3
    assert bench.path("notes.txt").read_bytes() == b"mine"


def test_over_capacity(bench):
    for number in range(40):
        path = bench.path(f"segments/{number + 20:08x}-00000001.seg")
        path.write_bytes(b"")
        os.truncate(path, SEGMENT_BYTES)
    assert ("WARNING", "device-over-capacity") in bench.codes()


def test_plan_is_what_is_applied(bench):
    bench.flip(bench.segments(sealed=True)[0], -100)
    device, catalog = bench.device(), Catalog.open(bench.catalog_path)
    report = check_devices([device], catalog)
    kinds = {action.kind for action in report.plan}
    assert ActionKind.FREE_SEGMENT in kinds
    assert all(str(action) for action in report.plan)
    apply_plan(report, [device], catalog)
    assert report.remaining == []
    device.close()
    catalog.close()


def test_findings_say_where_and_what_to_do(bench):
    bench.flip(bench.segments(sealed=True)[0], -100)
    finding = bench.check().findings[0]
    assert "dir0 segment" in finding.where
    assert "expected" in finding.message
    assert "kvfs-admin check --repair" in finding.remedy
    assert finding.is_repairable
    assert str(finding).startswith("error: ")


def test_worst_of_nothing(bench):
    report = bench.check()
    assert report.worst is None
    report.add(Severity.NOTE, "x", "y", "z", "w")
    assert report.exit_code == 0


# --- a pool by its path


@pytest.fixture
def pool_path(tmp_path):
    path = tmp_path / "real"
    kvfs.create_pool(path, [f"dir:{tmp_path}/device?size=64MiB&segment=16MiB"]).close()
    return path


def test_check_pool(pool_path, tmp_path):
    before = (pool_path / "catalog.sqlite").read_bytes()
    report = check_pool(pool_path, data=True)
    assert report.is_clean
    assert report.counts.devices == 1
    assert (pool_path / "catalog.sqlite").read_bytes() == before


def test_check_pool_not_found(tmp_path):
    with pytest.raises(NotFoundError, match="no pool"):
        check_pool(tmp_path)


def test_check_pool_in_use(pool_path):
    with kvfs.open_pool(pool_path), pytest.raises(BusyError, match="in use"):
        check_pool(pool_path)


def test_check_pool_without_its_device(pool_path, tmp_path):
    (tmp_path / "device").rename(tmp_path / "elsewhere")
    for is_repair in (False, True):
        report = check_pool(pool_path, repair=is_repair)
        assert [f.code for f in report.findings] == ["device-missing"]
        assert report.exit_code == 14
    assert not (tmp_path / "device").exists()


def test_check_pool_with_a_damaged_catalog(pool_path):
    catalog = pool_path / "catalog.sqlite"
    catalog.write_bytes(b"this is no database" * 1000)
    report = check_pool(pool_path)
    assert [f.code for f in report.findings] == ["catalog-damaged"]
    assert report.exit_code == 14


def test_repair_needs_consent(pool_path, tmp_path):
    left = tmp_path / "device" / "staging" / "left"
    left.write_bytes(b"x")
    report = check_pool(pool_path, repair=True, confirm=lambda report: False)
    assert left.exists()
    assert not report.is_repaired
    assert check_pool(pool_path, repair=True, confirm=lambda report: True).is_repaired
    assert not left.exists()
    assert check_pool(pool_path).is_clean
