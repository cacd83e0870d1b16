"""Devices of a running pool: each in turn takes over what the one before it holds.

Layer: tool.

A daemon owns the pool; this process is its client, which puts before each change, and at the end
reads all of it.
"""

import contextlib
import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any, Final

import numpy as np

import kvfs
from lab.inside import devices
from lab.inside.tools import StepError, call
from tests.crash.victim import LAYOUT, SPACE

_SIZE: Final = "size=128MiB&segment=16MiB"
_BLOCKS: Final = 256  # per batch: 4 MiB
_END_S: Final = 120.0


def change(where: str) -> dict[str, Any]:
    """Evacuate `dir` to `dax`, that to `pmem`, or have memory of a node beside it for a while.

    Raises:
        StepError: A block is missing or other than it was, or `check --data` finds something.
    """
    root = devices.nvme() / "changes"
    root.mkdir()
    pool = root / "pool"
    (devices.fsdax() / "changes").mkdir(exist_ok=True)
    with kvfs.create_pool(pool, [f"dir:{root}/device?{_SIZE}"]) as made:
        made.namespace(SPACE, LAYOUT, retention="durable")
    call(f"kvfs serve {pool} --log {root}/log")
    try:
        figures = _work(pool, where)
    finally:
        _stop()
    report = json.loads(call(f"kvfs-admin --pool {pool} check --data --json"))
    if report.get("findings"):
        raise StepError(f"{len(report['findings'])} findings, first {report['findings'][0]}")
    kvfs.destroy_pool(pool)
    shutil.rmtree(root)
    return figures


def _work(pool: Path, where: str) -> dict[str, Any]:
    with kvfs.open_pool(pool) as client:
        batches = [_put(client, 0)]
        (old,) = (one["name"] for one in _admin(pool, "device list")["devices"])
        moved = 0
        for number, url in enumerate(_urls(where), 1):
            new = _admin(pool, f"device add '{url}'")["name"]
            batches.append(_put(client, number))
            if not url.startswith("cxl:"):
                moved += _empty(pool, old)
                old = new
            else:
                _empty(pool, new)
            batches.append(_put(client, -number))
        for number, keys in batches:
            out = np.zeros((_BLOCKS, LAYOUT.block_bytes), np.uint8)
            found = client.namespace(SPACE).read_into(keys, out)
            if not found.all() or not np.array_equal(out, _data(number)):
                raise StepError(f"batch {number}: {int(found.sum())} of {_BLOCKS} are there")
        left = [one["kind"] for one in _admin(pool, "device list")["devices"]]
    return {"blocks": len(batches) * _BLOCKS, "moved": moved, "left": ", ".join(left)}


def _urls(where: str) -> list[str]:
    if "node" in where:
        return [f"cxl:node={devices.online_volatile()}?size=64MiB&segment=16MiB"]
    return [f"dax:{devices.nvdimm()}?{_SIZE}", f"pmem:{devices.fsdax()}/changes/device?{_SIZE}",
            f"dax:{devices.cxl_persistent()}?{_SIZE}"]  # fmt: skip


def _empty(pool: Path, name: str) -> int:
    """Evacuate and remove a device; return how many blocks moved."""
    done = _admin(pool, f"device evacuate {name}")
    if not done["is_empty"]:
        raise StepError(f"{name} is not empty: {done}")
    _admin(pool, f"device remove {name}")
    moved: int = done["moved_blocks"]
    return moved


def _stop() -> None:
    """End the daemon, and wait until it has written everything."""
    deadline = time.monotonic() + _END_S
    while pools := json.loads(call("kvfs-admin pool list --json"))["pools"]:
        if time.monotonic() > deadline:
            raise StepError("kvfs serve does not end")
        with contextlib.suppress(ProcessLookupError):
            os.kill(pools[0]["owner_pid"], signal.SIGTERM)
        time.sleep(0.5)


def _admin(pool: Path, words: str) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(call(f"kvfs-admin --pool {pool} {words} --json"))
    return answer


def _data(number: int) -> Any:
    rng = np.random.default_rng(100 + number)
    return rng.integers(0, 256, (_BLOCKS, LAYOUT.block_bytes), np.uint8)


def _put(client: Any, number: int) -> tuple[int, Any]:
    space = client.namespace(SPACE)
    tokens = np.arange(4 * _BLOCKS, dtype=np.uint32) + np.uint32((100 + number) << 16)
    keys, parents = space.keys(tokens)
    space.put(keys, _data(number), parents=parents, durability="sync")
    return number, keys
