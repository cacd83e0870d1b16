"""What the tests of the native core share: array builders, dtypes, subprocesses."""

import os
import subprocess
import sys
from typing import Any

import numpy as np

from kvfs import _native

RECORD = np.dtype([
    ("key", "u1", 32), ("device", "<u2"), ("flags", "<u2"), ("segment", "<u4"),
    ("generation", "<u4"), ("page", "<u4"), ("length", "<u4"), ("tokens", "<u4"),
    ("entry", "<u4"), ("sequence", "<u4"),
])  # fmt: skip
EVENT = np.dtype([
    ("device", "<u2"), ("phase", "u1"), ("flags", "u1"), ("segment", "<u4"), ("entry", "<u4"),
    ("tag", "<u4"),
])  # fmt: skip
ENTRY = np.dtype([
    ("key", "u1", 32), ("parent", "u1", 32), ("offset", "<u8"), ("stored_bytes", "<u8"),
    ("rest", "u1", 40), ("checksum", "<u8"),
])  # fmt: skip
PAGE = 4096


def u64(*values: int) -> Any:
    return np.array(values, "<u8")


def i32(*values: int) -> Any:
    return np.array(values, "<i4")


def statuses(count: int) -> Any:
    """An array that shows which statuses were written."""
    return np.full(count, 99, "<i4")


def address(obj: Any) -> int:
    return _native.buffer_address(obj)[0]


def random_bytes(seed: int, nbytes: int) -> Any:
    return np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)


def make_keys(count: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (count, 32), np.uint8)


def make_records(keys: Any, device: int = 0, segment: int = 1, generation: int = 1) -> Any:
    """One record per key; every field tells the row."""
    rows = np.zeros(len(keys), RECORD)
    rows["key"] = keys
    rows["device"] = device
    rows["segment"] = segment
    rows["generation"] = generation
    rows["length"] = PAGE
    rows["page"] = rows["entry"] = rows["tokens"] = np.arange(len(keys))
    return rows


def run_python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a fresh interpreter; the caller looks at its exit status."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": ":".join(sys.path), **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
