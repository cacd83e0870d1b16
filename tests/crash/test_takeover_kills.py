"""Owners killed and stopped while a pool passes on: nothing lost, corrupt, phantom or leaked."""

import contextlib
import faulthandler
import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import kvfs
from kvfs.admin import messages as msg
from kvfs.clients.remote import RemotePool
from kvfs.control_client import ControlClient
from kvfs.engine.catalog_schema import ROOT_NODE_ID
from kvfs.errors import KvfsError, UnavailableError
from kvfs.fuse import mountpoint
from kvfs.lifecycle import open_pool
from tests.crash.client_victim import JUNK, LAYOUT, OPERATIONS_MAX, SPACE, expected
from tests.crash.test_client_kills import CLIENTS, Process, check
from tests.fuse.mounting import wait_until

_ROUNDS_PER_POOL = 20
_SETTLED_S = 120.0
_SEGMENTS = 4
_WRITER = CLIENTS[0]
_FILE = "still"
_CONTENT = b"".join(hashlib.sha256(b"%d" % i).digest() for i in range(20_000))
_READER = """
import os, sys, time
from pathlib import Path
path, content, good = sys.argv[1], Path(sys.argv[2]).read_bytes(), 0
while True:
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError:
        time.sleep(0.01)
        continue
    try:
        for _ in range(200):
            found = os.pread(fd, len(content), 0)
            print("good" if found == content else "corrupt", flush=True)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            time.sleep(0.01)
    except OSError:
        pass
    try:
        os.close(fd)
    except OSError:
        pass
"""


class Scene:
    """One pool, whoever owns it or wants to, a client that writes, and a reader of the mount."""

    def __init__(self, folder: Path, rng: random.Random, *, is_mounted: bool) -> None:
        self.root, self.rng, self.is_mounted = folder / "pool", rng, is_mounted
        self.point = folder / "mnt"
        self.point.mkdir(parents=True)
        self.begun: dict[str, set[int]] = {name: set() for name in CLIENTS}
        self.done: dict[str, set[int]] = {name: set() for name in CLIENTS}
        self.memory = f"m{os.getpid()}x{rng.getrandbits(32):x}"
        with kvfs.create_pool(self.root, [
            f"dram:?size={_SEGMENTS * 16}MiB&segment=16MiB&name={self.memory}",
            f"dir:{folder}/device?size=1GiB&segment=16MiB",
        ]) as pool:  # fmt: skip
            pool.namespace(SPACE, LAYOUT)
            pool.namespace(JUNK, LAYOUT)
        self._log = folder / "log"
        self.owners: list[subprocess.Popen[bytes]] = []
        self._reader: subprocess.Popen[bytes] | None = None
        self.client: Process | None = None

    def start(self) -> None:
        """Start an owner, the client and the reader."""
        self._settle()
        if self.is_mounted:
            self._begin_to_read(self.point.parent)
        self._write_on()

    def _write_on(self) -> None:
        """Start a client; one that is there has written as much as it does, or is killed."""
        if self.client is not None:
            self.client.kill()
            self._collected()
        first = max(self.begun[_WRITER], default=-1) + 1
        self.client = Process(
            "client", str(self.root), _WRITER, str(first), str(self.rng.random())
        )  # fmt: skip
        self.client.wait_lines(1)

    def _begin_to_read(self, folder: Path) -> None:
        with (self.point / _FILE).open("wb") as file:
            file.write(_CONTENT)
            os.fsync(file.fileno())
        (folder / "content").write_bytes(_CONTENT)
        with (folder / "read").open("wb") as output:
            self._reader = subprocess.Popen(
                [sys.executable, "-c", _READER, self.point / _FILE, folder / "content"],
                stdout=output,
            )  # fmt: skip

    def _start(self) -> "subprocess.Popen[bytes]":
        words = ["mount", self.root, self.point] if self.is_mounted else ["serve", self.root]
        with self._log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "kvfs.cli.kvfs", words[0], "-f", "--takeover",
                 "--takeover-timeout", "20", *words[1:]],
                stdin=subprocess.DEVNULL, stderr=log,
            )  # fmt: skip

    def round(self) -> None:
        """Let one or two take over; kill or stop somebody at a random moment."""
        old = self.owners[0]
        heirs = [self._start() for _ in range(self.rng.choice([1, 1, 1, 2]))]
        self.owners += heirs
        threading.Event().wait(self.rng.uniform(0.0, 3.0))
        victims = self.rng.choice([[], [old], [heirs[0]], [old], [heirs[0]], self.owners])
        if self.rng.random() < 0.4:
            for victim in victims:
                victim.send_signal(signal.SIGSTOP)
            threading.Event().wait(self.rng.choice([0.05, 0.5, 2.0]))
            for victim in victims:
                victim.send_signal(signal.SIGCONT)
        else:
            for victim in victims:
                victim.kill()
        self._settle()
        self._look()
        assert self.client is not None
        if sum(line.startswith("done") for line in self.client.lines) > OPERATIONS_MAX // 2:
            self._write_on()

    def _settle(self) -> None:
        """Return once one process owns the pool, and all others are gone; start one if need be."""

        def is_settled() -> bool:
            self.owners = [each for each in self.owners if each.poll() is None]
            if not self.owners:
                self.owners = [self._start()]
            return len(self.owners) == 1 and self._server_pid() == self.owners[0].pid

        wait_until(is_settled, "one owner", _SETTLED_S)

    def _server_pid(self) -> int:
        """Return who owns the pool and lets clients in, which it does last; 0: nobody."""
        with contextlib.suppress(KvfsError):
            RemotePool(self.root).close()
            client = ControlClient.connect(self.root)
            if client is not None:
                with client:
                    return int(client.ask(msg.Hello()).pid)
        return 0

    def _look(self) -> None:
        """What was acknowledged is there, and no memory is left over."""
        done = self._collected()
        missing: list[int] = []

        def has_answered() -> bool:
            with contextlib.suppress(UnavailableError), RemotePool(self.root) as pool:
                space = pool.namespace(SPACE)
                for number in done:
                    keys, _ = space.keys(expected(_WRITER, number)[0])
                    if space.match_prefix(keys) < len(keys):
                        missing.append(number)
                return True
            return False

        wait_until(has_answered, "an answer", _SETTLED_S)
        assert not missing, f"lost: {missing}"
        frames = {inode for inode, name in self._memfds(self.owners[0].pid) if "label" not in name}
        # Of each of the device's two file segments in a frame at most; and what is being made.
        assert len(frames) <= 2 * _SEGMENTS, frames

    def _collected(self) -> set[int]:
        assert self.client is not None
        for line in list(self.client.lines):
            word, _, number = line.partition(" ")
            assert word != "corrupt", f"put {number} was read with other bytes"
            if word == "begin":
                self.begun[_WRITER].add(int(number))
            elif word == "done":
                self.done[_WRITER].add(int(number))
        return set(self.done[_WRITER])

    def _memfds(self, pid: int) -> set[tuple[int, str]]:
        """Return inode and name of what a process has open or mapped of the device's memory."""
        found = set()
        with contextlib.suppress(OSError):
            for fd in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    if self.memory in os.readlink(fd):
                        found.add((os.stat(fd).st_ino, os.readlink(fd)))
            for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
                if self.memory in line:
                    found.add((int(line.split()[4]), line.split()[5]))
        return found

    def end(self) -> None:
        """End everybody, the owner cleanly; nobody has any of its memory then."""
        assert self.client is not None
        self.client.kill()
        self._collected()
        if self._reader is not None:
            self._reader.kill()
            self._reader.wait()
        (owner,) = self.owners
        owner.send_signal(signal.SIGTERM)
        assert owner.wait(_SETTLED_S) == 0, self._log.read_text()[-3000:]
        wait_until(lambda: not self._left(), "the memory to be given back", _SETTLED_S)
        assert mountpoint.entry_at(mountpoint.real_path(self.point)) is None

    def _left(self) -> set[int]:
        pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
        return {pid for pid in pids if self._memfds(pid)}

    def reads(self) -> int:
        """Return how often the reader has read its file; never with other bytes."""
        said = (self.point.parent / "read").read_text().split()
        assert "corrupt" not in said
        return len(said)

    def kill_all(self) -> None:
        """End what a test that failed has left."""
        client = None if self.client is None else self.client.child
        for each in (*self.owners, self._reader, client):
            if each is not None and each.poll() is None:
                each.send_signal(signal.SIGCONT)
                each.kill()
                each.wait()


def _rounds(folder: Path, rng: random.Random, rounds: int) -> None:
    faulthandler.cancel_dump_traceback_later()
    acknowledged = reads = 0
    for start in range(0, rounds, _ROUNDS_PER_POOL):
        is_mounted = start // _ROUNDS_PER_POOL % 3 != 2
        scene = Scene(folder / str(start), rng, is_mounted=is_mounted)
        try:
            scene.start()
            for _ in range(min(_ROUNDS_PER_POOL, rounds - start)):
                scene.round()
            scene.end()
        finally:
            scene.kill_all()
        check(scene)  # type: ignore[arg-type]
        acknowledged += len(scene.done[_WRITER])
        if is_mounted:
            with open_pool(scene.root, background=False) as pool:
                node = pool.catalog.lookup(ROOT_NODE_ID, _FILE)
                assert node is not None, "what was synced has lost its name"
                file = pool.files.open_read(node)
                assert pool.files.read(file, 0, len(_CONTENT) + 1) == _CONTENT
                pool.files.close_read(file)
            reads += scene.reads()
        kvfs.destroy_pool(scene.root)
    print(f"{rounds} rounds, {acknowledged} acknowledged puts, {reads} reads of an open file: "
          "0 lost, 0 corrupt, 0 phantom, 0 leaked")  # fmt: skip
    assert acknowledged > 0
    assert reads > rounds, "hardly anything was read: the test tests nothing"


@pytest.mark.crash
@pytest.mark.fuse
@pytest.mark.timeout(600)
def test_killed_and_stopped_while_a_pool_passes_on(tmp_path: Path, rng: random.Random) -> None:
    _rounds(tmp_path, rng, 2)


@pytest.mark.crash
@pytest.mark.fuse
@pytest.mark.slow
@pytest.mark.timeout(14400)
def test_killed_and_stopped_while_a_pool_passes_on_200_times(
    tmp_path: Path, rng: random.Random
) -> None:
    _rounds(tmp_path, rng, 200)
