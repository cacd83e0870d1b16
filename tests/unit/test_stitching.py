"""What is mapped where, so that scattered blocks become one range."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kvfs.engine.stitching import Backings, stitch
from kvfs.units import KIB, MIB, PAGE

STRIDE = 64 * KIB


def backings(blocks: list[tuple[int, int]], granularity: int) -> Backings:
    fds = np.array([fd for fd, _ in blocks], np.int32)
    offsets = np.array([number * STRIDE for _, number in blocks], np.uint64)
    return Backings(fds, offsets, granularity)


def full(count: int) -> np.ndarray:
    return np.full(count, STRIDE, np.uint64)


@given(
    runs=st.lists(
        st.tuples(st.integers(3, 4), st.integers(0, 70), st.integers(1, 40)), min_size=1, max_size=5
    ),
    last=st.integers(1, STRIDE),
    granularity=st.sampled_from([PAGE, 128 * KIB, MIB, 2 * MIB]),
)
def test_every_byte_is_where_it_should_be(
    runs: list[tuple[int, int, int]], last: int, granularity: int
) -> None:
    blocks = [(fd, start + i) for fd, start, count in runs for i in range(count)]
    lengths = full(len(blocks))
    lengths[-1] = last
    found = stitch(backings(blocks, granularity), lengths, STRIDE)
    if found is None:
        assert granularity > PAGE
        assert len(runs) > 1, "neighbours can always be mapped"
        return
    maps = list(zip(found.positions.tolist(), found.fds.tolist(), found.offsets.tolist(),
                    found.lengths.tolist(), strict=True))  # fmt: skip
    for position, _, offset, _ in maps:
        assert position % granularity == offset % granularity == 0
    for number, (fd, block) in enumerate(blocks):
        start = found.skew + number * STRIDE
        end = start + int(lengths[number])
        assert end <= found.nbytes
        holding = [one for one in maps if one[0] <= start and end <= one[0] + one[3]]
        assert [(one[1], one[2] + start - one[0]) for one in holding] == [(fd, block * STRIDE)]


def test_runs_that_meet_at_a_border_are_stitched() -> None:
    blocks = [(3, number) for number in range(30, 32)] + [(4, 64 + i) for i in range(32)]
    found = stitch(backings(blocks, 2 * MIB), full(34), STRIDE)
    assert found is not None
    assert found.skew == 30 * STRIDE
    assert found.positions.tolist() == [0, 2 * MIB]
    assert found.offsets.tolist() == [0, 4 * MIB]


def test_nothing_is_mapped_where_a_block_has_no_file() -> None:
    assert stitch(backings([(3, 0), (-1, 1)], PAGE), full(2), STRIDE) is None
