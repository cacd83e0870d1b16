"""The table of what a tool has run: a line each, its reason below it, counts by result at the end.

Layer: tool.
"""

import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

_REASON_COLUMNS: Final = 96


@dataclass(frozen=True, slots=True)
class Line:
    """One line. `cells`: all columns but the last, which has the figures."""

    cells: Sequence[str]
    result: StrEnum
    figures: Mapping[str, Any]
    reason: str


def to_text(headings: Sequence[str], lines: Sequence[Line], results: Iterable[StrEnum]) -> str:
    """Return the table; `results` are those that are counted, in that order."""
    cells = [[*line.cells, _figures(line.figures)] for line in lines]
    widths = [max(len(row[i]) for row in [headings, *cells]) for i in range(len(headings) - 1)]
    text = [_padded(headings, widths)]
    for line, row in zip(lines, cells, strict=True):
        text.append(_padded(row, widths))
        text += textwrap.wrap(
            line.reason, _REASON_COLUMNS, initial_indent="    ", subsequent_indent="    "
        )
    counts = Counter(line.result for line in lines)
    text.append(", ".join(f"{counts[result]} {result}" for result in results))
    return "\n".join(text) + "\n"


def _padded(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = [cell.ljust(width) for cell, width in zip(cells, widths, strict=False)]
    return "  ".join([*padded, *cells[len(widths) :]]).rstrip()


def _figures(figures: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in figures.items())
