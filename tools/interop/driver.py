"""What the second halves of the peers' modules share. Runs in the peers' venvs: standard library.

Layer: tool.
"""

import hashlib
import json
import sys
import time
from collections.abc import Callable
from typing import Final

_MARK: Final = "INTEROP "
_MIB: Final = 1 << 20


def tell(figures: dict[str, float | str]) -> None:
    """Tell the runner what came of it. The last call counts."""
    sys.stdout.write(f"{_MARK}{json.dumps(figures)}\n")
    sys.stdout.flush()


def pattern(nbytes: int, seed: str) -> bytes:
    """Return bytes that are the same for the same seed, and look random."""
    return hashlib.shake_128(seed.encode()).digest(nbytes)


def rate_mib_s(nbytes: int, action: Callable[[], object]) -> float:
    """Run an action and return how fast it went over so many bytes."""
    start = time.perf_counter()
    action()
    return round(nbytes / _MIB / (time.perf_counter() - start), 1)


def require(condition: bool, message: str) -> None:
    """End with a message unless the condition holds; -O does not remove it."""
    if not condition:
        sys.exit(message)
