"""How figures are shown: a table for people, JSON for programs.

Layer: L5.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from kvfs import __version__
from kvfs.bench.figure import Cost, Figure, GoalKind, Samples, Unit
from kvfs.bench.session import Scale
from kvfs.clock import SystemClock
from kvfs.units import GIB, format_bytes, format_duration

SCHEMA: Final = {"command": "bench", "version": 1}
NONE: Final = "\u2013"
_HEADINGS: Final = ("figure", "case", "median", "low .. high", "against", "median", "ratio",
                    "low .. high", "goal", "met",
                    "CPU s: core owner reader; against")  # fmt: skip
_COST: Final = 10
_LEFT: Final = {"figure", "case", "against", "met", _HEADINGS[_COST]}
_CPUINFO: Final = Path("/proc/cpuinfo")
_LOADAVG: Final = Path("/proc/loadavg")


@dataclass(frozen=True, slots=True)
class Machine:
    """Where and when the figures were measured. `load` is that of the last minute."""

    cpu: str
    cpus: int
    memory_bytes: int
    kernel: str
    load: float
    started: str

    def to_json(self) -> dict[str, Any]:
        """Return everything by name."""
        return asdict(self)

    def to_text(self) -> str:
        """Return the first line of a report."""
        return (
            f"machine  {self.cpus} x {self.cpu}, {format_bytes(self.memory_bytes)}, "
            f"Linux {self.kernel}, load {self.load:.1f}"
        )


@dataclass(slots=True)
class Report:
    """All figures of a run, and what could not be measured: (bench, reason)."""

    machine: Machine
    scale: Scale
    figures: list[Figure] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return everything by name."""
        return {
            "schema": SCHEMA,
            "kvfs": __version__,
            "machine": self.machine.to_json(),
            "scale": {
                "size_bytes": self.scale.size_bytes,
                "block_count": self.scale.block_count,
                "repeats": self.scale.repeats,
            },
            "figures": [figure.to_json() for figure in self.figures],
            "skipped": [{"name": name, "reason": reason} for name, reason in self.skipped],
        }

    def to_text(self) -> str:
        """Return a table, and below it what was missed or skipped."""
        scale = self.scale
        head = (
            f"{self.machine.to_text()}\n"
            f"  scale  {format_bytes(scale.size_bytes)} per repeat, {scale.block_count} small "
            f"blocks, {scale.repeats} repeats\n"
        )
        parts = [head]
        if self.figures:
            parts.append(figures_table(self.figures))
        missed = [figure for figure in self.figures if figure.is_met is False]
        held = [figure for figure in self.figures if figure.is_met is not None]
        if held:
            parts.append(f"{len(held) - len(missed)} of {len(held)} goals met\n")
        parts.extend(f"skipped  {name}: {reason}\n" for name, reason in self.skipped)
        return "\n".join(parts)


def this_machine() -> Machine:
    """Describe the machine."""
    import os

    names = [
        line.partition(":")[2].strip()
        for line in _CPUINFO.read_text().splitlines()
        if line.startswith("model name")
    ]
    now = datetime.fromtimestamp(SystemClock().wall_ns() // 10**9, UTC)
    return Machine(
        cpu=names[0] if names else os.uname().machine,
        cpus=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        kernel=os.uname().release,
        load=float(_LOADAVG.read_text().split()[0]),
        started=now.isoformat().replace("+00:00", "Z"),
    )


def figures_table(figures: Sequence[Figure]) -> str:
    """Return the figures as a table with headings."""
    return _table([_row(figure) for figure in figures])


def _row(figure: Figure) -> dict[int, str]:
    ratio, baseline = figure.ratio, figure.baseline
    cells = [
        figure.name,
        figure.case,
        _value(figure.samples.median, figure.unit),
        _spread(figure.samples, figure.unit),
        baseline.name if baseline else NONE,
        _value(baseline.samples.median, figure.unit) if baseline else NONE,
        f"{ratio.median:.2f}" if ratio else NONE,
        f"{ratio.low:.2f} .. {ratio.high:.2f}" if ratio else NONE,
        _goal(figure),
        NONE if figure.is_met is None else "yes" if figure.is_met else "NO",
        _costs(figure),
    ]
    return dict(enumerate(cells))


def _costs(figure: Figure) -> str:
    """Say what processor time the work took, and that of the baseline."""
    if figure.cost is None:
        return ""
    parts = [_cost(figure.cost)]
    if figure.baseline is not None and figure.baseline.cost is not None:
        parts.append(_cost(figure.baseline.cost))
    return f"{'; '.join(parts)} per {figure.cost.per}"


def _cost(cost: Cost) -> str:
    seconds = (cost.core, cost.owner, cost.reader)
    return " ".join(NONE if value is None else f"{value:.3f}" for value in seconds)


def _goal(figure: Figure) -> str:
    if figure.goal is None:
        return NONE
    if figure.goal.kind is GoalKind.RATIO_AT_LEAST:
        return f"ratio >= {figure.goal.value:.2f}"
    sign = ">=" if figure.goal.kind is GoalKind.VALUE_AT_LEAST else "<="
    return f"{sign} {_value(figure.goal.value, figure.unit)}"


def _value(value: float, unit: Unit) -> str:
    if unit is Unit.BYTES_PER_S:
        return f"{value / GIB:.2f} GiB/s"
    if unit is Unit.NANOSECONDS:
        return format_duration(round(value))
    if unit is Unit.BYTES:
        return format_bytes(round(value))
    if unit is Unit.CPU_SHARE:
        return f"{100 * value:.0f} %"
    if unit in (Unit.COUNT, Unit.FACTOR):
        return f"{value:.0f}" if unit is Unit.COUNT else f"{value:.3f}"
    word = {Unit.KEYS_PER_S: "keys", Unit.READS_PER_S: "reads", Unit.OPS_PER_S: "ops"}[unit]
    if value < 1e3:
        return f"{value:.0f} {word}/s"
    return f"{value / 1e6:.2f} M {word}/s" if value >= 1e6 else f"{value / 1e3:.1f} k {word}/s"


def _spread(samples: Samples, unit: Unit) -> str:
    low, high = _value(samples.low, unit), _value(samples.high, unit)
    if low.split(" ", 1)[1:] == high.split(" ", 1)[1:]:
        low = low.split(" ", 1)[0]
    return f"{low} .. {high}"


def _table(rows: Sequence[dict[int, str]]) -> str:
    """Set rows under their headings: text to the left, numbers to the right."""
    headings = _HEADINGS if any(row[_COST] for row in rows) else _HEADINGS[:_COST]
    widths = [
        max(len(heading), *(len(row[i]) for row in rows)) for i, heading in enumerate(headings)
    ]
    lines = []
    for row in [dict(enumerate(headings)), *rows]:
        cells = (
            row[i].ljust(widths[i]) if heading in _LEFT else row[i].rjust(widths[i])
            for i, heading in enumerate(headings)
        )
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines) + "\n"
