"""How engines write, read and rewrite files that are theirs alone, beside the same on tmpfs.

What a test does here is what the engine it names does; docs/ENGINES.md says where that was read.
"""

import ctypes
import fcntl
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuse.mounting import MIB, MountedPool, wait_until, write_file

pytestmark = pytest.mark.fuse
DATA = random.Random(30).randbytes(3 * MIB)


@pytest.fixture(params=["kvfs", "tmpfs"])
def place(request: pytest.FixtureRequest, area: Path) -> Iterator[Path]:
    """A directory of kvfs, and one of a filesystem that is right by definition."""
    if request.param == "kvfs":
        yield area
        return
    path = Path(f"/dev/shm/kvfs-habits-{os.getpid()}")
    path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path)


@pytest.mark.parametrize("alignment", [512, 4096])
def test_direct_write_and_rename_over(place: Path, alignment: int) -> None:
    """LMCache's fs adapter, vLLM's fs tier and NIXL: O_EXCL, O_DIRECT, one write, rename."""
    path, temporary = place / "block", place / "block.tmp"
    write_file(path, b"former")
    early = os.open(path, os.O_RDONLY)
    size = 2 * MIB + alignment
    with mmap.mmap(-1, size + 4096) as memory:
        view = memoryview(memory)[alignment : alignment + size]  # aligned to no more than that
        view[:] = DATA[:size]
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_DIRECT
        fd = os.open(temporary, flags, 0o644)
        with pytest.raises(FileExistsError):
            os.open(temporary, flags)
        assert os.write(fd, view) == size
        os.close(fd)
        os.rename(temporary, path)
        view[:] = bytes(size)
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
        assert os.preadv(fd, [view], 0) == size
        assert view == DATA[:size]
        assert os.preadv(fd, [view], size - alignment) == alignment
        assert view[:alignment] == DATA[size - alignment : size]
        assert os.preadv(fd, [view], size) == 0
        os.close(fd)
        view.release()
    assert os.pread(early, 100, 0) == b"former"
    os.close(early)
    assert not temporary.exists()


def test_short_and_vectored_reads(place: Path) -> None:
    """LMCache and Mooncake read into several buffers, and take a short read for the end."""
    path = place / "f"
    size = 2 * MIB + 100
    write_file(path, DATA[:size])
    parts = [bytearray(1000), bytearray(0), bytearray(MIB), bytearray(7)]
    total = sum(map(len, parts))
    with path.open("rb", buffering=0) as file:
        fd = file.fileno()
        for offset in (0, 4095, MIB + 13, size - total, size - 1500, size - 1, size, size + 5000):
            for part in parts:
                part[:] = bytes(len(part))
            expected = DATA[offset : min(size, offset + total)] if offset < size else b""
            assert os.preadv(fd, parts, offset) == len(expected)
            assert b"".join(parts)[: len(expected)] == expected
        os.lseek(fd, size - 10, os.SEEK_SET)
        assert os.readv(fd, parts) == 10
        assert os.readv(fd, parts) == 0
        os.lseek(fd, 0, os.SEEK_SET)
        assert file.readall() == DATA[:size]


def test_slot_saved_by_many_small_writes_and_restored(place: Path) -> None:
    """llama.cpp: fopen("wb") over the former slot, small writes; two opens on restore."""
    path = place / "slot.bin"
    for turn in range(3):
        data = DATA[turn * 100 : turn * 100 + 700_000 - turn * 50_000]
        with path.open("wb", buffering=0) as file:
            position = 0
            while position < len(data):
                step = 4 if position < 400 else 4099
                position += file.write(data[position : position + step])
        with path.open("rb") as first, path.open("rb") as second:
            assert first.read(4) == data[:4]
            assert os.fstat(second.fileno()).st_size == len(data)
            assert second.read() == data
            assert first.read() == data[4:]


@pytest.mark.parametrize("size", [5000, 3 * MIB])
def test_written_dropped_and_read_whole(place: Path, size: int) -> None:
    """MLPerf's benchmark: write, fsync, posix_fadvise(DONTNEED), read the whole file."""
    path = place / "f"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    assert os.write(fd, DATA[:size]) == size
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    assert os.pread(fd, size + 1, 0) == DATA[:size]
    os.close(fd)
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    assert os.read(fd, size + 1) == DATA[:size]
    os.close(fd)


@pytest.mark.parametrize("size", [100, MIB - 1, 5 * MIB])
def test_ftruncate_up(place: Path, size: int) -> None:
    """NIXL and KVBM set the size first and write parts by pwrite."""
    path = place / "f"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, size)
    assert os.fstat(fd).st_size == size
    os.pwrite(fd, b"part", size // 2)
    assert os.pread(fd, 1 << 30, 0) == bytes(size // 2) + b"part" + bytes(size - size // 2 - 4)
    os.ftruncate(fd, size + 10)
    os.close(fd)
    assert path.read_bytes() == bytes(size // 2) + b"part" + bytes(size - size // 2 - 4 + 10)


def test_open_without_a_name(place: Path) -> None:
    """KVBM's disk tier: mkostemp with O_DIRECT, unlink at once, sized, read and written."""
    path = place / "tmp"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    os.unlink(path)
    os.ftruncate(fd, 4 * MIB)
    for offset in (0, MIB, 3 * MIB):
        os.pwrite(fd, DATA[:MIB], offset)
    with mmap.mmap(fd, 4 * MIB) as mapped:
        mapped[2 * MIB : 2 * MIB + 3] = b"map"
        assert os.pread(fd, 3, 2 * MIB) == b"map"
    assert os.pread(fd, MIB, 3 * MIB) == DATA[:MIB]
    assert (os.fstat(fd).st_nlink, os.fstat(fd).st_size) == (0, 4 * MIB)
    os.close(fd)
    assert os.listdir(place) == []


def test_free_space_follows_what_is_written(mounted: MountedPool) -> None:
    """SGLang's evictor and MLPerf's benchmark size themselves by f_bavail."""

    def available() -> int:
        found = os.statvfs(mounted.path)
        return found.f_bavail * found.f_frsize

    before = available()
    for turn in range(4):
        write_file(mounted.path / f"f{turn}", DATA + DATA)
        overhead = before - available() - (turn + 1) * len(DATA) * 2
        assert 0 <= overhead <= (turn + 1) * 64 * 1024 + 16 * MIB  # sidecars; an open segment
    for turn in range(4):
        os.unlink(mounted.path / f"f{turn}")
    wait_until(lambda: before - available() <= 16 * MIB, "space is given back")


LOCKER = """
import fcntl, os, sys
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.flock(fd, fcntl.LOCK_EX)
fcntl.lockf(fd, fcntl.LOCK_EX, 10, 100)
print("locked", flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize("is_killed", [False, True])
def test_locks_of_a_process_end_with_it(place: Path, is_killed: bool) -> None:
    """huggingface_hub's, vLLM's and SQLite's locks: exclusive, in ranges, waited for."""
    path = place / "lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", LOCKER, str(path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdin is not None
    assert holder.stdout is not None
    assert holder.stdout.readline() == "locked\n"
    fd = os.open(path, os.O_RDWR)
    with pytest.raises(BlockingIOError):
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    with pytest.raises(BlockingIOError):
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 109)
    fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 10, 110)  # beside the other's range
    if is_killed:
        holder.send_signal(signal.SIGKILL)
    else:
        holder.stdin.close()
    fcntl.flock(fd, fcntl.LOCK_EX)  # waits
    fcntl.lockf(fd, fcntl.LOCK_EX, 10, 100)
    os.close(fd)
    holder.wait(30)
    holder.stdout.close()
    if is_killed:
        holder.stdin.close()


def test_no_atime_and_times(place: Path) -> None:
    """O_NOATIME, and utimensat with times now, given and left alone, as caches keep their order."""
    path = place / "f"
    write_file(path, DATA[:5000])
    fd = os.open(path, os.O_RDONLY | os.O_NOATIME)
    assert os.read(fd, 10) == DATA[:10]
    os.utime(fd, ns=(7_000_000_001, 8_000_000_002))
    assert os.stat(path).st_mtime_ns == 8_000_000_002
    libc = ctypes.CDLL(None, use_errno=True)
    now, omit = (1 << 30) - 1, (1 << 30) - 2  # UTIME_NOW, UTIME_OMIT
    times = (ctypes.c_long * 4)(0, now, 0, omit)
    assert libc.utimensat(-100, os.fsencode(path), times, 0) == 0
    assert os.stat(path).st_mtime_ns == 8_000_000_002
    times = (ctypes.c_long * 4)(0, omit, 5, 3)
    assert libc.utimensat(-100, os.fsencode(path), times, 0) == 0
    assert os.fstat(fd).st_mtime_ns == 5_000_000_003
    os.utime(path)
    assert os.stat(path).st_mtime_ns > 1_600_000_000_000_000_000
    os.close(fd)
    assert path.read_bytes() == DATA[:5000]
