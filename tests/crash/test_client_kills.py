"""An owner and two clients, killed and stopped at random: nothing lost, corrupt or leaked."""

import faulthandler
import json
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import kvfs
from kvfs.engine.checker import Severity, check_pool
from kvfs.lifecycle import open_pool
from tests.crash.client_victim import JUNK, LAYOUT, SPACE, expected
from tests.invariants import check_engine

_ROOT = Path(__file__).parents[2]
_ROUNDS_PER_POOL = 25
_STARTUP_S = 60.0
CLIENTS = ("A", "B")


class Process:
    """A child whose lines are collected."""

    def __init__(self, *arguments: str) -> None:
        self.child = subprocess.Popen(
            [sys.executable, "-m", "tests.crash.client_victim", *arguments], cwd=_ROOT,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.lines: list[str] = []
        self._more = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.child.stdout is not None
        for line in self.child.stdout:
            with self._more:
                self.lines.append(line.strip())
                self._more.notify_all()

    def wait_lines(self, count: int) -> None:
        with self._more:
            assert self._more.wait_for(lambda: len(self.lines) >= count, _STARTUP_S), self.lines

    def ask(self) -> dict[str, int]:
        assert self.child.stdin is not None
        count = len(self.lines)
        self.child.stdin.write("\n")
        self.child.stdin.flush()
        self.wait_lines(count + 1)
        return json.loads(self.lines[-1])

    def kill(self) -> None:
        self.child.kill()
        assert self.child.wait() == -signal.SIGKILL
        self._end()

    def stop(self) -> None:
        assert self.child.stdin is not None
        self.child.stdin.close()
        assert self.child.wait() == 0
        self._end()

    def _end(self) -> None:
        self._reader.join()
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        self.child.stdin.close()
        self.child.stdout.close()


class Scene:
    """One pool, its owner and its clients."""

    def __init__(self, root: Path, rng: random.Random) -> None:
        self.root, self.rng = root, rng
        self.begun: dict[str, set[int]] = {name: set() for name in CLIENTS}
        self.done: dict[str, set[int]] = {name: set() for name in CLIENTS}
        self.owner = self._start_owner()
        self.clients = {name: self._start_client(name) for name in CLIENTS}

    def _start_owner(self) -> Process:
        process = Process("owner", str(self.root))
        process.wait_lines(1)
        return process

    def _start_client(self, name: str) -> Process:
        first = max(self.begun[name], default=-1) + 1
        return Process("client", str(self.root), name, str(first), str(self.rng.random()))

    def collect(self, name: str) -> None:
        for line in self.clients[name].lines:
            word, _, number = line.partition(" ")
            assert word != "corrupt", f"client {name}: put {number} was read with other bytes"
            if word == "begin":
                self.begun[name].add(int(number))
            elif word == "done":
                self.done[name].add(int(number))

    def round(self) -> None:
        """Kill or stop somebody, at a random moment."""
        threading.Event().wait(self.rng.uniform(0.0, 0.25))
        victims = self.rng.sample(["owner", *CLIENTS], self.rng.choice([1, 1, 1, 2, 3]))
        for victim in victims:
            process = self.owner if victim == "owner" else self.clients[victim]
            if self.rng.random() < 0.4:
                process.child.send_signal(signal.SIGSTOP)
                threading.Event().wait(self.rng.choice([0.01, 0.1, 0.4]))
                process.child.send_signal(signal.SIGCONT)
                continue
            process.kill()
            if victim == "owner":
                self.owner = self._start_owner()
            else:
                self.collect(victim)
                self.clients[victim] = self._start_client(victim)

    def end(self) -> dict[str, int]:
        """Kill the clients; return what the owner says is left of them.

        Before that the last owner lives long enough to evict what one of them holds, frozen.
        """
        threading.Event().wait(0.6)
        frozen = self.clients[self.rng.choice(CLIENTS)]
        frozen.child.send_signal(signal.SIGSTOP)
        threading.Event().wait(0.6)
        frozen.child.send_signal(signal.SIGCONT)
        for name, process in self.clients.items():
            process.kill()
            self.collect(name)
        left = self.owner.ask()
        self.owner.stop()
        return left


def check(scene: Scene) -> None:
    """Check the pool offline, then open it and compare."""
    report = check_pool(scene.root, data=True)
    bad = [str(finding) for finding in report.findings if finding.severity > Severity.NOTE]
    assert not bad, bad
    with open_pool(scene.root, background=False) as pool:
        assert not pool.recovery.problems
        check_engine(pool.store.state)
        space = pool.namespace(SPACE)
        known = set()
        for name in CLIENTS:
            for number in sorted(scene.begun[name]):
                tokens, payloads = expected(name, number)
                keys, _ = space.keys(tokens)
                known.update(key.tobytes() for key in keys)
                out = np.zeros_like(payloads)
                found = space.read_into(keys, out)
                assert found.all() or number not in scene.done[name], f"{name} {number}: lost"
                assert (out[found] == payloads[found]).all(), f"{name} {number}: wrong bytes"
        index = pool.store.state.indexes[space.info.namespace_id]
        phantoms = {key.tobytes() for key in index.snapshot()["key"]} - known
        assert not phantoms, f"{len(phantoms)} blocks that were never written"


def _rounds(tmp_path: Path, rng: random.Random, rounds: int) -> None:
    faulthandler.cancel_dump_traceback_later()
    acknowledged = revoked = evicted = 0
    for start in range(0, rounds, _ROUNDS_PER_POOL):
        root = tmp_path / f"pool{start}"
        devices = [
            "dram:?size=64MiB&segment=16MiB",
            f"dir:{tmp_path}/device{start}?size=1GiB&segment=16MiB",
        ]
        with kvfs.create_pool(root, devices) as pool:
            pool.namespace(SPACE, LAYOUT)
            pool.namespace(JUNK, LAYOUT)
        scene = Scene(root, rng)
        for _ in range(min(_ROUNDS_PER_POOL, rounds - start)):
            scene.round()
        left = scene.end()
        assert (left["waiting"], left["leases"], left["pages"]) == (0, 0, 0), left
        check(scene)
        acknowledged += sum(len(done) for done in scene.done.values())
        revoked, evicted = revoked + left["revoked"], evicted + left["evicted"]
        kvfs.destroy_pool(root)
    print(f"{rounds} rounds, {acknowledged} acknowledged puts, {revoked} pages revoked, "
          f"{evicted} segments evicted: 0 lost, 0 corrupt, 0 phantom, 0 leaked")  # fmt: skip
    assert acknowledged > rounds, "hardly anything was acknowledged: the test tests nothing"


@pytest.mark.crash
@pytest.mark.timeout(300)
def test_owner_and_clients_killed_and_stopped(tmp_path: Path, rng: random.Random) -> None:
    _rounds(tmp_path, rng, 8)


@pytest.mark.crash
@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_owner_and_clients_killed_and_stopped_1000_times(
    tmp_path: Path, rng: random.Random
) -> None:
    _rounds(tmp_path, rng, 1000)
