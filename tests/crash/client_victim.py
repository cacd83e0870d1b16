"""The processes of `test_client_kills`: the owner of a pool, or one of its clients.

    python -m tests.crash.client_victim owner POOL
    python -m tests.crash.client_victim client POOL NAME FIRST SEED

The owner prints `ready`, and answers each line of input with what is held, as JSON. A client prints
`ready`, `begin N` before and `done N` after each put; it reads between them and prints `corrupt N`
if it got other bytes than those of put N.
"""

import itertools
import json
import random
import sys
import zlib
from pathlib import Path

import numpy as np

import kvfs
from kvfs.clients.server import ClientServer
from kvfs.lifecycle import open_pool

LAYOUT = kvfs.Layout("uint8", (32768,), 4, model="victim")  # blocks of 128 KiB
SPACE = "victim"
JUNK = "junk"  # blocks in memory alone, so many that some are always evicted
JUNK_BLOCKS, JUNK_NUMBERS = 16, 200
OPTIONS = kvfs.PoolOptions(async_delay_ms=1, client_timeout_s=0.2, client_share=0.6)
OPERATIONS_MAX = 60  # of one process: what all write must fit the device


def expected(name: str, number: int) -> tuple[list[int], np.ndarray]:
    """Return tokens and payloads of a client's put; the same in every process."""
    rng = np.random.default_rng([zlib.crc32(name.encode()), number])
    count = 1 + number % 3
    tokens = [int(token) for token in rng.integers(1 << 31, size=4 * count)]
    return tokens, rng.integers(0, 256, (count, LAYOUT.block_bytes), np.uint8)


def own(root: Path) -> None:
    """Serve until the input ends; answer each line."""
    with open_pool(root, options=OPTIONS) as pool, ClientServer(pool) as server:
        print("ready", flush=True)
        for _ in sys.stdin:
            while server.statistics() or server._connections:
                pass  # until the last one is known to be dead, and what it asked for is done
            state = pool.store.state
            state.free_drained()
            counters = state.counters.snapshot()
            with state.lock:
                waiting = sum(len(device.waiting()) for device in state.devices)
                leases = sum(s.leases for d in state.devices for s in d.segments.values())
                pages = len(state.holds._holders)
            answer = {
                "waiting": waiting, "leases": leases, "pages": pages,
                "revoked": state.holds.revoked, "evicted": counters["segments_evicted"],
            }  # fmt: skip
            print(json.dumps(answer), flush=True)


def use(root: Path, name: str, first: int, seed: str) -> None:
    """Put and read for ever."""
    rng = random.Random(seed)
    pool = _attach(root)
    space = _until_there(lambda: pool.namespace(SPACE))
    junk = _until_there(lambda: pool.namespace(JUNK))
    print("ready", flush=True)
    for number in itertools.count(first):
        if number - first < OPERATIONS_MAX:
            tokens, payloads = expected(name, number)
            keys, parents = space.keys(tokens)
            print(f"begin {number}", flush=True)
            _until_there(lambda k=keys, d=payloads, p=parents: space.put(
                k, d, parents=p, durability="sync"))  # fmt: skip
            print(f"done {number}", flush=True)
        for _ in range(4):
            _read(space, *expected(name, rng.randrange(number + 1)), rng)
        tokens, payloads = waste(rng.randrange(JUNK_NUMBERS))
        keys, parents = junk.keys(tokens)
        _until_there(lambda k=keys, d=payloads, p=parents: junk.put(
            k, d, parents=p, durability="none"))  # fmt: skip
        _read(junk, *waste(rng.randrange(JUNK_NUMBERS)), rng)


def waste(number: int) -> tuple[list[int], np.ndarray]:
    """Return tokens and payloads of junk; the same in every process."""
    tokens = [number * 4 * JUNK_BLOCKS + i for i in range(4 * JUNK_BLOCKS)]
    words = np.arange(JUNK_BLOCKS * LAYOUT.block_bytes // 8, dtype=np.uint64)
    words += np.uint64(number << 32)
    return tokens, words.view(np.uint8).reshape(JUNK_BLOCKS, LAYOUT.block_bytes)


def _read(
    space: kvfs.Namespace, tokens: list[int], payloads: np.ndarray, rng: random.Random
) -> None:
    keys, _ = space.keys(tokens)
    if rng.random() < 0.5:
        out = np.zeros_like(payloads)
        found = _until_there(lambda: space.read_into(keys, out))
        if (out[found] != payloads[found]).any():
            print(f"corrupt {tokens[0]}", flush=True)
        return
    try:
        with _until_there(lambda: space.view(keys)) as view:
            same = (view.numpy(np.uint8, payloads.shape) == payloads).all()
            view.check()
            if not same:
                print(f"corrupt {tokens[0]}", flush=True)
    except (kvfs.NotFoundError, kvfs.LeaseExpiredError):
        return


def _until_there(step):
    """Do something, again as long as the pool has no owner."""
    while True:
        try:
            return step()
        except (kvfs.UnavailableError, kvfs.NoSpaceError):
            continue


def _attach(root: Path) -> kvfs.RemotePool:
    from kvfs.clients.remote import RemotePool

    return _until_there(lambda: RemotePool(root))


if __name__ == "__main__":
    if sys.argv[1] == "owner":
        own(Path(sys.argv[2]))
    else:
        use(Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), sys.argv[5])
