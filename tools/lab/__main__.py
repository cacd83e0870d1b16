"""Boot a guest that has the devices, run everything there, and print a table.

Layer: tool.

    make lab            all of it, with 5 power cuts; exit status 1 if anything failed
    make lab-cuts       50 power cuts
    make lab-shell      a prompt in the guest
    python -m lab --help    with PYTHONPATH=tools: more to choose
"""

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from lab import cuts, guest, machine, rows
from lab.packages import MAIN, OLD, Tree, prepare
from lab.paths import RUNS, LabError
from lab.progress import say
from lab.rows import Result, Row

# Steps of one boot in their order, with the seconds after which one has failed. The last takes the
# DAX device away: the kernel's memory is not given back.
_DEVICES: Final = (
    ("conformance", "nvdimm", 600), ("conformance", "cxl volatile", 900),
    ("conformance", "pmem", 600), ("conformance", "nvme", 600),
    ("device scan", "dax", 180), ("device show", "nvme", 120),
    ("restore after kill -9", "dax", 300), ("restore after kill -9", "dax and dir", 300),
    ("restore after kill -9", "pmem", 300),
    ("view without a copy", "nvdimm", 120), ("mount, mapped file", "pmem, passthrough", 400),
    ("devices of a running pool", "dir, dax, pmem", 400),
    ("poison list", "cxl persistent", 120),
    ("poison", "nvdimm", 180), ("conformance", "cxl persistent", 900),
    ("memory of a NUMA node", "cxl volatile", 180), ("device scan", "cxl node", 180),
    ("pool on a NUMA node", "cxl volatile", 180),
    ("devices of a running pool", "dir, cxl node", 300),
)  # fmt: skip
_OLD_KERNEL: Final = (("mount, mapped file", "nvme, native", 400),)
_BOOT_S: Final = 180.0
_PAGE: Final = 4096


def main() -> int:
    """Run what was asked for."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    arguments = _arguments()
    guest.Guest.patience = arguments.patience
    try:
        prepare(MAIN)
        if arguments.shell:
            return _shell()
        found: list[Row] = []
        for part, run in _parts(arguments).items():
            if part in arguments.only:
                for row in _collected(part, run):
                    found.append(row)
                    say(f"{row.what}, {row.where}: {row.result}{row.reason and ': '}{row.reason}")
    except LabError as error:
        sys.stderr.write(f"lab: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("lab: interrupted; the guest is off\n")
        return 130
    sys.stdout.write(rows.to_text(found))
    return 1 if any(row.result is Result.FAILED for row in found) else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="lab", description=__doc__.split("\n", 1)[0])
    names = list(_parts(argparse.Namespace()))
    parser.add_argument(
        "--only", type=lambda text: text.split(","), default=names, metavar="PARTS",
        help=f"parts to run, with commas, of {', '.join(names)} (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--step", metavar="WORDS", default="",
        help="of the part devices, steps with one of these words, with commas",
    )  # fmt: skip
    parser.add_argument("--cuts", type=int, default=5, help="power cuts (default: 5)")
    parser.add_argument("--seed", type=int, default=1, help="of the moments of the cuts")
    parser.add_argument(
        "--patience", type=float, default=1.0, metavar="FACTOR",
        help="times all deadlines, for a machine that is busy (default: 1)",
    )  # fmt: skip
    parser.add_argument("--shell", action="store_true", help="a prompt in the guest")
    arguments = parser.parse_args()
    if unknown := set(arguments.only) - set(names):
        parser.error(f"unknown part {min(unknown)!r}: expected one of {', '.join(names)}")
    return arguments


def _parts(arguments: argparse.Namespace) -> dict[str, Callable[[Path], Iterator[Row]]]:
    def devices(directory: Path) -> Iterator[Row]:
        words = arguments.step.split(",")
        steps = [step for step in _DEVICES
                 if any(word in f"{step[0]} {step[1]}" for word in words)]  # fmt: skip
        return _steps(directory, MAIN, steps)

    return {
        "devices": devices,
        "cache": _write_cache,
        "cuts": lambda directory: cuts.run(
            directory, arguments.cuts, random.Random(arguments.seed)
        ),
        "old": _old_kernel,
    }


def _collected(part: str, run: Callable[[Path], Iterator[Row]]) -> Iterator[Row]:
    """Run a part in a directory of its own, which stays if something failed."""
    RUNS.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix=f"{part}-", dir=RUNS))
    has_failed = True
    try:
        found = []
        for row in run(directory):
            found.append(row)
            yield row
        has_failed = any(row.result is Result.FAILED for row in found)
    finally:
        if has_failed:
            _keep_logs(directory)
        else:
            shutil.rmtree(directory)


def _keep_logs(directory: Path) -> None:
    """Remove what is large, and leave the logs."""
    for name in (*machine.BACKING, "initramfs"):
        (directory / name).unlink(missing_ok=True)


def _steps(directory: Path, tree: Tree, steps: Any) -> Iterator[Row]:
    """Run steps in one boot; after one that hung, the rest in another."""
    left = list(steps)
    while left:
        job = guest.write_job(directory, steps=[step[:2] for step in left])
        say(f"booting {tree.kernel.name} for {len(left)} steps; log: {directory}/console.log")
        with guest.Guest(machine.Machine(directory, tree, MAIN, job)) as running:
            heard, is_up = 0, True
            while left and is_up:
                what, where, timeout_s = left[0]
                start = time.monotonic()
                say(f"{what}, {where}")
                try:
                    heard, row = _next_row(running, heard, timeout_s + _BOOT_S * (heard == 0))
                except LabError as error:
                    seconds = time.monotonic() - start
                    row = Row(what, where, Result.FAILED, seconds, reason=str(error))
                    is_up = False
                left.pop(0)
                yield row


def _next_row(running: guest.Guest, heard: int, timeout_s: float) -> tuple[int, Row]:
    """Wait for the next row, and do what the guest asks for until then."""
    while True:
        told = running.wait_for(heard + 1, timeout_s)[heard]
        heard += 1
        if told["event"] == "machine check":
            running.machine_check(told["address"])
        elif told["event"] == "row":
            fields = {name: told[name] for name in ("what", "where", "seconds", "figures")}
            return heard, Row(**fields, result=Result(told["result"]), reason=told["reason"])


def _write_cache(directory: Path) -> Iterator[Row]:
    """Prove that the disk loses what was not flushed, and only that."""
    start = time.monotonic()
    job = guest.write_job(directory, steps=[("write cache", "disk")])
    with guest.Guest(machine.Machine(directory, MAIN, MAIN, job, disk="virtio")) as running:
        say("write cache, disk")
        running.wait_for(1, _BOOT_S)
        running.cut()
        with running.machine.backing("disk").open("rb") as disk:
            found = []
            for number in range(2):
                disk.seek(number << 20)
                found.append(disk.read(_PAGE))
    flushed, late = found[0] == b"flushed " * 512, found[1] == bytes(_PAGE)
    what = {"flushed page": "there" if flushed else "lost", "other": "lost" if late else "there"}
    result = Result.OK if flushed and late else Result.FAILED
    reason = "" if result is Result.OK else "the disk is not one with a volatile write cache"
    yield Row("write cache", "disk", result, time.monotonic() - start, what, reason)


def _old_kernel(directory: Path) -> Iterator[Row]:
    """Boot the kernel of Debian 12, which does not know passthrough."""
    prepare(OLD)
    yield from _steps(directory, OLD, _OLD_KERNEL)


def _shell() -> int:
    """Start a guest on the terminal; its machine is kept from one shell to the next."""
    sys.stderr.write("lab: 'exit' or ctrl-d switches the guest off\n")
    one = machine.Machine(RUNS / "shell", MAIN, MAIN)
    with guest.Guest(one, is_interactive=True) as running:
        running.wait_for_end(None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
