"""The table that the lab prints.

Layer: tool.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

import table
from table import Line

_HEADINGS: Final = ("what was run", "on", "result", "seconds", "figures")


class Result(StrEnum):
    """How a row ended."""

    OK = "ok"
    FAILED = "failed"
    CANNOT = "cannot"  # this machine does not have what it takes


@dataclass(frozen=True, slots=True)
class Row:
    """One thing that was run, and what came of it."""

    what: str
    where: str
    result: Result
    seconds: float
    figures: dict[str, Any] = field(default_factory=dict)
    reason: str = ""


def to_text(rows: Sequence[Row]) -> str:
    """Return the table, each reason below its row."""
    lines = [
        Line((row.what, row.where, row.result, f"{row.seconds:.1f}"), row.result, row.figures,
             row.reason)
        for row in rows
    ]  # fmt: skip
    return table.to_text(_HEADINGS, lines, Result)
