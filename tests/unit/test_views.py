"""Views: scattered blocks as one range, leases while they live, faults inside them."""

import ctypes
import errno
import gc
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import kvfs
from kvfs import _native
from kvfs.config import PoolOptions
from kvfs.errors import ClosedError, MediaError, NotFoundError, UsageError
from kvfs.keys import KeyArray
from tests.unit.pool_bench import LAYOUT, Place, blocks

COUNT = 12
BIG = kvfs.Layout("uint8", (1 << 20,), 1, model="big")
REAL_MAPPING = _native.Mapping
PADDED = kvfs.Layout("uint8", (5000,), 1, model="padded")


class Scattered:
    """A chain of blocks whose extents lie apart, some on a disk, some in memory."""

    def __init__(self, pool: kvfs.Pool) -> None:
        self.pool = pool
        self.space = pool.namespace("s", LAYOUT)
        self.keys, parents = self.space.keys(np.arange(4 * COUNT))
        self.content = blocks(COUNT)
        order = np.random.default_rng(1).permutation(COUNT)
        for i in order:
            durability = "none" if i % 3 == 0 else "sync"
            one = slice(i, i + 1)
            self.space.put(
                self.keys[one], self.content[one], parents=parents[one], durability=durability
            )
        self.homes = self.space.lookup(self.keys)["device"].tolist()

    def leases(self) -> int:
        devices = self.pool.store.state.devices
        return sum(s.leases for device in devices for s in device.segments.values())


@pytest.fixture
def scattered(place: Place) -> Iterator[Scattered]:
    options = PoolOptions(copy_to_dram=False)
    with place.create("dram:?size=64MiB&segment=16MiB", options=options) as pool:
        yield Scattered(pool)


def test_stitched_in_order_from_both_devices(scattered: Scattered) -> None:
    assert len(set(scattered.homes)) == 2
    with scattered.space.view(scattered.keys) as view:
        assert view.is_zero_copy
        assert view.nbytes == len(view) == scattered.content.nbytes
        assert view.address % 4096 == 0
        found = view.numpy(shape=(COUNT, -1))
        assert (found == scattered.content).all()
        assert not found.flags.writeable
        assert ctypes.string_at(view.address, view.nbytes) == scattered.content.tobytes()
        assert view.memory().readonly
        del found


def test_any_order_and_repeats(scattered: Scattered) -> None:
    chosen = [7, 1, 7, 0, 11]
    with scattered.space.view(scattered.keys[chosen]) as view:
        assert bytes(view.memory()) == scattered.content[chosen].tobytes()


def test_types_and_shapes(scattered: Scattered) -> None:
    with scattered.space.view(scattered.keys) as view:
        words = view.numpy(np.uint16, (COUNT, 2, -1))
        assert (words == scattered.content.view(np.uint16).reshape(COUNT, 2, -1)).all()
        for dtype, shape in ((np.uint8, (5, 5)), (np.dtype("V7"), None)):
            with pytest.raises(UsageError, match=f"view of {view.nbytes} bytes"):
                view.numpy(dtype, shape)
        del words


def test_torch(scattered: Scattered) -> None:
    torch = pytest.importorskip("torch")
    with scattered.space.view(scattered.keys) as view:
        tensor = view.torch(torch.uint8, (COUNT, LAYOUT.block_bytes))
        assert tensor.data_ptr() == view.address
        assert (tensor.numpy() == scattered.content).all()
        with pytest.raises(UsageError, match="view of"):
            view.torch(torch.uint8, (3, 3))
        del tensor
        gc.collect()


def test_partial_tail(scattered: Scattered) -> None:
    space = scattered.space
    tail, parents = space.keys([1, 2, 3], scattered.keys[-1].tobytes())
    space.put(tail, [scattered.content[0][:3000]], parents=parents, token_counts=[3])
    keys = np.concatenate([scattered.keys, tail])
    with space.view(keys) as view:
        assert view.nbytes == scattered.content.nbytes + 3000
        expected = scattered.content.tobytes() + scattered.content[0][:3000].tobytes()
        assert bytes(view.memory()) == expected
    with pytest.raises(UsageError, match="only the last block of a view may be partial"):
        space.view(np.concatenate([tail, scattered.keys]))
    assert scattered.leases() == 0


def test_padding_between_blocks_is_part_of_the_view(scattered: Scattered) -> None:
    space = scattered.pool.namespace("padded", PADDED)
    keys, _ = space.keys(np.arange(3))
    content = np.random.default_rng(2).integers(0, 256, (3, 5000), np.uint8)
    space.put(keys, content)
    with space.view(keys) as view:
        assert view.nbytes == 2 * 8192 + 5000
        raw = np.frombuffer(bytes(view.memory()).ljust(3 * 8192, b"\0"), np.uint8).reshape(3, 8192)
        assert (raw[:, :5000] == content).all()
        assert not raw[:, 5000:].any()


def test_missing_block(scattered: Scattered) -> None:
    other, _ = scattered.space.keys(np.arange(9000, 9004))
    with pytest.raises(NotFoundError, match="block is not resident: number 2 of 3"):
        scattered.space.view(np.concatenate([scattered.keys[:2], other]))
    with pytest.raises(UsageError, match="at least one block"):
        scattered.space.view([])
    assert scattered.leases() == 0


def test_close_waits_for_exports(scattered: Scattered) -> None:
    view = scattered.space.view(scattered.keys)
    array = view.numpy()
    with pytest.raises(BufferError):
        view.close()
    assert (array == scattered.content.ravel()).all()
    assert scattered.leases() > 0
    with pytest.raises(BufferError), view:
        pass
    del array
    view.close()
    view.close()
    assert scattered.leases() == 0
    for operation in (view.memory, view.numpy, lambda: view.address):
        with pytest.raises(ClosedError, match="the view is closed"):
            operation()


def test_error_inside_is_not_replaced(scattered: Scattered) -> None:
    kept = []

    def use() -> None:
        with scattered.space.view(scattered.keys) as view:
            kept.append(view.numpy())
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        use()
    kept.clear()
    gc.collect()
    assert scattered.leases() == 0


def test_forgotten_view_gives_its_leases_back(scattered: Scattered) -> None:
    view = scattered.space.view(scattered.keys)
    assert scattered.leases() > 0
    del view
    gc.collect()
    assert scattered.leases() == 0


class Unmappable:
    """A mapping that no file can be mapped into, as in a process that is out of maps."""

    def __init__(self, *arguments: int) -> None:
        self._inner = REAL_MAPPING(*arguments)

    def map(self, *arguments: object) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)


def test_copied_where_nothing_can_be_mapped(
    scattered: Scattered, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_native, "Mapping", Unmappable)
    with scattered.space.view(scattered.keys) as view:
        assert not view.is_zero_copy
        assert ctypes.string_at(view.address, view.nbytes) == scattered.content.tobytes()
    assert scattered.leases() == 0


# --- faults


def test_page_that_is_gone_reads_as_zeros_and_fails_the_view(
    scattered: Scattered, tmp_path: Path
) -> None:
    on_disk = [i for i, home in enumerate(scattered.homes) if home == 0]
    in_memory = [i for i in range(COUNT) if i not in on_disk]
    (segment,) = (tmp_path / "dev" / "segments").glob("*.seg")
    size = segment.stat().st_size

    def use() -> None:
        with scattered.space.view(scattered.keys) as view:
            view.check()
            with segment.open("r+b") as file:
                file.truncate(0)
            found = view.numpy(shape=(COUNT, -1)).copy()
            assert (found[in_memory] == scattered.content[in_memory]).all()
            assert not found[on_disk].any()
            assert view.has_failed
            with pytest.raises(MediaError, match="a page of the view could not be read"):
                view.check()

    try:
        with pytest.raises(MediaError, match="what was computed is void"):
            use()
    finally:
        with segment.open("r+b") as file:
            file.truncate(size)


# --- eviction


def fill(space: kvfs.Namespace, first: int, count: int) -> KeyArray:
    """Put unrelated blocks of 1 MiB; return their keys."""
    made = [space.keys([first + i])[0] for i in range(count)]
    keys = np.concatenate(made)
    content = np.zeros((count, 1 << 20), np.uint8)
    content[:, :8] = keys[:, 8:16]
    space.put(keys, content)
    return keys


def test_view_outlives_eviction(place: Place) -> None:
    with place.create() as pool:
        space = pool.namespace("big", BIG)
        keys = fill(space, 0, 15)
        expected = keys[:, 8:16].copy()
        with space.view(keys) as view:
            for i in range(6):
                fill(space, 1000 * (i + 1), 15)
            assert pool.store.state.counters.snapshot()["segments_evicted"] > 0
            assert space.match_prefix(keys) == 15, "leased blocks were evicted"
            found = view.numpy(shape=(15, -1))[:, :8].copy()
            assert (found == expected).all()
        for i in range(6):
            fill(space, 100_000 * (i + 1), 15)
        assert space.match_prefix(keys) == 0
        with pytest.raises(NotFoundError, match="not resident"):
            space.view(keys)


def test_view_outlives_its_namespace(place: Place) -> None:
    with place.create("dram:?size=64MiB&segment=16MiB") as pool:
        space = pool.namespace("big", BIG)
        keys = fill(space, 0, 2)
        with space.view(keys) as view:
            pool.drop_namespace("big")
            fill(pool.namespace("big", BIG), 1000, 3)
            assert (view.numpy(shape=(2, -1))[:, :8] == keys[:, 8:16]).all()
        assert pool.statistics().used_bytes <= 32 << 20
