"""Counters of a pool: plain integers, read as a snapshot; and who has heard of losses.

Layer: L0.
"""

import threading
from dataclasses import asdict, dataclass


@dataclass(slots=True)
class Counters:
    """What a pool did since it was opened. Byte counts are stored bytes."""

    blocks_put: int = 0
    blocks_deduplicated: int = 0
    bytes_put: int = 0
    bytes_deduplicated: int = 0
    lookups_hit: int = 0
    lookups_missed: int = 0
    blocks_read: int = 0
    bytes_read: int = 0
    blocks_verified: int = 0
    checksum_errors: int = 0
    media_errors: int = 0
    write_errors: int = 0
    blocks_evicted: int = 0
    blocks_relocated: int = 0
    bytes_relocated: int = 0
    segments_evicted: int = 0
    files_evicted: int = 0
    puts_refused: int = 0
    segments_poisoned: int = 0
    blocks_lost: int = 0

    def snapshot(self) -> dict[str, int]:
        """Return name and value of every counter."""
        return asdict(self)


class LossListener:
    """One who hears of losses: a thread of the owner, or a client."""

    def __init__(self, reports: "LossReports") -> None:
        self._reports = reports
        self._heard = reports.heard

    def news(self) -> int:
        """Return how many blocks were lost that this listener has not heard of."""
        lost = self._reports.lost
        count, self._heard = lost - self._heard, lost
        self._reports.heard = max(self._reports.heard, lost)
        return count


class LossReports:
    """Tells every listener once of each loss, as Linux tells every descriptor of a failed write.

    Who deals with the pool only after a loss hears of it only if nobody has before: he cannot have
    relied on what was lost.
    """

    def __init__(self, counters: Counters) -> None:
        self._counters = counters
        self.heard = 0  # by somebody; needs no lock: a race makes somebody hear twice
        self._own = threading.local()

    @property
    def lost(self) -> int:
        """How many blocks were lost since open."""
        return self._counters.blocks_lost

    def new_listener(self) -> LossListener:
        """Return one who hears of what is lost from now on, and of what nobody has heard of yet."""
        return LossListener(self)

    def listen(self) -> LossListener:
        """Let this thread hear of what is lost from now on, and of what nobody has heard of yet."""
        if not hasattr(self._own, "listener"):
            self._own.listener = LossListener(self)
        listener: LossListener = self._own.listener
        return listener
