"""Small pools for tests of what lies above the engine."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kvfs.config import PoolOptions
from kvfs.layout import Layout
from kvfs.lifecycle import create_pool
from kvfs.namespace import Namespace
from kvfs.pool import Pool
from kvfs.units import KIB

BLOCK = 64 * KIB
BLOCK_TOKENS = 4
NEVER_MS = 60_000  # longer than a test: the background does nothing by itself


@contextmanager
def small_pool(
    path: Path, *, dram: bool = False, size: str = "64MiB", async_delay_ms: int = NEVER_MS
) -> Iterator[Pool]:
    """Make a pool on one directory device; close it in the end."""
    urls = ["dram:?size=64MiB&segment=16MiB"] if dram else []
    urls.append(f"dir:{path}/device?size={size}&segment=16MiB")
    with create_pool(
        path / "pool", urls, options=PoolOptions(async_delay_ms=async_delay_ms)
    ) as pool:
        yield pool


def small_namespace(pool: Pool, name: str = "n") -> Namespace:
    """Make a namespace of blocks of 64 KiB, four tokens each."""
    layout = Layout(
        dtype="uint8", token_shape=(BLOCK // BLOCK_TOKENS,), block_tokens=BLOCK_TOKENS, model="m"
    )
    return pool.namespace(name, layout)


def payloads(count: int, seed: int = 1) -> npt.NDArray[np.uint8]:
    """Return blocks that differ."""
    return np.random.default_rng(seed).integers(0, 256, (count, BLOCK), np.uint8)


def leases(pool: Pool) -> int:
    """Count what holds segments."""
    return sum(s.leases for d in pool.store.state.devices for s in d.segments.values())
