"""Which lane an open file gets, and what the core is given; against a stand-in for the core."""

import errno
import os
import random
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvfs
from kvfs.engine.catalog_schema import Node, NodeState, Origin
from kvfs.file_reading import FileReader
from kvfs.fuse import lanes as lanes_module
from kvfs.fuse.core_messages import CLOSE_BRIEFLY, Kind
from kvfs.fuse.lane_plans import Lane
from kvfs.fuse.lanes import Lanes
from kvfs.pool import Pool
from tests.fuse.fake_core import FakeCore
from tests.fuse.mounting import MIB


@pytest.fixture
def core() -> Iterator[FakeCore]:
    core = FakeCore()
    try:
        yield core
    finally:
        core.close()


@pytest.fixture
def lanes(pool: Pool, core: FakeCore) -> Iterator[Lanes]:
    lanes = Lanes(pool.store, core.client, pool.clock, has_passthrough=True)
    try:
        yield lanes
    finally:
        lanes.stop()
        segments = [s for d in pool.store.state.devices for s in d.segments.values()]
        assert not any(segment.leases for segment in segments)


def make_file(pool: Pool, name: str, data: bytes) -> Node:
    space = pool.namespace("default").info
    node = pool.catalog.create_context(
        1, name, space.namespace_id, Origin.FILE, NodeState.PENDING,
        mode=0o644, uid=0, gid=0, now_ns=1,
    )  # fmt: skip
    handle = pool.files.open_write(node, truncate=True)
    for offset in range(0, len(data), MIB):
        pool.files.write(handle, offset, data[offset : offset + MIB])
    pool.files.close_write(handle)
    return pool.catalog.node(node.node_id)


def install(lanes: Lanes, fh: int, reader: FileReader) -> Lane:
    plan = lanes.plan(reader)
    if plan is not None and not lanes.is_vouched(plan):
        plan = lanes.vouched(plan)
    return Lane.NAMESPACE if plan is None else lanes.install(fh, 7, plan)


def test_small_file_is_read_by_the_core(pool: Pool, lanes: Lanes, core: FakeCore) -> None:
    data = random.Random(1).randbytes(3 * MIB + 5)
    reader = pool.files.open_read(make_file(pool, "f", data))
    assert install(lanes, 5, reader) is lanes.lane_of(5) is Lane.NATIVE
    assert core.read(5, 0, len(data)) == data
    assert core.read(5, MIB - 3, 10) == data[MIB - 3 : MIB + 7]
    # The fastest copy: in DRAM, if it was put there too.
    assert {device for device, _, _ in lanes._segments.places()} == {
        int(d) for d in pool.store.lookup(reader.namespace_id, reader.keys)["device"]
    }
    pool.files.close_read(reader)
    lanes.close(5)
    assert not core.tables


def test_large_file_is_read_by_the_kernel(pool: Pool, lanes: Lanes, core: FakeCore) -> None:
    data = random.Random(2).randbytes(9 * MIB + 5)
    reader = pool.files.open_read(make_file(pool, "f", data))
    assert install(lanes, 5, reader) is lanes.lane_of(5) is Lane.PASSTHROUGH
    fd = core.backings[5]
    assert os.pread(fd, len(data) + 1, 0) == data
    with pytest.raises(OSError, match="Bad file"):
        os.write(fd, b"x")
    lanes.reclaim()  # does not touch it
    assert lanes.lane_of(5) is Lane.PASSTHROUGH
    lanes.close(5)
    assert not core.backings
    # Where the kernel refuses, the core reads it; and nobody tries again.
    core.answers[Kind.BACKING] = lambda *_: (-errno.EPERM, b"")
    assert install(lanes, 6, reader) is Lane.NATIVE
    assert core.read(6, 5 * MIB, 100) == data[5 * MIB : 5 * MIB + 100]
    assert not lanes.has_passthrough
    pool.files.close_read(reader)


def test_what_the_kernel_reads_keeps_its_bytes(pool: Pool, lanes: Lanes, core: FakeCore) -> None:
    """Also when it is freed after the mount has ended, and a client has it open, too."""
    data = random.Random(2).randbytes(9 * MIB + 5)
    reader = pool.files.open_read(make_file(pool, "f", data))
    assert install(lanes, 5, reader) is Lane.PASSTHROUGH
    fd = os.dup(core.backings[5])
    state = pool.store.state
    for segment in (s for d in state.devices for s in d.segments.values()):
        segment.handle.is_shared = True
    lanes.close(5)
    pool.files.close_read(reader)
    state.names.forget_files(reader.keys)
    pool.store.drop(reader.namespace_id, reader.keys)
    state.free_drained()
    assert os.fstat(fd).st_nlink == 0
    assert os.pread(fd, len(data) + 1, 0) == data
    os.close(fd)


def test_file_is_verified_before_the_kernel_reads_it(tmp_path: Path, core: FakeCore) -> None:
    (tmp_path / "device").mkdir()
    url = f"dir:{tmp_path / 'device'}?size=128MiB&segment=16MiB"
    with kvfs.create_pool(tmp_path / "pool", [url]) as pool:
        make_file(pool, "good", bytes(8 * MIB))
        make_file(pool, "bad", b"x" * 8 * MIB)
    for path in (tmp_path / "device/segments").glob("*.file"):
        if path.read_bytes()[:1] == b"x":
            with path.open("r+b") as file:
                file.seek(5 * MIB)
                file.write(b"y")
    with kvfs.open_pool(tmp_path / "pool") as pool:
        lanes = Lanes(pool.store, core.client, pool.clock, has_passthrough=True)
        for name, lane in (("good", Lane.PASSTHROUGH), ("bad", Lane.NAMESPACE)):
            node = pool.catalog.lookup(1, name)
            assert node is not None
            reader = pool.files.open_read(node)
            plan = lanes.plan(reader)
            assert plan is not None
            assert not lanes.is_vouched(plan)
            lanes.release(plan)
            assert install(lanes, 1, reader) is lane
            pool.files.close_read(reader)
        lanes.stop()


def test_context_of_scattered_blocks(pool: Pool, lanes: Lanes, core: FakeCore) -> None:
    space = pool.namespace("m", kvfs.Layout("uint8", (100,), 50))
    stride = space.info.layout.stride
    keys, _ = space.keys(range(50 * 40))
    rows = np.random.default_rng(1).integers(0, 256, (40, 5000), np.uint8)
    order = np.random.default_rng(2).permutation(40)
    space.put(keys[order], rows[order])
    space.context("c").append(keys[:30], rows[:30])
    node = pool.catalog.resolve(space.info.root_node_id, "c")
    assert node is not None
    reader = pool.files.open_read(node)
    assert install(lanes, 1, reader) is Lane.NATIVE
    expected = bytes(pool.files.read(reader, 0, reader.size_bytes))
    assert core.read(1, 0, len(expected)) == expected
    assert len(expected) == 29 * stride + 5000
    # It grows: the table is made anew.
    space.context("c").append(keys[30:], rows[30:])
    pool.files.catch_up(reader)
    assert lanes.is_due(1, reader)
    assert install(lanes, 1, reader) is Lane.NATIVE
    assert not lanes.is_due(1, reader)
    assert core.read(1, 30 * stride, 10) == rows[30].tobytes()[:10]
    pool.files.close_read(reader)


def test_leases_end(
    pool: Pool, lanes: Lanes, core: FakeCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = pool.files.open_read(make_file(pool, "f", b"x" * MIB))

    def leases() -> int:
        segments = [s for d in pool.store.state.devices for s in d.segments.values()]
        return sum(segment.leases for segment in segments)

    assert install(lanes, 1, reader) is install(lanes, 2, reader) is Lane.NATIVE
    assert core.count(Kind.SEGMENT) == 1
    assert leases() == 1
    lanes.sweep()
    assert core.tables
    lanes.close(1)
    lanes.sweep()
    assert leases() == 1
    # Nobody has asked for a while.
    monkeypatch.setattr(lanes_module, "TABLE_NS", 0)
    lanes.sweep()
    assert not core.tables
    assert lanes.lane_of(2) is Lane.NAMESPACE
    assert lanes.is_due(2, reader)
    # A file that is opened again finds its segment there still; then it is given back.
    assert core.segments
    assert install(lanes, 2, reader) is Lane.NATIVE
    assert core.count(Kind.SEGMENT) == 1
    # A device needs room.
    assert pool.store.state.on_pressure is not None
    pool.store.state.on_pressure()
    assert not core.tables
    assert not core.segments
    assert not leases()
    pool.files.close_read(reader)


def test_core_that_refuses_or_keeps(
    pool: Pool, lanes: Lanes, core: FakeCore, expected_warnings: list[str]
) -> None:
    reader = pool.files.open_read(make_file(pool, "f", b"x" * MIB))
    core.answers[Kind.READ_END] = lambda *_: (-errno.EINVAL, b"")
    assert install(lanes, 1, reader) is Lane.NAMESPACE
    assert not lanes.is_due(1, reader)
    del core.answers[Kind.READ_END]
    assert install(lanes, 1, reader) is Lane.NATIVE
    # What the core may still read is not given back.
    core.answers[Kind.CLOSE] = lambda *_: (-errno.EBUSY, b"")
    expected_warnings.append("keeps what it reads")
    lanes.reclaim()
    assert core.segments
    assert sum(s.leases for d in pool.store.state.devices for s in d.segments.values()) == 1
    del core.answers[Kind.CLOSE]
    lanes.sweep()
    lanes.reclaim()
    assert not core.segments
    pool.files.close_read(reader)


def test_lane_of_a_file_closed_meanwhile(pool: Pool, lanes: Lanes, core: FakeCore) -> None:
    node = make_file(pool, "f", b"x" * MIB)
    reader = pool.files.open_read(node)
    plan = lanes.plan(reader)
    assert plan is not None
    pool.files.close_read(reader)
    lanes.close(1)
    assert not lanes.install_at_once(1, 7, plan)
    assert lanes.install(1, 7, plan) is Lane.NAMESPACE
    assert not core.tables
    # Nor at once, where the core has the segments already.
    other = pool.files.open_read(node)
    assert install(lanes, 2, other) is Lane.NATIVE
    reader = pool.files.open_read(node)
    plan = lanes.plan(reader)
    assert plan is not None
    pool.files.close_read(reader)
    assert not lanes.install_at_once(3, 7, plan)
    lanes.release(plan)
    assert list(core.tables) == [2]
    pool.files.close_read(other)


class Interposed:
    """A lock after whose first release something else happens at once."""

    def __init__(self, lock: Any, then: Callable[[], None]) -> None:
        self._lock, self._then = lock, [then]

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()
        if self._then:
            self._then.pop()()


def test_file_closed_when_its_table_has_just_come(
    pool: Pool, lanes: Lanes, core: FakeCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that installs after its request was given up does not give back what is another's.

    The segments are the other handle's still, and hold what it reads.
    """
    node = make_file(pool, "f", b"x" * MIB)
    reader, other = pool.files.open_read(node), pool.files.open_read(node)
    assert install(lanes, 1, other) is Lane.NATIVE
    plan = lanes.plan(reader)
    assert plan is not None

    def release() -> None:
        assert 2 in lanes._installed
        monkeypatch.undo()
        assert pool.files.close_read_at_once(reader)
        assert lanes.close_at_once(2)

    def note(*arguments: Any) -> bool:
        monkeypatch.setattr(lanes, "_lock", Interposed(lanes._lock, release))
        return real_note(*arguments)

    real_note = lanes._note
    monkeypatch.setattr(lanes, "_note", note)
    lanes.install(2, 7, plan)
    settled(lanes, core)
    assert list(core.tables) == [1]
    lanes._drop_segments(1 << 63)
    assert core.read(1, 0, MIB) == b"x" * MIB
    lanes.close(1)
    lanes._drop_segments(1 << 63)
    assert not core.segments
    pool.files.close_read(other)


def test_nothing_to_read_natively(pool: Pool, lanes: Lanes) -> None:
    reader = pool.files.open_read(make_file(pool, "f", b""))
    assert lanes.plan(reader) is None
    pool.files.close_read(reader)
    reader = pool.files.open_read(make_file(pool, "g", b"x" * MIB))
    pool.store.drop(reader.namespace_id, reader.keys)
    assert lanes.plan(reader) is None
    pool.files.close_read(reader)


def test_full_pool_takes_tables_back(tmp_path: Path, core: FakeCore) -> None:
    """What the core may read is leased, and still makes room."""
    with kvfs.create_pool(tmp_path / "pool", ["dram:?size=64MiB&segment=16MiB"]) as pool:
        lanes = Lanes(pool.store, core.client, pool.clock, has_passthrough=True)
        space = pool.namespace("m", kvfs.Layout("uint8", (1 << 20,), 1))
        block = np.zeros((1, 1 << 20), np.uint8)
        for number in range(200):
            block[0, :8] = np.frombuffer(number.to_bytes(8, "little"), np.uint8)
            context = space.context(f"c{number}")
            context.append(space.keys([number])[0], block)
            node = pool.catalog.resolve(space.info.root_node_id, f"c{number}")
            assert node is not None
            reader = pool.files.open_read(node)
            assert install(lanes, number + 1, reader) is Lane.NATIVE
            assert core.read(number + 1, 0, 8) == block[0, :8].tobytes()
            pool.files.close_read(reader)  # the lane outlives it for now
        assert pool.statistics().counters["segments_evicted"] > 5
        lanes.stop()


class HeldElsewhere:
    """Holds a lock in another thread."""

    def __init__(self, lock: Any) -> None:
        self._lock, self._is_held, self._is_over = lock, threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._hold)

    def __enter__(self) -> None:
        self._thread.start()
        assert self._is_held.wait(10)

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _hold(self) -> None:
        with self._lock:
            self._is_held.set()
            self._is_over.wait(10)


def at_once(lanes: Lanes, fh: int, reader: FileReader) -> bool:
    """Install without waiting, as an open does; what cannot be is let go of."""
    plan = lanes.plan(reader)
    assert plan is not None
    if lanes.install_at_once(fh, 7, plan):
        return True
    lanes.release(plan)
    return False


def settled(lanes: Lanes, core: FakeCore) -> None:
    """Take note of the answers to all that was said."""
    core.client.status()
    lanes.sweep()


def test_table_without_waiting(pool: Pool, lanes: Lanes, core: FakeCore) -> None:
    data = random.Random(1).randbytes(3 * MIB + 5)
    reader = pool.files.open_read(make_file(pool, "f", data))
    # The core has to be given the segment first, which is waited for.
    assert not at_once(lanes, 1, reader)
    assert not core.said
    assert install(lanes, 1, reader) is Lane.NATIVE
    assert at_once(lanes, 2, reader)
    assert lanes.lane_of(2) is Lane.NATIVE
    assert not at_once(lanes, 2, reader)  # it has one
    settled(lanes, core)
    assert core.read(2, 5, 2 * MIB) == data[5 : 5 + 2 * MIB]
    assert lanes.close_at_once(2)
    assert lanes.close_at_once(3)  # nothing to do
    assert lanes.lane_of(2) is Lane.NAMESPACE
    settled(lanes, core)
    assert list(core.tables) == [1]
    # Room is made although nobody has asked for the answer yet.
    assert lanes.close_at_once(1)
    lanes.reclaim()
    assert not core.segments
    pool.files.close_read(reader)


def test_at_once_does_not_wait(pool: Pool, lanes: Lanes, core: FakeCore) -> None:
    reader = pool.files.open_read(make_file(pool, "f", b"x" * MIB))
    assert install(lanes, 1, reader) is Lane.NATIVE
    plan = lanes.plan(reader)
    assert plan is not None
    said = len(core.said)
    for lock in (lanes._lock, pool.store.state.lock, core.client._lock):
        with HeldElsewhere(lock):
            assert not lanes.install_at_once(2, 7, plan)
            assert lanes.close_at_once(1) is (lock is not lanes._lock)
            if lock is pool.store.state.lock:
                assert not pool.files.close_read_at_once(reader)
    assert [kind for kind, _ in core.said[said:]] == [Kind.CLOSE]
    lanes.release(plan)
    assert pool.files.close_read_at_once(reader)
    assert reader.is_closed


def test_kernel_lanes_are_waited_for(pool: Pool, lanes: Lanes, core: FakeCore) -> None:
    reader = pool.files.open_read(make_file(pool, "f", random.Random(2).randbytes(9 * MIB)))
    assert not at_once(lanes, 1, reader)
    assert install(lanes, 1, reader) is Lane.PASSTHROUGH
    assert not lanes.close_at_once(1)
    lanes.close(1)
    assert not core.backings
    pool.files.close_read(reader)


def test_late_refusals(pool: Pool, lanes: Lanes, core: FakeCore) -> None:
    reader = pool.files.open_read(make_file(pool, "f", b"x" * MIB))
    assert install(lanes, 1, reader) is Lane.NATIVE
    core.answers[Kind.READ_END] = lambda *_: (-errno.ENFILE, b"")
    assert at_once(lanes, 2, reader)
    settled(lanes, core)
    assert lanes.lane_of(2) is Lane.NAMESPACE
    assert not lanes.is_due(2, reader)  # not again at once
    del core.answers[Kind.READ_END]
    lanes.sweep()  # what the core may have of it is taken back
    assert (Kind.CLOSE, 2) in core.said
    # What the core may still read is not given back, and tried again.
    core.answers[Kind.CLOSE] = lambda *_: (-errno.EBUSY, b"")
    assert lanes.close_at_once(1)
    core.client.status()
    lanes.reclaim()
    assert core.segments
    del core.answers[Kind.CLOSE]
    lanes.sweep()
    lanes.reclaim()
    assert not core.segments
    pool.files.close_read(reader)


def test_a_close_that_nobody_waits_for_does_not_wait(
    pool: Pool, lanes: Lanes, core: FakeCore, expected_warnings: list[str]
) -> None:
    """Else the core's answers to pings would queue behind those of many files that stall."""
    expected_warnings.append("keeps what it reads")
    reader = pool.files.open_read(make_file(pool, "f", b"x" * MIB))
    assert install(lanes, 1, reader) is Lane.NATIVE
    payloads: list[bytes] = []

    def refuse(_: int, payload: bytes) -> tuple[int, bytes]:
        payloads.append(payload)
        return -errno.EBUSY, b""

    core.answers[Kind.CLOSE] = refuse
    assert lanes.close_at_once(1)
    settled(lanes, core)
    lanes.sweep()
    assert len(payloads) >= 2
    assert set(payloads) == {struct.pack("<II", 0, CLOSE_BRIEFLY)}
    del core.answers[Kind.CLOSE]
    lanes.sweep()
    assert not core.tables
    pool.files.close_read(reader)


def test_core_that_ends_before_it_answers(pool: Pool, lanes: Lanes, core: FakeCore) -> None:
    reader = pool.files.open_read(make_file(pool, "f", b"x" * MIB))
    assert install(lanes, 1, reader) is install(lanes, 2, reader) is Lane.NATIVE
    core.answers[Kind.CLOSE] = lambda *_: None
    assert lanes.close_at_once(1)
    lanes.stop()
    assert not lanes.close_at_once(2) or lanes.lane_of(2) is Lane.NAMESPACE
    assert not sum(s.leases for d in pool.store.state.devices for s in d.segments.values())
    pool.files.close_read(reader)
