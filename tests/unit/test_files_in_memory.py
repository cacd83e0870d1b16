"""Files of which eviction left a copy in memory alone: whole while it lasts, absent after it."""

from pathlib import Path

import kvfs
from kvfs.config import PoolOptions
from kvfs.engine.checker import Severity, check_pool
from kvfs.engine.held import HeldKeys
from kvfs.lifecycle import create_pool, open_pool
from kvfs.tree import Tree
from kvfs.units import MIB

CONTENT = bytes(range(256)) * 8 * 1024  # 2 MiB: small enough for the log, and so for a copy


def pool_with_a_file_in_memory(root: Path) -> kvfs.Pool:
    devices = ["dram:?size=64MiB&segment=16MiB", f"dir:{root}/dev?size=64MiB&segment=16MiB"]
    pool = create_pool(root / "pool", devices, options=PoolOptions(async_delay_ms=60_000))
    node = Tree(pool).create_file(1, "f", 0o644, 0, 0)
    handle = pool.files.open_write(node, truncate=True)
    pool.files.write(handle, 0, CONTENT)
    pool.files.close_write(handle)
    pool.sync()
    evict(pool, "dir0")
    return pool


def evict(pool: kvfs.Pool, name: str) -> None:
    """Evict all that lies on one device, sparing nothing."""
    evictor, state = pool.store._evictor, pool.store.state
    [device] = [device for device in state.devices if device.info.name == name]
    assert evictor._close_idle_log(device)
    pool.store.flush()
    with evictor.paused():
        assert evictor._round(device, 64 * MIB, HeldKeys(state), is_sparing=False)
    assert not any(segment.live_count for segment in device.segments.values())


def content(pool: kvfs.Pool) -> bytes | None:
    node = Tree(pool).lookup(1, "f")
    if node is None:
        return None
    reader = pool.files.open_read(node)
    try:
        return bytes(pool.files.read(reader, 0, node.size_bytes))
    finally:
        pool.files.close_read(reader)


def test_name_stays_while_every_block_is_somewhere(tmp_path: Path) -> None:
    with pool_with_a_file_in_memory(tmp_path) as pool:
        assert content(pool) == CONTENT
        evict(pool, "dram0")
        assert content(pool) is None
        assert Tree(pool).lookup(1, "f") is None
    assert check_pool(tmp_path / "pool").is_clean


def test_name_goes_with_the_memory(tmp_path: Path) -> None:
    pool_with_a_file_in_memory(tmp_path).close()
    report = check_pool(tmp_path / "pool")
    assert [(f.severity, f.code) for f in report.findings] == [(Severity.NOTE, "file-not-whole")]
    assert report.exit_code == 0
    with open_pool(tmp_path / "pool") as pool:
        assert pool.recovery.files_dropped == 1
        assert Tree(pool).lookup(1, "f") is None
    assert check_pool(tmp_path / "pool").is_clean
