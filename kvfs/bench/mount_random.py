"""Reading 4 KiB at random places of a mount, by two processes at a time, in every lane.

Layer: L5.

Against a mount of the same content that is served by plain pyfuse3 handlers. Pages of the mounts
are dropped before each pass, and no page is read twice in one by the same process. The namespace
lane is that of a large file that somebody has open for writing. All on tmpfs.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from kvfs.bench.figure import Figure, Unit
from kvfs.bench.mounted import (
    CONTEXT,
    FILE,
    PLAIN,
    Mounted,
    file_bytes,
    lane_of,
    opened,
    pair,
    write_file,
)
from kvfs.bench.race import Race
from kvfs.bench.session import Session
from kvfs.errors import UnavailableError
from kvfs.units import PAGE

_READERS: Final = 2
_READS: Final = 1500
_HELD: Final = "held"
_NATIVE_GOAL: Final = 2.2
# (how files are opened, flags)
_CASES: Final = (("buffered", 0), ("O_DIRECT", os.O_DIRECT))


def measure(session: Session) -> Iterator[Figure]:
    """Measure each lane."""
    nbytes = file_bytes(session)
    reads = min(session.scale.share_of(_READS), nbytes // PAGE // 2)
    with session.tmpfs(6 * nbytes) as root, pair(session, root) as (usual, plain):
        write_file(session, usual.path / _HELD, nbytes)
        with ExitStack() as stack:
            stack.enter_context(opened(usual.path / _HELD, os.O_RDWR))
            lanes = _lanes(usual, session)
            for case, flags in _CASES:
                yield from _race(session, usual, plain, lanes, reads, case, flags)


def _lanes(usual: Mounted, session: Session) -> dict[str, str]:
    """Return a file in each lane, by lane."""
    lanes = {}
    for name, expected in ((FILE, "passthrough"), (CONTEXT, "native"), (_HELD, "namespace")):
        with opened(usual.path / name) as fd:
            lane = lane_of(fd)
        if lane == expected:
            lanes[lane] = name
        else:
            reason = f"the file meant for it is in the {lane} lane"
            if expected == "passthrough":
                reason += "; passthrough needs root and Linux 6.9"
            session.leave_out(f"mount-random, {expected} lane", reason)
    return lanes


def _race(
    session: Session, usual: Mounted, plain: Mounted, lanes: dict[str, str], reads: int, case: str,
    flags: int,
) -> Iterator[Figure]:  # fmt: skip
    with ExitStack() as stack:
        ways, processes = {}, {}
        places = [(lane, usual, name) for lane, name in lanes.items()] + [(PLAIN, plain, CONTEXT)]
        for lane, mount, name in places:
            readers = stack.enter_context(_readers(mount.path / name, reads, flags))
            ways[lane] = readers
            processes[lane] = {**mount.processes, "reader": [reader.pid for reader in readers.all]}
        race = Race(session, f"mount-random {case}", Unit.OPS_PER_S, reads * _READERS, processes)
        race.run({lane: readers.read for lane, readers in ways.items()},
                 lambda lane: ways[lane].prepare())  # fmt: skip
    for lane in lanes:
        goal = _NATIVE_GOAL if lane == "native" else None
        yield from race.figures("mount 4 KiB random", f"{lane} lane, {case}", lane, {PLAIN: goal})


class _Readers:
    """Processes that read the same file at the same time."""

    def __init__(self, processes: list[subprocess.Popen[str]]) -> None:
        self.all = processes

    def prepare(self) -> None:
        """Let each find its places, and drop the pages."""
        self._tell("ready")

    def read(self, _: int) -> None:
        """Let all read; return when the last is done."""
        self._tell("done")

    def _tell(self, answer: str) -> None:
        for process in self.all:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        for process in self.all:
            assert process.stdout is not None
            if process.stdout.readline().strip() != answer:
                raise UnavailableError(f"a reader of the bench ended with {process.wait()}")


@contextmanager
def _readers(path: Path, reads: int, flags: int) -> Iterator[_Readers]:
    """Start the readers of a file; end them."""
    processes: list[subprocess.Popen[str]] = []
    try:
        for seed in range(_READERS):
            command = [sys.executable, "-m", "kvfs.bench.random_child", str(path), str(reads),
                       str(seed), str(flags)]  # fmt: skip
            processes.append(subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            ))  # fmt: skip
        yield _Readers(processes)
    finally:
        for process in processes:
            process.kill()
            process.communicate()
