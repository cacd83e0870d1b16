"""Reading and writing files through the mount, with the tools that people use."""

import errno
import mmap
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kvfs.units import PAGE
from tests.fuse.mounting import MIB, MountedPool, python, sh, sh_fails, wait_until, write_file

pytestmark = pytest.mark.fuse
SIZES = (0, 1, 4095, 4096, 4097, MIB - 1, MIB, MIB + 1, 3 * MIB + 17, 5 * MIB)


@pytest.mark.parametrize("size", SIZES)
def test_cp_and_back(area: Path, tmp_path: Path, size: int) -> None:
    source = tmp_path / "source"
    source.write_bytes(random.Random(size).randbytes(size))
    sh(f"cp {source} f && cmp {source} f && cp f {tmp_path}/back", area)
    assert (tmp_path / "back").read_bytes() == source.read_bytes()
    assert os.stat(area / "f").st_size == size


def test_content_survives_a_remount(mounted: MountedPool) -> None:
    rng = random.Random(1)
    contents = {f"f{size}": rng.randbytes(size) for size in (*SIZES, 5 * MIB)}
    for name, data in contents.items():
        write_file(mounted.path / name, data)
    mounted.stop()
    mounted.start()
    for name, data in contents.items():
        assert (mounted.path / name).read_bytes() == data


def test_dd_direct_both_ways(area: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(random.Random(2).randbytes(6 * MIB + 4096))
    sh(f"dd if={source} of=f bs=1M oflag=direct status=none && cmp {source} f", area)
    sh(f"dd if=f of={tmp_path}/back bs=64K iflag=direct status=none", area)
    sh(f"cmp {source} {tmp_path}/back")
    # Direct reads need no alignment of the server.
    sh("dd if=f of=/dev/null bs=512 skip=77 count=9 iflag=direct status=none", area)


def test_random_reads_are_right(area: Path) -> None:
    data = random.Random(3).randbytes(7 * MIB + 123)
    write_file(area / "f", data)
    rng = random.Random(4)
    with (area / "f").open("rb", buffering=0) as file:
        for _ in range(300):
            offset, size = rng.randrange(len(data) + 10), rng.choice((1, 100, 4096, 200_000, MIB))
            assert os.pread(file.fileno(), size, offset) == data[offset : offset + size]


def test_mmap_from_another_process(area: Path) -> None:
    data = random.Random(5).randbytes(3 * MIB + 5)
    write_file(area / "f", data)
    code = """
import hashlib, mmap, sys
with open(sys.argv[1], "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as whole:
    print(hashlib.sha256(whole).hexdigest(), whole[2_000_000])
"""
    digest, byte = python(code, area / "f").split()
    assert sh(f"sha256sum {area}/f").split()[0] == digest
    assert int(byte) == data[2_000_000]


def test_writing_through_a_shared_map(area: Path) -> None:
    code = """
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT, 0o644)
os.ftruncate(fd, 3 << 20)
whole = mmap.mmap(fd, 3 << 20)
os.close(fd)
whole[5:10] = b"hello"
whole[(2 << 20) + 1:(2 << 20) + 3] = b"yo"
whole.flush()
whole[0:1] = b"x"
whole.close()
"""
    python(code, area / "f")
    wait_until(lambda: _opens(area / "f"), "the mapped file is whole")
    data = (area / "f").read_bytes()
    assert len(data) == 3 * MIB
    assert data[:11] == b"x\0\0\0\0hello\0"
    assert data[(2 << 20) :][:4] == b"\0yo\0"


def _opens(path: Path) -> bool:
    try:
        path.open("rb").close()
    except OSError as error:
        if error.errno == errno.EBUSY:
            return False
        raise
    return True


def test_exclusive_and_truncating_opens(area: Path) -> None:
    path = area / "f"
    write_file(path, b"one", os.O_EXCL)
    with pytest.raises(FileExistsError):
        write_file(path, b"two", os.O_EXCL)
    assert path.read_bytes() == b"one"
    write_file(path, b"2", os.O_TRUNC)
    assert path.read_bytes() == b"2"
    os.close(os.open(path, os.O_WRONLY | os.O_TRUNC))
    assert path.read_bytes() == b""


def test_append(area: Path) -> None:
    path = area / "f"
    whole = b""
    for i in range(5):
        part = bytes([65 + i]) * (300_000 * i + 7)
        write_file(path, part, os.O_APPEND)
        whole += part
        assert path.read_bytes() == whole
    sh("for i in 1 2 3; do echo $i >> log; done", area)
    assert (area / "log").read_text() == "1\n2\n3\n"
    sh("(echo a; echo b; echo c) > log", area)
    assert (area / "log").read_text() == "a\nb\nc\n"


def test_truncate_by_name_and_by_handle(area: Path) -> None:
    path = area / "f"
    data = random.Random(6).randbytes(2 * MIB + 100)
    write_file(path, data)
    for size in (MIB + 5, 10, 3 * MIB, 0, 4096):
        os.truncate(path, size)
        data = data[:size] + bytes(max(0, size - len(data)))
        assert os.stat(path).st_size == size
        assert path.read_bytes() == data
    fd = os.open(path, os.O_RDWR)
    os.pwrite(fd, b"abc", 8000)
    assert os.fstat(fd).st_size == 8003
    os.ftruncate(fd, 8002)
    assert os.fstat(fd).st_size == os.stat(path).st_size == 8002
    assert os.pread(fd, 100, 7998) == b"\0\0ab"
    os.close(fd)
    assert path.read_bytes() == bytes(8000) + b"ab"


def test_change_in_place_makes_a_new_version(area: Path) -> None:
    path = area / "f"
    data = bytearray(random.Random(7).randbytes(3 * MIB))
    write_file(path, bytes(data))
    inode = os.stat(path).st_ino
    fd = os.open(path, os.O_RDWR)
    for offset in (0, 5000, MIB - 3, 3 * MIB - 1):
        os.pwrite(fd, b"change", offset)
        data[offset : offset + 6] = b"change"
    assert os.pread(fd, len(data), 0) == data
    os.close(fd)
    assert path.read_bytes() == data
    assert os.stat(path).st_ino == inode


def test_opening_for_writing_alone_changes_nothing(area: Path) -> None:
    path = area / "f"
    write_file(path, b"x" * 9000)
    before = os.stat(path)
    os.close(os.open(path, os.O_RDWR))
    os.close(os.open(path, os.O_WRONLY))
    after = os.stat(path)
    assert (after.st_mtime_ns, after.st_ctime_ns) == (before.st_mtime_ns, before.st_ctime_ns)
    assert path.read_bytes() == b"x" * 9000


def test_size_grows_while_writing_and_nobody_reads_a_part(area: Path) -> None:
    path = area / "f"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    for i in range(1, 4):
        os.write(fd, b"x" * 100_000)
        assert os.fstat(fd).st_size == os.stat(path).st_size == 100_000 * i
    with pytest.raises(OSError, match="busy"):
        path.open("rb")
    os.close(fd)
    assert path.read_bytes() == b"x" * 300_000


def test_former_content_is_read_while_it_is_replaced(area: Path) -> None:
    path = area / "f"
    old, new = random.Random(8).randbytes(2 * MIB), random.Random(9).randbytes(3 * MIB)
    write_file(path, old)
    with path.open("rb", buffering=0) as early:
        fd = os.open(path, os.O_WRONLY | os.O_TRUNC)
        os.write(fd, new[:MIB])
        with path.open("rb", buffering=0) as during:
            assert during.read(MIB) == old[:MIB]
            for start in range(MIB, 3 * MIB, MIB):
                os.write(fd, new[start : start + MIB])
            os.close(fd)
            with path.open("rb", buffering=0) as after:
                # Three views of two versions at once; none may see the other's bytes.
                for offset in range(0, 2 * MIB, 4096 * 37):
                    assert os.pread(after.fileno(), 4096, offset) == new[offset : offset + 4096]
                    assert os.pread(early.fileno(), 4096, offset) == old[offset : offset + 4096]
                    assert os.pread(during.fileno(), 4096, offset) == old[offset : offset + 4096]
    assert path.read_bytes() == new


def test_end_of_replaced_content_is_where_it_was(area: Path) -> None:
    """Who has the former content open has its size as well, and its own page cache."""
    path = area / "f"
    write_file(path, b"a" * 29376)
    with path.open("rb", buffering=0) as early:
        writer = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.write(writer, b"b" * 30000)
        os.close(writer)
        assert os.fstat(early.fileno()).st_size == 29376
        assert early.read(40000) == b"a" * 29376
        assert os.pread(early.fileno(), 4096, 40000) == b""
        assert path.read_bytes() == b"a" * 29376 + b"b" * 30000


def test_end_of_a_small_replaced_file_is_an_error_and_no_zeros(area: Path) -> None:
    """The kernel has one size for all who have an inode open; it must not move under a writer.

    Small files stay on one inode, because they may be lock files.
    """
    path = area / "f"
    write_file(path, b"a" * 3000)
    with path.open("rb", buffering=0) as early:
        writer = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.write(writer, b"b" * 30000)
        for offset in (0, 20000):
            with pytest.raises(OSError, match=r"[Ss]tale"):
                os.pread(early.fileno(), 4096, offset)
        os.write(writer, b"c" * 10)
        os.close(writer)
        with pytest.raises(OSError, match=r"[Ss]tale"):
            os.pread(early.fileno(), 4096, 20000)
        assert path.read_bytes() == b"a" * 3000 + b"b" * 30000 + b"c" * 10
    assert path.read_bytes() == b"a" * 3000 + b"b" * 30000 + b"c" * 10


def read_map(fd: int, nbytes: int) -> bytes | None:
    """Read a private map through a system call; None where the program would meet SIGBUS."""
    with mmap.mmap(fd, nbytes, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ) as mapped:
        pipe = os.pipe()
        try:
            with memoryview(mapped) as view:
                return os.read(pipe[0], os.write(pipe[1], view))
        except OSError as error:
            if error.errno != errno.EFAULT:
                raise
            return None
        finally:
            os.close(pipe[0])
            os.close(pipe[1])


@pytest.mark.parametrize("who", ["writer", "reader"])
def test_a_private_map_shows_its_bytes_to_nobody_else(mounted: MountedPool, who: str) -> None:
    """Small files stay on one inode: what one has mapped must not come to another's cache."""
    path = mounted.path / "f"
    write_file(path, b"a" * PAGE)
    if who == "writer":
        with path.open("rb", buffering=0) as reader, path.open("r+b", buffering=0) as writer:
            writer.write(b"b" * PAGE)
            assert read_map(writer.fileno(), PAGE) is None
            assert os.pread(reader.fileno(), PAGE, 0) == b"a" * PAGE
            assert os.pread(writer.fileno(), PAGE, 0) == b"b" * PAGE
            reader.close()
            assert read_map(writer.fileno(), PAGE) == b"b" * PAGE
            writer.write(b"c")
            assert os.pread(writer.fileno(), 9000, 0) == b"b" * PAGE + b"c"
    else:
        with path.open("r+b", buffering=0) as writer:
            writer.write(b"b" * 100)
            with path.open("rb", buffering=0) as reader:
                assert read_map(reader.fileno(), PAGE) is None
                assert os.pread(writer.fileno(), PAGE, 0) == b"b" * 100 + b"a" * 3996
                assert os.pread(reader.fileno(), PAGE, 0) == b"a" * PAGE
    assert path.read_bytes()[:100] == b"b" * 100


def test_a_private_map_beside_readers_of_the_same(mounted: MountedPool) -> None:
    path = mounted.path / "f"
    write_file(path, b"a" * PAGE)
    with path.open("rb") as reader, path.open("r+b", buffering=0) as writer:
        assert reader.read() == read_map(writer.fileno(), PAGE) == b"a" * PAGE
    with path.open("r+b", buffering=0) as writer:
        writer.write(b"b")
        os.close(os.dup(writer.fileno()))
        with path.open("rb") as reader, path.open("r+b", buffering=0) as other:
            assert read_map(other.fileno(), PAGE) == reader.read() == b"b" + b"a" * (PAGE - 1)


def test_pages_of_a_private_map_end_with_it(mounted: MountedPool) -> None:
    """Who has the former content opens it anew: it finds none of the pages of a map by another."""
    path = mounted.path / "f"
    write_file(path, b"a" * 3000)
    early = os.open(path, os.O_RDONLY)
    assert os.pread(early, 3000, 0) == b"a" * 3000
    writer = os.open(path, os.O_RDWR)
    os.write(writer, b"b" * 3000)
    os.close(early)
    with mmap.mmap(writer, 3000, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ) as mapped:
        assert mapped[:] == b"b" * 3000
        with path.open("rb", buffering=0) as reader:
            assert reader.read(3000) == b"a" * 3000
        assert mapped[:] == b"b" * 3000
    os.close(writer)
    assert path.read_bytes() == b"b" * 3000


def test_readers_of_former_content_keep_its_end(area: Path) -> None:
    """The kernel has one size for all handles of an inode: readers keep an inode of their own."""
    path = area / "f"
    write_file(path, b"a" * 29376)
    with path.open("rb", buffering=0) as early:
        writer = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.write(writer, b"b" * 30000)
        for _ in range(2):
            assert os.pread(early.fileno(), 4096, 0) == b"a" * 4096
            assert os.pread(early.fileno(), 4096, 28672) == b"a" * 704
            assert os.pread(early.fileno(), 4096, 40000) == b""
            assert os.fstat(early.fileno()).st_size == 29376
            if writer:
                os.write(writer, b"c" * 10)
                os.close(writer)
                writer = 0
        os.truncate(path, 5)
        assert os.pread(early.fileno(), 50_000, 0) == b"a" * 29376
        assert path.read_bytes() == b"a" * 5


@pytest.mark.parametrize("how", ["unlink", "rename"])
def test_attributes_of_a_file_without_a_name(area: Path, how: str) -> None:
    """They go on to follow what is written, as on any filesystem."""
    path = area / "f"
    write_file(path, b"a" * 5000)
    writer = os.open(path, os.O_RDWR)
    os.chmod(path, 0o604)
    os.utime(path, ns=(7, 7))
    if how == "rename":
        write_file(area / "g", b"g")
        os.rename(area / "g", path)
    else:
        os.unlink(path)

    def shown() -> tuple[int, int, int]:
        found = os.fstat(writer)
        return found.st_mode & 0o777, found.st_mtime_ns, found.st_nlink

    assert shown() == (0o604, 7, 0)
    os.fchmod(writer, 0o640)
    os.utime(writer, ns=(9, 9))
    assert shown() == (0o640, 9, 0)
    os.write(writer, b"b")
    mode, mtime_ns, _ = shown()
    assert (mode, mtime_ns > 9) == (0o640, True)
    os.utime(writer, ns=(9, 9))
    os.ftruncate(writer, 10)
    assert os.fstat(writer).st_mtime_ns > 9
    os.close(writer)


def test_unlinked_file_lives_in_its_handles(area: Path) -> None:
    path = area / "f"
    data = random.Random(10).randbytes(2 * MIB + 9)
    write_file(path, data)
    reader = os.open(path, os.O_RDONLY)
    os.unlink(path)
    assert not path.exists()
    found = os.fstat(reader)
    assert (found.st_size, found.st_nlink) == (len(data), 0)
    os.posix_fadvise(reader, 0, 0, os.POSIX_FADV_DONTNEED)
    assert os.pread(reader, len(data), 0) == data
    os.close(reader)

    writer = os.open(path, os.O_RDWR | os.O_CREAT)
    os.write(writer, b"0123456789")
    os.unlink(path)
    os.ftruncate(writer, 5)
    os.fchmod(writer, 0o600)
    assert os.fstat(writer).st_size == 5
    assert os.pread(writer, 10, 0) == b"01234"
    os.close(writer)
    assert not path.exists()


def test_rename_over_an_open_file(area: Path) -> None:
    old, new = random.Random(11).randbytes(MIB), random.Random(12).randbytes(2 * MIB)
    write_file(area / "f", old)
    write_file(area / "new", new)
    with (area / "f").open("rb", buffering=0) as early:
        os.rename(area / "new", area / "f")
        assert (area / "f").read_bytes() == new
        assert early.read(MIB) == old
    assert not (area / "new").exists()


def test_rename_of_a_file_that_is_still_open(area: Path) -> None:
    write_file(area / "f", b"old")
    fd = os.open(area / "tmp", os.O_WRONLY | os.O_CREAT)
    os.write(fd, b"new")
    os.fsync(fd)
    os.rename(area / "tmp", area / "f")
    os.write(fd, b" and more")
    os.close(fd)
    assert (area / "f").read_bytes() == b"new and more"


def test_two_writers_share_one_file(area: Path) -> None:
    path = area / "f"
    one = os.open(path, os.O_RDWR | os.O_CREAT)
    two = os.open(path, os.O_WRONLY)
    os.pwrite(one, b"1" * 10, 0)
    os.pwrite(two, b"2" * 10, 10)
    assert os.pread(one, 100, 0) == b"1" * 10 + b"2" * 10
    os.close(one)
    with pytest.raises(OSError, match="busy"):
        path.open("rb")
    os.pwrite(two, b"3", 20)
    os.close(two)
    assert path.read_bytes() == b"1" * 10 + b"2" * 10 + b"3"


def test_descriptor_shared_with_a_child(area: Path) -> None:
    """Every exit of a child flushes; what the parent writes afterwards must arrive too."""
    code = """
import os, subprocess, sys
with open(sys.argv[1], "wb", buffering=0) as file:
    for i in range(3):
        subprocess.run(["sh", "-c", "echo child"], stdout=file, check=True)
        file.seek(0, os.SEEK_END)
        file.write(b"parent\\n")
"""
    python(code, area / "f")
    assert (area / "f").read_text() == "child\nparent\n" * 3


def test_large_file_changed_after_a_flush(area: Path) -> None:
    """A large file is adopted by its first flush, as its own segment; more bytes start anew."""
    data = random.Random(13).randbytes(5 * MIB)
    path = area / "f"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    for start in range(0, len(data), MIB):
        os.write(fd, data[start : start + MIB])
    os.close(os.dup(fd))  # flushes
    assert os.pread(fd, 100, 7 * MIB) == data[7 * MIB :][:100]
    os.write(fd, b"tail")
    os.pwrite(fd, b"head", 0)
    os.close(fd)
    assert path.read_bytes() == b"head" + data[4:] + b"tail"


def test_fsync_answers_while_open_and_after(area: Path) -> None:
    fd = os.open(area / "f", os.O_RDWR | os.O_CREAT)
    os.write(fd, b"x" * MIB)
    os.fsync(fd)
    os.fdatasync(fd)
    os.close(fd)
    for flags in (os.O_RDONLY, os.O_RDWR):
        fd = os.open(area / "f", flags)
        os.fsync(fd)
        os.close(fd)
    fd = os.open(area, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def test_python_and_shell_habits(area: Path) -> None:
    (area / "t").write_text("lines\n" * 1000)
    with (area / "t").open() as file:
        assert sum(1 for _ in file) == 1000
    with (area / "b").open("w+b") as file:
        file.write(b"abc")
        file.seek(0)
        assert file.read() == b"abc"
    sh("tar cf a.tar t b && tar xf a.tar -C . && sort t | uniq -c > counted && touch t new", area)
    assert "1000 lines" in (area / "counted").read_text()
    assert sh_fails("cat none", area).endswith("No such file or directory\n")
    shutil.copytree(area, area.parent / f"{area.name}-copy")
    sh(f"diff -r {area} {area}-copy")
    shutil.rmtree(f"{area}-copy")


def test_readers_at_the_same_time(area: Path) -> None:
    data = random.Random(14).randbytes(8 * MIB)
    write_file(area / "f", data)
    readers = [
        subprocess.Popen(["cmp", area / "f", "-"], stdin=subprocess.PIPE, stdout=sys.stderr)
        for _ in range(6)
    ]
    for reader in readers:
        reader.communicate(data, timeout=30)
        assert reader.returncode == 0


def test_private_map_of_a_file_being_written(area: Path) -> None:
    fd = os.open(area / "f", os.O_RDWR | os.O_CREAT)
    os.write(fd, b"abc" * 5000)
    with mmap.mmap(fd, 0, flags=mmap.MAP_PRIVATE) as whole:
        assert whole[3000:3003] == b"abc"
    os.close(fd)


def test_fio_verifies(area: Path) -> None:
    if shutil.which("fio") is None:
        pytest.skip("fio is not installed")
    for mode, direct in (("write", 0), ("randwrite", 1)):
        sh(
            f"fio --name=v --filename=f-{mode} --rw={mode} --bs=64k --size=4M --direct={direct} "
            "--verify=crc32c --do_verify=1 --verify_fatal=1 --end_fsync=1",
            area,
        )


@pytest.mark.parametrize("how", ["unlink", "rename"])
def test_writer_of_a_large_file_without_a_name(area: Path, how: str) -> None:
    """What was flushed is a segment by then; its writer reads and writes on."""
    data = random.Random(15).randbytes(6 * MIB)
    path = area / "f"
    write_file(path, data)
    fd = os.open(path, os.O_RDWR)
    os.pwrite(fd, b"head", 0)
    os.close(os.dup(fd))  # flushes
    if how == "unlink":
        os.unlink(path)
    else:
        write_file(area / "g", b"g")
        os.rename(area / "g", path)
    assert os.pread(fd, 100, MIB) == data[MIB:][:100]
    os.pwrite(fd, b"tail", len(data))
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    assert os.fstat(fd).st_size == len(data) + 4
    assert os.pread(fd, len(data) + 4, 0) == b"head" + data[4:] + b"tail"
    os.close(fd)


def test_reading_open_that_truncates(area: Path) -> None:
    path = area / "f"
    for size in (100, 2 * MIB, 9 * MIB, 0):
        write_file(path, bytes(size), os.O_TRUNC)
        os.utime(path, (5, 5))
        with path.open("rb") as early:
            fd = os.open(path, os.O_RDONLY | os.O_TRUNC)
            assert os.read(fd, 10) == b""
            os.close(fd)
            found = path.stat()
            assert found.st_size == 0
            assert found.st_mtime > 5
            assert size == 100 or early.read() == bytes(size), (
                "an earlier reader keeps what it opened"
            )


def test_size_of_a_file_without_a_name(area: Path) -> None:
    """It is what its writers see, or else they would append in the wrong place."""
    path = area / "f"
    write_file(path, b"a" * 1000)
    writer = os.open(path, os.O_RDWR | os.O_APPEND)
    os.write(writer, b"b" * 500)
    with path.open("rb") as late:
        os.unlink(path)
        assert os.fstat(writer).st_size == 1500
        os.write(writer, b"c")
        assert os.pread(writer, 2000, 0) == b"a" * 1000 + b"b" * 500 + b"c"
        assert late.read() == b"a" * 1000
    os.close(writer)
