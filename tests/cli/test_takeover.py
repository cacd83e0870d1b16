"""kvfs serve --takeover: memory passes to the next owner; what goes wrong loses nothing."""

import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvfs
from kvfs.admin import messages as msg
from kvfs.cli import takeover
from kvfs.cli.estate import Estate
from kvfs.cli.service import Service, owned
from kvfs.config import PoolOptions
from kvfs.control_client import owners
from kvfs.devices.keeper import MEMORY_VERSION
from kvfs.errors import BusyError, FormatVersionError, RefusedError, UnavailableError
from kvfs.lifecycle import open_pool
from tests.cli.helpers import Admin
from tests.cli.test_mount import DEADLINE_S, run, wait_for
from tests.cli.test_serve import Serving, end_if_there, scrape
from tests.fuse.mounting import wait_until

LAYOUT = kvfs.Layout("uint8", (16384,), 4, model="warm")
COUNT = 20
QUESTION = msg.TakeOver(MEMORY_VERSION, 0)
NOBODY = 65534
HEIR = """
import os, signal, sys
from pathlib import Path
from kvfs.admin import messages as msg
from kvfs.cli import takeover
from kvfs.devices.keeper import MEMORY_VERSION
from kvfs.lifecycle import open_pool
path, stage = Path(sys.argv[1]), sys.argv[2]
question = msg.TakeOver(MEMORY_VERSION, 0)
if stage == "answer":
    takeover._receive_all = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
estate = takeover.ask(path, question, 60)
if stage == "open":
    pool = open_pool(path, keeper=estate.keeper, lock_fd=estate.share_lock())
    space = pool.namespace("warm")
    keys, _ = space.keys(range(1000, 1080))
    import numpy as np
    space.put(keys, np.zeros((20, 65536), np.uint8), durability="none")
if stage == "close":
    raise SystemExit(7)
os.kill(os.getpid(), signal.SIGKILL)
"""


def payload() -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(1).integers(0, 256, (COUNT, 65536), np.uint8)


class Warm:
    """A client that has put blocks into memory, and nowhere else."""

    def __init__(self, path: Path) -> None:
        self.pool = kvfs.open_pool(path)
        assert isinstance(self.pool, kvfs.RemotePool)
        self.space = self.pool.namespace("warm", LAYOUT)
        self.keys, _ = self.space.keys(np.arange(4 * COUNT))
        self.data = payload()
        self.space.put(self.keys, self.data, durability="none")
        self.space.context("chat").append(self.keys, self.data, durability="none")

    def attach(self) -> None:
        """Find the owner of now, which may be opening the pool."""

        def has_owner() -> bool:
            with contextlib.suppress(UnavailableError):
                self.pool.flush()
                return True
            return False

        wait_until(has_owner, "an owner", DEADLINE_S)

    def check(self) -> None:
        """Everything is there for an owner that serves, and is what it was."""
        self.attach()
        assert self.space.match_prefix(self.keys) == COUNT
        out = np.zeros_like(self.data)
        assert self.space.read_into(self.keys, out).all()
        assert (out == self.data).all()
        again = self.space.put(self.keys, self.data, durability="none")
        assert (again.blocks_stored, again.blocks_deduplicated) == (0, COUNT)
        assert [context.name for context in self.space.contexts()] == ["chat"]


@pytest.fixture
def path(root) -> Path:
    path = root / "kv0"
    devices = ["dram:?size=128MiB&segment=16MiB", f"dir:{root}/dev?size=128MiB&segment=16MiB"]
    kvfs.create_pool(path, devices).close()
    return path


@pytest.fixture
def serving(path) -> Iterator[Serving]:
    with Serving(path) as service:
        service.line_with("serving")
        yield service


@pytest.fixture
def warm(path, serving) -> Iterator[Warm]:
    client = Warm(path)
    yield client
    client.pool.close()


def test_what_is_in_memory_passes_on(path, serving, warm, capsys):
    held = threading.Event()
    was_free = []

    def watch() -> None:
        with (path / "lock").open() as lock:
            while not held.is_set():
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    was_free.append(True)
                    fcntl.flock(lock, fcntl.LOCK_UN)

    view = warm.space.view(warm.keys)
    watcher = threading.Thread(target=watch)
    watcher.start()
    with Serving(path, "--takeover", "--metrics", "127.0.0.1:0") as heir:
        line = heir.line_with("http://")
        heir.line_with("serving")
        assert serving.process.wait(DEADLINE_S) == 0
        held.set()
        watcher.join()
        assert not was_free
        warm.check()
        view.check()
        assert (view.numpy(np.uint8, (COUNT, 65536)) == warm.data).all()
        view.close()
        status = Admin(capsys, path)("pool", "status", "--json").json
        assert (status["owner_pid"], status["problems"]) == (heir.process.pid, [])
        assert scrape(line)["kvfs_deduplicated_blocks_total"] == COUNT
        more, _ = warm.space.keys(np.arange(10_000, 10_000 + 4 * COUNT))
        assert warm.space.put(more, warm.data, durability="none").blocks_stored == COUNT
        heir.end()
        assert heir.process.returncode == 0


def test_in_the_background_again_and_again(path, request):
    assert run("serve", path).returncode == 0
    warm = Warm(path)
    for _ in range(3):
        (entry,) = owners()
        request.addfinalizer(lambda pid=entry.pid: end_if_there(pid))
        taken = run("serve", "--takeover", path)
        assert (taken.returncode, taken.stderr) == (0, f"serving {path}\n")
        wait_for(entry.pid)
        warm.check()
    (entry,) = owners()
    request.addfinalizer(lambda: end_if_there(entry.pid))
    warm.pool.close()
    os.kill(entry.pid, signal.SIGTERM)
    wait_for(entry.pid)


def test_nobody_to_take_over_from(path):
    with Serving(path, "--takeover") as service:
        service.line_with("nobody owns")
        service.line_with("serving")
        service.end()
        assert service.process.returncode == 0


@pytest.mark.parametrize("stage", ["answer", "received", "open", "close"])
def test_an_heir_that_dies(path, serving, warm, stage, capsys):
    heir = subprocess.run(
        [sys.executable, "-c", HEIR, path, stage], capture_output=True, text=True, check=False,
        timeout=DEADLINE_S,
    )  # fmt: skip
    assert heir.returncode == (7 if stage == "close" else -signal.SIGKILL), heir.stderr
    serving.line_with("this owner goes on")
    warm.check()
    status = Admin(capsys, path)("pool", "status", "--json").json
    assert (status["owner_pid"], status["problems"]) == (serving.process.pid, [])
    with Serving(path, "--takeover") as next_heir:  # and may be asked again
        next_heir.line_with("serving")
        assert serving.process.wait(DEADLINE_S) == 0
        warm.check()


def test_an_owner_that_hangs(path, serving, warm):
    serving.process.send_signal(signal.SIGSTOP)
    refused = run("serve", "-f", "--takeover", "--takeover-timeout", "0.5", path)
    assert refused.returncode == 13
    assert "did not hand it over" in refused.stderr
    assert "--takeover-timeout" in refused.stderr
    assert "lock names" in refused.stderr
    serving.process.send_signal(signal.SIGCONT)  # it finds that nobody waits any more
    warm.check()
    assert serving.process.poll() is None


def test_an_owner_that_dies_while_it_closes(path, serving, warm):
    def stop(connection: socket.socket, *rest: Any) -> dict[str, int]:
        serving.process.kill()
        serving.process.wait()
        return receive(connection, *rest)

    receive, takeover._receive_all = takeover._receive_all, stop
    try:
        with pytest.raises(UnavailableError, match="did not hand it over"):
            takeover.ask(path, QUESTION, DEADLINE_S).close()
    finally:
        takeover._receive_all = receive
    with Serving(path, "--takeover") as heir:  # as after any crash
        heir.line_with("serving")
        warm.attach()
        heir.end()
        assert heir.process.returncode == 0


@pytest.mark.parametrize("is_open", [False, True])
def test_another_user_is_refused(path, serving, warm, is_open):
    if os.geteuid():
        pytest.skip("only root can become another user")
    os.chmod(path.parent, 0o755)
    if is_open:  # a mode is not all that keeps others out
        os.chmod(path / "control.sock", 0o666)
    code = (
        "import os, sys; from pathlib import Path; from kvfs.admin import messages as msg\n"
        "from kvfs.cli import takeover; from kvfs.errors import RefusedError\n"
        f"os.setgid({NOBODY}); os.setuid({NOBODY})\n"
        f"try: takeover.ask(Path(sys.argv[1]), msg.TakeOver({MEMORY_VERSION}, 0), 60)\n"
        "except RefusedError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, text=True, check=True
    )
    assert ("may not ask" if is_open else "belongs to another user") in done.stdout
    warm.check()
    assert serving.process.poll() is None


def test_an_heir_of_another_version(path, serving, warm):
    with pytest.raises(FormatVersionError, match=r"memory of version .* stop this owner"):
        takeover.ask(path, msg.TakeOver(MEMORY_VERSION + 1, 0), DEADLINE_S)
    warm.check()
    assert serving.process.poll() is None


def test_one_heir_at_a_time(path, serving, warm):
    estate = takeover.ask(path, QUESTION, DEADLINE_S)
    try:
        # It has closed its doors: nobody is there to ask, and the lock is held.
        with pytest.raises(BusyError, match="pool is in use"):
            kvfs.open_pool(path)
    finally:
        estate.close()
    serving.line_with("this owner goes on")
    warm.check()


def test_a_program_gives_its_pool_to_nobody(path):
    from kvfs.control import ControlServer

    with (
        kvfs.open_pool(path) as pool,
        ControlServer(pool),
        pytest.raises(RefusedError, match="end it instead"),
    ):
        takeover.ask(path, QUESTION, DEADLINE_S)


def test_what_was_lost_does_not_keep_the_rest_from_passing_on(path, expected_warnings):
    """A failed persist that nobody has heard of yet is told when the pool is closed."""
    expected_warnings.append("handed over, but: 3 blocks were lost")
    service = Service(
        pool=str(path), log="", log_format="text", is_verbose=False, allow_moved=False,
        pool_options=PoolOptions(), metrics="",
    )  # fmt: skip
    heirs, estate, came = takeover.Heirs(), Estate(), threading.Event()
    inherited: list[Estate] = []

    def inherit() -> None:
        heir = takeover.ask(path, QUESTION, DEADLINE_S)
        inherited.append(heir)
        heir.confirm()

    thread = threading.Thread(target=inherit)
    with owned(service, estate, heirs=heirs) as pool:
        space = pool.namespace("warm", LAYOUT)
        keys, _ = space.keys(np.arange(4 * COUNT))
        space.put(keys, payload(), durability="none")
        pool.store.state.counters.blocks_lost += 3
        heirs.open(came.set)
        thread.start()
        assert came.wait(DEADLINE_S)
    assert heirs.give(estate)
    thread.join()
    estate.close()
    (heir,) = inherited
    with owned(service, heir) as pool:
        assert pool.namespace("warm").match_prefix(keys) == COUNT
    heir.close()


class TestCannotBeOpenedAgain:
    """The heir has failed, and left a pool that the old owner cannot open."""

    @pytest.fixture
    def stranded(self, path, serving, warm) -> Serving:
        estate = takeover.ask(path, QUESTION, DEADLINE_S)
        (path.parent / "dev").rename(path.parent / "gone")
        estate.close()
        serving.line_with("cannot be opened again")
        return serving

    def test_opens_it_once_it_can(self, path, stranded, warm, capsys):
        admin = Admin(capsys, path)
        wait_until(lambda: "keeps memory" in admin("pool", "status").err, "its door", DEADLINE_S)
        with pytest.raises(BusyError, match=f"held by pid {stranded.process.pid}"):
            kvfs.open_pool(path)
        (path.parent / "gone").rename(path.parent / "dev")
        stranded.line_with("open again")
        warm.check()
        status = Admin(capsys, path)("pool", "status", "--json").json
        assert (status["owner_pid"], status["problems"]) == (stranded.process.pid, [])
        with Serving(path, "--takeover") as heir:
            heir.line_with("serving")
            assert stranded.process.wait(DEADLINE_S) == 0
            warm.check()

    def test_gives_all_to_the_next_heir(self, path, stranded, warm):
        failed = run("serve", "-f", "--takeover", path)  # which cannot open it either
        assert failed.returncode == 10, failed.stderr
        stranded.line_with("cannot be opened again")
        heir = asked(path)
        assert len(heir.keeper.names()) > COUNT * 65536 >> 24
        (path.parent / "gone").rename(path.parent / "dev")
        with open_pool(path, keeper=heir.keeper, lock_fd=heir.share_lock()) as pool:
            heir.confirm()
            assert stranded.process.wait(DEADLINE_S) == 0
            found = np.zeros_like(warm.data)
            assert pool.namespace("warm").read_into(warm.keys, found).all()
            assert (found == warm.data).all()
        heir.close()

    def test_is_told_to_end(self, path, stranded, warm):
        said = stranded.end()
        assert stranded.process.returncode == 10, said
        (path.parent / "gone").rename(path.parent / "dev")
        with kvfs.open_pool(path) as pool:
            assert not pool.namespace("warm").match_prefix(warm.keys)


def asked(path: Path) -> Estate:
    """Take over from an owner that is between two attempts, and has no door for a moment."""
    found: list[Estate] = []

    def is_given() -> bool:
        with contextlib.suppress(BusyError, UnavailableError):
            estate = takeover.ask(path, QUESTION, DEADLINE_S)
            if estate.keeper.names():
                found.append(estate)
            else:
                estate.close()
        return bool(found)

    wait_until(is_given, "the estate", DEADLINE_S)
    return found[0]
