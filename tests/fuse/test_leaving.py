"""An owner that leaves its mount: what the core reads stays, though clients put until the end."""

import mmap
import os

import numpy as np
import pytest

import kvfs
from kvfs.fuse.attributes import Timeouts
from kvfs.fuse.mount import Mount, MountOptions, _Session
from kvfs.fuse.mountpoint import entry_at
from kvfs.fuse.passing import Passing
from tests.fuse.mounting import MIB, wait_until

pytestmark = pytest.mark.fuse


def write(path, data: bytes) -> None:
    with path.open("wb", buffering=0) as file:
        file.write(data)


def read_past_the_cache(fd: int, nbytes: int) -> bytes:
    with mmap.mmap(-1, nbytes) as buffer:
        return buffer[: os.preadv(fd, [buffer], 0)]


def fill(space: kvfs.Namespace, seed: int, nbytes: int) -> None:
    """Put so many bytes of new blocks at once."""
    block, per_block = space.layout.block_bytes, space.layout.block_tokens
    count = nbytes // block
    keys, _ = space.keys(np.arange(count * per_block, dtype=np.uint32) + (seed << 20))
    space.put(keys, np.full((count, block), seed, np.uint8))


def test_what_the_core_reads_is_held_to_the_end(tmp_path, expected_warnings) -> None:
    """Else the frame of an evicted file is used again, under the core's map of it."""
    expected_warnings.append("the owner is gone")
    point = tmp_path / "mnt"
    point.mkdir()
    doors: list[int] = []
    passing = Passing(doors.append, stays=True)
    options = MountOptions(timeouts=Timeouts(60, 60))
    data = np.random.default_rng(1).integers(0, 256, 2 * MIB, np.uint8).tobytes()
    with kvfs.create_pool(tmp_path / "pool", ["dram:?size=128MiB&segment=16MiB"]) as pool:
        session = _Session(pool, point, options, None, None, passing)
        mounted = Mount(session)
        file = point / "default" / "file"
        write(file, data)
        for number in range(10):  # until its segment is sealed
            write(file.with_name(f"other{number}"), os.urandom(2 * MIB))
        fd = os.open(file, os.O_RDONLY | os.O_DIRECT)
        try:
            assert read_past_the_cache(fd, MIB) == data[:MIB]
            assert os.getxattr(f"/proc/self/fd/{fd}", "user.kvfs.lane") == b"native"
            passing.leave()
            wait_until(lambda: not mounted.is_alive, "the mount is left")
            assert passing.is_left
            others = kvfs.Layout("uint8", (16 << 10,), 4)
            for seed in range(1, 31):
                fill(pool.namespace(f"n{seed % 3}", others), seed, 16 * MIB)
            fill(pool.namespace("default"), 31, 40 * MIB)
            assert read_past_the_cache(fd, MIB) == data[:MIB]
        finally:
            os.close(fd)
            os.close(doors[-1])
        wait_until(lambda: entry_at(point) is None, "the core takes the mount away")
        assert session._core is not None
        session._core.close()  # an owner that leaves goes; a test must not leave a child
