"""Lines that say how far the lab is.

Layer: tool.
"""

import sys
import time
from typing import Final

_START: Final = time.monotonic()


def say(text: str) -> None:
    """Print a line with the seconds since the start."""
    sys.stderr.write(f"lab {time.monotonic() - _START:6.0f} s  {text}\n")
