"""Clients that run out of descriptors or memory: misses as long as it lasts, hits again after."""

import errno
import socket

import numpy as np

from kvfs.clients import link, segments
from tests.clients.support import BLOCK, LAYOUT, client, payloads, served, tokens
from tests.fuse.mounting import wait_until


class NoSockets:
    """Stands for the module of sockets in a process without descriptors. `refused`: how often."""

    def __init__(self) -> None:
        self.refused = 0

    def __getattr__(self, name: str) -> object:
        return getattr(socket, name)

    def socket(self, *_arguments: object) -> socket.socket:
        self.refused += 1
        raise OSError(errno.EMFILE, "Too many open files")


def test_a_client_without_descriptors_attaches_again_later(tmp_path, monkeypatch) -> None:
    with served(tmp_path) as (pool, server), client(tmp_path) as remote:
        space = remote.namespace("n", LAYOUT)
        keys, _ = space.keys(tokens(3, 1))
        space.put(keys, payloads(3, 1))
        scarce = NoSockets()
        with monkeypatch.context() as patch:
            patch.setattr(link, "socket", scarce)
            for session in list(server._sessions.values()):
                session.holder.page.revoke()
            wait_until(lambda: scarce.refused >= 2, "it has tried again")
        out = np.zeros((3, BLOCK), np.uint8)
        wait_until(lambda: space.read_into(keys, out).all(), "it reads again")
        assert (out == payloads(3, 1)).all()
        assert pool.store.state.holds.count == 1


def test_a_look_without_descriptors_is_no_lost_owner(tmp_path, monkeypatch) -> None:
    with served(tmp_path), client(tmp_path) as remote:
        space = remote.namespace("n", LAYOUT)
        keys, _ = space.keys(tokens(3, 1))
        space.put(keys, payloads(3, 1))
        assert space.read_into(keys, payloads(3, 2)).all()
        attached = remote._attached
        while attached.link._idle:  # what it asks over needs a new connection
            attached.link._idle.pop().close()
            attached.link._count -= 1
        scarce = NoSockets()
        with monkeypatch.context() as patch:
            patch.setattr(link, "socket", scarce)
            attached.freed_seen -= 1  # as if something had been freed
            wait_until(lambda: scarce.refused >= 2, "it has looked")
        assert not attached.link.is_lost
        assert remote._attached is attached


def test_a_segment_that_cannot_be_mapped_is_a_miss(tmp_path, monkeypatch) -> None:
    def fail(*_arguments: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    with served(tmp_path), client(tmp_path) as remote:
        space = remote.namespace("n", LAYOUT)
        keys, _ = space.keys(tokens(3, 1))
        space.put(keys, payloads(3, 1))
        out = np.zeros((3, BLOCK), np.uint8)
        with monkeypatch.context() as patch:
            patch.setattr(segments, "MappedSegment", fail)
            assert not space.read_into(keys, out).any()
        assert space.read_into(keys, out).all()
