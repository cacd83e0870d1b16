"""Where the bytes of a file lie while it is written, and what that costs."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import kvfs
from kvfs.config import PoolOptions
from kvfs.engine.catalog_schema import Node
from kvfs.engine.checker import check_pool
from kvfs.errors import DeviceError, NoSpaceError, UsageError
from kvfs.file_writing import FALLOC_KEEP_SIZE, UnsupportedError
from kvfs.files import WriteHandle
from kvfs.pool import Pool
from kvfs.staging import MemoryBudget, data_ranges, is_mostly_written
from kvfs.tree import Tree
from kvfs.units import KIB, MIB, PAGE
from tests.unit.small_pools import NEVER_MS, small_pool

QUARTER = 4 * MIB  # of a segment of small_pool


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    with small_pool(tmp_path, size="128MiB") as made:
        yield made
        assert made.files.staging.budget.used_bytes == 0, "memory was not given back"


def open_new(pool: Pool, name: str = "f") -> tuple[Node, WriteHandle]:
    node = Tree(pool).create_file(1, name, 0o644, 0, 0)
    return node, pool.files.open_write(node, truncate=True)


def content_of(pool: Pool, node: Node) -> bytes:
    reader = pool.files.open_read(node)
    try:
        return bytes(pool.files.read(reader, 0, 1 << 30))
    finally:
        pool.files.close_read(reader)


def used(pool: Pool) -> int:
    return pool.store.state.devices[0].device.used_bytes


def memory(pool: Pool) -> int:
    return pool.files.staging.budget.used_bytes


def test_a_small_file_is_staged_in_memory(pool: Pool) -> None:
    node, handle = open_new(pool)
    pool.files.write(handle, 0, b"x" * QUARTER)
    assert (used(pool), memory(pool)) == (0, QUARTER)
    assert pool.files.read_staged(handle, QUARTER - 2, 9) == b"xx"
    pool.files.truncate(handle, 5000)
    assert memory(pool) == 2 * PAGE
    pool.files.write(handle, 5000, b"tail")
    pool.files.close_write(handle)
    assert memory(pool) == 0
    assert content_of(pool, node) == b"x" * 5000 + b"tail"


def test_a_file_that_grows_moves_to_its_device_once(pool: Pool) -> None:
    node, handle = open_new(pool)
    pool.files.write(handle, 0, b"a" * QUARTER)
    pool.files.write(handle, QUARTER, b"b")
    assert (used(pool), memory(pool)) == (QUARTER + PAGE, 0)
    pool.files.truncate(handle, 10)
    pool.files.write(handle, 10, b"c")
    assert memory(pool) == 0, "it never moves back"
    pool.files.close_write(handle)
    assert content_of(pool, node) == b"a" * 10 + b"c"


def test_holes_stay_holes_when_a_file_moves(pool: Pool) -> None:
    node, handle = open_new(pool)
    pool.files.write(handle, MIB + 100, b"data")
    pool.files.truncate(handle, 3 * MIB)
    pool.files.fsync(handle)
    staged = handle.writer.staged
    assert staged is not None
    assert not staged.in_memory
    assert list(data_ranges(staged.file.fd)) == [(MIB, MIB + PAGE)]
    assert staged.size_bytes == 3 * MIB
    pool.files.write(handle, 0, bytes(3 * MIB))
    pool.files.close_write(handle)
    assert content_of(pool, node) == bytes(3 * MIB)


def test_fsync_makes_the_bytes_durable_and_adopts_nothing(pool: Pool, tmp_path: Path) -> None:
    _, handle = open_new(pool)
    pool.files.write(handle, 0, b"synced")
    pool.files.fsync(handle)
    [staging] = (tmp_path / "device/staging").iterdir()
    assert staging.read_bytes() == b"synced"
    assert memory(pool) == 0
    assert not pool.files.has_unpublished
    pool.files.close_write(handle)
    pool.sync()
    assert not list((tmp_path / "device/staging").iterdir())


def test_a_crash_before_adoption_leaves_nothing(tmp_path: Path) -> None:
    """A killed owner: its catalog and devices are opened again as they lie there."""
    with small_pool(tmp_path) as pool:
        for name, is_synced in (("memory", False), ("device", True)):
            _, handle = open_new(pool, name)
            pool.files.write(handle, 0, b"x" * 100_000)
            if is_synced:
                pool.files.fsync(handle)
        for name in ("pool", "device"):
            shutil.copytree(tmp_path / name, tmp_path / "dead" / name)
        pool.close()
    for name in ("pool", "device"):
        shutil.rmtree(tmp_path / name)
        (tmp_path / "dead" / name).rename(tmp_path / name)
    with kvfs.open_pool(tmp_path / "pool", allow_moved=True) as pool:
        assert Tree(pool).children(1, "")[0].is_directory
        assert [node.name for node in Tree(pool).children(1, "")] == ["default"]
    report = check_pool(tmp_path / "pool", data=True)
    assert [str(f) for f in report.findings] == []
    assert not list((tmp_path / "device/staging").iterdir())


def test_without_memory_a_file_is_staged_on_its_device(tmp_path: Path) -> None:
    options = PoolOptions(async_delay_ms=NEVER_MS, staging_memory_bytes=MIB)
    url = f"dir:{tmp_path}/device?size=64MiB&segment=16MiB"
    with kvfs.create_pool(tmp_path / "pool", [url], options=options) as pool:
        one, first = open_new(pool, "one")
        two, second = open_new(pool, "two")
        pool.files.write(first, 0, b"1" * (700 * KIB))
        pool.files.write(second, 0, b"2" * (300 * KIB))
        assert (used(pool), memory(pool)) == (0, 1000 * KIB)
        pool.files.write(second, 300 * KIB, b"2" * (100 * KIB))
        assert (used(pool), memory(pool)) == (400 * KIB, 700 * KIB)
        for handle in (first, second):
            pool.files.close_write(handle)
        assert memory(pool) == 0
        assert content_of(pool, one) == b"1" * (700 * KIB)
        assert content_of(pool, two) == b"2" * (400 * KIB)


@pytest.mark.parametrize("memory_bytes", [0, MIB])
def test_options_have_a_budget(memory_bytes: int) -> None:
    assert PoolOptions(staging_memory_bytes=memory_bytes).staging_memory_bytes == memory_bytes
    with pytest.raises(UsageError):
        PoolOptions(staging_memory_bytes=-1)


def test_a_budget_is_never_exceeded_by_taking() -> None:
    budget = MemoryBudget(10)
    assert budget.take(10)
    assert not budget.take(1)
    budget.change(10, 4)
    assert budget.take(6)
    budget.change(10, 0)
    assert budget.used_bytes == 0


def test_small_files_are_written_once_and_make_no_files(tmp_path: Path) -> None:
    """Bytes handed to the medium per byte stored, and files in the device's directory."""
    count, nbytes = 40, QUARTER
    with small_pool(tmp_path, size="512MiB") as pool:
        device = pool.store.state.devices[0].device
        before = device.bytes_written
        for number in range(count):
            _, handle = open_new(pool, f"f{number}")
            for start in range(0, nbytes, MIB):
                pool.files.write(handle, start, number.to_bytes(1, "little") * MIB)
            pool.files.flush(handle)
            pool.files.close_write(handle)
        pool.sync()
        assert (device.bytes_written - before) / (count * nbytes) <= 1.05
        segments = pool.statistics().devices[0].segment_count
        files = [path for path in (tmp_path / "device").rglob("*") if path.is_file()]
        assert len(files) <= segments + 10
        assert segments <= count * nbytes // (14 * MIB) + 2


def test_a_full_pool_fails_the_write_that_does_not_fit(tmp_path: Path) -> None:
    with small_pool(tmp_path, size="64MiB") as pool:
        node, handle = open_new(pool)
        for start in range(0, 48 * MIB, MIB):  # all but the segment that is kept back
            pool.files.write(handle, start, b"x" * MIB)
        with pytest.raises(NoSpaceError):
            pool.files.write(handle, 48 * MIB, b"x")
        with pytest.raises(NoSpaceError):
            pool.files.flush(handle)
        pool.files.close_write(handle)
        assert Tree(pool).lookup(1, "f") is None
        assert node.node_id not in pool.files._writers


# --- fallocate


def test_fallocate_extends_as_truncate_does(pool: Pool) -> None:
    node, handle = open_new(pool)
    pool.files.write(handle, 0, b"head")
    pool.files.fallocate(handle, 0, 2, 10)
    assert handle.writer.size_bytes == 12
    pool.files.fallocate(handle, 0, 0, 5)
    assert handle.writer.size_bytes == 12
    pool.files.close_write(handle)
    assert content_of(pool, node) == b"head" + bytes(8)


def test_fallocate_that_keeps_the_size_reserves_room(pool: Pool) -> None:
    node, handle = open_new(pool)
    pool.files.fallocate(handle, FALLOC_KEEP_SIZE, 0, 20 * MIB)
    assert (handle.writer.size_bytes, used(pool)) == (0, 20 * MIB)
    pool.files.write(handle, 0, b"x" * MIB)
    pool.files.fallocate(handle, FALLOC_KEEP_SIZE, 0, 10 * MIB)
    pool.files.truncate(handle, 100)
    assert (handle.writer.size_bytes, used(pool)) == (100, 20 * MIB)
    pool.files.close_write(handle)
    assert used(pool) == 16 * MIB  # one segment of the log
    assert content_of(pool, node) == b"x" * 100


@pytest.mark.parametrize("mode", [0, FALLOC_KEEP_SIZE])
@pytest.mark.parametrize("is_raw", [False, True])
def test_fallocate_that_changes_no_byte_changes_the_time(
    pool: Pool, mode: int, is_raw: bool
) -> None:
    tree = Tree(pool)
    node, handle = open_new(pool)
    if is_raw:
        tree.set_attribute(node, b"user.kvfs.raw", b"1")
    pool.files.write(handle, 0, b"x" * 100)
    pool.files.close_write(handle)
    for is_published in (False, True):
        tree.set_attributes(node.node_id, mtime_ns=5)
        handle = pool.files.open_write(tree.node(node.node_id), truncate=False)
        assert tree.node(node.node_id).mtime_ns == 5
        pool.files.fallocate(handle, mode, 10, 20)
        shown_ns = tree.node(node.node_id).mtime_ns
        assert shown_ns > 5
        if is_published:
            pool.sync()
        pool.files.close_write(handle)
        pool.sync()
        assert tree.node(node.node_id).mtime_ns == shown_ns
        assert pool.catalog.node(node.node_id).mtime_ns == shown_ns
    assert content_of(pool, node) == b"x" * 100


def test_fallocate_of_a_removed_file(pool: Pool) -> None:
    node, handle = open_new(pool)
    pool.files.write(handle, 0, b"x")
    pool.files.flush(handle)
    Tree(pool).remove_file(1, "f")
    pool.files.fallocate(handle, 0, 0, 1)
    pool.files.close_write(handle)
    assert node.node_id not in pool.files._writers


def test_small_reservations_are_of_memory(pool: Pool) -> None:
    node, handle = open_new(pool)
    pool.files.fallocate(handle, FALLOC_KEEP_SIZE, 0, MIB)
    assert (used(pool), memory(pool)) == (0, MIB)
    pool.files.write(handle, 0, b"x")
    assert memory(pool) == MIB
    pool.files.fsync(handle)
    assert (used(pool), memory(pool)) == (MIB, 0)
    pool.files.close_write(handle)
    assert content_of(pool, node) == b"x"


def test_fallocate_beyond_the_pool_is_refused(pool: Pool) -> None:
    _, handle = open_new(pool)
    for mode in (0, FALLOC_KEEP_SIZE):
        with pytest.raises(NoSpaceError):
            pool.files.fallocate(handle, mode, 0, 1 << 40)
    for mode in (2, 3, 8):
        with pytest.raises(UnsupportedError):
            pool.files.fallocate(handle, mode, 0, 10)
    pool.files.close_write(handle)


# --- adoption in place


@pytest.mark.parametrize("writes_meanwhile", [False, True])
def test_a_file_that_somebody_can_write_is_copied(
    pool: Pool, tmp_path: Path, writes_meanwhile: bool
) -> None:
    node, handle = open_new(pool)
    pool.files.write(handle, 0, b"x" * (5 * MIB))
    staged = handle.writer.staged
    assert staged is not None
    unknown = os.dup(staged.file.fd)
    inode = os.fstat(unknown).st_ino
    pool.files.close_write(handle)
    [segment] = (tmp_path / "device/segments").glob("*.file")
    assert segment.stat().st_ino != inode
    if writes_meanwhile:
        os.pwrite(unknown, b"tampered", 0)
    os.close(unknown)
    assert content_of(pool, node) == b"x" * (5 * MIB)
    assert not list((tmp_path / "device/staging").iterdir())


def test_a_file_that_nobody_can_write_is_adopted_in_place(pool: Pool, tmp_path: Path) -> None:
    _, handle = open_new(pool)
    pool.files.write(handle, 0, b"x" * (5 * MIB))
    staged = handle.writer.staged
    assert staged is not None
    inode = os.fstat(staged.file.fd).st_ino
    pool.files.close_write(handle)
    [segment] = (tmp_path / "device/segments").glob("*.file")
    assert segment.stat().st_ino == inode


def test_a_seal_that_cannot_be_had_fails_the_close(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, handle = open_new(pool)
    pool.files.write(handle, 0, b"x" * (5 * MIB))
    monkeypatch.setattr(pool.files.staging, "seal", lambda staged: False)
    with pytest.raises(DeviceError, match="somebody unknown"):
        pool.files.close_write(handle)
    monkeypatch.undo()
    assert Tree(pool).lookup(1, "f") is None
    assert used(pool) == 0


def test_how_much_was_written_is_seen_from_holes() -> None:
    fd = os.memfd_create("holes")
    os.ftruncate(fd, 10 * PAGE)
    assert not is_mostly_written(fd, 10 * PAGE)
    for page in range(5):
        assert not is_mostly_written(fd, 10 * PAGE)
        os.pwrite(fd, b"x", 2 * page * PAGE)
    assert is_mostly_written(fd, 10 * PAGE)
    os.close(fd)
