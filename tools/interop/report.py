"""How the matrix is shown: a table for people, JSON for programs.

Layer: tool.
"""

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import table
from table import Line

from interop.cases import Result, Row

_HEADINGS: Final = ("engine", "version", "what was run", "on", "result", "figures")


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
    lines = [
        Line((row.engine, row.version, row.what, row.place, row.result), row.result, row.figures,
             row.reason)
        for row in rows
    ]  # fmt: skip
    return table.to_text(_HEADINGS, lines, Result)
