"""The bench: arithmetic of figures, and that every bench runs and answers in form.

No times are asserted: only that figures are there, whole and consistent.
"""

import argparse
import io
import json
import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from kvfs.bench import run
from kvfs.bench.figure import (
    Baseline,
    Cost,
    Figure,
    Goal,
    GoalKind,
    Samples,
    Unit,
    at_most,
    ratio_at_least,
)
from kvfs.bench.mounted import mounted, new_pool, opened
from kvfs.bench.race import Race, cpu_ns
from kvfs.bench.report import Machine, Report
from kvfs.bench.session import Progress, Scale, Session, SkipError
from kvfs.bench.stopwatch import Stopwatch
from kvfs.clock import ManualClock
from kvfs.errors import UsageError
from kvfs.fuse.mountpoint import mount_entries
from kvfs.units import GIB, KIB, MIB
from tests.fuse.mounting import wait_until

# What each bench must yield at the tiny scale: names of figures.
EXPECTED = {
    "put": {"put", "put evicting"},
    "put-directory": {"put directory", "put directory sync"},
    "read": {"read_into"},
    "view": {
        "view open, per extent",
        "view open, whole",
        "view close, per extent",
        "view first sum",
        "view sum",
    },
    "lookup": {"lookup", "match_prefix"},
    "clients": {
        "client lookup",
        "client lookup, p99",
        *(
            f"clients {kind}{what}"
            for kind in ("put", "put, shared", "read_into")
            for what in ("", ": owner")
        ),
    },
    "reopen": {"reopen", "reopen, process"},
    "devices-file": {"device write", "device read"},
    "devices-memory": {"device put", "device read"},
    "devices-reopen": {"device reopen", "device reopen, process"},
    "mount-file": {"mount read 1 MiB", "mount mmap sum", "mount O_DIRECT 1 MiB"},
    "mount-context": {"mount read 1 MiB", "mount mmap sum", "mount O_DIRECT 1 MiB"},
    "mount-random": {"mount 4 KiB random"},
    "mount-write": {
        "mount write, rename",
        "mount write, bytes written per byte",
        "mount write, files beyond segments",
    },
    "mount-names": {
        "mount missing name",
        "mount open, close",
        "mount scandir",
        "mount scandir and stat",
    },
    "mount-cache": {"mount page cache, open", "mount page cache, closed"},
}


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    run.add_arguments(parser)
    return parser.parse_args(words)


def scale(**changes: Any) -> Scale:
    usual = {"size_bytes": GIB, "block_count": 1000, "repeats": 5, "directory": Path("/tmp")}
    return Scale(**(usual | changes))


def check_figure(figure: dict[str, Any], repeats: int) -> None:
    assert set(figure) == {"name", "case", "unit", "samples", "median", "low", "high", "baseline",
                           "ratio", "goal", "is_met", "cost"}  # fmt: skip
    assert figure["unit"] in {unit.value for unit in Unit}
    parts = [figure, *(figure[name] for name in ("baseline", "ratio") if figure[name])]
    for part in parts:
        assert len(part["samples"]) == repeats
        # What lies on the device beside full segments, and stays cached, may be nothing.
        is_rate = figure["unit"] not in {"count", "bytes"}
        assert all(value > 0 or not is_rate for value in part["samples"])
        assert part["low"] <= part["median"] <= part["high"]
    assert (figure["baseline"] is None) == (figure["ratio"] is None)
    assert (figure["goal"] is None) == (figure["is_met"] is None)
    if cost := figure["cost"]:
        assert cost["per"] == ("GiB" if figure["unit"] == "bytes_per_s" else "1000 ops")
        assert cost["owner"] is not None, "a figure of a mount names its owner"
        assert all(cost[role] >= 0 for role in ("core", "owner", "reader"))


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.fuse if n.startswith("mount") else ()) for n in EXPECTED],
)
def test_every_bench_runs_small(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = parse(name, "--json", "--quick", "--size", "16MiB", "--blocks", "2000",
                      "--repeats", "2", "--directory", str(tmp_path))  # fmt: skip
    assert run.main(arguments) == 0
    output = capsys.readouterr()
    report = json.loads(output.out)
    assert report["schema"] == {"command": "bench", "version": 1}
    assert report["scale"] == {"size_bytes": 16 * MIB, "block_count": 2000, "repeats": 2}
    skipped = [entry["reason"] for entry in report["skipped"]]
    for reason in skipped:
        is_medium = "is on no disk" in reason or "XFS over a loop device" in reason
        assert is_medium or (os.geteuid() != 0 and "passthrough" in reason), reason
    found = {figure["name"] for figure in report["figures"]}
    assert found == EXPECTED[name] or (skipped and found < EXPECTED[name])
    for figure in report["figures"]:
        check_figure(figure, repeats=2)
    for line in output.err.splitlines():
        assert json.loads(line)["message_type"] == "status"
    assert list(tmp_path.iterdir()) == [], "a bench leaves nothing behind"


@pytest.mark.fuse
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_bench_leaves_no_mount(number: signal.Signals, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kvfs.cli.kvfs", "bench", "mount-write", "--size", "64MiB",
               "--directory", str(tmp_path)]  # fmt: skip
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    with process:
        wait_until(lambda: mounts_below(tmp_path) or process.poll() is not None, "a mount")
        process.send_signal(number)
        printed, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "skipped  mount-write: interrupted" in printed, "what was measured is told"
    assert mounts_below(tmp_path) == []
    assert list(tmp_path.iterdir()) == []
    assert [path for path in Path("/proc").glob("[0-9]*") if is_about(path, tmp_path)] == []


def mounts_below(path: Path) -> list[str]:
    return [entry.path for entry in mount_entries() if entry.path.startswith(str(path))]


def is_about(process: Path, path: Path) -> bool:
    try:
        return str(path).encode() in (process / "cmdline").read_bytes()
    except OSError:
        return False


@pytest.mark.fuse
def test_error_beside_a_mount_takes_it_away(tmp_path: Path) -> None:
    usual = scale(size_bytes=16 * MIB, directory=tmp_path)
    session = Session(usual, Progress(io.StringIO()))

    def fail() -> None:
        with session, ExitStack() as stack:
            with new_pool(session, tmp_path / "a", 16 * MIB):
                pass
            mount = stack.enter_context(mounted(tmp_path / "a"))
            stack.enter_context(opened(mount.path, os.O_DIRECTORY))
            assert mounts_below(tmp_path)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert mounts_below(tmp_path) == []


@pytest.mark.fuse
def test_mount_that_fails_is_a_reason_to_skip(tmp_path: Path) -> None:
    tmp_path.joinpath("a").mkdir()
    with pytest.raises(SkipError, match=r"kvfs mount failed: .*no pool"), mounted(tmp_path / "a"):
        pass


def test_race_takes_turns_and_counts_time_of_processes(tmp_path: Path) -> None:
    session = Session(scale(repeats=3, directory=tmp_path), Progress(io.StringIO()))
    race = Race(session, "race", Unit.OPS_PER_S, 10, {"a": {"owner": [os.getpid()]}, "b": {}})
    passes: list[str] = []
    race.run({
        "a": lambda turn: passes.append(f"a{turn}"), "b": lambda turn: passes.append(f"b{turn}"),
    }, lambda name: passes.append(f"-{name}"))  # fmt: skip
    assert " ".join(passes[:16]) == "-b b0 -a a0 -a a1 -b b1 -a a2 -b b2 -b b3 -a a3"
    [figure] = race.figures("name", "case", "a", {"b": 1.5})
    assert len(figure.samples.values) == 3
    assert figure.goal == ratio_at_least(1.5)
    assert figure.cost is not None
    assert figure.cost.per == "1000 ops"
    assert figure.cost.core is None
    assert figure.cost.owner is not None
    assert figure.cost.owner > 0
    assert figure.baseline is not None
    assert figure.baseline.cost is not None
    assert figure.baseline.cost.owner is None
    [alone] = race.figures("name", "case", "b", {})
    assert alone.ratio is None


def test_processor_time_is_that_of_the_process_asked_about() -> None:
    code = "print('up', flush=True); input(); sum(range(3_000_000)); print('done', flush=True)"
    with subprocess.Popen(
        [sys.executable, "-c", f"{code}; input()"], text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as child:  # fmt: skip
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdout.readline()
        before = cpu_ns(child.pid)
        child.stdin.write("\n")
        child.stdin.flush()
        child.stdout.readline()
        assert cpu_ns(child.pid) - before > 1_000_000, "three million additions"
        child.stdin.write("\n")


def test_every_bench_has_a_name_and_those_of_the_mount_have_one_together() -> None:
    assert set(run.NAMES) == set(run._benches()) == set(EXPECTED)
    together = {
        group: tuple(name for name in EXPECTED if name.startswith(f"{group}-"))
        for group in ("devices", "mount")
    }
    assert together == run.GROUPS


def test_names_and_amounts_are_checked() -> None:
    with pytest.raises(UsageError, match="unknown bench 'speed': expected one of put,"):
        run.main(parse("speed"))
    for words in (("--size", "1MiB"), ("--blocks", "10"), ("--repeats", "-1")):
        with pytest.raises(UsageError, match="a bench needs at least"):
            run.main(parse(*words))


def test_ratio_is_taken_per_repeat() -> None:
    rate = Figure("put", "64 KiB", Unit.BYTES_PER_S, Samples((1.0, 2.0, 4.0)),
                  Baseline("copy", Samples((2.0, 2.0, 2.0))), ratio_at_least(1.0))  # fmt: skip
    assert rate.ratio == Samples((0.5, 1.0, 2.0))
    assert rate.is_met is True
    time = Figure("read", "", Unit.NANOSECONDS, Samples((10.0,)),
                  Baseline("plain", Samples((5.0,))), ratio_at_least(0.9))  # fmt: skip
    assert time.ratio == Samples((0.5,)), "twice the time is half as good"
    assert time.is_met is False


def test_goals_hold_the_median() -> None:
    samples = Samples((1.0, 5.0, 100.0))
    at_most = Goal(GoalKind.VALUE_AT_MOST, 5.0)
    at_least = Goal(GoalKind.VALUE_AT_LEAST, 5.5)
    assert Figure("a", "", Unit.NANOSECONDS, samples, goal=at_most).is_met is True
    assert Figure("a", "", Unit.KEYS_PER_S, samples, goal=at_least).is_met is False
    assert Figure("a", "", Unit.KEYS_PER_S, samples).is_met is None


def test_stopwatch_sums_turns_and_rotates_them() -> None:
    clock = ManualClock()
    watch = Stopwatch(clock)
    order: list[str] = []

    def way(name: str, nanoseconds: int) -> Any:
        return lambda step: (order.append(f"{name}{step}"), clock.advance(nanoseconds))

    for _ in range(2):
        watch.race({"a": way("a", 10), "b": way("b", 20)}, steps=6)
        watch.lap()
    assert watch.times("a") == [60, 60]
    assert watch.rates("b", 120).values == (1e9, 1e9)
    assert watch.per_item("a", 6).values == (10.0, 10.0)
    assert " ".join(order[:12]) == "a0 a1 a2 a3 b0 b1 b2 b3 b4 b5 a4 a5"


def test_scale_leaves_room_for_what_it_moves() -> None:
    usual = scale()
    assert usual.block_sizes() == [64 * KIB, MIB, 16 * MIB]
    assert usual.segment_bytes == 256 * MIB
    assert usual.capacity_for(GIB, MIB) > GIB
    assert scale(size_bytes=16 * MIB).block_sizes() == [64 * KIB, MIB]
    assert scale(size_bytes=16 * MIB).segment_bytes == 16 * MIB


def test_text_says_what_was_measured_missed_and_skipped() -> None:
    machine = Machine("CPU", 2, 8 * GIB, "6.1", 0.5, "2026-01-01T00:00:00Z")
    report = Report(machine, scale())
    gib = float(GIB)
    report.figures.append(
        Figure("put", "64 KiB", Unit.BYTES_PER_S, Samples((8 * gib, 9 * gib, 10 * gib)),
               Baseline("copy", Samples((18 * gib,) * 3)), ratio_at_least(0.8))
    )  # fmt: skip
    report.figures.append(
        Figure("lookup", "10 blocks", Unit.KEYS_PER_S, Samples((12e6,)),
               goal=Goal(GoalKind.VALUE_AT_LEAST, 1e7))
    )  # fmt: skip
    report.skipped.append(("mount", "/dev/fuse is missing"))
    text = report.to_text()
    assert text.splitlines()[:2] == [
        "machine  2 x CPU, 8.0 GiB, Linux 6.1, load 0.5",
        "  scale  1.0 GiB per repeat, 1000 small blocks, 5 repeats",
    ]
    words = [" ".join(line.split()) for line in text.splitlines()]
    assert words[4] == (
        "put 64 KiB 9.00 GiB/s 8.00 .. 10.00 GiB/s copy 18.00 GiB/s 0.50 0.44 .. 0.56 "
        "ratio >= 0.80 NO"
    )
    assert words[5].endswith(">= 10.00 M keys/s yes")
    assert text.endswith("1 of 2 goals met\n\nskipped  mount: /dev/fuse is missing\n")


def test_text_shows_processor_time_where_there_is_some() -> None:
    report = Report(Machine("CPU", 2, 8 * GIB, "6.1", 0.5, "2026-01-01T00:00:00Z"), scale())
    mount, plain = Cost("GiB", 0.25, 1.5, 0.125), Cost("GiB", 0.5)
    report.figures = [
        Figure("read", "native", Unit.BYTES_PER_S, Samples((GIB,)),
               Baseline("file", Samples((2 * GIB,)), plain), cost=mount),
        Figure("stored", "", Unit.FACTOR, Samples((1.01,)), goal=at_most(1.05)),
        Figure("open", "", Unit.OPS_PER_S, Samples((250.0,)), cost=Cost("1000 ops", 1.0, 2.0)),
    ]  # fmt: skip
    lines = report.to_text().splitlines()
    assert lines[3].endswith("met  CPU s: core owner reader; against")
    assert lines[4].endswith("0.125 1.500 0.250; \u2013 \u2013 0.500 per GiB")
    assert "1.010" in lines[5]
    assert lines[5].endswith("<= 1.050  yes")
    assert "250 ops/s" in lines[6]
    assert lines[6].endswith("\u2013 2.000 1.000 per 1000 ops")


def test_progress_on_a_pipe_is_one_line_each() -> None:
    stream = io.StringIO()
    progress = Progress(stream)
    for done in range(3):
        progress.note("put 64 KiB", done, 3)
    progress.clear()
    assert stream.getvalue() == "bench: put 64 KiB\n"
