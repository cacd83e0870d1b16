"""On which of several devices blocks come to lie."""

from pathlib import Path

import numpy as np
import pytest

import kvfs
from kvfs import device_changes as changes
from kvfs.tree import Tree
from kvfs.units import MIB
from tests.unit.small_pools import BLOCK, BLOCK_TOKENS, NEVER_MS, payloads, small_namespace

KINDS = {"dir": "async", "dram": "none", "emulated": "none"}


def url(kind: str, name: str, root: Path, size: str = "64MiB") -> str:
    options = f"size={size}&segment=16MiB&name={name}"
    place = {"dir": f"dir:{root}/{name}", "dram": "dram:", "emulated": "emulated:cxl:dram:"}
    return f"{place[kind]}?{options}"


def made(root: Path, urls: list[str]) -> kvfs.Pool:
    options = kvfs.PoolOptions(async_delay_ms=NEVER_MS)
    return kvfs.create_pool(root / "pool", urls, options=options)


def put(pool: kvfs.Pool, seed: int, durability: str) -> None:
    """Store a chain of 15 MiB of its own."""
    space = small_namespace(pool)
    keys, parents = space.keys(np.arange(240 * BLOCK_TOKENS) + seed * 100_000)
    space.put(keys, payloads(240, seed), parents=parents, durability=durability)


def known(pool: kvfs.Pool, seed: int) -> int:
    space = small_namespace(pool)
    keys, _ = space.keys(np.arange(240 * BLOCK_TOKENS) + seed * 100_000)
    target = np.zeros((240, BLOCK), np.uint8)
    mask = space.read_into(keys, target)
    assert (target[mask] == payloads(240, seed)[mask]).all()
    return int(mask.sum())


def block_counts(pool: kvfs.Pool) -> dict[str, int]:
    return {device.name: device.block_count for device in pool.statistics().devices}


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_evicted_while_another_device_has_room(tmp_path: Path, kind: str) -> None:
    urls = [url(kind, "a", tmp_path), url(kind, "b", tmp_path, "128MiB")]
    with made(tmp_path, urls) as pool:
        for seed in range(8):  # 120 MiB of 192
            put(pool, seed, KINDS[kind])
        assert [known(pool, seed) for seed in range(8)] == [240] * 8
        counts = block_counts(pool)
        assert sum(counts.values()) == 8 * 240
        assert min(counts.values()) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_devices_that_are_full_are_one_cache(tmp_path: Path, kind: str) -> None:
    """What was put last is there, and what was put first is gone, wherever either lies."""
    urls = [url(kind, "a", tmp_path), url(kind, "b", tmp_path)]
    with made(tmp_path, urls) as pool:
        for seed in range(24):  # three times what both hold
            put(pool, seed, KINDS[kind])
        assert [known(pool, seed) for seed in (21, 22, 23)] == [240] * 3
        assert [known(pool, seed) for seed in range(8)] == [0] * 8
        assert min(block_counts(pool).values()) > 240


def test_copies_in_memory_lie_on_all_of_it(tmp_path: Path) -> None:
    urls = [url("dram", "a", tmp_path), url("emulated", "b", tmp_path),
            url("dir", "c", tmp_path, "256MiB")]  # fmt: skip
    with made(tmp_path, urls) as pool:
        for seed in range(6):
            put(pool, seed, "async")
            put(pool, seed, "async")  # known, and copied no second time
        counts = block_counts(pool)
        assert counts["c"] == 6 * 240
        assert counts["a"] + counts["b"] == 6 * 240
        assert min(counts.values()) > 0


def test_what_memory_cannot_hold_waits_for_no_disk(tmp_path: Path) -> None:
    """Blocks that need not last are evicted from memory, and do not go on to a directory."""
    urls = [url("dram", "a", tmp_path), url("dir", "b", tmp_path)]
    with made(tmp_path, urls) as pool:
        for seed in range(8):
            put(pool, seed, "none")
        assert block_counts(pool)["b"] == 0
        assert known(pool, 7) == 240


def test_evacuation_evicts_nothing_while_there_is_room(tmp_path: Path) -> None:
    urls = [url("dir", "a", tmp_path, "128MiB"), url("dir", "b", tmp_path),
            url("dir", "c", tmp_path, "128MiB")]  # fmt: skip
    with made(tmp_path, urls) as pool:
        for seed in range(6):
            put(pool, seed, "async")
        assert block_counts(pool)["a"] == 6 * 240
        while changes.evacuate(pool, "a", 64 * MIB).left_segments:
            pass
        assert [known(pool, seed) for seed in range(6)] == [240] * 6
        assert block_counts(pool)["a"] == 0


def test_large_files_lie_on_all_directories(tmp_path: Path) -> None:
    urls = [url("dir", "a", tmp_path), url("dir", "b", tmp_path)]
    with made(tmp_path, urls) as pool:
        nodes = []
        for number in range(8):  # 80 MiB of 128
            node = Tree(pool).create_file(1, f"f{number}", 0o644, 0, 0)
            handle = pool.files.open_write(node, truncate=True)
            pool.files.write(handle, 0, bytes([number]) * (10 * MIB))
            pool.files.close_write(handle)
            nodes.append(node)
        for number, node in enumerate(nodes):
            reader = pool.files.open_read(node)
            assert bytes(pool.files.read(reader, 0, 1 << 30)) == bytes([number]) * (10 * MIB)
            pool.files.close_read(reader)
        assert min(block_counts(pool).values()) > 0
