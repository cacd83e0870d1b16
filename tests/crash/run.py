"""Enumerates crash points: `python -m tests.crash.run --seed 7`.

Walks through all scenarios again and again, each time with other random choices, until so many
distinct images have been recovered from and checked. A failure prints the command that repeats
it.
"""

import argparse
import itertools
import multiprocessing
import sys
import time
from collections.abc import Iterator

from tests.crash.enumeration import Outcome, Plan, walk
from tests.crash.scenarios import names_of_turn

_Task = tuple[str, Plan]


def _walk(task: _Task) -> Outcome:
    return walk(*task)


def _tasks(seed: int, randoms: int, checked: int, part: int) -> Iterator[_Task]:
    """Yield the walks without end: all scenarios of the first turn, of the second, and so on."""
    for turn in itertools.count():
        for name in names_of_turn(turn):
            yield name, Plan(seed, turn=turn, randoms=randoms, checked=checked, part=part)


class Tally:
    """What all walks together found."""

    def __init__(self, wanted: int) -> None:
        self.wanted = wanted
        self.digests: set[bytes] = set()
        self.by_scenario: dict[str, int] = {}
        self.recoveries = 0
        self.worker_seconds = 0.0
        self.failures: list[str] = []
        self._started = time.perf_counter()

    @property
    def is_done(self) -> bool:
        return len(self.digests) >= self.wanted or bool(self.failures)

    def add(self, outcome: Outcome) -> None:
        before = len(self.digests)
        self.digests |= outcome.digests
        name = outcome.scenario.partition("-")[0]
        more = len(self.digests) - before
        self.by_scenario[name] = self.by_scenario.get(name, 0) + more
        self.recoveries += outcome.recoveries
        self.worker_seconds += outcome.seconds
        self.failures += outcome.failures

    def line(self) -> str:
        seconds = time.perf_counter() - self._started
        each = 1000 * self.worker_seconds / max(1, self.recoveries)
        return (
            f"{len(self.digests)} distinct states, {self.recoveries} recoveries, "
            f"{each:.1f} ms each, "
            f"{len(self.failures)} failures, {seconds:.0f} s"
        )


def run(seed: int, states: int, jobs: int, randoms: int, checked: int = 1, part: int = 1) -> Tally:
    """Walk until `states` distinct images were checked, or something failed."""
    tally = Tally(states)
    shown = 0
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        running: list[multiprocessing.pool.AsyncResult[Outcome]] = []
        tasks = _tasks(seed, randoms, checked, part)
        while not tally.is_done:
            while len(running) < 4 * jobs:  # walks differ in length, and are taken in order
                running.append(pool.apply_async(_walk, (next(tasks),)))
            tally.add(running.pop(0).get())
            if len(tally.digests) - shown >= 5000:
                shown = len(tally.digests)
                print(tally.line(), flush=True)
        pool.terminate()
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--states", type=int, default=300_000, help="distinct images to check")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--randoms", type=int, default=6, help="random choices per position")
    parser.add_argument("--checked", type=int, default=1, help="run `check` on one in so many")
    parser.add_argument("--part", type=int, default=1, help="look at one image in so many")
    parser.add_argument("--turn", type=int, default=0, help="with --only: the turn of the state")
    parser.add_argument("--only", default="", help="repeat one state: scenario:point")
    arguments = parser.parse_args()
    if arguments.only:
        name, _, point = arguments.only.partition(":")
        plan = Plan(arguments.seed, turn=arguments.turn, randoms=arguments.randoms)
        outcome = walk(name, plan, point)
        print("\n".join(outcome.failures) or f"no failure in {outcome.recoveries} states")
        return 1 if outcome.failures or not outcome.recoveries else 0
    print(f"seed {arguments.seed}, {arguments.states} states, {arguments.jobs} processes")
    tally = run(
        arguments.seed, arguments.states, arguments.jobs, arguments.randoms, arguments.checked,
        arguments.part,
    )  # fmt: skip
    for name, count in sorted(tally.by_scenario.items()):
        print(f"{count:8d} {name}")
    for failure in tally.failures:
        print(failure)
    print(tally.line())
    return 1 if tally.failures else 0


if __name__ == "__main__":
    sys.exit(main())
