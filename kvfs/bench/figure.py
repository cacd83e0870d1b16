"""Figures: samples of a measurement, of what it is measured against, and the goal.

Layer: L5, pure.

- A sample is one repeat. Median, lowest and highest say what the samples say; nothing is dropped.
- The ratio is taken per repeat, of two measurements that took turns within it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from statistics import median
from typing import Any


class Unit(Enum):
    """What samples count; by its name in JSON. A rate is better when higher, others when lower."""

    BYTES_PER_S = "bytes_per_s"
    KEYS_PER_S = "keys_per_s"
    READS_PER_S = "reads_per_s"
    OPS_PER_S = "ops_per_s"
    COUNT = "count"
    FACTOR = "factor"
    BYTES = "bytes"
    NANOSECONDS = "ns"
    CPU_SHARE = "cpu_share"

    @property
    def is_rate(self) -> bool:
        """Whether more is better."""
        return self.value.endswith("_per_s")


class GoalKind(Enum):
    """What a goal is about: the ratio to the baseline, or the value itself."""

    RATIO_AT_LEAST = "ratio_at_least"
    VALUE_AT_LEAST = "value_at_least"
    VALUE_AT_MOST = "value_at_most"


@dataclass(frozen=True, slots=True)
class Goal:
    """What a figure should be. The median is held to it."""

    kind: GoalKind
    value: float


@dataclass(frozen=True, slots=True)
class Samples:
    """One number per repeat."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle one."""
        return median(self.values)

    @property
    def low(self) -> float:
        """The lowest."""
        return min(self.values)

    @property
    def high(self) -> float:
        """The highest."""
        return max(self.values)

    def to_json(self) -> dict[str, Any]:
        """Return the numbers by name."""
        return {
            "samples": list(self.values),
            "median": self.median,
            "low": self.low,
            "high": self.high,
        }


@dataclass(frozen=True, slots=True)
class Cost:
    """Processor time of work on a mount, in seconds `per` so much of it, by process.

    `reader`: who calls the mount. Of a file that is on no mount, the reader is all there is.
    """

    per: str
    reader: float
    owner: float | None = None
    core: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the seconds by process."""
        return {"per": self.per, "core": self.core, "owner": self.owner, "reader": self.reader}


@dataclass(frozen=True, slots=True)
class Baseline:
    """What the same work costs without kvfs, in the unit of the figure."""

    name: str
    samples: Samples
    cost: Cost | None = None


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured thing.

    Attributes:
        name: What was measured, e.g. 'put'.
        case: Under which circumstances, e.g. '64 KiB'.
        baseline: Measured in turns with it, repeat by repeat.
        cost: Processor time, where processes of a mount share the work.
    """

    name: str
    case: str
    unit: Unit
    samples: Samples
    baseline: Baseline | None = None
    goal: Goal | None = None
    cost: Cost | None = None

    def __post_init__(self) -> None:
        assert self.samples.values, "a figure needs a sample"
        assert self.baseline is None or len(self.baseline.samples.values) == len(
            self.samples.values
        ), "one sample of the baseline per sample"

    @property
    def ratio(self) -> Samples | None:
        """How near it comes to the baseline, per repeat: 1 is as good, more is better."""
        if self.baseline is None:
            return None
        pairs = zip(self.samples.values, self.baseline.samples.values, strict=True)
        is_rate = self.unit.is_rate
        return Samples(tuple(own / other if is_rate else other / own for own, other in pairs))

    @property
    def is_met(self) -> bool | None:
        """Whether the goal is met; None without a goal."""
        if self.goal is None:
            return None
        if self.goal.kind is GoalKind.RATIO_AT_LEAST:
            assert self.ratio is not None, "a goal for a ratio needs a baseline"
            return self.ratio.median >= self.goal.value
        if self.goal.kind is GoalKind.VALUE_AT_LEAST:
            return self.samples.median >= self.goal.value
        return self.samples.median <= self.goal.value

    def to_json(self) -> dict[str, Any]:
        """Return everything by name; raw numbers."""
        ratio = self.ratio
        return {
            "name": self.name,
            "case": self.case,
            "unit": self.unit.value,
            **self.samples.to_json(),
            "baseline": None
            if self.baseline is None
            else {
                "name": self.baseline.name,
                **self.baseline.samples.to_json(),
                "cost": _cost_json(self.baseline.cost),
            },
            "ratio": None if ratio is None else ratio.to_json(),
            "goal": None
            if self.goal is None
            else {"kind": self.goal.kind.value, "value": self.goal.value},
            "is_met": self.is_met,
            "cost": _cost_json(self.cost),
        }


def _cost_json(cost: Cost | None) -> dict[str, Any] | None:
    return None if cost is None else cost.to_json()


def rates(amount: float, times_ns: Sequence[int]) -> Samples:
    """Return amount per second for each time."""
    return Samples(tuple(amount * 1e9 / max(1, time) for time in times_ns))


def at_most(value: float) -> Goal:
    """Return the goal of being no more than this."""
    return Goal(GoalKind.VALUE_AT_MOST, value)


def ratio_at_least(value: float) -> Goal:
    """Return the goal of coming this near to the baseline."""
    return Goal(GoalKind.RATIO_AT_LEAST, value)
