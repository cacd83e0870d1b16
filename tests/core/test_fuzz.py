"""Arbitrary messages into the core's parsers, built with ASan and UBSan."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuse.mounting import ROOT

SECONDS = 2


def test_survives_arbitrary_messages(seed: int) -> None:
    """By hand, longer: native/run_sanitized.sh fuzz SEED SECONDS."""
    cmake = Path(sys.executable).with_name("cmake")
    if not (cmake.exists() or shutil.which("cmake")) or shutil.which("cc") is None:
        pytest.skip("needs cmake and a C compiler")
    result = subprocess.run(
        ["native/run_sanitized.sh", "fuzz", str(seed), str(SECONDS)], cwd=ROOT,
        env={"PYTHON": sys.executable, "PATH": f"{cmake.parent}:/usr/bin:/bin"},
        capture_output=True, text=True, timeout=250, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-8000:]
    assert "native reads" in result.stdout
