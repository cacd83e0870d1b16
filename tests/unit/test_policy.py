"""Which segments go, and what is spared: pure functions."""

import dataclasses

import numpy as np
import pytest

from kvfs.engine.policy import Candidate, choose_victims, spare, weighted_median

SIZE = 100


def candidate(position: int, **changes: int | bool) -> Candidate:
    plain = Candidate(
        position, nbytes=SIZE, recency_ns=position, written_ns=0, kept_bytes=0,
        reachable_bytes=SIZE, is_leased=False,
    )  # fmt: skip
    return dataclasses.replace(plain, **changes)


def test_least_recently_used_first() -> None:
    chosen = choose_victims([candidate(3), candidate(1), candidate(2)], 2 * SIZE)
    assert chosen == [1, 2]


def test_no_more_than_wanted() -> None:
    all_of_them = [candidate(i) for i in range(5)]
    assert choose_victims(all_of_them, 1) == [0]
    assert choose_victims(all_of_them, SIZE) == [0]
    assert choose_victims(all_of_them, SIZE + 1) == [0, 1]
    assert choose_victims(all_of_them, 0) == []
    assert choose_victims([], SIZE) == []


def test_as_much_as_there_is() -> None:
    assert choose_victims([candidate(0), candidate(1)], 99 * SIZE) == [0, 1]


def test_mostly_dead_go_first_the_deadest_before() -> None:
    chosen = choose_victims(
        [candidate(0), candidate(1, reachable_bytes=50), candidate(2, reachable_bytes=10),
         candidate(3, reachable_bytes=51)],
        4 * SIZE,
    )  # fmt: skip
    assert chosen == [2, 1, 0, 3]


def test_leaves_go_before_what_they_continue() -> None:
    equal = [candidate(0, recency_ns=7, written_ns=1), candidate(1, recency_ns=7, written_ns=2)]
    assert choose_victims(equal, SIZE) == [1]


def test_leased_are_passed_over() -> None:
    assert choose_victims([candidate(0, is_leased=True), candidate(1)], SIZE) == [1]
    assert choose_victims([candidate(0, is_leased=True)], SIZE) == []


@pytest.mark.parametrize(("kept", "share", "goes"), [
    (75, 0.75, True), (76, 0.75, False), (50, 0.25, False), (0, 0.0, True),
])  # fmt: skip
def test_little_gain_is_passed_over(kept: int, share: float, goes: bool) -> None:
    one = candidate(0, kept_bytes=kept)
    assert choose_victims([one], SIZE, kept_share_max=share) == ([0] if goes else [])


def test_what_is_kept_frees_nothing() -> None:
    chosen = choose_victims([candidate(i, kept_bytes=60) for i in range(5)], SIZE)
    assert chosen == [0, 1, 2]


def ask(held: list[int], reachable: list[int], recency: list[int], lengths: list[int]) -> list[int]:
    kept = spare(
        np.array(held, np.bool_), np.array(reachable, np.bool_), np.array(recency, np.int64),
        np.array(lengths, np.int64), warm_ns=5, segment_bytes=SIZE,
    )  # fmt: skip
    return kept.astype(int).tolist()


def test_spared_are_the_held_and_the_warm() -> None:
    assert ask([1, 0, 0, 0], [1, 1, 1, 0], [0, 6, 5, 9], [25] * 4) == [1, 1, 0, 0]


def test_held_survive_unreachable_and_cold() -> None:
    assert ask([1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0], [25] * 4) == [1, 1, 1, 1]


def test_all_reachable_survive_where_they_are_few() -> None:
    assert ask([0, 0, 0, 0], [1, 1, 0, 0], [0, 0, 9, 9], [25] * 4) == [1, 1, 0, 0]
    assert ask([0, 0, 0, 0], [1, 1, 0, 0], [0, 0, 9, 9], [26, 25, 25, 24]) == [0, 0, 0, 0]
    assert ask([0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 9], [25] * 4) == [1, 0, 1, 0]


def test_empty_segment() -> None:
    assert ask([], [], [], []) == []


@pytest.mark.parametrize(
    ("values", "weights", "expected"),
    [
        ([], [], 0),
        ([7], [1], 7),
        ([3, 1, 2], [1, 1, 1], 2),
        ([1, 2], [1, 1], 1),
        ([1, 2], [1, 3], 2),
        ([5, 1, 9], [10, 1, 1], 5),
        ([4, 4, 4], [0, 1, 0], 4),
    ],
)
def test_weighted_median(values: list[int], weights: list[int], expected: int) -> None:
    found = weighted_median(np.array(values, np.int64), np.array(weights, np.int64))
    assert found == expected
