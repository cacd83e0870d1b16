"""What is said to the core of files that it writes; against a stand-in for the core."""

import errno
import os
import struct
from collections.abc import Iterator

import numpy as np
import pytest

from kvfs.engine.catalog_schema import Node
from kvfs.errors import DeviceError
from kvfs.files import WriteHandle
from kvfs.fuse.core_messages import Kind, Message
from kvfs.fuse.write_lanes import WriteLanes
from kvfs.pool import Pool
from kvfs.tree import Tree
from tests.fuse.fake_core import FakeCore
from tests.fuse.mounting import MIB

FH, INODE = 5, 7


@pytest.fixture
def core() -> Iterator[FakeCore]:
    core = FakeCore()
    try:
        yield core
    finally:
        core.close()


@pytest.fixture
def lanes(pool: Pool, core: FakeCore) -> WriteLanes:
    return WriteLanes(pool.files, core.client)


def new(pool: Pool) -> tuple[Node, WriteHandle]:
    node = Tree(pool).create_file(1, "f", 0o644, 0, 0)
    return node, pool.files.open_write(node, truncate=True)


def written(high: int, start: int, end: int, flags: int, digests: bytes = b"") -> bytes:
    return struct.pack("<QQQII", high, start, end, flags, len(digests) // 16) + digests


def content_of(pool: Pool, node: Node) -> bytes:
    reader = pool.files.open_read(node)
    try:
        return bytes(pool.files.read(reader, 0, reader.size_bytes))
    finally:
        pool.files.close_read(reader)


def test_offered_raised_and_taken_back(pool: Pool, lanes: WriteLanes, core: FakeCore) -> None:
    node, file = new(pool)
    lanes.offer(FH, INODE, file, 0)
    assert lanes.is_native(FH)
    assert file.grant is not None
    assert file.grant.credit_bytes == 4 * MIB  # a quarter of a segment: what memory may hold
    lanes.offer(FH, INODE, file, 5 * MIB)  # beyond it: stopped, moved, and offered anew
    assert file.grant.credit_bytes == 21 * MIB
    lanes.offer(FH, INODE, file, 20 * MIB)
    lanes.offer(FH, INODE, file, 7 * MIB)  # no less than it has
    core.answers[Kind.CLOSE] = lambda *_: (0, written(3, 0, 3, 1))
    assert file.writer.staged is not None
    os.pwrite(file.writer.staged.file.fd, b"abc", 0)
    pool.files.flush(file)
    assert not lanes.is_native(FH)
    kinds = [Kind.WRITE, Kind.CLOSE, Kind.WRITE, Kind.CREDIT, Kind.CLOSE]
    assert core.said == [(kind, FH) for kind in kinds]
    pool.files.close_write(file)
    lanes.offer(FH, INODE, file, 0)  # too late
    assert len(core.said) == len(kinds)
    assert content_of(pool, node) == b"abc"


def test_a_core_that_refuses(pool: Pool, lanes: WriteLanes, core: FakeCore) -> None:
    """All writes go on coming to this side."""
    core.answers[Kind.WRITE] = lambda *_: (-errno.ENOMEM, b"")
    node, file = new(pool)
    for at in range(3):
        pool.files.write(file, at, b"%d" % at)
        lanes.offer(FH, INODE, file, at + 1)
    pool.files.close_write(file)
    assert content_of(pool, node) == b"012"


def test_a_core_that_does_not_let_go(pool: Pool, lanes: WriteLanes, core: FakeCore) -> None:
    core.answers[Kind.CLOSE] = lambda *_: (-errno.EBUSY, b"")
    _, file = new(pool)
    lanes.offer(FH, INODE, file, 0)
    with pytest.raises(DeviceError, match="could not be stopped"):
        pool.files.flush(file)
    assert core.count(Kind.CLOSE) == 3
    pool.files.close_write(file)
    assert Tree(pool).lookup(1, "f") is None


def test_a_core_that_told_of_a_failure(pool: Pool, lanes: WriteLanes, core: FakeCore) -> None:
    core.answers[Kind.CLOSE] = lambda *_: (0, written(9, 0, 0, 2))
    _, file = new(pool)
    lanes.offer(FH, INODE, file, 0)
    with pytest.raises(DeviceError, match="write failed"):
        pool.files.flush(file)
    pool.files.close_write(file)
    assert Tree(pool).lookup(1, "f") is None


def test_a_core_that_has_ended_writes_no_more(
    pool: Pool, lanes: WriteLanes, core: FakeCore
) -> None:
    node, file = new(pool)
    lanes.offer(FH, INODE, file, 0)
    assert file.writer.staged is not None
    os.pwrite(file.writer.staged.file.fd, b"all that there is", 0)
    core.client.note_end()
    pool.files.flush(file)
    lanes.offer(FH, INODE, file, 0)
    assert not lanes.is_native(FH)
    pool.files.close_write(file)
    assert content_of(pool, node) == b"all that there is"


def test_digests_of_a_long_file_come_in_parts(core: FakeCore) -> None:
    all_digests = np.random.default_rng(1).integers(0, 256, (10_001, 16), np.uint8)

    def answer(_: int, payload: bytes) -> tuple[int, bytes]:
        [first] = struct.unpack("<I", payload)
        head = struct.pack("<QQQII", 1 << 40, 0, 1 << 40, 1, len(all_digests))
        return 0, head + all_digests[first : first + 4093].tobytes()

    core.answers[Kind.DIGESTS] = core.answers[Kind.CLOSE] = answer
    found = core.client.close_writer(FH, 10_000)
    assert found is not None
    assert found.is_in_order
    assert np.array_equal(found.digests, all_digests)
    assert core.count(Kind.DIGESTS) == 3
    short = core.client.close_writer(FH, 0)  # not asked for in time: not all are there
    assert short is not None
    assert not short.is_in_order


def test_answers_that_nobody_waits_for_do_not_pile_up(core: FakeCore) -> None:
    for number in range(20_000):
        core.client.post(Message(Kind.CREDIT, number, struct.pack("<Q", 1)))
    assert core.client.call(Message(Kind.STOP)) == (0, b"")
    assert core.count(Kind.CREDIT) == 20_000
