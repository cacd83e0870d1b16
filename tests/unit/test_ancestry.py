"""Standing along chains: recency rises to ancestors, unreachability falls to descendants."""

import random

import numpy as np
import pytest

from kvfs.engine.ancestry import Standing, _propagate, survey
from tests.unit.engine_bench import SPACE, Engine, chain, disk, memory


def spread(
    ancestors: list[int], recency: list[int], unreachable: list[int] | None = None
) -> tuple[list[int], list[int]]:
    times = np.array(recency, np.int64)
    marks = np.array(unreachable or [0] * len(ancestors), np.bool_)
    _propagate(np.array(ancestors, np.intp), times, marks)
    return times.tolist(), marks.astype(int).tolist()


def test_nothing() -> None:
    assert spread([], []) == ([], [])


def test_roots_keep_their_own() -> None:
    assert spread([0, 1, 2], [5, 7, 6], [0, 1, 0]) == ([5, 7, 6], [0, 1, 0])


def test_old_prefix_of_a_young_block() -> None:
    times, _ = spread([0, 0, 1, 2, 3], [0, 0, 1000, 0, 500])
    assert times[2:] == [1000, 501, 500]
    assert times[1] == 1001
    assert 1002 <= times[0] <= 1016


def test_blocks_read_together_are_worth_less_towards_the_end() -> None:
    times, _ = spread([0, 0, 1, 2, 3, 4], [9000] * 6)
    assert times == sorted(times, reverse=True)
    assert len(set(times)) == 6
    assert max(times) <= 9000 + 4 * 6


def test_unreachable_falls_to_all_descendants() -> None:
    _, marks = spread([0, 0, 1, 2, 2, 5], [0] * 6, [0, 1, 0, 0, 0, 0])
    assert marks == [0, 1, 1, 1, 1, 0]


@pytest.mark.parametrize("ancestors", [[1, 0], [1, 2, 0, 2], [1, 2, 3, 4, 0]])
def test_cycles_end(ancestors: list[int]) -> None:
    times, marks = spread(ancestors, [100] * len(ancestors), [1] + [0] * (len(ancestors) - 1))
    assert all(marks)
    assert max(times) < 200


def test_random_forests_against_their_definition(rng: random.Random) -> None:
    for _ in range(50):
        count = rng.randrange(1, 40)
        ancestors = [rng.randrange(i + 1) for i in range(count)]
        recency = [rng.randrange(10) * 10_000 for _ in range(count)]
        dead = [int(rng.random() < 0.1) for _ in range(count)]
        times, marks = spread(ancestors, recency, dead)
        latest, cut = list(recency), list(dead)
        for i in reversed(range(count)):
            latest[ancestors[i]] = max(latest[ancestors[i]], latest[i])
        for i in range(count):
            cut[i] |= cut[ancestors[i]]
            assert latest[i] <= times[i] <= latest[i] + 4 * count
            assert ancestors[i] == i or times[ancestors[i]] > times[i]
        assert marks == cut


# --- of a store


def standing(engine: Engine, key: np.ndarray, device: int = 0) -> tuple[Standing, int]:
    segment = engine.segment_of(key, device)
    found = survey(engine.state, engine.state.device(device))[segment.handle.slot]
    entry = engine.state.index(SPACE).lookup(key.reshape(1, -1), device)["entry"][0]
    return found, int(np.flatnonzero(found.indices == entry)[0])


def test_standing_of_a_store(make, tmp_path) -> None:
    engine = make(disk(tmp_path))
    keys, parents = chain(20)
    engine.put(keys, parents)
    engine.read(keys[15:16])
    late = engine.clock.monotonic_ns()
    for i, key in enumerate(keys):
        found, row = standing(engine, key)
        assert found.reachable[row]
        assert found.lengths[row] == 4096
        assert (found.recency_ns[row] >= late) == (i <= 15)
    engine.store.drop(SPACE, keys[3:4])
    for i in (0, 1, 2, 4, 5, 19):
        found, row = standing(engine, keys[i])
        assert found.reachable[row] == (i < 3)
    engine.close()


def test_parent_on_another_device_is_resident(make, tmp_path) -> None:
    engine = make(disk(tmp_path), memory(), copy_to_dram=False)
    keys, parents = chain(2)
    engine.put(keys[:1], parents[:1], durability="none")
    engine.put(keys[1:], parents[1:])
    found, row = standing(engine, keys[1])
    assert found.reachable[row]
    engine.store.drop(SPACE, keys[:1])
    found, row = standing(engine, keys[1])
    assert not found.reachable[row]
    engine.close()
