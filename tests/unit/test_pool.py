"""Pools: made, opened, owned by one, destroyed; namespaces; persisting in the background."""

import errno
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import kvfs
from kvfs import lifecycle
from kvfs.config import PoolOptions
from kvfs.devices.base import Segment
from kvfs.devices.directory import DirectoryDevice
from kvfs.errors import (
    BusyError,
    ClosedError,
    DeviceError,
    ExistsError,
    NotFoundError,
    RefusedError,
    UsageError,
)
from kvfs.lifecycle import create_pool, destroy_pool
from tests.unit.pool_bench import LAYOUT, Place, blocks, read

OTHER = kvfs.Layout("uint8", (1024,), 8, model="pool")
OWNER = """
import sys, kvfs
with kvfs.open_pool(sys.argv[1]):
    print("open", flush=True)
    sys.stdin.read()
"""


def test_create_open_destroy(place: Place) -> None:
    content = blocks(5)
    with place.create(name="first") as pool:
        uuid = pool.uuid
        assert [info.name for info in pool.namespaces()] == ["default"]
        space = pool.namespace("s", LAYOUT)
        keys, parents = space.keys(np.arange(20))
        assert space.put(keys, content, parents=parents).blocks_stored == 5
    with place.open() as pool:
        assert (pool.uuid, pool.name) == (uuid, "first")
        assert pool.recovery.blocks == 5
        assert (read(pool.namespace("s"), keys, 5) == content).all()
        figures = pool.statistics()
        assert (figures.state, figures.namespaces, figures.contexts) == ("online", 2, 0)
        assert figures.capacity_bytes == 64 << 20
        assert figures.used_bytes == 16 << 20
    destroy_pool(place.pool)
    assert list(place.root.iterdir()) == [] or not any((place.root / "dev").iterdir())
    with pytest.raises(NotFoundError, match="no pool"):
        place.open()
    with pytest.raises(NotFoundError, match="no pool"):
        destroy_pool(place.pool)
    place.create().close()


def test_one_owner(place: Place, pool: kvfs.Pool) -> None:
    for operation in (place.open, lambda: destroy_pool(place.pool)):
        with pytest.raises(BusyError, match=f"pool is in use: .*pid {os.getpid()} "):
            operation()
    pool.close()
    place.open().close()


def test_owner_in_another_process(place: Place) -> None:
    place.create().close()
    command = [sys.executable, "-c", OWNER, str(place.pool)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"open\n"
        with pytest.raises(BusyError, match=f"held by pid {child.pid} "):
            place.open()
        child.kill()
        child.wait()
    place.open().close()


def test_nothing_is_made_twice(place: Place, pool: kvfs.Pool) -> None:
    pool.close()
    with pytest.raises(ExistsError, match="a pool is there already"):
        place.create()
    with pytest.raises(ExistsError, match="device belongs to a pool"):
        create_pool(place.root / "second", place.urls)
    assert not (place.root / "second").exists()
    (place.root / "full").mkdir()
    (place.root / "full" / "something").touch()
    with pytest.raises(ExistsError, match=r"directory is not empty: .*; give the pool one of its"):
        create_pool(place.root / "full", place.urls)
    with pytest.raises(UsageError, match="expected a list of URLs, found 'dram:"):
        create_pool(place.root / "second", "dram:?size=64MiB")
    place.open().close()


@pytest.mark.parametrize(
    ("urls", "message"),
    [
        ([], "at least one device"),
        (["dir:/nowhere?size=63MiB&segment=16MiB"], "device too small: .* has 63.0 MiB"),
        (["dram:?size=64MiB&name=a", "dram:?size=64MiB&name=a"], "two devices are called 'a'"),
    ],
)
def test_wrong_devices(tmp_path: Path, urls: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        create_pool(tmp_path / "pool", urls)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", ["format_device", "Catalog.create", "Pool"])
def test_creation_that_fails_leaves_nothing(
    place: Place, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise DeviceError("made to fail")

    owner, _, name = step.rpartition(".")
    with monkeypatch.context() as patch:
        patch.setattr(getattr(lifecycle, owner) if owner else lifecycle, name, fail)
        with pytest.raises(DeviceError, match="made to fail"):
            place.create()
    left = [path for path in place.root.rglob("*") if path.is_file()]
    assert left == []
    place.create().close()


def test_second_device_that_fails_takes_the_first_along(place: Place) -> None:
    place.create().close()
    other = f"dir:{place.root}/fresh?size=64MiB&segment=16MiB"
    with pytest.raises(ExistsError, match="device belongs to a pool"):
        create_pool(place.root / "second", [other, f"{place.urls[0]}&name=old"])
    assert [path for path in (place.root / "fresh").rglob("*") if path.is_file()] == []
    create_pool(place.root / "second", [other]).close()


def test_creation_is_undone_whatever_fails(
    place: Place, monkeypatch: pytest.MonkeyPatch, expected_warnings: list[str]
) -> None:
    """One device that cannot be destroyed keeps neither the others nor the directory."""
    expected_warnings.append("could not be undone: .*made to fail")
    destroy = DirectoryDevice.destroy

    def fail(device: DirectoryDevice) -> None:
        if device.info.index == 0:
            raise OSError(errno.EIO, "made to fail")
        destroy(device)

    def refuse(*args: object, **options: object) -> None:
        raise DeviceError("the cause")

    other = f"dir:{place.root}/other?size=64MiB&segment=16MiB"
    with monkeypatch.context() as patch:
        patch.setattr(DirectoryDevice, "destroy", fail)
        patch.setattr(lifecycle, "Pool", refuse)
        with pytest.raises(DeviceError, match="the cause"):
            create_pool(place.pool, [*place.urls, other])
    assert not place.pool.exists()
    assert not any((place.root / "other").iterdir())
    create_pool(place.pool, [other]).close()  # nobody holds a lock


def test_copied_directory_is_refused(place: Place) -> None:
    with place.create() as pool:
        keys, _ = pool.namespace("s", LAYOUT).keys(np.arange(8))
        pool.namespace("s").put(keys, blocks(2))
    (place.root / "dev").rename(place.root / "original")
    shutil.copytree(place.root / "original", place.root / "dev")
    with pytest.raises(RefusedError, match=r"copied or moved: dir0: .*--allow-moved"):
        place.open()
    with place.open(allow_moved=True) as pool:
        assert (read(pool.namespace("s"), keys, 2) == blocks(2)).all()
    place.open().close()


def test_closed_pool(place: Place) -> None:
    pool = place.create()
    space = pool.namespace("s", LAYOUT)
    keys, _ = space.keys(np.arange(8))
    context = space.context("c")
    pool.close()
    pool.close()
    room = np.zeros((2, LAYOUT.block_bytes), np.uint8)
    operations = [
        lambda: pool.namespace("s"),
        pool.namespaces,
        pool.statistics,
        pool.sync,
        pool.flush,
        lambda: space.put(keys, room),
        lambda: space.read_into(keys, room),
        lambda: space.view(keys),
        lambda: space.context("d"),
        lambda: context.append(keys, room),
        lambda: context.keys,
    ]
    for operation in operations:
        with pytest.raises(ClosedError):
            operation()


def test_close_that_fails_closes_all_the_same(place: Place) -> None:
    place.create().close()
    pool = place.open(background=False)
    space = pool.namespace("s", LAYOUT)
    kept, lost = space.keys(np.arange(8))[0], space.keys(np.arange(100, 108))[0]
    space.put(kept, blocks(2), durability="sync")
    space.put(lost, blocks(2), durability="async")

    def fail(segment: Segment) -> None:
        raise OSError(errno.EIO, "made to fail")

    pool.store.state.devices[0].device.persist = fail  # type: ignore[method-assign]
    with pytest.raises(DeviceError, match="persist failed: dir0"):
        pool.close()
    pool.close()
    with place.open() as pool:
        assert (read(pool.namespace("s"), kept, 2) == blocks(2)).all()


def test_layouts_must_agree(pool: kvfs.Pool) -> None:
    pool.namespace("s", LAYOUT)
    assert pool.namespace("s").layout == LAYOUT
    with pytest.raises(RefusedError, match="layout mismatch: namespace 's'") as caught:
        pool.namespace("s", OTHER)
    for layout in (LAYOUT, OTHER):
        assert layout.fingerprint().hex() in str(caught.value)
        assert layout.to_json() in str(caught.value)
    with pytest.raises(NotFoundError, match="no such namespace: 't'"):
        pool.namespace("t")
    with pytest.raises(UsageError, match="do not fit"):
        pool.namespace("huge", kvfs.Layout("uint8", (9 << 20,)))


def test_dropped_namespace_is_forgotten_for_good(place: Place) -> None:
    with place.create("dram:?size=64MiB&segment=16MiB") as pool:
        gone, kept = pool.namespace("gone", LAYOUT), pool.namespace("kept", LAYOUT)
        for space in (gone, kept):
            keys, parents = space.keys(np.arange(8))
            space.put(keys, blocks(2), parents=parents, durability="sync")
            space.context("c").append(keys, blocks(2))
            space.context("c").pin()
        old = gone.keys(np.arange(8))[0]
        pool.drop_namespace("gone")
        with pytest.raises(NotFoundError):
            gone.lookup(old)
        assert pool.store.state.pinned_bytes.get(gone.info.namespace_id, 0) == 0
    for _ in range(2):
        with place.open() as pool:
            assert [info.name for info in pool.namespaces()] == ["default", "kept"]
            again = pool.namespace("gone", LAYOUT)
            assert again.match_prefix(again.keys(np.arange(8))[0]) == 0
            with pytest.raises(NotFoundError):
                pool.store.lookup(gone.info.namespace_id, old)
            assert list(again.contexts()) == []
            assert (read(pool.namespace("kept"), keys, 2) == blocks(2)).all()
            pool.drop_namespace("gone")


def test_default_namespace_is_made_again(pool: kvfs.Pool) -> None:
    old = pool.namespace("default").info.namespace_id
    pool.drop_namespace("default")
    assert pool.namespace("default").info.namespace_id != old


def test_renamed_namespace_keeps_its_blocks(place: Place) -> None:
    with place.create() as pool:
        space = pool.namespace("old", LAYOUT)
        keys, _ = space.keys(np.arange(8))
        space.put(keys, blocks(2))
        pool.rename_namespace("old", "new")
        pool.set_retention("new", "durable")
    with place.open() as pool:
        space = pool.namespace("new", LAYOUT)
        assert space.info.retention == "durable"
        assert (read(space, keys, 2) == blocks(2)).all()


# --- persisting in the background


def test_async_blocks_are_persisted_soon(place: Place) -> None:
    persisted = threading.Event()
    with place.create(options=PoolOptions(async_delay_ms=10)) as pool:
        device = pool.store.state.devices[0].device
        persist = device.persist

        def noted(segment: Segment) -> None:
            persist(segment)
            persisted.set()

        device.persist = noted  # type: ignore[method-assign]
        space = pool.namespace("s", LAYOUT)
        keys, _ = space.keys(np.arange(8))
        space.put(keys, blocks(2), durability="sync")
        for i in range(1, 4):
            persisted.clear()
            keys, _ = space.keys(np.arange(8) + 100 * i)
            space.put(keys, blocks(2), durability="async")
            assert persisted.wait(30), "the background did not persist"


def test_without_background_only_flush_persists(place: Place) -> None:
    place.create().close()
    with place.open(background=False) as pool:
        space = pool.namespace("s", LAYOUT)
        keys, _ = space.keys(np.arange(8))
        space.put(keys, blocks(2))
        assert pool.store.has_unsynced
        pool.sync()
        assert not pool.store.has_unsynced
