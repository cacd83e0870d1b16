"""System calls that engines make of a file that others have open, beside the same on tmpfs.

What a test does here is what the engine it names does; docs/ENGINES.md says where that was read.
"""

import fcntl
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Self

import pytest

from tests.fuse.mounting import MIB, python, wait_until, write_file

pytestmark = pytest.mark.fuse
OLD, NEW = random.Random(20).randbytes(2 * MIB + 5), random.Random(21).randbytes(3 * MIB + 7)


@pytest.fixture(params=["kvfs", "tmpfs"])
def place(request: pytest.FixtureRequest, area: Path) -> Iterator[Path]:
    """A directory of kvfs, and one of a filesystem that is right by definition."""
    if request.param == "kvfs":
        yield area
        return
    path = Path(f"/dev/shm/kvfs-manners-{os.getpid()}")
    path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path)


class Child:
    """Another process that runs one line of Python at a time, with a file open and mapped."""

    def __init__(self, path: Path, flags: int, protection: int) -> None:
        code = """
import mmap, os, sys
path, flags, protection = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
fd = os.open(path, flags)
mapped = mmap.mmap(fd, 0, mmap.MAP_SHARED, protection) if protection else None
print("ready", flush=True)
for line in sys.stdin:
    print(repr(eval(line)), flush=True)
"""
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, str(path), str(flags), str(protection)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(30)

    def says(self, expression: str) -> object:
        """Return what an expression gives there."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(expression + "\n")
        self._process.stdin.flush()
        return eval(self._process.stdout.readline())


BOTH = mmap.PROT_READ | mmap.PROT_WRITE


@pytest.mark.parametrize("size", [64 << 10, 3 * MIB])
def test_processes_map_one_file_for_writing(place: Path, size: int) -> None:
    """LMCache's dax adapter: several processes map what one has preallocated, and write it."""
    path = place / "f"
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)
    with Child(path, os.O_RDWR, BOTH) as one, Child(path, os.O_RDWR, BOTH) as two:
        one.says("mapped.__setitem__(slice(5, 8), b'one')")
        two.says("mapped.__setitem__(slice(9000, 9003), b'two')")
        assert two.says("mapped[5:8]") == b"one"
        assert one.says("mapped[9000:9003]") == b"two"
        # So does who writes by write(2), opened for that alone, and who reads by read(2).
        fd = os.open(path, os.O_WRONLY)
        for turn in range(50):
            os.pwrite(fd, b"%06d" % turn, 20000)
            assert one.says("mapped[20000:20006]") == two.says("os.pread(fd, 6, 20000)")
            assert one.says("mapped[20000:20006]") == b"%06d" % turn
        os.close(fd)
        one.says("mapped.__setitem__(slice(30000, 30004), b'last')")
    wait_until(lambda: path.read_bytes()[30000:30004] == b"last", "the last map was written back")
    data = path.read_bytes()
    assert (data[5:8], data[9000:9003], data[20000:20006]) == (b"one", b"two", b"000049")
    assert len(data) == size


def _shows(child: Child, expected: bytes) -> bool:
    return child.says("mapped[4090:4096]") == expected


def test_writer_beside_a_map(place: Path) -> None:
    """fio's mmap engine and NIXL's POSIX backend: who has it mapped came after who writes it."""
    path = place / "f"
    writer = os.open(path, os.O_WRONLY | os.O_CREAT)
    os.write(writer, OLD)
    with Child(path, os.O_RDWR, BOTH) as other:
        assert other.says("mapped[:100]") == OLD[:100]
        for turn in range(200):
            os.pwrite(writer, b"%06d" % turn, 4090)
            expected = b"%06d" % turn
            wait_until(partial(_shows, other, expected), "the map shows what was written")
        other.says("mapped.__setitem__(slice(0, 5), b'there')")
        other.says("mapped.flush()")
        os.pwrite(writer, b"here", 10)
        assert other.says("mapped[:14]") == b"there" + OLD[5:10] + b"here"
    os.close(writer)
    assert path.read_bytes()[:14] == b"there" + OLD[5:10] + b"here"


def test_reader_maps_beside_a_writer(place: Path) -> None:
    """vLLM's and LMCache's workers: the file is whole, and somebody has it open to change it."""
    path = place / "f"
    write_file(path, OLD)
    for flags in (os.O_RDWR, os.O_WRONLY, os.O_RDWR | os.O_APPEND):
        writer = os.open(path, flags)
        with Child(path, os.O_RDONLY, mmap.PROT_READ) as one:
            assert one.says("mapped[:]") == OLD
            with Child(path, os.O_RDONLY, mmap.PROT_READ) as two:
                assert two.says("mapped[-1000:]") == OLD[-1000:]
            assert one.says("os.fstat(fd).st_size, os.fstat(fd).st_nlink") == (len(OLD), 1)
        os.close(writer)


@pytest.mark.parametrize("step", [MIB, 70_000])
def test_rewritten_in_place_while_mapped(area: Path, step: int) -> None:
    """llama.cpp's slots: O_TRUNC and many writes, while a reader has the former content mapped.

    Elsewhere the map would end with SIGBUS, and reads would see a part of the new content.
    """
    path = area / "slot.bin"
    write_file(path, OLD)
    with Child(path, os.O_RDONLY, mmap.PROT_READ) as early:
        assert early.says("mapped[:4096]") == OLD[:4096]
        writer = os.open(path, os.O_WRONLY | os.O_TRUNC)
        for start in range(0, len(NEW), step):
            os.write(writer, NEW[start : start + step])
            assert os.stat(path).st_size == min(start + step, len(NEW))
            assert path.read_bytes() == OLD
        during = os.open(path, os.O_RDONLY)  # here: what runs another program flushes
        with mmap.mmap(during, 0, prot=mmap.PROT_READ) as mapped:
            assert os.fstat(during).st_size == len(OLD)
            assert mapped[:] == OLD
            os.close(writer)
            with Child(path, os.O_RDONLY, mmap.PROT_READ) as after:
                assert after.says("mapped[:]") == NEW
                assert after.says("os.stat(path).st_ino == os.fstat(fd).st_ino")
            assert mapped[:] == OLD
        os.close(during)
        assert early.says("mapped[:]") == OLD
        assert early.says("os.pread(fd, 1 << 30, 0)") == OLD
    assert path.read_bytes() == NEW


def test_rewritten_in_place_many_times(area: Path) -> None:
    """More rewrites than a node has numbers, each read by somebody who stays.

    Where the last number is shared, who has it cached is told ESTALE at the end of what it has.
    """
    path = area / "f"
    versions = [bytes([65 + turn]) * (5000 + turn) for turn in range(40)]
    readers = []
    for data in versions:
        write_file(path, data, os.O_TRUNC)
        readers.append(os.open(path, os.O_RDONLY))
    found = [os.pread(fd, 1 << 20, 0) for fd in readers]
    assert all(data.startswith(got) and got for data, got in zip(versions, found, strict=True))
    assert sum(data == got for data, got in zip(versions, found, strict=True)) >= len(versions) - 1
    for fd in readers:
        os.close(fd)
    with Child(path, os.O_RDONLY, mmap.PROT_READ) as last:
        assert last.says("mapped[:]") == versions[-1]


def test_writers_agree_while_readers_keep_the_former_content(area: Path) -> None:
    """The readers' number and the writers': who comes later finds its like by either."""
    path = area / "f"
    write_file(path, OLD)
    with Child(path, os.O_RDONLY, mmap.PROT_READ) as reader:
        with Child(path, os.O_RDWR, BOTH) as one:
            late, two = Child(path, os.O_RDONLY, mmap.PROT_READ), Child(path, os.O_RDWR, BOTH)
            with late, two:
                one.says("mapped.__setitem__(slice(0, 3), b'one')")
                assert two.says("mapped[:3]") == b"one"
                assert late.says("mapped[:3]") == reader.says("mapped[:3]") == OLD[:3]
                assert one.says("os.fstat(fd).st_ino") == two.says("os.fstat(fd).st_ino")
                assert one.says("os.fstat(fd).st_nlink") == 1
            assert one.says("mapped[:3]") == b"one"
        assert reader.says("mapped[:3]") == OLD[:3]
    wait_until(lambda: path.read_bytes() == b"one" + OLD[3:], "the map was written back")


def test_half_a_file_is_not_served(area: Path) -> None:
    """SGLang's HiCacheFile and LMCache's fs_native write under the name that readers look for."""
    path = area / "f"
    for flags in (os.O_RDWR, os.O_WRONLY):
        writer = os.open(path, flags | os.O_CREAT | os.O_EXCL)
        os.write(writer, OLD[:MIB])
        with pytest.raises(OSError, match="busy"):
            path.open("rb")
        with Child(path, os.O_RDWR, BOTH) as other:  # who may write as well sees what there is
            assert other.says("mapped[:]") == OLD[:MIB]
        os.write(writer, OLD[MIB:])
        os.close(writer)
        assert path.read_bytes() == OLD
        path.unlink()


def test_open_by_proc_self_fd(area: Path) -> None:
    """A caller that cannot come back by another number is served past the page cache."""
    path = area / "f"
    write_file(path, OLD)
    reader = os.open(path, os.O_RDONLY)
    write_file(path, NEW, os.O_TRUNC)
    again = os.open(f"/proc/self/fd/{reader}", os.O_RDONLY)
    assert os.pread(again, 1 << 30, 0) == NEW
    assert os.pread(reader, 1 << 30, 0) == OLD
    writer = os.open(f"/proc/self/fd/{reader}", os.O_RDWR)
    os.pwrite(writer, b"by number", 0)
    os.close(writer)
    assert path.read_bytes() == b"by number" + NEW[9:]
    assert os.pread(reader, 1 << 30, 0) == OLD
    for fd in (reader, again):
        os.close(fd)


SIGBUS = """
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
mapped = mmap.mmap(fd, 0, mmap.MAP_SHARED)
assert mapped[2 << 20] == int(sys.argv[2])
os.truncate(sys.argv[1], 1 << 20) if sys.argv[3] == "name" else os.ftruncate(fd, 1 << 20)
assert mapped[100] == int(sys.argv[2])
mapped[2 << 20]
"""


@pytest.mark.parametrize("by", ["name", "handle"])
def test_truncated_under_a_map(place: Path, by: str) -> None:
    """Beyond the new end there is SIGBUS, as vLLM's mmap loader must expect of any filesystem."""
    path = place / "f"
    write_file(path, b"x" * (3 * MIB))
    result = subprocess.run(
        [sys.executable, "-c", SIGBUS, str(path), str(ord("x")), by], check=False, timeout=30
    )
    assert result.returncode == -signal.SIGBUS
    wait_until(lambda: path.read_bytes() == b"x" * MIB, "the file has its new size")


def test_grown_under_a_map(place: Path) -> None:
    """LMCache's dax adapter and NIXL: ftruncate up, then map the rest."""
    path = place / "f"
    write_file(path, OLD)
    fd = os.open(path, os.O_RDWR)
    os.ftruncate(fd, 4 * MIB)
    with Child(path, os.O_RDWR, BOTH) as other:
        assert other.says("len(mapped)") == 4 * MIB
        assert other.says("mapped[:10], mapped[-10:]") == (OLD[:10], bytes(10))
        other.says("mapped.__setitem__(slice(-3, None), b'end')")
        assert os.pread(fd, 3, 4 * MIB - 3) == b"end"
    os.close(fd)
    wait_until(lambda: path.read_bytes()[-3:] == b"end", "the map was written back")


def test_replaced_and_unlinked_while_mapped(place: Path) -> None:
    """SGLang's and vLLM's rename over a name that a reader maps; KVBM unlinks at once."""
    path = place / "f"
    write_file(path, OLD)
    write_file(place / "new", NEW)
    with Child(path, os.O_RDONLY, mmap.PROT_READ) as early, Child(path, os.O_RDWR, BOTH) as writer:
        (place / "new").rename(path)
        assert early.says("mapped[:]") == OLD
        assert path.read_bytes() == NEW
        writer.says("mapped.__setitem__(slice(0, 3), b'old')")
        assert writer.says("mapped[:4]") == b"old" + OLD[3:4]
        with Child(path, os.O_RDONLY, mmap.PROT_READ) as late:
            path.unlink()
            assert late.says("mapped[:]") == NEW
            assert late.says("os.fstat(fd).st_nlink") == 0
    assert not path.exists()


@pytest.mark.parametrize("flags", [os.O_RDWR, os.O_RDONLY])
@pytest.mark.parametrize("size", [0, 20, 4096])
def test_lock_files(place: Path, flags: int, size: int) -> None:
    """huggingface_hub, vLLM and SQLite lock small files, whatever they open them for."""
    path = place / "lock"
    write_file(path, b"1" * size)
    code = """
import errno, fcntl, os, struct, sys
fd = os.open(sys.argv[1], int(sys.argv[2]))
for lock in (lambda: fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB),
             lambda: fcntl.lockf(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)):
    try:
        lock()
        print("taken")
    except OSError as error:
        print(errno.errorcode[error.errno])
"""
    for how in (os.O_RDWR, os.O_RDWR | os.O_TRUNC, os.O_WRONLY | os.O_APPEND):
        reader = os.open(path, os.O_RDONLY)
        fd = os.open(path, how)
        _lock(fd)
        os.write(fd, b"pid 12345")
        assert python(code, path, flags).split() == ["EAGAIN", "EAGAIN"]
        os.close(fd)
        assert python(code, path, flags).split() == ["taken", "taken"]
        os.close(reader)


def _lock(fd: int) -> None:
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
