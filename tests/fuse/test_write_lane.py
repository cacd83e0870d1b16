"""Files that kvfs-core writes itself: what they hold, what stat says, and who may come between."""

import ctypes
import errno
import mmap
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvfs.fuse.mount import Mount
from kvfs.pool import Pool
from tests.fuse.mounting import MIB, MountedPool, python, sh, wait_until, write_file

pytestmark = pytest.mark.fuse
LARGE = 40 * MIB + 4321  # staged in memory first, then on the device
SMALL = MIB + 17
LIBC = ctypes.CDLL(None, use_errno=True)


def lane(path: Path) -> str:
    return os.getxattr(path, "user.kvfs.lane").decode()


def forwarded(mounted: MountedPool) -> int:
    """WRITEs that came to the owner."""
    return int(mounted.status()["mount"]["requests"].get("write", 0))


def write_pieces(fd: int, data: bytes, step: int, start: int = 0) -> None:
    for at in range(start, len(data), step):
        piece = data[at : at + step]
        assert os.pwrite(fd, piece, at) == len(piece)


@pytest.fixture
def new(mounted: MountedPool) -> Iterator[int]:
    fd = os.open(mounted.path / "f", os.O_RDWR | os.O_CREAT, 0o644)
    yield fd
    os.close(fd)


@pytest.mark.parametrize("step", [1000, 65536, MIB, 4 * MIB])
@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_written_by_the_core(
    mounted: MountedPool, rng: random.Random, size: int, step: int
) -> None:
    data = rng.randbytes(size)[: step * 3000]
    path = mounted.path / "f"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    os.write(fd, data[:step])
    assert lane(path) == "native"
    write_pieces(fd, data, step, step)
    assert os.fstat(fd).st_size == path.stat().st_size == len(data)
    os.close(fd)
    assert path.read_bytes() == data
    # Until the core has heard of it; at the end of the memory's share, and of each credit.
    assert forwarded(mounted) <= 2 + 100 * (step == 1000) + 2 * len(data) // (16 * MIB)
    mounted.stop()
    mounted.start()
    assert path.read_bytes() == data


@pytest.mark.parametrize("size", [4 * MIB, LARGE // 4096 * 4096])
def test_past_the_page_cache(mounted: MountedPool, rng: random.Random, size: int) -> None:
    data = rng.randbytes(size)
    with mmap.mmap(-1, size) as source:
        source[:] = data
        fd = os.open(mounted.path / "f", os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o644)
        with memoryview(source) as view:
            for at in range(0, size, 2 * MIB):
                assert os.write(fd, view[at : at + 2 * MIB]) == len(view[at : at + 2 * MIB])
        os.close(fd)
    assert (mounted.path / "f").read_bytes() == data
    counters = wait_until(
        lambda: (found := mounted.core_counters()).get("requests_native_write") and found,
        "the core's next count",
    )
    # As large as the kernel makes them.
    assert counters["bytes_native_write"] >= 0.9 * MIB * counters["requests_native_write"]


def test_what_was_hashed_by_the_core_is_not_hashed_again(
    pool: Pool, mount: Mount, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rng: random.Random
) -> None:
    """All but what was staged in memory, and the stride in which that ended."""
    from kvfs import file_adoption as module

    hashed: list[int] = []
    compute = module._digests

    def count(addresses: object, lengths: object) -> object:
        hashed.append(int(lengths.sum()))  # type: ignore[attr-defined]
        return compute(addresses, lengths)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "_digests", count)
    path = tmp_path / "mnt/f"
    data = rng.randbytes(LARGE)
    # In another process: this one serves the mount.
    (tmp_path / "data").write_bytes(data)

    def written() -> int:
        """Write the file; return what was hashed at its adoption."""
        hashed.clear()
        sh(f"dd if={tmp_path}/data of={path} bs=1M status=none")
        return sum(hashed)

    # Not if the first write outran the word to the core that it may write.
    assert min(written() for _ in range(4)) <= 4 * MIB + MIB
    assert sh(f"cmp {tmp_path}/data {path}") == ""
    [segment] = {
        segment.handle.nbytes: segment
        for device in pool.store.state.devices
        for segment in device.segments.values()
        if segment.handle.is_file
    }.values()
    assert segment.handle.nbytes == LARGE


def test_stat_follows(mounted: MountedPool, new: int) -> None:
    path = mounted.path / "f"
    os.write(new, b"abc")
    first = path.stat()
    assert (first.st_size, os.fstat(new).st_size) == (3, 3)
    wait_until(lambda: os.write(new, b"d") and path.stat().st_mtime_ns > first.st_mtime_ns, "time")
    assert os.fstat(new).st_mtime_ns == path.stat().st_mtime_ns
    found = {entry.name: entry.stat().st_size for entry in os.scandir(path.parent)}
    assert found["f"] == os.fstat(new).st_size
    os.utime(new, ns=(5, 5))
    assert path.stat().st_mtime_ns == 5
    os.write(new, b"e")
    assert path.stat().st_mtime_ns > 5
    os.utime(path, ns=(7, 7))
    assert lane(path) == "native"


def test_a_time_set_before_the_close_stays(mounted: MountedPool) -> None:
    path = mounted.path / "f"
    with path.open("wb", buffering=0) as file:
        file.write(b"abc")
        os.utime(path, ns=(7, 7))
    assert path.stat().st_mtime_ns == 7
    mounted.stop()
    mounted.start()
    assert path.stat().st_mtime_ns == 7


def test_another_handle_writes_too(mounted: MountedPool, rng: random.Random) -> None:
    path = mounted.path / "f"
    data = bytearray(rng.randbytes(LARGE))
    one = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    two = os.open(path, os.O_RDWR)
    for at in range(0, len(data), MIB):
        os.pwrite(one, data[at : at + MIB], at)
        if at % (5 * MIB) == 0:
            data[at + 7 : at + 11] = b"over"
            os.pwrite(two, b"over", at + 7)
    assert os.pread(two, 11, 0) == data[:11]
    os.close(two)
    os.pwrite(one, b"last", 0)
    data[:4] = b"last"
    os.close(one)
    assert path.read_bytes() == data


def test_append(mounted: MountedPool, rng: random.Random) -> None:
    path, pieces = mounted.path / "f", [rng.randbytes(rng.randrange(1, 5000)) for _ in range(200)]
    for group in range(0, 200, 40):
        with path.open("ab", buffering=0) as file:
            for piece in pieces[group : group + 40]:
                file.write(piece)
            assert lane(path) == "native"
    one, two = (os.open(path, os.O_WRONLY | os.O_APPEND) for _ in range(2))
    for number in range(20):
        os.write(two if number % 2 else one, bytes([number]))
    os.close(one)
    os.close(two)
    assert path.read_bytes() == b"".join(pieces) + bytes(range(20))


@pytest.mark.parametrize("size", [0, 1, 5 * MIB + 3, 9 * MIB, 12 * MIB])
def test_truncate_between_writes(mounted: MountedPool, rng: random.Random, size: int) -> None:
    data = rng.randbytes(9 * MIB)
    path = mounted.path / "f"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    write_pieces(fd, data, MIB)
    os.ftruncate(fd, size)
    assert os.fstat(fd).st_size == size
    os.pwrite(fd, b"end", size + 4096)
    if size == 1:
        os.truncate(path, 4 * MIB)  # through no handle
    os.close(fd)
    expected = data[:size].ljust(size + 4096, b"\0") + b"end"
    if size == 1:
        expected = expected.ljust(4 * MIB, b"\0")
    assert path.read_bytes() == expected


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_WRONLY, os.O_RDWR])
def test_cut_by_another_open_between_writes(
    mounted: MountedPool, rng: random.Random, flags: int
) -> None:
    """The core is not told that what it has hashed so far is gone."""
    path, data = mounted.path / "f", rng.randbytes(LARGE)
    write_file(path, b"former" * MIB)  # else who only reads would be refused
    fd = os.open(path, os.O_WRONLY)
    try:
        write_pieces(fd, data[: 24 * MIB], MIB)
        assert lane(path) == "native"
        os.close(os.open(path, flags | os.O_TRUNC))
        write_pieces(fd, data, MIB, 24 * MIB)
    finally:
        os.close(fd)
    expected = bytes(24 * MIB) + data[24 * MIB :]
    assert path.read_bytes() == expected
    mounted.remount()
    assert path.read_bytes() == expected


def test_sync_between_writes(mounted: MountedPool, new: int, rng: random.Random) -> None:
    data = rng.randbytes(6 * MIB)
    for at in range(0, len(data), MIB):
        os.pwrite(new, data[at : at + MIB], at)
        os.fsync(new)
    assert os.pread(new, len(data), 0) == data
    before = forwarded(mounted)
    os.pwrite(new, b"n", 0)
    assert forwarded(mounted) == before  # once on its device it stays with the core


def test_sync_under_writes(mounted: MountedPool, rng: random.Random) -> None:
    """fsync moves bytes from memory to the device while another thread writes."""
    data = rng.randbytes(20 * MIB)
    path = mounted.path / "f"
    code = """
import os, sys, threading
data = open(sys.argv[2], "rb").read()
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT, 0o644)
done = threading.Event()
def sync():
    while not done.is_set():
        os.fsync(fd)
thread = threading.Thread(target=sync)
thread.start()
for at in range(0, len(data), 50_000):
    assert os.pwrite(fd, data[at : at + 50_000], at) == len(data[at : at + 50_000])
done.set()
thread.join()
os.close(fd)
"""
    (mounted.pool_path.parent / "data").write_bytes(data)
    python(code, path, mounted.pool_path.parent / "data")
    assert path.read_bytes() == data


def test_shared_map_of_a_file_being_written(mounted: MountedPool, rng: random.Random) -> None:
    path = mounted.path / "f"
    data = bytearray(rng.randbytes(3 * MIB))
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    write_pieces(fd, data, MIB)
    with mmap.mmap(fd, len(data)) as mapped:
        for at in range(0, len(data), 50_001):
            mapped[at : at + 3] = data[at : at + 3] = b"map"
        mapped.flush()
        os.pwrite(fd, b"also", MIB)
        data[MIB : MIB + 4] = b"also"
        os.close(fd)
        mapped[5:8] = data[5:8] = b"fin"  # after close(2): written back when it is unmapped
    wait_until(lambda: path.read_bytes() == data, "what was written back")


def fallocate(fd: int, mode: int, offset: int, nbytes: int) -> int:
    ctypes.set_errno(0)
    result = LIBC.fallocate(fd, mode, ctypes.c_long(offset), ctypes.c_long(nbytes))
    return ctypes.get_errno() if result else 0


@pytest.mark.parametrize("size", [MIB, 48 * MIB])
def test_allocate(mounted: MountedPool, new: int, rng: random.Random, size: int) -> None:
    """Before the first write and after; small files and those that lie on the device."""
    path = mounted.path / "f"
    assert fallocate(new, 1, 0, size) == 0
    assert os.fstat(new).st_size == path.stat().st_size == 0
    assert fallocate(new, 0, 0, size) == 0
    assert os.fstat(new).st_size == path.stat().st_size == size
    data = rng.randbytes(size)
    write_pieces(new, data, MIB)
    assert fallocate(new, 0, size - 5, 10) == 0
    assert os.fstat(new).st_size == size + 5
    assert fallocate(new, 0, 0, 5) == 0  # it is there
    assert fallocate(new, 1, 2 * size, MIB) == 0
    for mode in (2, 3, 8, 16, 32):
        assert fallocate(new, mode, 0, 4096) == errno.EOPNOTSUPP
    os.fsync(new)
    assert os.pread(new, size + 5, 0) == data + bytes(5)
    assert fallocate(new, 0, 0, 1 << 40) == errno.ENOSPC
    with pytest.raises(OSError, match=r"Numerical|Invalid"):
        os.setxattr(path, "", b"x" * 32)  # nobody but the core says it so


@pytest.mark.parametrize("mode", [0, 1])
def test_allocating_what_is_there_changes_the_time(mounted: MountedPool, mode: int) -> None:
    """As on ext4 and tmpfs, also after another owner came."""
    path = mounted.path / "f"
    path.write_bytes(b"x" * 9000)
    os.utime(path, ns=(5, 5))
    fd = os.open(path, os.O_RDWR)
    assert os.fstat(fd).st_mtime_ns == 5
    assert fallocate(fd, mode, 0, 100) == 0
    shown_ns = os.fstat(fd).st_mtime_ns
    assert shown_ns > 5
    os.close(fd)
    mounted.stop()
    mounted.start()
    assert path.stat().st_mtime_ns == shown_ns
    assert path.read_bytes() == b"x" * 9000


def test_allocate_a_raw_file(mounted: MountedPool) -> None:
    """As engines do that map a file of their own: allocate, map, write in place, grow."""
    path = mounted.path / "f"
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    assert fallocate(fd, 0, 0, 8 * MIB) == 0
    os.close(fd)
    assert os.getxattr(path, "user.kvfs.raw") == b"1"
    fd = os.open(path, os.O_RDWR)
    assert fallocate(fd, 0, 0, 16 * MIB) == 0  # before the first write of this handle
    with mmap.mmap(fd, 16 * MIB) as mapped:
        mapped[12 * MIB : 12 * MIB + 3] = b"map"
        mapped.flush()
    assert os.pwrite(fd, b"write", 0) == 5
    assert lane(path) == "native"
    assert os.pread(fd, 3, 12 * MIB) == b"map"
    os.close(fd)
    assert path.stat().st_size == 16 * MIB
    mounted.stop()
    mounted.start()
    with path.open("rb") as file:
        assert file.read(5) == b"write"
        file.seek(12 * MIB)
        assert file.read(3) == b"map"


def test_a_pool_that_gets_full(make_mount: Callable[..., MountedPool]) -> None:
    mounted = make_mount(dir_mib=64, dram_mib=0)
    mounted.expected_log.append("NoSpaceError|could not be closed")
    path = mounted.path / "large"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    with pytest.raises(OSError, match="No space"):
        write_pieces(fd, bytes(128 * MIB), MIB)
    os.pwrite(fd, b"still taken", 0)
    with pytest.raises(OSError, match="No space"):
        os.close(fd)
    wait_until(lambda: not path.exists(), "the kernel's release")
    write_file(mounted.path / "other", b"o" * (20 * MIB))
    assert (mounted.path / "other").read_bytes() == b"o" * (20 * MIB)


def test_room_that_is_almost_used_up(make_mount: Callable[..., MountedPool]) -> None:
    """No step ahead is to be had: each write comes to the owner, and the file is whole."""
    mounted = make_mount(dir_mib=64, dram_mib=0, pool_options={"pinned_share": 1.0})
    data = random.Random(1).randbytes(44 * MIB)
    write_file(mounted.path / "large", data)
    assert (mounted.path / "large").read_bytes() == data


def test_many_writers_at_once(mounted: MountedPool) -> None:
    """What is granted ahead leaves memory for those who come later."""
    contents = [random.Random(number).randbytes(MIB + number) for number in range(60)]
    fds = [
        os.open(mounted.path / f"{number}", os.O_WRONLY | os.O_CREAT, 0o644)
        for number in range(len(contents))
    ]
    for at in range(0, 2 * MIB, 512 << 10):
        for fd, data in zip(fds, contents, strict=True):
            os.pwrite(fd, data[at : at + (512 << 10)], at)
    assert not [*(mounted.device_path / "staging").iterdir()]
    for fd in fds:
        os.close(fd)
    for number, data in enumerate(contents):
        assert (mounted.path / f"{number}").read_bytes() == data


def test_rename_over_while_open(mounted: MountedPool) -> None:
    """The rename takes in what was written so far; what follows is written natively again."""
    path = mounted.path / "target"
    write_file(path, b"old")
    fd = os.open(mounted.path / "f", os.O_WRONLY | os.O_CREAT, 0o644)
    os.write(fd, b"new")
    (mounted.path / "f").rename(path)
    os.write(fd, b"e")
    os.write(fd, b"r")
    assert os.fstat(fd).st_size == 5
    assert lane(path) == "native"
    os.close(fd)
    assert path.read_bytes() == b"newer"


def test_a_name_removed_while_written(mounted: MountedPool, new: int) -> None:
    os.write(new, b"abc")
    (mounted.path / "f").unlink()
    os.write(new, b"def")
    assert os.fstat(new).st_size == 6
    assert os.pread(new, 10, 0) == b"abcdef"


def test_a_copy_of_the_descriptor_is_closed(mounted: MountedPool, rng: random.Random) -> None:
    """close(2) of one takes the file in; what the other writes goes on natively."""
    path, data = mounted.path / "f", rng.randbytes(3 * MIB)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    os.write(fd, data[:MIB])
    os.close(os.dup(fd))
    assert path.read_bytes() == data[:MIB]
    os.write(fd, data[MIB : 2 * MIB])
    assert lane(path) == "native"
    os.write(fd, data[2 * MIB :])
    os.close(fd)
    assert path.read_bytes() == data


WRITER = """
import os, sys, time
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT, 0o644)
os.write(fd, b"x" * 100_000)
print("written", flush=True)
try:
    while True:
        os.write(fd, b"y" * 100_000)
        if os.fstat(fd).st_size > 30_000_000:
            os.ftruncate(fd, 100_000)
            os.lseek(fd, 0, 2)
except OSError as error:
    first = error.errno
found = []
for call in (lambda: os.write(fd, b"z"), lambda: os.pread(fd, 5, 0), lambda: os.fsync(fd),
             lambda: os.ftruncate(fd, 0), lambda: os.close(fd)):
    try:
        call()
        found.append(0)
    except OSError as error:
        found.append(error.errno)
print(first, *found, flush=True)
"""


@pytest.fixture
def writer(mounted: MountedPool) -> Iterator["subprocess.Popen[str]"]:
    """A process that goes on writing to a file."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(mounted.path / "w")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "written\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_the_owner_dies_under_a_writer(
    mounted: MountedPool, writer: "subprocess.Popen[str]"
) -> None:
    """Without a new owner the mount ends, and with it all files."""
    write_file(mounted.path / "whole", b"whole")
    sh(f"sync {mounted.path}")
    mounted.kill()
    assert writer.stdout is not None
    numbers = {int(number) for number in writer.stdout.readline().split()}
    assert numbers <= {errno.EIO, errno.ENOTCONN, errno.ECONNABORTED}
    mounted.start()
    assert "w" not in os.listdir(mounted.path)
    assert (mounted.path / "whole").read_bytes() == b"whole"


def test_the_core_dies_under_a_writer(
    mounted: MountedPool, writer: "subprocess.Popen[str]"
) -> None:
    mounted.expected_log.append("kvfs-core|UnavailableError|Traceback|^ |^$|ExceptionGroup|unmount")
    os.kill(mounted.core_pid, signal.SIGKILL)
    assert mounted.wait() != 0
    assert writer.stdout is not None
    numbers = {int(number) for number in writer.stdout.readline().split()}
    assert numbers <= {errno.EIO, errno.ENOTCONN, errno.ECONNABORTED}
    mounted.start()
    assert "w" not in os.listdir(mounted.path)


def test_unmounted_under_a_writer(mounted: MountedPool, writer: "subprocess.Popen[str]") -> None:
    """What its writer had not closed is given up; nothing of it is left."""
    mounted.stop()
    mounted.start()
    assert "w" not in os.listdir(mounted.path)
    assert not [*(mounted.device_path / "staging").iterdir()]


def test_writers_in_threads(mounted: MountedPool) -> None:
    """Files made, written and renamed by several processes at once are all whole."""
    code = """
import os, random, sys
base, number = sys.argv[1], int(sys.argv[2])
for i in range(40):
    size = random.Random(number * 100 + i).randrange(3_000_000)
    data = random.Random(i).randbytes(size)
    fd = os.open(f"{base}/t{number}-{i}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    for at in range(0, size, 300_000):
        assert os.write(fd, data[at : at + 300_000]) == len(data[at : at + 300_000])
    os.close(fd)
    os.rename(f"{base}/t{number}-{i}", f"{base}/f{number}-{i}")
    assert open(f"{base}/f{number}-{i}", "rb").read() == data
"""
    space = mounted.path / "space"
    space.mkdir()
    with ThreadPoolExecutor() as threads:
        for done in [threads.submit(python, code, space, number) for number in range(3)]:
            done.result()
    assert len(os.listdir(space)) == 120


def test_device_holds_little_more_than_files(make_mount: Callable[..., MountedPool]) -> None:
    """Many files share segments, and each byte is written to the device about once."""
    mounted = make_mount(dir_mib=512, dram_mib=0, segment_mib=32)
    data, count = random.Random(1).randbytes(4 * MIB), 60
    for number in range(count):
        write_file(mounted.path / f"t{number}", data)
        (mounted.path / f"t{number}").rename(mounted.path / f"f{number}")
    sh(f"sync {mounted.path}")
    status = mounted.status()
    [device] = status["pool"]["devices"]
    files = [p for p in mounted.device_path.rglob("*") if p.is_file()]
    segments = [p for p in files if p.suffix == ".seg"]
    assert len(files) <= len(segments) + 10
    assert device["bytes_written"] <= 1.05 * count * len(data)
