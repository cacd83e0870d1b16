"""Which segments to evict, and what to spare in them: pure functions over snapshots.

Layer: L2, pure.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class Candidate:
    """A segment that may be evicted. Times in nanoseconds, sizes in bytes.

    Attributes:
        position: The caller's number for it.
        recency_ns: Mean recency of its blocks, by bytes.
        written_ns: Its own last access; later means nearer to the leaves.
        kept_bytes: Blocks that would be copied if it went now.
        reachable_bytes: Blocks that can still serve a prefix.
        is_leased: Somebody reads it: evicting it frees nothing now.
    """

    position: int
    nbytes: int
    recency_ns: int
    written_ns: int
    kept_bytes: int
    reachable_bytes: int
    is_leased: bool

    @property
    def is_mostly_dead(self) -> bool:
        """Whether copying all that is of use still frees half of it."""
        return 2 * self.reachable_bytes <= self.nbytes


def choose_victims(
    candidates: Sequence[Candidate], wanted_bytes: int, *, kept_share_max: float = 0.75
) -> list[int]:
    """Return positions of segments to evict.

    First those that are mostly dead, the deadest first; then the least recently used, leaves
    before what they continue. Segments that are leased, or more than `kept_share_max` of which
    must be kept, are passed over: rewriting them would free little. The sum of what the chosen
    ones free is at least `wanted_bytes` if the candidates allow it.
    """
    chosen: list[int] = []
    freed = 0
    for candidate in sorted(candidates, key=_order):
        if freed >= wanted_bytes:
            break
        if candidate.is_leased or candidate.kept_bytes > kept_share_max * candidate.nbytes:
            continue
        chosen.append(candidate.position)
        freed += candidate.nbytes - candidate.kept_bytes
    return chosen


def _order(candidate: Candidate) -> tuple[int, int, int, int]:
    if candidate.is_mostly_dead:
        return (0, candidate.reachable_bytes, 0, candidate.position)
    return (1, candidate.recency_ns, -candidate.written_ns, candidate.position)


def spare(
    held: npt.NDArray[np.bool_],
    reachable: npt.NDArray[np.bool_],
    recency_ns: npt.NDArray[np.int64],
    lengths: npt.NDArray[np.int64],
    *,
    warm_ns: int,
    segment_bytes: int,
) -> npt.NDArray[np.bool_]:
    """Return which blocks of a victim survive.

    All held ones; all reachable ones if they fill no more than half of the segment; else the
    reachable ones more recent than `warm_ns`.
    """
    if 2 * int(lengths[reachable | held].sum()) <= segment_bytes:
        return held | reachable
    return held | (reachable & (recency_ns > warm_ns))


def weighted_median(values: npt.NDArray[np.int64], weights: npt.NDArray[np.int64]) -> int:
    """Return the smallest value such that values up to it have half of the weight; 0 for none."""
    if not len(values):
        return 0
    order = np.argsort(values, kind="stable")
    sums = np.cumsum(weights[order])
    return int(values[order[np.searchsorted(sums, sums[-1] / 2)]])
