"""Under a service manager that stores descriptors: what is warm survives restarts and crashes."""

import os
import signal
from collections.abc import Iterator

import numpy as np
import pytest

import kvfs
from kvfs.devices.keeper import MEMORY_VERSION
from kvfs.errors import UnavailableError
from tests.cli.helpers import Admin
from tests.cli.manager import Manager
from tests.cli.test_takeover import COUNT, LAYOUT, Warm, path  # noqa: F401
from tests.fuse.mounting import wait_until


@pytest.fixture
def manager(path, root) -> Iterator[Manager]:  # noqa: F811
    with Manager(root, "serve", "-f", path) as manager:
        manager.start()
        yield manager


@pytest.fixture
def warm(path, manager) -> Iterator[Warm]:  # noqa: F811
    client = Warm(path)
    yield client
    client.pool.close()


def kinds(manager: Manager) -> set[str]:
    return {name.rpartition(".")[2].partition("-")[0] for name in manager.names}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_restart(manager, warm, number, capsys, path):  # noqa: F811
    assert kinds(manager) == {"label", "frame"}
    for _ in range(2):
        assert manager.end(number) == (0 if number == signal.SIGTERM else -number)
        manager.start()
        warm.check()
        status = Admin(capsys, path)("pool", "status", "--json").json
        assert status["problems"] == []
    assert len(manager.names) == len(set(manager.names))


def test_stopped_for_good(manager, warm):
    assert manager.end(signal.SIGTERM) == 0
    manager.discard()
    manager.start()
    warm.attach()
    out = np.zeros_like(warm.data)
    assert not warm.space.read_into(warm.keys, out).any()  # durability "none"


def rename(manager: Manager, old: str, new: str) -> None:
    manager.stored = [(name.replace(old, new), fd) for name, fd in manager.stored]


def test_memory_of_another_version(manager, warm):
    assert manager.end(signal.SIGKILL) == -signal.SIGKILL
    rename(manager, f"kvfs{MEMORY_VERSION}.", f"kvfs{MEMORY_VERSION + 1}.")
    manager.start()
    assert "starts empty" in manager.log
    assert f"found kvfs{MEMORY_VERSION + 1}" in manager.log
    warm.attach()
    assert warm.space.match_prefix(warm.keys) == 0
    wait_until(lambda: not any(n.startswith(f"kvfs{MEMORY_VERSION + 1}") for n in manager.names),
               "the other version's memory is given up")  # fmt: skip


@pytest.mark.parametrize("offset", [0, 8])
def test_a_damaged_label(manager, warm, offset):
    assert manager.end(signal.SIGKILL) == -signal.SIGKILL
    (label,) = (fd for name, fd in manager.stored if name.endswith(".label"))
    os.pwrite(label, b"\xff\xff\xff\xff", offset)
    manager.start()
    assert "starts empty" in manager.log
    warm.attach()
    assert warm.space.match_prefix(warm.keys) == 0
    warm.space.put(warm.keys, warm.data, durability="none")
    warm.check()


def test_memory_of_another_pool(manager, warm):
    """Its superblock is whole, and says whose it is: nothing of it is read."""
    assert manager.end(signal.SIGKILL) == -signal.SIGKILL
    (label,) = (fd for name, fd in manager.stored if name.endswith(".label"))
    raw = os.pread(label, os.fstat(label).st_size, 0)
    for start in (raw.find(b"KVFSSUP1"), raw.rfind(b"KVFSSUP1")):
        os.pwrite(label, b"KVFSSUP2", start)
    manager.start()
    assert "starts empty" in manager.log
    warm.attach()
    assert warm.space.match_prefix(warm.keys) == 0


def test_damaged_blocks_are_misses(manager, warm):
    assert manager.end(signal.SIGKILL) == -signal.SIGKILL
    # Nobody can write to a frame any more; this takes one away under the label.
    frames = [item for item in manager.stored if ".frame-" in item[0]]
    for item in frames:
        os.close(item[1])
        manager.stored.remove(item)
    manager.start()
    warm.attach()
    assert warm.space.match_prefix(warm.keys) == 0


def test_killed_again_and_again_under_a_writer(path, root, capsys):  # noqa: F811
    """Whatever a crash leaves is accepted, and what is found is what was put."""
    rng = np.random.default_rng(7)

    def data_of(number: int) -> np.ndarray:
        return np.random.default_rng(number).integers(0, 256, (COUNT, 65536), np.uint8)

    with Manager(root, "serve", "-f", path) as manager:
        manager.start()
        client = kvfs.open_pool(path)
        space = client.namespace("warm", LAYOUT)
        found = put = 0
        for round_ in range(8):
            first = 100 * round_
            batches = int(rng.integers(1, 60))
            try:
                for batch in range(batches):
                    if batch == batches - 1:
                        manager.process.kill()
                    keys, _ = space.keys(np.arange(4 * COUNT) + 10_000 * (first + batch))
                    space.put(keys, data_of(first + batch), durability="none")
            except UnavailableError:
                pass
            manager.end(signal.SIGKILL)
            manager.start()
            client.flush()
            status = Admin(capsys, path)("pool", "status", "--json").json
            assert status["problems"] == []
            for batch in range(batches):
                keys, _ = space.keys(np.arange(4 * COUNT) + 10_000 * (first + batch))
                out = np.zeros((COUNT, 65536), np.uint8)
                mask = space.read_into(keys, out)
                assert (out[mask] == data_of(first + batch)[mask]).all()
                found += int(mask.sum())
                put += COUNT
        assert found > put // 2
        client.close()
