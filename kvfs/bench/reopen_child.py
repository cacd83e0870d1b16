"""The processes that fill and open a pool and are killed; see kvfs.bench.reopen.

Layer: L5.

    python -m kvfs.bench.reopen_child fill ROOT CAPACITY COUNT
    python -m kvfs.bench.reopen_child open ROOT

Each prints one line of JSON, then kills itself.
"""

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np

from kvfs.clock import SystemClock
from kvfs.keys import KEY_BYTES
from kvfs.layout import Layout
from kvfs.lifecycle import create_pool, open_pool
from kvfs.units import PAGE

_BATCH_BLOCKS = 8192


def fill(root: Path, capacity: int, count: int) -> dict[str, int]:
    """Put blocks of 4 KiB, as chains of a batch each."""
    pool = create_pool(root / "pool", [f"dir:{root / 'device'}?size={capacity}"])
    space = pool.namespace("bench", Layout(token_shape=(PAGE,)))
    generator = np.random.default_rng(4)
    payload = generator.integers(0, 256, (_BATCH_BLOCKS, PAGE), np.uint8)
    for start in range(0, count, _BATCH_BLOCKS):
        part = min(_BATCH_BLOCKS, count - start)
        keys = generator.integers(0, 256, (part, KEY_BYTES), np.uint8)
        keys.view("<u8")[:, 0] = space.info.namespace_id
        parents = np.zeros_like(keys)
        parents[1:] = keys[:-1]
        space.put(keys, payload[:part], parents=parents)
    return {"blocks": count}


def reopen(root: Path) -> dict[str, int]:
    """Open the pool; return when and how long."""
    clock = SystemClock()
    start_ns = clock.monotonic_ns()
    pool = open_pool(root / "pool")
    opened_at_ns = clock.monotonic_ns()
    return {
        "open_ns": opened_at_ns - start_ns,
        "opened_at_ns": opened_at_ns,
        "blocks": pool.recovery.blocks,
        "segments": pool.recovery.segments,
        "unsealed": pool.recovery.unsealed,
    }


def main(argv: list[str]) -> None:
    """Do as told, answer, die."""
    root = Path(argv[1])
    answer = fill(root, int(argv[2]), int(argv[3])) if argv[0] == "fill" else reopen(root)
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1:])
