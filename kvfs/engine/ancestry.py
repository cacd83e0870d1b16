"""Which blocks of a device are still reachable along their chain, and how recent they are.

Layer: L3 (reads tables and index; no I/O).

- A block whose parent is not resident can serve no prefix, nor can its descendants: they are
  *unreachable* and worth nothing.
- A prefix is as valuable as what continues it: a block's recency is the latest access of itself or
  any of its descendants, plus a nanosecond or few for each block between them. Plain
  least-recently-used order would drop the head of a chain first, and the whole chain with it; so
  would any order that does not tell apart blocks that were read together.

Both are computed for all blocks of a device at once by pointer doubling along parents: O(n log
depth).
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvfs.engine.device_state import DeviceState
from kvfs.engine.segment_table import SegmentState, page_round
from kvfs.engine.state import EngineState


@dataclass(frozen=True, slots=True)
class Standing:
    """How the live blocks of a segment stand, one item per block in log order.

    Attributes:
        indices: Entries.
        lengths: Bytes, rounded up to 4 KiB.
        reachable: Whether the chain is resident up to the block.
        recency_ns: Latest access of the block or a descendant; later than any descendant's.
    """

    indices: npt.NDArray[np.intp]
    lengths: npt.NDArray[np.int64]
    reachable: npt.NDArray[np.bool_]
    recency_ns: npt.NDArray[np.int64]


def survey(state: EngineState, device: DeviceState) -> dict[int, Standing]:
    """Return the standing of each segment of a device by slot. REQUIRES: the engine's lock."""
    by_namespace: dict[int, list[SegmentState]] = {}
    for segment in device.segments.values():
        by_namespace.setdefault(segment.namespace_id, []).append(segment)
    standings: dict[int, Standing] = {}
    for namespace_id, segments in by_namespace.items():
        if namespace_id not in state.indexes:  # set aside, or of a namespace that is going
            standings.update((s.handle.slot, _dead(s)) for s in segments)
            continue
        standings.update(_survey_namespace(state, device, namespace_id, segments))
    return standings


def _dead(segment: SegmentState) -> Standing:
    """Return the standing of a segment that can serve nothing."""
    indices = segment.live_indices()
    return Standing(
        indices=indices,
        lengths=page_round(segment.entries["stored_bytes"][indices]),
        reachable=np.zeros(len(indices), np.bool_),
        recency_ns=np.zeros(len(indices), np.int64),
    )


def _survey_namespace(
    state: EngineState, device: DeviceState, namespace_id: int, segments: list[SegmentState]
) -> dict[int, Standing]:
    counts = np.array([segment.entry_count for segment in segments])
    first = np.cumsum(counts) - counts
    live = np.concatenate([s.live[: s.entry_count] for s in segments])
    recency = np.concatenate([s.accessed_ns[: s.entry_count] for s in segments])
    unreachable = np.zeros(len(live), np.bool_)
    rows = np.flatnonzero(live)
    if len(rows):
        parents = np.concatenate([s.entries["parent"][: s.entry_count] for s in segments])
        asks = rows[parents[rows].any(axis=1)]
        asked = np.ascontiguousarray(parents[asks])
        index = state.index(namespace_id)
        unreachable[asks] = index.lookup(asked)["length"] == 0
        here = index.lookup(asked, device.info.index)
        base = np.zeros(device.info.slot_count, np.int64)
        base[[segment.handle.slot for segment in segments]] = first
        ancestor = np.arange(len(live))
        hits = here["length"] > 0
        ancestor[asks[hits]] = base[here["segment"][hits]] + here["entry"][hits]
        _propagate(ancestor, recency, unreachable)
    standings = {}
    for segment, start in zip(segments, first.tolist(), strict=True):
        indices = segment.live_indices()
        standings[segment.handle.slot] = Standing(
            indices=indices,
            lengths=page_round(segment.entries["stored_bytes"][indices]),
            reachable=~unreachable[start + indices],
            recency_ns=recency[start + indices],
        )
    return standings


def _propagate(
    ancestor: npt.NDArray[np.intp],
    recency: npt.NDArray[np.int64],
    unreachable: npt.NDArray[np.bool_],
) -> None:
    """Spread recency to all ancestors and unreachability to all descendants, in place.

    `ancestor[i]` is the row of i's parent, or i itself for a root. After round k it is the 2**k-th
    ancestor, or the root; recency grows by a nanosecond for each step up, at the root by up to four
    times as much. Parents that form a cycle (possible, as parents are hints) end the doubling after
    as many rounds as a chain of all rows would take.
    """
    rows = np.arange(len(ancestor))
    for number in range(len(ancestor).bit_length() + 1):
        below = np.flatnonzero(ancestor != rows)
        np.maximum.at(recency, ancestor[below], recency[below] + (1 << number))
        unreachable |= unreachable[ancestor]
        further = ancestor[ancestor]
        if np.array_equal(further, ancestor):
            return
        ancestor = further
