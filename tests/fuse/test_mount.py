"""Mounting and unmounting: refusals, signals, threads, deadlines."""

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import kvfs
from kvfs.engine.catalog_schema import Node
from kvfs.files import WriteHandle
from kvfs.fuse.mount import MountOptions, mount, mount_in_background, unmount
from kvfs.fuse.mountpoint import entry_at, holders_of, prepare, set_read_ahead
from kvfs.pool import Pool
from tests.fuse.mounting import MIB, MountedPool, end, launch, sh, wait_until, write_file

pytestmark = pytest.mark.fuse


def test_refusals(pool: Pool, tmp_path: Path) -> None:
    with pytest.raises(kvfs.NotFoundError, match="no such mountpoint"):
        mount(pool, tmp_path / "none")
    (tmp_path / "file").write_text("x")
    with pytest.raises(kvfs.UsageError, match="not a directory"):
        mount(pool, tmp_path / "file")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").write_text("x")
    with pytest.raises(kvfs.RefusedError, match="not empty"):
        mount(pool, tmp_path / "full")
    with mount_in_background(pool, tmp_path / "full", MountOptions(allow_nonempty=True)) as shown:
        assert os.listdir(tmp_path / "full") == [".kvfs", "default"]
        with pytest.raises(kvfs.BusyError, match="already mounted"):
            mount(pool, tmp_path / "full")
        (tmp_path / "other").mkdir()
        with pytest.raises(kvfs.BusyError, match="serves a mount already"):
            mount(pool, tmp_path / "other")
        assert shown.is_alive
    assert os.listdir(tmp_path / "full") == ["x"]
    with pytest.raises(kvfs.NotFoundError, match="not mounted"):
        unmount(tmp_path / "full")
    for wrong in ({"deadline_s": 0}, {"threads": 0}, {"requests": 0}):
        with pytest.raises(kvfs.UsageError):
            MountOptions(**wrong)


def test_without_the_kernel_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exists = os.path.exists
    monkeypatch.setattr(os.path, "exists", lambda path: path != "/dev/fuse" and exists(path))
    with pytest.raises(kvfs.UnavailableError, match="no /dev/fuse"):
        prepare(tmp_path, allow_nonempty=True)


def test_background_mount_can_come_again(pool: Pool, tmp_path: Path) -> None:
    path = tmp_path / "mnt"
    path.mkdir()
    for i in range(3):
        with mount_in_background(pool, path) as shown:
            write_file(path / f"f{i}", b"x" * 1000)
            assert (path / "f0").read_bytes() == b"x" * 1000
        shown.close()
        assert not shown.is_alive
        assert os.listdir(path) == []
    assert pool.catalog.lookup(1, "f2") is not None


def test_mountpoint_may_be_relative_or_a_link(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "with space\nand line").mkdir()
    (tmp_path / "link").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    path = Path("link/with space\nand line")
    with mount_in_background(pool, path) as shown:
        assert shown.mountpoint == tmp_path / "with space\nand line"
        assert entry_at(shown.mountpoint) is not None
        write_file(path / "f", b"x")
    assert os.listdir(path) == []


def test_umount_by_an_operator_ends_the_mount(mounted: MountedPool) -> None:
    write_file(mounted.path / "f", b"x")
    sh(f"umount {mounted.path}")
    assert mounted.wait() == 0
    mounted.start()
    assert (mounted.path / "f").read_bytes() == b"x"
    assert unmount(mounted.path)
    assert mounted.wait() == 0


def test_signal_with_open_files(mounted: MountedPool) -> None:
    write_file(mounted.path / "whole", b"x" * MIB)
    reader = os.open(mounted.path / "whole", os.O_RDONLY)
    writer = os.open(mounted.path / "part", os.O_WRONLY | os.O_CREAT)
    os.write(writer, b"x" * MIB)
    with pytest.raises(kvfs.BusyError, match=rf"in use by {os.getpid()}: "):
        unmount(mounted.path, lazy=False)
    os.kill(mounted.pid, signal.SIGTERM)
    assert mounted.wait() == 0
    assert entry_at(mounted.path) is None
    for fd in (reader, writer):
        with contextlib.suppress(OSError):
            os.close(fd)
    mounted.start()
    assert sorted(os.listdir(mounted.path)) == [".kvfs", "default", "whole"]


def test_who_holds_a_mount(mounted: MountedPool) -> None:
    """By an open file, a map, or where it is."""
    write_file(mounted.path / "f", b"x" * 5000)
    wait = "; print('there', flush=True); sys.stdin.read()"
    open_it = "import mmap, os, sys; f = os.open(sys.argv[1] + '/f', 0)"
    codes = (
        open_it,
        f"{open_it}; m = mmap.mmap(f, 0, mmap.MAP_SHARED, mmap.PROT_READ); os.close(f)",
        "import os, sys; os.chdir(sys.argv[1])",
    )
    assert holders_of(mounted.path) == []
    holders = [launch(code + wait, mounted.path) for code in codes]
    try:
        for holder in holders:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "there\n"
        assert holders_of(mounted.path) == sorted(holder.pid for holder in holders)
    finally:
        for holder in holders:
            end(holder)


def test_background_mount_closes_with_open_files(pool: Pool, tmp_path: Path) -> None:
    path = tmp_path / "mnt"
    path.mkdir()
    with mount_in_background(pool, path):
        write_file(path / "f", b"x")
        reader = os.open(path / "f", os.O_RDONLY)
    with contextlib.suppress(OSError):  # a reader's close may be told that nobody is there
        os.close(reader)
    assert entry_at(path) is None
    assert not pool.store.state.pins


def test_read_ahead_is_raised(mounted: MountedPool) -> None:
    entry = entry_at(mounted.path)
    assert entry is not None
    if not os.access("/sys/class/bdi", os.W_OK) or os.getuid() != 0:
        pytest.skip("read-ahead cannot be set here")
    file = Path(f"/sys/class/bdi/{entry.device}/read_ahead_kb")
    assert int(file.read_text()) == MountOptions().read_ahead_kb
    assert set_read_ahead(mounted.path, 256)
    assert not set_read_ahead(mounted.path / "none", 256)


def test_hung_block_fails_within_the_deadline(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected_warnings: list[str]
) -> None:
    """A device that does not answer costs its request an error, and nobody else anything."""
    path = tmp_path / "mnt"
    path.mkdir()
    expected_warnings.append("request timed out")
    may_hang, may_go, is_late = (threading.Event() for _ in range(3))
    real = pool.files.open_write

    def hang(node: Node, *, truncate: bool) -> WriteHandle:
        if not may_hang.is_set():
            return real(node, truncate=truncate)
        assert may_go.wait(30)
        handle = real(node, truncate=truncate)
        is_late.set()
        return handle

    monkeypatch.setattr(pool.files, "open_write", hang)
    with mount_in_background(pool, path, MountOptions(deadline_s=0.3)):
        write_file(path / "hung", b"x")
        write_file(path / "well", b"y")
        may_hang.set()
        with pytest.raises(OSError, match="Input/output"):
            (path / "hung").open("r+b")
        assert (path / "well").read_bytes() == b"y"
        assert '"timeouts": 1' in (path / ".kvfs/status.json").read_text()
        may_go.set()
        assert is_late.wait(30)
        node = pool.catalog.lookup(1, "hung")
        assert node is not None
        wait_until(lambda: pool.files.writer_of(node.node_id) is None, "the late open is undone")
        assert (path / "hung").read_bytes() == b"x"


def test_unexpected_failure_is_an_error_and_no_end(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected_warnings: list[str]
) -> None:
    path = tmp_path / "mnt"
    path.mkdir()
    expected_warnings.append("unlink failed unexpectedly")

    def fail(*_: object) -> None:
        raise RuntimeError("a bug")

    with mount_in_background(pool, path):
        write_file(path / "f", b"x")
        with monkeypatch.context() as patch:
            patch.setattr(pool.files, "remove", fail)
            with pytest.raises(OSError, match="Input/output"):
                os.unlink(path / "f")
        os.unlink(path / "f")


def test_killed_reader_leaves_nothing_open(
    mounted: MountedPool, make_mount: Callable[..., MountedPool]
) -> None:
    write_file(mounted.path / "f", os.urandom(8 * MIB))
    code = "import os,sys,time; f=open(sys.argv[1],'rb'); f.read(99); print('ok',flush=True)"
    code += "; os.read(0, 1)"
    reader = subprocess.Popen(
        ["python3", "-c", code, mounted.path / "f"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert reader.stdout is not None
    assert reader.stdin is not None
    assert reader.stdout.readline() == b"ok\n"
    assert mounted.status()["mount"]["open_handles"] >= 1
    reader.kill()
    reader.wait()
    reader.stdout.close()
    reader.stdin.close()
    wait_until(lambda: mounted.status()["mount"]["open_handles"] <= 1, "handles closed")
