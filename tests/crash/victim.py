"""The process that is killed: opens a pool, writes, and reports on stdout what was acknowledged.

    python -m tests.crash.victim POOL FIRST SEED

Lines are `ready`, `begin N` before and `done N` after each operation; operation N writes what
`expected(N)` says, numbered from FIRST. It never ends by itself.
"""

import itertools
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import kvfs
from kvfs.tree import Tree

LAYOUT = kvfs.Layout("uint8", (4096,), 4, model="victim")  # blocks of 16 KiB
SPACE = "victim"
CONTEXTS = 4
SMALL_FILE, LARGE_FILE = 30_000, 5 << 20


@dataclass(frozen=True, slots=True)
class Operation:
    """What operation N does: a sync put, a sync append to a context, or a file and a sync."""

    number: int
    kind: str
    tokens: tuple[int, ...]
    payloads: tuple[bytes, ...]

    @property
    def name(self) -> str:
        if self.kind == "append":
            return f"context{self.number // 4 % CONTEXTS}"
        return f"file{self.number}"


def expected(number: int) -> Operation:
    """Return operation N; the same in every process."""
    rng = np.random.default_rng(number)
    kind = ("put", "append", "put", "file")[number % 4]
    if kind == "file":
        nbytes = LARGE_FILE if number % 32 == 3 else SMALL_FILE
        return Operation(number, kind, (), (rng.bytes(nbytes),))
    count = 1 + number % 3
    tokens = tuple(int(token) for token in rng.integers(1 << 31, size=4 * count))
    return Operation(
        number, kind, tokens, tuple(rng.bytes(LAYOUT.block_bytes) for _ in range(count))
    )


def perform(pool: kvfs.Pool, operation: Operation) -> None:
    """Do it, and return when it is durable."""
    space = pool.namespace(SPACE)
    keys, parents = space.keys(operation.tokens) if operation.tokens else (None, None)
    if operation.kind == "put":
        space.put(keys, list(operation.payloads), parents=parents, durability="sync")
    elif operation.kind == "append":
        space.context(operation.name).append(
            keys, list(operation.payloads), tokens=operation.tokens, durability="sync"
        )
    else:
        tree, root = Tree(pool), space.info.root_node_id
        node = tree.create_file(root, operation.name, 0o644, 0, 0)
        handle = pool.files.open_write(node, truncate=True)
        content = operation.payloads[0]
        for offset in range(0, len(content), 1 << 20):
            pool.files.write(handle, offset, content[offset : offset + (1 << 20)])
        pool.files.close_write(handle)
        pool.sync()


def main() -> None:
    root, first, seed = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    rng = random.Random(seed)
    with kvfs.open_pool(root, options=kvfs.PoolOptions(async_delay_ms=1)) as pool:
        print("ready", flush=True)
        for number in itertools.count(first):
            print(f"begin {number}", flush=True)
            perform(pool, expected(number))
            print(f"done {number}", flush=True)
            if rng.random() < 0.2:
                pool.flush()


if __name__ == "__main__":
    main()
