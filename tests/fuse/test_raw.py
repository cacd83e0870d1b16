"""Raw files through the mount: preallocated, then mapped and written in place, as engines do."""

import errno
import mmap
import os
from pathlib import Path

import pytest

from tests.fuse.mounting import MIB

pytestmark = pytest.mark.fuse
SIZE = 16 * MIB


def preallocate(path: Path, nbytes: int = SIZE) -> None:
    with path.open("wb") as file:
        file.truncate(nbytes)


def test_a_preallocated_file_is_mapped_and_written(area: Path) -> None:
    path = area / "slots.bin"
    preallocate(path)
    assert path.stat().st_size == SIZE
    for turn in range(3):
        fd = os.open(path, os.O_RDWR)
        assert os.fstat(fd).st_size == SIZE
        with mmap.mmap(fd, SIZE) as mapped:
            os.close(fd)
            offset = turn * 5 * MIB
            assert mapped[offset : offset + 4] == bytes(4)
            mapped[offset : offset + 4] = b"kvkv"
            mapped.flush()
    raw = path.read_bytes()
    assert [raw.find(b"kvkv", turn * 5 * MIB) for turn in range(3)] == [0, 5 * MIB, 10 * MIB]
    assert len(raw) == SIZE
    with path.open("r+b") as file:
        file.seek(SIZE)
        file.write(b"tail")
        os.fsync(file.fileno())
    assert path.stat().st_size == SIZE + 4
    os.truncate(path, 100)
    assert path.read_bytes() == b"kvkv" + bytes(96)
    path.rename(area / "other.bin")
    (area / "other.bin").unlink()
    assert not list(area.glob("*.bin"))


def test_a_raw_file_that_does_not_fit_is_refused(area: Path) -> None:
    path = area / "huge.bin"
    capacity = os.statvfs(area).f_blocks * 4096
    with pytest.raises(OSError, match="No space") as caught:
        preallocate(path, 2 * capacity)
    assert caught.value.errno == errno.ENOSPC
