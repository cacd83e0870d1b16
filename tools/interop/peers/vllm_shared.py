"""Two vLLM engines at once on one pool that `kvfs serve` owns, and an owner that is killed.

Layer: tool.

- Both engines answer prompts of their own and one that they share; then each is asked what the
  other was asked before, and must find all of it in the pool.
- The owner is killed and started again while both generate. Each answer is compared with that of
  an engine without kvfs; afterwards each must find again what the other stores.
- Files in a directory say how far everybody is. The engines' own caches are dropped after each
  answer, so that what is found is found in the pool.
"""

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from interop.cases import CaseError, Figures
from interop.driver import require, tell
from interop.peers.vllm_tier import (
    CHUNK_TOKENS,
    ask,
    beside,
    counters,
    encode,
    engine,
    forget,
    make_pool,
    require_same,
)
from interop.site import Process, Site

_PROMPTS: Final = 11
_SHARED: Final = 8
# What each engine is asked first; then what it is asked once the owner is back.
_FIRST: Final = {"A": (_SHARED, 0, 1, 2, 3), "B": (_SHARED, 4, 5, 6, 7)}
_LAST: Final = {"A": 9, "B": 10}
_ANSWER: Final = 12
_WAIT_S: Final = 900.0
_POLL_S: Final = 0.1


def run(site: Site, model: Path, env: dict[str, str]) -> Figures:
    """Run one engine alone, then two on a pool; look at what they left behind."""
    pool, folder = make_pool(site, "shared"), site.scratch / "shared"
    folder.mkdir()
    here = {**env, "PYTHONPATH": f"{beside(site)}{os.pathsep}{Path(__file__).parents[2]}",
            "OMP_NUM_THREADS": "1"}  # fmt: skip
    module = "interop.peers.vllm_shared"
    command = (str(site.python), "-m", module)
    site.drive("vllm_shared", "alone", str(model), "", str(folder), timeout_s=_WAIT_S, env=here)
    with contextlib.ExitStack() as stack:
        owner = stack.enter_context(served(site, pool))
        engines = {
            name: stack.enter_context(
                site.started(*command, name, str(model), str(pool), str(folder), env=here)
            )
            for name in _FIRST
        }
        wait = partial(_wait, engines=engines)
        wait("both engines on the pool", lambda: _has_all(folder, "asked"))
        status = _status(site, pool)
        if status["clients"] != len(engines):
            raise CaseError(f"{status['clients']} clients of the pool, not {len(engines)}")
        wait("answers from the pool", lambda: min(_answered(folder)) >= 1)
        owner.popen.kill()
        owner.popen.wait()
        before = _answered(folder)
        wait("answers without an owner", lambda: _is_beyond(_answered(folder), before, 2))
        missing = _answered(folder)
        owner = stack.enter_context(served(site, pool))
        (folder / "back").touch()
        for process in engines.values():
            process.wait(_WAIT_S)
        held = _end_owner(site, pool, owner)
    figures = {name: process.told() for name, process in engines.items()}
    if held:
        raise CaseError(f"{held} segments are held by clients that are gone")
    site.verify(pool)
    told = {
        f"{what}, {name}": value for name, one in figures.items() for what, value in one.items()
    }
    return {**told, "answers without an owner": sum(missing) - sum(before),
            "segments held at the end": held}  # fmt: skip


@contextlib.contextmanager
def served(site: Site, pool: Path, *options: str) -> Iterator[Process]:
    """Serve a pool; what is left of it ends with the context."""
    serve = (sys.executable, "-m", "kvfs.cli.kvfs", "serve", "--foreground", *options, str(pool))
    with site.started(*serve) as process:
        _wait("a pool that is served", partial(_is_served, pool), {"owner": process})
        yield process


def _is_served(pool: Path) -> bool:
    from kvfs.clients.remote import RemotePool
    from kvfs.errors import UnavailableError

    try:
        RemotePool(pool).close()
    except UnavailableError:
        return False
    return True


def _status(site: Site, pool: Path) -> dict[str, Any]:
    status: dict[str, Any] = json.loads(site.admin(pool, "pool", "status", "--json"))
    return status


def _wait(what: str, is_there: Callable[[], bool], engines: dict[str, Process]) -> None:
    """Wait until it is there, or somebody has ended, or it takes too long."""
    deadline = time.monotonic() + _WAIT_S
    while not bool(is_there()):
        for name, process in engines.items():
            if process.popen.poll() is not None:
                raise CaseError(f"{what}: {name} has ended: {process.last_lines()}")
        if time.monotonic() > deadline:
            raise CaseError(f"{what}: not there after {_WAIT_S:g} s")
        time.sleep(_POLL_S)


def wait_no_clients(site: Site, pool: Path, owner: Process) -> None:
    """Wait until the owner of a pool has seen all its clients end."""
    _wait("no clients", lambda: not _status(site, pool)["clients"], {"owner": owner})


def _end_owner(site: Site, pool: Path, owner: Process) -> int:
    """End the owner, once the engines are gone; return how many segments they still held."""
    wait_no_clients(site, pool, owner)
    held = int(_status(site, pool)["client_segments"])
    owner.popen.send_signal(signal.SIGTERM)
    owner.wait(_WAIT_S)
    return held


def _has_all(folder: Path, what: str) -> bool:
    return all((folder / f"{what}.{name}").exists() for name in _FIRST)


def _answered(folder: Path) -> list[int]:
    """Return how many answers each engine has given since it read what the other one stored."""
    paths = [folder / f"answered.{name}" for name in _FIRST]
    return [int(path.read_text()) if path.exists() else 0 for path in paths]


def _is_beyond(now: Sequence[int], before: Sequence[int], by: int) -> bool:
    """Whether each has given so many answers more."""
    return all(one - other >= by for one, other in zip(now, before, strict=True))


# --- in the peer's venv


def main() -> None:
    """Answer, and compare with what the engine alone has answered."""
    name, model, pool, folder = *sys.argv[1:4], Path(sys.argv[4])
    llm = engine(model, pool or None)
    told = folder / "alone.json"
    if name == "alone":
        told.write_text(json.dumps([_answer(llm, number) for number in range(_PROMPTS)]))
        tell({})
    else:
        tell(_Engine(llm, name, folder, json.loads(told.read_text())).run())
    llm.llm_engine.engine_core.shutdown()
    sys.stdout.flush()
    os._exit(0)  # its threads of the CPU do not always end by themselves


class _Engine:
    """One of the two engines."""

    def __init__(self, llm: Any, name: str, folder: Path, alone: list[dict[str, Any]]) -> None:
        self._llm, self._name, self._folder, self._alone = llm, name, folder, alone
        (self._other,) = set(_FIRST) - {name}
        self._answered = 0

    def run(self) -> Figures:
        """Ask what is to be asked."""
        for number in _FIRST[self._name]:
            self._ask(number)
        self._meet("asked")
        stored = counters(self._llm)
        cached = [self._ask(number)["cached"] for number in _FIRST[self._other]]
        wanted = [self._whole(number) for number in _FIRST[self._other]]
        require(cached == wanted, f"of the other's prompts {cached} tokens came, not {wanted}")
        found = counters(self._llm)
        hits = found.get("hits", 0) - stored.get("hits", 0)
        loaded = found.get("loaded_chunks", 0) - stored.get("loaded_chunks", 0)
        require(loaded == sum(wanted) // CHUNK_TOKENS, f"{loaded} chunks loaded for {wanted}")
        self._go_on()
        self._ask(_LAST[self._name])
        self._meet("asked last")
        last = self._ask(_LAST[self._other])["cached"]
        whole = self._whole(_LAST[self._other])
        require(last == whole, f"from the new owner {last} tokens came, not {whole}")
        return {
            "hits": hits, "chunks loaded": loaded,
            "tokens of the other's from kvfs": f"{sum(cached)} of {sum(self._lengths())}",
            "after the owner's return": f"{last} of {self._length(_LAST[self._other])}",
        }  # fmt: skip

    def _go_on(self) -> None:
        """Go on generating until the owner is back, and something has come from it again."""
        deadline, numbers = time.monotonic() + _WAIT_S, _FIRST[self._other]
        back = self._folder / "back"
        while True:
            was_back = back.exists()
            is_hit = bool(self._ask(numbers[self._answered % len(numbers)])["cached"])
            self._answered += 1
            _write(self._folder / f"answered.{self._name}", str(self._answered))
            if was_back and is_hit:
                return
            require(time.monotonic() < deadline, "nothing came from the owner's successor")

    def _ask(self, number: int) -> dict[str, Any]:
        answer = _answer(self._llm, number)
        require_same(answer, self._alone[number])
        return answer

    def _meet(self, what: str) -> None:
        """Wait for the other engine."""
        deadline, other = time.monotonic() + _WAIT_S, self._folder / f"{what}.{self._other}"
        (self._folder / f"{what}.{self._name}").touch()
        while not other.exists():
            require(time.monotonic() < deadline, f"{self._other} did not come: {what}")
            time.sleep(_POLL_S)

    def _length(self, number: int) -> int:
        return len(self._alone[number]["ids"])

    def _lengths(self) -> list[int]:
        return [self._length(number) for number in _FIRST[self._other]]

    def _whole(self, number: int) -> int:
        """Return the tokens in whole chunks: the last token is computed in any case."""
        return (self._length(number) - 1) // CHUNK_TOKENS * CHUNK_TOKENS


def _answer(llm: Any, number: int) -> dict[str, Any]:
    """Answer a prompt, then forget it in the engine's own memory."""
    answer = ask(llm, encode(llm, _prompt(number)), _ANSWER)
    forget(llm)
    return answer


def _prompt(number: int) -> str:
    """Return a text that differs from the others from its first word on, and so does its end."""
    towns = ("Arden", "Belmont", "Corley", "Dunmore", "Elstow", "Farley", "Garth", "Hilton")
    lines = [f"In {town}, house number {7 * i + number} keeps a book of year {1500 + 13 * i}."
             for i, town in enumerate(towns * 2)]  # fmt: skip
    return f"{number + 2} rivers. {' '.join(lines)} Again: in {towns[number % 8]}, house number"


def _write(path: Path, text: str) -> None:
    """Write a file that is whole whenever it is read."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text)
    temporary.rename(path)


if __name__ == "__main__":
    main()
