"""Raw files: what becomes one, how they are written, and what goes with them."""

import mmap
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import kvfs
from kvfs.engine.catalog_schema import Node, NodeKind, NodeState
from kvfs.engine.checker import ActionKind, check_pool
from kvfs.errors import (
    BusyError,
    ClosedError,
    DeviceError,
    MediaError,
    NoSpaceError,
    NotFoundError,
    RefusedError,
    UsageError,
)
from kvfs.file_adoption import RAW_BYTES_MIN
from kvfs.files import WriteHandle
from kvfs.pool import Pool
from kvfs.tree import Tree
from kvfs.units import MIB
from tests.unit.small_pools import payloads, small_namespace, small_pool

RAW = b"user.kvfs.raw"


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    with small_pool(tmp_path, size="128MiB") as made:
        yield made
        assert made.files.staging.budget.used_bytes == 0


def open_new(pool: Pool, name: str = "f", parent: int = 1) -> tuple[Node, WriteHandle]:
    node = Tree(pool).create_file(parent, name, 0o644, 0, 0)
    return node, pool.files.open_write(node, truncate=True)


def make_raw(pool: Pool, name: str = "f", nbytes: int = 8 * MIB) -> Node:
    """Make a raw file as `truncate -s` does."""
    node, handle = open_new(pool, name)
    pool.files.truncate(handle, nbytes)
    pool.files.flush(handle)
    pool.files.close_write(handle)
    node = Tree(pool).node(node.node_id)
    assert node.is_raw
    return node


def write_at(pool: Pool, node: Node, offset: int, data: bytes) -> None:
    handle = pool.files.open_write(node, truncate=False)
    pool.files.write(handle, offset, data)
    pool.files.flush(handle)
    pool.files.close_write(handle)


def content_of(pool: Pool, node: Node, offset: int = 0, nbytes: int = 1 << 30) -> bytes:
    reader = pool.files.open_read(node)
    try:
        return bytes(pool.files.read(reader, offset, nbytes))
    finally:
        pool.files.close_read(reader)


def used(pool: Pool) -> int:
    return pool.store.state.devices[0].device.used_bytes


def raw_paths(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "device/raw").iterdir())


# --- what becomes raw


@pytest.mark.parametrize("grow", ["truncate", "fallocate"])
@pytest.mark.parametrize(("nbytes", "written", "is_raw"), [
    (8 * MIB, 0, True), (8 * MIB, 4 * MIB - 4096, True), (8 * MIB, 4 * MIB, False),
    (2 * MIB, 100, True), (RAW_BYTES_MIN - 1, 0, False),
])  # fmt: skip
def test_a_file_larger_than_what_was_written_becomes_raw(
    pool: Pool, grow: str, nbytes: int, written: int, is_raw: bool
) -> None:
    node, handle = open_new(pool)
    if grow == "truncate":
        pool.files.truncate(handle, nbytes)
    else:
        pool.files.fallocate(handle, 0, 0, nbytes)
    pool.files.write(handle, 0, b"x" * written)
    pool.files.close_write(handle)
    found = Tree(pool).node(node.node_id)
    assert (found.is_raw, found.size_bytes) == (is_raw, nbytes)
    assert found.kind is (NodeKind.RAW if is_raw else NodeKind.CONTEXT)
    assert content_of(pool, node) == b"x" * written + bytes(nbytes - written)
    assert pool.catalog.check() == []


def test_a_file_with_a_hole_in_what_was_written_stays_a_file(pool: Pool) -> None:
    node, handle = open_new(pool)
    pool.files.write(handle, 20 * MIB, b"end")
    pool.files.close_write(handle)
    assert not Tree(pool).node(node.node_id).is_raw


def test_cutting_to_nothing_begins_anew(pool: Pool) -> None:
    node, handle = open_new(pool)
    pool.files.truncate(handle, 8 * MIB)
    pool.files.truncate(handle, 0)
    pool.files.write(handle, 3 * MIB, b"end")
    pool.files.close_write(handle)
    assert not Tree(pool).node(node.node_id).is_raw


def test_a_file_that_is_extended_later_becomes_raw(pool: Pool, tmp_path: Path) -> None:
    for name, nbytes in (("small", MIB), ("large", 10 * MIB)):
        node, handle = open_new(pool, name)
        pool.files.write(handle, 0, b"x" * nbytes)
        pool.files.close_write(handle)
        pool.sync()
        reader = pool.files.open_read(node)
        before = pool.files.read(reader, 0, 1 << 30)
        pool.files.truncate_node(node, 4 * nbytes)
        assert Tree(pool).node(node.node_id).is_raw
        assert pool.files.is_outdated(reader)
        assert pool.files.read(reader, 0, 1 << 30) == before
        keys = reader.keys
        pool.files.close_read(reader)
        assert pool.store.match_prefix(node.namespace_id, keys) == 0
        assert content_of(pool, node) == b"x" * nbytes + bytes(3 * nbytes)
    assert len(raw_paths(tmp_path)) == 2


def test_what_is_not_published_yet_becomes_raw(pool: Pool) -> None:
    node, handle = open_new(pool)
    pool.files.write(handle, 0, b"x" * MIB)
    pool.files.flush(handle)
    assert pool.files.has_unpublished
    pool.files.truncate(handle, 9 * MIB)
    pool.files.close_write(handle)
    assert not pool.files.has_unpublished
    pool.sync()
    assert Tree(pool).node(node.node_id).is_raw
    assert content_of(pool, node) == b"x" * MIB + bytes(8 * MIB)


def test_files_made_in_a_marked_directory_are_raw(pool: Pool) -> None:
    tree = Tree(pool)
    outer = tree.make_directory(1, "space", 0o755, 0, 0)
    tree.set_attribute(outer, RAW, b"1")
    inner = tree.make_directory(outer.node_id, "inner", 0o755, 0, 0)
    for name, content in (("empty", b""), ("small", b"x"), ("large", b"y" * (5 * MIB))):
        node, handle = open_new(pool, name, inner.node_id)
        if content:
            pool.files.write(handle, 0, content)
        pool.files.close_write(handle)
        assert tree.node(node.node_id).is_raw
        assert content_of(pool, node) == content
    tree.remove_attribute(inner, RAW)
    node, handle = open_new(pool, "later", inner.node_id)
    pool.files.close_write(handle)
    assert not tree.node(node.node_id).is_raw


@pytest.mark.parametrize("nbytes", [0, 100, 5 * MIB])
@pytest.mark.parametrize("is_open", [False, True])
def test_a_marked_file_becomes_raw(pool: Pool, nbytes: int, is_open: bool) -> None:
    tree = Tree(pool)
    node, handle = open_new(pool)
    pool.files.write(handle, 0, b"z" * nbytes)
    if is_open:
        tree.set_attribute(node, RAW, b"1")
        assert not tree.node(node.node_id).is_raw
        pool.files.close_write(handle)
    else:
        pool.files.close_write(handle)
        pool.sync()
        tree.set_attribute(tree.node(node.node_id), RAW, b"1")
    node = tree.node(node.node_id)
    assert (node.is_raw, node.size_bytes) == (True, nbytes)
    assert content_of(pool, node) == b"z" * nbytes
    assert tree.attribute(node, RAW) == b"1"
    tree.set_attribute(node, RAW, b"1")  # again
    with pytest.raises(RefusedError, match="stays raw"):
        tree.remove_attribute(node, RAW)


@pytest.mark.parametrize("is_busy", [False, True])
def test_a_marked_file_that_is_being_written_becomes_raw_at_its_close(
    pool: Pool, is_busy: bool
) -> None:
    node, handle = open_new(pool)
    pool.files.write(handle, 0, b"content")
    pool.files.close_write(handle)
    handle = pool.files.open_write(node, truncate=False)
    if is_busy:
        pool.files.write(handle, 0, b"c")
    Tree(pool).set_attribute(node, RAW, b"1")
    assert Tree(pool).node(node.node_id).is_raw is not is_busy
    pool.files.close_write(handle)
    assert Tree(pool).node(node.node_id).is_raw
    assert content_of(pool, node) == b"content"


def test_marks_that_make_no_sense(pool: Pool) -> None:
    tree, space = Tree(pool), small_namespace(pool)
    context = space.context("c")
    with pytest.raises(RefusedError):
        tree.set_attribute(context.node, RAW, b"1")
    node = make_raw(pool)
    assert tree.attribute_names(node) == [RAW]
    for value in (b"0", b"", b"true"):
        with pytest.raises(UsageError):
            tree.set_attribute(node, RAW, value)
    for name in (b"user.kvfs.tokens", b"user.kvfs.anything"):
        with pytest.raises(RefusedError, match="kvfs's own"):
            tree.set_attribute(node, name, b"1")
    tree.set_attribute(node, b"user.mine", b"1")
    assert tree.attribute_names(node) == [b"user.mine", RAW]
    tree.remove_attribute(node, b"user.mine")


def test_there_is_no_raw_file_without_room(tmp_path: Path) -> None:
    with small_pool(tmp_path, size="64MiB") as pool:
        _, handle = open_new(pool)
        with pytest.raises(NoSpaceError):
            pool.files.truncate(handle, 65 * MIB)
        pool.files.close_write(handle)
        raw = make_raw(pool, "raw", 44 * MIB)
        for change in (
            lambda: pool.files.truncate_node(raw, 70 * MIB),
            lambda: write_at(pool, raw, 64 * MIB, b"x"),
        ):
            with pytest.raises(NoSpaceError):
                change()
            assert Tree(pool).node(raw.node_id).size_bytes == 44 * MIB
        write_at(pool, raw, 44 * MIB - 1, b"x")
        assert content_of(pool, raw, 44 * MIB - 2) == b"\0x"
        _, handle = open_new(pool, "g")
        pool.files.write(handle, 0, b"x" * MIB)  # in memory
        with pytest.raises(NoSpaceError):
            pool.files.close_write(handle)
        assert Tree(pool).node(raw.node_id).size_bytes == 44 * MIB


def test_a_file_that_is_open_but_not_being_written_becomes_raw_at_once(pool: Pool) -> None:
    node, handle = open_new(pool)
    pool.files.write(handle, 0, b"x" * MIB)
    pool.files.flush(handle)
    Tree(pool).set_attribute(Tree(pool).node(node.node_id), RAW, b"1")
    assert Tree(pool).node(node.node_id).is_raw
    pool.files.write(handle, 1, b"yz")
    pool.files.flush(handle)
    assert content_of(pool, node, 0, 4) == b"xyzx"
    pool.files.close_write(handle)
    assert content_of(pool, node) == b"xyz" + b"x" * (MIB - 3)


def test_what_a_file_lost_before_it_became_raw_takes_no_name(pool: Pool) -> None:
    tree = Tree(pool)
    node, handle = open_new(pool)
    pool.files.write(handle, 0, b"x" * 8 * MIB)
    pool.files.close_write(handle)
    pool.sync()
    node = tree.node(node.node_id)
    former = pool.files.open_read(node)
    tree.set_attribute(node, RAW, b"1")
    pool.store.drop(former.namespace_id, former.keys[:1])
    with pytest.raises(MediaError):
        pool.files.read(former, 0, 1)
    pool.files.close_read(former)
    node = tree.node(node.node_id)
    assert (node.is_raw, node.state) == (True, NodeState.ACTIVE)
    assert content_of(pool, node) == b"x" * 8 * MIB


# --- reading and writing in place


def test_raw_files_are_written_in_place(pool: Pool, tmp_path: Path) -> None:
    node = make_raw(pool)
    [path] = raw_paths(tmp_path)
    inode = path.stat().st_ino
    reader = pool.files.open_read(node)
    first, second = (pool.files.open_write(node, truncate=False) for _ in range(2))
    pool.files.write(first, 5, b"hello")
    pool.files.write(second, 10, b" there")
    assert pool.files.read(reader, 5, 11) == b"hello there"
    assert pool.files.read_staged(first, 5, 11) == b"hello there"
    assert not pool.files.is_outdated(reader)
    pool.files.flush(first)
    pool.files.write(second, 8 * MIB, b"tail")
    assert Tree(pool).node(node.node_id).size_bytes == 8 * MIB + 4
    pool.files.catch_up(reader)
    assert reader.size_bytes == 8 * MIB + 4
    target = memoryview(bytearray(10))
    assert pool.files.read_into(reader, 8 * MIB - 1, target) == 5
    assert bytes(target[:5]) == b"\0tail"
    assert pool.files.read_nowait(reader, 8 * MIB, target) in (4, None)
    assert pool.files.read_nowait(reader, 9 * MIB, target) in (0, None)
    assert pool.files.read(reader, 9 * MIB, 10) == b""
    for handle in (first, second):
        pool.files.close_write(handle)
    pool.files.close_read(reader)
    assert path.stat().st_ino == inode
    assert path.read_bytes()[5:16] == b"hello there"
    assert pool.catalog.node(node.node_id).size_bytes == 8 * MIB + 4
    assert used(pool) == 8 * MIB + 4096


def test_raw_files_are_cut_and_extended(pool: Pool) -> None:
    node = make_raw(pool)
    write_at(pool, node, 0, b"x" * MIB)
    pool.files.truncate_node(node, 10)
    assert (Tree(pool).node(node.node_id).size_bytes, used(pool)) == (10, 4096)
    handle = pool.files.open_write(node, truncate=True)
    assert handle.writer.size_bytes == 0
    pool.files.fallocate(handle, 0, 0, 5000)
    pool.files.close_write(handle)
    node = Tree(pool).node(node.node_id)
    assert (node.is_raw, node.size_bytes, used(pool)) == (True, 5000, 8192)
    assert content_of(pool, node) == bytes(5000)


def test_a_map_of_a_raw_file_is_its_content(pool: Pool) -> None:
    """As a lane that hands the file to the kernel has it."""
    node = make_raw(pool)
    handle = pool.files.open_write(node, truncate=False)
    fd = pool.files.open_raw(node)
    with mmap.mmap(fd, 8 * MIB) as mapped:
        os.close(fd)
        mapped[MIB : MIB + 5] = b"hello"
        assert content_of(pool, node, MIB, 5) == b"hello"
        pool.files.write(handle, MIB + 5, b" there")
        assert mapped[MIB : MIB + 11] == b"hello there"
        mapped.flush()
    pool.files.fsync(handle)
    pool.files.close_write(handle)
    _, other = open_new(pool, "other")
    with pytest.raises(NotFoundError):
        pool.files.open_raw(other.writer.node)
    pool.files.close_write(other)


def test_what_was_written_behind_our_back_is_accounted_at_the_last_close(pool: Pool) -> None:
    node = make_raw(pool)
    reader = pool.files.open_read(node)
    fd = pool.files.open_raw(node)
    os.pwrite(fd, b"x", 10 * MIB)
    os.close(fd)
    assert Tree(pool).node(node.node_id).size_bytes == 10 * MIB + 1
    pool.files.close_read(reader)
    assert used(pool) == 10 * MIB + 4096
    assert Tree(pool).node(node.node_id).size_bytes == 10 * MIB + 1


def test_a_raw_file_is_granted_to_a_foreign_writer(pool: Pool) -> None:
    from tests.unit.test_files_grants import Core

    node = make_raw(pool)
    core = Core(pool, pool.files.open_write(node, truncate=False))
    core.ask(100)
    assert core.write(50, b"foreign")
    assert core.write(9 * MIB, b"growth")
    assert Tree(pool).node(node.node_id).size_bytes == 9 * MIB + 6
    assert content_of(pool, node, 50, 7) == b"foreign"
    pool.files.fsync(core.handle)
    assert core.revoked == 0
    pool.files.close_write(core.handle)
    assert pool.catalog.node(node.node_id).size_bytes == 9 * MIB + 6
    assert used(pool) == 9 * MIB + 4096


def test_a_failed_write_leaves_a_raw_file(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    node = make_raw(pool)
    handle = pool.files.open_write(node, truncate=False)

    def fail(*_: object) -> None:
        raise OSError(5, "injected")

    with monkeypatch.context() as patch:
        patch.setattr(pool.files.staging, "write", fail)
        with pytest.raises(DeviceError):
            pool.files.write(handle, 0, b"x")
    pool.files.write(handle, 0, b"y")
    with monkeypatch.context() as patch:
        patch.setattr(pool.files.staging, "persist", fail)
        with pytest.raises(DeviceError, match="persist failed"):
            pool.files.fsync(handle)
    pool.files.flush(handle)
    pool.files.close_write(handle, is_abandoned=True)
    assert content_of(pool, node, 0, 2) == b"y\0"


def test_a_raw_file_that_cannot_be_made(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(5, "injected")

    for method in ("keep_raw", "persist_names"):
        _, handle = open_new(pool)
        pool.files.truncate(handle, 8 * MIB)
        with monkeypatch.context() as patch:
            patch.setattr(pool.store.state.devices[0].device, method, fail)
            with pytest.raises(DeviceError, match="raw file could not be made"):
                pool.files.close_write(handle)
        assert Tree(pool).lookup(1, "f") is None
        assert used(pool) == 0


def test_an_unreadable_raw_file(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    node = make_raw(pool)
    reader = pool.files.open_read(node)

    def fail(*_: object) -> int:
        raise OSError(5, "injected")

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", fail)
        with pytest.raises(MediaError):
            pool.files.read(reader, 0, 10)
        assert pool.files.read_nowait(reader, 0, memoryview(bytearray(5))) is None
    assert pool.files.read(reader, 0, 3) == bytes(3)
    pool.files.close_read(reader)
    pool.files.close_read(reader)
    with pytest.raises(ClosedError):
        pool.files.read(reader, 0, 3)


# --- names


def test_a_removed_raw_file_lives_until_its_last_close(pool: Pool, tmp_path: Path) -> None:
    tree, node = Tree(pool), make_raw(pool)
    reader, handle = pool.files.open_read(node), pool.files.open_write(node, truncate=False)
    tree.remove_file(1, "f")
    assert tree.lookup(1, "f") is None
    pool.files.write(handle, 0, b"still")
    assert pool.files.read(reader, 0, 5) == b"still"
    pool.files.flush(handle)
    pool.files.close_write(handle)
    assert len(raw_paths(tmp_path)) == 1
    assert used(pool) == 8 * MIB
    pool.files.close_read(reader)
    assert raw_paths(tmp_path) == []
    assert used(pool) == 0
    make_raw(pool, "g")
    tree.remove_file(1, "g")
    assert (raw_paths(tmp_path), used(pool)) == ([], 0)


def test_raw_files_are_renamed_and_give_way(pool: Pool, tmp_path: Path) -> None:
    tree = Tree(pool)
    one, two = make_raw(pool, "one"), make_raw(pool, "two", 2 * MIB)
    write_at(pool, two, 0, b"two")
    tree.rename(1, "two", 1, "one", replace=True)
    assert [node.name for node in tree.children(1, "") if not node.is_directory] == ["one"]
    assert content_of(pool, two, 0, 3) == b"two"
    assert len(raw_paths(tmp_path)) == 1
    assert one.node_id not in pool.files.raws
    _, handle = open_new(pool, "plain")
    pool.files.write(handle, 0, b"plain")
    pool.files.close_write(handle)
    tree.rename(1, "plain", 1, "one", replace=True)
    node = tree.lookup(1, "one")
    assert node is not None
    assert (node.is_raw, raw_paths(tmp_path)) == (False, [])
    assert content_of(pool, node) == b"plain"


def test_a_dropped_namespace_takes_its_raw_files(pool: Pool, tmp_path: Path) -> None:
    tree = Tree(pool)
    folder = tree.make_directory(1, "space", 0o755, 0, 0)
    tree.set_attribute(folder, RAW, b"1")
    _, handle = open_new(pool, "closed", folder.node_id)
    pool.files.write(handle, 0, b"x")
    pool.files.close_write(handle)
    kept, handle = open_new(pool, "open", folder.node_id)
    pool.files.flush(handle)
    pool.files.close_write(handle)
    reader = pool.files.open_read(kept)
    make_raw(pool, "elsewhere")
    pool.drop_namespace("space")
    assert len(raw_paths(tmp_path)) == 2
    pool.files.close_read(reader)
    assert len(raw_paths(tmp_path)) == 1


def test_a_file_removed_while_it_becomes_raw(pool: Pool, tmp_path: Path) -> None:
    node, handle = open_new(pool)
    pool.files.truncate(handle, 8 * MIB)
    Tree(pool).remove_file(1, "f")
    pool.files.close_write(handle)
    assert (raw_paths(tmp_path), used(pool)) == ([], 0)
    assert node.node_id not in pool.files.raws


def test_attributes_of_a_raw_file(pool: Pool) -> None:
    tree, node = Tree(pool), make_raw(pool)
    write_at(pool, node, 0, b"x")
    changed = tree.set_attributes(node.node_id, mode=0o600, uid=7, gid=8, mtime_ns=99)
    assert (changed.mode, changed.uid, changed.gid, changed.mtime_ns) == (0o600, 7, 8, 99)
    handle = pool.files.open_write(node, truncate=False)
    pool.files.write(handle, 0, b"y")
    assert tree.node(node.node_id).mtime_ns > 99
    pool.files.close_write(handle)
    assert tree.node(node.node_id).mtime_ns > 99
    assert tree.node(node.node_id).mode == 0o600


# --- eviction, and life after this process


def test_eviction_never_takes_a_raw_file(pool: Pool) -> None:
    node = make_raw(pool, nbytes=40 * MIB)
    write_at(pool, node, 20 * MIB, b"kept")
    namespace = small_namespace(pool)
    for seed in range(12):
        keys, parents = namespace.keys([seed * 10_000 + i for i in range(4 * 240)])
        namespace.put(keys, payloads(240, seed), parents=parents)
        pool.flush()
    assert pool.statistics().counters["blocks_evicted"] > 0
    assert content_of(pool, node, 20 * MIB, 4) == b"kept"
    assert Tree(pool).node(node.node_id).size_bytes == 40 * MIB


def test_raw_files_are_there_again(tmp_path: Path) -> None:
    with small_pool(tmp_path) as pool:
        node = make_raw(pool)
        write_at(pool, node, 5, b"hello")
    report = check_pool(tmp_path / "pool", data=True)
    assert [str(finding) for finding in report.findings] == []
    assert report.counts.files == 1
    with kvfs.open_pool(tmp_path / "pool") as pool:
        node = Tree(pool).node(node.node_id)
        assert (node.is_raw, node.size_bytes, used(pool)) == (True, 8 * MIB, 8 * MIB)
        assert content_of(pool, node, 5, 5) == b"hello"
    kvfs.destroy_pool(tmp_path / "pool")
    assert not (tmp_path / "device/raw").exists()


def test_names_and_raw_files_are_brought_together(tmp_path: Path) -> None:
    with small_pool(tmp_path) as pool:
        lost = make_raw(pool, "lost")
        make_raw(pool, "kept", 2 * MIB)
    folder = tmp_path / "device/raw"
    (folder / f"{lost.node_id:016x}").rename(folder / f"{lost.node_id + 500:016x}")
    (folder / "not-mine").write_bytes(b"x")
    report = check_pool(tmp_path / "pool")
    assert sorted(f.code for f in report.findings) == [
        "file-not-whole", "raw-file-unnamed", "unknown-file",
    ]  # fmt: skip
    assert {a.kind for a in report.plan} == {ActionKind.REMOVE_NAMES, ActionKind.FREE_RAW}
    with kvfs.open_pool(tmp_path / "pool") as pool:
        names = [node.name for node in Tree(pool).children(1, "")]
        assert names == ["default", "kept"]
        assert pool.recovery.files_dropped == 1
        assert used(pool) == 2 * MIB
    assert (folder / "not-mine").exists()


def test_repair_brings_them_together_too(tmp_path: Path) -> None:
    with small_pool(tmp_path) as pool:
        lost = make_raw(pool, "lost")
    folder = tmp_path / "device/raw"
    (folder / f"{lost.node_id:016x}").rename(folder / f"{lost.node_id + 500:016x}")
    report = check_pool(tmp_path / "pool", repair=True)
    assert [str(finding) for finding in report.remaining] == []
    assert not list(folder.iterdir())


def test_raw_files_of_a_pool_in_memory(tmp_path: Path) -> None:
    url = "dram:?size=64MiB&segment=16MiB"
    with kvfs.create_pool(tmp_path / "pool", [url]) as pool:
        node = make_raw(pool)
        write_at(pool, node, 8 * MIB - 2, b"hello")
        assert content_of(pool, node, 8 * MIB - 3) == b"\0hello"
    with kvfs.open_pool(tmp_path / "pool") as pool:
        assert Tree(pool).lookup(1, "f") is None


def test_a_pending_file_is_busy_until_it_is_raw(pool: Pool) -> None:
    node, handle = open_new(pool)
    pool.files.truncate(handle, 8 * MIB)
    with pytest.raises(BusyError):
        pool.files.open_read(node)
    assert pool.catalog.node(node.node_id).state is NodeState.PENDING
    pool.files.flush(handle)
    assert Tree(pool).node(node.node_id).is_raw
    pool.files.write(handle, 0, b"after the flush")
    assert content_of(pool, node, 0, 15) == b"after the flush"
    pool.files.close_write(handle)


def test_many_threads_write_and_read_one_raw_file(pool: Pool) -> None:
    node = make_raw(pool)
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for turn in range(20):
                data = bytes([number, turn]) * 500
                write_at(pool, node, number * MIB, data)
                assert content_of(pool, node, number * MIB, 1000) == data
        except BaseException as error:  # noqa: BLE001
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures
    assert not pool.files._writers
