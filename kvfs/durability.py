"""What `put` is asked to promise, and what it did.

Layer: L0.
"""

from dataclasses import dataclass
from enum import Enum

from kvfs.errors import UsageError

DurabilityName = str


class Durability(Enum):
    """What `put` promises on return: memory only; persisted within a bounded delay; persisted."""

    NONE = "none"
    ASYNC = "async"
    SYNC = "sync"


@dataclass(frozen=True, slots=True)
class PutResult:
    """What a put did. Byte counts are stored bytes, without padding."""

    blocks_stored: int
    blocks_deduplicated: int
    bytes_stored: int
    bytes_deduplicated: int


def as_durability(name: DurabilityName) -> Durability:
    """Return the durability of a name.

    Raises:
        UsageError: It is none.
    """
    try:
        return Durability(name)
    except ValueError:
        raise UsageError(f"durability {name!r}: expected 'none', 'async' or 'sync'") from None
