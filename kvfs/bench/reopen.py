"""Opening a pool whose owner was killed: `open_pool` with many small blocks, on tmpfs.

Layer: L5.

A child process fills a pool and kills itself (SIGKILL) without flushing or closing. Then, repeat
by repeat, a fresh process opens it, says how long that took, and kills itself too, so that each of
them finds what a dead owner left. `process` counts from before the process was started, with the
interpreter and all imports in it.
"""

import json
import signal
from collections.abc import Iterator

from kvfs.bench.figure import Figure, Goal, GoalKind, Samples, Unit
from kvfs.bench.session import Session
from kvfs.clock import SystemClock
from kvfs.errors import KvfsError
from kvfs.units import MIB, PAGE

GOAL = Goal(GoalKind.VALUE_AT_MOST, 1e9)
_CHILD = "kvfs.bench.reopen_child"


def measure(session: Session) -> Iterator[Figure]:
    """Measure opening after SIGKILL with `block_count` blocks of 4 KiB."""
    count = session.scale.block_count
    # Blocks, summaries, the reserve, and a sixteenth for segments that are not quite full.
    capacity = (count * (PAGE + 128) * 17 // 16 + 512 * MIB) // PAGE * PAGE
    with session.tmpfs(capacity) as root:
        session.progress.note(f"reopen: {count} blocks of 4 KiB", 0, session.scale.repeats)
        _run(session, "fill", str(root), str(capacity), str(count))
        opened, whole = [], []
        for repeat in range(session.scale.repeats):
            session.progress.note("reopen", repeat, session.scale.repeats)
            start_ns = SystemClock().monotonic_ns()
            answer = _run(session, "open", str(root))
            if answer["blocks"] < count:
                raise KvfsError(f"{count} blocks were written, {answer['blocks']} came back")
            opened.append(float(answer["open_ns"]))
            whole.append(float(answer["opened_at_ns"] - start_ns))
    case = f"{count} blocks"
    yield Figure("reopen", case, Unit.NANOSECONDS, Samples(tuple(opened)), goal=GOAL)
    yield Figure("reopen, process", case, Unit.NANOSECONDS, Samples(tuple(whole)))


def _run(session: Session, *arguments: str) -> dict[str, int]:
    """Run a child that ends by killing itself; return what it printed before."""
    done = session.run_child(_CHILD, *arguments)
    if done.returncode != -signal.SIGKILL:
        raise KvfsError(f"child failed: {_CHILD} {arguments[0]}: {done.stderr.strip()[-2000:]}")
    answer: dict[str, int] = json.loads(done.stdout)
    return answer
