"""Extended attributes: `user.kvfs.*`, what kvfs knows of a context or namespace.

Layer: L5.

Of a context: tokens, blocks, resident_blocks, layout, fingerprint, namespace, origin, lane, tiers,
extents. Of a namespace's directory: id, layout, fingerprint, retention, which can be set. They are
computed when asked for, but `lane`, which open handles decide (`KvfsOperations`). `extents` names
the place of every byte, for readers that go past the mount; places are valid while the file is held
open.
"""

import errno
import json
import os
from collections.abc import Callable
from typing import Final

import numpy as np
import pyfuse3

from kvfs.engine.catalog_schema import Node, Origin
from kvfs.engine.segment_table import group_by_segment
from kvfs.pool import Pool
from kvfs.tree import Tree
from kvfs.units import PAGE

PREFIX: Final = b"user.kvfs."
RETENTION: Final = b"user.kvfs.retention"
LANE: Final = b"user.kvfs.lane"
VALUE_BYTES_MAX: Final = 65536  # the kernel's XATTR_SIZE_MAX


class Xattrs:
    """Extended attributes of nodes. Synchronous, thread-safe."""

    def __init__(self, pool: Pool, tree: Tree) -> None:
        """Describe the nodes of a pool."""
        self._pool = pool
        self._tree = tree
        self._of_context: dict[bytes, Callable[[Node], str]] = {
            b"tokens": lambda node: str(node.token_count),
            b"blocks": lambda node: str(node.block_count),
            b"resident_blocks": self._resident_blocks,
            b"layout": lambda node: self._namespace(node).layout.to_json(),
            b"fingerprint": lambda node: self._namespace(node).fingerprint.hex(),
            b"namespace": lambda node: self._namespace(node).name,
            b"origin": lambda node: "api" if node.origin is Origin.API else "file",
            b"tiers": self._tiers,
            b"extents": self._extents,
        }
        self._of_namespace: dict[bytes, Callable[[Node], str]] = {
            b"id": lambda node: f"{node.namespace_id:016x}",
            b"layout": lambda node: self._namespace(node).layout.to_json(),
            b"fingerprint": lambda node: self._namespace(node).fingerprint.hex(),
            b"retention": lambda node: self._namespace(node).retention,
        }

    def names(self, node: Node) -> list[bytes]:
        """Return the names that `get` answers."""
        names = [PREFIX + name for name in self._known(node)]
        return names if node.is_directory else [*names, LANE]

    def get(self, node: Node, name: bytes) -> bytes:
        """Return one value.

        Raises:
            FUSEError: ENODATA: no such attribute. E2BIG: longer than the kernel takes.
        """
        known = self._known(node).get(name.removeprefix(PREFIX))
        if known is None or not name.startswith(PREFIX):
            raise pyfuse3.FUSEError(errno.ENODATA)
        value = os.fsencode(known(node))
        if len(value) > VALUE_BYTES_MAX:
            raise pyfuse3.FUSEError(errno.E2BIG)
        return value

    def set(self, node: Node, name: bytes, value: bytes) -> None:
        """Set a namespace's retention.

        Raises:
            FUSEError: ENOTSUP: any other attribute.
            UsageError: Not "cache" or "durable".
        """
        if name != RETENTION or self._tree.namespace_of(node) is None:
            raise pyfuse3.FUSEError(errno.ENOTSUP)
        self._tree.set_retention(node, os.fsdecode(value))

    def remove(self, node: Node, name: bytes) -> None:
        """Refuse.

        Raises:
            FUSEError: ENOTSUP: kvfs's own. ENODATA: there is none.
        """
        raise pyfuse3.FUSEError(errno.ENOTSUP if name in self.names(node) else errno.ENODATA)

    # --- internals

    def _known(self, node: Node) -> dict[bytes, Callable[[Node], str]]:
        if not node.is_directory:
            return self._of_context
        return {} if self._tree.namespace_of(node) is None else self._of_namespace

    def _namespace(self, node: Node):  # type: ignore[no-untyped-def]
        return self._pool.catalog.namespace(node.namespace_id)

    def _resident_blocks(self, node: Node) -> str:
        keys, _ = self._pool.files.resident(node)
        return str(self._pool.store.match_prefix(node.namespace_id, keys))

    def _tiers(self, node: Node) -> str:
        """Bytes of all copies, by device."""
        keys, _ = self._pool.files.resident(node)
        index = self._pool.store.state.index(node.namespace_id)
        tiers = {}
        for device in self._pool.store.state.devices:
            nbytes = int(index.lookup(keys, device.info.index)["length"].sum())
            if nbytes:
                tiers[device.info.name] = nbytes
        return json.dumps(tiers)

    def _extents(self, node: Node) -> str:
        """Path, offset and length of the fastest copy of each byte, in order, runs joined.

        They stay true while somebody has the file open.
        """
        store = self._pool.store
        with self._pool.files.places(node) as records:
            paths = np.full(len(records), "", object)
            for device, slot, generation, positions in group_by_segment(records):
                segment = store.state.segment_of(device, slot, generation)
                if segment is not None:
                    paths[positions] = _path_of(segment.handle.fd)
            extents: list[dict[str, object]] = []
            end = -1
            for path, record in zip(paths, records, strict=True):
                offset, length = int(record["page"]) * PAGE, int(record["length"])
                if extents and extents[-1]["path"] == path and offset == end:
                    extents[-1]["length"] = int(str(extents[-1]["length"])) + length
                else:
                    extents.append({"path": path, "offset": offset, "length": length})
                end = offset + length
        return json.dumps(extents)


def _path_of(fd: int) -> str:
    """Return a path that opens what this descriptor is open on."""
    path = os.readlink(f"/proc/self/fd/{fd}")
    return path if os.path.exists(path) else f"/proc/{os.getpid()}/fd/{fd}"
