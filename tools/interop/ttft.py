"""`make bench-vllm`: time to first token of a long prompt, computed, and loaded from a tier.

Layer: tool.

- One engine for each way, all alive at once, asked in turns that rotate: a busy machine slows all.
  A sample is one repeat; the ratio is taken repeat by repeat.
- Each repeat has a prompt of its own, for each state of the page cache. Every engine answers it
  once, which stores it, and forgets it: vLLM's prefix cache is off, its tier in host memory is
  dropped. The second answer is measured. It counts only if vLLM says that every whole chunk was
  read from the tier, and if its tokens are those of the engine without tiers.
- A third answer, with the chunks in vLLM's host memory, shows what no tier could be better than.
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict, deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from interop import venvs
from interop.cases import CaseError, Place, UnavailableError
from interop.peers import vllm
from interop.peers.vllm_tier import CHUNK_TOKENS, beside, make_pool
from interop.peers.vllm_ttft import TOKENS
from interop.site import MARK, QUIET, TOOLS, Site
from kvfs import __version__
from kvfs.bench.figure import Baseline, Figure, Samples, Unit
from kvfs.bench.report import Machine, figures_table, this_machine

REPEATS: Final = 5
_POOL_BYTES: Final = 4 << 30
_COLD: Final = "computed"
_FS: Final = "fs tier, plain directory"
_MEMORY: Final = "host memory of vLLM"
_WARM: Final = "page cache warm"
_DROPPED: Final = "page cache dropped"
_FIRST: Final = "first time"
_DROP_CACHES: Final = Path("/proc/sys/vm/drop_caches")
_WHOLE: Final = (TOKENS - 1) // CHUNK_TOKENS * CHUNK_TOKENS


def main() -> int:
    """Measure and print; exit status 1 if an engine did not do what it should."""
    arguments = _arguments()
    root = Path(tempfile.mkdtemp(prefix="kvfs-ttft-", dir=arguments.directory))
    site = Site(root, "vllm", _POOL_BYTES)
    machine, reason = this_machine(), _why_not_dropped()
    states = [_WARM] if reason else [_WARM, _DROPPED]
    try:
        venvs.prepare(site.venv)
        site.create()
        site.mount()
        with contextlib.ExitStack() as stack:
            bench = _Bench(_start(site, stack), states)
            for repeat in range(-1, arguments.repeats):  # the first one warms up
                sys.stderr.write(f"bench: time to first token {repeat + 1}/{arguments.repeats}\n")
                bench.repeat(repeat)
        site.unmount()
        site.check()
    except (CaseError, UnavailableError) as error:
        sys.stderr.write(f"bench: {error}\n")
        return 1
    finally:
        site.abandon()
        shutil.rmtree(root, ignore_errors=True)
    figures = list(bench.figures())
    if arguments.json:
        _write_json(arguments.json, machine, figures)
    skipped = f"\nskipped  {_DROPPED}: {reason}\n" if reason else ""
    sys.stdout.write(
        f"{machine.to_text()}, {this_machine().load:.1f} at the end\n"
        f"  scale  {TOKENS} tokens of prompt, {_WHOLE} of them in chunks of {CHUNK_TOKENS}, "
        f"{arguments.repeats} repeats\n\n{figures_table(figures)}{skipped}"
    )
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="interop.ttft", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--repeats", type=int, default=REPEATS, help="samples (%(default)s)")
    parser.add_argument("--directory", type=Path, help="for pools and plain files (TMPDIR)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write every sample as JSON")
    arguments = parser.parse_args()
    if arguments.repeats < 1:
        parser.error("--repeats must be at least 1")
    return arguments


def _why_not_dropped() -> str:
    """Return why the page cache cannot be dropped here, or nothing."""
    try:
        _drop()
    except OSError as error:
        return f"{_DROP_CACHES}: {error.strerror}; it takes root"
    return ""


def _drop() -> None:
    """Write back what is dirty, then drop clean pages, names and inodes from memory."""
    os.sync()
    _DROP_CACHES.write_text("3")


def _start(site: Site, stack: contextlib.ExitStack) -> "dict[str, _Engine]":
    """Start an engine for each way; return when all answer."""
    own = make_pool(site, "own")
    tiers: dict[str, dict[str, str]] = {
        _COLD: {},
        _FS: {"type": "fs", "root_dir": str(site.directory(Place.PLAIN, "vllm"))},
        "fs tier, mount": {"type": "fs", "root_dir": str(site.directory(Place.MOUNT, "vllm"))},
        "kvfs tier, own pool": {"type": "kvfs", "pool": str(own)},
        "kvfs tier, pool of the mount": {"type": "kvfs", "pool": str(site.root / "pool")},
    }
    model = vllm.checkpoint(site)
    engines = {}
    for way, tier in tiers.items():
        engines[way] = stack.enter_context(_engine(site, model, tier, way))
        engines[way].answer()
    return engines


@contextlib.contextmanager
def _engine(site: Site, model: Path, tier: dict[str, str], way: str) -> "Iterator[_Engine]":
    path = os.pathsep.join(str(one) for one in (beside(site), TOOLS))
    command = [str(site.python), "-m", "interop.peers.vllm_ttft", str(model), json.dumps(tier)]
    log = site.scratch / f"{way.replace(' ', '-')}.log"
    with log.open("wb") as said:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True,
            env={**os.environ, **QUIET, **vllm.ENV, "PYTHONPATH": path},
            cwd=site.scratch,
        )  # fmt: skip
    try:
        yield _Engine(way, process, log)
        process.communicate(timeout=120)  # no more orders: it closes its pool
    finally:
        process.kill()
        process.wait()


class _Engine:
    """An engine in a process of its own."""

    def __init__(self, way: str, process: "subprocess.Popen[str]", log: Path) -> None:
        self.way, self._process, self._log = way, process, log
        self._complaints: deque[str] = deque(maxlen=2)

    def ask(self, **order: Any) -> dict[str, Any]:
        """Give an order, wait for the answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{json.dumps(order)}\n")
        self._process.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """Wait for an answer."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(MARK):
                answer: dict[str, Any] = json.loads(line.removeprefix(MARK))
                return answer
            if " ERROR " in line:
                self._complaints.append(line.strip())
        said = self._log.read_text(errors="replace").strip().splitlines()[-2:]
        raise CaseError(f"{self.way}: the engine has ended: {' / '.join(said)[-400:]}")

    def complaints(self) -> str:
        """Return the errors that vLLM logged last."""
        return " / ".join(self._complaints)[-400:]


class _Bench:
    """The samples of all ways."""

    def __init__(self, engines: dict[str, _Engine], states: list[str]) -> None:
        self._engines, self._states = engines, states
        self._times_ns: dict[tuple[str, str], list[int]] = defaultdict(list)
        self._read_bytes = 0

    def repeat(self, number: int) -> None:
        """Take one sample of everything; that of repeat -1 is forgotten."""
        ways = list(self._engines)
        ways = ways[number % len(ways) :] + ways[: number % len(ways)]
        for at, state in enumerate(self._states):
            prompt = (number + 1) * len(self._states) + at
            for way, answer in self._answers(ways, prompt, state):
                if number >= 0:
                    self._times_ns[way].append(answer["first_ns"])

    def _answers(
        self, ways: list[str], prompt: int, state: str
    ) -> Iterator[tuple[tuple[str, str], dict[str, Any]]]:
        """Yield way, state and answer: stored, loaded from the tier, taken from host memory."""
        stored = {way: self._ask(way, prompt, cached=0) for way in ways}
        for way in ways:
            self._engines[way].ask(forget=True)
        for way in ways:
            if state == _DROPPED:
                _drop()
            cached = 0 if way == _COLD else _WHOLE
            answer = self._ask(way, prompt, cached=cached, is_loaded=way != _COLD)
            if answer["tokens"] != stored[_COLD]["tokens"]:
                raise CaseError(f"{way}: another answer than the engine without tiers")
            yield (way, state), answer
        if state == _WARM:
            for way in ways:
                if way != _COLD:
                    yield (way, _FIRST), stored[way]
            yield (_MEMORY, _WARM), self._ask(_FS, prompt, cached=_WHOLE)

    def _ask(
        self, way: str, prompt: int, *, cached: int, is_loaded: bool = False
    ) -> dict[str, Any]:
        """Ask, and see to it that what was not computed came from where it should."""
        answer = self._engines[way].ask(prompt=prompt)
        if answer["cached"] != cached:
            said = self._engines[way].complaints()
            raise CaseError(f"{way}: {answer['cached']} tokens were there, not {cached}; {said}")
        if bool(answer["read_bytes"]) != is_loaded:
            raise CaseError(f"{way}: {answer['read_bytes']} bytes came from the tier")
        if is_loaded:
            self._read_bytes = self._read_bytes or answer["read_bytes"]
            if answer["read_bytes"] != self._read_bytes:
                raise CaseError(f"{way}: {answer['read_bytes']} bytes, not {self._read_bytes}")
        return answer

    def figures(self) -> Iterator[Figure]:
        """Yield what was measured: against computing it, and against the file tier on the disk."""
        for state in (*self._states, _FIRST):
            cold = Baseline(_COLD, self._samples(_COLD, _WARM if state == _FIRST else state))
            for way in [*self._engines, _MEMORY]:
                if way == _COLD or (way, state) not in self._times_ns:
                    continue
                values = self._samples(way, state)
                yield Figure(f"first token, {way}", state, Unit.NANOSECONDS, values, cold)
                if way not in (_FS, _MEMORY) and state != _FIRST:
                    plain = Baseline(_FS, self._samples(_FS, state))
                    yield Figure(f"first token, {way}", state, Unit.NANOSECONDS, values, plain)

    def _samples(self, way: str, state: str) -> Samples:
        return Samples(tuple(float(time_ns) for time_ns in self._times_ns[way, state]))


def _write_json(path: Path, machine: Machine, figures: list[Figure]) -> None:
    report = {
        "schema": {"command": "bench-vllm", "version": 1}, "kvfs": __version__,
        "machine": machine.to_json(), "figures": [figure.to_json() for figure in figures],
    }  # fmt: skip
    path.write_text(f"{json.dumps(report, indent=1)}\n")


if __name__ == "__main__":
    sys.exit(main())
