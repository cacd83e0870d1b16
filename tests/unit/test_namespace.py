"""Contexts: made, extended, shared, named, dropped."""

import numpy as np
import pytest

import kvfs
from kvfs.errors import (
    ExistsError,
    NotFoundError,
    UsageError,
)
from tests.unit.pool_bench import LAYOUT, Place, blocks


def test_context_round_trip(place: Place) -> None:
    tokens, content = np.arange(40), blocks(10)
    with place.create() as pool:
        space = pool.namespace("s", LAYOUT)
        keys, _ = space.keys(tokens)
        context = space.context("a/b/chat")
        assert (len(context.keys), context.token_count) == (0, 0)
        context.append(keys[:6], content[:6], tokens=tokens[:24])
        context.append(keys[6:], content[6:], tokens=tokens[24:], durability="sync")
    with place.open() as pool:
        context = pool.namespace("s").context("a/b/chat", create=False)
        assert context.name == "a/b/chat"
        assert (context.keys == keys).all()
        assert (context.tokens == tokens).all()
        assert (context.token_count, context.resident_blocks) == (40, 10)
        with context.view() as view:
            assert (view.numpy(shape=(10, -1)) == content).all()


def test_contexts_share_blocks(pool: kvfs.Pool) -> None:
    space = pool.namespace("s", LAYOUT)
    keys, _ = space.keys(np.arange(16))
    assert space.context("one").append(keys, blocks(4)).blocks_stored == 4
    assert space.context("two").append(keys[:3], blocks(4)[:3]).blocks_stored == 0
    space.context("one").drop()
    assert [context.name for context in space.contexts()] == ["two"]
    assert space.match_prefix(keys) == 4, "dropped blocks stay as cache"


def test_tail_is_replaced_as_it_grows(pool: kvfs.Pool) -> None:
    space = pool.namespace("s", LAYOUT)
    context = space.context("c")
    tokens, content = np.arange(11), blocks(3)
    for end in (6, 7, 8, 11):
        keys, _ = space.keys(tokens[:end])
        have = len(context.keys)
        is_partial = have > 0 and context.token_count % 4 != 0
        first = have - 1 if is_partial else have
        sizes = [min(4, end - 4 * i) * 1024 for i in range(first, len(keys))]
        rows = zip(content[first : len(keys)], sizes, strict=True)
        context.append(
            keys[first:],
            [row[:n] for row, n in rows],
            tokens=tokens[4 * first : end],
            replace_tail=is_partial,
        )
        assert (context.keys == keys).all()
        assert (context.tokens == tokens[:end]).all()
        assert context.token_count == end
    with context.view() as view:
        assert bytes(view.memory()) == content.tobytes()[: 11 * 1024]


def test_partial_rules(pool: kvfs.Pool) -> None:
    space = pool.namespace("s", LAYOUT)
    keys, _ = space.keys(np.arange(12))
    content = blocks(3)
    context = space.context("c")
    short = content[0][:100]
    with pytest.raises(UsageError, match="only the last block of a context may be partial"):
        context.append(keys[:2], [short, content[1]])
    context.append(keys[:1], [short], token_counts=[1])
    with pytest.raises(UsageError):
        context.append(keys[1:2], content[1:2])
    assert len(context.keys) == 1
    context.append(keys[1:2], content[1:2], replace_tail=True)
    assert (context.keys == keys[1:2]).all()
    with pytest.raises(UsageError, match="expected 1 token counts, found 2"):
        context.append(keys[2:], content[2:], token_counts=[4, 4])
    with pytest.raises(UsageError, match="5 tokens do not make 1 blocks of 4"):
        context.append(keys[2:], content[2:], tokens=np.arange(5))
    assert context.append([], []).blocks_stored == 0


def test_names_of_contexts(pool: kvfs.Pool) -> None:
    space = pool.namespace("s", LAYOUT)
    space.context("a/b")
    with pytest.raises(ExistsError, match="name is taken"):
        space.context("a")
    with pytest.raises(NotFoundError, match="no such context: s/c"):
        space.context("c", create=False)
    with pytest.raises(UsageError, match="needs a name"):
        space.context("/")
    context = space.context("gone")
    context.drop()
    with pytest.raises(NotFoundError, match="context was dropped"):
        _ = context.keys
