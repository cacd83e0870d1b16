"""kvfs mount --takeover, and a mount under a service manager: open files outlive their owner."""

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import kvfs
from kvfs.admin import messages as msg
from kvfs.cli import takeover
from kvfs.control_client import ControlClient, owners
from kvfs.devices.keeper import MEMORY_VERSION
from kvfs.errors import FormatVersionError, UnavailableError
from kvfs.fuse import core_messages, mountpoint
from tests.cli.manager import Manager
from tests.cli.test_mount import DEADLINE_S, point, run, wait_for  # noqa: F401
from tests.cli.test_serve import end_if_there
from tests.cli.test_takeover import COUNT, LAYOUT
from tests.fuse.mounting import wait_until

pytestmark = pytest.mark.fuse
LARGE = np.random.default_rng(3).integers(0, 256, 24 << 20, np.uint8).tobytes()
SMALL = b"small" * 1000
HEIR = """
import os, signal, sys
from pathlib import Path
from kvfs.admin import messages as msg
from kvfs.cli import takeover
from kvfs.clock import SystemClock
from kvfs.devices.keeper import MEMORY_VERSION
from kvfs.fuse import core_messages, mountpoint
from kvfs.fuse.core import Core
question = msg.TakeOver(MEMORY_VERSION, core_messages.VERSION, sys.argv[2])
estate = takeover.ask(Path(sys.argv[1]), question, 60)
if sys.argv[3] == "entered":
    core = Core.enter(estate.door_fd, SystemClock(), respawn=["/bin/false"])
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def path(root) -> Path:
    """A pool in memory alone: what is read after an upgrade was there all the time."""
    path = root / "kv0"
    kvfs.create_pool(path, ["dram:?size=192MiB&segment=16MiB"]).close()
    return path


PROGRAM = """
import mmap, os, sys
from pathlib import Path
point, large, small = sys.argv[1], Path(sys.argv[2]).read_bytes(), b"small" * 1000
def begin():
    global fds, mapped
    fds = {name: os.open(f"{point}/{name}", os.O_RDONLY) for name in ("large", "small")}
    mapped = mmap.mmap(fds["large"], len(large), prot=mmap.PROT_READ)
    assert mapped[:10] == large[:10]  # the other pages come later
    assert os.pread(fds["small"], 5, 0) == small[:5]
def check():
    assert mapped[:] == large
    assert os.pread(fds["small"], len(small), 0) == small
    step = 1 << 20
    assert b"".join(os.pread(fds["large"], step, at) for at in range(0, len(large), step)) == large
def forget():
    for fd in fds.values():
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
def write():
    global fd
    fd = os.open(f"{point}/half", os.O_CREAT | os.O_RDWR)
    os.write(fd, small)
def fail():
    for operation in (lambda: os.write(fd, b"more"), lambda: os.fsync(fd), lambda: os.close(fd)):
        try:
            operation()
        except OSError as error:
            print(error.errno, end=" ")
for line in sys.stdin:
    try:
        globals()[line.strip()]()
        print("done", flush=True)
    except BaseException as error:
        print(repr(error), flush=True)
"""


class User:
    """A process that has files open; a test's own would be closed in every child it starts."""

    def __init__(self, root: Path, point: Path) -> None:  # noqa: F811
        copy = root / "large"
        copy.write_bytes(LARGE)
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, point, copy], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def __call__(self, what: str) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def is_mounted(point: Path) -> bool:  # noqa: F811
    """Say so without asking the mount, which may wait for an owner."""
    return mountpoint.entry_at(mountpoint.real_path(point)) is not None


def fill(point: Path) -> None:  # noqa: F811
    (point / "large").write_bytes(LARGE)
    (point / "small").write_bytes(SMALL)


def owner_of(pool: Path, request: pytest.FixtureRequest) -> int:
    (entry,) = [entry for entry in owners() if entry.pool == str(pool)]
    request.addfinalizer(lambda: end_if_there(entry.pid))
    return entry.pid


@pytest.fixture
def mounted(path, point) -> Iterator[Path]:  # noqa: F811
    assert run("mount", path, point).returncode == 0
    fill(point)
    yield path
    if is_mounted(point):
        run("umount", point)


@pytest.fixture
def user(mounted, root, point) -> Iterator[User]:  # noqa: F811
    user = User(root, point)
    yield user
    user.close()


@pytest.fixture
def reader(user) -> User:
    assert user("begin") == "done"
    return user


def take_over(mounted: Path, point: Path) -> None:  # noqa: F811
    taken = run("mount", "--takeover", mounted, point)
    assert taken.returncode == 0, taken.stderr


def test_open_files_pass_on(mounted, reader, point, request):  # noqa: F811
    with kvfs.open_pool(mounted) as client:
        space = client.namespace("warm", LAYOUT)
        keys, _ = space.keys(np.arange(4 * COUNT))
        data = np.random.default_rng(1).integers(0, 256, (COUNT, 65536), np.uint8)
        space.put(keys, data, durability="none")
        for round_ in range(2):  # the second is taken over from one that came by the door
            pid = owner_of(mounted, request)
            take_over(mounted, point)
            wait_for(pid)
            assert owner_of(mounted, request) != pid
            assert reader("check") == "done"
            assert {"large", "small", "warm"} <= set(os.listdir(point))
            (point / f"new{round_}").write_bytes(SMALL)
            assert (point / f"new{round_}").read_bytes() == SMALL
            client.flush()
            out = np.zeros_like(data)
            assert space.read_into(keys, out).all()
            assert (out == data).all()
    reader.close()
    last = owner_of(mounted, request)
    assert run("umount", point).returncode == 0
    wait_for(last)
    with kvfs.open_pool(mounted) as pool:
        assert pool.recovery.problems == []


def test_what_is_open_is_not_evicted(mounted, reader, point, request):  # noqa: F811
    """Neither before its first read under the new owner, nor when many others are put."""
    pid = owner_of(mounted, request)
    take_over(mounted, point)
    wait_for(pid)
    with kvfs.open_pool(mounted) as client:
        space = client.namespace("warm", LAYOUT)
        data = np.zeros((COUNT, 65536), np.uint8)
        for number in range(1, 200):  # more than the pool can hold
            data[:, :8] = np.frombuffer(number.to_bytes(8, "little"), np.uint8)
            keys, _ = space.keys(np.arange(4 * COUNT) + number * 1000)
            space.put(keys, data, durability="none")
        assert client.statistics().counters["segments_evicted"] > 0
    assert reader("forget") == "done"
    assert reader("check") == "done"


def test_a_crash_after_an_upgrade(mounted, reader, point, request):  # noqa: F811
    """The core starts the next owner by the command of the last."""
    take_over(mounted, point)
    pid = owner_of(mounted, request)
    os.kill(pid, signal.SIGKILL)
    wait_for(pid)
    wait_until(lambda: any(entry.pid != pid for entry in owners()), "another owner", DEADLINE_S)
    assert owner_of(mounted, request) != pid
    assert (point / "none").exists() is False
    (point / "new").write_bytes(SMALL)
    take_over(mounted, point)  # from one that the core has started
    assert (point / "new").read_bytes() == SMALL


def test_requests_under_way_are_answered(mounted, point):  # noqa: F811
    failures: list[str] = []
    is_over = threading.Event()
    counts = [0, 0]

    def hammer(number: int, work: Callable[[], object]) -> None:
        while not is_over.is_set():
            try:
                work()
            except OSError as error:
                failures.append(f"{number}: {error}")
            counts[number] += 1

    def read() -> None:
        assert (point / "small").read_bytes() == SMALL

    def look() -> None:
        assert (point / "small").stat().st_size == len(SMALL)
        assert not (point / "none").exists()

    threads = [
        threading.Thread(target=hammer, args=(number, work))
        for number, work in enumerate((read, look))
    ]
    for thread in threads:
        thread.start()
    try:
        for _ in range(3):
            before = list(counts)
            take_over(mounted, point)
            for number, count in enumerate(before):
                wait_until(lambda: counts[number] > count, "requests")  # noqa: B023
    finally:
        is_over.set()
        for thread in threads:
            thread.join()
    assert failures == []


def test_a_writer_is_told(mounted, user, point):  # noqa: F811
    assert user("write") == "done"
    take_over(mounted, point)
    assert user("fail") == f"{errno.EIO} {errno.EIO} {errno.EIO} done"
    assert not (point / "half").exists()
    (point / "half").write_bytes(SMALL)
    assert (point / "half").read_bytes() == SMALL


@pytest.mark.parametrize("stage", ["received", "entered"])
def test_an_heir_that_dies(mounted, reader, point, stage, request):  # noqa: F811
    pid = owner_of(mounted, request)
    heir = subprocess.run(
        [sys.executable, "-c", HEIR, mounted, point, stage], capture_output=True, text=True,
        check=False, timeout=DEADLINE_S,
    )  # fmt: skip
    assert heir.returncode == -signal.SIGKILL, heir.stderr
    assert reader("check") == "done"  # by the core, whoever its owner is
    assert (point / "small").read_bytes() == SMALL  # waits for the owner, which comes back
    (point / "new").write_bytes(SMALL)
    assert owner_of(mounted, request) == pid
    take_over(mounted, point)
    wait_for(pid)
    assert reader("check") == "done"


def test_an_owner_that_cannot_open_it_again(mounted, reader, point, request):  # noqa: F811
    pid = owner_of(mounted, request)
    question = msg.TakeOver(MEMORY_VERSION, core_messages.VERSION, str(point))
    estate = takeover.ask(mounted, question, DEADLINE_S)
    catalog, aside = mounted / "catalog.sqlite", mounted / "aside"
    catalog.rename(aside)
    estate.close()

    def is_told() -> bool:
        client = ControlClient.connect(mounted)
        if client is None:
            return False
        with client, pytest.raises(UnavailableError) as caught:
            client.ask(msg.Hello())
        return "keeps memory and mount" in str(caught.value)

    wait_until(is_told, "its door", DEADLINE_S)
    aside.rename(catalog)
    assert (point / "small").read_bytes() == SMALL  # waits for the owner
    assert reader("forget") == "done"
    assert reader("check") == "done"
    assert owner_of(mounted, request) == pid
    take_over(mounted, point)
    wait_for(pid)
    assert reader("check") == "done"


def test_what_cannot_be_taken_over(mounted, point, root, request):  # noqa: F811
    pid = owner_of(mounted, request)
    refused = run("serve", "--takeover", mounted)
    assert refused.returncode == 16
    assert f"kvfs mount --takeover POOL {point}" in refused.stderr
    elsewhere = root / "elsewhere"
    elsewhere.mkdir()
    assert run("mount", "--takeover", mounted, elsewhere).returncode == 16
    question = msg.TakeOver(MEMORY_VERSION, core_messages.VERSION + 1, str(point))
    with pytest.raises(FormatVersionError, match=r"unmount .* and mount it again"):
        takeover.ask(mounted, question, DEADLINE_S)
    assert owner_of(mounted, request) == pid
    assert run("umount", point).returncode == 0
    assert run("mount", "--no-core", mounted, point).returncode == 0
    without = run("mount", "--takeover", mounted, point)
    assert without.returncode == 16
    assert "without kvfs-core" in without.stderr


def test_from_serve_to_mount(path, point, request):  # noqa: F811
    assert run("serve", path).returncode == 0
    pid = owner_of(path, request)
    take_over(path, point)
    wait_for(pid)
    (point / "new").write_bytes(SMALL)
    assert run("umount", point).returncode == 0


class TestManaged:
    """`kvfs mount --stay-mounted` under a service manager."""

    @pytest.fixture
    def manager(self, path, root, point) -> Iterator[Manager]:  # noqa: F811
        with Manager(root, "mount", "-f", "--stay-mounted", path, point) as manager:
            manager.start()
            fill(point)
            yield manager
        wait_until(lambda: not is_mounted(point), "the mount is taken away", DEADLINE_S)

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
    def test_restart(self, manager, root, point, number):  # noqa: F811
        reader = User(root, point)
        assert reader("begin") == "done"
        for round_ in range(2):
            assert manager.end(number) == (0 if number == signal.SIGTERM else -number)
            assert is_mounted(point)
            manager.start()
            assert "mounted anew" not in manager.log
            assert reader("check") == "done"
            (point / f"new{round_}").write_bytes(SMALL)
            assert (point / f"new{round_}").read_bytes() == SMALL
        assert len(manager.names) == len(set(manager.names))
        reader.close()

    def test_stopped_for_good(self, manager, point):  # noqa: F811
        assert manager.end(signal.SIGTERM) == 0
        assert is_mounted(point)
        manager.discard()
        wait_until(lambda: not is_mounted(point), "the mount is taken away", DEADLINE_S)

    def test_unmounted_by_hand(self, manager, point):  # noqa: F811
        assert run("umount", point).returncode == 0
        assert manager.process.wait(DEADLINE_S) == 0
        assert "door" not in manager.names
        manager.start()
        assert "mounted anew" not in manager.log
        assert (point / "small").read_bytes() == SMALL

    def test_the_core_dies_with_its_owner(self, manager, point):  # noqa: F811
        children = Path(f"/proc/{manager.process.pid}/task/{manager.process.pid}/children")
        (core,) = [int(pid) for pid in children.read_text().split()]
        manager.process.send_signal(signal.SIGSTOP)
        os.kill(core, signal.SIGKILL)
        assert manager.end(signal.SIGKILL) == -signal.SIGKILL
        manager.start()
        assert "mounted anew" in manager.log
        assert (point / "large").read_bytes() == LARGE
