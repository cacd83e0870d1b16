"""Small pools in a directory, and what to put into them."""

from pathlib import Path

import numpy as np

import kvfs
from kvfs.lifecycle import create_pool, open_pool

LAYOUT = kvfs.Layout("uint8", (1024,), 4, model="pool")


class Place:
    """Where a pool and its devices are."""

    def __init__(self, root: Path) -> None:
        self.root, self.pool = root, root / "pool"
        self.urls = [f"dir:{root}/dev?size=64MiB&segment=16MiB"]

    def create(self, *more: str, **options: object) -> kvfs.Pool:
        return create_pool(self.pool, [*self.urls, *more], **options)  # type: ignore[arg-type]

    def open(self, **options: object) -> kvfs.Pool:
        return open_pool(self.pool, **options)  # type: ignore[arg-type]


def blocks(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, LAYOUT.block_bytes), np.uint8)


def read(space: kvfs.Namespace, keys: object, count: int) -> np.ndarray:
    room = np.zeros((count, LAYOUT.block_bytes), np.uint8)
    assert space.read_into(keys, room).all()
    return room
