"""Writing files: what a failed write leaves, and what goes on after a file was adopted."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvfs.engine.catalog_schema import Node
from kvfs.errors import DeviceError, KvfsError, MediaError, NotFoundError
from kvfs.files import WriteHandle
from kvfs.pool import Pool
from kvfs.tree import Tree
from kvfs.units import MIB
from tests.unit.small_pools import small_pool


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    with small_pool(tmp_path, size="128MiB") as made:
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
