"""What a client names without storing it, and notes without reading it, is so at the owner."""

import numpy as np
import pytest

import kvfs
from kvfs.clients import messages as msg
from tests.clients.support import BLOCK, LAYOUT, client, payloads, served, tokens
from tests.clients.test_clients import DRAM


def test_link_names_what_is_resident(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(msg, "KEYS_MAX", 2)  # several messages
    with served(tmp_path) as (pool, _), client(tmp_path) as remote:
        space = remote.namespace("n", LAYOUT)
        keys, parents = space.keys(tokens(7, 1))
        space.put(keys[:5], payloads(5, 1), parents=parents[:5])
        context = space.context("chat/1")
        assert context.link(keys[:0]) == 0
        assert context.link(keys) == 5
        assert context.link(keys[5:]) == 0
        assert (pool.namespace("n").context("chat/1", create=False).keys == keys[:5]).all()
        assert context.token_count == 20
        assert context.resident_blocks == 5


def test_link_ends_after_a_partial_block(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(msg, "KEYS_MAX", 2)
    with served(tmp_path) as _, client(tmp_path) as remote:
        space = remote.namespace("n", LAYOUT)
        keys, _ = space.keys(tokens(4, 1))
        full = payloads(4, 1)
        space.put(keys, [full[0], bytes(100), full[2], full[3]], token_counts=[4, 2, 4, 4])
        context = space.context("c")
        assert context.link(keys) == 2
        assert context.node.tail_bytes == 100
        with pytest.raises(kvfs.UsageError, match="partial"):
            context.link(keys[2:])
        context.drop()
        with pytest.raises(kvfs.NotFoundError, match="dropped"):
            context.link(keys)


def test_touch_notes_an_access_at_the_owner(tmp_path) -> None:
    with served(tmp_path, DRAM) as (pool, server), client(tmp_path) as remote:
        space = remote.namespace("n", LAYOUT)
        keys, _ = space.keys(tokens(3, 1))
        space.put(keys[:2], payloads(2, 1))
        (segment,) = pool.store.state.devices[0].segments.values()
        entries = space.lookup(keys[:2])["entry"]
        (session,) = server._sessions.values()
        session.drain()
        before = segment.accessed_ns[entries].copy()
        assert space.touch(keys[1:]) == 1
        assert space.touch(keys[:0]) == 0
        while (segment.accessed_ns[entries[1]]) == before[1]:  # the owner's tick drains it, too
            session.drain()
        assert segment.accessed_ns[entries[0]] == before[0]
        assert np.all(space.lookup(keys[:2])["length"] == BLOCK)
