"""Views of scattered content, with a stand-in for the core and for the filesystem's cloning."""

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import kvfs
from kvfs.clock import ManualClock
from kvfs.devices import reflink
from kvfs.devices.reflink import Cloning, Extent
from kvfs.file_reading import FileReader
from kvfs.fuse import lanes as lanes_module
from kvfs.fuse import reflink_views
from kvfs.fuse.core_messages import Kind
from kvfs.fuse.lane_plans import Lane
from kvfs.fuse.lanes import Lanes
from kvfs.fuse.reflink_views import LINGER_NS, RETRY_NS, extents_of
from kvfs.namespace import Namespace
from tests.fuse.fake_core import FakeCore

BLOCK = 512 << 10
LAYOUT = kvfs.Layout("uint8", (BLOCK,), 1)
ODD = kvfs.Layout("uint8", (BLOCK - 1000,), 1)  # in strides of BLOCK


def copied(fd: int, extent: Extent) -> None:
    """Do what cloning does, and refuse what it refuses, where no filesystem here can."""
    end = os.fstat(extent.fd).st_size
    is_tail = extent.offset + extent.nbytes == end
    if extent.offset % 4096 or extent.target % 4096 or (extent.nbytes % 4096 and not is_tail):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    assert extent.offset + extent.nbytes <= end
    assert os.pwrite(fd, os.pread(extent.fd, extent.nbytes, extent.offset), extent.target)


@pytest.fixture(autouse=True)
def _cloning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reflink, "clone", copied)
    monkeypatch.setattr(reflink, "probe", lambda *_: Cloning(4096, of_written=True))


class Bench:
    """A pool of one directory, its lanes, and contexts with what they hold."""

    def __init__(self, base: Path, mib: int = 128, dram_mib: int = 0) -> None:
        (base / "device").mkdir(exist_ok=True)
        self.base, self.clock = base, ManualClock()
        self.devices = [f"dir:{base / 'device'}?size={mib}MiB&segment=16MiB"]
        if dram_mib:
            self.devices.append(f"dram:?size={dram_mib}MiB&segment=16MiB")
        self.core: FakeCore
        self.lanes: Lanes
        self._handles = 0
        self.start()

    def start(self) -> None:
        path = self.base / "pool"
        is_new = not path.exists()
        self.pool = kvfs.create_pool(path, self.devices) if is_new else kvfs.open_pool(path)
        self.core = FakeCore()
        self.lanes = Lanes(self.pool.store, self.core.client, self.clock, has_passthrough=True)

    def close(self) -> None:
        self.lanes.stop()
        self.core.close()
        leases = self.leases()
        self.pool.close()
        assert not leases

    def leases(self) -> int:
        segments = [s for d in self.pool.store.state.devices for s in d.segments.values()]
        return sum(segment.leases for segment in segments)

    def scatter(
        self, name: str, count: int, layout: kvfs.Layout = LAYOUT, tail: int = 0
    ) -> tuple[Namespace, bytes]:
        """Make a context of blocks that lie in disorder; return what it reads as."""
        space = self.pool.namespace("m", layout)
        width = layout.token_shape[0]
        seed = sum(name.encode())
        keys, _ = space.keys(range(seed * 1000, seed * 1000 + count))
        rows = np.random.default_rng(seed).integers(0, 256, (count, width), np.uint8)
        order = np.random.default_rng(seed + 1).permutation(count - 1)
        space.put(keys[order], rows[order])
        data = [*rows[:-1], rows[-1][: tail or width]]
        space.context(name).append(keys, data)
        self.pool.sync()
        whole = b"".join(row.tobytes().ljust(BLOCK, b"\0") for row in data[:-1])
        return space, whole + data[-1].tobytes()

    def open(self, name: str) -> FileReader:
        root = self.pool.namespace("m").info.root_node_id
        node = self.pool.catalog.resolve(root, name)
        assert node is not None
        return self.pool.files.open_read(node)

    def install(self, reader: FileReader) -> tuple[int, Lane]:
        """Open as a mount does."""
        lanes = self.lanes
        self._handles += 1
        plan = lanes.plan(reader)
        if plan is not None and not lanes.is_vouched(plan):
            plan = lanes.vouched(plan)
        lanes.views.note_open(reader)
        fh = self._handles
        return fh, Lane.NAMESPACE if plan is None else lanes.install(fh, 7, plan)

    def opened(self, name: str) -> tuple[int, Lane]:
        """Open, and leave the handle to the lane alone."""
        reader = self.open(name)
        result = self.install(reader)
        self.pool.files.close_read(reader)
        return result

    def view(self, name: str) -> tuple[int, int]:
        """Open twice; return the handle that is passed through, and the file."""
        assert self.opened(name)[1] is not Lane.PASSTHROUGH
        fh, lane = self.opened(name)
        assert lane is Lane.PASSTHROUGH
        return fh, self.core.backings[fh]


@pytest.fixture
def make_bench(tmp_path: Path) -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def make(**options: int) -> Bench:
        made.append(Bench(tmp_path, **options))
        return made[-1]

    yield make
    for bench in made:
        bench.close()


@pytest.fixture
def bench(make_bench: Callable[..., Bench]) -> Bench:
    return make_bench()


def content(fd: int) -> bytes:
    nbytes = os.fstat(fd).st_size
    return os.pread(fd, nbytes + 1, 0)


@pytest.mark.parametrize("layout", [LAYOUT, ODD])
@pytest.mark.parametrize("tail", [0, 12_345, 8192])
def test_second_open_gets_a_view(bench: Bench, layout: kvfs.Layout, tail: int) -> None:
    _, data = bench.scatter("c", 40, layout, tail)
    fh, fd = bench.view("c")
    assert content(fd) == data
    with pytest.raises(OSError, match="Bad file"):
        os.write(fd, b"x")
    assert os.readlink(f"/proc/self/fd/{fd}").endswith("(deleted)")
    other, lane = bench.opened("c")
    assert lane is Lane.PASSTHROUGH
    assert os.fstat(bench.core.backings[other]).st_ino == os.fstat(fd).st_ino
    assert bench.lanes.views.snapshot() == {
        "views_built": 1, "views_failed": 0, "views": 1, "views_cached": 0,
        "view_bytes": len(data),
    }  # fmt: skip
    bench.lanes.close(fh)
    bench.lanes.close(other)
    assert bench.lanes.views.snapshot()["views_cached"] == 1


def test_what_an_open_would_get_is_told_and_costs_nothing(bench: Bench) -> None:
    bench.scatter("c", 20)
    reader = bench.open("c")
    for _ in range(3):
        plan = bench.lanes.plan(reader)
        assert plan is not None
        assert plan.lane is Lane.NATIVE
        bench.lanes.release(plan)
    bench.opened("c")
    plan = bench.lanes.plan(reader)
    assert plan is not None
    assert plan.lane is Lane.PASSTHROUGH
    bench.lanes.release(plan)
    plan = bench.lanes.plan(reader, may_pass=False)
    assert plan is not None
    assert plan.lane is Lane.NATIVE
    bench.lanes.release(plan)
    bench.pool.files.close_read(reader)
    assert bench.lanes.views.snapshot()["views_built"] == 0


def test_runs_are_cloned_whole(bench: Bench) -> None:
    space = bench.pool.namespace("m", LAYOUT)
    keys, _ = space.keys(range(20))
    rows = np.random.default_rng(3).integers(0, 256, (20, BLOCK), np.uint8)
    space.put(keys[8:], rows[8:])
    space.context("c").append(keys, rows)
    bench.pool.sync()
    reader = bench.open("c")
    lease = bench.pool.store.lease(reader.namespace_id, reader.keys)
    device = bench.pool.store.state.devices[0]
    extents = extents_of(reader, lease, device.info)
    assert extents is not None
    assert [(e.target, e.nbytes) for e in extents] == [(0, 8 * BLOCK), (8 * BLOCK, 12 * BLOCK)]
    # What is still written is not shared where that breaks a promise, nor what is not persisted.
    elsewhere = Cloning(4096, of_written=False)
    object.__setattr__(device.info, "cloning", elsewhere)
    assert extents_of(reader, lease, device.info) is None
    object.__setattr__(device.info, "cloning", Cloning(BLOCK * 2))
    assert extents_of(reader, lease, device.info) is None
    object.__setattr__(device.info, "cloning", Cloning(4096, of_written=True))
    [part] = lease.parts
    part.segment.persisted_count -= 1
    assert extents_of(reader, lease, device.info) is None
    part.segment.persisted_count += 1
    bench.pool.store.release(lease)
    bench.pool.files.close_read(reader)


def test_small_or_finely_scattered_content_gets_none(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.scatter("small", 7)
    bench.scatter("fine", 40)
    monkeypatch.setattr(reflink_views, "RUN_BYTES_MIN", 2 * BLOCK)
    for _ in range(3):
        assert bench.opened("small")[1] is bench.opened("fine")[1] is Lane.NATIVE


def test_appended_content_gets_another_view(bench: Bench) -> None:
    space, data = bench.scatter("c", 20)
    fh, fd = bench.view("c")
    context = space.context("c")
    keys, _ = space.keys(range(1000), context.keys[-1].tobytes())
    more = np.random.default_rng(5).integers(0, 256, (4, BLOCK), np.uint8)
    context.append(keys[:4], more)
    bench.pool.sync()
    new, later = bench.view("c")
    assert content(later) == data + more.tobytes()
    assert content(fd) == data
    assert bench.lanes.views.snapshot()["views"] == 2
    bench.lanes.close(fh)
    bench.lanes.close(new)


def test_what_lies_in_memory_is_read_there(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(dram_mib=64)
    space, data = bench.scatter("c", 20)
    for _ in range(3):
        fh, lane = bench.opened("c")
        assert lane is Lane.NATIVE
        bench.lanes.close(fh)
    # Once a part of it is read from the device anyway, all of it can be.
    state = bench.pool.store.state
    memory = next(d for d in state.devices if not d.info.is_persistent)
    keys = space.context("c").keys
    bench.lanes.reclaim()
    state.forget(space.info.namespace_id, state.index(space.info.namespace_id).lookup(
        np.ascontiguousarray(keys[5:6]), memory.info.index))  # fmt: skip
    fh, lane = bench.opened("c")
    assert lane is Lane.PASSTHROUGH
    assert content(bench.core.backings[fh]) == data


def test_eviction_under_a_view(make_bench: Callable[..., Bench]) -> None:
    """What an open view shares stays; what a cached one shares makes room."""
    bench = make_bench(mib=64)
    _, data = bench.scatter("c", 40)
    bench.scatter("d", 40)
    fh, fd = bench.view("c")
    other, _ = bench.view("d")
    bench.lanes.close(other)
    held = [s for d in bench.pool.store.state.devices for s in d.segments.values() if s.leases]
    assert len(held) >= 3
    for number in range(12):
        bench.scatter(f"x{number}", 16)
    assert bench.pool.statistics().counters["segments_evicted"] > 5
    assert bench.lanes.views.snapshot()["views"] == 1
    assert content(fd) == data
    statistics = bench.pool.statistics().devices[0]
    assert statistics.used_bytes <= statistics.capacity_bytes
    bench.lanes.close(fh)


def test_relocation_under_a_view(bench: Bench) -> None:
    """Blocks that are copied elsewhere meanwhile are still there, in the view and outside."""
    space, data = bench.scatter("c", 20)
    bench.opened("c")
    reader = bench.open("c")
    fh, lane = bench.install(reader)
    assert lane is Lane.PASSTHROUGH
    fd = bench.core.backings[fh]
    # The reader pins: whatever is evicted around it is copied.
    for number in range(20):
        bench.scatter(f"x{number}", 16)
    assert content(fd) == data
    assert bytes(bench.pool.files.read(reader, 0, len(data))) == data
    bench.pool.files.close_read(reader)
    bench.lanes.close(fh)
    bench.lanes.reclaim()
    assert bench.opened("c")[1] is not Lane.NAMESPACE
    assert space.context("c").resident_blocks == 20


def test_pressure_ends_cached_views(bench: Bench) -> None:
    bench.scatter("c", 20)
    fh, _ = bench.view("c")
    bench.lanes.reclaim()
    assert bench.lanes.views.snapshot()["views"] == 1
    bench.lanes.close(fh)
    assert bench.lanes.views.snapshot()["views_cached"] == 1
    assert bench.leases()
    assert bench.pool.store.state.on_pressure is not None
    bench.pool.store.state.on_pressure()
    assert bench.lanes.views.snapshot()["views"] == 0
    assert not bench.leases()


def test_time_ends_cached_views(bench: Bench) -> None:
    bench.scatter("c", 20)
    fh, _ = bench.view("c")
    bench.clock.advance(LINGER_NS)
    bench.lanes.sweep()
    assert bench.lanes.views.snapshot()["views"] == 1
    bench.lanes.close(fh)
    bench.clock.advance(LINGER_NS - 1)
    bench.lanes.sweep()
    assert bench.lanes.views.snapshot()["views"] == 1
    bench.clock.advance(1)
    bench.lanes.sweep()
    assert bench.lanes.views.snapshot()["views"] == 0


def test_few_views_are_kept(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "abc":
        bench.scatter(name, 20)
        fh, _ = bench.view(name)
        bench.lanes.close(fh)
    # A quarter of 128 MiB holds three of them.
    assert bench.lanes.views.snapshot()["views"] == 3
    bench.scatter("d", 20)
    bench.lanes.close(bench.view("d")[0])
    assert bench.lanes.views.snapshot()["views"] == 3
    monkeypatch.setattr(reflink_views, "VIEWS_MAX", 1)
    bench.lanes.close(bench.opened("d")[0])
    assert bench.lanes.views.snapshot()["views"] == 1
    assert bench.opened("d")[1] is Lane.PASSTHROUGH
    assert bench.lanes.views.snapshot()["views_built"] == 4


def test_device_out_of_service(bench: Bench) -> None:
    _, data = bench.scatter("c", 20)
    fh, fd = bench.view("c")
    reader = bench.open("c")
    bench.pool.store.state.devices[0].is_offline = True
    assert bench.install(reader)[1] is Lane.NAMESPACE
    bench.pool.files.close_read(reader)
    bench.lanes.sweep()
    assert content(fd) == data
    bench.lanes.close(fh)
    bench.lanes.sweep()
    assert bench.lanes.views.snapshot()["views"] == 0
    bench.pool.store.state.devices[0].is_offline = False


@pytest.mark.parametrize(
    "code", [errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOSPC, errno.EIO]
)
def test_a_refusal_leaves_the_native_lane(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    _, data = bench.scatter("c", 20)

    def refuse(fd: int, extent: Extent) -> None:
        if extent.target:
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(reflink, "clone", refuse)
    caplog.set_level("INFO", "kvfs.fuse")
    before = len(os.listdir("/proc/self/fd"))
    bench.opened("c")
    for _ in range(3):
        fh, lane = bench.opened("c")
        assert lane is Lane.NATIVE
        assert bench.core.read(fh, 0, len(data)) == data
    assert bench.lanes.views.snapshot()["views_failed"] == 1
    assert len(caplog.records) == 1
    monkeypatch.setattr(reflink, "clone", copied)
    bench.clock.advance(RETRY_NS)
    assert bench.opened("c")[1] is Lane.PASSTHROUGH
    assert bench.lanes.views.snapshot()["views_built"] == 1
    bench.lanes.stop()
    for fh in (*bench.core.tables, *bench.core.backings):
        bench.lanes.close(fh)
    assert len(os.listdir("/proc/self/fd")) <= before + len(bench.core.segments) + 1


def test_kernel_that_refuses_the_file(bench: Bench) -> None:
    _, data = bench.scatter("c", 20)
    bench.opened("c")
    bench.core.answers[Kind.BACKING] = lambda *_: (-errno.EPERM, b"")
    fh, lane = bench.opened("c")
    assert lane is Lane.NATIVE
    assert bench.core.read(fh, 0, len(data)) == data
    assert bench.lanes.views.snapshot()["views_cached"] == 1


def test_damaged_block_is_found_before_the_kernel_reads(bench: Bench) -> None:
    _, data = bench.scatter("c", 20)
    bench.scatter("d", 20)
    bench.close()
    for path in (bench.base / "device/segments").iterdir():
        raw = path.read_bytes()
        where = raw.find(data[11 * BLOCK : 11 * BLOCK + 64])
        if where >= 0:
            with path.open("r+b") as file:
                file.seek(where + BLOCK // 2)
                file.write(b"damage")
    bench.start()
    for name, lane in (("c", Lane.NAMESPACE), ("d", Lane.PASSTHROUGH)):
        bench.opened(name)
        assert bench.opened(name)[1] is lane
    assert bench.pool.statistics().counters["checksum_errors"] == 1


def test_padding_that_is_not_zero(bench: Bench) -> None:
    """No checksum covers it, so that it is looked at."""
    _, data = bench.scatter("c", 20, ODD)
    for path in (bench.base / "device/segments").iterdir():
        raw = path.read_bytes()
        where = raw.find(data[11 * BLOCK : 11 * BLOCK + 64])
        if where >= 0:
            with path.open("r+b") as file:
                file.seek(where + BLOCK - 1000)
                file.write(b"stain")
    bench.opened("c")
    fh, lane = bench.opened("c")
    assert lane is Lane.NATIVE
    assert bench.core.read(fh, 0, len(data)) == data


def test_two_opens_at_once_share_a_view(bench: Bench) -> None:
    bench.scatter("c", 20)
    bench.opened("c")
    readers = [bench.open("c") for _ in range(2)]
    plans = [bench.lanes.plan(reader) for reader in readers]
    made = [bench.lanes.vouched(plan) for plan in plans if plan is not None]
    assert made[0] is not None
    assert made[1] is not None
    assert made[0].view is made[1].view
    for plan, reader in zip(made, readers, strict=True):
        assert plan is not None
        bench.lanes.release(plan)
        bench.pool.files.close_read(reader)
    assert bench.lanes.views.snapshot()["views_cached"] == 1


def test_dropped_context_frees_its_space(bench: Bench) -> None:
    space, _ = bench.scatter("c", 40)
    fh, _ = bench.view("c")
    bench.lanes.close(fh)
    keys = space.context("c").keys
    space.context("c").drop()
    bench.pool.store.drop(space.info.namespace_id, keys)
    bench.lanes.close(1)  # the first open's, which was read natively
    before = bench.pool.statistics().devices[0].used_bytes
    bench.clock.advance(lanes_module.LINGER_NS)
    bench.lanes.sweep()
    assert bench.lanes.views.snapshot()["views"] == 0
    assert bench.pool.statistics().devices[0].used_bytes < before
