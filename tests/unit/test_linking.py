"""Contexts made of blocks that are there already; accesses noted without a read."""

import numpy as np
import pytest

import kvfs
from kvfs.errors import UsageError
from tests.unit.pool_bench import LAYOUT, Place, blocks


def test_link_names_what_is_resident(place: Place, pool: kvfs.Pool) -> None:
    space = pool.namespace("s", LAYOUT)
    keys, parents = space.keys(np.arange(24))
    space.put(keys[:4], blocks(4), parents=parents[:4])
    context = space.context("chat/1")
    assert context.link(keys[:0]) == 0
    assert context.link(keys) == 4
    assert (context.keys == keys[:4]).all()
    assert (context.token_count, context.node.size_bytes) == (16, 4 * LAYOUT.stride)
    assert context.link(keys[4:]) == 0
    space.put(keys[4:], blocks(2), parents=parents[4:], durability="sync")
    assert context.link(keys[4:]) == 2
    pool.close()
    with place.open() as again:
        context = again.namespace("s").context("chat/1", create=False)
        assert (context.keys == keys).all()
        assert context.resident_blocks == 6


def test_link_ends_after_a_partial_block(pool: kvfs.Pool) -> None:
    space = pool.namespace("s", LAYOUT)
    keys, parents = space.keys(np.arange(12))
    room = blocks(3)
    space.put(keys, [room[0], room[1][:2048], room[2]], parents=parents, token_counts=[4, 2, 4])
    context = space.context("a")
    assert context.link(keys) == 2
    assert (context.token_count, context.node.tail_bytes) == (6, 2048)
    with pytest.raises(UsageError, match="ends in a partial block"):
        context.link(keys[2:])


def test_link_keeps_blocks_of_a_durable_namespace_and_of_a_pinned_context(pool: kvfs.Pool) -> None:
    space = pool.namespace("s", LAYOUT, retention="durable")
    keys, parents = space.keys(np.arange(16))
    space.put(keys, blocks(4), parents=parents)
    context = space.context("a")
    context.link(keys[:2])
    context.pin()
    pins = pool.store.state.pins
    assert len(pins) == 2
    context.link(keys[2:])
    assert len(pins) == 4


def test_touch_notes_an_access(pool: kvfs.Pool) -> None:
    space = pool.namespace("s", LAYOUT)
    keys, parents = space.keys(np.arange(12))
    space.put(keys[:2], blocks(2), parents=parents[:2])
    segment = next(iter(pool.store.state.devices[0].segments.values()))
    entries = space.lookup(keys[:2])["entry"]
    before = segment.accessed_ns[entries].copy()
    assert space.touch(keys[1:]) == 1
    after = segment.accessed_ns[entries]
    assert after[0] == before[0]
    assert after[1] > before[1]
    assert segment.leases == 0
    assert space.touch(keys[:0]) == 0
