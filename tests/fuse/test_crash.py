"""What a mount whose process is killed leaves behind."""

import errno
import os
import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from kvfs.fuse.mountpoint import entry_at
from tests.fuse.mounting import MIB, MountedPool, sh, wait_until, write_file

pytestmark = pytest.mark.fuse


def sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def restart(mounted: MountedPool) -> None:
    """Kill the mount's owner, whose mount kvfs-core takes away, and mount again."""
    mounted.kill()
    wait_until(lambda: entry_at(mounted.path) is None, "the mount is taken away")
    mounted.start()


def test_finished_file_survives_and_a_part_does_not(mounted: MountedPool) -> None:
    rng = random.Random(1)
    small, large = rng.randbytes(100_000), rng.randbytes(5 * MIB)
    path = mounted.path / "ns"
    path.mkdir()
    write_file(path / "small", small)
    write_file(path / "large", large)
    sync_directory(path)
    part = os.open(path / "part", os.O_WRONLY | os.O_CREAT)
    os.write(part, b"x" * MIB)
    os.fsync(part)
    restart(mounted)
    with pytest.raises(OSError, match=r"[Tt]ransport|connected"):
        os.write(part, b"x")
    with pytest.raises(OSError, match=r"[Tt]ransport|connected"):
        os.close(part)
    assert sorted(os.listdir(path)) == ["large", "small"]
    assert (path / "small").read_bytes() == small
    assert (path / "large").read_bytes() == large
    assert os.listdir(mounted.device_path / "staging") == []


def test_closed_file_is_whole_or_absent(mounted: MountedPool) -> None:
    data = {f"f{i}": random.Random(i).randbytes(50_000 * i + 1) for i in range(30)}
    for name, content in data.items():
        write_file(mounted.path / name, content)
    restart(mounted)
    found = set(os.listdir(mounted.path)) - {".kvfs", "default"}
    assert found <= set(data)
    for name in found:
        assert (mounted.path / name).read_bytes() == data[name]


@pytest.mark.parametrize("size", [100_000, 5 * MIB])
def test_replaced_file_has_former_or_new_content(mounted: MountedPool, size: int) -> None:
    old, new = random.Random(2).randbytes(size), random.Random(3).randbytes(size + 5)
    path = mounted.path / "f"
    write_file(path, old)
    sync_directory(mounted.path)
    fd = os.open(path, os.O_WRONLY | os.O_TRUNC)
    os.write(fd, new[:1000])
    restart(mounted)
    with pytest.raises(OSError, match=r"[Tt]ransport|connected"):
        os.close(fd)
    assert path.read_bytes() == old
    write_file(path, new, os.O_TRUNC)
    restart(mounted)
    assert path.read_bytes() in (old, new)
    write_file(path, new, os.O_TRUNC)
    sync_directory(mounted.path)
    restart(mounted)
    assert path.read_bytes() == new


def test_rename_over_never_loses_both(mounted: MountedPool) -> None:
    path = mounted.path / "f"
    old, new = random.Random(4).randbytes(MIB), random.Random(5).randbytes(2 * MIB)
    write_file(path, old)
    sync_directory(mounted.path)
    write_file(mounted.path / "tmp", new)
    os.rename(mounted.path / "tmp", path)
    restart(mounted)
    assert path.read_bytes() in (old, new)
    fd = os.open(mounted.path / "tmp", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.write(fd, new)
    os.rename(mounted.path / "tmp", path)  # still open
    restart(mounted)
    with pytest.raises(OSError, match=r"[Tt]ransport|connected"):
        os.close(fd)
    assert path.read_bytes() in (old, new)


def test_removed_names_stay_away(mounted: MountedPool) -> None:
    sh("mkdir -p ns/d && echo x > ns/d/f && echo y > ns/g", mounted.path)
    sync_directory(mounted.path)
    sh("rm ns/g && mv ns/d ns/e", mounted.path)
    sync_directory(mounted.path)
    restart(mounted)
    assert sh("find ns | sort", mounted.path).split() == ["ns", "ns/e", "ns/e/f"]


@pytest.mark.parametrize("core", [True, False])
def test_stale_mount_in_use_is_replaced(make_mount: Callable[..., MountedPool], core: bool) -> None:
    """Somebody whose working directory is the dead mount does not keep the next from coming."""
    mounted = make_mount(mount_options={"core": core})
    write_file(mounted.path / "f", b"x")
    sync_directory(mounted.path)
    user = subprocess.Popen(["sleep", "60"], cwd=mounted.path)
    try:
        if core:
            restart(mounted)
        else:
            mounted.kill()
            with pytest.raises(OSError) as caught:  # noqa: PT011 - the number is compared below
                os.listdir(mounted.path)
            assert caught.value.errno == errno.ENOTCONN
            mounted.expected_log.append("stale mount taken away")
            mounted.start()
        assert (mounted.path / "f").read_bytes() == b"x"
    finally:
        user.kill()
        user.wait()
