"""Clients of a pool on DAX: one descriptor covers all tenants, so they are given none."""

from pathlib import Path

import numpy as np
import pytest

import kvfs
from kvfs.units import MIB
from tests.clients.support import LAYOUT, client, payloads, served, tokens


def device_url(path: Path) -> str:
    with (path / "memory").open("wb") as file:
        file.truncate(130 * MIB)
    return f"dax:{path}/memory?size=128MiB&segment=16MiB"


def test_blocks_on_dax_are_misses_to_clients(tmp_path: Path) -> None:
    with served(tmp_path, device_url(tmp_path)) as (pool, _), client(tmp_path) as remote:
        space = remote.namespace("n", LAYOUT)
        keys, parents = space.keys(tokens(50, 1))
        data = payloads(50, 1)
        assert space.put(keys, data, parents=parents, durability="sync").blocks_stored == 50
        out = np.zeros_like(data)
        assert pool.namespace("n").read_into(keys, out).all()
        assert (out == data).all()
        assert not space.read_into(keys, out).any()
        with pytest.raises(kvfs.NotFoundError):
            space.view(keys)


def test_copies_in_memory_beside_it_are_read(tmp_path: Path) -> None:
    urls = [device_url(tmp_path), "dram:?size=128MiB&segment=16MiB"]
    with served(tmp_path, *urls) as (_, _), client(tmp_path) as remote:
        space = remote.namespace("n", LAYOUT)
        keys, _ = space.keys(tokens(50, 1))
        data = payloads(50, 1)
        assert space.put(keys, data, durability="sync").blocks_stored == 50
        out = np.zeros_like(data)
        assert space.read_into(keys, out).all()
        assert (out == data).all()
