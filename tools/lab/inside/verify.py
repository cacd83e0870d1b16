"""Comparing a pool with what was acknowledged before it was cut off.

Layer: tool.

Operations are those of tests/crash/victim.py: sync puts, appends to contexts and files, each the
same in every process. A pool may hold more than was acknowledged, but only what was begun.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import kvfs
from kvfs.engine.catalog_schema import Origin
from kvfs.engine.checker import Severity, check_pool
from tests.crash.victim import LAYOUT, SPACE, expected


@dataclass(slots=True)
class Verdict:
    """What does not hold, in words, and how much was compared.

    Attributes:
        lost: Acknowledged, and not there.
        corrupt: There with other bytes, or a finding of the checker.
        phantom: There, and never begun.
    """

    blocks: int = 0
    files: int = 0
    lost: list[str] = field(default_factory=list)
    corrupt: list[str] = field(default_factory=list)
    phantom: list[str] = field(default_factory=list)


def examine(root: Path, begun: int, done: Collection[int]) -> Verdict:
    """Check a closed pool, open it, and compare.

    Args:
        root: The pool.
        begun: How many operations were begun, the first ones.
        done: The numbers of those that were acknowledged.
    """
    verdict = Verdict()
    for finding in check_pool(root, data=True).findings:
        if finding.severity > Severity.NOTE:
            verdict.corrupt.append(str(finding))
    with kvfs.open_pool(root, background=False) as pool:
        assert isinstance(pool, kvfs.Pool)
        verdict.corrupt += [f"recovery: {problem}" for problem in pool.recovery.problems]
        operations = {number: expected(number) for number in range(begun)}
        _blocks(pool, operations, done, verdict)
        _contexts(pool, operations, done, verdict)
        _files(pool, operations, done, verdict)
    return verdict


def _blocks(
    pool: kvfs.Pool, operations: Mapping[int, Any], done: Collection[int], verdict: Verdict
) -> None:
    space = pool.namespace(SPACE)
    known: set[bytes] = set()
    for number, operation in operations.items():
        if not operation.tokens:
            continue
        keys, _ = space.keys(operation.tokens)
        known.update(key.tobytes() for key in keys)
        out = np.zeros((len(keys), LAYOUT.block_bytes), np.uint8)
        found = space.read_into(keys, out)
        if number in done and not found.all():
            verdict.lost.append(f"operation {number}: {int((~found).sum())} blocks")
        for i in np.flatnonzero(found):
            verdict.blocks += 1
            if out[i].tobytes() != operation.payloads[i]:
                verdict.corrupt.append(f"operation {number}: block {i} has other bytes")
    index = pool.store.state.indexes[space.info.namespace_id]
    for key in index.snapshot()["key"]:
        if key.tobytes() not in known and key[24:].tobytes() != b"kvfsfile":
            verdict.phantom.append(f"block {key.tobytes().hex()}")


def _contexts(
    pool: kvfs.Pool, operations: Mapping[int, Any], done: Collection[int], verdict: Verdict
) -> None:
    """Each context holds its acknowledged appends in order; others may be between them."""
    space = pool.namespace(SPACE)
    root = space.info.root_node_id
    appends = [operation for operation in operations.values() if operation.kind == "append"]
    names = {operation.name for operation in appends}
    there = {node.name for node in pool.walk(root) if node.origin is Origin.API}
    verdict.phantom += [f"context {name}" for name in sorted(there - names)]
    for name in sorted(names):
        is_there = pool.catalog.lookup(root, name) is not None
        found = space.context(name, create=False).keys.tobytes() if is_there else b""
        for operation in (one for one in appends if one.name == name):
            part = space.keys(operation.tokens)[0].tobytes()
            if found.startswith(part):
                found = found[len(part) :]
            elif operation.number in done:
                verdict.lost.append(f"operation {operation.number}: append to {name}")
        if found:
            verdict.phantom.append(f"{name}: {len(found) // 32} keys that were never appended")


def _files(
    pool: kvfs.Pool, operations: Mapping[int, Any], done: Collection[int], verdict: Verdict
) -> None:
    root = pool.namespace(SPACE).info.root_node_id
    names = {one.name: one for one in operations.values() if one.kind == "file"}
    present = {node.name: node for node in pool.walk(root) if node.origin is Origin.FILE}
    verdict.phantom += [f"file {name}" for name in sorted(present.keys() - names.keys())]
    for name, operation in names.items():
        node = present.get(name)
        if node is None:
            if operation.number in done:
                verdict.lost.append(name)
            continue
        reader = pool.files.open_read(node)
        content = bytes(pool.files.read(reader, 0, node.size_bytes + 1))
        pool.files.close_read(reader)
        verdict.files += 1
        if content != operation.payloads[0]:
            verdict.corrupt.append(f"{name}: other bytes")
