"""Phases: what an access is for reaches counters and eviction; what is no phase is refused."""

import numpy as np
import pytest

import kvfs
from kvfs.errors import UsageError
from kvfs.exposition import render
from kvfs.phase import Phase, as_phase
from tests.unit.pool_bench import LAYOUT, blocks


def stored(pool: kvfs.Pool, count: int) -> tuple[kvfs.Namespace, np.ndarray]:
    space = pool.namespace("s", LAYOUT)
    keys, parents = space.keys(np.arange(4 * count))
    space.put(keys, blocks(count), parents=parents)
    return space, keys


def accesses(pool: kvfs.Pool, space: kvfs.Namespace) -> dict[str, int]:
    counted = pool.store.state.counters[space.info.namespace_id].accesses
    return {phase.name.lower(): count for phase, count in zip(Phase, counted, strict=True) if count}


def test_names() -> None:
    assert [as_phase(name) for name in (None, "prefill", "decode", "background")] == list(Phase)
    assert [phase.value for phase in Phase] == [0, 1, 2, 3]  # as in events
    for wrong in ("", "unknowns", "Prompt", 1):
        with pytest.raises(UsageError, match="expected 'prefill', 'decode'"):
            as_phase(wrong)  # type: ignore[arg-type]


def test_each_kind_of_access_is_counted_by_phase(pool: kvfs.Pool) -> None:
    space, keys = stored(pool, 6)
    room = np.zeros((6, LAYOUT.stride), np.uint8)
    assert accesses(pool, space) == {}
    space.lookup(keys)  # says where blocks are, and is no access
    space.match_prefix(keys)
    assert accesses(pool, space) == {}
    space.read_into(keys, room, phase="prefill")
    space.touch(keys[:2], phase="decode")
    with space.view(keys[:3], phase="background"):
        pass
    space.read_into(keys[:1], room[:1])
    assert accesses(pool, space) == {"prefill": 6, "decode": 2, "background": 3, "unknown": 1}
    for wrong in (
        lambda: space.read_into(keys, room, phase="x"),
        lambda: space.touch(keys, phase="x"),
        lambda: space.view(keys, phase="x"),
    ):
        with pytest.raises(UsageError, match="phase 'x'"):
            wrong()
    text = render(pool).decode()
    assert 'kvfs_accesses_total{namespace="s",phase="decode"} 2.0' in text
    assert 'kvfs_accesses_total{namespace="s",phase="prefill"} 6.0' in text


def test_misses_are_no_accesses(pool: kvfs.Pool) -> None:
    space, keys = stored(pool, 2)
    others, _ = space.keys(np.arange(100, 112))
    assert space.touch(np.concatenate([keys, others]), phase="decode") == 2
    assert space.touch(others, phase="prefill") == 0
    assert accesses(pool, space) == {"decode": 2}


def test_background_makes_nothing_younger(pool: kvfs.Pool) -> None:
    space, keys = stored(pool, 3)
    (segment,) = pool.store.state.devices[0].segments.values()
    before, last_ns = segment.accessed_ns.copy(), segment.last_access_ns
    space.read_into(keys, np.zeros((3, LAYOUT.stride), np.uint8), phase="background")
    with space.view(keys, phase="background"):
        pass
    assert (segment.accessed_ns == before).all()
    assert segment.last_access_ns == last_ns
    space.touch(keys[:1], phase="decode")
    assert (segment.accessed_ns > before).sum() == 1
    assert segment.last_access_ns > last_ns
