"""OSFileSystem: locks, refusals, uncached reads, removal."""

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvfs.devices.filesystem import READ_BYTES_MAX, FileSystem, is_own_name
from kvfs.devices.osfs import (
    REMOTE_FILESYSTEMS,
    OSFileSystem,
    filesystem_type,
    nearest_existing,
    refuse_remote,
)
from kvfs.errors import BusyError, CorruptionError, NotFoundError, RefusedError
from kvfs.units import PAGE


@pytest.fixture
def files(tmp_path: Path) -> Iterator[OSFileSystem]:
    files = OSFileSystem(str(tmp_path / "root"))
    yield files
    files.close()


def test_the_lock_names_its_holder(files: OSFileSystem) -> None:
    with pytest.raises(BusyError, match=rf"kvfs\.lock: held by pid {os.getpid()};"):
        OSFileSystem(files.root)


def test_a_lock_file_left_by_a_dead_owner_is_taken(tmp_path: Path) -> None:
    (tmp_path / "kvfs.lock").write_text("4294967295 some long text of another version\n")
    files = OSFileSystem(str(tmp_path))
    assert (tmp_path / "kvfs.lock").read_text() == f"{os.getpid()}\n"
    files.close()


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    code = (
        "import os, sys; from kvfs.devices import osfs; osfs.OSFileSystem(sys.argv[1]); os._exit(7)"
    )
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert result.returncode == 7
    OSFileSystem(str(tmp_path)).close()


def test_close_is_idempotent(files: OSFileSystem) -> None:
    files.close()
    files.close()
    OSFileSystem(files.root).close()


def test_a_failed_open_leaks_nothing(files: OSFileSystem) -> None:
    before = os.listdir("/proc/self/fd")
    with pytest.raises(BusyError):
        OSFileSystem(files.root)
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_a_missing_directory_is_made_only_when_asked(tmp_path: Path) -> None:
    missing = tmp_path / "a/b"
    with pytest.raises(NotFoundError, match="mount its filesystem"):
        OSFileSystem(str(missing), create=False)
    assert not missing.exists()
    OSFileSystem(str(missing)).close()
    assert missing.stat().st_mode & 0o777 == 0o700


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotFoundError):
        OSFileSystem(str(tmp_path / "file"), create=False)


@pytest.mark.parametrize("f_type", sorted(REMOTE_FILESYSTEMS))
def test_remote_filesystems_are_refused(f_type: int) -> None:
    with pytest.raises(RefusedError) as caught:
        refuse_remote(f_type, "/mnt/kv")
    assert REMOTE_FILESYSTEMS[f_type] in str(caught.value)
    assert "/mnt/kv" in str(caught.value)
    assert "use a directory on ext4" in str(caught.value)


@pytest.mark.parametrize("f_type", [0xEF53, 0x58465342, 0x9123683E, 0x01021994, 0x794C7630])
def test_local_filesystems_are_not(f_type: int) -> None:
    refuse_remote(f_type, "/mnt/kv")


def test_filesystem_type_is_asked_of_the_kernel() -> None:
    if not Path("/dev/shm").is_dir():
        pytest.skip("no /dev/shm")
    fd = os.open("/dev/shm", os.O_RDONLY)
    assert filesystem_type(fd) == 0x01021994
    os.close(fd)
    with pytest.raises(OSError, match="fstatfs"):
        filesystem_type(-1)


def test_nearest_existing(tmp_path: Path) -> None:
    assert nearest_existing(str(tmp_path)) == str(tmp_path)
    assert nearest_existing(str(tmp_path / "x/y/z")) == str(tmp_path)


def test_files_come_and_go(files: OSFileSystem) -> None:
    files.make_directory("a/b")
    files.make_directory("a/b")
    file = files.create("a/b/one", 5000)
    assert files.list("a/b") == [("one", 5000)]
    assert os.fstat(file.fd).st_blocks * 512 >= 5000
    file.write(4998, b"end")
    file.resize(5001)
    file.sync()
    file.close()
    file.close()
    with pytest.raises(FileExistsError):
        files.create("a/b/one")
    files.rename("a/b/one", "a/two")
    assert files.list("a/b") == []
    raw = files.read("a/two")
    assert raw is not None
    assert raw == bytes(4998) + b"end"
    files.sync_directory("a")
    files.sync_directory(".")
    files.unlink("a/two")
    assert files.read("a/two") is None
    with pytest.raises(FileNotFoundError):
        files.unlink("a/two")


def test_files_are_private_and_not_inherited(files: OSFileSystem) -> None:
    file = files.create("one")
    assert os.fstat(file.fd).st_mode & 0o777 == 0o600
    assert not os.get_inheritable(file.fd)
    file.close()


def test_links_are_not_followed(files: OSFileSystem, tmp_path: Path) -> None:
    (tmp_path / "target").write_text("secret")
    os.symlink(tmp_path / "target", Path(files.root) / "link")
    with pytest.raises(OSError, match="symbolic links"):
        files.open("link")
    with pytest.raises(OSError, match="symbolic links"):
        files.read("link")
    assert [name for name, _ in files.list(".")] == ["kvfs.lock"]


def test_a_huge_file_is_not_read_whole(files: OSFileSystem) -> None:
    file = files.create("kvfs.superblock")
    file.resize(READ_BYTES_MAX + 1)
    file.close()
    with pytest.raises(CorruptionError, match=r"expected at most 64\.0 MiB"):
        files.read("kvfs.superblock")


class NoDirect(OSFileSystem):
    """A filesystem that refuses O_DIRECT."""

    def _open(self, path: str, flags: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return super()._open(path, flags)


@pytest.mark.parametrize("kind", [OSFileSystem, NoDirect])
def test_uncached_reads(tmp_path: Path, kind: type[OSFileSystem]) -> None:
    files = kind(str(tmp_path))
    data = os.urandom(10_000)
    (tmp_path / "file").write_bytes(data)
    for offset in (0, 1, 4095, 4096, 9_999, 10_000, 20_000):
        for nbytes in (0, 1, 4096, 5000, 100_000):
            read = files.read_uncached("file", offset, nbytes)
            assert read == data[offset : offset + nbytes]
    with pytest.raises(FileNotFoundError):
        files.read_uncached("none", 0, 1)
    files.close()


def test_one_unreadable_range_is_no_other_ones_loss(tmp_path: Path) -> None:
    """Where a filesystem has no O_DIRECT, ranges are read one by one."""
    files = NoDirect(str(tmp_path))
    data = np.frombuffer(os.urandom(PAGE), np.uint8)
    (tmp_path / "file").write_bytes(data.tobytes())
    file = files.open("file")
    target, statuses = np.zeros((3, PAGE), np.uint8), np.full(3, 99, np.int32)
    failed = FileSystem.read_payloads(
        files, [("file", file), ("none", file)], np.array([0, 1, 0]), np.zeros(3, np.uint64),
        np.full(3, PAGE, np.uint64), np.array([row.ctypes.data for row in target], np.uint64),
        None, statuses, uncached=True,
    )  # fmt: skip
    assert (failed, statuses.tolist()) == (1, [0, -errno.ENOENT, 0])
    assert (target[[0, 2]] == data).all()
    file.close()
    files.close()


def test_only_own_names_are_removed(files: OSFileSystem) -> None:
    root = Path(files.root)
    own = [
        "kvfs.superblock", "kvfs.superblock.new", "segments/00000001-00000002.seg",
        "segments/00000001-00000002.file", "segments/00000001-00000002.sum", "staging/x.part",
    ]  # fmt: skip
    foreign = ["precious", "segments/README", "staging/.hidden", "sub/kvfs.superblock"]
    for name in own + foreign:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("x")
        assert is_own_name(name) == (name in own)
    files.remove_tree()
    left = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    assert left == set(foreign)


def test_an_empty_tree_is_removed_to_the_root(files: OSFileSystem) -> None:
    files.make_directory("segments")
    files.remove_tree()
    assert list(Path(files.root).iterdir()) == []


def test_a_copy_has_another_location(files: OSFileSystem, tmp_path: Path) -> None:
    here = files.location()
    assert 0 < here < 1 << 64
    assert files.location() == here
    files.close()
    shutil.copytree(files.root, tmp_path / "copy")
    copy = OSFileSystem(str(tmp_path / "copy"))
    assert copy.location() not in (0, here)
    copy.close()
    os.rename(files.root, tmp_path / "moved")
    moved = OSFileSystem(str(tmp_path / "moved"))
    assert moved.location() == here
    moved.close()
