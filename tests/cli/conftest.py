"""A pool, and the command to ask about it."""

import os
import tempfile
from pathlib import Path

import pytest

import kvfs
from kvfs import control_client
from tests.cli.helpers import Admin, fill


@pytest.fixture(autouse=True)
def environment(tmp_path, monkeypatch):
    """No pool of this machine, and no terminal's width, has a say in a test."""
    monkeypatch.setenv(control_client.RUNTIME_VARIABLE, str(tmp_path / "run"))
    for name in ("KVFS_POOL", "KVFS_ASSUME_YES", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TZ", "UTC")


@pytest.fixture
def root():
    """A directory in memory where there is some: every step of a pool waits for the medium."""
    folder = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="kvfs-cli-", dir=folder) as path:
        yield Path(path)


@pytest.fixture
def empty_pool(root):
    path = root / "kv0"
    kvfs.create_pool(path, [f"dir:{root}/dev?size=128MiB&segment=16MiB"]).close()
    return path


@pytest.fixture
def pool_path(empty_pool):
    fill(empty_pool)
    return empty_pool


@pytest.fixture
def admin(capsys, pool_path):
    return Admin(capsys, pool_path)
