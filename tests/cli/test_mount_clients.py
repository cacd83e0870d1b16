"""A mounted pool serves other processes, also after its owner was replaced."""

import os
import signal
import time

import numpy as np
import pytest

import kvfs
from kvfs.control_client import owners
from tests.cli.test_mount import DEADLINE_S, point, run, wait_for  # noqa: F401

LAYOUT = kvfs.Layout("uint8", (16384,), 4, model="served")


@pytest.mark.fuse
def test_client_of_a_mount(pool_path, point):  # noqa: F811
    assert run("mount", pool_path, point).returncode == 0
    with kvfs.open_pool(pool_path) as pool:
        assert isinstance(pool, kvfs.RemotePool)
        space = pool.namespace("served", LAYOUT)
        keys, _ = space.keys(np.arange(12))
        data = np.random.default_rng(1).integers(0, 256, (3, 65536), np.uint8)
        space.context("chat").append(keys, data, tokens=np.arange(12), durability="sync")
        assert (point / "served/chat").read_bytes() == data.tobytes()
        out = np.zeros_like(data)
        assert space.read_into(keys, out).all()  # from here on it is mapped
        (entry,) = owners()
        os.kill(entry.pid, signal.SIGKILL)
        wait_for(entry.pid)
        out[:] = 0
        assert space.read_into(keys, out).all()  # without an owner, or with the next one
        assert (out == data).all()
        end = time.monotonic() + DEADLINE_S
        while True:
            try:
                more, _ = space.keys(np.arange(100, 104))
                space.put(more, data[:1], durability="sync")
                break
            except kvfs.UnavailableError:
                assert time.monotonic() < end, "nobody took over"
        assert space.match_prefix(keys) == 3
        assert [context.name for context in space.contexts()] == ["chat"]
    assert run("umount", point).returncode == 0
    assert not (pool_path / "clients.sock").exists()
