"""kill -9 of readers, of the core and of the owner, in the middle of what they do."""

import contextlib
import errno
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pyfuse3
import pytest

from kvfs.fuse.mount import MountOptions, mount_in_background
from kvfs.fuse.mountpoint import entry_at
from kvfs.fuse.operations import KvfsOperations
from kvfs.pool import Pool
from tests.fuse.mounting import (
    DEADLINE_S,
    MIB,
    MountedPool,
    end,
    launch,
    python,
    sh,
    wait_until,
    write_file,
)
from tests.fuse.test_core_mount import owner_of

pytestmark = pytest.mark.fuse
SIZES = {"tiny": 5000, "small": 3 * MIB + 5, "large": 9 * MIB + 77}

BUSY_READER = """
import mmap, os, sys
fds = [os.open(path, os.O_RDONLY) for path in sys.argv[1:]]
maps = [mmap.mmap(fd, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ) for fd in fds]
first = True
while True:
    for fd, mapped in zip(fds, maps):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.pread(fd, 1 << 20, 0)
        sum(mapped[:: 4096])
    if first:
        print("reading", flush=True)
        first = False
"""


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Start Python; return when it has said something."""
    process = launch(code, *arguments)
    assert process.stdout is not None
    assert process.stdout.readline()
    return process


def fill(path: Path, tag: bytes = b"") -> dict[str, bytes]:
    contents = {name: random.Random(name + str(tag)).randbytes(n) for name, n in SIZES.items()}
    for name, data in contents.items():
        write_file(path / name, data)
    return contents


@pytest.mark.parametrize("core", [True, False], ids=["core", "no-core"])
def test_killed_readers_hold_nothing(make_mount: Callable[..., MountedPool], core: bool) -> None:
    """What they had open can be evicted again, and the mount be unmounted."""
    mounted = make_mount(dir_mib=64, dram_mib=64, mount_options={"core": core})
    mounted.expected_findings.add("file-not-whole")  # in memory alone at the end
    contents = fill(mounted.path)
    readers = [start(BUSY_READER, *(mounted.path / name for name in SIZES)) for _ in range(3)]
    for reader in readers:
        end(reader)
    wait_until(lambda: mounted.status()["mount"]["open_handles"] <= 1, "all handles are released")
    for number in range(2 * 64 // 5 + 3):
        write_file(mounted.path / f"new{number}", random.Random(number).randbytes(5 * MIB))
    wait_until(
        lambda: not all((mounted.path / name).exists() for name in SIZES), "some are evicted"
    )
    for name, data in contents.items():
        with contextlib.suppress(FileNotFoundError):
            assert (mounted.path / name).read_bytes() == data
    mounted.stop()


READ_ON = """
import errno, os, sys
fds = [os.open(path, os.O_RDONLY) for path in sys.argv[1:]]
print("open", flush=True)
sys.stdin.readline()
for fd in fds:
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    try:
        os.pread(fd, 100, 1 << 20)
        print("done", flush=True)
    except OSError as error:
        print(errno.errorcode[error.errno], flush=True)
for path in sys.argv[1:]:
    try:
        os.stat(path)
        print("done", flush=True)
    except OSError as error:
        print(errno.errorcode[error.errno], flush=True)
"""


def test_killed_core_fails_whoever_waits(mounted: MountedPool) -> None:
    """Each request comes to an end; nobody hangs, and what the kernel reads itself goes on."""
    fill(mounted.path)
    os.sync()
    readers = [start(READ_ON, mounted.path / "small", mounted.path / "large") for _ in range(3)]
    busy = start(BUSY_READER, mounted.path / "small")
    mounted.expected_log.append(".")
    try:
        os.kill(mounted.core_pid, signal.SIGKILL)
        assert mounted.wait() != 0
        assert entry_at(mounted.path) is None
        for reader in readers:
            out, _ = reader.communicate("go\n", timeout=60)
            small, large, *names = out.split()
            # "done": the kernel had all of it cached.
            assert small in ("ENOTCONN", "ECONNABORTED", "EIO", "done")
            assert large == "done"
            assert set(names) <= {"ENOTCONN", "ENOENT"}
        assert busy.wait(60) != 0, "its map or its read has failed"
    finally:
        for process in (*readers, busy):
            end(process)
    mounted.start()
    assert sorted(set(os.listdir(mounted.path)) & set(SIZES)) == sorted(SIZES)


@pytest.fixture
def daemon(mounted: MountedPool, tmp_path: Path) -> Iterator[Path]:
    """The log of a mount whose owner is replaced when it dies."""
    mounted.stop()
    log = tmp_path / "log"
    kvfs = [sys.executable, "-m", "kvfs.cli.kvfs"]
    mount = [*kvfs, "mount", str(mounted.pool_path), str(mounted.path), "--log", str(log)]
    subprocess.run(mount, check=True)
    try:
        yield log
    finally:
        subprocess.run([*kvfs, "umount", str(mounted.path)], check=True)


WRITER = """
import errno, os, sys
path, number, failures = sys.argv[1], 0, 0
print("writing", flush=True)
import select
while not select.select([0], [], [], 0)[0]:
    number += 1
    name = f"{path}/w{number % 20}"
    data = number.to_bytes(8, "little") * (12_500 if number % 10 else 700_000)
    try:
        fd = os.open(f"{path}/new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        try:
            os.write(fd, data)
        finally:
            os.close(fd)
        os.rename(f"{path}/new", name)
    except OSError as error:
        assert error.errno in (errno.EIO, errno.ENOENT, errno.EBUSY, errno.ESTALE), error
        failures += 1
print(number, failures)
"""


def test_killed_owner_under_load(mounted: MountedPool, daemon: Path) -> None:
    """Another comes each time; handles and inodes of before go on, and every file is whole."""
    path = mounted.path
    contents = fill(path)
    (path / "d").mkdir()
    sh(f"sync -f {path}")
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
    fds = {name: os.open(path / name, os.O_RDONLY) for name in SIZES}
    inodes = {name: os.stat(path / name).st_ino for name in SIZES}
    directory = os.open(path / "d", os.O_RDONLY)
    writer = start(WRITER, path)
    try:
        for count in range(1, 4):
            os.kill(owner_of(mounted.pool_path), signal.SIGKILL)
            wait_until(
                lambda n=count: daemon.read_text().count("INFO kvfs.fuse mounted") > n, "another"
            )
            for name, data in contents.items():
                os.posix_fadvise(fds[name], 0, 0, os.POSIX_FADV_DONTNEED)
                assert os.pread(fds[name], len(data), 0) == data
                assert os.stat(path / name).st_ino == inodes[name]
                assert os.fstat(fds[name]).st_size == len(data)
            write_file(path / "d" / str(count), b"x" * count)
            assert os.fstat(directory).st_ino == os.stat(path / "d").st_ino
        out, _ = writer.communicate("stop\n", timeout=60)
        assert writer.returncode == 0
        assert int(out.split()[0]) > 3
    finally:
        end(writer)
        for each in (*fds.values(), directory):
            os.close(each)
    for number in range(20):
        try:
            data = (path / f"w{number}").read_bytes()
        except FileNotFoundError:
            continue
        assert data == data[:8] * (len(data) // 8)
        assert len(data) in (100_000, 5_600_000)


ASK = """
import os, sys
path = sys.argv[1]
errors = []
for call in (
    lambda: os.close(os.open(path + "/f", os.O_RDONLY)),
    lambda: os.listdir(path),
    lambda: os.close(os.open(path + "/new", os.O_CREAT | os.O_WRONLY)),
):
    try:
        call()
        errors.append(0)
    except OSError as error:
        errors.append(error.errno)
print(*errors)
"""
EIO = str(errno.EIO)


def test_a_stopped_owner_hangs_nobody(make_mount: Callable[..., MountedPool]) -> None:
    """What it does not answer in time the core does; when it goes on, so does the mount."""
    mounted = make_mount(mount_options={"deadline_s": 0.5})
    mounted.expected_log += ["deadline: request", "request timed out"]
    write_file(mounted.path / "f", b"x" * 5000)
    os.kill(mounted.pid, signal.SIGSTOP)
    try:
        assert python(ASK, mounted.path).split() == [EIO, EIO, EIO]
    finally:
        os.kill(mounted.pid, signal.SIGCONT)
    wait_until(lambda: python(ASK, mounted.path).split() == ["0", "0", "0"], "it goes on")
    wait_until(lambda: mounted.core_counters()["deadline_hits"] >= 3, "a ping")


def test_a_hung_loop_hangs_nobody(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected_warnings: list[str]
) -> None:
    """Its process lives, but its loop runs nothing: the core answers, and the watchdog waits."""
    expected_warnings.append("deadline: request")
    may_go = threading.Event()

    async def stuck(self: KvfsOperations, inode: int, ctx: pyfuse3.RequestContext) -> int:
        assert may_go.wait(DEADLINE_S)
        raise pyfuse3.FUSEError(errno.EIO)

    monkeypatch.setattr(KvfsOperations, "opendir", stuck)
    path = tmp_path / "mnt"
    path.mkdir()
    turned = threading.Event()
    with mount_in_background(pool, path, MountOptions(deadline_s=0.5)):
        write_file(path / "f", b"x" * 5000)
        assert pool.mount_turn is not None
        pool.mount_turn()
        take_turn = pool.mount_turn
        watchdog = threading.Thread(target=lambda: (take_turn(), turned.set()))
        try:
            assert python(ASK, path).split()[1:] == [EIO, EIO]
            watchdog.start()
            assert not turned.wait(1.0)
        finally:
            may_go.set()
        watchdog.join(DEADLINE_S)
        assert turned.is_set()
        assert (path / "f").read_bytes() == b"x" * 5000
    assert pool.mount_turn is None
