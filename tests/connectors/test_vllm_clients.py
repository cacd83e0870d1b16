"""Engines that share a pool: `kvfs serve` owns it, the tiers are its clients."""

import mmap
import os
import re
import signal
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

import kvfs
from kvfs.connectors.vllm_memory import file_behind
from tests.cli.test_serve import Serving
from tests.connectors.engine_bench import ROW, ROWS, Bench


@contextmanager
def region(name: str) -> Iterator[np.ndarray]:
    """Make rows as vLLM does: a file in /dev/shm, mapped whole."""
    path = Path(f"/dev/shm/{name}-{os.getpid()}")
    with path.open("x+b") as file:
        try:
            os.ftruncate(file.fileno(), ROWS * ROW)
            mapped = mmap.mmap(file.fileno(), ROWS * ROW)
            yield np.frombuffer(mapped, np.int8).reshape(ROWS, ROW)
        finally:
            path.unlink(missing_ok=True)


def test_engines_share_a_served_pool(bench: Bench) -> None:
    keys, content = bench.keys(6), bench.fill(1)
    with Serving(bench.path) as owner:
        owner.line_with("serving")
        one, two = bench.tier(), bench.tier()
        request = bench.request("a", bench.keys(6))
        assert bench.found(one, keys, request) == [False] * 6
        assert bench.store(one, keys, [5, 4, 3, 2, 1, 0], request).success
        one.on_request_finished(request)
        other = bench.request("b", keys)
        assert bench.found(two, keys, other) == [True] * 6
        assert bench.load(two, keys, [10, 11, 12, 13, 14, 15], other).success
        assert (bench.rows[10:16] == content[[5, 4, 3, 2, 1, 0]]).all()
        bench.close()
        with kvfs.open_pool(bench.path) as pool:
            assert isinstance(pool, kvfs.RemotePool)
            (context,) = pool.namespace(one._link.name).contexts()
            assert (context.name, context.resident_blocks) == ("requests/a", 6)
        owner.end()


def test_phases_reach_the_owner_through_the_ring(bench: Bench) -> None:
    prompt, answer = bench.keys(3), bench.keys(2, seed=1)
    with Serving(bench.path, "--metrics", "127.0.0.1:0") as owner:
        address = owner.line_with("http://")
        owner.line_with("serving")
        tier, request = bench.tier(), bench.request("a", prompt)
        tier.on_new_request(request)
        bench.step(tier, request)
        bench.store(tier, prompt, [0, 1, 2], request)
        bench.extend(request, answer)
        bench.store(tier, answer, [3, 4], request)
        assert bench.load(tier, [*answer, *prompt], [5, 6, 7, 8, 9], request).success
        tier.on_request_finished(request)
        tier.drain_jobs()
        name = tier._link.name
        bench.close()
        wanted = {"unknown": 0, "prefill": 6, "decode": 4, "background": 0}
        while _accesses(address, name) != wanted:
            pass  # what a client read is heard of several times a second, and at its end
        owner.end()


def _accesses(line: str, namespace: str) -> dict[str, int]:
    """Return the owner's `kvfs_accesses_total` by phase."""
    (address,) = re.findall(r"http://[\w.:/]+", line)
    with urllib.request.urlopen(address) as answer:
        text = answer.read().decode()
    found = re.findall(rf'kvfs_accesses_total{{namespace="{namespace}",phase="(\w+)"}} (\d+)', text)
    return {phase: int(count) for phase, count in found}


def test_owner_reads_rows_where_they_are(bench: Bench) -> None:
    with Serving(bench.path) as owner, region("kvfs-rows") as rows:
        owner.line_with("serving")
        bench.rows = rows
        keys, content = bench.keys(3), bench.fill(1)
        tier, request = bench.tier(), bench.request("a", bench.keys(3))
        assert bench.store(tier, keys, [7, 8, 9], request).success
        pool = tier._link._pool
        assert len(pool._memory.pieces()) == 1
        assert [line.staging for line in pool.link()._idle if line.shared] == [None]
        assert bench.load(tier, keys, [0, 1, 2], request).success
        assert (rows[:3] == content[7:10]).all()
        bench.close()
        owner.end()


def test_owner_that_dies_is_waited_for(bench: Bench, expected_warnings: list[str]) -> None:
    expected_warnings += ["storing failed, vLLM goes on without it: UnavailableError"]
    keys, request = bench.keys(2), bench.request("a", bench.keys(2))
    content = bench.fill(1)
    with Serving(bench.path) as owner:
        owner.line_with("serving")
        tier = bench.tier()
        assert bench.store(tier, keys[:1], [0], request).success
        owner.end(signal.SIGKILL)
        assert not bench.store(tier, keys[1:], [1], request).success
        assert bench.found(tier, keys[1:], bench.request("b", keys)) == [False]
    with Serving(bench.path) as owner:
        owner.line_with("serving")
        while not bench.store(tier, keys, [0, 1], request).success:
            pass
        assert bench.found(tier, keys, bench.request("c", keys)) == [True, True]
        assert bench.load(tier, keys, [2, 3], request).success
        assert (bench.rows[2:4] == content[:2]).all()
        bench.close()
        owner.end()


def test_file_behind_memory() -> None:
    with region("kvfs-behind") as rows:
        rows[0] = 7
        with file_behind(rows.ctypes.data, rows.nbytes) as fd:
            assert fd is not None
            assert os.pread(fd, 2, 0) == b"\7\7"
        with file_behind(rows.ctypes.data + ROW, rows.nbytes - ROW) as fd:
            assert fd is None  # not from its start
        with file_behind(rows.ctypes.data, rows.nbytes + (1 << 30)) as fd:
            assert fd is None
    with file_behind(rows.ctypes.data, rows.nbytes) as fd:
        assert fd is None  # its name is gone
    private = np.zeros(1 << 20, np.uint8)
    with file_behind(private.ctypes.data, private.nbytes) as fd:
        assert fd is None
