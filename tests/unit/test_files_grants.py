"""Foreign writers: what they may write, and what becomes of it."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvfs import _native
from kvfs.engine.catalog_schema import Node
from kvfs.errors import BusyError, DeviceError, NoSpaceError
from kvfs.file_writer import HandedIn, KnownDigests
from kvfs.file_writing import GRANT_STEP_BYTES
from kvfs.files import WriteHandle
from kvfs.lifecycle import create_pool
from kvfs.pool import Pool
from kvfs.tree import Tree
from kvfs.units import MIB, PAGE
from tests.unit.small_pools import small_pool

QUARTER = 4 * MIB


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    with small_pool(tmp_path, size="128MiB") as made:
        yield made
        assert made.files.staging.budget.used_bytes == 0


def random_bytes(nbytes: int, seed: int = 1) -> bytes:
    return np.random.default_rng(seed).bytes(nbytes)


class Core:
    """A foreign writer as the mount's core is one: its own descriptor, credit, digests."""

    def __init__(self, pool: Pool, handle: WriteHandle) -> None:
        self.pool, self.handle = pool, handle
        self.stride = 1 << 20
        self.fd = -1
        self.credit = 0
        self.revoked = 0
        self.gives_digests = True
        self._forget()

    def _forget(self) -> None:
        self.written = bytearray()
        self.start = self.end = -1
        self.in_order = True

    def ask(self, upto: int) -> None:
        fd, self.credit = self.pool.files.grant(self.handle, upto, self.revoke)
        assert self.credit >= upto
        if self.fd < 0:
            self.fd = os.dup(fd)

    def write(self, offset: int, data: bytes) -> bool:
        """Write as the mount does: here if the credit allows, else by kvfs, asking for more."""
        end = offset + len(data)
        if self.fd >= 0 and end <= self.credit:
            assert os.pwrite(self.fd, data, offset) == len(data)
            if self.start < 0:
                self.start = self.end = offset
            self.in_order = self.in_order and offset == self.end
            self.written += data
            self.end = max(self.end, end)
            return True
        self.pool.files.write(self.handle, offset, data)
        self.ask(end)
        return False

    def revoke(self) -> HandedIn:
        self.revoked += 1
        os.close(self.fd)
        self.fd = -1
        if self.start < 0:
            return HandedIn()
        digests = None
        if self.in_order and self.gives_digests:
            skip = -self.start % self.stride
            parts = [
                self.written[i : i + self.stride]
                for i in range(skip, len(self.written), self.stride)
            ]
            raw = b"".join(_native.xxh3_128(bytes(part)) for part in parts)
            digests = np.frombuffer(raw, np.uint8).reshape(-1, 16)
        handed = HandedIn(self.start, self.end, digests)
        self._forget()
        return handed


def open_new(pool: Pool, name: str = "f") -> tuple[Node, Core]:
    node = Tree(pool).create_file(1, name, 0o644, 0, 0)
    return node, Core(pool, pool.files.open_write(node, truncate=True))


def content_of(pool: Pool, node: Node) -> bytes:
    reader = pool.files.open_read(node)
    try:
        return bytes(pool.files.read(reader, 0, 1 << 30))
    finally:
        pool.files.close_read(reader)


def used(pool: Pool) -> int:
    return pool.store.state.devices[0].device.used_bytes


# --- the protocol


def test_what_is_granted_ahead_leaves_memory_to_others(pool: Pool) -> None:
    budget = pool.files.staging.budget
    budget.limit_bytes = 3 * QUARTER
    cores = [open_new(pool, f"f{number}")[1] for number in range(3)]
    for core in cores:
        core.ask(0)
    assert [core.credit for core in cores] == [QUARTER, 0, 0]
    for core in cores:
        core.write(0, b"x" * QUARTER)
    assert budget.used_bytes == 3 * QUARTER
    for core in cores:
        assert core.handle.writer.staged is not None
        assert core.handle.writer.staged.in_memory
        pool.files.close_write(core.handle)


def test_a_foreign_writer_writes_a_small_file(pool: Pool) -> None:
    node, core = open_new(pool)
    core.ask(10)
    assert core.credit == QUARTER
    assert pool.files.staging.budget.used_bytes == QUARTER
    assert core.write(0, b"hello")
    assert Tree(pool).node(node.node_id).size_bytes == 5
    assert pool.files.read_staged(core.handle, 0, 100) == b"hello"
    with pytest.raises(BusyError):
        pool.files.open_read(node)
    pool.files.flush(core.handle)
    assert core.revoked == 1
    assert content_of(pool, node) == b"hello"
    pool.files.close_write(core.handle)
    assert core.revoked == 1
    assert content_of(pool, node) == b"hello"


@pytest.mark.parametrize("piece", [MIB, 300_000])
def test_a_foreign_writer_writes_a_large_file(pool: Pool, piece: int) -> None:
    data = random_bytes(40 * MIB + 12345)
    node, core = open_new(pool)
    native = [
        core.write(start, data[start : start + piece]) for start in range(0, len(data), piece)
    ]
    assert native.count(False) <= 2 + len(data) // GRANT_STEP_BYTES
    assert core.revoked == 1  # moved from memory once
    assert Tree(pool).node(node.node_id).size_bytes == len(data)
    pool.files.close_write(core.handle)
    assert core.revoked == 2
    assert content_of(pool, node) == data
    assert used(pool) <= len(data) + 16 * MIB + 3 * PAGE


def test_what_is_granted_is_used_space_and_given_back(pool: Pool) -> None:
    node, core = open_new(pool)
    core.ask(20 * MIB)
    assert (core.credit, used(pool)) == (36 * MIB, 36 * MIB)
    core.write(0, b"x" * (5 * MIB))
    assert used(pool) == 36 * MIB
    pool.files.hand_in(core.handle, core.revoke())
    assert used(pool) == 5 * MIB
    core.ask(6 * MIB)
    assert used(pool) == 22 * MIB
    pool.files.close_write(core.handle)
    assert used(pool) == 5 * MIB + 3 * PAGE  # and a sidecar
    assert content_of(pool, node) == b"x" * (5 * MIB)


def test_a_grant_that_cannot_be_had_is_refused(pool: Pool) -> None:
    _, core = open_new(pool)
    core.ask(110 * MIB)
    assert core.credit == 110 * MIB  # no step ahead: there is no room for it
    with pytest.raises(NoSpaceError):
        core.ask(113 * MIB)
    assert core.write(0, b"still allowed")
    with pytest.raises(NoSpaceError):
        core.write(113 * MIB, b"x")
    with pytest.raises(NoSpaceError):
        pool.files.flush(core.handle)
    pool.files.close_write(core.handle)
    assert Tree(pool).lookup(1, "f") is None
    assert used(pool) == 0


def test_a_granted_file_goes_on_where_there_is_room(tmp_path: Path) -> None:
    """Whoever writes it is stopped first, and may go on at the new place."""
    urls = [f"dir:{tmp_path}/{name}?size={size}&segment=16MiB" for name, size in
            (("small", "64MiB"), ("roomy", "128MiB"))]  # fmt: skip
    data = random_bytes(60 * MIB)
    with create_pool(tmp_path / "pool", urls) as pool:
        node, core = open_new(pool)
        for start in range(0, len(data), MIB):
            core.write(start, data[start : start + MIB])
        assert core.revoked == 2  # out of memory, and off the device that is full
        assert core.handle.writer.staged is not None
        assert core.handle.writer.staged.device_index == 1
        assert core.write(0, data[:MIB])
        pool.files.close_write(core.handle)
        assert content_of(pool, node) == data
        assert not [*tmp_path.glob("*/staging/*")]


def test_a_grant_makes_room_in_the_cache(pool: Pool) -> None:
    for number in range(6):
        node, core = open_new(pool, f"old{number}")
        core.write(0, b"o" * (20 * MIB))
        pool.files.close_write(core.handle)
    pool.sync()
    node, core = open_new(pool)
    core.ask(60 * MIB)
    assert used(pool) <= 128 * MIB
    for start in range(0, 60 * MIB, MIB):
        assert core.write(start, b"n" * MIB)
    pool.files.close_write(core.handle)
    assert Tree(pool).node(node.node_id).size_bytes == 60 * MIB


def test_fsync_moves_from_memory_and_revokes_first(pool: Pool) -> None:
    node, core = open_new(pool)
    core.ask(100)
    core.write(0, b"in memory")
    pool.files.fsync(core.handle)
    assert (core.revoked, core.fd) == (1, -1)
    assert not core.write(9, b", on the device")
    assert core.write(24, b", natively")
    pool.files.fsync(core.handle)
    assert core.revoked == 1  # on its device nothing need move
    pool.files.close_write(core.handle)
    assert content_of(pool, node) == b"in memory, on the device, natively"


def test_two_writers_of_one_file(pool: Pool) -> None:
    node, one = open_new(pool)
    two = Core(pool, pool.files.open_write(node, truncate=False))
    for start in range(0, 8 * MIB, 2 * MIB):
        one.write(start, b"1" * MIB)
        two.write(start + MIB, b"2" * MIB)
    pool.files.flush(one.handle)
    with pytest.raises(BusyError):
        pool.files.open_read(node)
    pool.files.close_write(one.handle)
    assert two.fd >= 0
    pool.files.flush(two.handle)
    assert content_of(pool, node) == (b"1" * MIB + b"2" * MIB) * 4
    pool.files.close_write(two.handle)
    assert content_of(pool, node) == (b"1" * MIB + b"2" * MIB) * 4


def test_a_writer_that_cannot_be_stopped_makes_the_file_fail(pool: Pool) -> None:
    node, core = open_new(pool)
    core.ask(10)

    def fail() -> HandedIn:
        raise TimeoutError("no answer")

    pool.files.grant(core.handle, 10, fail)
    os.pwrite(core.fd, b"x", 0)
    with pytest.raises(DeviceError, match="could not be stopped"):
        pool.files.flush(core.handle)
    pool.files.close_write(core.handle)
    os.close(core.fd)
    assert Tree(pool).lookup(1, "f") is None
    assert node.node_id not in pool.files._writers


def test_a_writer_that_told_of_a_failure_leaves_no_file(pool: Pool) -> None:
    _, core = open_new(pool)
    core.ask(10)
    core.write(0, b"half of")
    core.revoke()
    pool.files.hand_in(core.handle, HandedIn(0, 7, None, has_failed=True))
    with pytest.raises(DeviceError, match="write failed"):
        pool.files.flush(core.handle)
    pool.files.close_write(core.handle)
    assert Tree(pool).lookup(1, "f") is None


def test_a_writer_that_dies_leaves_no_file(pool: Pool) -> None:
    _, core = open_new(pool)
    core.ask(10)
    core.write(0, b"half of")
    pool.files.close_write(core.handle, is_abandoned=True)
    assert Tree(pool).lookup(1, "f") is None


def test_a_failed_file_grants_nothing(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(5, "injected")

    _, core = open_new(pool)
    with monkeypatch.context() as patch:
        patch.setattr(pool.files.staging, "write", fail)
        with pytest.raises(DeviceError):
            pool.files.write(core.handle, 0, b"x")
    with pytest.raises(DeviceError):
        core.ask(10)
    pool.files.close_write(core.handle)


@pytest.mark.parametrize("is_set_last", [True, False])
def test_times_of_a_file_written_by_somebody_else(pool: Pool, is_set_last: bool) -> None:
    tree = Tree(pool)
    node, core = open_new(pool)
    core.ask(10)
    before = tree.node(node.node_id).mtime_ns

    def shown() -> int:
        return tree.node(node.node_id).mtime_ns

    def write_at(time_ns: int, offset: int) -> None:
        core.write(offset, b"x")
        os.utime(core.fd, ns=(time_ns, time_ns))

    write_at(before + 10**9, 0)
    assert shown() == before + 10**9
    tree.set_attributes(node.node_id, mtime_ns=before + 10**12)
    assert shown() == before + 10**12
    write_at(before + 2 * 10**9, 1)
    assert shown() == before + 2 * 10**9  # whatever it was set to before
    if is_set_last:
        tree.set_attributes(node.node_id, mtime_ns=12345)
    last = shown()
    pool.files.close_write(core.handle)
    assert shown() == last == (12345 if is_set_last else before + 2 * 10**9)
    pool.sync()
    assert shown() == last


def test_a_write_in_the_clock_tick_of_a_set_time_is_told(pool: Pool) -> None:
    """The kernel's clock stands still for milliseconds: here, all the while."""
    tree = Tree(pool)
    node, core = open_new(pool)
    pool.files.write(core.handle, 0, b"x")
    tick_ns = tree.node(node.node_id).mtime_ns + 10**9
    assert core.handle.writer.staged is not None
    os.utime(core.handle.writer.staged.file.fd, ns=(tick_ns, tick_ns))
    core.ask(10)
    tree.set_attributes(node.node_id, mtime_ns=5)
    core.write(1, b"y")
    os.utime(core.fd, ns=(tick_ns, tick_ns))
    assert tree.node(node.node_id).mtime_ns == tick_ns
    tree.set_attributes(node.node_id, mtime_ns=5)
    assert tree.node(node.node_id).mtime_ns == 5
    core.write(2, b"z")
    os.utime(core.fd, ns=(tick_ns, tick_ns))
    pool.files.close_write(core.handle)
    assert tree.node(node.node_id).mtime_ns == tick_ns


def test_a_grant_on_a_raw_file_is_no_write(pool: Pool) -> None:
    tree = Tree(pool)
    node, core = open_new(pool)
    tree.set_attribute(node, b"user.kvfs.raw", b"1")
    pool.files.write(core.handle, 0, b"x")
    pool.files.close_write(core.handle)
    tree.set_attributes(node.node_id, mtime_ns=5)
    handle = pool.files.open_write(tree.node(node.node_id), truncate=False)
    core = Core(pool, handle)
    core.ask(10)
    assert tree.node(node.node_id).mtime_ns == 5
    pool.files.close_write(handle)
    assert tree.node(node.node_id).mtime_ns == 5


def test_renaming_over_a_file_adopts_what_was_written(pool: Pool) -> None:
    tree = Tree(pool)
    _, old = open_new(pool, "target")
    old.write(0, b"old")
    pool.files.close_write(old.handle)
    pool.sync()
    node, core = open_new(pool, "new")
    core.ask(10)
    core.write(0, b"new")
    tree.rename(1, "new", 1, "target", replace=True)
    assert core.revoked == 1
    assert content_of(pool, node) == b"new"
    pool.files.close_write(core.handle)


# --- digests


def spy_on_digests(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the blocks that are hashed in a second pass."""
    from kvfs import file_adoption as module

    made: list[int] = []
    compute = module._digests

    def count(addresses: object, lengths: np.ndarray) -> object:
        made.append(len(lengths))
        return compute(addresses, lengths)

    monkeypatch.setattr(module, "_digests", count)
    return made


def write_natively(core: Core, data: bytes, piece: int = MIB) -> None:
    core.ask(len(data))
    for start in range(0, len(data), piece):
        assert core.write(start, data[start : start + piece])


def test_digests_of_a_writer_in_order_spare_the_second_pass(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = spy_on_digests(pool, monkeypatch)
    data = random_bytes(9 * MIB + 777)
    node, core = open_new(pool)
    write_natively(core, data)
    pool.files.close_write(core.handle)
    assert made == []
    assert content_of(pool, node) == data


def test_blocks_written_between_grants_are_hashed_again(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = spy_on_digests(pool, monkeypatch)
    data = random_bytes(40 * MIB)
    node, core = open_new(pool)
    forwarded = [not core.write(i, data[i : i + MIB]) for i in range(0, len(data), MIB)]
    pool.files.close_write(core.handle)
    assert sum(made) >= sum(forwarded)
    assert content_of(pool, node) == data


HARMS = (
    "out of order", "overwritten", "cut", "contested", "unknown", "by another handle",
    "by itself, before", "cut while granted",
)  # fmt: skip


@pytest.mark.parametrize("harm", HARMS)
def test_digests_are_not_trusted(pool: Pool, monkeypatch: pytest.MonkeyPatch, harm: str) -> None:
    made = spy_on_digests(pool, monkeypatch)
    data = bytearray(random_bytes(8 * MIB))
    node, core = open_new(pool)
    other = Core(pool, pool.files.open_write(node, truncate=False))
    if harm == "contested":
        other.ask(10)
    write_natively(core, bytes(data))
    if harm == "out of order":
        data[5:9] = b"back"
        core.write(5, b"back")
    elif harm == "contested":
        data[5:9] = b"also"
        other.write(5, b"also")
    elif harm == "unknown":
        core.gives_digests = False
    elif harm == "by another handle":
        data[5:9] = b"late"
        pool.files.write(other.handle, 5, b"late")
    elif harm == "by itself, before":  # a write that was on its way here when the grant began
        data[5:9] = b"late"
        pool.files.write(core.handle, 5, b"late")
    elif harm == "cut while granted":
        pool.files.truncate(core.handle, 7 * MIB)
        pool.files.truncate(core.handle, 8 * MIB)
        data[7 * MIB :] = bytes(MIB)
    pool.files.hand_in(core.handle, core.revoke())
    if harm == "overwritten":
        data[3 * MIB + 5 : 3 * MIB + 9] = b"over"
        pool.files.write(core.handle, 3 * MIB + 5, b"over")
    elif harm == "cut":
        pool.files.truncate(core.handle, 6 * MIB + 5)
        pool.files.truncate(core.handle, 8 * MIB)
        data[6 * MIB + 5 :] = bytes(2 * MIB - 5)
    for handle in (other.handle, core.handle):
        pool.files.close_write(handle)
    assert sum(made) == {"overwritten": 1, "cut": 2}.get(harm, 8)
    assert content_of(pool, node) == data


def test_a_wrong_digest_is_found_at_the_first_read(pool: Pool) -> None:
    data = random_bytes(6 * MIB)
    _, core = open_new(pool)
    write_natively(core, data)
    handed = core.revoke()
    assert handed.digests is not None
    digests = handed.digests.copy()
    digests[2] ^= 1
    pool.files.hand_in(core.handle, HandedIn(handed.start_bytes, handed.end_bytes, digests))
    pool.files.close_write(core.handle)
    node = Tree(pool).lookup(1, "f")
    assert node is not None
    reader = pool.files.open_read(node)
    assert pool.files.read(reader, 0, MIB) == data[:MIB]
    with pytest.raises(DeviceError, match="verification failed"):
        pool.files.read(reader, 2 * MIB, 10)
    pool.files.close_read(reader)


def test_known_digests_by_block() -> None:
    def digests(*values: int) -> np.ndarray:
        return np.array([[value] * 16 for value in values], np.uint8)

    def known(lengths: list[int]) -> list[int]:
        found, is_known = table.of(np.array(lengths, np.uint64))
        return [int(d[0]) if k else 0 for d, k in zip(found, is_known, strict=True)]

    table = KnownDigests()
    table.take_in(HandedIn(0, 250, digests(1, 2, 3)), 100)
    assert known([100, 100, 50]) == [1, 2, 3]
    assert known([100, 100, 100, 100]) == [1, 2, 0, 0]  # the last has grown since
    table.take_in(HandedIn(250, 420, digests(4, 5)), 100)  # from block 3 on
    assert known([100, 100, 100, 100, 20]) == [1, 2, 0, 4, 5]
    table.take_in(HandedIn(), 100)
    assert len(table) == 4
    table.forget(150, 350, 100)
    assert known([100, 100, 100, 100, 20]) == [1, 0, 0, 0, 5]
    table.take_in(HandedIn(10, 20, None), 100)
    assert len(table) == 0
    table.take_in(HandedIn(0, 100, digests(1)), 100)
    table.take_in(None, 100)
    assert len(table) == 0
    for wrong in (digests(1), digests(1, 2, 3), np.zeros((2, 15), np.uint8)):
        table.take_in(HandedIn(0, 200, wrong), 100)
        assert len(table) == 0
    table.take_in(HandedIn(150, 180, np.zeros((0, 16), np.uint8)), 100)  # inside one block
    assert len(table) == 0
