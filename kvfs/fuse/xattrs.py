"""Extended attributes: `user.kvfs.*`, what kvfs knows of a context or namespace; others are kept.

Layer: L5.

Of a context: tokens, blocks, resident_blocks, layout, fingerprint, namespace, origin, lane, tiers,
extents. Of a namespace's directory: id, layout, fingerprint, and two that can be set: retention,
and deadline_ms, which is there once it is set (`Pool.set_deadline`). `raw` is
there, and can be set, where files are or become raw (`kvfs.tree`). All but that are
computed when asked for, but `lane`, which open handles decide (`KvfsOperations`). `extents` names
the place of every byte, for readers that go past the mount; places are valid while the file is held
open.

`extents` is a JSON list of `{"path", "offset", "length"}` in the order of the file, adjacent ones
joined. What does not fit into 64 KiB, the most that the kernel takes, is in further attributes:
the list then ends with `{"next": "user.kvfs.extents.<position>", "length": <bytes left>}`, and the
attribute of that name, which is not listed, goes on from that position of the file.
"""

import errno
import json
import logging
import os
import re
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import pyfuse3

from kvfs.engine.catalog_schema import DEADLINE_ATTRIBUTE, RAW_ATTRIBUTE, Node, Origin
from kvfs.engine.index import RecordArray
from kvfs.engine.segment_table import group_by_segment
from kvfs.errors import UsageError
from kvfs.pool import Pool
from kvfs.tree import Tree
from kvfs.units import PAGE

_log = logging.getLogger("kvfs.fuse")
USER: Final = b"user."
PREFIX: Final = b"user.kvfs."
RETENTION: Final = b"user.kvfs.retention"
LANE: Final = b"user.kvfs.lane"
VALUE_BYTES_MAX: Final = 65536  # the kernel's XATTR_SIZE_MAX
_PART: Final = re.compile(rb"user\.kvfs\.extents\.(\d{1,19})\Z")
_LAST_BYTES: Final = 128  # room for the element that says where the list goes on
_GROWTH_BYTES: Final = 24  # of an extent: a separator, and a length that grows as more are joined


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
        names = [PREFIX + name for name in self._known(node)] + self._tree.attribute_names(node)
        return names if node.is_directory else [*names, LANE]

    def get(self, node: Node, name: bytes) -> bytes:
        """Return one value.

        Raises:
            FUSEError: ENODATA: no such attribute. E2BIG: longer than the kernel takes.
        """
        if self._is_kept(name):
            return self._tree.attribute(node, name)
        known = self._known(node).get(name.removeprefix(PREFIX))
        part = _PART.match(name)
        if part is not None and not node.is_directory:
            return self._extents(node, int(part[1])).encode()
        if known is None or not name.startswith(PREFIX):
            raise pyfuse3.FUSEError(errno.ENODATA)
        value = os.fsencode(known(node))
        if len(value) > VALUE_BYTES_MAX:
            raise pyfuse3.FUSEError(errno.E2BIG)
        return value

    def set(self, node: Node, name: bytes, value: bytes) -> None:
        """Set an attribute that is kept, or a namespace's retention.

        Why a value of kvfs's own is refused is logged: the caller sees no more than EINVAL.

        Raises:
            FUSEError: ENOTSUP: any other attribute.
            UsageError: Not "cache" or "durable".
            KvfsError: As `Tree.set_attribute`.
        """
        try:
            self._set(node, name, value)
        except UsageError as error:
            if name.startswith(PREFIX):
                _log.warning("%s of %r was not set: %s", os.fsdecode(name), node.name, error)
            raise

    def _set(self, node: Node, name: bytes, value: bytes) -> None:
        if self._is_kept(name):
            self._tree.set_attribute(node, name, value)
            return
        if name != RETENTION or self._tree.namespace_of(node) is None:
            raise pyfuse3.FUSEError(errno.ENOTSUP)
        self._tree.set_retention(node, os.fsdecode(value))

    def remove(self, node: Node, name: bytes) -> None:
        """Take away an attribute that is kept.

        Raises:
            FUSEError: ENOTSUP: kvfs's own. ENODATA: there is none.
            KvfsError: As `Tree.remove_attribute`.
        """
        if self._is_kept(name):
            self._tree.remove_attribute(node, name)
            return
        raise pyfuse3.FUSEError(errno.ENOTSUP if name in self.names(node) else errno.ENODATA)

    # --- internals

    def _is_kept(self, name: bytes) -> bool:
        """Say whether the catalog has an attribute of this name, not this module."""
        is_own = name in (RAW_ATTRIBUTE, DEADLINE_ATTRIBUTE)
        return is_own or (name.startswith(USER) and not name.startswith(PREFIX))

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

    def _extents(self, node: Node, start: int = 0) -> str:
        """Path, offset and length of the fastest copy of each byte from `start` on, in order.

        They stay true while somebody has the file open.
        """
        store = self._pool.store
        if node.is_raw:
            return self._raw_extents(node, start)
        with self._pool.files.places(node) as records:
            paths = np.full(len(records), "", object)
            for device, slot, generation, positions in group_by_segment(records):
                segment = store.state.segment_of(device, slot, generation)
                if segment is not None and segment.handle.fd >= 0:
                    paths[positions] = _path_of(segment.handle.fd)
            return extents_json(paths.tolist(), records, start)

    def _raw_extents(self, node: Node, start: int) -> str:
        fd = self._pool.files.open_raw(node)
        try:
            path, nbytes = os.readlink(f"/proc/self/fd/{fd}"), os.fstat(fd).st_size
        finally:
            os.close(fd)
        if start >= nbytes or not os.path.exists(path):
            return "[]"
        return json.dumps([{"path": path, "offset": start, "length": nbytes - start}])


def extents_json(paths: Sequence[str], records: RecordArray, start: int = 0) -> str:
    """Return as much as a value may hold of the list of extents; see the module's head.

    Args:
        paths: What to open for each record.
        records: In the order of the file.
        start: Position in the file of the first byte to be listed.
    """
    ends = np.cumsum(records["length"], dtype=np.int64)
    extents: list[dict[str, Any]] = []
    nbytes, end = 0, -1
    for i in range(int(np.searchsorted(ends, start, side="right")), len(records)):
        length = int(records["length"][i])
        position = max(start, int(ends[i]) - length)
        offset = int(records["page"][i]) * PAGE + position - (int(ends[i]) - length)
        length = int(ends[i]) - position
        if extents and extents[-1]["path"] == paths[i] and offset == end:
            extents[-1]["length"] += length
        else:
            extent = {"path": paths[i], "offset": offset, "length": length}
            nbytes += len(json.dumps(extent)) + _GROWTH_BYTES
            if nbytes > VALUE_BYTES_MAX - _LAST_BYTES:
                name = f"{os.fsdecode(PREFIX)}extents.{position}"
                extents.append({"next": name, "length": int(ends[-1]) - position})
                break
            extents.append(extent)
        end = offset + length
    return json.dumps(extents)


def _path_of(fd: int) -> str:
    """Return a path that opens what this descriptor is open on."""
    path = os.readlink(f"/proc/self/fd/{fd}")
    return path if os.path.exists(path) else f"/proc/{os.getpid()}/fd/{fd}"
