"""Mounts through kvfs-core: what each lane answers, and what happens when something dies."""

import contextlib
import mmap
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from kvfs.errors import UnavailableError
from kvfs.fuse import core as core_module
from kvfs.fuse import core_client
from kvfs.fuse import lanes as lanes_module
from kvfs.fuse.mount import MountOptions, mount_in_background
from kvfs.fuse.mountpoint import entry_at
from kvfs.pool import Pool
from tests.fuse.mounting import MIB, MountedPool, wait_until, write_file

pytestmark = pytest.mark.fuse
SMALL, LARGE = 2 * MIB + 12_345, 9 * MIB + 77
LANES = {  # options of the mount, and the lanes of a small and a large file
    "passthrough": ({}, "native", "passthrough"),
    "native": ({"passthrough": False}, "native", "native"),
    "namespace": ({"core": False}, "namespace", "namespace"),
}


def lane(path: Path) -> str:
    return os.getxattr(path, "user.kvfs.lane").decode()


def read_some(path: Path, data: bytes, rng: random.Random) -> None:
    """Read a file in many ways, at random places, and compare."""
    flags = rng.choice([os.O_RDONLY, os.O_RDONLY | os.O_DIRECT])
    fd = os.open(path, flags)
    try:
        with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as mapped:
            buffer = mmap.mmap(-1, MIB)
            for _ in range(40):
                offset, nbytes = rng.randrange(len(data) + 5000), rng.randrange(1, MIB)
                if flags & os.O_DIRECT:
                    offset, nbytes = offset // 4096 * 4096, -(-nbytes // 4096) * 4096
                count = os.preadv(fd, [memoryview(buffer)[:nbytes]], offset)
                assert buffer[:count] == data[offset : offset + nbytes]
                assert mapped[offset : offset + 1000] == data[offset : offset + 1000]
                if rng.random() < 0.2:
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            buffer.close()
        if not flags & os.O_DIRECT:
            assert os.pread(fd, len(data) + 1, 0) == data
        assert os.fstat(fd).st_size == len(data)
    finally:
        os.close(fd)


def test_lanes_agree(mounted: MountedPool, rng: random.Random) -> None:
    files = {"small": rng.randbytes(SMALL), "large": rng.randbytes(LARGE), "tiny": b"x"}
    for name, data in files.items():
        write_file(mounted.path / name, data)
    seed = rng.random()
    for options, small, large in LANES.values():
        mounted.remount(**options)
        same = random.Random(seed)
        for name, data in files.items():
            read_some(mounted.path / name, data, same)
        assert lane(mounted.path / "small") == small
        assert lane(mounted.path / "large") == large
        with (mounted.path / "small").open("rb"), (mounted.path / "large").open("rb"):
            assert lane(mounted.path / "small") == small
            assert lane(mounted.path / "large") == large


def test_counters_are_shown(mounted: MountedPool) -> None:
    write_file(mounted.path / "f", bytes(SMALL))
    with (mounted.path / "f").open("rb") as file:
        assert len(file.read()) == SMALL
    assert not (mounted.path / "none").exists()
    wait_until(lambda: mounted.core_counters().get("bytes_native_read", 0) >= SMALL, "a ping")
    wait_until(lambda: mounted.core_counters()["lookups_answered"], "the names are known")
    metrics = (mounted.path / ".kvfs/metrics").read_text()
    assert "kvfs_core_native_reads_total " in metrics
    assert "# TYPE kvfs_core_open_files gauge" in metrics


def test_names_are_found_whoever_makes_them(mounted: MountedPool) -> None:
    names = [f"n{i}" for i in range(50)]
    for name in names:
        path = mounted.path / name
        assert not path.exists()
        write_file(path, b"x")
        assert path.exists()
        path.rename(path.with_name(f"{name}-moved"))
        assert not path.exists()
        assert path.with_name(f"{name}-moved").exists()
    (mounted.path / "ns").mkdir()
    (mounted.path / "ns/d").mkdir()
    assert (mounted.path / "ns/d").is_dir()
    assert len(os.listdir(mounted.path)) == 53


def test_tables_are_taken_back_and_made_again(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lanes_module, "TABLE_NS", 0)
    path = tmp_path / "mnt"
    path.mkdir()
    data = random.Random(1).randbytes(SMALL)

    def leases() -> int:
        segments = [s for d in pool.store.state.devices for s in d.segments.values()]
        return sum(segment.leases for segment in segments)

    with mount_in_background(pool, path):
        write_file(path / "f", data)
        with (path / "f").open("rb", buffering=0) as file:
            for _ in range(2):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                assert file.read(MIB) == data[:MIB]
                file.seek(0)
                wait_until(lambda: lane(path / "f") == "namespace", "the table is taken back")
            wait_until(lambda: not leases(), "all leases are given back")
            monkeypatch.undo()
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            assert file.read(MIB) == data[:MIB]
            assert lane(path / "f") == "native"
            assert leases()


@pytest.mark.parametrize("change", ["write", "truncate", "replace"])
def test_rewriting_what_the_kernel_reads(mounted: MountedPool, change: str) -> None:
    """The reader keeps what it opened; who comes later finds the new content."""
    path = mounted.path / "f"
    data = random.Random(1).randbytes(LARGE)
    write_file(path, data)
    wait_until(lambda: lane(path) == "passthrough", "the file is published")
    with path.open("rb", buffering=0) as old, path.open("rb") as same:
        mapped = mmap.mmap(old.fileno(), 0, prot=mmap.PROT_READ)
        assert same.read() == data
        for round_number in range(3):
            if change == "write":
                new = b"%d" % round_number + data[1:]
                with path.open("r+b") as file:
                    file.write(new[:1])
            elif change == "truncate":
                new = data[: LARGE - 1000 * (round_number + 1)]
                os.truncate(path, len(new))
            else:
                new = random.Random(round_number).randbytes(LARGE)
                write_file(path, new, os.O_TRUNC)
            with path.open("rb", buffering=0) as late:
                assert late.read(LARGE) + late.read(LARGE) == new
                assert os.pread(old.fileno(), MIB, 5 * MIB) == data[5 * MIB : 6 * MIB]
            assert path.read_bytes() == new
            assert mapped[:] == data
        mapped.close()
    assert path.read_bytes() == new
    assert path.stat().st_size == len(new)
    wait_until(lambda: lane(path) == "passthrough", "the new content is published")


def test_writer_and_native_readers(mounted: MountedPool) -> None:
    path = mounted.path / "f"
    data = random.Random(1).randbytes(SMALL)
    write_file(path, data)
    with path.open("rb", buffering=0) as old:
        assert os.pread(old.fileno(), 100, 0) == data[:100]
        with path.open("r+b", buffering=0) as writer:
            writer.write(b"new")
            assert lane(path) == "native"  # the writer's
            os.posix_fadvise(old.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            assert os.pread(old.fileno(), 100, 4096) == data[4096:4196]
        assert path.read_bytes() == b"new" + data[3:]


def test_core_is_killed(mounted: MountedPool) -> None:
    """The kernel goes on reading whole files; the mount is taken away, and can come again."""
    data = random.Random(1).randbytes(LARGE)
    write_file(mounted.path / "large", data)
    write_file(mounted.path / "small", data[:SMALL])
    os.sync()
    large = os.open(mounted.path / "large", os.O_RDONLY)
    small = os.open(mounted.path / "small", os.O_RDONLY)
    mounted.expected_log.append(".")
    os.kill(mounted.core_pid, signal.SIGKILL)
    assert mounted.wait() != 0
    assert entry_at(mounted.path) is None
    assert os.pread(large, LARGE, 0) == data
    with pytest.raises(OSError, match=r"[Tt]ransport|connected|abort"):
        os.pread(small, 100, MIB)
    for fd in (large, small):
        with contextlib.suppress(OSError):
            os.close(fd)
    mounted.start()
    assert (mounted.path / "large").read_bytes() == data


def test_core_killed_under_a_mount_in_background(
    pool: Pool, tmp_path: Path, expected_warnings: list[str]
) -> None:
    expected_warnings.append("kvfs-core")
    path = tmp_path / "mnt"
    path.mkdir()
    mount = mount_in_background(pool, path)
    write_file(path / "f", b"x" * 1000)
    core = mount._session._core
    assert core is not None
    assert core._process is not None
    core._process.kill()
    wait_until(lambda: not mount.is_alive, "the mount ends")
    with pytest.raises(UnavailableError, match="has died"):
        mount.close()
    assert entry_at(path) is None
    with mount_in_background(pool, path):
        assert (path / "f").read_bytes() == b"x" * 1000


def test_core_that_does_not_answer(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected_warnings: list[str]
) -> None:
    """It is given up, and with it whoever waits for it."""
    expected_warnings.append("kvfs-core")
    path = tmp_path / "mnt"
    path.mkdir()
    mount = mount_in_background(pool, path)
    core = mount._session._core
    assert core is not None
    assert core._process is not None
    os.kill(core._process.pid, signal.SIGSTOP)
    monkeypatch.setattr(core_module, "_GIVE_UP_NS", 300_000_000)
    monkeypatch.setattr(core_client, "_DEADLINE_S", 0.2)
    waiting = subprocess.run(["stat", path / "f"], capture_output=True, timeout=60, check=False)
    assert waiting.returncode == 1
    wait_until(lambda: not mount.is_alive, "the mount ends")
    with pytest.raises(UnavailableError, match="has died"):
        mount.close()
    assert entry_at(path) is None


READER = """
import mmap, os, sys, time
errors = 0
fds = [os.open(path, os.O_RDONLY) for path in sys.argv[1:3]]
want = [open(path, "rb").read() for path in sys.argv[3:5]]
maps = [mmap.mmap(fd, 0, prot=mmap.PROT_READ) for fd in fds]
print("ready", flush=True)
import select
while not select.select([0], [], [], 0)[0]:
    for fd, mapped, data in zip(fds, maps, want):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        try:
            assert os.pread(fd, 1 << 20, 1 << 19) == data[1 << 19 :][: 1 << 20]
            assert mapped[100000:101000] == data[100000:101000]
        except OSError:
            errors += 1
print(errors, flush=True)
for fd, mapped, data in zip(fds, maps, want):
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    assert b"".join(iter(lambda: os.read(fd, 1 << 20), b"")) == data
    assert mapped[:] == data
for path, data in zip(sys.argv[1:3], want):
    assert open(path, "rb").read() == data
print("done", flush=True)
"""


def test_owner_is_killed(mounted: MountedPool, tmp_path: Path) -> None:
    """`kvfs mount`: another owner takes over, and readers hardly notice."""
    mounted.stop()
    kvfs = [sys.executable, "-m", "kvfs.cli.kvfs"]
    log = tmp_path / "log"
    path, pool_path = mounted.path, str(mounted.pool_path)
    subprocess.run([*kvfs, "mount", pool_path, str(path), "--log", str(log)], check=True)
    try:
        rng = random.Random(1)
        for name, size in (("small", SMALL), ("large", LARGE)):
            data = rng.randbytes(size)
            (tmp_path / name).write_bytes(data)
            write_file(path / name, data)
        directory = os.open(path, os.O_RDONLY)
        os.fsync(directory)
        sources = [str(base / name) for base in (path, tmp_path) for name in ("small", "large")]
        reader = subprocess.Popen(
            [sys.executable, "-c", READER, *sources],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert reader.stdout is not None
        assert reader.stdout.readline() == "ready\n"
        part = os.open(path / "part", os.O_WRONLY | os.O_CREAT)
        os.write(part, b"x" * MIB)
        for count in (1, 2):
            os.kill(owner_of(mounted.pool_path), signal.SIGKILL)
            wait_until(lambda n=count: log.read_text().count("INFO kvfs.fuse mounted") > n, "again")
            os.stat(path / "small")
        out, _ = reader.communicate("stop\n", timeout=30)
        assert out.endswith("done\n")
        assert int(out.split()[0]) <= 4, "requests that the dead owner had failed, and no more"
        with pytest.raises(OSError, match="Input/output"):
            os.write(part, b"y")
        with contextlib.suppress(OSError):
            os.close(part)
        os.close(directory)
        assert not (path / "part").exists()
        write_file(path / "new", b"new")
        assert (path / "new").read_bytes() == b"new"
    finally:
        subprocess.run([*kvfs, "umount", str(path)], check=True)
    assert entry_at(path) is None


def owner_of(pool_path: Path) -> int:
    """Return who holds a pool's lock."""
    inode = os.stat(pool_path / "lock").st_ino
    for line in Path("/proc/locks").read_text().splitlines():
        fields = line.split()
        if fields[1] == "FLOCK" and int(fields[5].rsplit(":", 1)[1]) == inode:
            return int(fields[4])
    raise AssertionError("nobody owns the pool")


def test_stalled_medium_fails_within_the_deadline(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected_warnings: list[str]
) -> None:
    """A file that must be verified from a device that does not answer; others go on."""
    expected_warnings += ["request timed out", "missed a deadline"]
    path = tmp_path / "mnt"
    path.mkdir()
    may_go = threading.Event()
    with mount_in_background(pool, path, MountOptions(deadline_s=1.5)):
        write_file(path / "stalled", bytes(LARGE))
        write_file(path / "well", b"y" * 1000)
        verified = pool.store.verified

        def stall(records):  # type: ignore[no-untyped-def]
            assert may_go.wait(30)
            return verified(records)

        monkeypatch.setattr(lanes_module.Lanes, "is_vouched", lambda *_: False)
        monkeypatch.setattr(pool.store, "verified", stall)
        wait_until(lambda: lane(path / "stalled") == "passthrough", "the file is published")
        with pytest.raises(OSError, match="Input/output"):
            (path / "stalled").open("rb")
        may_go.set()
        assert (path / "well").read_bytes() == b"y" * 1000
        assert (path / "stalled").read_bytes() == bytes(LARGE)


def test_without_the_program(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected_warnings: list[str]
) -> None:
    monkeypatch.setenv("KVFS_CORE", str(tmp_path / "none"))
    expected_warnings.append("mounted without kvfs-core")
    path = tmp_path / "mnt"
    path.mkdir()
    with mount_in_background(pool, path):
        write_file(path / "f", b"x")
        assert (path / "f").read_bytes() == b"x"
        assert lane(path / "f") == "namespace"


def test_mount_that_the_kernel_refuses(
    make_mount: Callable[..., MountedPool], pool: Pool, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    program = tmp_path / "core"
    program.write_text("#!/bin/sh\necho 'no such device' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("KVFS_CORE", str(program))
    (tmp_path / "mnt").mkdir()
    with pytest.raises(UnavailableError, match="no such device"):
        mount_in_background(pool, tmp_path / "mnt")
