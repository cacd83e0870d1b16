"""Walking through the crash points of a scenario.

A point is a position in the journal, a choice of what reached the medium, and a commit of the
catalog. A state counts once per distinct image. For a sample of images the recovery itself is
recorded and crashed.
"""

import gc
import time
import traceback
import zlib
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field

from tests.crash.bench import Bench
from tests.crash.events import Event, Journal, WriteBack
from tests.crash.medium import Image, Medium
from tests.crash.scenarios import Scenario, scenario_named
from tests.crash.verify import check_crashed, check_image, check_repaired, recover


@dataclass(frozen=True, slots=True)
class Plan:
    """How thoroughly to walk. One in `deep`, `goes_on`, `crashed` images is looked at more closely.

    Attributes:
        seed: Of everything random.
        turn: Number of the walk through all scenarios; the first one makes the systematic choices.
        randoms: Random choices per position.
        deep: Sample whose recovery is crashed in turn.
        goes_on: Sample that must go on working afterwards.
        crashed: Sample that `check` looks at before the recovery.
        checked: Sample that `check` looks at after it.
        repaired: Sample that `check --repair` has before the recovery.
        failures: After how many to stop.
        part: Sample of the points that is looked at at all.
    """

    seed: int
    turn: int = 0
    randoms: int = 4
    deep: int = 40
    goes_on: int = 16
    crashed: int = 8
    checked: int = 1
    repaired: int = 32
    failures: int = 5
    part: int = 1

    def takes(self, seed: str) -> bool:
        """Whether the image that comes of a seed is one to look at."""
        return self.part == 1 or zlib.crc32(seed.encode()) % self.part == 0


@dataclass(slots=True)
class Outcome:
    """What a walk found."""

    scenario: str
    digests: set[bytes] = field(default_factory=set)
    recoveries: int = 0
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class State:
    """One image and how to make it again. `inner`: the same, of the crash during recovery."""

    position: int
    label: str
    catalog: int
    image: Image
    inner: str = ""

    @property
    def point(self) -> str:
        outer = f"{self.position}/{self.label}/{self.catalog}"
        return f"{outer}+{self.inner}" if self.inner else outer


def walk(name: str, plan: Plan, only: str = "") -> Outcome:
    """Play a scenario and check every state; with `only`, the state of that name alone."""
    outcome = Outcome(name)
    scenario = scenario_named(name)
    started = time.perf_counter()
    bench = scenario.run(f"{plan.seed}")
    gc.collect()
    gc.freeze()
    gc.disable()  # collected now and then below: worlds are many, and small
    try:
        for state in _states(bench, scenario, plan, outcome, only):
            if only and state.point != only:
                continue
            _check(state, bench, scenario, plan, outcome)
            if len(outcome.failures) >= plan.failures:
                break
            if outcome.recoveries % 256 == 0:
                gc.collect()
    finally:
        gc.enable()
        gc.unfreeze()
        bench.close()
    outcome.seconds = time.perf_counter() - started
    return outcome


def _check(state: State, bench: Bench, scenario: Scenario, plan: Plan, outcome: Outcome) -> None:
    number = int.from_bytes(state.image.digest[8:], "little")
    outcome.recoveries += 1
    try:
        if number % plan.crashed == 0:
            check_crashed(state.image, scenario.geometry)
        if number % plan.repaired == 0:
            check_repaired(state.image, scenario.geometry, bench.oracle, state.position)
        check_image(
            state.image,
            scenario.geometry,
            bench.oracle,
            state.position,
            checks=number % plan.checked == 0,
            goes_on=number % plan.goes_on == 0,
        )
    except Exception:  # noqa: BLE001 - whatever goes wrong is a finding
        outcome.failures.append(
            f"{traceback.format_exc(limit=-6)}\nrepeat: python -m tests.crash.run "
            f"--seed {plan.seed} --turn {plan.turn} --randoms {plan.randoms} "
            f"--only '{scenario.name}:{state.point}'"
        )


def _states(
    bench: Bench, scenario: Scenario, plan: Plan, outcome: Outcome, only: str
) -> Iterator[State]:
    """Yield each distinct state once, those of crashed recoveries in between."""
    outer = only.partition("+")[0]
    seed = f"{plan.seed}/{plan.turn}/{scenario.name}"
    events = bench.journal.events
    for state in _enumerate(bench.base, events, bench.start, seed, plan, bench.start):
        if only and state.point != outer:
            continue
        if state.image.digest not in outcome.digests:
            outcome.digests.add(state.image.digest)
            yield state
        is_deep = int.from_bytes(state.image.digest[4:8], "little") % plan.deep == 0
        if is_deep and (not only or "+" in only):
            yield from _recovery_states(state, scenario, plan, outcome)


def _enumerate(
    base: Medium, events: list[Event], start: int, seed: str, plan: Plan, first: int
) -> Iterator[State]:
    medium = deepcopy(base)
    for position in range(start, len(events) + 1):
        if position > start:
            medium.apply(events[position - 1])
            if isinstance(events[position - 1], WriteBack):
                continue  # what may be found is the same as before
        if position < first:
            continue
        cache: dict[object, tuple[bytes, bytes]] = {}
        for choice in medium.choices(f"{seed}/{position}", plan.randoms, plan.turn):
            for catalog in medium.catalogs():
                if not plan.takes(f"{seed}/{position}/{choice.label}/{catalog}"):
                    continue
                image = medium.image(choice, catalog, cache)
                yield State(position, choice.label, catalog, image)


def _recovery_states(
    state: State, scenario: Scenario, plan: Plan, outcome: Outcome
) -> Iterator[State]:
    """Record the recovery from an image and crash it at each of its steps."""
    journal = Journal(scenario.geometry.kinds, state.image.disks, state.image.catalog)
    try:
        recover(state.image, scenario.geometry, journal).discard()
    except Exception:  # noqa: BLE001
        return  # reported by the check of the state itself
    base = Medium.of(journal)
    seed = f"{plan.seed}/{plan.turn}/{scenario.name}/{state.point}"
    inner_plan = Plan(plan.seed, turn=1, randoms=3)
    for inner in _enumerate(base, journal.events, 0, seed, inner_plan, 0):
        if inner.image.digest not in outcome.digests:
            outcome.digests.add(inner.image.digest)
            yield State(state.position, state.label, state.catalog, inner.image, inner.point)
