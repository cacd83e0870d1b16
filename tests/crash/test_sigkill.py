"""A process killed at random moments: 0 blocks lost, 0 corrupt, 0 that were never written."""

import faulthandler
import os
import random
import select
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

import kvfs
from kvfs.engine.catalog_schema import NodeState, Origin
from kvfs.engine.checker import Severity, check_pool
from kvfs.units import MIB
from tests.crash.victim import LAYOUT, SPACE, Operation, expected
from tests.invariants import check_engine

_ROOT = Path(__file__).parents[2]
_ROUNDS_PER_POOL = 40
_STARTUP_S = 60.0


@dataclass(slots=True)
class Tally:
    """What the rounds found: `begun` and `done` are numbers of operations."""

    begun: set[int] = field(default_factory=set)
    done: set[int] = field(default_factory=set)
    kills: int = 0

    @property
    def next(self) -> int:
        return max(self.begun, default=-1) + 1


def run_and_kill(root: Path, tally: Tally, rng: random.Random) -> None:
    """Let a child write for a random time, kill it, and note what it reported."""
    command = [
        sys.executable,
        "-m",
        "tests.crash.victim",
        str(root),
        str(tally.next),
        str(rng.random()),
    ]
    with subprocess.Popen(command, cwd=_ROOT, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        fd = child.stdout.fileno()
        raw = b""
        deadline = time.monotonic() + _STARTUP_S
        is_ready = False
        while (left := deadline - time.monotonic()) > 0:
            if select.select([fd], [], [], left)[0]:
                part = os.read(fd, 65536)
                if not part:
                    break
                raw += part
            if not is_ready and b"ready\n" in raw:
                is_ready = True
                deadline = time.monotonic() + rng.uniform(0.0, 0.15)
        assert is_ready, "the child never opened the pool"
        child.send_signal(signal.SIGKILL)
        raw += child.stdout.read()
        assert child.wait() == -signal.SIGKILL
    tally.kills += 1
    for line in raw.decode().splitlines():
        word, _, number = line.partition(" ")
        if word == "begin":
            tally.begun.add(int(number))
        elif word == "done":
            tally.done.add(int(number))


def check(root: Path, tally: Tally) -> None:
    """Check the pool offline, then open it and compare."""
    report = check_pool(root, data=True)
    bad = [str(finding) for finding in report.findings if finding.severity > Severity.NOTE]
    assert not bad, bad
    with kvfs.open_pool(root, background=False) as pool:
        assert not pool.recovery.problems
        check_engine(pool.store.state)
        operations = {number: expected(number) for number in sorted(tally.begun)}
        _check_blocks(pool, operations, tally)
        _check_contexts(pool, operations, tally)
        _check_files(pool, operations, tally)


def _check_blocks(pool: kvfs.Pool, operations: dict[int, Operation], tally: Tally) -> None:
    space = pool.namespace(SPACE)
    known: dict[bytes, bytes] = {}
    for number, operation in operations.items():
        if not operation.tokens:
            continue
        keys, _ = space.keys(operation.tokens)
        known.update(zip((k.tobytes() for k in keys), operation.payloads, strict=True))
        out = np.zeros((len(keys), LAYOUT.block_bytes), np.uint8)
        found = space.read_into(keys, out)
        assert found.all() or number not in tally.done, f"operation {number}: blocks lost"
        for i in np.flatnonzero(found):
            assert out[i].tobytes() == operation.payloads[i], f"operation {number}: wrong bytes"
    index = pool.store.state.indexes[space.info.namespace_id]
    phantoms = {
        key.tobytes()
        for key in index.snapshot()["key"]
        if key.tobytes() not in known and key[24:].tobytes() != b"kvfsfile"
    }
    assert not phantoms, f"{len(phantoms)} blocks that were never written"


def _check_contexts(pool: kvfs.Pool, operations: dict[int, Operation], tally: Tally) -> None:
    """Each context holds all acknowledged appends, and of the others at most the last one."""
    space = pool.namespace(SPACE)
    appends = [o for o in operations.values() if o.kind == "append"]
    for name in {o.name for o in appends}:
        mine = [o for o in appends if o.name == name]
        found = space.context(name, create=False).keys.tobytes() if _exists(pool, name) else b""
        for operation in mine:
            part = space.keys(operation.tokens)[0].tobytes()
            if found.startswith(part):
                found = found[len(part) :]
            else:
                assert operation.number not in tally.done, f"operation {operation.number}: lost"
        assert not found, f"{name}: keys that were never appended"


def _exists(pool: kvfs.Pool, name: str) -> bool:
    root = pool.namespace(SPACE).info.root_node_id
    return pool.catalog.lookup(root, name) is not None


def _check_files(pool: kvfs.Pool, operations: dict[int, Operation], tally: Tally) -> None:
    root = pool.namespace(SPACE).info.root_node_id
    names = {o.name: o for o in operations.values() if o.kind == "file"}
    present = {n.name: n for n in pool.walk(root) if n.origin is Origin.FILE}
    assert present.keys() <= names.keys(), "files that were never written"
    for name, operation in names.items():
        node = present.get(name)
        if node is None:
            assert operation.number not in tally.done, f"{name}: lost"
            continue
        assert node.state is NodeState.ACTIVE
        reader = pool.files.open_read(node)
        content = pool.files.read(reader, 0, node.size_bytes + 1)
        pool.files.close_read(reader)
        assert bytes(content) == operation.payloads[0], f"{name}: wrong bytes"


def _device_url(kind: str, path: Path) -> str:
    if kind == "dax":
        with path.open("wb") as file:
            os.truncate(file.fileno(), 258 * MIB)
    return f"{kind}:{path}?size=256MiB&segment=16MiB"


def _kill_rounds(tmp_path: Path, rng: random.Random, rounds: int, kind: str) -> None:
    faulthandler.cancel_dump_traceback_later()  # nothing hangs: a round takes a second
    done = kills = 0
    for start in range(0, rounds, _ROUNDS_PER_POOL):
        root = tmp_path / f"pool{start}"
        devices = [_device_url(kind, tmp_path / f"device{start}")]
        with kvfs.create_pool(root, devices) as pool:
            pool.namespace(SPACE, LAYOUT, retention="durable")
        tally = Tally()
        for _ in range(min(_ROUNDS_PER_POOL, rounds - start)):
            run_and_kill(root, tally, rng)
            check(root, tally)
        done, kills = done + len(tally.done), kills + tally.kills
        kvfs.destroy_pool(root)
    print(f"{kills} kills, {done} acknowledged operations: 0 lost, 0 corrupt, 0 phantom")
    assert done > rounds // 2, "hardly anything was acknowledged: the test tests nothing"


@pytest.mark.crash
@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["dir", "dax"])
def test_killed_at_random_moments(tmp_path: Path, rng: random.Random, kind: str) -> None:
    _kill_rounds(tmp_path, rng, 10, kind)


@pytest.mark.crash
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", ["dir", "dax"])
def test_killed_200_times(tmp_path: Path, rng: random.Random, kind: str) -> None:
    _kill_rounds(tmp_path, rng, 200, kind)
