"""Clients of a pool on DAX: one descriptor covers all tenants, so the owner copies for them."""

import contextlib
import ctypes
import mmap
import os
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvfs
from kvfs.clients import messages as msg
from kvfs.clients.link import Line, ask, u64
from kvfs.clients.tray import Tray
from kvfs.errors import UsageError
from kvfs.units import MIB
from tests.clients.support import BLOCK, LAYOUT, client, payloads, served, tokens
from tests.clients.test_hostile import connect
from tests.fuse.mounting import wait_until


def device_url(path: Path, segment: str = "16MiB") -> str:
    with (path / "memory").open("wb") as file:
        file.truncate(130 * MIB)
    return f"dax:{path}/memory?size=128MiB&segment={segment}"


def test_blocks_on_dax_are_fetched(tmp_path: Path) -> None:
    with served(tmp_path, device_url(tmp_path)) as (_, _), client(tmp_path) as remote:
        space = remote.namespace("n", LAYOUT)
        keys, parents = space.keys(tokens(50, 1))
        data = payloads(50, 1)
        assert space.put(keys, data, parents=parents, durability="sync").blocks_stored == 50
        assert space.match_prefix(keys) == 50
        other, _ = space.keys(tokens(1, 2))
        wanted = np.concatenate([keys[:20], other, keys[20:]])
        for _ in range(2):
            out = np.zeros((51, *data.shape[1:]), np.uint8)
            assert space.read_into(wanted, out).tolist() == [True] * 20 + [False] + [True] * 30
            assert (out == np.insert(data, 20, 0, axis=0)).all()
        with space.view(keys[[7, 3, 4]]) as view:
            assert not view.is_zero_copy
            assert (view.numpy(shape=(3, -1)) == data[[7, 3, 4]].reshape(3, -1)).all()


def test_a_block_larger_than_a_tray(tmp_path: Path) -> None:
    layout = replace(LAYOUT, token_shape=(9 * MIB // 4 + 4096,))
    url = device_url(tmp_path, segment="32MiB")
    with served(tmp_path, url) as (_, _), client(tmp_path) as remote:
        space = remote.namespace("n", layout)
        keys, _ = space.keys(tokens(3, 1))
        data = np.random.default_rng(1).integers(0, 256, (3, layout.block_bytes), np.uint8)
        assert space.put(keys, data).blocks_stored == 3
        out = np.zeros_like(data)
        assert space.read_into(keys, out).all()
        assert (out == data).all()


def test_a_block_that_rots_is_a_miss_and_dropped(
    tmp_path: Path, expected_warnings: list[str]
) -> None:
    expected_warnings.append("checksum")
    with served(tmp_path, device_url(tmp_path)) as (pool, _), client(tmp_path) as remote:
        space = remote.namespace("n", LAYOUT)
        keys, _ = space.keys(tokens(3, 1))
        data = payloads(3, 1)
        space.put(keys, data)
        record = pool.namespace("n").lookup(keys)[1]
        segment = pool.store.state.segment_at(int(record["device"]), int(record["segment"]))
        address = segment.handle.address + int(record["page"]) * 4096
        ctypes.memset(address, 0xAB, 8)
        out = np.zeros_like(data)
        assert space.read_into(keys, out).tolist() == [True, False, True]
        assert space.match_prefix(keys) == 1
        assert (out[[0, 2]] == data[[0, 2]]).all()


def test_without_an_owner_they_are_misses(tmp_path: Path) -> None:
    with client_of_ended_owner(tmp_path) as (space, keys, data):
        out = np.zeros_like(data)
        assert not space.read_into(keys, out).any()


@contextlib.contextmanager
def client_of_ended_owner(path: Path) -> Iterator[tuple[kvfs.Namespace, Any, Any]]:
    with contextlib.ExitStack() as stack:
        with served(path, device_url(path)):
            remote = stack.enter_context(client(path))
            space = remote.namespace("n", LAYOUT)
            keys, _ = space.keys(tokens(5, 1))
            data = payloads(5, 1)
            space.put(keys, data)
            out = np.zeros_like(data)
            assert space.read_into(keys, out).all()
        yield space, keys, data


def test_what_a_client_may_not_fetch(tmp_path: Path) -> None:
    with served(tmp_path, device_url(tmp_path)) as (_, _), client(tmp_path) as remote:
        space = remote.namespace("n", LAYOUT)
        keys, _ = space.keys(tokens(5, 1))
        data = payloads(5, 1)
        space.put(keys, data)
        block, number = LAYOUT.block_bytes, space.info.namespace_id
        with remote.attached().link.line() as line:

            def fetch(offset: int, length: int, count: int = 1) -> list[int]:
                request = msg.Fetch(
                    number, keys[:count].tobytes(), u64([offset] * count), u64([length] * count)
                )
                return list(line.fetch(request)[0].good)

            assert fetch(0, block) == [1]
            for offset, length in ((1, block), (block + 1, 0), (0, block + 1), (1 << 63, 1 << 62)):
                if length > msg.TRAY_BYTES:
                    with pytest.raises(UsageError, match="do not fit"):
                        fetch(offset, length)
                else:
                    assert fetch(offset, length) == [0]
            with pytest.raises(UsageError, match="do not fit"):
                fetch(0, msg.TRAY_BYTES // 2 + 1, 2)
            with pytest.raises(UsageError, match="as many"):
                line.fetch(msg.Fetch(number, keys.tobytes(), b"", b""))
            assert fetch(0, block) == [1]


def test_a_tray_cannot_be_written(tmp_path: Path) -> None:
    tray = Tray()
    fd = tray.descriptor()
    try:
        for path in (fd, os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)):
            with pytest.raises((PermissionError, OSError)):
                mmap.mmap(path, msg.TRAY_BYTES, prot=mmap.PROT_READ | mmap.PROT_WRITE)
            with pytest.raises(OSError, match=r"Bad file|not permitted"):
                os.pwrite(path, b"x", 0)
            with pytest.raises(OSError, match=r"Invalid|not permitted"):
                os.ftruncate(path, 2 * msg.TRAY_BYTES)
            if path != fd:
                os.close(path)
    finally:
        os.close(fd)
        tray.close()


@pytest.mark.parametrize("nbytes", [5 * MIB, 9 * MIB])
def test_a_block_that_changes_between_two_trays(
    tmp_path: Path, monkeypatch: Any, nbytes: int
) -> None:
    """It is dropped, and other bytes are put by its key: those or these are read, never some."""
    layout = replace(LAYOUT, token_shape=(nbytes // 4,))
    url = device_url(tmp_path, segment="32MiB")
    with served(tmp_path, url) as (pool, _), client(tmp_path) as remote:
        space = remote.namespace("n", layout)
        keys, _ = space.keys(tokens(2, 1))
        space.put(keys, np.full((2, nbytes), 1, np.uint8))
        local = pool.namespace("n")
        fetch, fetched = Line.fetch, []

        def fetch_another(line: Line, request: msg.Fetch) -> Any:
            fetched.append(request)
            if len(fetched) == 2:
                pool.store.state.forget(local.info.namespace_id, local.lookup(keys))
                local.put(keys, np.full((2, nbytes), 2, np.uint8))
            return fetch(line, request)

        monkeypatch.setattr(Line, "fetch", fetch_another)
        out = np.zeros((2, nbytes), np.uint8)
        assert space.read_into(keys, out).all()
        assert len(fetched) > 2 or nbytes < msg.TRAY_BYTES
        assert [len(np.unique(block)) for block in out] == [1, 1]


def test_nobody_keeps_the_memory_of_a_tray(tmp_path: Path) -> None:
    with served(tmp_path, device_url(tmp_path)) as (_, server), client(tmp_path) as remote:
        space = remote.namespace("n", LAYOUT)
        keys, _ = space.keys(tokens(5, 1))
        space.put(keys, payloads(5, 1))
        assert space.read_into(keys, payloads(5, 2)).all()
        request = msg.Fetch(space.info.namespace_id, keys[0].tobytes(), u64([0]), u64([BLOCK]))
        kept = []
        for _ in range(3):
            with contextlib.closing(connect(server._pool)) as connection:
                ask(connection, msg.Join(remote.attached().link.welcome.token))
                kept += ask(connection, request)[1]
        try:
            wait_until(
                lambda: [os.fstat(fd).st_blocks for fd in kept] == [0, 0, 0], "all is given back"
            )
        finally:
            for fd in kept:
                os.close(fd)


def test_a_tray_that_goes_while_it_is_copied_from(tmp_path: Path, monkeypatch: Any) -> None:
    """The connection ends between the answer and the copy: a miss, not zeros."""
    with served(tmp_path, device_url(tmp_path)) as (_, server), client(tmp_path) as remote:
        space = remote.namespace("n", LAYOUT)
        keys, _ = space.keys(tokens(5, 1))
        data = payloads(5, 1)
        space.put(keys, data)
        fetch = Line.fetch

        def fetch_and_lose(line: Line, request: msg.Fetch) -> Any:
            found = fetch(line, request)
            before = len(server._connections)
            line.connection.shutdown(socket.SHUT_RDWR)
            wait_until(lambda: len(server._connections) < before, "the owner has noticed")
            return found

        out = np.zeros_like(data)
        with monkeypatch.context() as patch:
            patch.setattr(Line, "fetch", fetch_and_lose)
            assert not space.read_into(keys, out).any()
        wait_until(lambda: bool(space.read_into(keys, out).all()), "it reads again")
        assert (out == data).all()


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
