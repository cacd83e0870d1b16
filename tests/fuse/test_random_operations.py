"""Random operations on the mount, compared with a plain directory; see `random_operations`."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.fuse.mounting import ROOT
from tests.fuse.random_operations import SUMMARY

pytestmark = pytest.mark.fuse
DRAWN_EACH = 100_000


def operations(seed: int, count: int, output: Path, *more: str) -> int:
    """Run a number of drawn operations in a process; return how many found something to do."""
    result = subprocess.run(
        [sys.executable, "-m", "tests.fuse.random_operations", "--seed", str(seed),
         "--count", str(count), "--output", str(output), *more],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    found = SUMMARY.search(result.stdout)
    assert found is not None, result.stdout
    return int(found[1])


@pytest.mark.parametrize("more", [(), ("--no-core",)], ids=["core", "no-core"])
def test_some_thousand(tmp_path: Path, seed: int, more: tuple[str, ...]) -> None:
    assert operations(seed, 3000, tmp_path, "--remount-every", "1500", *more) > 1200


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_a_million(tmp_path: Path, seed: int) -> None:
    """Half of those drawn find nothing to do, as a close of what is not open; they do not count."""
    done, batch = 0, os.cpu_count() or 1
    with ThreadPoolExecutor(batch) as threads:
        while done < 1_000_000:
            seeds = range(seed, seed + batch)
            seed += batch
            runs = threads.map(
                lambda each: operations(
                    each, DRAWN_EACH, tmp_path, "--remount-every", "20000",
                    *(["--no-core"] if each % 4 == 0 else []),
                ),
                seeds,
            )  # fmt: skip
            done += sum(runs)
