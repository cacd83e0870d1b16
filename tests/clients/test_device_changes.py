"""Clients go on while the devices of their owner's pool change."""

import threading
from pathlib import Path

import numpy as np

import kvfs
from kvfs import device_changes as changes
from kvfs.units import MIB
from tests.clients.support import LAYOUT, client, payloads, served, tokens

_POLLS, _POLL_S = 3000, 0.02


def evacuated(pool: kvfs.Pool, name: str, *, polls: int = _POLLS) -> bool:
    """Empty a device; False if something of it stays held."""
    pause = threading.Event()  # nobody sets it
    for _ in range(polls):
        if not changes.evacuate(pool, name, 64 * MIB).left_segments:
            return True
        pause.wait(_POLL_S)
    return False


def test_a_client_reads_from_the_device_that_came_instead(tmp_path: Path) -> None:
    with served(tmp_path) as (pool, _), client(tmp_path) as remote:
        space = remote.namespace("n", LAYOUT)
        keys, _ = space.keys(tokens(50, 1))
        data = payloads(50, 1)
        space.put(keys, data, durability="sync")
        out = np.zeros_like(data)
        assert space.read_into(keys, out).all()  # its segments are mapped
        changes.add_device(pool, f"dir:{tmp_path}/new?size=256MiB&segment=16MiB")
        assert evacuated(pool, "dir0")
        changes.remove(pool, "dir0")
        out[:] = 0
        assert space.read_into(keys, out).all()
        assert (out == data).all()
        more, _ = space.keys(tokens(10, 2))
        assert space.put(more, payloads(10, 2), durability="sync").blocks_stored == 10
        assert space.match_prefix(more) == 10


def test_what_a_client_views_stays_until_it_is_closed(tmp_path: Path) -> None:
    with served(tmp_path) as (pool, _), client(tmp_path) as remote:
        space = remote.namespace("n", LAYOUT)
        keys, _ = space.keys(tokens(20, 1))
        data = payloads(20, 1)
        space.put(keys, data, durability="sync")
        changes.add_device(pool, f"dir:{tmp_path}/new?size=256MiB&segment=16MiB")
        with space.view(keys) as view:
            assert not evacuated(pool, "dir0", polls=20)
            assert bytes(view.memory()) == data.tobytes()
        assert evacuated(pool, "dir0")
        changes.remove(pool, "dir0")
