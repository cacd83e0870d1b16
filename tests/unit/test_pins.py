"""Pinned contexts: as they grow, across restarts, until they are dropped."""

import numpy as np
import pytest

import kvfs
from kvfs.errors import NotFoundError
from tests.unit.pool_bench import LAYOUT, Place, blocks


def pinned_bytes(pool: kvfs.Pool, space: kvfs.Namespace) -> int:
    return pool.store.state.pinned_bytes.get(space.info.namespace_id, 0)


def test_pins_grow_and_last(place: Place) -> None:
    content = blocks(6)
    with place.create() as pool:
        space = pool.namespace("s", LAYOUT)
        keys, _ = space.keys(np.arange(24))
        context = space.context("c")
        context.append(keys[:2], content[:2])
        context.pin()
        context.pin()
        assert pinned_bytes(pool, space) == 2 * LAYOUT.stride
        context.append(keys[2:5], content[2:5])
        assert pinned_bytes(pool, space) == 5 * LAYOUT.stride
    with place.open() as pool:
        space = pool.namespace("s")
        context = space.context("c")
        assert context.node.is_pinned
        assert pinned_bytes(pool, space) == 5 * LAYOUT.stride
        context.append(keys[5:], content[5:])
        assert pinned_bytes(pool, space) == 6 * LAYOUT.stride
        context.unpin()
        context.unpin()
        assert pinned_bytes(pool, space) == 0
    with place.open() as pool:
        assert not pool.namespace("s").context("c").node.is_pinned
        assert pool.store.state.pins == {}


def test_dropped_context_is_unpinned(pool: kvfs.Pool) -> None:
    space = pool.namespace("s", LAYOUT)
    keys, _ = space.keys(np.arange(8))
    context = space.context("c")
    context.append(keys, blocks(2))
    context.pin()
    context.drop()
    assert pool.store.state.pins == {}
    assert pinned_bytes(pool, space) == 0


def test_a_context_pinned_after_its_row_was_read(pool: kvfs.Pool) -> None:
    space = pool.namespace("s", LAYOUT)
    keys, _ = space.keys(np.arange(8))
    context = space.context("c")
    context.append(keys, blocks(2))
    read_before = context.node
    context.pin()
    pool.files.remove(read_before)
    assert pool.store.state.pins == {}
    assert pinned_bytes(pool, space) == 0


def test_a_context_dropped_while_it_is_pinned(
    pool: kvfs.Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = pool.namespace("s", LAYOUT)
    keys, _ = space.keys(np.arange(8))
    context = space.context("c")
    context.append(keys, blocks(2))
    node, set_pinned = context.node, pool.catalog.set_pinned

    def set_late(node_id: int, is_pinned: bool) -> None:
        pool.catalog.remove(node_id)  # as another thread does
        set_pinned(node_id, is_pinned)

    monkeypatch.setattr(pool.catalog, "set_pinned", set_late)
    with pytest.raises(NotFoundError):
        pool.pins.pin(node)
    assert pool.store.state.pins == {}
    assert pinned_bytes(pool, space) == 0
