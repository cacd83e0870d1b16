"""Offline check and repair of a pool: every invariant of the format, and names against blocks.

Layer: L3.

- `check_pool` takes the pool's lock and reads its directories; `check_devices` works on devices and
  a catalog that are open already, in milliseconds for small ones, and takes no lock.
- Nothing is modified unless repair is asked for. Repair loses cache, never adds or invents a byte.
"""

from kvfs.engine.checker.devices import check_devices
from kvfs.engine.checker.offline import check_pool
from kvfs.engine.checker.repair import apply_plan
from kvfs.engine.checker.report import (
    Action,
    ActionKind,
    CheckCounts,
    CheckReport,
    Finding,
    Severity,
)

__all__ = [
    "Action", "ActionKind", "CheckCounts", "CheckReport", "Finding", "Severity", "apply_plan",
    "check_devices", "check_pool",
]  # fmt: skip
