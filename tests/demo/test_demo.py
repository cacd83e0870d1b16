"""`kvfs demo` as a user runs it: to the end, and interrupted at each stage."""

import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvfs.demo.model import NEEDED

PACKAGES_MISSING = any(importlib.util.find_spec(name) is None for name in NEEDED)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.fuse,
    pytest.mark.timeout(900),
    pytest.mark.skipif(PACKAGES_MISSING, reason="the demo's packages are not installed"),
    pytest.mark.skipif(not os.path.exists("/dev/fuse"), reason="no /dev/fuse"),
]
# A job in the background of a shell ignores SIGINT; the demo is to see it.
LAUNCH = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from kvfs.cli.kvfs import main
sys.exit(main(["demo", *sys.argv[1:]]))
"""


@pytest.fixture
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="kvfs-test-demo-") as directory:
        yield Path(directory)


def start(place: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", LAUNCH, "--tokens=8", f"--directory={place}"]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1
    )


def nothing_left(place: Path) -> bool:
    with open("/proc/self/mounts", encoding="utf-8") as mounts:
        return str(place) not in mounts.read() and not list(place.iterdir())


def test_to_the_end(place: Path) -> None:
    process = start(place)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert "8 tokens, identical to the cold run" in output
    assert "restored 8 of 8, after the kill 8 of 8" in output
    assert nothing_left(place)


@pytest.mark.parametrize(
    ("number", "stage"),
    [
        (signal.SIGINT, "[1]"),
        (signal.SIGINT, "[2]"),
        (signal.SIGTERM, "[4]"),
        (signal.SIGINT, "[5]"),
        (signal.SIGINT, "[6]"),
        (signal.SIGINT, "[7]"),
    ],
)
def test_interrupted(place: Path, number: signal.Signals, stage: str) -> None:
    process = start(place)
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(stage):
            process.send_signal(number)
            break
    lines.append(process.stdout.read())
    process.stdout.close()
    assert process.wait() == 130, "".join(lines)
    assert "Traceback" not in "".join(lines)
    assert nothing_left(place)
