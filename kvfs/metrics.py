"""Counters of a pool: plain integers, read as a snapshot.

Layer: L0.
"""

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
