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


class LossReports:
    """Tells every thread once of each loss, as Linux tells every descriptor of a failed write.

    A thread that deals with the pool only after a loss hears of it only if nobody has before: it
    cannot have relied on what was lost.
    """

    def __init__(self, counters: Counters) -> None:
        self._counters = counters
        self._heard = 0  # by some thread; needs no lock: a race makes a thread hear twice
        self._own = threading.local()

    def listen(self) -> None:
        """Let this thread hear of what is lost from now on, and of what nobody has heard of yet."""
        if not hasattr(self._own, "heard"):
            self._own.heard = self._heard

    def news(self) -> int:
        """Return how many blocks were lost that this thread has not heard of."""
        self.listen()
        lost = self._counters.blocks_lost
        count = lost - int(self._own.heard)
        self._own.heard = lost
        self._heard = max(self._heard, lost)
        return count
