"""The table that the lab prints.

Layer: tool.
"""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

_HEADINGS: Final = ("what was run", "on", "result", "seconds", "figures")
_REASON_COLUMNS: Final = 96


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
    cells = [[row.what, row.where, str(row.result), f"{row.seconds:.1f}", _figures(row)]
             for row in rows]  # fmt: skip
    widths = [max(len(line[i]) for line in [list(_HEADINGS), *cells]) for i in range(4)]
    lines = [_line(_HEADINGS, widths)]
    for row, line in zip(rows, cells, strict=True):
        lines.append(_line(line, widths))
        lines += textwrap.wrap(
            row.reason, _REASON_COLUMNS, initial_indent="    ", subsequent_indent="    "
        )
    counts = ", ".join(f"{sum(row.result is result for row in rows)} {result}" for result in Result)
    return "\n".join([*lines, counts]) + "\n"


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = [cell.ljust(width) for cell, width in zip(cells, widths, strict=False)]
    return "  ".join([*padded, *cells[len(widths) :]]).rstrip()


def _figures(row: Row) -> str:
    return ", ".join(f"{name} {value}" for name, value in row.figures.items())
