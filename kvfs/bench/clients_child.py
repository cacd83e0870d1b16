"""A client process of kvfs.bench.clients.

Layer: L5.

    python -m kvfs.bench.clients_child KIND POOL BLOCK_BYTES BATCH_BLOCKS

KIND is put, put-shared, read or lookup. It prints `ready`, then does for each line of input (a file
of keys, saved by numpy) what KIND says with these keys, a batch at a time, and prints a line of
JSON: when it began and ended, and how long each batch took, in nanoseconds of the monotonic clock.
"""

import json
import mmap
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvfs import _native
from kvfs.clients.remote import RemotePool
from kvfs.clock import SystemClock
from kvfs.keys import KeyArray
from kvfs.namespace import Namespace


def _memory(
    pool: RemotePool, nbytes: int, *, is_shared: bool
) -> tuple[npt.NDArray[np.uint8], object]:
    """Return memory to copy from or to, warm, and what keeps it."""
    if not is_shared:
        return np.random.default_rng(1).integers(0, 256, nbytes, np.uint8), None
    fd = _native.memfd("kvfs-bench", nbytes)
    memory = mmap.mmap(fd, nbytes)
    pool.share(fd, memory)
    os.close(fd)
    array = np.frombuffer(memory, np.uint8)
    array[:] = np.random.default_rng(1).integers(0, 256, nbytes, np.uint8)
    return array, memory


def run(kind: str, space: Namespace, keys: KeyArray, rows: npt.NDArray[np.uint8]) -> dict[str, Any]:
    """Do it once with all keys."""
    clock = SystemClock()
    times, begin_ns = [], clock.monotonic_ns()
    for start in range(0, len(keys), len(rows)):
        part = keys[start : start + len(rows)]
        before_ns = clock.monotonic_ns()
        if kind == "lookup":
            assert space.lookup(part)["length"].all(), "every block is resident"
        elif kind == "read":
            assert space.read_into(part, rows[: len(part)]).all(), "every block is resident"
        else:
            space.put(part, rows[: len(part)], durability="none")
        times.append(clock.monotonic_ns() - before_ns)
    return {"begin_ns": begin_ns, "end_ns": clock.monotonic_ns(), "times_ns": times}


def main() -> None:
    """Answer until the input ends."""
    kind, path, block_bytes, batch_blocks = sys.argv[1:]
    with RemotePool(Path(path)) as pool:
        space = pool.namespace("bench")
        rows_bytes = 1 if kind == "lookup" else int(block_bytes)
        nbytes = int(batch_blocks) * rows_bytes
        memory, kept = _memory(pool, nbytes, is_shared=kind == "put-shared")
        rows = memory.reshape(int(batch_blocks), rows_bytes)
        print("ready", flush=True)
        for line in sys.stdin:
            keys = np.load(line.strip())
            print(json.dumps(run(kind, space, keys, rows)), flush=True)
        del kept


if __name__ == "__main__":
    main()
