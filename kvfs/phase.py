"""What blocks are accessed for: the phase of inference that an engine is in.

Layer: L0.
"""

from enum import IntEnum

from kvfs.errors import UsageError

PhaseName = str


class Phase(IntEnum):
    """What an access is for. The numbers are those in access events (native/ring.h).

    Attributes:
        UNKNOWN: Nobody said; what files of the mount are read for is never known.
        PREFILL: Instead of computing a prompt, whose tokens the engine has before it begins.
        DECODE: Of tokens that the engine makes itself.
        BACKGROUND: For nobody who waits: copies, checks, reading ahead. Such an access is counted,
            and says nothing of how soon the block is wanted: eviction does not hear of it.
    """

    UNKNOWN = 0
    PREFILL = 1
    DECODE = 2
    BACKGROUND = 3


def as_phase(name: PhaseName | None) -> Phase:
    """Return the phase of a name; UNKNOWN for None.

    Raises:
        UsageError: It is none.
    """
    if name is None:
        return Phase.UNKNOWN
    try:
        return Phase[name.upper()]
    except (KeyError, AttributeError):
        raise UsageError(
            f"phase {name!r}: expected 'prefill', 'decode', 'background' or None"
        ) from None
