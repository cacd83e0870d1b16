"""What the tests of the command lines share."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import kvfs
from kvfs.cli import admin
from kvfs.engine.catalog_schema import ROOT_NODE_ID
from kvfs.tree import Tree

GOLDEN = Path(__file__).parent / "golden"
LAYOUT = kvfs.Layout("float16", (4, 2, 8), 64)


@dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def error(self) -> Any:
        return json.loads(self.err)


class Admin:
    """Runs kvfs-admin in this process."""

    def __init__(self, capsys, pool: Path) -> None:
        self._capsys = capsys
        self.pool = pool

    def __call__(self, *words: str | Path) -> Result:
        self._capsys.readouterr()
        code = admin.main(["--pool", str(self.pool), *map(str, words)])
        captured = self._capsys.readouterr()
        return Result(code, captured.out, captured.err)


def fill(path: Path) -> None:
    """Put two contexts and two files into a closed pool."""
    with kvfs.open_pool(path, background=False) as pool:
        space = pool.namespace("m", LAYOUT)
        tokens = np.arange(64 * 40)
        keys, _ = space.keys(tokens)
        data = np.random.default_rng(1).integers(0, 256, (40, LAYOUT.block_bytes), np.uint8)
        space.context("chat/1").append(keys, data, tokens=tokens)
        space.context("chat/2").append(keys[:2], data[:2])
        write_file(pool, "small", b"s" * 10_000)
        write_file(pool, "large", b"l" * (5 << 20))


def write_file(pool: kvfs.Pool, name: str, content: bytes) -> None:
    node = Tree(pool).create_file(ROOT_NODE_ID, name, 0o644, os.getuid(), os.getgid())
    handle = pool.files.open_write(node, truncate=True)
    pool.files.write(handle, 0, content)
    pool.files.close_write(handle)


def shape(value: Any) -> Any:
    """Return names and types of a JSON value; of a list, the shape of its first item."""
    if isinstance(value, dict):
        return {key: shape(part) for key, part in value.items()}
    if isinstance(value, list):
        return [shape(value[0])] if value else []
    return type(value).__name__


def golden(name: str, text: str) -> None:
    """Compare with a golden file; KVFS_UPDATE_GOLDEN=1 writes it instead."""
    path = GOLDEN / name
    if os.environ.get("KVFS_UPDATE_GOLDEN") == "1":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert path.exists(), f"{path} is missing: run with KVFS_UPDATE_GOLDEN=1 and look at it"
    assert text == path.read_text(encoding="utf-8"), (
        f"{path.name} differs: if that is meant, run with KVFS_UPDATE_GOLDEN=1"
    )
