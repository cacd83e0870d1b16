"""Opening a pool whose owner was killed: `open_pool` with many small blocks, on tmpfs.

Layer: L5.

A child process fills a pool and kills itself (SIGKILL) without flushing or closing. Then, repeat
by repeat, a fresh process opens it, says how long that took, and kills itself too, so that each of
them finds what a dead owner left. `process` counts from before the process was started, with the
interpreter and all imports in it.
"""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

from kvfs.bench.figure import Baseline, Figure, Goal, GoalKind, Samples, Unit
from kvfs.bench.session import Session
from kvfs.clock import SystemClock
from kvfs.errors import KvfsError
from kvfs.units import MIB, PAGE

GOAL = Goal(GoalKind.VALUE_AT_MOST, 1e9)
_CHILD = "kvfs.bench.reopen_child"


def measure(session: Session) -> Iterator[Figure]:
    """Measure opening after SIGKILL with `block_count` blocks of 4 KiB, on tmpfs."""
    yield from reopen_figures(session, "reopen", GOAL, on_disk=False)


def reopen_figures(
    session: Session, name: str, goal: Goal | None, *, on_disk: bool
) -> Iterator[Figure]:
    """Measure it on tmpfs, or on disk with the page cache dropped before each opening."""
    count = session.scale.block_count
    # Blocks, summaries, the reserve, and a sixteenth for segments that are not quite full.
    capacity = (count * (PAGE + 128) * 17 // 16 + 512 * MIB) // PAGE * PAGE
    opened, whole, plain = [], [], []
    with session.directory() if on_disk else session.tmpfs(capacity) as root:
        session.progress.note(f"{name}: {count} blocks of 4 KiB", 0, session.scale.repeats)
        _run(session, "fill", str(root), str(capacity), str(count))
        for repeat in range(session.scale.repeats):
            session.progress.note(name, repeat, session.scale.repeats)
            if on_disk:
                drop_cache(root / "device")
                plain.append(float(_read_summaries(root / "device")))
                drop_cache(root / "device")
            start_ns = SystemClock().monotonic_ns()
            answer = _run(session, "open", str(root))
            if answer["blocks"] < count:
                raise KvfsError(f"{count} blocks were written, {answer['blocks']} came back")
            opened.append(float(answer["open_ns"]))
            whole.append(float(answer["opened_at_ns"] - start_ns))
    case = f"{count} blocks" + (", disk, cache dropped" if on_disk else "")
    baseline = Baseline("pread of summaries", Samples(tuple(plain))) if on_disk else None
    yield Figure(name, case, Unit.NANOSECONDS, Samples(tuple(opened)), baseline, goal)
    yield Figure(f"{name}, process", case, Unit.NANOSECONDS, Samples(tuple(whole)))


def drop_cache(device: Path) -> None:
    """Write out and drop the pages of a device's files, those of nobody else."""
    for path in sorted(device.rglob("*")):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            try:
                os.fsync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)


def _read_summaries(device: Path) -> int:
    """Read what opening reads at least: each segment's summary; return nanoseconds."""
    clock = SystemClock()
    start_ns = clock.monotonic_ns()
    for path in sorted((device / "segments").glob("*.seg")):
        fd = os.open(path, os.O_RDONLY)
        try:
            size = os.fstat(fd).st_size
            share = size // 33  # of 4 KiB and 128 bytes for each block
            os.pread(fd, share, size - share)
        finally:
            os.close(fd)
    return clock.monotonic_ns() - start_ns


def _run(session: Session, *arguments: str) -> dict[str, int]:
    """Run a child that ends by killing itself; return what it printed before."""
    done = session.run_child(_CHILD, *arguments)
    if done.returncode != -signal.SIGKILL:
        raise KvfsError(f"child failed: {_CHILD} {arguments[0]}: {done.stderr.strip()[-2000:]}")
    answer: dict[str, int] = json.loads(done.stdout)
    return answer
