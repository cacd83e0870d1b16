"""The host's half of the power cuts: kill, start again, have the guest compare.

Layer: tool.

- A cut is SIGKILL to QEMU and to the disk behind it at a random moment of a load that writes to all
  kinds of devices. The next boot compares with what had left through the port by then.
- What QEMU had stored into a backing file is there after the cut: for NVDIMM and CXL memory this
  proves recovery from a guest that is gone, not the loss of cache lines.
"""

import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from lab import acks, guest, machine
from lab.packages import MAIN
from lab.paths import LabError
from lab.progress import say
from lab.rows import Result, Row

KINDS: Final = ("nvdimm", "cxl", "pmem", "disk")
_BOOT_S: Final = 600.0
_VERIFY_S: Final = 300.0
# A cut comes so many seconds after so many acknowledgements, both at random: also on a slow machine
# something was acknowledged by then.
_ACKNOWLEDGED_MAX: Final = 80
_LATER_S: Final = 0.5
_LOAD_S: Final = 120.0
# All that a machine has written is compared at each boot: a new one bounds that.
_CUTS_PER_MACHINE: Final = 10


def run(directory: Path, count: int, moments: random.Random) -> Iterator[Row]:
    """Cut the power so many times; return a row for each kind of device."""
    start = time.monotonic()
    totals = {kind: _Total() for kind in KINDS}
    cut = 0
    problem = ""
    while cut < count and not problem:
        here = min(_CUTS_PER_MACHINE, count - cut)
        shutil.rmtree(directory, ignore_errors=True)
        try:
            _machine(directory, cut, here, totals, moments)
        except LabError as error:
            problem = f"cut {cut + 1} or one of the {here - 1} after it: {error}"
        cut += here
    seconds = time.monotonic() - start
    for kind, total in totals.items():
        yield total.row(kind, seconds, problem)
        problem = problem and "as above"


class _Total:
    """What the boots found in one pool."""

    def __init__(self) -> None:
        self.cuts = self.acknowledged = self.blocks = self.files = 0
        self.bad: dict[str, list[str]] = {"lost": [], "corrupt": [], "phantom": []}

    def add(self, told: dict[str, Any]) -> None:
        self.cuts += 1
        self.blocks += told["blocks"]
        self.files += told["files"]
        for name, bad in self.bad.items():
            bad += told[name]

    def row(self, kind: str, seconds: float, problem: str) -> Row:
        figures = {"cuts": self.cuts, "acknowledged": self.acknowledged,
                   "compared": f"{self.blocks} blocks and {self.files} files"}  # fmt: skip
        figures |= {name: len(bad) for name, bad in self.bad.items()}
        said = [f"{name}: {bad[0]}" for name, bad in self.bad.items() if bad]
        if problem:
            said.append(problem)
        if not self.acknowledged:
            said.append("nothing was acknowledged: the cuts prove nothing")
        result = Result.FAILED if said else Result.OK
        return Row("power cuts", kind, result, seconds, figures, "; ".join(said))


def _machine(
    directory: Path, done: int, count: int, totals: dict[str, _Total], moments: random.Random
) -> None:
    """Cut the power of one machine so many times, and compare after each."""
    tallies: dict[str, acks.Tally] = {}
    for boot in range(count + 1):
        is_last = boot == count
        job = guest.write_job(
            directory, is_last=is_last,
            tallies={kind: tally.to_json() for kind, tally in tallies.items()},
        )  # fmt: skip
        with guest.Guest(machine.Machine(directory, MAIN, MAIN, job, disk="virtio")) as running:
            expected = len(tallies) + (not is_last)
            told = running.wait_for(expected, _BOOT_S if boot == 0 else _BOOT_S + _VERIFY_S)
            for one in told:
                if one["event"] == "verified":
                    totals[one["kind"]].add(one)
            if is_last:
                say(f"after cut {done + boot}: compared")
                break
            running.wait_for_done(moments.randint(1, _ACKNOWLEDGED_MAX), _LOAD_S)
            time.sleep(moments.uniform(0, _LATER_S))
            running.cut()
            _, acknowledged = running.heard()
        acks.merge(tallies, acknowledged)
        numbers = ", ".join(f"{kind} {len(tally.done)}" for kind, tally in tallies.items())
        say(f"cut {done + boot + 1}; acknowledged so far: {numbers}")
    for kind, tally in tallies.items():
        totals[kind].acknowledged += len(tally.done)
