"""Scattered contexts through a mount, on filesystems that share extents and on others."""

import contextlib
import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import kvfs
from kvfs.fuse.mount import Mount, mount_in_background
from kvfs.fuse.mountpoint import detach, entry_at
from kvfs.pool import Pool
from tests.fuse.loop_mounts import loop_mount
from tests.fuse.mounting import MIB, MountedPool, python, wait_until, write_file

pytestmark = pytest.mark.fuse
BLOCK = MIB
LAYOUT = kvfs.Layout("uint8", (BLOCK,), 1)
READER = """
import hashlib, mmap, os, sys
path = sys.argv[1]
fd = os.open(path, os.O_RDONLY)
size = os.fstat(fd).st_size
print(os.getxattr(path, "user.kvfs.lane").decode())
print(hashlib.sha256(os.pread(fd, size + 1, 0)).hexdigest())
with mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ) as mapped:
    print(hashlib.sha256(mapped).hexdigest())
direct = os.open(path, os.O_RDONLY | os.O_DIRECT)
buffer, hasher, offset = mmap.mmap(-1, 1 << 20), hashlib.sha256(), 0
while count := os.preadv(direct, [buffer], offset):
    hasher.update(buffer[:count])
    offset += count
    if count % 4096:
        break
print(hasher.hexdigest())
"""


@pytest.fixture(params=["xfs", "btrfs"])
def shared_extents(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    with loop_mount(request.param, tmp_path) as path:
        yield path


def read_all_ways(path: Path, data: bytes) -> str:
    """Read a file in another process, in every way; return the lane it had."""
    lane, *digests = python(READER, path).split()
    assert digests == [hashlib.sha256(data).hexdigest()] * 3
    return lane


def wait_for_view(path: Path) -> None:
    """Wait until the next open would get a view: no handle that got none is left."""
    wait_until(lambda: os.getxattr(path, "user.kvfs.lane") == b"passthrough", "it could be passed")


def make_pool(base: Path, mib: int = 256) -> Pool:
    (base / "device").mkdir()
    url = f"dir:{base / 'device'}?size={mib}MiB&segment=16MiB"
    return kvfs.create_pool(base / "pool", [url])


def scatter(pool: Pool, name: str, count: int, tail: int = BLOCK) -> bytes:
    """Make a context of sealed blocks that lie in disorder; return what it reads as."""
    space = pool.namespace("m", LAYOUT)
    seed = sum(name.encode())
    keys, _ = space.keys(range(seed * 1000, seed * 1000 + count))
    rows = np.random.default_rng(seed).integers(0, 256, (count, BLOCK), np.uint8)
    order = np.random.default_rng(seed + 1).permutation(count)
    tail_at = np.flatnonzero(order == count - 1)[0]
    order = np.append(np.delete(order, tail_at), count - 1)  # a partial block must come last
    space.put(keys[order[:-1]], rows[order[:-1]])
    data = [*rows[:-1], rows[-1][:tail]]
    space.context(name).append(keys, data)
    seal(pool)
    return b"".join(row.tobytes() for row in data)


def seal(pool: Pool) -> None:
    """Fill the open segment, so that what was put before is never written next to again."""
    space = pool.namespace("m", LAYOUT)
    first = 1_000_000 + pool.statistics().counters["blocks_put"]
    keys, _ = space.keys(range(first, first + 16))
    space.put(keys, np.zeros((16, BLOCK), np.uint8))
    pool.sync()


@pytest.fixture
def mount(shared_extents: Path) -> Iterator[tuple[Pool, Mount]]:
    with make_pool(shared_extents) as pool:
        path = shared_extents / "mnt"
        path.mkdir()
        with mount_in_background(pool, path) as mounted:
            yield pool, mounted


@pytest.mark.parametrize("tail", [BLOCK, 12_345, 8192])
def test_scattered_context_is_passed_through(mount: tuple[Pool, Mount], tail: int) -> None:
    pool, mounted = mount
    assert pool.store.state.devices[0].info.cloning.granularity == 4096
    data = scatter(pool, "c", 24, tail)
    path = mounted.mountpoint / "m/c"
    assert read_all_ways(path, data) == "native"
    wait_for_view(path)
    assert views(path)["views_built"] == 0
    assert read_all_ways(path, data) == "passthrough"
    assert views(path)["views_built"] == 1
    metrics = (mounted.mountpoint / ".kvfs/metrics").read_text()
    assert "kvfs_mount_views_built_total 1.0\n" in metrics


def views(path: Path) -> dict[str, int]:
    """Return the mount's figures of views."""
    root = next(parent for parent in path.parents if (parent / ".kvfs").is_dir())
    found = json.loads((root / ".kvfs/status.json").read_text())["mount"]["views"]
    assert isinstance(found, dict)
    return found


def test_context_is_appended_to_under_readers(mount: tuple[Pool, Mount]) -> None:
    pool, mounted = mount
    data = scatter(pool, "c", 20)
    path = mounted.mountpoint / "m/c"
    read_all_ways(path, data)
    wait_for_view(path)
    with path.open("rb", buffering=0) as early:
        assert os.getxattr(path, "user.kvfs.lane") == b"passthrough"
        context = pool.namespace("m").context("c")
        keys, _ = context.namespace.keys(range(6), context.keys[-1].tobytes())
        more = np.random.default_rng(7).integers(0, 256, (6, BLOCK), np.uint8)
        context.append(keys, more)
        seal(pool)
        longer = data + more.tobytes()
        wait_until(lambda: os.stat(path).st_size == len(longer), "the new size")
        for _ in range(3):
            read_all_ways(path, longer)
        code = "import os, sys; sys.stdout.buffer.write(os.pread(int(sys.argv[1]), 1 << 30, 0))"
        found = subprocess.run(
            [sys.executable, "-c", code, str(early.fileno())],
            pass_fds=[early.fileno()], capture_output=True, check=True, timeout=60,
        ).stdout  # fmt: skip
        assert found == data, "an open file is what it was"
    wait_until(lambda: read_all_ways(path, longer) == "passthrough", "a view of all")


def test_eviction_under_an_open_view(mount: tuple[Pool, Mount]) -> None:
    pool, mounted = mount
    data = scatter(pool, "c", 40)
    path = mounted.mountpoint / "m/c"
    read_all_ways(path, data)
    wait_for_view(path)
    with path.open("rb", buffering=0):
        assert os.getxattr(path, "user.kvfs.lane") == b"passthrough"
        for number in range(12):
            scatter(pool, f"x{number}", 24)
        assert pool.statistics().counters["segments_evicted"] > 5
        assert read_all_ways(path, data) == "passthrough"
    device = pool.statistics().devices[0]
    assert device.used_bytes <= device.capacity_bytes


def test_full_filesystem_reads_natively(tmp_path: Path) -> None:
    """There may be no space for what a view takes: nothing fails by it."""
    with loop_mount("xfs", tmp_path, mib=320) as base, make_pool(base, 64) as pool:
        path = base / "mnt"
        path.mkdir()
        data = scatter(pool, "c", 20)
        with mount_in_background(pool, path):
            read_all_ways(path / "m/c", data)
            wait_for_view(path / "m/c")
            fill(base / "ballast")
            for _ in range(3):
                read_all_ways(path / "m/c", data)
            (base / "ballast").unlink()


def fill(path: Path) -> None:
    """Take all space that is left."""
    with path.open("wb", buffering=0) as file:
        for nbytes in (MIB, 4096):
            try:
                while True:
                    file.write(bytes(nbytes))
            except OSError:
                continue


@pytest.mark.parametrize("kind", ["ext4", "tmpfs"])
def test_elsewhere_the_core_reads(kind: str, tmp_path: Path, shm: Path) -> None:
    with loop_mount("ext4", tmp_path) as ext4:
        base = ext4 if kind == "ext4" else shm
        with make_pool(base) as pool:
            assert not pool.store.state.devices[0].info.cloning.granularity
            (base / "mnt").mkdir()
            data = scatter(pool, "c", 20)
            with mount_in_background(pool, base / "mnt"):
                for _ in range(3):
                    assert read_all_ways(base / "mnt/m/c", data) == "native"
                assert views(base / "mnt/m/c")["views_failed"] == 0


@pytest.fixture
def shm(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "tmpfs"
    path.mkdir()
    result = subprocess.run(["mount", "-t", "tmpfs", "none", path], check=False)
    if result.returncode:
        pytest.skip("no tmpfs can be mounted")
    yield path
    subprocess.run(["umount", path], check=True)


def test_killed_owner_leaves_no_space_taken(shared_extents: Path) -> None:
    """A view has no name, so that it ends with the last who has it open."""
    base = shared_extents / "m"
    base.mkdir()
    mounted = MountedPool(base, dram_mib=0, segment_mib=64)
    mounted.start()
    try:
        data = random.Random(1).randbytes(9 * MIB + 77)  # less than a quarter of a segment
        write_file(mounted.path / "f", data)
        for number in range(8):
            write_file(mounted.path / f"x{number}", random.Random(number).randbytes(9 * MIB))
        wait_until(lambda: (mounted.path / "f").read_bytes() == data, "the file")
        wait_for_view(mounted.path / "f")
        before = names_and_space(base / "device")
        fd = os.open(mounted.path / "f", os.O_RDONLY)
        assert os.getxattr(mounted.path / "f", "user.kvfs.lane") == b"passthrough"
        assert views(mounted.path / "f")["views"] == 1
        mounted.expected_log.append(".")
        mounted.kill()
        assert os.pread(fd, len(data) + 1, 0) == data
        with contextlib.suppress(OSError):  # nobody is there to be told
            os.close(fd)
        if entry_at(mounted.path) is not None:
            detach(mounted.path)
        names, free_bytes = before

        def is_as_before() -> bool:
            now_names, now_free_bytes = names_and_space(base / "device")
            return now_names == names and now_free_bytes >= free_bytes - 2 * MIB

        wait_until(is_as_before, "the space is free again")
        mounted.start()
        assert (mounted.path / "f").read_bytes() == data
        mounted.close()
    finally:
        mounted.abandon()


def names_and_space(path: Path) -> tuple[list[str], int]:
    """Return the files below a directory, and what is free on its filesystem."""
    fd = os.open(path, os.O_RDONLY)
    subprocess.run(["sync", "-f", path], check=True)
    os.close(fd)
    found = os.statvfs(path)
    names = sorted(str(file.relative_to(path)) for file in path.rglob("*"))
    return names, found.f_bfree * found.f_frsize
