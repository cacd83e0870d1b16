"""Writing files: what a failed write leaves, and what goes on after a file was adopted."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvfs.devices.osfile import OSFile
from kvfs.engine.catalog_schema import Node
from kvfs.errors import DeviceError, KvfsError, MediaError, NoSpaceError, NotFoundError
from kvfs.files import WriteHandle
from kvfs.layout import OPAQUE
from kvfs.pool import Pool
from kvfs.tree import Tree
from kvfs.units import MIB
from tests.unit.small_pools import small_pool


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    with small_pool(tmp_path, size="128MiB") as made:
        yield made


@pytest.fixture
def losing(tmp_path: Path) -> Iterator[Pool]:
    """A pool that loses blocks in the test, and says so when it is closed."""
    with contextlib.suppress(DeviceError), small_pool(tmp_path, size="128MiB") as made:
        yield made


def write_open(pool: Pool, nbytes: int, name: str = "f") -> tuple[Node, WriteHandle]:
    """Make a file, write it and leave it open."""
    node = Tree(pool).create_file(1, name, 0o644, 0, 0)
    handle = pool.files.open_write(node, truncate=True)
    for start in range(0, nbytes, MIB):
        pool.files.write(handle, start, b"a" * min(MIB, nbytes - start))
    return node, handle


@pytest.mark.parametrize("error", [ValueError("odd"), MemoryError(), OSError(5, "media")])
def test_any_failed_write_keeps_the_file_from_appearing(
    pool: Pool, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    _, handle = write_open(pool, 2 * MIB)

    def fail(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(pool.files.staging, "write", fail)
        with pytest.raises((type(error), DeviceError)):
            pool.files.write(handle, 2 * MIB, b"b")
    with pytest.raises(KvfsError, match="write failed"):
        pool.files.flush(handle)
    pool.files.close_write(handle)
    pool.sync()
    assert Tree(pool).lookup(1, "f") is None


def test_close_of_a_file_larger_than_may_be_pinned(pool: Pool) -> None:
    node, handle = write_open(pool, 70 * MIB)
    pool.files.flush(handle)
    assert handle.writer.size_bytes == 70 * MIB
    pool.files.close_write(handle)
    assert Tree(pool).node(node.node_id).size_bytes == 70 * MIB
    assert not pool.store.state.pins


def test_writing_goes_on_after_adoption(pool: Pool) -> None:
    node, handle = write_open(pool, 20 * MIB)
    pool.files.flush(handle)
    assert pool.files.read_staged(handle, 20 * MIB - 3, 10) == b"aaa"
    pool.files.write(handle, 20 * MIB, b"tail")
    pool.files.close_write(handle)
    reader = pool.files.open_read(node)
    assert pool.files.read(reader, 20 * MIB - 2, 10) == b"aatail"
    pool.files.close_read(reader)


def test_adopted_content_that_was_evicted_is_not_taken_for_nothing(pool: Pool) -> None:
    node, handle = write_open(pool, 20 * MIB)
    pool.files.flush(handle)
    keys = pool.catalog.keys(node.node_id)
    pool.store.drop(node.namespace_id, keys)
    pool.catalog.clear_content(node.node_id, 1)  # as eviction does to a file that is open
    with pytest.raises(NotFoundError, match="lost a block"):
        pool.files.open_read(node)
    with pytest.raises(MediaError, match="evicted while open"):
        pool.files.read_staged(handle, 0, 10)
    with pytest.raises(MediaError):
        pool.files.write(handle, 30 * MIB, b"x")
    with pytest.raises(MediaError):
        pool.files.flush(handle)
    pool.files.close_write(handle)
    assert Tree(pool).lookup(1, "f") is None


def test_a_file_that_eviction_emptied_goes_with_its_last_writer(pool: Pool) -> None:
    node, handle = write_open(pool, 20 * MIB)
    pool.files.flush(handle)
    pool.store.drop(node.namespace_id, pool.catalog.keys(node.node_id))
    pool.catalog.clear_content(node.node_id, 1)
    pool.files.close_write(handle)
    assert Tree(pool).lookup(1, "f") is None


def fail_with(error: Exception) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


def lose_what_is_adopted(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a persist fail, as the background may meet it."""
    with monkeypatch.context() as patch:
        patch.setattr(OSFile, "sync", fail_with(OSError(5, "injected")))
        with pytest.raises(DeviceError):
            pool.flush()


@pytest.mark.parametrize("former", [None, b"former"])
def test_a_sync_after_the_bytes_were_lost_says_so(
    losing: Pool, monkeypatch: pytest.MonkeyPatch, former: bytes | None
) -> None:
    if former is not None:
        node, handle = write_open(losing, 0)
        losing.files.write(handle, 0, former)
        losing.files.close_write(handle)
        losing.sync()
    node = Tree(losing).lookup(1, "f") or Tree(losing).create_file(1, "f", 0o644, 0, 0)
    handle = losing.files.open_write(node, truncate=True)
    losing.files.write(handle, 0, b"lost")
    losing.files.flush(handle)  # a descriptor of several is closed
    lose_what_is_adopted(losing, monkeypatch)
    for _ in range(2):
        with pytest.raises(DeviceError, match="lost what was written"):
            losing.files.fsync(handle)
    with pytest.raises(DeviceError, match="lost what was written"):
        losing.files.flush(handle)
    losing.files.close_write(handle)
    found = Tree(losing).lookup(1, "f")
    assert (found is None) == (former is None)
    assert found is None or found.size_bytes == len(b"former")


def test_bytes_written_since_are_whole_without_what_was_lost(
    losing: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    node, handle = write_open(losing, 0)
    losing.files.write(handle, 0, b"first ")
    losing.files.flush(handle)
    losing.files.write(handle, 6, b"second")
    lose_what_is_adopted(losing, monkeypatch)
    losing.files.fsync(handle)
    losing.files.flush(handle)
    losing.files.close_write(handle)
    reader = losing.files.open_read(node)
    assert losing.files.read(reader, 0, 20) == b"first second"
    losing.files.close_read(reader)


def test_a_file_found_rotten_keeps_its_name_for_what_comes(pool: Pool) -> None:
    node, handle = write_open(pool, 0)
    pool.files.write(handle, 0, b"first")
    pool.files.flush(handle)
    pool.flush()
    reader = pool.files.open_read(node)
    pool.store.drop(node.namespace_id, reader.keys)
    pool.files.write(handle, 5, b" second")
    with pytest.raises(MediaError):
        pool.files.read(reader, 0, 5)
    pool.files.close_read(reader)
    pool.files.close_write(handle)
    assert Tree(pool).node(node.node_id).size_bytes == 12


def test_each_close_adopts_what_was_written_before_it(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    node, handle = write_open(pool, 0)
    pool.files.write(handle, 0, b"one")
    pool.files.flush(handle)
    pool.files.write(handle, 3, b"two")
    with monkeypatch.context() as patch:
        patch.setattr(pool.store, "put", fail_with(NoSpaceError("nothing can be evicted")))
        with pytest.raises(NoSpaceError):
            pool.files.flush(handle)
    pool.files.flush(handle)
    pool.files.flush(handle)
    assert pool.store.match_prefix(node.namespace_id, pool.files.resident(node)[0]) == 1
    assert Tree(pool).node(node.node_id).size_bytes == 6
    pool.files.close_write(handle)


@pytest.mark.parametrize("method", ["persist_names", "adopt"])
def test_a_failed_adoption_fails_every_close(
    pool: Pool, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    _, handle = write_open(pool, 6 * MIB)
    device = pool.store.state.devices[0].device
    with monkeypatch.context() as patch:
        patch.setattr(device, method, fail_with(OSError(5, "injected")))
        with pytest.raises(DeviceError, match="adoption failed"):
            pool.files.flush(handle)
    for again in (pool.files.flush, pool.files.fsync):
        with pytest.raises(DeviceError, match="adoption failed"):
            again(handle)
    pool.files.truncate(handle, 0)
    pool.files.write(handle, 0, b"new")
    pool.files.flush(handle)
    pool.files.close_write(handle)
    assert Tree(pool).lookup(1, "f").size_bytes == 3
    assert [segment.is_file for segment in device.segments()] == [False]


def test_small_files_of_a_durable_namespace_need_no_pause(pool: Pool) -> None:
    info = pool.make_namespace("kept", OPAQUE, retention="durable")
    tree = Tree(pool)
    for number in range(70):  # more than may be pinned, at a mebibyte each
        node = tree.create_file(info.root_node_id, f"f{number}", 0o644, 0, 0)
        handle = pool.files.open_write(node, truncate=True)
        pool.files.write(handle, 0, b"small")
        pool.files.flush(handle)
        pool.files.close_write(handle)
    pool.flush()
    assert pool.store.state.pinned_bytes[info.namespace_id] == 0
    assert len(tree.children(info.root_node_id, "")) == 70
