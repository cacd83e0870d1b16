"""kvfs.demo.report and prompts: what is printed, and what the prompts have in common."""

import re
from pathlib import Path

import pytest

from kvfs.demo import prompts, report


def test_prompts_share_more_than_half_of_the_first() -> None:
    first, second = prompts.text_of(prompts.COLD), prompts.text_of(prompts.SHARED)
    common = next(i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    assert common > len(first) // 2
    assert first[:common].rstrip().endswith("the Case of a Bill.")
    assert first.isascii()
    assert second.isascii()
    assert len(first.split()) > 2_000


def test_table_lines_up() -> None:
    lines = report.table([("a", "1"), ("long name", "22")]).splitlines()
    assert lines == ["-" * 13, "a          1", "long name  22", "-" * 13]


def test_rows_hold_every_figure() -> None:
    cold = {
        "first_ns": 9_000_000_000, "prompt_tokens": 3200, "bytes_stored": 100 << 20,
        "blocks_stored": 50, "tokens": list(range(64)),
    }  # fmt: skip
    shared = {
        "first_ns": 4_000_000_000, "cold_first_ns": 9_500_000_000, "prompt_tokens": 3300,
        "computed_tokens": 1400, "bytes_stored": 60 << 20, "bytes_deduplicated": 80 << 20,
        "blocks_stored": 20, "blocks_deduplicated": 30, "tokens": list(range(64)),
        "same_tokens": 64, "devices": [{"tier": 0, "kind": "dram", "live_bytes": 7 << 20}],
    }  # fmt: skip
    recovered = {"recovery_ns": 1_200_000_000, "blocks": 103, "lost_blocks": 0}
    restored, again = {"first_ns": 150_000_000}, {"first_ns": 160_000_000}
    rows = dict(report.rows(cold, restored, shared, again, recovered))
    assert rows["time to first token, cold"] == "9.0 s (3200 tokens computed)"
    assert rows["time to first token, restored from the file"] == (
        "150.00 ms (1 token computed; 60 x faster)"
    )
    assert rows["time to first token, shared prefix"] == (
        "4.0 s (1400 of 3300 tokens computed; cold 9.5 s)"
    )
    assert rows["stored"] == "160.0 MiB in 70 blocks"
    assert rows["not stored twice"] == "80.0 MiB in 30 blocks of the second context"
    assert rows["lost after kill -9"] == "0 of 103 blocks"
    assert rows["live bytes by tier"] == "tier 0 (dram) 7.0 MiB"


def test_tools_of_the_system(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    report.show(["ls"], str(tmp_path))
    report.show(["no-such-tool", "-x"], str(tmp_path))
    report.quote("two\nlines")
    out = capsys.readouterr().out
    assert re.search(r"\$ ls\n +file\n", out)
    assert "(no-such-tool is not installed)" in out
    assert '"two lines"' in out
