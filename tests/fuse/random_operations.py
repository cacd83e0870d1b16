"""Random operations on a mount and on a plain directory: results, errors and bytes must agree.

    python -m tests.fuse.random_operations --seed 7 --count 20000 [--no-core] [--shrink]
    python -m tests.fuse.random_operations --replay FILE [--no-core] [--shrink]

An operation is a tuple of its name and a few numbers and names, drawn without looking at what is
there; so a list of operations runs as it is, or with any of them left out. A failure writes the
list to a file; `--shrink` leaves out operations for as long as what remains fails.
"""

import argparse
import json
import os
import random
import re
import shutil
import sys
import tempfile
from pathlib import Path

from tests.fuse.mounting import MIB
from tests.fuse.random_run import DIRECTORIES, PAGE, SLOTS, DifferenceError, Operation, Run

NAMES = ("a", "b", "c", "e", "f", "g")
RAW_NAMES = ("x", "y")
SUMMARY = re.compile(r"^(\d+) done: ", re.MULTILINE)
WEIGHTS = {
    "open": 14, "create": 8, "close": 13, "write": 16, "append": 4, "read": 14, "ftruncate": 4,
    "fallocate": 1, "map_write": 3, "map_read": 4, "fsync": 1, "drop_cache": 3, "truncate": 2,
    "whole": 6, "rename": 5, "rename_directory": 1, "unlink": 3, "mkdir": 2, "rmdir": 1, "list": 3,
    "stat": 6, "utimens": 2, "chmod": 2, "set_attribute": 2, "get_attribute": 3, "replace": 2,
    "reopen": 3, "dup": 1,
}  # fmt: skip


def generate(seed: int, count: int, remount_every: int) -> list[Operation]:
    """Draw operations, and between them, once in so many, an end of the mount's owner."""
    rng = random.Random(seed)
    kinds, weights = list(WEIGHTS), list(WEIGHTS.values())

    def path() -> str:
        if rng.random() < 0.15:
            return f"raw/{rng.choice(RAW_NAMES)}"
        directory = rng.choices(DIRECTORIES, (6, 2, 2, 1))[0]
        return f"{directory}/{rng.choice(NAMES)}".lstrip("/")

    def size() -> int:
        edge = rng.choice((1, 100, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE))
        most = rng.choices((edge, 20_000, 200_000, MIB, 6 * MIB), (30, 40, 25, 4, 1))[0]
        return edge if most == edge else rng.randrange(1, most)

    def flags() -> int:
        found = rng.choices((os.O_RDONLY, os.O_WRONLY, os.O_RDWR), (4, 3, 4))[0]
        found |= rng.choices((0, os.O_TRUNC, os.O_APPEND), (6, 1, 1))[0]
        return found | (os.O_DIRECT if rng.random() < 0.15 else 0)

    def offset() -> int:
        return rng.choice((0, 0, 1, PAGE, rng.randrange(100_000), rng.randrange(2 * MIB)))

    operations: list[Operation] = []
    for number in range(count):
        if remount_every and rng.random() < 1 / remount_every:
            operations.append((rng.choice(("remount", "kill", "sync_and_kill")),))
        kind = rng.choices(kinds, weights)[0]
        where = rng.choice(DIRECTORIES[1:])
        slot, one, other = rng.randrange(SLOTS), path(), path()
        operations.append((kind, slot, one, other, where, flags(), offset(), size(), number))
    return operations


def attempt(operations: list[Operation], *, core: bool) -> tuple[str, Run]:
    """Run operations in a fresh mount; return what failed, or nothing, and the run, ended."""
    base = Path(tempfile.mkdtemp(prefix="kvfs-random-", dir="/dev/shm"))
    failure = ""
    try:
        run = Run(base, core=core)
        try:
            run.run(operations)
            run.mounted.stop()
            run.mounted.check_log()
        except DifferenceError as error:
            failure = str(error)
        finally:
            run.end()
        return failure, run
    finally:
        shutil.rmtree(base, ignore_errors=True)


def shrink(operations: list[Operation], path: Path, *, core: bool) -> None:
    """Leave operations out while what remains fails; keep what remains in a file."""
    step = len(operations) // 2
    while step:
        start = 0
        while start < len(operations):
            fewer = operations[:start] + operations[start + step :]
            failure, run = attempt(fewer, core=core)
            if failure:
                operations = run.done
                path.write_text(json.dumps(operations))
                print(f"{len(operations)} operations left: {failure[:200]}", flush=True)
            else:
                start += step
        step //= 2


def main() -> int:
    parser = argparse.ArgumentParser(description="Random operations on a mount.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--remount-every", type=int, default=5000)
    parser.add_argument("--no-core", action="store_true")
    parser.add_argument("--shrink", action="store_true")
    parser.add_argument("--replay", type=Path)
    parser.add_argument("--output", type=Path, default=Path(tempfile.gettempdir()))
    arguments = parser.parse_args()
    core = not arguments.no_core
    if arguments.replay:
        operations = [tuple(each) for each in json.loads(arguments.replay.read_text())]
    else:
        operations = generate(arguments.seed, arguments.count, arguments.remount_every)
    print(f"seed {arguments.seed}, {len(operations)} operations, core={core}", flush=True)
    failure, run = attempt(operations, core=core)
    print(f"{sum(run.counts.values())} done: {dict(run.counts.most_common())}", flush=True)
    if not failure:
        return 0
    path = arguments.output / f"kvfs-random-{arguments.seed}.json"
    path.write_text(json.dumps(run.done))
    print(f"FAILED: {failure}\nrepeat with --replay {path}", file=sys.stderr, flush=True)
    if arguments.shrink:
        shrink(run.done, path, core=core)
    return 1


if __name__ == "__main__":
    sys.exit(main())
