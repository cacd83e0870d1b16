"""Raw files through the mount: preallocated, then mapped and written in place, as engines do."""

import errno
import json
import mmap
import os
from pathlib import Path

import pytest

from tests.fuse.mounting import MIB, write_file

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


def test_a_marked_file_is_raw(area: Path) -> None:
    path = area / "slots.bin"
    write_file(path, b"x" * MIB)
    os.setxattr(path, "user.kvfs.raw", b"1")
    assert os.getxattr(path, "user.kvfs.raw") == b"1"
    assert "user.kvfs.raw" in os.listxattr(path)
    assert os.getxattr(path, "user.kvfs.lane") == b"namespace"
    [extent] = json.loads(os.getxattr(path, "user.kvfs.extents"))
    assert (extent["offset"], extent["length"]) == (0, MIB)
    with path.open("r+b", buffering=0) as file:
        os.pwrite(file.fileno(), b"in place", 100)
        os.fsync(file.fileno())
        with open(extent["path"], "rb") as below:
            assert below.read(110) == b"x" * 100 + b"in place" + b"x" * 2
    with pytest.raises(PermissionError):
        os.removexattr(path, "user.kvfs.raw")
    (area / "marked").mkdir()
    os.setxattr(area / "marked", "user.kvfs.raw", b"1")
    (area / "marked/below").mkdir()
    write_file(area / "marked/below/f", b"y")
    assert os.getxattr(area / "marked/below/f", "user.kvfs.raw") == b"1"


def test_all_who_have_a_raw_file_open_see_the_same(area: Path) -> None:
    """Mapped, read and written at the same time: there is one content, and one page cache."""
    path = area / "slots.bin"
    preallocate(path)
    reader = os.open(path, os.O_RDONLY)
    writer = os.open(path, os.O_WRONLY)
    mapper = os.open(path, os.O_RDWR)
    with mmap.mmap(mapper, SIZE) as mapped:
        for turn in range(8):
            here, there = turn * MIB, turn * MIB + 100
            mapped[here : here + 4] = b"kvkv"
            assert os.pread(reader, 4, here) == b"kvkv"
            assert os.pwrite(writer, b"abcd", there) == 4
            assert mapped[here : there + 4] == b"kvkv" + bytes(96) + b"abcd"
            assert os.pread(reader, 4, there) == b"abcd"
        os.ftruncate(mapper, SIZE + MIB)
        assert os.fstat(reader).st_size == SIZE + MIB
        assert os.pread(reader, 10, SIZE) == bytes(10)
        path.unlink()
        mapped[:2] = b"go"
        assert os.pread(reader, 4, 0) == b"gokv"
    for fd in (reader, writer, mapper):
        os.close(fd)
    assert not path.exists()
