"""Tables of segments: live entries are counted exactly, records name their place."""

import random
from types import SimpleNamespace

import numpy as np
import pytest

from kvfs.engine.format import ENTRY
from kvfs.engine.index import RECORD, VERIFIED
from kvfs.engine.segment_table import (
    SegmentState,
    SegmentStatus,
    entry_words,
    group_by_segment,
    is_verified,
    page_round,
)

NOW_NS = 1_000


def segment(count: int = 0, sizes: tuple[int, ...] = (4096, 100, 5000)) -> SegmentState:
    handle = SimpleNamespace(device_index=3, slot=17, generation=4_000_000_000, nbytes=1 << 20)
    state = SegmentState(handle, 9, SegmentStatus.OPEN, 0)  # type: ignore[arg-type]
    if count:
        state.load(np.arange(count, dtype=np.uint32), entries(count, sizes), count)
    return state


def entries(count: int, sizes: tuple[int, ...] = (4096, 100, 5000)) -> np.ndarray:
    made = np.zeros(count, ENTRY)
    numbers = np.arange(count)
    made["key"] = numbers[:, None] + np.arange(32)
    made["stored_bytes"] = np.resize(sizes, count)
    padded = page_round(made["stored_bytes"])
    made["offset"] = np.cumsum(padded) - padded
    made["token_count"] = numbers + 5
    made["payload_xxh3"] = 200 - numbers[:, None]
    return made


def records(places: list[tuple[int, int, int, int]]) -> np.ndarray:
    """Return records of (device, slot, generation, length)."""
    made = np.zeros(len(places), RECORD)
    for row, (device, slot, generation, length) in zip(made, places, strict=True):
        row["device"], row["segment"] = device, slot
        row["generation"], row["length"] = generation, length
    return made


@pytest.mark.parametrize(("length", "expected"), [
    (0, 0), (1, 4096), (4095, 4096), (4096, 4096), (4097, 8192), (1 << 28, 1 << 28),
])  # fmt: skip
def test_page_round(length: int, expected: int) -> None:
    for dtype in (np.uint32, np.uint64, np.int64):
        assert page_round(np.array([length], dtype)).tolist() == [expected]


def test_growing_keeps_what_is_there() -> None:
    state = segment(100)
    state.mark_live(np.arange(0, 100, 3), NOW_NS)
    state.accessed_ns[:100] = np.arange(100)
    before, live = state.entries[:100].tobytes(), state.live_indices().tolist()
    for count in (50, 100, 101, 5000):
        state.reserve(count)
        assert len(state.entries) >= count
        assert len(state.live) == len(state.accessed_ns) == len(state.entries)
        assert state.entries[:100].tobytes() == before
        assert state.live_indices().tolist() == live
        assert state.accessed_ns[:100].tolist() == list(range(100))
    assert not state.entries[100:].tobytes().strip(b"\0")


def test_load_whole() -> None:
    state = segment(70)
    assert (state.entry_count, state.live_count) == (70, 0)
    assert state.payload_end == int(page_round(state.entries["stored_bytes"]).sum())
    assert len(state.live) >= 70


def test_load_with_gaps() -> None:
    found = entries(10)
    indices = np.array([1, 4, 9], np.uint32)
    state = segment()
    state.load(indices, found[indices], 10)
    assert state.entry_count == 10
    assert state.entries[indices].tobytes() == found[indices].tobytes()
    assert not state.entries[[0, 2, 3, 5]].tobytes().strip(b"\0")
    assert state.payload_end == int(found["offset"][9] + 4096)


def test_load_nothing() -> None:
    state = segment()
    state.load(np.zeros(0, np.uint32), np.zeros(0, ENTRY), 0)
    assert (state.entry_count, state.payload_end) == (0, 0)
    state.reserve(1)
    assert len(state.live_indices()) == 0


def test_read_only_entries_are_copied_before_they_grow() -> None:
    found = entries(8)
    found.flags.writeable = False
    state = segment()
    state.load(np.arange(8, dtype=np.uint32), found, 8)
    state.reserve(9)
    state.entries[8] = found[0]
    assert state.entries[:8].tobytes() == found.tobytes()


def test_records_name_their_place() -> None:
    state = segment(9)
    chosen = np.array([8, 0, 3])
    made = state.records(chosen)
    assert (made["key"] == state.entries["key"][chosen]).all()
    assert made["device"].tolist() == [3] * 3
    assert made["segment"].tolist() == [17] * 3
    assert made["generation"].tolist() == [4_000_000_000] * 3
    assert (made["page"] * 4096 == state.entries["offset"][chosen]).all()
    assert made["length"].tolist() == [5000, 4096, 4096]
    assert made["tokens"].tolist() == [13, 5, 8]
    assert made["entry"].tolist() == chosen.tolist()
    assert not is_verified(made).any()
    assert (state.digests(chosen) == state.entries["payload_xxh3"][chosen]).all()
    assert len(state.records(np.zeros(0, np.int64))) == 0


def test_live_figures_against_a_set(rng: random.Random) -> None:
    state, live = segment(200), set[int]()
    sizes = page_round(state.entries["stored_bytes"])
    for _ in range(300):
        some = [rng.randrange(200) for _ in range(rng.randrange(1, 20))]
        if rng.random() < 0.5:
            fresh = sorted(set(some) - live)
            state.mark_live(np.array(fresh, np.int64), NOW_NS)
            live |= set(fresh)
        else:
            state.mark_dead(np.array(some, np.int64))  # repeated and dead ones are left alone
            live -= set(some)
        assert state.live_indices().tolist() == sorted(live)
        assert (state.accessed_ns[state.live_indices()] == NOW_NS).all()
        assert state.live_count == len(live)
        assert state.live_bytes == sum(int(sizes[i]) for i in live)


def test_live_twice_is_a_mistake() -> None:
    state = segment(3)
    state.mark_live(np.array([1]), NOW_NS)
    with pytest.raises(AssertionError):
        state.mark_live(np.array([0, 1]), NOW_NS)


def test_entries_as_words() -> None:
    found = entries(5)
    words = entry_words(found)
    assert words.shape == (5, 16)
    words[0] = 0
    assert not found[0].tobytes().strip(b"\0")


def group(places: list[tuple[int, int, int, int]]) -> list[tuple[int, int, int, list[int]]]:
    return [(d, s, g, at.tolist()) for d, s, g, at in group_by_segment(records(places))]


def test_grouping() -> None:
    assert group([]) == []
    assert group([(0, 0, 0, 0), (1, 2, 3, 0)]) == []
    assert group([(1, 2, 3, 5), (0, 0, 0, 0), (1, 2, 3, 6)]) == [(1, 2, 3, [0, 2])]
    largest = (255, (1 << 24) - 1, (1 << 32) - 1)
    assert group([(*largest, 1)]) == [(*largest, [0])]


def test_grouping_against_a_dict(rng: random.Random) -> None:
    for _ in range(50):
        places = [
            (rng.choice([0, 255]), rng.choice([0, 1, 9]), rng.choice([1, 2]), rng.choice([0, 7]))
            for _ in range(rng.randrange(40))
        ]
        expected: dict[tuple[int, int, int], list[int]] = {}
        for i, (device, slot, generation, length) in enumerate(places):
            if length:
                expected.setdefault((device, slot, generation), []).append(i)
        assert group(places) == [(*place, at) for place, at in sorted(expected.items())]


def test_verified_flag() -> None:
    made = np.zeros(3, RECORD)
    made["flags"] = [0, VERIFIED, VERIFIED | 6]
    assert is_verified(made).tolist() == [False, True, True]
