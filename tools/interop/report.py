"""How the matrix is shown: a table for people, JSON for programs.

Layer: tool.
"""

import os
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from interop.cases import Result, Row

_HEADINGS: Final = ("engine", "version", "what was run", "on", "result", "figures")
_REASON_COLUMNS: Final = 96


def machine() -> dict[str, str | int | float]:
    """Describe the machine, so that figures are read with care."""
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "cpu": names[0] if names else os.uname().machine,
        "cpus": len(os.sched_getaffinity(0)),
        "kernel": os.uname().release,
        "load": float(Path("/proc/loadavg").read_text().split()[0]),
    }


def to_json(rows: Sequence[Row], kvfs_version: str) -> dict[str, Any]:
    """Return everything by name."""
    return {
        "schema": {"command": "interop", "version": 1},
        "kvfs": kvfs_version,
        "machine": machine(),
        "rows": [asdict(row) for row in rows],
    }


def to_text(rows: Sequence[Row]) -> str:
    """Return the table, each reason below its row."""
    cells = [[row.engine, row.version, row.what, row.place, row.result, _figures(row)]
             for row in rows]  # fmt: skip
    widths = [max(len(line[i]) for line in [list(_HEADINGS), *cells]) for i in range(5)]
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
