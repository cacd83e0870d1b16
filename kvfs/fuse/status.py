"""The virtual directory `/.kvfs/`: status.json, metrics, blocks/<key>.

Layer: L5.

- Read-only, made anew at every open; sizes are those of the moment.
- `blocks` lists nothing: there may be millions. A block is looked up by the hexadecimal digits of
  its key, and readable by the owner of the pool alone, for it stands outside all directories.
"""

import dataclasses
import json
import stat
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import pyfuse3

from kvfs.engine.catalog_schema import STATUS_NAME
from kvfs.errors import NotFoundError
from kvfs.exposition import render
from kvfs.keys import KEY_BYTES, KeyArray
from kvfs.pool import Pool

FIRST_INODE: Final = 1 << 62  # far above what the catalog gives out
STATUS_DIRECTORY: Final = FIRST_INODE
STATUS_FILE: Final = FIRST_INODE + 1
METRICS_FILE: Final = FIRST_INODE + 2
BLOCKS_DIRECTORY: Final = FIRST_INODE + 3
_FIRST_BLOCK: Final = FIRST_INODE + 16
_NAMES: Final = {"status.json": STATUS_FILE, "metrics": METRICS_FILE, "blocks": BLOCKS_DIRECTORY}
_MODES: Final = {
    STATUS_DIRECTORY: stat.S_IFDIR | 0o555,
    STATUS_FILE: stat.S_IFREG | 0o444,
    METRICS_FILE: stat.S_IFREG | 0o444,
    BLOCKS_DIRECTORY: stat.S_IFDIR | 0o500,
}
NAME: Final = STATUS_NAME


def is_virtual(inode: int) -> bool:
    """Say whether an inode lies in `/.kvfs`, itself included."""
    return inode >= FIRST_INODE


class StatusTree:
    """What `/.kvfs` holds. Synchronous; used by one thread at a time."""

    def __init__(self, pool: Pool, mount_snapshot: Callable[[], dict[str, Any]]) -> None:
        """Show a pool, and the mount that shows it."""
        self._pool = pool
        self._mount_snapshot = mount_snapshot
        pool.mount_snapshot = mount_snapshot
        self._begin_ns = pool.clock.wall_ns()
        self._blocks: dict[int, tuple[int, KeyArray, int]] = {}
        self._inode_of_key: dict[bytes, int] = {}
        self._next_inode = _FIRST_BLOCK

    def lookup(self, parent: int, name: str) -> int:
        """Return the inode of a name.

        Raises:
            NotFoundError: There is none.
        """
        if parent == STATUS_DIRECTORY and name in _NAMES:
            return _NAMES[name]
        if parent == BLOCKS_DIRECTORY:
            return self._lookup_block(name)
        raise NotFoundError(f"no such name: {name!r}")

    def forget(self, inode: int) -> None:
        """Let go of what the kernel has forgotten."""
        block = self._blocks.pop(inode, None)
        if block is not None:
            del self._inode_of_key[block[1].tobytes()]

    def names(self, inode: int) -> list[tuple[str, int]]:
        """Return names and inodes that a directory lists."""
        return list(_NAMES.items()) if inode == STATUS_DIRECTORY else []

    def is_directory(self, inode: int) -> bool:
        """Say whether it can be listed."""
        return inode in (STATUS_DIRECTORY, BLOCKS_DIRECTORY)

    def block(self, inode: int) -> tuple[int, KeyArray] | None:
        """Return namespace id and key of a block's inode."""
        found = self._blocks.get(inode)
        return None if found is None else found[:2]

    def content(self, inode: int) -> bytes:
        """Return the bytes of status.json or metrics, as they are now.

        Raises:
            NotFoundError: It is another inode.
        """
        if inode == STATUS_FILE:
            return json.dumps(self.status(), indent=1).encode() + b"\n"
        if inode == METRICS_FILE:
            return render(self._pool)
        raise NotFoundError(f"no such inode: {inode:#x}")

    def entry(self, inode: int) -> pyfuse3.EntryAttributes:
        """Return what stat shows."""
        entry = pyfuse3.EntryAttributes()
        root = self._pool.catalog.node(pyfuse3.ROOT_INODE)
        entry.st_ino = pyfuse3.InodeT(inode)
        entry.st_uid, entry.st_gid = root.uid, root.gid
        entry.st_nlink = 1
        now = self._pool.clock.wall_ns()
        entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = self._begin_ns
        entry.entry_timeout = entry.attr_timeout = 0
        block = self._blocks.get(inode)
        if block is not None:
            entry.st_mode = pyfuse3.ModeT(stat.S_IFREG | 0o400)
            entry.st_size = block[2]
        elif inode in _MODES:
            entry.st_mode = pyfuse3.ModeT(_MODES[inode])
            if not self.is_directory(inode):
                entry.st_size = len(self.content(inode))
                entry.st_mtime_ns = now
        else:
            raise NotFoundError(f"no such inode: {inode:#x}")
        entry.st_blocks = -(-entry.st_size // 512)
        return entry

    def status(self) -> dict[str, Any]:
        """Return the pool and the mount in figures."""
        mount = self._mount_snapshot()
        del mount["times"]  # for metrics: status.json has their counts and sums
        return {
            "schema": {"command": "status", "version": 1},
            "pool": dataclasses.asdict(self._pool.statistics()),
            "mount": {"mounted_since_ns": self._begin_ns, **mount},
        }

    def _lookup_block(self, name: str) -> int:
        try:
            raw = bytes.fromhex(name)
        except ValueError:
            raw = b""
        if len(raw) != KEY_BYTES or raw.hex() != name:
            raise NotFoundError(f"no such block: {name!r}: expected {2 * KEY_BYTES} digits")
        key = np.frombuffer(raw, np.uint8).reshape(1, KEY_BYTES)
        namespace_id = int.from_bytes(raw[:8], "little")
        length = int(self._pool.store.lookup(namespace_id, key)["length"][0])
        if not length:
            raise NotFoundError(f"no such block: {name}")
        inode = self._inode_of_key.get(raw)
        if inode is None:
            inode, self._next_inode = self._next_inode, self._next_inode + 1
            self._inode_of_key[raw] = inode
        self._blocks[inode] = (namespace_id, key, length)
        return inode
