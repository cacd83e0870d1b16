"""A pool that serves, and processes that are its clients."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

import kvfs
from kvfs.clients.server import ClientServer
from kvfs.config import PoolOptions

ROOT = Path(__file__).parents[2]
BLOCK = 64 << 10
LAYOUT = kvfs.Layout("uint8", (BLOCK // 4,), 4, model="clients")


@contextmanager
def served(path: Path, *urls: str, **options: object) -> Iterator[tuple[kvfs.Pool, ClientServer]]:
    """Make a pool and serve it, both in this process."""
    devices = list(urls) or [f"dir:{path}/device?size=256MiB&segment=16MiB"]
    chosen = PoolOptions(**options)  # type: ignore[arg-type]
    made = kvfs.create_pool(path / "pool", devices, options=chosen)
    with made as pool, ClientServer(pool) as server:
        yield pool, server


def client(path: Path) -> kvfs.RemotePool:
    """Attach to it."""
    found = kvfs.open_pool(path / "pool")
    assert isinstance(found, kvfs.RemotePool)
    return found


def tokens(count: int, seed: int) -> npt.NDArray[np.uint32]:
    return np.random.default_rng(seed).integers(0, 1 << 31, 4 * count).astype(np.uint32)


def payloads(count: int, seed: int) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, BLOCK), np.uint8)


def child(code: str, *arguments: str, **more: object) -> "subprocess.Popen[str]":
    """Start a Python process; its standard input and output are pipes of text."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, text=True, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, **more,  # type: ignore[call-overload]
    )  # fmt: skip
