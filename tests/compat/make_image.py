"""Write a small pool image of the format that this kvfs writes, and a manifest of what it holds.

    python -m tests.compat.make_image tests/compat/images/v1-catalog2.tar.zst

An image is written once per version of format and catalog, and never again: it stands for the pools
out there. That without a catalog's version in its name has a catalog of version 1.
The archive holds `pool`, `device` and `manifest.json`. Copies of devices do not open where they are
(their URL is in the catalog, their place in the superblock); `test_images.py` shows the way.
"""

import base64
import hashlib
import io
import json
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zstandard

import kvfs
from kvfs.keys import KeyArray
from kvfs.tree import Tree
from kvfs.units import PAGE

LAYOUT = kvfs.Layout("uint8", (512,), 8, model="compat")  # blocks of 4 KiB
FILES = {"small.bin": 10_000, "folder/large.bin": (5 << 20) + 123, "empty": 0}
RAW_FILES = {"slots.bin": 20_000}
ATTRIBUTES = {"small.bin": {"user.model": "compat"}, "folder": {"user.kind": "folder"}}
CHAT_TOKENS, LOOSE_BLOCKS = 61, 3
BULK_BLOCKS = 17  # of 1 MiB: more than a segment, so that one is sealed


def content_of(name: str, nbytes: int) -> bytes:
    """Return bytes made from a name, so that the manifest needs no payloads.

    Every page differs, but little, so that the archive stays small.
    """
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
    line = np.random.default_rng(seed).integers(0, 256, 64, np.uint8)
    pages = np.tile(line, (-(-nbytes // PAGE), PAGE // 64))
    pages[:, :8] = np.arange(len(pages), dtype="<u8").view(np.uint8).reshape(-1, 8)
    return pages.tobytes()[:nbytes]


def write_file(pool: kvfs.Pool, namespace: kvfs.Namespace, path: str, content: bytes) -> None:
    tree, parent = Tree(pool), namespace.info.root_node_id
    *folders, name = path.split("/")
    for folder in folders:
        parent = tree.make_directory(parent, folder, 0o755, 0, 0).node_id
    node = tree.create_file(parent, name, 0o640, 0, 0)
    handle = pool.files.open_write(node, truncate=True)
    if content:
        pool.files.write(handle, 0, content)
    pool.files.close_write(handle)


def write_others(pool: kvfs.Pool, namespace: kvfs.Namespace) -> None:
    """Make what came with version 2 of the catalog: raw files and attributes."""
    tree, root = Tree(pool), namespace.info.root_node_id
    for path, nbytes in RAW_FILES.items():
        node = pool.catalog.resolve(root, path)
        if node is None:
            write_file(pool, namespace, path, content_of(path, nbytes))
            node = pool.catalog.resolve(root, path)
        assert node is not None
        tree.set_attribute(node, b"user.kvfs.raw", b"1")
    for path, attributes in ATTRIBUTES.items():
        node = pool.catalog.resolve(root, path)
        assert node is not None
        for name, value in attributes.items():
            tree.set_attribute(node, name.encode(), value.encode())


def encoded(keys: KeyArray) -> list[str]:
    """Return keys as the manifest has them."""
    return [base64.b64encode(key.tobytes()).decode() for key in keys]


def put(
    space: kvfs.Namespace, tokens: npt.NDArray[Any], sizes: list[int], context: str = ""
) -> tuple[list[str], dict[str, int]]:
    """Put the blocks of a token sequence, into a context if named; return keys and sizes."""
    keys, parents = space.keys(tokens)
    names = encoded(keys)
    payloads = [content_of(name, n) for name, n in zip(names, sizes, strict=True)]
    if context:
        space.context(context).append(keys, payloads, tokens=tokens, durability="sync")
    else:
        space.put(keys, payloads, parents=parents, durability="sync")
    return names, dict(zip(names, sizes, strict=True))


def fill(pool: kvfs.Pool) -> dict[str, Any]:
    """Put blocks, contexts and files; return what is there now, by namespace."""
    space = pool.namespace("compat", LAYOUT, retention="durable")
    full, tokens = LAYOUT.block_bytes, np.arange(1000, 1000 + CHAT_TOKENS)
    sizes = [full] * (CHAT_TOKENS // 8) + [CHAT_TOKENS % 8 * LAYOUT.token_bytes]
    keys, blocks = put(space, tokens, sizes, "users/one/chat")
    space.context("users/one/chat").pin()
    fork, _ = put(space, tokens[:32], sizes[:4], "fork")
    assert fork == keys[:4]
    _, loose = put(space, np.arange(LOOSE_BLOCKS * 8), [full] * LOOSE_BLOCKS)
    bulk = pool.namespace("bulk", kvfs.Layout("uint8", (1 << 20,), 1, model="bulk"))
    _, many = put(bulk, np.arange(BULK_BLOCKS), [1 << 20] * BULK_BLOCKS)
    for path, nbytes in FILES.items():
        write_file(pool, space, path, content_of(path, nbytes))
    write_others(pool, space)
    pool.sync()
    chat = {"keys": keys, "tokens": tokens.tolist(), "pinned": True}
    return {
        "compat": {
            "retention": "durable",
            "layout": LAYOUT.to_json(),
            "blocks": blocks | loose,
            "contexts": {
                "users/one/chat": chat,
                "fork": {"keys": fork, "tokens": chat["tokens"][:32], "pinned": False},
            },
            "files": FILES,
            "raw_files": RAW_FILES,
            "attributes": ATTRIBUTES,
        },
        "bulk": {
            "retention": "cache",
            "layout": bulk.layout.to_json(),
            "blocks": many,
            "contexts": {},
            "files": {},
        },
    }


def write_image(target: Path) -> None:
    """Make a pool and pack it."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        url = f"dir:{root}/device?size=128MiB&segment=16MiB"
        with kvfs.create_pool(root / "pool", [url], name="compat") as pool:
            manifest = fill(pool)
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive:
            raw = json.dumps(manifest, indent=1).encode()
            info = tarfile.TarInfo("manifest.json")
            info.size = len(raw)
            archive.addfile(info, io.BytesIO(raw))
            for path in sorted(root.rglob("*")):
                if path.name not in ("lock", "kvfs.lock", "control.sock"):
                    archive.add(path, str(path.relative_to(root)), recursive=False, filter=_plain)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(zstandard.ZstdCompressor(level=19).compress(packed.getvalue()))


def _plain(info: tarfile.TarInfo) -> tarfile.TarInfo:
    """Leave out who made it, and when."""
    info.uid = info.gid = info.mtime = 0
    info.uname = info.gname = ""
    return info


if __name__ == "__main__":
    write_image(Path(sys.argv[1]))
