"""kvfs: mounting in the background and in the foreground, unmounting, and the daemon's manners."""

import fcntl
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import kvfs
from kvfs.cli import cmd_mount
from kvfs.cli import kvfs as command
from kvfs.control_client import ControlClient, owners
from kvfs.errors import BusyError

DEADLINE_S = 60


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kvfs.cli.kvfs", *map(str, words)],
        capture_output=True, text=True, timeout=DEADLINE_S, check=False,
    )  # fmt: skip


@pytest.fixture
def point(root):
    path = root / "mnt"
    path.mkdir()
    yield path
    if path.is_mount():
        subprocess.run(["umount", "--lazy", path], check=False)


def wait_for(pid: int) -> None:
    """Wait until a process that is nobody's child here has ended."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        ready, _, _ = select.select([fd], [], [], DEADLINE_S)
        assert ready, f"process {pid} is still there"
    finally:
        os.close(fd)


@pytest.mark.fuse
def test_mount_and_umount(pool_path, point):
    mounted = run("mount", pool_path, point)
    assert (mounted.returncode, mounted.stdout) == (0, "")
    assert f"mounted {pool_path} on {point}" in mounted.stderr
    assert (point / "small").read_bytes() == b"s" * 10_000
    (point / "new").write_bytes(b"n" * 70_000)
    (entry,) = owners()
    assert (entry.pool, entry.mount) == (str(pool_path), str(point))
    assert Path(f"/proc/{entry.pid}/cwd").readlink() == Path("/")
    assert os.getsid(entry.pid) != os.getsid(0)
    for fd in (0, 1, 2):
        assert Path(f"/proc/{entry.pid}/fd/{fd}").readlink() == Path("/dev/null")
    unmounted = run("umount", point)
    assert unmounted.returncode == 0
    assert "is closed" in unmounted.stderr
    with kvfs.open_pool(pool_path) as pool:  # free at once
        assert pool.recovery.problems == []
        assert pool.statistics().contexts == 5
    assert owners() == []
    wait_for(entry.pid)


@pytest.mark.fuse
def test_second_mount_is_told(pool_path, point):
    assert run("mount", pool_path, point).returncode == 0
    again = run("mount", pool_path, point)
    assert again.returncode == 11
    assert again.stderr.startswith("kvfs: pool is in use")
    assert run("umount", point).returncode == 0


@pytest.mark.fuse
def test_umount_of_a_mount_in_use(pool_path, point):
    assert run("mount", pool_path, point).returncode == 0
    with (point / "small").open("rb"):
        busy = run("umount", point)
        assert busy.returncode == 11
        assert "in use" in busy.stderr
    assert run("umount", point).returncode == 0


@pytest.mark.fuse
def test_mount_after_its_owner_was_killed(pool_path, point):
    assert run("mount", pool_path, point).returncode == 0
    (entry,) = owners()
    os.kill(entry.pid, signal.SIGKILL)
    wait_for(entry.pid)
    # A daemon is replaced; whoever waits for the mount need not do anything.
    end = time.monotonic() + DEADLINE_S
    while not (found := [owner for owner in owners() if owner.pid != entry.pid]):
        assert time.monotonic() < end, "nobody took over"
        time.sleep(0.01)
    assert (point / "large").stat().st_size == 5 << 20
    assert run("mount", pool_path, point).returncode == 11
    assert run("umount", point).returncode == 0
    wait_for(found[0].pid)


@pytest.mark.fuse
def test_mount_after_a_foreground_owner_was_killed(pool_path, point):
    process = subprocess.Popen(
        [sys.executable, "-m", "kvfs.cli.kvfs", "mount", "-f", pool_path, point],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    while "mounted" not in (line := process.stderr.readline()):
        assert line, "it ended before it was ready"
    process.kill()
    process.communicate(timeout=DEADLINE_S)
    assert run("mount", pool_path, point).returncode == 0
    assert (point / "large").stat().st_size == 5 << 20
    assert run("umount", point).returncode == 0


@pytest.mark.fuse
def test_umount_of_a_dead_mount(pool_path, point):
    assert run("mount", pool_path, point).returncode == 0
    (entry,) = owners()
    os.kill(entry.pid, signal.SIGKILL)
    wait_for(entry.pid)
    done = run("umount", point)
    assert done.returncode == 0
    assert "no owner of it was found" in done.stderr


@pytest.mark.fuse
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_foreground_ends_cleanly(pool_path, point, number):
    process = subprocess.Popen(
        [sys.executable, "-m", "kvfs.cli.kvfs", "mount", "-f", pool_path, point],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    while "mounted" not in (line := process.stderr.readline()):
        assert line, "it ended before it was ready"
    (point / "new").write_bytes(b"n")
    process.send_signal(number)
    process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0
    assert not point.is_mount()
    with kvfs.open_pool(pool_path) as pool:
        assert pool.statistics().contexts == 5


@pytest.mark.fuse
def test_sigterm_ends_the_daemon(pool_path, point):
    log = point.parent / "log"
    assert run("mount", "--log", log, pool_path, point).returncode == 0
    (entry,) = owners()
    os.kill(entry.pid, signal.SIGTERM)
    cmd_mount.wait_closed(pool_path, DEADLINE_S)
    wait_for(entry.pid)
    assert not point.is_mount()
    assert "SIGTERM received" in log.read_text()


# --- what needs no FUSE


def test_errors_of_the_daemon_are_the_commands(root, pool_path, point):
    missing = run("mount", root / "nope", point)
    assert missing.returncode == 10
    assert missing.stderr.startswith("kvfs: no pool:")
    assert run("mount", pool_path, root / "nowhere").returncode in (10, 13)
    assert run("mount", "--async-delay", "0", pool_path, point).returncode == 2
    (point / "something").write_bytes(b"")
    assert run("mount", pool_path, point).returncode in (13, 16)
    with kvfs.open_pool(pool_path):  # none of them has kept the pool
        pass


def test_damaged_pool_is_told(root, pool_path, point):
    superblock = root / "dev" / "kvfs.superblock"
    superblock.write_bytes(b"x" * 8192)
    done = run("mount", pool_path, point)
    assert done.returncode == 14
    assert "wrong magic" in done.stderr


def test_daemon_that_dies_without_a_word():
    code = (
        "import os; from kvfs.cli.daemon import run_in_background\n"
        "run_in_background(lambda ready: os._exit(9))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "the daemon ended before it was ready" in done.stderr


def test_daemon_with_a_bug():
    code = "from kvfs.cli.daemon import run_in_background\nrun_in_background(lambda ready: 1 / 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "KvfsError: ZeroDivisionError: division by zero" in done.stderr


def test_daemon_lets_go_of_the_terminal():
    code = (
        "import time; from kvfs.cli.daemon import run_in_background\n"
        "def work(ready):\n    ready(); print('unheard'); return 0\n"
        "print(run_in_background(work))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "0\n"


def test_daemon_lets_go_of_what_its_caller_has_open(root):
    code = (
        "import os, sys; from kvfs.cli.daemon import run_in_background\n"
        "def work(ready):\n"
        "    open(sys.argv[1], 'w').write(' '.join(os.listdir('/proc/self/fd')))\n"
        "    ready(); return 0\n"
        "run_in_background(work)"
    )
    with open(os.devnull, "rb") as null:
        fd = fcntl.fcntl(null.fileno(), fcntl.F_DUPFD, 200)
    words = [sys.executable, "-c", code, str(root / "found")]
    subprocess.run(words, check=True, pass_fds=(fd,))
    os.close(fd)
    assert str(fd) not in (root / "found").read_text().split()


def test_umount_of_nothing(point):
    assert run("umount", point).returncode == 10
    assert run("umount", "--timeout", "0", point).returncode == 2


def test_wait_closed(pool_path):
    with kvfs.open_pool(pool_path), pytest.raises(BusyError, match=r"after 0\.05 s"):
        cmd_mount.wait_closed(pool_path, 0.05)
    cmd_mount.wait_closed(pool_path, 30)
    cmd_mount.wait_closed(pool_path / "nope", 30)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert ControlClient.connect(pool_path) is None


def test_version_and_usage(capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"kvfs {kvfs.__version__}\n"
    assert command.main([]) == 2
    assert command.main(["mount"]) == 2
    assert command.main(["bogus"]) == 2


def test_missing_part_is_told(monkeypatch, capsys):
    monkeypatch.setitem(command._EXTERNAL, "bench", ("kvfs.no_such_part", "measure"))
    assert command.main(["bench"]) == 13
    assert "this build has none" in capsys.readouterr().err
    monkeypatch.setitem(command._EXTERNAL, "bench", ("no_such_package.run", "measure"))
    assert command.main(["bench"]) == 13
    assert "install 'no_such_package'" in capsys.readouterr().err
