"""What the kernel keeps of files that the core reads: dropped at the last close, and bounded."""

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.core.owner import DIRECT_IO, KEEP_CACHE, FakeOwner
from tests.core.test_read_lane import Scattered
from tests.fuse.mounting import wait_until

pytestmark = pytest.mark.fuse
MIB = 1 << 20


@pytest.fixture
def scattered(owner: FakeOwner, tmp_path: Path, rng: random.Random) -> Scattered:
    made = Scattered(owner, tmp_path, rng)
    made.flags = KEEP_CACHE
    return made


def reads(owner: FakeOwner) -> int:
    return owner.status()["native_reads"]


def cached_bytes(owner: FakeOwner) -> int:
    return owner.status()["page_cache_bytes"]


def test_pages_live_until_the_last_close(scattered: Scattered, owner: FakeOwner) -> None:
    path = owner.path / "f"
    with path.open("rb") as held:
        assert path.read_bytes() == scattered.content
        before = reads(owner)
        assert cached_bytes(owner) >= scattered.size
        assert path.read_bytes() == scattered.content  # from the cache: another has it open
        assert reads(owner) == before
        assert held.read(1) == scattered.content[:1]
    wait_until(lambda: cached_bytes(owner) == 0, "release")

    def is_dropped() -> bool:  # by a thread of its own, a moment after
        now = reads(owner)
        assert path.read_bytes() == scattered.content
        return reads(owner) > now

    wait_until(is_dropped, "pages dropped")


def test_reads_past_the_cache_are_not_counted(scattered: Scattered, owner: FakeOwner) -> None:
    scattered.flags = DIRECT_IO
    with (owner.path / "f").open("rb", buffering=0) as file:
        assert len(file.read(MIB)) == MIB
        assert cached_bytes(owner) == 0


def test_open_files_are_bounded(
    make_owner: Callable[..., FakeOwner], tmp_path: Path, rng: random.Random
) -> None:
    owner = make_owner(options="page_cache_mb=1")
    scattered = Scattered(owner, tmp_path, rng, count=61)
    scattered.flags = KEEP_CACHE
    fd = os.open(owner.path / "f", os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # no reading ahead

        def read_all() -> bytes:
            return b"".join(os.pread(fd, 1 << 16, at) for at in range(0, scattered.size, 1 << 16))

        assert read_all() == scattered.content
        assert 0 < cached_bytes(owner) <= MIB

        def is_gone() -> bool:
            before = reads(owner)
            assert os.pread(fd, 4096, 0) == scattered.content[:4096]
            return reads(owner) > before

        wait_until(is_gone, "the oldest page dropped")
        for _ in range(3):
            assert read_all() == scattered.content
        assert cached_bytes(owner) <= MIB
    finally:
        os.close(fd)
