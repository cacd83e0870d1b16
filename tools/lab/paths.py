"""Where the lab keeps its things: all below build/lab.

Layer: tool.
"""

from pathlib import Path
from typing import Final

REPOSITORY: Final = Path(__file__).resolve().parents[2]
CACHE: Final = REPOSITORY / "build" / "lab"
RUNS: Final = CACHE / "runs"
PYTHON: Final = REPOSITORY / ".venv" / "bin" / "python"


class LabError(Exception):
    """The lab cannot go on; the message says what to do."""
