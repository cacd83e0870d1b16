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
from dataclasses import dataclass, replace

from tests.crash.enumeration import Outcome, Plan, walk
from tests.crash.scenarios import DOMAINS, names_of_turn

_Task = tuple[str, Plan]


def _walk(task: _Task) -> Outcome:
    return walk(*task)


@dataclass(frozen=True, slots=True)
class Run:
    """What to walk: every scenario in these domains, turn after turn, as long as it takes.

    Attributes:
        seed: Of everything random.
        states: How many distinct images are enough; 0: there are as many as `turns` make.
        first_turn: Number of the first turn; turn 0 makes the systematic choices.
        turns: How many; 0: without end.
        plan: How thoroughly; its seed and turn do not count.
    """

    seed: int
    states: int
    domains: tuple[str, ...]
    first_turn: int
    turns: int
    plan: Plan

    def tasks(self) -> Iterator[_Task]:
        """Yield the walks: all scenarios of the first turn, of the second, and so on."""
        for turn in itertools.count(self.first_turn):
            if self.turns and turn == self.first_turn + self.turns:
                return
            for name in names_of_turn(turn, self.domains):
                yield name, replace(self.plan, seed=self.seed, turn=turn)


class Tally:
    """What all walks together found."""

    def __init__(self, wanted: int) -> None:
        self.wanted = wanted
        self.digests: set[bytes] = set()
        self.by_scenario: dict[str, int] = {}
        self.by_domain: dict[str, int] = {}
        self.recoveries = 0
        self.worker_seconds = 0.0
        self.failures: list[str] = []
        self._started = time.perf_counter()

    @property
    def is_done(self) -> bool:
        is_enough = self.wanted > 0 and len(self.digests) >= self.wanted
        return is_enough or bool(self.failures)

    def add(self, outcome: Outcome) -> None:
        before = len(self.digests)
        self.digests |= outcome.digests
        more = len(self.digests) - before
        domain, _, name = outcome.scenario.partition("-")[0].rpartition("/")
        self.by_scenario[name] = self.by_scenario.get(name, 0) + more
        self.by_domain[domain] = self.by_domain.get(domain, 0) + more
        self.recoveries += outcome.recoveries
        self.worker_seconds += outcome.seconds
        self.failures += outcome.failures

    def line(self) -> str:
        seconds = time.perf_counter() - self._started
        domains = ", ".join(f"{name} {count}" for name, count in sorted(self.by_domain.items()))
        each = 1000 * self.worker_seconds / max(1, self.recoveries)
        return (
            f"{len(self.digests)} distinct states ({domains}), {self.recoveries} recoveries, "
            f"{each:.1f} ms each, "
            f"{len(self.failures)} failures, {seconds:.0f} s"
        )


def run(what: Run, jobs: int) -> Tally:
    """Walk until enough distinct images were checked, or something failed."""
    tally = Tally(what.states)
    shown = 0
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        running: list[multiprocessing.pool.AsyncResult[Outcome]] = []
        tasks = what.tasks()
        while not tally.is_done:
            more = itertools.islice(tasks, 4 * jobs - len(running))  # walks differ in length
            running += [pool.apply_async(_walk, (task,)) for task in more]
            if not running:
                break
            tally.add(running.pop(0).get())  # in order
            if len(tally.digests) - shown >= 5000:
                shown = len(tally.digests)
                print(tally.line(), flush=True)
        pool.terminate()
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--states", type=int, default=1_000_000, help="distinct images, 0: all")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--randoms", type=int, default=6, help="random choices per position")
    parser.add_argument("--checked", type=int, default=1, help="run `check` on one in so many")
    parser.add_argument("--deep", type=int, default=40, help="crash the recovery of one in so many")
    parser.add_argument("--part", type=int, default=1, help="look at one point in so many")
    parser.add_argument("--domains", default=",".join(DOMAINS), help="of persistence")
    parser.add_argument("--turn", type=int, default=0, help="the first turn; with --only: its turn")
    parser.add_argument("--turns", type=int, default=0, help="how many; 0: until there are enough")
    parser.add_argument("--only", default="", help="repeat one state: domain/scenario:point")
    arguments = parser.parse_args()
    if arguments.only:
        name, _, point = arguments.only.partition(":")
        plan = Plan(arguments.seed, turn=arguments.turn, randoms=arguments.randoms)
        outcome = walk(name, plan, point)
        print("\n".join(outcome.failures) or f"no failure in {outcome.recoveries} states")
        return 1 if outcome.failures or not outcome.recoveries else 0
    print(f"seed {arguments.seed}, {arguments.states} states, {arguments.jobs} processes")
    domains = tuple(arguments.domains.split(","))
    plan = Plan(
        0,
        randoms=arguments.randoms,
        deep=arguments.deep,
        checked=arguments.checked,
        part=arguments.part,
    )
    what = Run(
        arguments.seed, arguments.states, domains, arguments.turn, arguments.turns, plan
    )  # fmt: skip
    tally = run(what, arguments.jobs)
    for name, count in sorted(tally.by_scenario.items()):
        print(f"{count:8d} {name}")
    for failure in tally.failures:
        print(failure)
    print(tally.line())
    return 1 if tally.failures else 0


if __name__ == "__main__":
    sys.exit(main())
