"""Files below the mount: failures, lost blocks, and many threads at once. Needs no FUSE."""

import contextlib
import random
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import kvfs
from kvfs.engine.catalog_schema import Node, NodeState
from kvfs.errors import DeviceError
from kvfs.file_contents import Adopted
from kvfs.pool import Pool
from kvfs.tree import Tree
from tests.fuse.mounting import MIB, wait_until


def write(pool: Pool, name: str, data: bytes) -> Node:
    """Write a file as the mount does."""
    tree, files = Tree(pool), pool.files
    node = tree.lookup(1, name) or tree.create_file(1, name, 0o644, 0, 0)
    handle = files.open_write(node, truncate=True)
    try:
        for start in range(0, len(data), MIB):
            files.write(handle, start, data[start : start + MIB])
        files.flush(handle)
    finally:
        files.close_write(handle)
    return tree.node(node.node_id)


def read(pool: Pool, name: str) -> bytes | None:
    """Return a file's content, None if it is absent."""
    node = Tree(pool).lookup(1, name)
    if node is None:
        return None
    reader = pool.files.open_read(node)
    try:
        return bytes(pool.files.read(reader, 0, reader.size_bytes))
    finally:
        pool.files.close_read(reader)


def leases(pool: Pool) -> int:
    devices = pool.store.state.devices
    return sum(s.leases for device in devices for s in device.segments.values())


@pytest.mark.parametrize("size", [1000, 5 * MIB])
def test_failed_write_leaves_former_content(
    pool: Pool, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    old = random.Random(1).randbytes(size)
    write(pool, "f", old)

    def fail(*_: object) -> None:
        raise OSError(5, "injected")

    for former, name in ((old, "f"), (None, "new")):
        with monkeypatch.context() as patch:
            patch.setattr(pool.files.staging, "write", fail)
            with pytest.raises(DeviceError, match="write failed"):
                write(pool, name, b"x" * size)
        assert read(pool, name) == former
        assert pool.files.writer_of(1) is None
    pool.sync()
    assert read(pool, "f") == old
    assert read(pool, "new") is None


@pytest.mark.parametrize("size", [1000, 5 * MIB])
def test_failed_adoption_leaves_former_content(
    pool: Pool, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    old = random.Random(1).randbytes(size)
    write(pool, "f", old)

    def fail(*_: object, **__: object) -> None:
        raise kvfs.NoSpaceError("injected")

    for former, name in ((old, "f"), (None, "new")):
        with monkeypatch.context() as patch:
            patch.setattr(pool.store, "put", fail)
            patch.setattr(pool.store, "adopt", fail)
            with pytest.raises(kvfs.NoSpaceError):
                write(pool, name, b"x" * size)
        assert read(pool, name) == former
    used = pool.store.state.devices[0].device.used_bytes
    write(pool, "new", b"y" * size)
    assert read(pool, "new") == b"y" * size
    Tree(pool).remove_file(1, "new")
    assert pool.store.state.devices[0].device.used_bytes <= max(used, 16 * MIB)


def test_failed_persist_of_the_staging_file(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(5, "injected")

    monkeypatch.setattr(pool.store.state.devices[0].device, "persist_staging", fail)
    with pytest.raises(DeviceError, match="persist failed"):
        write(pool, "f", b"x" * (5 * MIB))
    assert read(pool, "f") is None


def test_failed_flush_gives_up_new_content_only(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a failed persist lost was never named; what it replaces still is."""
    write(pool, "f", b"old")
    pool.sync()
    store = pool.store
    with monkeypatch.context() as patch:

        def fail() -> None:
            for adopted in list(pool.files._adopted.values()):
                store.drop(adopted.namespace_id, adopted.keys)
            raise DeviceError("injected")

        patch.setattr(store, "flush", fail)
        with pytest.raises(DeviceError):
            write_and_publish(pool, {"f": b"new", "g": b"new"})
    assert read(pool, "f") == b"old"
    assert read(pool, "g") is None
    pool.sync()


def write_and_publish(pool: Pool, contents: dict[str, bytes]) -> None:
    for name, data in contents.items():
        write(pool, name, data)
    pool.files.publish()


def test_new_content_is_served_before_and_after_it_is_named(pool: Pool) -> None:
    node = write(pool, "f", b"one")
    assert node.size_bytes == 3
    for data in (b"four", b"sixteen bytes   "):
        write(pool, "f", data)
        node = Tree(pool).node(node.node_id)
        assert node.size_bytes == len(data)
        assert read(pool, "f") == data
    pool.sync()
    assert not pool.files.has_unpublished
    row = pool.catalog.node(node.node_id)
    assert (row.state, row.size_bytes) == (NodeState.ACTIVE, 16)
    assert read(pool, "f") == data


@pytest.mark.parametrize("size", [5000, 9 * MIB], ids=["log", "segment"])
def test_stat_shows_what_was_closed(pool: Pool, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """At every moment of an adoption, and by a row that was read before it was named."""
    files, shown = pool.files, []
    note_adopted = files._note_adopted

    def note(adopted: Adopted) -> None:
        shown.append(files.current(pool.catalog.node(adopted.node_id)).size_bytes)
        note_adopted(adopted)
        shown.append(files.current(pool.catalog.node(adopted.node_id)).size_bytes)

    monkeypatch.setattr(files, "_note_adopted", note)
    rows = []
    for nbytes in (size, size + 1):
        node = Tree(pool).lookup(1, "f")
        rows += [] if node is None else [pool.catalog.node(node.node_id)]
        node = write(pool, "f", bytes(nbytes))
        rows.append(pool.catalog.node(node.node_id))
        files.publish()
        assert shown == [nbytes, nbytes]
        assert {files.current(row).size_bytes for row in rows} == {nbytes}
        shown.clear()
    # A later change of the row counts.
    named = Tree(pool).set_attributes(node.node_id, mtime_ns=77)
    assert files.current(pool.catalog.node(node.node_id)).mtime_ns == named.mtime_ns == 77


def test_lost_block_takes_the_name(pool: Pool) -> None:
    data = random.Random(2).randbytes(3 * MIB)
    for is_published in (False, True):
        node = write(pool, "f", data)
        if is_published:
            pool.sync()
        reader = pool.files.open_read(node)
        pool.store.drop(node.namespace_id, reader.keys[1:2])
        assert pool.files.read(reader, 0, MIB) == data[:MIB]
        with pytest.raises(kvfs.MediaError):
            pool.files.read(reader, MIB, 10)
        assert Tree(pool).lookup(1, "f") is None
        pool.files.close_read(reader)
        assert leases(pool) == 0
        assert pool.store.match_prefix(node.namespace_id, reader.keys) == 0


def test_rotten_byte_takes_the_name_and_is_never_served(tmp_path: Path) -> None:
    (tmp_path / "device").mkdir()
    url = f"dir:{tmp_path / 'device'}?size=128MiB&segment=16MiB"
    data = random.Random(3).randbytes(3 * MIB)
    with kvfs.create_pool(tmp_path / "pool", [url]) as pool:
        write(pool, "f", data)
        write(pool, "g", data)
    [segment] = (tmp_path / "device/segments").glob("*.seg")
    with segment.open("r+b") as file:
        file.seek(MIB + 17)
        byte = file.read(1)[0]
        file.seek(MIB + 17)
        file.write(bytes([byte ^ 1]))
    with kvfs.open_pool(tmp_path / "pool") as pool:
        node = Tree(pool).lookup(1, "f")
        assert node is not None
        reader = pool.files.open_read(node)
        assert pool.files.read(reader, 2 * MIB, MIB) == data[2 * MIB :]
        with pytest.raises(kvfs.MediaError, match="verification failed"):
            pool.files.read(reader, 0, 3 * MIB)
        pool.files.close_read(reader)
        assert Tree(pool).lookup(1, "f") is None
        assert read(pool, "g") == data


def test_window_is_let_go(pool: Pool) -> None:
    node = write(pool, "f", b"x" * (3 * MIB))
    reader = pool.files.open_read(node)
    pool.files.read(reader, 0, MIB)
    assert leases(pool) > 0
    now = pool.clock.monotonic_ns()
    pool.files.release_idle(reader, reader.window.used_ns if reader.window else now)
    assert leases(pool) > 0
    pool.files.release_idle(reader, now + 1)
    assert leases(pool) == 0
    target = memoryview(bytearray(100))
    assert pool.files.read_into(reader, 5, target) == 100
    assert pool.files.read_nowait(reader, 3 * MIB - 50, target) == 50
    assert pool.files.read_nowait(reader, 3 * MIB, target) == 0
    assert bytes(target[:50]) == b"x" * 50
    pool.files.close_read(reader)
    assert leases(pool) == 0
    with pytest.raises(kvfs.ClosedError):
        pool.files.read(reader, 0, 10)
    assert leases(pool) == 0


def test_reads_across_windows(pool: Pool) -> None:
    space = pool.namespace("small", kvfs.Layout("uint8", (4000,), 1))
    keys, _ = space.keys(range(2500))
    rows = np.random.default_rng(1).integers(0, 256, (2500, 4000), np.uint8)
    space.context("c").append(keys, rows)
    node = space.context("c").node
    whole = np.zeros((2500, 4096), np.uint8)
    whole[:, :4000] = rows
    reader = pool.files.open_read(node)
    size = 2499 * 4096 + 4000
    assert pool.files.read(reader, 0, 1 << 30) == whole.tobytes()[:size]
    rng = random.Random(4)
    for _ in range(200):
        offset, count = rng.randrange(size), rng.randrange(1, 100_000)
        wanted = whole.ravel()[offset : min(size, offset + count)]
        assert pool.files.read(reader, offset, count) == wanted.tobytes()
    pool.files.close_read(reader)


def test_eviction_of_a_file_that_is_being_rewritten(pool: Pool) -> None:
    node = write(pool, "f", b"x" * (3 * MIB))
    pool.sync()
    handle = pool.files.open_write(node, truncate=True)
    pool.files.write(handle, 0, b"new")
    lost = pool.store.state.names.forget_files(pool.catalog.keys(node.node_id)[:1])
    assert len(lost) == 1
    pool.store.drop(node.namespace_id, lost[0])
    with pytest.raises(kvfs.BusyError):
        pool.files.open_read(node)
    pool.files.flush(handle)
    pool.files.close_write(handle)
    assert read(pool, "f") == b"new"
    pool.sync()
    assert read(pool, "f") == b"new"


def test_dropped_namespace_under_open_files(pool: Pool) -> None:
    tree, files = Tree(pool), pool.files
    directory = tree.make_directory(1, "ns", 0o755, 0, 0)
    node = tree.create_file(directory.node_id, "f", 0o644, 0, 0)
    handle = files.open_write(node, truncate=True)
    files.write(handle, 0, b"x" * 10)
    files.flush(handle)
    reader = files.open_read(node)
    files.write(handle, 0, b"y")
    pool.drop_namespace("ns")
    files.flush(handle)
    files.close_write(handle)
    with pytest.raises(kvfs.NotFoundError):
        files.read(reader, 0, 10)
    files.close_read(reader)
    assert leases(pool) == 0
    assert tree.lookup(1, "ns") is None


class Chaos:
    """Writers, readers, renames and removals at once, on files whose content can be checked."""

    # What is being written takes space too, so that a pool this small may refuse.
    FINE = (kvfs.NotFoundError, kvfs.BusyError, kvfs.ExistsError, kvfs.NoSpaceError)
    NAMES = tuple(f"f{i}" for i in range(60))
    JOBS = (("write",), ("write", "move"), ("read",), ("read",), ("remove", "sync", "read"))

    def __init__(self, pool: Pool, seed: int) -> None:
        self.pool = pool
        self.tree = Tree(pool)
        self.is_over = threading.Event()
        self.failures: list[BaseException] = []
        # Who writes one file at once gets what they wrote mixed, as on any file system.
        self._writing = {name: threading.Lock() for name in self.NAMES}
        self._threads = [
            threading.Thread(target=self._run, args=(kinds, random.Random(seed + i)))
            for i, kinds in enumerate(self.JOBS)
        ]

    def run_until(self, condition: Callable[[], bool], what: str) -> None:
        for thread in self._threads:
            thread.start()
        try:
            wait_until(lambda: self.is_over.is_set() or condition(), what)
        finally:
            self.is_over.set()
            for thread in self._threads:
                thread.join()
        if self.failures:
            raise self.failures[0]

    def check(self, pool: Pool, name: str) -> None:
        data = read(pool, name)
        if data:
            assert data == self.content(int.from_bytes(data[:8], "little"))

    @staticmethod
    def content(number: int) -> bytes:
        rng = random.Random(number)
        body = rng.randbytes(rng.choice((10, 5000, MIB, 3 * MIB + 7, 6 * MIB)))
        return number.to_bytes(8, "little") + body

    def _run(self, kinds: tuple[str, ...], rng: random.Random) -> None:
        try:
            while not self.is_over.is_set():
                with contextlib.suppress(*self.FINE):
                    self._step(rng.choice(kinds), rng)
        except BaseException as error:  # noqa: BLE001 - raised again by run_until
            self.failures.append(error)
            self.is_over.set()

    def _step(self, kind: str, rng: random.Random) -> None:
        name = rng.choice(self.NAMES)
        temporary = f"tmp-{threading.get_ident()}"
        match kind:
            case "write":
                content = self.content(rng.randrange(1000))
                with self._writing[name]:
                    write(self.pool, name, content)
            case "read":
                self.check(self.pool, name)
            case "move":
                write(self.pool, temporary, self.content(rng.randrange(1000)))
                self.tree.rename(1, temporary, 1, name, replace=True)
            case "remove":
                self.tree.remove_file(1, name)
            case _:
                self.pool.sync()


def test_whole_or_absent_under_threads(tmp_path: Path, seed: int) -> None:
    """In a pool that is too small for what is done to it."""
    (tmp_path / "device").mkdir()
    devices = [
        f"dir:{tmp_path / 'device'}?size=64MiB&segment=16MiB", "dram:?size=64MiB&segment=16MiB",
    ]  # fmt: skip
    pool = kvfs.create_pool(tmp_path / "pool", devices)
    chaos = Chaos(pool, seed)
    counters = pool.store.state.counters
    chaos.run_until(lambda: counters.snapshot()["files_evicted"] > 5, "files evicted")
    assert counters.snapshot()["checksum_errors"] == counters.snapshot()["media_errors"] == 0
    for name in chaos.NAMES:
        chaos.check(pool, name)
    assert leases(pool) == 0
    assert not pool.store.state.pins
    pool.close()
    with kvfs.open_pool(tmp_path / "pool") as again:
        for name in chaos.NAMES:
            chaos.check(again, name)
