"""Changing the devices of an open pool, over every kind."""

import errno
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import kvfs
from kvfs import device_changes as changes
from kvfs.devices import numa
from kvfs.devices import open as opening
from kvfs.devices.dax_layout import HEADER_BYTES
from kvfs.devices.wrappers import Fault, FaultyDevice, Verb
from kvfs.engine.catalog_schema import ROOT_NODE_ID
from kvfs.engine.checker import check_pool
from kvfs.errors import (
    BusyError,
    ExistsError,
    NoSpaceError,
    NotFoundError,
    RefusedError,
    UnavailableError,
    UsageError,
)
from kvfs.tree import Tree
from kvfs.units import GIB, MIB
from tests.unit.made_up_sysfs import add_node

LAYOUT = kvfs.Layout("float16", (4, 2, 8), 64)
TOKENS = np.arange(64 * 300)
DATA = np.random.default_rng(1).integers(0, 256, (300, LAYOUT.block_bytes), np.uint8)
SIZE = "size=96MiB&segment=16MiB"
KINDS = ("dir", "pmem", "dax", "dram", "cxl", "emulated")
_POLLS, _POLL_S = 3000, 0.02
MakeURL = Callable[[str, str], str]


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected_warnings: list[str]) -> MakeURL:
    """Make a URL of a kind; the only memory node there is counts as the first of two."""
    expected_warnings.append("served like a directory")
    sysfs = tmp_path / "sys"
    add_node(sysfs, 0, cpus="0", total=16 * GIB, free=16 * GIB)
    add_node(sysfs, 1, cpus="", total=16 * GIB, free=16 * GIB)
    monkeypatch.setattr(
        opening, "require_node", lambda number, text: numa.require_node(number, text, sysfs)
    )

    def make(kind: str, name: str) -> str:
        if kind == "dax":
            with (tmp_path / name).open("wb") as file:
                file.truncate(HEADER_BYTES + 96 * MIB)
        return {
            "dir": f"dir:{tmp_path}/{name}?{SIZE}&name={name}",
            "pmem": f"pmem:{tmp_path}/{name}?{SIZE}&name={name}",
            "dax": f"dax:{tmp_path}/{name}?{SIZE}&name={name}",
            "dram": f"dram:?{SIZE}&name={name}",
            "cxl": f"cxl:node=0?{SIZE}&name={name}",
            "emulated": f"emulated:rdma:dir:{tmp_path}/{name}?{SIZE}&name={name}",
        }[kind]

    return make


def fill(pool: kvfs.Pool, durability: str = "async") -> kvfs.Namespace:
    space = pool.namespace("m", LAYOUT)
    keys, _ = space.keys(TOKENS)
    space.put(keys, DATA, durability=durability)
    return space


def readable(pool: kvfs.Pool) -> int:
    """Return how many of the blocks can be read, and hold what was put."""
    space = pool.namespace("m")
    keys, _ = space.keys(TOKENS)
    target = np.zeros_like(DATA)
    mask = space.read_into(keys, target)
    assert (target[mask] == DATA[mask]).all()
    return int(mask.sum())


def evacuate_all(pool: kvfs.Pool, name: str) -> int:
    blocks, pause = 0, threading.Event()  # nobody sets it
    for _ in range(_POLLS):
        done = changes.evacuate(pool, name, 64 * MIB)
        blocks += done.moved_blocks
        if not done.left_segments:
            return blocks
        pause.wait(_POLL_S)  # who reads holds its segment for a moment
    raise AssertionError(f"never empty: {done}")


def names(pool: kvfs.Pool) -> list[str]:
    return [device.name for device in pool.statistics().devices]


@pytest.mark.parametrize("source", KINDS)
def test_a_device_is_replaced_by_another(tmp_path: Path, url: MakeURL, source: str) -> None:
    """Whatever its kind, what it holds survives it."""
    durability = "none" if source in ("dram", "cxl") else "sync"
    with kvfs.create_pool(tmp_path / "pool", [url(source, "old")]) as pool:
        space = fill(pool, durability)
        space.context("chat").append(space.keys(TOKENS)[0], DATA, tokens=TOKENS)
        row = changes.add_device(pool, url("dir", "new"))
        assert (row.index, row.name, names(pool)) == (1, "new", ["old", "new"])
        assert evacuate_all(pool, "old") == 300
        assert readable(pool) == 300
        assert pool.statistics().devices[1].bytes_stored == 300 * LAYOUT.stride
        assert changes.would_remove(pool, "old").block_count == 0
        changes.remove(pool, "old")
        assert names(pool) == ["new"]
        assert readable(pool) == 300
        assert pool.statistics().devices[0].block_count == 300
    with kvfs.open_pool(tmp_path / "pool") as pool:
        assert names(pool) == ["new"]
        assert readable(pool) == 300
        assert pool.namespace("m").context("chat").resident_blocks == 300
    assert check_pool(tmp_path / "pool", data=True).findings == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_device_of_any_kind_is_added_and_used(tmp_path: Path, url: MakeURL, kind: str) -> None:
    with kvfs.create_pool(tmp_path / "pool", [url("dir", "old")]) as pool:
        fill(pool, "sync")
        changes.add_device(pool, url(kind, "new"))
        before = pool.statistics().devices[1]
        assert (before.name, before.kind, before.block_count) == ("new", kind, 0)
        if kind in ("dram", "cxl"):
            changes.set_online(pool, "new", is_online=False)
            changes.set_online(pool, "new", is_online=True)
            keys = pool.namespace("m").keys(TOKENS + 1)[0]
            pool.namespace("m").put(keys, DATA, durability="none")
        else:
            assert evacuate_all(pool, "old") == 300
        assert pool.statistics().devices[1].block_count == 300
        assert readable(pool) == 300
    with kvfs.open_pool(tmp_path / "pool") as pool:
        assert names(pool) == ["old", "new"]
        assert readable(pool) == 300


def test_offline_takes_no_writes_and_is_kept(tmp_path: Path, url: MakeURL) -> None:
    with kvfs.create_pool(tmp_path / "pool", [url("dir", "old")]) as pool:
        fill(pool)
        changes.set_online(pool, "old", is_online=False)
        space = pool.namespace("m")
        with pytest.raises(UnavailableError):
            space.put(space.keys(TOKENS + 1)[0], DATA)
        assert readable(pool) == 300
    with kvfs.open_pool(tmp_path / "pool") as pool:
        assert pool.statistics().devices[0].state == "offline"
        assert readable(pool) == 300
        changes.set_online(pool, "old", is_online=True)
        space = pool.namespace("m")
        space.put(space.keys(TOKENS + 1)[0], DATA)
    with kvfs.open_pool(tmp_path / "pool") as pool:
        assert pool.statistics().devices[0].state == "online"


def test_a_device_that_failed_is_tried_again(tmp_path: Path, url: MakeURL) -> None:
    with kvfs.create_pool(tmp_path / "pool", [url("dir", "old")]) as pool:
        device = pool.store.state.devices[0]
        for _ in range(3):
            device.note_failure()
        assert pool.statistics().devices[0].state == "offline"
        changes.set_online(pool, "old", is_online=True)
        fill(pool)
        assert (device.failures, pool.statistics().devices[0].state) == (0, "online")


def test_what_others_have_is_not_copied(tmp_path: Path, url: MakeURL) -> None:
    """DRAM beside a disk holds copies: emptying it moves nothing."""
    with kvfs.create_pool(tmp_path / "pool", [url("dram", "fast"), url("dir", "old")]) as pool:
        fill(pool, "sync")
        assert pool.statistics().devices[0].block_count == 300
        assert evacuate_all(pool, "fast") == 0
        changes.remove(pool, "fast")
        assert readable(pool) == 300


def test_memory_does_not_do_for_what_must_last(tmp_path: Path, url: MakeURL) -> None:
    with kvfs.create_pool(tmp_path / "pool", [url("dram", "fast"), url("dir", "old")]) as pool:
        fill(pool, "sync")
        with pytest.raises(RefusedError, match="none in service is persistent"):
            changes.evacuate(pool, "old", MIB)
        assert readable(pool) == 300


def test_memory_is_no_copy_of_what_must_last(tmp_path: Path, url: MakeURL) -> None:
    """What lies in DRAM too would be lost with the next restart."""
    with kvfs.create_pool(tmp_path / "pool", [url("dram", "fast"), url("dir", "old")]) as pool:
        fill(pool, "sync")
        changes.add_device(pool, url("dir", "new"))
        assert changes.would_remove(pool, "old").lost_blocks == 300
        with pytest.raises(RefusedError, match=r"300 blocks; run .*device evacuate old"):
            changes.remove(pool, "old")
        assert evacuate_all(pool, "old") == 300
        changes.remove(pool, "old")
    with kvfs.open_pool(tmp_path / "pool") as pool:
        assert readable(pool) == 300


def test_a_block_that_cannot_be_read_in_time_stays(tmp_path: Path, url: MakeURL) -> None:
    with kvfs.create_pool(tmp_path / "pool", [url("dir", "old"), url("dir", "new")]) as pool:
        fill(pool, "sync")
        state = pool.store.state.devices[0]
        fault = Fault(Verb.READ, operation="read_payloads", code=errno.ETIMEDOUT)
        state.device = FaultyDevice(state.device, [fault])
        done = changes.evacuate(pool, "old", GIB)
        assert (done.moved_blocks, done.left_segments) == (299, 1)
        assert evacuate_all(pool, "old") == 1
        assert readable(pool) == 300


def test_a_copy_elsewhere_counts_once_it_is_verified(tmp_path: Path, url: MakeURL) -> None:
    with kvfs.create_pool(tmp_path / "pool", [url("dir", "old"), url("dir", "new")]) as pool:
        fill(pool, "sync")
        changes.set_online(pool, "old", is_online=False)
        fill(pool, "sync")
        assert [device.block_count for device in pool.statistics().devices] == [300, 300]
    for path in (tmp_path / "new/segments").iterdir():
        with path.open("r+b") as file:
            file.write(b"rotten")
    with kvfs.open_pool(tmp_path / "pool") as pool:
        assert evacuate_all(pool, "old") == 300
        assert readable(pool) == 300


def test_what_a_destroyed_namespace_left_is_no_loss(tmp_path: Path, url: MakeURL) -> None:
    """Somebody still looks at it, so its segment is there."""
    with kvfs.create_pool(tmp_path / "pool", [url("dir", "old"), url("dir", "new")]) as pool:
        space = fill(pool, "sync")
        view = space.view(space.keys(TOKENS)[0][:3])
        pool.drop_namespace("m")
        assert changes.would_remove(pool, "old").lost_blocks == 0
        assert changes.evacuate(pool, "old", MIB).held_segments == 1
        with pytest.raises(BusyError, match="being read"):
            changes.remove(pool, "old")
        view.close()
        changes.remove(pool, "old")


def test_a_full_pool_does_not_lose_what_is_pinned(tmp_path: Path, url: MakeURL) -> None:
    with kvfs.create_pool(tmp_path / "pool", [url("dir", "old")]) as pool:
        fill(pool, "sync")
        changes.add_device(pool, f"dir:{tmp_path}/small?size=64MiB&segment=16MiB")
        target = pool.store.state.devices[1]

        def full(slot: int, generation: int, tag: bytes) -> None:
            raise NoSpaceError("device is full")

        target.device.create = full  # type: ignore[method-assign, assignment]
        with pytest.raises(NoSpaceError):
            changes.evacuate(pool, "old", MIB)
        assert readable(pool) == 300


def test_what_is_being_read_waits(tmp_path: Path, url: MakeURL) -> None:
    with kvfs.create_pool(tmp_path / "pool", [url("dir", "old"), url("dir", "new")]) as pool:
        space = fill(pool, "sync")
        lease = pool.store.lease(space.info.namespace_id, space.keys(TOKENS)[0])
        done = changes.evacuate(pool, "old", 64 * MIB)
        assert (done.moved_blocks, done.left_segments, done.held_segments) == (300, 1, 1)
        with pytest.raises(BusyError, match="1 segments are held"):
            changes.remove(pool, "old")
        pool.store.release(lease)
        assert changes.evacuate(pool, "old", 64 * MIB).left_segments == 0
        changes.remove(pool, "old")
        assert readable(pool) == 300


def test_a_device_that_holds_something_alone_is_not_removed(tmp_path: Path, url: MakeURL) -> None:
    with kvfs.create_pool(tmp_path / "pool", [url("dir", "old"), url("dir", "new")]) as pool:
        fill(pool, "sync")
        with pytest.raises(RefusedError, match=r"300 blocks; run .*device evacuate old"):
            changes.remove(pool, "old")
        assert pool.statistics().devices[0].state == "online"
        assert readable(pool) == 300


def test_loss_is_allowed(tmp_path: Path, url: MakeURL) -> None:
    with kvfs.create_pool(tmp_path / "pool", [url("dir", "old"), url("dir", "new")]) as pool:
        fill(pool, "sync")
        node = Tree(pool).create_file(ROOT_NODE_ID, "file", 0o644, 0, 0)
        handle = pool.files.open_write(node, truncate=True)
        pool.files.write(handle, 0, b"x" * (6 * MIB))
        pool.files.close_write(handle)
        pool.sync()
        found = changes.remove(pool, "old", allow_data_loss=True)
        assert found.lost_blocks >= 300
        assert readable(pool) == 0
        assert pool.catalog.lookup(ROOT_NODE_ID, "file") is None
        assert fill(pool, "sync") is not None
        assert readable(pool) == 300
    assert check_pool(tmp_path / "pool", data=True).findings == []


def test_a_device_that_is_broken_leaves_all_the_same(
    tmp_path: Path, url: MakeURL, expected_warnings: list[str]
) -> None:
    expected_warnings += ["cannot be freed", "out of the pool, but not cleaned"]
    with kvfs.create_pool(tmp_path / "pool", [url("dir", "old"), url("dir", "new")]) as pool:
        fill(pool, "sync")
        device = pool.store.state.devices[0].device

        def fail(*arguments: object) -> None:
            raise OSError(errno.EIO, "Input/output error")

        device.free = device.destroy = fail  # type: ignore[method-assign, assignment]
        changes.remove(pool, "old", allow_data_loss=True)
        assert (names(pool), readable(pool)) == (["new"], 0)
    with kvfs.open_pool(tmp_path / "pool") as pool:
        assert names(pool) == ["new"]


def test_numbers_are_not_given_again(tmp_path: Path, url: MakeURL) -> None:
    with kvfs.create_pool(tmp_path / "pool", [url("dir", "one")]) as pool:
        changes.add_device(pool, url("dir", "two"))
        changes.remove(pool, "two")
        assert changes.add_device(pool, url("dir", "two")).index == 2
    with kvfs.open_pool(tmp_path / "pool") as pool:
        changes.remove(pool, "two")
    with kvfs.open_pool(tmp_path / "pool") as pool:
        assert changes.add_device(pool, url("dir", "two")).index == 3
        fill(pool)
        assert evacuate_all(pool, "one") == 300
        assert readable(pool) == 300


def test_what_cannot_be_added(tmp_path: Path, url: MakeURL) -> None:
    with kvfs.create_pool(tmp_path / "pool", [url("dir", "one")]) as pool:
        before = names(pool)
        with pytest.raises(UsageError, match="two devices are called 'one'"):
            changes.add_device(pool, f"dir:{tmp_path}/two?{SIZE}&name=one")
        with pytest.raises(ExistsError, match="belongs to a pool"):
            changes.add_device(pool, f"dir:{tmp_path}/one?{SIZE}")
        with pytest.raises(UsageError, match="cannot lie inside another"):
            changes.add_device(pool, f"dir:{tmp_path}/one/two?{SIZE}")
        with pytest.raises(UsageError, match="device too small"):
            changes.add_device(pool, f"dir:{tmp_path}/two?size=32MiB&segment=16MiB")
        assert (names(pool), (tmp_path / "two").exists()) == (before, False)


def test_segments_must_hold_the_blocks_there_are(tmp_path: Path, url: MakeURL) -> None:
    large = f"dir:{tmp_path}/one?size=256MiB&segment=64MiB"
    with kvfs.create_pool(tmp_path / "pool", [large]) as pool:
        pool.namespace("large", kvfs.Layout("float16", (4, 2, 8), 128 * 1024))
        with pytest.raises(UsageError, match=r"segments too small: .* give a larger segment"):
            changes.add_device(pool, url("dir", "two"))
        assert not (tmp_path / "two").exists()


def test_a_plan_changes_nothing(tmp_path: Path, url: MakeURL) -> None:
    with kvfs.create_pool(tmp_path / "pool", [url("dir", "one")]) as pool:
        row = changes.add_device(pool, f"dir:{tmp_path}/two?{SIZE}", is_dry=True)
        assert (row.name, row.index, names(pool)) == ("dir0", 1, ["one"])
        assert not (tmp_path / "two").exists()


def test_the_last_device_stays(tmp_path: Path, url: MakeURL) -> None:
    with kvfs.create_pool(tmp_path / "pool", [url("dir", "one")]) as pool:
        with pytest.raises(RefusedError, match="is its last; use 'pool destroy'"):
            changes.remove(pool, "one", allow_data_loss=True)
        with pytest.raises(NotFoundError, match="expected one of one"):
            changes.remove(pool, "two")


def test_raw_files_stay_where_they_are(tmp_path: Path, url: MakeURL) -> None:
    with kvfs.create_pool(tmp_path / "pool", [url("dir", "one"), url("dir", "two")]) as pool:
        device = pool.store.state.devices[0].device
        device.keep_raw(device.create_staging("raw"), 77)
        with pytest.raises(RefusedError, match="holds raw files: one: 1 of them"):
            changes.remove(pool, "one")
        device.drop_staging(device.open_raw(77))


def test_under_load_nothing_is_lost(tmp_path: Path, url: MakeURL) -> None:
    """Readers and writers go on while one device empties and leaves."""
    with kvfs.create_pool(tmp_path / "pool", [url("dir", "old"), url("dir", "new")]) as pool:
        fill(pool, "sync")
        stop, failures = threading.Event(), list[object]()

        def read() -> None:
            while not stop.is_set():
                if (found := readable(pool)) != 300:
                    failures.append(found)

        def write() -> None:
            space, turn = pool.namespace("m"), 0
            while not stop.is_set():
                turn += 1
                space.put(space.keys(TOKENS[: 64 * 20] + turn)[0], DATA[:20])

        def guarded(work: Callable[[], None]) -> None:
            try:
                work()
            except Exception as error:  # noqa: BLE001 - shown by the assertion below
                failures.append(error)

        threads = [threading.Thread(target=guarded, args=(work,)) for work in (read, read, write)]
        for thread in threads:
            thread.start()
        try:
            evacuate_all(pool, "old")
            changes.remove(pool, "old")
        finally:
            stop.set()
            for thread in threads:
                thread.join(60)
        assert failures == []
        assert names(pool) == ["new"]
        assert readable(pool) == 300
