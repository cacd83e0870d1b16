"""The crash enumerator: thousands of states, and proof that it sees what it is there to see."""

import faulthandler
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from kvfs.devices.directory import DirectoryDevice
from kvfs.engine import recovery
from kvfs.engine.catalog import Catalog
from kvfs.engine.evictor import Evictor
from kvfs.engine.log import SegmentLog
from kvfs.engine.writer import Writer
from tests.crash.enumeration import Plan, walk
from tests.crash.simfs import SimFile

STATES = 20_000
PART = 5  # in the gate: of the same walks, one state in so many
_NEVER = 1 << 40
_QUICK = Plan(1, turn=1, randoms=4, deep=_NEVER, goes_on=_NEVER, crashed=_NEVER, failures=1)
_ROOT = Path(__file__).parents[2]


@pytest.mark.crash
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "part", [PART, pytest.param(1, marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_every_crash_point_of_a_disk_recovers(part: int) -> None:
    states = ["--states", str(STATES // part), "--part", str(part)]
    enumerate_states("--domains", "block", "--randoms", "3", *states)


@pytest.mark.crash
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "sample",
    [
        pytest.param((2, 60, 1000), id="some"),
        pytest.param((3, 1, 40), id="all", marks=pytest.mark.slow),
    ],
)
def test_every_scenario_recovers_in_every_domain(sample: tuple[int, int, int]) -> None:
    """Memory that stays, and memory that does not: all scenarios once, of their states a sample."""
    randoms, part, deep = sample
    enumerate_states(
        "--domains", "pmem,page,volatile", "--turn", "1", "--turns", "1", "--states", "0",
        "--randoms", str(randoms), "--part", str(part), "--deep", str(deep),
    )  # fmt: skip


def enumerate_states(*arguments: str) -> None:
    """Run the enumerator; two processes, because states are independent."""
    faulthandler.cancel_dump_traceback_later()  # nothing hangs: it takes a minute or two
    command = [sys.executable, "-m", "tests.crash.run", "--seed", "1", "--jobs", "2"]
    done = subprocess.run(
        [*command, "--checked", "3", *arguments],
        cwd=_ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def _nothing(*_arguments: Any, **_options: Any) -> None:
    return None


def _relocate_without_persist(original: Callable[..., bool]) -> Callable[..., bool]:
    def relocate(evictor: Evictor, *arguments: Any) -> bool:
        with mock.patch.object(Writer, "persist_holding", _nothing):
            return original(evictor, *arguments)

    return relocate


def _covered_without_persist(log: SegmentLog, *, wanted: int | None = None) -> None:
    log.state.persisted_count = log.state.entry_count


MUTANTS: dict[str, tuple[str, Any, str, Any]] = {
    "put that does not persist": ("put", SegmentLog, "persist", _covered_without_persist),
    "flush that does not persist": (
        "group_commit", SegmentLog, "persist", _covered_without_persist),
    "names that are not persisted": ("seal", DirectoryDevice, "persist_names", _nothing),
    "catalog that is not synced": ("contexts", Catalog, "sync", _nothing),
    "file content dropped before its name": ("renamed_files", Catalog, "sync", _nothing),
    "relocation that does not persist": (
        "relocate", Evictor, "_relocate", _relocate_without_persist(Evictor._relocate)),
    "superblock that is not synced": ("superblock", SimFile, "sync", _nothing),
    "original freed for an unverified copy": (
        "relocate_unsealed", recovery, "_preferable", lambda _s, _d, _g, indices: indices),
    "torn first header taken for damage": ("relocate", recovery, "is_unborn", _nothing),
}  # fmt: skip


@pytest.mark.crash
@pytest.mark.parametrize("name", MUTANTS)
def test_sees_a_broken_engine(name: str, expected_warnings: list[str]) -> None:
    expected_warnings.append("set aside")
    scenario, target, attribute, replacement = MUTANTS[name]
    with mock.patch.object(target, attribute, replacement):
        outcome = walk(scenario, _QUICK)
    assert outcome.failures, f"{name}: not seen in {outcome.recoveries} states"


@pytest.mark.crash
def test_a_failure_names_the_state_to_repeat() -> None:
    with mock.patch.object(SegmentLog, "persist", _covered_without_persist):
        outcome = walk("put", Plan(1))
        repeat = outcome.failures[0].rpartition("--only ")[2].strip("'\n")
        name, _, point = repeat.partition(":")
        again = walk(name, Plan(1), point)
    assert again.recoveries == 1
    assert len(again.failures) == 1
