"""Permission bits, checked by the kernel for other users."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fuse.mounting import MountedPool, write_file

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


def test_others_are_kept_out_by_default(make_mount: Callable[..., MountedPool]) -> None:
    mounted = make_mount()
    os.chmod(mounted.path, 0o777)
    assert as_other("ls @", mounted.path) == DENIED
