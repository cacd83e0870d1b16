"""Permission bits, checked by the kernel for other users."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fuse.mounting import MIB, MountedPool, wait_until, write_file
from tests.fuse.test_core_mount import lane

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.skipif(os.getuid() != 0, reason="needs root to become another user"),
]
OTHER = 12345


def as_other(command: str, path: Path, *, groups: tuple[int, ...] = ()) -> str:
    """Run a shell command on a path as another user; return what it complained of."""
    result = subprocess.run(
        ["/bin/sh", "-c", command.replace("@", "$1"), "sh", str(path)],
        capture_output=True, text=True, timeout=30, check=False,
        user=OTHER, group=OTHER, extra_groups=groups, cwd="/",
    )  # fmt: skip
    assert (result.returncode == 0) == (not result.stderr)
    return result.stderr.strip().rpartition(": ")[2]


DENIED = "Permission denied"
FORBIDDEN = "Operation not permitted"


@pytest.fixture
def open_mount(make_mount: Callable[..., MountedPool], tmp_path: Path) -> MountedPool:
    for parent in (tmp_path, *tmp_path.parents[:3]):
        if parent != Path("/tmp"):
            parent.chmod(0o755)
    return make_mount(mount_options={"allow_other": True})


def test_bits_are_honoured(open_mount: MountedPool) -> None:
    path = open_mount.path / "ns"
    path.mkdir(mode=0o755)
    write_file(path / "f", b"secret")
    assert as_other("cat @", path / "f") == ""
    assert as_other("echo x >> @", path / "f") == DENIED
    assert as_other("echo x > @", path / "g") == DENIED
    assert as_other("rm -f @", path / "f") == DENIED
    assert as_other("chmod 777 @", path / "f") == FORBIDDEN
    assert as_other("chown 12345 @", path / "f") == FORBIDDEN
    assert as_other("setfattr -n user.kvfs.retention -v durable @", path) == DENIED
    os.chmod(path / "f", 0o600)
    assert as_other("cat @", path / "f") == DENIED
    os.chmod(path, 0o700)
    assert as_other("stat @", path / "f") == DENIED
    assert as_other("mkdir @", open_mount.path / "d") == DENIED
    assert as_other("cat @", open_mount.path / ".kvfs/status.json") == ""
    assert as_other("ls @", open_mount.path / ".kvfs/blocks") == DENIED


def test_files_belong_to_who_makes_them(open_mount: MountedPool) -> None:
    path = open_mount.path / "ns"
    path.mkdir()
    os.chmod(path, 0o1777)
    write_file(path / "root", b"x")
    assert as_other("echo x > @", path / "f") == ""
    assert as_other("mkdir @", path / "d") == ""
    for name in ("f", "d"):
        found = os.stat(path / name)
        assert (found.st_uid, found.st_gid) == (OTHER, OTHER)
    assert as_other("rm -f @", path / "root") == FORBIDDEN  # sticky
    os.chown(path / "root", -1, 777)
    os.chmod(path / "root", 0o640)
    assert as_other("cat @", path / "root") == DENIED
    assert as_other("cat @", path / "root", groups=(777,)) == ""
    os.chown(path / "root", OTHER, OTHER)
    assert as_other("cat @", path / "root") == ""


def test_the_lanes_let_nobody_past_the_modes(open_mount: MountedPool) -> None:
    """What kvfs-core or the kernel reads is opened by the rules of every file."""
    path = open_mount.path / "ns"
    path.mkdir()
    os.chmod(path, 0o755)
    for name, nbytes in (("native", 3 * MIB), ("passthrough", 9 * MIB)):
        write_file(path / name, bytes(nbytes))
        os.setxattr(path / name, "user.note", b"root's")
        wait_until(lambda n=name: lane(path / n) == n, "it is published")
        for mode, complaint in ((0o644, ""), (0o600, DENIED), (0o604, ""), (0o640, DENIED)):
            os.chmod(path / name, mode)
            with (path / name).open("rb") as file:  # its lane is installed for root
                assert file.read(10) == bytes(10)
                assert as_other("cat @ > /dev/null", path / name) == complaint
                for command in (
                    "dd if=@ of=/dev/null bs=1M iflag=direct status=none",
                    "getfattr --absolute-names -n user.note @ > /dev/null",
                ):
                    assert as_other(command, path / name) == complaint
        assert as_other("echo x >> @", path / name) == DENIED
        assert as_other("truncate -s 0 @", path / name) == DENIED
        assert as_other("setfattr -n user.note -v x @", path / name) == DENIED
        assert (path / name).stat().st_size in (3 * MIB, 9 * MIB)


def test_sticky_directories_and_owners(open_mount: MountedPool) -> None:
    path = open_mount.path / "ns"
    path.mkdir()
    os.chmod(path, 0o1777)
    for name in ("a", "b"):
        write_file(path / name, b"root's")
    write_file(path / "theirs", b"x")
    os.chown(path / "theirs", OTHER, OTHER)
    assert as_other("mv -f @/a @/c", path) == FORBIDDEN
    assert as_other("mv -f @/theirs @/a", path) == FORBIDDEN
    assert as_other("rm -f @/b", path) == FORBIDDEN
    assert as_other("mv @/theirs @/mine", path) == ""
    assert as_other("chmod 600 @/mine", path) == ""
    assert as_other("touch -d 2001-01-01 @/mine", path) == ""
    assert as_other("touch -d 2001-01-01 @/a", path) == DENIED
    assert as_other("chown 0 @/mine", path) == FORBIDDEN
    assert as_other("chgrp 777 @/mine", path) == FORBIDDEN
    assert as_other("chgrp 777 @/mine", path, groups=(777,)) == ""
    assert os.stat(path / "mine").st_gid == 777
    assert as_other("setfattr -n user.x -v 1 @/mine", path) == ""
    assert as_other("rm @/mine", path) == ""
    assert sorted(os.listdir(path)) == ["a", "b"]
    os.chmod(path, 0o777)
    assert as_other("mv -f @/a @/c && rm -f @/b", path) == ""
    assert os.listdir(path) == ["c"]


def test_a_namespace_belongs_to_its_owner(open_mount: MountedPool) -> None:
    """What concerns all of a namespace is set by who owns its directory."""
    path = open_mount.path / "ns"
    path.mkdir()
    for name, value in (("retention", "durable"), ("deadline_ms", "100"), ("raw", "1")):
        command = f"setfattr -n user.kvfs.{name} -v {value} @"
        assert as_other(command, path) == DENIED
        os.chown(path, OTHER, OTHER)
        assert as_other(command, path) == ""
        os.chown(path, 0, 0)
    assert as_other("rmdir @", path) == DENIED
    assert as_other("mv @ @-other", path) == DENIED
    assert as_other("touch @/.kvfs/x", open_mount.path) in (DENIED, "Read-only file system")
    assert as_other("rm -f @/.kvfs/status.json", open_mount.path) in (
        DENIED, "Read-only file system", FORBIDDEN,
    )  # fmt: skip


def test_others_are_kept_out_by_default(make_mount: Callable[..., MountedPool]) -> None:
    mounted = make_mount()
    os.chmod(mounted.path, 0o777)
    assert as_other("ls @", mounted.path) == DENIED
