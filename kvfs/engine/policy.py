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
        held_bytes: Blocks that must not be dropped (pinned, or named in a durable namespace).
        is_leased: Somebody reads it: evicting it frees nothing now.
    """

    position: int
    nbytes: int
    last_access_ns: int
    held_bytes: int
    is_leased: bool


def choose_victims(
    candidates: Sequence[Candidate], wanted_bytes: int, *, held_share_max: float = 0.75
) -> list[int]:
    """Return positions of segments to evict, least recently used first.

    Segments that are leased, or more than `held_share_max` of which must be kept, are passed over: rewriting them would
    free little. The sum of what the chosen ones free is at least `wanted_bytes` if the candidates allow it.
    """
    chosen: list[int] = []
    freed = 0
    for candidate in sorted(candidates, key=lambda c: (c.last_access_ns, c.position)):
        if freed >= wanted_bytes:
            break
        if candidate.is_leased or candidate.held_bytes > held_share_max * candidate.nbytes:
            continue
        chosen.append(candidate.position)
        freed += candidate.nbytes - candidate.held_bytes
    return chosen


def spare(
    touched: npt.NDArray[np.bool_], held: npt.NDArray[np.bool_],
    lengths: npt.NDArray[np.int64], budget_bytes: int,
) -> npt.NDArray[np.bool_]:
    """Return which blocks of a victim survive: all held ones, and touched ones up to a budget.

    Touched blocks are spared in log order, so parents before children.
    """  # fmt: skip
    second_chance = touched & ~held
    within = np.cumsum(np.where(second_chance, lengths, 0)) <= budget_bytes
    return held | (second_chance & within)
