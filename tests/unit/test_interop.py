"""The runner of `make interop`, without any peer."""

import json
import re
from pathlib import Path

import pytest
from interop import report
from interop.__main__ import PEERS, run_case
from interop.cases import Case, CaseError, Figures, Place, Result, Row, UnavailableError
from interop.driver import pattern
from interop.ratios import compare

ROOT = Path(__file__).resolve().parents[2]
LISTS = ROOT / "tools" / "interop" / "requirements"
BLANK = Row("engine", "1.0", "", "", Result.UNAVAILABLE)


def fail() -> Figures:
    raise CaseError("it read other bytes")


def refuse() -> Figures:
    raise UnavailableError("no such program")


@pytest.mark.parametrize(
    ("run", "result", "reason"),
    [
        (lambda: {"read MiB/s": 3.0}, Result.OK, ""),
        (fail, Result.FAILED, "it read other bytes"),
        (refuse, Result.UNAVAILABLE, "no such program"),
    ],
)
def test_a_case_becomes_a_row(run, result, reason):
    row = run_case(Case("write", Place.MOUNT, run), BLANK)
    assert (row.engine, row.what, row.place) == ("engine", "write", "kvfs")
    assert (row.result, row.reason) == (result, reason)
    assert ("seconds" in row.figures) == (result is Result.OK)


def test_the_table_has_every_row_and_reason():
    rows = [
        Row("fio", "3.33", "write", Place.MOUNT, Result.OK, figures={"write MiB/s": 2.5}),
        Row("fio", "3.33", "mmap", Place.MOUNT, Result.FAILED, "No such device"),
    ]
    lines = report.to_text(rows).splitlines()
    assert lines[1].endswith("write MiB/s 2.5")
    assert lines[3] == "    No such device"
    assert lines[-1] == "1 ok, 1 failed, 0 not available"
    document = json.loads(json.dumps(report.to_json(rows, "0.1.0")))
    assert [row["result"] for row in document["rows"]] == ["ok", "failed"]


def test_ratios_are_taken_turn_by_turn():
    rates = {Place.MOUNT: [100.0, 10.0, 50.0], Place.PLAIN: [100.0, 40.0, 100.0]}
    order = []

    def run(place: Place, turn: int) -> Figures:
        order.append(f"{place} {turn}")
        return {"store MB/s": rates[place][turn], "lookups/s": 5}

    figures = compare(run, {"store MB/s": 0.6})
    assert order == ["kvfs 0", "plain 0", "plain 1", "kvfs 1", "kvfs 2", "plain 2"]
    assert figures == {
        "store MB/s": 50, "plain store MB/s": 100,
        "store ratio": "0.50 (0.25 .. 1.00; goal 0.60 missed)",
    }  # fmt: skip
    assert "goal 0.50 met" in str(compare(run, {"store MB/s": 0.5})["store ratio"])


def test_peers_have_names_of_their_own_and_a_list():
    assert len({peer.name for peer in PEERS}) == len(PEERS)
    for venv in {peer.venv for peer in PEERS} - {""}:
        assert (LISTS / f"{venv}.txt").is_file()


@pytest.mark.parametrize("path", sorted(LISTS.glob("*.txt")), ids=lambda path: path.stem)
def test_lists_pin_every_package(path):
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    assert lines
    for line in lines:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line), line


def test_lists_name_the_torch_that_the_installer_finds():
    script = (ROOT / "tools" / "install_torch.sh").read_text()
    (version,) = re.findall(r"^VERSION=(.*)$", script, re.MULTILINE)
    for path in LISTS.glob("*.txt"):
        assert {line for line in path.read_text().splitlines() if line.startswith("torch==")} <= {
            f"torch=={version}"
        }


def test_pattern_depends_on_its_seed_alone():
    assert pattern(64, "a") == pattern(64, "a")
    assert pattern(64, "a") != pattern(64, "b")
    assert len(pattern(1000, "a")) == 1000
