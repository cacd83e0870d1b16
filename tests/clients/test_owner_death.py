"""Owners that die or restart under clients, and clients that die or freeze under an owner."""

import contextlib
import os
import signal

import numpy as np
import pytest

import kvfs
from kvfs.clients.server import ClientServer
from kvfs.lifecycle import open_pool
from tests.clients.support import BLOCK, LAYOUT, child, client, payloads, served, tokens
from tests.fuse.mounting import wait_until

DRAM = "dram:?size=128MiB&segment=16MiB"
OWNER = """
import sys, kvfs
from kvfs.clients.server import ClientServer
from kvfs.lifecycle import open_pool
with open_pool(sys.argv[1]) as pool, ClientServer(pool):
    print("ready", flush=True)
    sys.stdin.read()
"""
HOLDER = """
import sys, numpy as np, kvfs
pool = kvfs.open_pool(sys.argv[1])
space = pool.namespace("n")
keys = np.frombuffer(bytes.fromhex(sys.argv[2]), np.uint8).reshape(-1, 32)
view = space.view(keys)
print("holds", flush=True)
sys.stdin.readline()
try:
    view.check()
    print("kept", flush=True)
except kvfs.LeaseExpiredError:
    print("expired", flush=True)
out = np.zeros((len(keys), 65536), np.uint8)
print(int(space.read_into(keys, out).sum()), flush=True)
sys.stdin.readline()
"""


def start_owner(path):
    process = child(OWNER, str(path / "pool"))
    assert process.stdout.readline() == "ready\n"
    return process


def kill(process) -> None:
    process.kill()
    process.communicate()


@pytest.mark.parametrize("kind", ["memory", "directory"])
def test_owner_killed_under_a_client(tmp_path, kind) -> None:
    disk = f"dir:{tmp_path}/device?size=256MiB&segment=16MiB"
    with kvfs.create_pool(tmp_path / "pool", [DRAM] if kind == "memory" else [disk]) as pool:
        pool.namespace("n", LAYOUT)
    owner = start_owner(tmp_path)
    with client(tmp_path) as remote:
        space = remote.namespace("n")
        keys, _ = space.keys(tokens(20, 1))
        data = payloads(20, 1)
        space.put(keys, data, durability="async" if kind == "memory" else "sync")
        out = np.zeros_like(data)
        assert space.read_into(keys, out).all()
        view = space.view(keys)
        kill(owner)
        # What is mapped is read on.
        out[:] = 0
        assert space.match_prefix(keys) == 20
        assert space.read_into(keys, out).all()
        assert (out == data).all()
        more, _ = space.keys(tokens(2, 2))
        with pytest.raises(kvfs.UnavailableError) as caught:
            space.put(more, payloads(2, 2))
        assert caught.value.retryable
        owner = start_owner(tmp_path)
        space.put(more, payloads(2, 2))  # finds the new owner
        assert space.match_prefix(more) == 2
        assert space.match_prefix(keys) == (0 if kind == "memory" else 20)
        assert (view.numpy(np.uint8, (20, BLOCK)) == data).all()
        view.check()
        view.close()
        out[:] = 0
        space.put(keys, data)
        assert space.read_into(keys, out).all()
        assert (out == data).all()
        owner.stdin.close()
        assert owner.wait() == 0
        owner.stdout.close()


def test_an_owner_that_stops_serving_ends_sessions(tmp_path) -> None:
    with served(tmp_path, DRAM) as (pool, server):
        remote = client(tmp_path)
        space = remote.namespace("n", LAYOUT)
        keys, _ = space.keys(tokens(2, 1))
        space.put(keys, payloads(2, 1))
        assert space.match_prefix(keys) == 2
        server.stop()
        with pytest.raises(kvfs.UnavailableError):
            remote.flush()
        with pytest.raises(kvfs.BusyError, match="pool is in use"):
            kvfs.open_pool(pool.path)
        with ClientServer(pool):
            remote.flush()
            assert space.match_prefix(keys) == 2
        remote.close()


def start_holder(pool, keys):
    process = child(HOLDER, str(pool.path), keys.tobytes().hex())
    assert process.stdout.readline() == "holds\n"
    return process


def waiting(pool) -> int:
    with pool.store.state.lock:
        return sum(len(device.waiting()) for device in pool.store.state.devices)


def test_a_dead_client_holds_nothing(tmp_path) -> None:
    with served(tmp_path, DRAM) as (pool, server):
        space = pool.namespace("n", LAYOUT)
        keys, _ = space.keys(tokens(20, 1))
        space.put(keys, payloads(20, 1))
        pool.flush()
        with pool.store.state.lock:
            device = pool.store.state.devices[0]
            device.full.append(device.logs.pop(space.info.namespace_id))
        pool.flush()
        holder = start_holder(pool, keys)
        pool.store.drop(space.info.namespace_id, keys)
        assert waiting(pool) == 1
        kill(holder)
        while waiting(pool):
            pass
        assert not server.statistics()
        assert not pool.store.state.holds._holders


def test_a_frozen_client_loses_what_is_needed(tmp_path, expected_warnings) -> None:
    expected_warnings.append("leases revoked")
    options = {"client_timeout_s": 1.0, "client_share": 1.0}
    with served(tmp_path, DRAM, **options) as (pool, server):
        space = pool.namespace("n", LAYOUT)
        chosen, count = [], 0
        for step in range(8):  # the view holds every segment
            keys, _ = space.keys(tokens(200, step))
            with contextlib.suppress(kvfs.NoSpaceError):
                space.put(keys, payloads(200, step))
                count += space.match_prefix(keys) == 200
        snapshot = pool.store.state.indexes[space.info.namespace_id].snapshot()
        _, firsts = np.unique(snapshot["segment"], return_index=True)
        chosen = np.ascontiguousarray(snapshot["key"][firsts])
        holder = start_holder(pool, chosen)
        holder.send_signal(signal.SIGSTOP)
        held = {int(s) for s in snapshot["segment"]}
        more, _ = space.keys(tokens(250, 99))
        pool.flush()
        seen = 0
        while not pool.store.state.holds.revoked:
            seen += 1
            more, _ = space.keys(tokens(250, 100 + seen))
            with contextlib.suppress(kvfs.NoSpaceError):
                space.put(more, payloads(250, seen))
        assert held
        holder.send_signal(signal.SIGCONT)
        holder.stdin.write("\n")
        holder.stdin.flush()
        assert holder.stdout.readline() == "expired\n"
        assert 0 <= int(holder.stdout.readline()) <= len(chosen)
        holder.stdin.write("\n")
        holder.communicate()
        assert server is not None


def test_a_frozen_client_keeps_what_nobody_needs(tmp_path) -> None:
    with served(tmp_path, DRAM, client_timeout_s=0.5) as (pool, _):
        space = pool.namespace("n", LAYOUT)
        keys, _ = space.keys(tokens(20, 1))
        space.put(keys, payloads(20, 1))
        holder = start_holder(pool, keys)
        holder.send_signal(signal.SIGSTOP)
        for step in range(12):
            more, _ = space.keys(tokens(250, 10 + step))
            space.put(more, payloads(250, step))
        holder.send_signal(signal.SIGCONT)
        holder.stdin.write("\n")
        holder.stdin.flush()
        assert holder.stdout.readline() == "kept\n"
        assert holder.stdout.readline() == "20\n"
        kill(holder)


def test_restart_leaves_no_segment_behind(tmp_path) -> None:
    disk = f"dir:{tmp_path}/device?size=256MiB&segment=16MiB"
    with kvfs.create_pool(tmp_path / "pool", [disk]) as pool, ClientServer(pool):
        space = pool.namespace("n", LAYOUT)
        keys, _ = space.keys(tokens(400, 1))
        space.put(keys, payloads(400, 1), durability="sync")
        holder = start_holder(pool, keys[:1])
        pool.store.drop(space.info.namespace_id, keys)
        assert waiting(pool) >= 1
    with open_pool(tmp_path / "pool") as pool:
        assert waiting(pool) == 0
    kill(holder)
    assert os.path.exists(tmp_path / "pool")


HEIR = """
import os, signal, sys, numpy as np, kvfs
from kvfs.clients import link
pool = kvfs.open_pool(sys.argv[1])
space = pool.namespace("n")
keys = np.frombuffer(bytes.fromhex(sys.argv[2]), np.uint8).reshape(-1, 32)
view = space.view(keys)
read_end, write_end = os.pipe()
if os.fork() == 0:
    os.close(write_end)
    os.write(1, b"holds\\n")
    sys.stdin.readline()  # has inherited every socket, and keeps them open
    os._exit(0)
os.close(read_end)
signal.pause()
"""


def test_a_dead_client_holds_nothing_though_its_child_has_the_sockets(tmp_path) -> None:
    with served(tmp_path, DRAM) as (pool, server):
        space = pool.namespace("n", LAYOUT)
        keys, _ = space.keys(tokens(20, 1))
        space.put(keys, payloads(20, 1))
        with pool.store.state.lock:
            device = pool.store.state.devices[0]
            device.full.append(device.logs.pop(space.info.namespace_id))
        pool.flush()
        holder = child(HEIR, str(pool.path), keys.tobytes().hex())
        assert holder.stdout.readline() == "holds\n"
        pool.store.drop(space.info.namespace_id, keys)
        assert waiting(pool) == 1
        holder.kill()
        wait_until(lambda: not waiting(pool), "leases of a dead client")
        wait_until(lambda: not server._connections, "its connections")
        assert not server.statistics()
        assert not server._processes
        holder.stdin.close()  # and the child ends
        holder.wait()
        holder.stdout.close()


@pytest.mark.parametrize("kernel", ["before 6.5", "of a container"])
def test_a_client_without_a_pidfd_of_its_socket(tmp_path, monkeypatch, kernel) -> None:
    """By its number instead; and where that is not known, its socket must do."""
    monkeypatch.setattr("kvfs.clients.peer._SO_PEERPIDFD", 1 << 20)
    if kernel == "of a container":
        monkeypatch.setattr(os, "pidfd_open", _refuse)
    with served(tmp_path, DRAM) as (pool, server):
        space = pool.namespace("n", LAYOUT)
        keys, _ = space.keys(tokens(20, 1))
        space.put(keys, payloads(20, 1))
        holder = start_holder(pool, keys)
        assert len(server._processes) == (kernel == "before 6.5")
        kill(holder)
        wait_until(lambda: not server.statistics(), "the end of the session")


def _refuse(_pid: int) -> int:
    raise OSError(22, "Invalid argument")
