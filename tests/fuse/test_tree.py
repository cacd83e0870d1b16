"""Directories, names and attributes through the mount."""

import errno
import os
import stat
from pathlib import Path

import pytest

from tests.fuse.mounting import MountedPool, python, sh, sh_fails, wait_until, write_file

pytestmark = pytest.mark.fuse


def test_root_lists_namespaces_and_files(mounted: MountedPool) -> None:
    (mounted.path / "llama").mkdir()
    write_file(mounted.path / "note", b"hello")
    assert sorted(os.listdir(mounted.path)) == [".kvfs", "default", "llama", "note"]
    assert os.stat(mounted.path).st_ino == 1
    assert sh("cat note", mounted.path) == "hello"
    assert sh("getfattr --only-values -n user.kvfs.namespace note", mounted.path) == "default"


def test_tree_below_a_namespace(shared: MountedPool) -> None:
    sh("mkdir -p tree/a/b/c && echo x > tree/a/b/c/f && echo y > tree/a/g", shared.path)
    found = sh("find tree | sort", shared.path).split()
    assert found == ["tree", "tree/a", "tree/a/b", "tree/a/b/c", "tree/a/b/c/f", "tree/a/g"]
    sh("rm -r tree/a && rmdir tree", shared.path)
    assert "tree" not in os.listdir(shared.path)


def test_rmdir_refuses_what_is_not_empty(shared: MountedPool) -> None:
    sh("mkdir -p rmdi/d && echo x > rmdi/d/f", shared.path)
    for name in ("rmdi", "rmdi/d"):
        with pytest.raises(OSError, match="not empty"):
            os.rmdir(shared.path / name)
    with pytest.raises(NotADirectoryError):
        os.rmdir(shared.path / "rmdi/d/f")
    with pytest.raises(IsADirectoryError):
        os.unlink(shared.path / "rmdi/d")
    with pytest.raises(OSError, match="busy"):
        os.rmdir(shared.path / "default")


def test_rename(shared: MountedPool) -> None:
    path = shared.path
    sh(
        "mkdir -p rena/d rena/e other && echo 1 > rena/f && echo 2 > rena/g && echo 3 > rena/e/h",
        path,
    )
    sh("mv rena/f rena/d/f2 && mv rena/g rena/d/f2", path)
    assert sh("cat rena/d/f2; ls rena/d rena", path).split() == [
        "2",
        "rena:",
        "d",
        "e",
        "rena/d:",
        "f2",
    ]
    assert sh("mv -n rena/e/h rena/d/f2; cat rena/d/f2 rena/e/h", path) == "2\n3\n"
    sh("mv rena/d rena/e/d && mv rena renamed", path)
    assert sh("cat renamed/e/d/f2", path) == "2\n"
    with pytest.raises(OSError, match="cross-device"):
        os.rename(path / "renamed/e/h", path / "other/h")
    sh("mv renamed/e/h other/h", path)  # mv copies then
    assert sh("cat other/h", path) == "3\n"
    with pytest.raises(OSError, match="not empty"):
        os.rename(path / "renamed/e/d", path / "renamed/e")
    (path / "other/empty").mkdir()
    (path / "other/full").mkdir()
    write_file(path / "other/full/x", b"x")
    with pytest.raises(OSError, match="not empty"):
        os.rename(path / "other/empty", path / "other/full")
    os.rename(path / "other/full", path / "other/empty")
    assert os.listdir(path / "other/empty") == ["x"]


def test_names(area: Path) -> None:
    write_file(area / ("n" * 255), b"1")
    with pytest.raises(OSError, match="name too long"):
        write_file(area / ("n" * 256), b"1")
    odd = os.fsencode(area) + b"/\xff\xfe odd \n name"
    os.close(os.open(odd, os.O_WRONLY | os.O_CREAT))
    assert odd.rpartition(b"/")[2] in os.listdir(os.fsencode(area))
    os.unlink(odd)
    for make in (os.mkdir, lambda name: os.close(os.open(name, os.O_CREAT | os.O_EXCL))):
        with pytest.raises(FileExistsError):
            make(area / ("n" * 255))


@pytest.mark.parametrize(
    ("call", "number"),
    [
        ("os.link(p + '/f', p + '/g')", errno.EPERM),
        ("os.symlink('f', p + '/g')", errno.EPERM),
        ("os.mkfifo(p + '/g')", errno.EPERM),
        ("os.readlink(p + '/f')", errno.EINVAL),
        ("os.mkdir(p + '/f/g')", errno.ENOTDIR),
        ("os.open(p + '/none', os.O_RDONLY)", errno.ENOENT),
        ("os.open(p, os.O_WRONLY)", errno.EISDIR),
        ("os.rename(p, p + '/below')", errno.EINVAL),
        ("os.mkdir(p + '/../.kvfs/x')", errno.EROFS),
        ("os.unlink(p + '/../.kvfs/metrics')", errno.EROFS),
        ("os.rename(p + '/../.kvfs', p + '/x')", errno.EROFS),
        ("os.rename(p + '/f', p + '/../.kvfs/x')", errno.EROFS),
        ("os.rmdir(p + '/../.kvfs')", errno.EROFS),
        ("os.chmod(p + '/../.kvfs/metrics', 0)", errno.EROFS),
        ("os.open(p + '/../.kvfs/metrics', os.O_WRONLY)", errno.EROFS),
        ("os.setxattr(p, 'trusted.other', b'1')", errno.ENOTSUP),
        ("os.setxattr(p + '/f', 'user.kvfs.tokens', b'1')", errno.ENOTSUP),
        ("os.setxattr(p + '/f', 'user.kvfs.raw', b'2')", errno.EINVAL),
        ("os.getxattr(p + '/f', 'user.kvfs.none')", errno.ENODATA),
        ("os.getxattr(p + '/f', 'user.other')", errno.ENODATA),
        ("os.removexattr(p + '/f', 'user.other')", errno.ENODATA),
        ("os.removexattr(p + '/f', 'user.kvfs.tokens')", errno.ENOTSUP),
    ],
)
def test_errnos(area: Path, call: str, number: int) -> None:
    write_file(area / "f", b"x")
    with pytest.raises(OSError) as caught:  # noqa: PT011 - the number is compared below
        eval(call, {"os": os, "p": str(area)})
    assert caught.value.errno == number


def test_mknod_makes_an_empty_file(area: Path) -> None:
    os.mknod(area / "f", 0o600 | stat.S_IFREG)
    found = os.stat(area / "f")
    assert (found.st_size, found.st_mode) == (0, stat.S_IFREG | 0o600)


def test_attributes(area: Path) -> None:
    write_file(area / "f", b"x" * 5000)
    found = os.stat(area / "f")
    assert (found.st_size, found.st_blocks, found.st_nlink) == (5000, 10, 1)
    for target in (area, area / "f"):
        os.chmod(target, 0o711)
        os.utime(target, ns=(1_000_000_007, 2_000_000_009))
        found = os.stat(target)
        assert stat.S_IMODE(found.st_mode) == 0o711
        assert found.st_mtime_ns == 2_000_000_009
        assert found.st_ctime_ns > 2_000_000_009
    sh("umask 027; mkdir d; echo x > d/g", area)
    assert stat.S_IMODE(os.stat(area / "d").st_mode) == 0o750
    assert stat.S_IMODE(os.stat(area / "d/g").st_mode) == 0o640


def test_times_set_before_close_arrive(mounted: MountedPool) -> None:
    path = mounted.path / "f"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    os.write(fd, b"x")
    os.utime(fd, ns=(1, 5_000_000_000))
    os.close(fd)
    assert os.stat(path).st_mtime_ns == 5_000_000_000
    sh("sync -f .", mounted.path)
    fd = os.open(mounted.path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
    assert os.stat(path).st_mtime_ns == 5_000_000_000
    mounted.stop()
    mounted.start()
    assert os.stat(path).st_mtime_ns == 5_000_000_000


def test_cp_keeps_attributes(area: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(100_000))
    os.chmod(source, 0o604)
    os.utime(source, ns=(1, 1_600_000_000_000_000_000))
    sh(f"cp -a {source} copy && cmp {source} copy", area)
    found, wanted = os.stat(area / "copy"), os.stat(source)
    assert found.st_mode == wanted.st_mode
    assert found.st_mtime_ns == wanted.st_mtime_ns


def test_set_group_id_directory_hands_on_its_group(area: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("needs root to choose a group")
    os.chown(area, -1, 4711)
    os.chmod(area, 0o2775)
    (area / "d").mkdir()
    write_file(area / "d/f", b"x")
    assert os.stat(area / "d").st_gid == 4711
    assert os.stat(area / "d").st_mode & stat.S_ISGID
    assert os.stat(area / "d/f").st_gid == 4711


def test_df_and_statfs_tell_the_truth(mounted: MountedPool) -> None:
    def used() -> int:
        found = os.statvfs(mounted.path)
        return (found.f_blocks - found.f_bfree) * found.f_frsize

    assert os.statvfs(mounted.path).f_blocks * 4096 == 256 << 20
    assert used() == 0
    write_file(mounted.path / "f", os.urandom(10 << 20))
    assert used() == (10 << 20) + 12288  # a file segment of its own size, and its sidecar
    line = sh("df -T .", mounted.path).splitlines()[1].split()
    assert line[:2] == ["kvfs", "fuse.kvfs"]
    assert int(line[2]) == 256 << 10
    assert "kvfs" in sh(f"findmnt -no SOURCE {mounted.path}")
    os.unlink(mounted.path / "f")
    wait_until(lambda: used() == 0, "space of an unlinked file given back")


def test_listing_of_many(mounted_many: MountedPool) -> None:
    path, count = mounted_many.path / "many", mounted_many.name_count
    assert int(sh("ls -U | wc -l", path)) == count
    found = os.listdir(path)
    assert len(found) == len(set(found)) == count
    used = os.statvfs(path)
    assert used.f_files - used.f_ffree == count + 3  # the root, and two namespaces


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("mounted_many", [1_000_000], indirect=True)
def test_scandir_of_a_million(mounted_many: MountedPool) -> None:
    """MLPerf's benchmark and SGLang's evictor list what they have written."""
    path, count = mounted_many.path / "many", mounted_many.name_count
    with os.scandir(path) as entries:
        assert sum(entry.is_file(follow_symlinks=False) for entry in entries) == count
    used = os.statvfs(path)
    assert used.f_files - used.f_ffree == count + 3


def test_removal_while_listing_skips_nothing(area: Path) -> None:
    for i in range(700):
        (area / f"d{i}").mkdir()
    with os.scandir(area) as entries:
        for entry in entries:
            os.rmdir(entry.path)
    assert os.listdir(area) == []


def test_seekdir(area: Path) -> None:
    for i in range(300):
        (area / f"d{i:03}").mkdir()
    code = """
import ctypes, sys, os
libc = ctypes.CDLL(None)
libc.opendir.restype = libc.readdir.restype = ctypes.c_void_p
libc.telldir.restype = ctypes.c_long
libc.readdir.argtypes = libc.telldir.argtypes = libc.rewinddir.argtypes = [ctypes.c_void_p]
libc.seekdir.argtypes = [ctypes.c_void_p, ctypes.c_long]
d = libc.opendir(sys.argv[1].encode())
def step():
    entry = libc.readdir(d)
    return entry and ctypes.string_at(entry + 19)
first = []
places = []
while True:
    places.append(libc.telldir(d))
    name = step()
    if not name: break
    first.append(name)
assert len(first) == 300, len(first)
libc.seekdir(d, places[200])
assert step() == first[200]
libc.seekdir(d, places[20])
assert step() == first[20]
libc.seekdir(d, places[299])
assert step() == first[299]
os.mkdir(sys.argv[1] + "/new")
libc.rewinddir(d)
again = []
while True:
    name = step()
    if not name: break
    again.append(name)
assert sorted(again) == sorted(first + [b"new"])
"""
    python(code, area)


def test_removed_directory_that_is_in_use(area: Path) -> None:
    (area / "d").mkdir()
    fd = os.open(area / "d", os.O_RDONLY)
    os.rmdir(area / "d")
    with pytest.raises(OSError, match=r"[Nn]o such file|[Ss]tale"):
        os.mkdir("x", dir_fd=fd)
    os.close(fd)


def test_namespace_made_again_is_another(shared: MountedPool) -> None:
    for word in ("old", "new"):
        sh(f"mkdir again && echo {word} > again/f", shared.path)
        if word == "old":
            sh("rm again/f && rmdir again", shared.path)
    assert sh("cat again/f", shared.path) == "new\n"
    assert "No such file" in sh_fails("cat again/g", shared.path)
