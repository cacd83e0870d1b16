"""The bench: arithmetic of figures, and that every bench runs and answers in form.

No times are asserted: only that figures are there, whole and consistent.
"""

import argparse
import io
import json
from pathlib import Path
from typing import Any

import pytest

from kvfs.bench import run
from kvfs.bench.figure import Baseline, Figure, Goal, GoalKind, Samples, Unit, ratio_at_least
from kvfs.bench.report import Machine, Report
from kvfs.bench.session import Progress, Scale
from kvfs.bench.stopwatch import Stopwatch
from kvfs.clock import ManualClock
from kvfs.errors import UsageError
from kvfs.units import GIB, KIB, MIB

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
    "mount": {"mount read, in order", "mount read, at random"},
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
                           "ratio", "goal", "is_met"}  # fmt: skip
    assert figure["unit"] in {unit.value for unit in Unit}
    parts = [figure, *(figure[name] for name in ("baseline", "ratio") if figure[name])]
    for part in parts:
        assert len(part["samples"]) == repeats
        assert all(value > 0 for value in part["samples"])
        assert part["low"] <= part["median"] <= part["high"]
    assert (figure["baseline"] is None) == (figure["ratio"] is None)
    assert (figure["goal"] is None) == (figure["is_met"] is None)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.fuse if n == "mount" else ()) for n in EXPECTED]
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
    assert report["skipped"] == []
    assert {figure["name"] for figure in report["figures"]} == EXPECTED[name]
    for figure in report["figures"]:
        check_figure(figure, repeats=2)
    for line in output.err.splitlines():
        assert json.loads(line)["message_type"] == "status"
    assert list(tmp_path.iterdir()) == [], "a bench leaves nothing behind"


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


def test_progress_on_a_pipe_is_one_line_each() -> None:
    stream = io.StringIO()
    progress = Progress(stream)
    for done in range(3):
        progress.note("put 64 KiB", done, 3)
    progress.clear()
    assert stream.getvalue() == "bench: put 64 KiB\n"
