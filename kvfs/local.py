"""The backend of the process that owns the pool: store, catalog, pins and files put together.

Layer: L4.
"""

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from kvfs.backend import Mask
from kvfs.buffers import Addresses
from kvfs.durability import Durability, PutResult
from kvfs.engine.catalog_schema import NamespaceInfo, Node, NodeState, Origin
from kvfs.engine.index import RecordArray
from kvfs.engine.reader import Lease
from kvfs.errors import NotFoundError
from kvfs.keys import KeyArray
from kvfs.phase import Phase

if TYPE_CHECKING:
    from kvfs.pool import Pool


class LocalBackend:
    """What `kvfs.backend.Backend` says, done here. Names it makes belong to `uid` and `gid`."""

    def __init__(self, pool: "Pool", uid: int | None = None, gid: int | None = None) -> None:
        """Bind to a pool; without `uid` and `gid`, for this process's own user."""
        self._pool = pool
        self._store = pool.store
        self._uid = os.getuid() if uid is None else uid
        self._gid = os.getgid() if gid is None else gid

    # --- blocks
    def put(
        self,
        namespace_id: int,
        keys: KeyArray,
        addresses: Addresses,
        lengths: Addresses,
        *,
        parents: KeyArray | None,
        tokens: npt.NDArray[np.uint32],
        durability: Durability,
    ) -> PutResult:
        """Store blocks that are not there yet."""
        result = self._store.put(
            namespace_id, keys, addresses, lengths,
            parents=parents, tokens=tokens, durability=durability,
        )  # fmt: skip
        if durability is not Durability.NONE:
            self._pool.note_written()
        return result

    def match_prefix(self, namespace_id: int, keys: KeyArray) -> int:
        """Return how many leading keys are resident."""
        return self._store.match_prefix(namespace_id, keys)

    def lookup(self, namespace_id: int, keys: KeyArray) -> RecordArray:
        """Return the fastest copy of each block; length 0 for a miss."""
        return self._store.lookup(namespace_id, keys)

    def touch(self, namespace_id: int, keys: KeyArray, phase: Phase = Phase.UNKNOWN) -> int:
        """Note an access to blocks without reading them; return how many are resident."""
        return self._store.touch(namespace_id, keys, phase)

    def read_into(
        self, namespace_id: int, keys: KeyArray, addresses: Addresses, lengths: Addresses,
        phase: Phase = Phase.UNKNOWN,
    ) -> Mask:  # fmt: skip
        """Copy whole blocks to memory, verified; return which were."""
        return self._store.read_into(namespace_id, keys, addresses, lengths, phase)

    def lease(self, namespace_id: int, keys: KeyArray, phase: Phase = Phase.UNKNOWN) -> Lease:
        """Hold verified blocks for reading in place; give back with `release`."""
        return self._store.lease(namespace_id, keys, phase=phase)

    def release(self, lease: Lease) -> None:
        """End a lease; idempotent."""
        self._store.release(lease)

    def read_ranges(
        self,
        lease: Lease,
        positions: npt.NDArray[np.integer],
        offsets: Addresses,
        lengths: Addresses,
        addresses: Addresses,
    ) -> Mask:
        """Copy parts of leased blocks."""
        return self._store.read_ranges(lease, positions, offsets, lengths, addresses)

    # --- contexts
    def open_context(self, info: NamespaceInfo, path: str, *, create: bool) -> Node | None:
        """Return the node at a path below the namespace, made if `create` and there is none."""
        node = self._pool.catalog.resolve(info.root_node_id, path)
        if node is None and create:
            node = self._pool.make_context(info, path, uid=self._uid, gid=self._gid)
        return node

    def contexts(self, info: NamespaceInfo) -> Iterator[Node]:
        """Yield the contexts made through the API, depth first, by name."""
        for node in self._pool.walk(info.root_node_id):
            if node.origin is Origin.API and node.state is NodeState.ACTIVE:
                yield node

    def node(self, node_id: int) -> Node:
        """Return a context as it is now."""
        try:
            return self._pool.catalog.node(node_id)
        except NotFoundError:
            raise NotFoundError(f"context was dropped: node {node_id}") from None

    def path_of(self, node_id: int) -> str:
        """Return the path of a node, its namespace in front."""
        return self._pool.catalog.path_of(self.node(node_id).node_id)

    def keys(self, node_id: int) -> KeyArray:
        """Return all keys of a context."""
        return self._pool.catalog.keys(self.node(node_id).node_id)

    def tokens(self, node_id: int) -> npt.NDArray[np.uint32] | None:
        """Return the token ids of a context, or None where those of some block are not known."""
        return self._pool.catalog.tokens(self.node(node_id).node_id)

    def append(
        self,
        info: NamespaceInfo,
        node_id: int,
        keys: KeyArray,
        addresses: Addresses,
        lengths: Addresses,
        *,
        counts: npt.NDArray[np.uint32],
        token_ids: npt.NDArray[np.uint32] | None,
        durability: Durability,
        replace_tail: bool,
    ) -> PutResult:
        """Store blocks, then name them at the end of a context."""
        pool, layout = self._pool, info.layout
        node = self.node(node_id)
        kept = node.block_count - int(replace_tail)
        parent = pool.catalog.keys(node_id, kept - 1, kept) if kept > 0 else None
        if parent is None:
            parent = np.zeros((1, keys.shape[1]), np.uint8)
        with self._store.being_named(info.namespace_id, keys):
            result = self.put(
                info.namespace_id, keys, addresses, lengths,
                parents=np.concatenate([parent, keys[:-1]]), tokens=counts, durability=durability,
            )  # fmt: skip
            pool.catalog.append_blocks(
                node_id,
                keys,
                block_bytes=layout.block_bytes,
                stride=layout.stride,
                tail_bytes=int(lengths[-1]),
                token_counts=counts,
                tokens=token_ids,
                now_ns=pool.clock.wall_ns(),
                replace_tail=replace_tail,
            )
        if durability is Durability.SYNC:
            pool.catalog.sync()
        pool.pins.follow(self.node(node_id))
        return result

    def link(self, info: NamespaceInfo, node_id: int, keys: KeyArray) -> int:
        """Name stored blocks at the end of a context; return how many, up to the first miss."""
        pool, layout = self._pool, info.layout
        with self._store.being_named(info.namespace_id, keys):
            records = self.lookup(info.namespace_id, keys)
            stops = np.flatnonzero(records["length"] < layout.block_bytes)
            count = int(stops[0]) if len(stops) else len(keys)
            count += int(count < len(keys) and records["length"][count] > 0)
            if not count:
                return 0
            pool.catalog.append_blocks(
                node_id,
                keys[:count],
                block_bytes=layout.block_bytes,
                stride=layout.stride,
                tail_bytes=int(records["length"][count - 1]),
                token_counts=records["tokens"][:count],
                now_ns=pool.clock.wall_ns(),
            )
        pool.pins.follow(self.node(node_id))
        return count

    def set_pinned(self, node_id: int, is_pinned: bool) -> None:
        """Keep the blocks of a context from eviction, or stop doing so."""
        node = self.node(node_id)
        if is_pinned:
            self._pool.pins.pin(node)
        else:
            self._pool.pins.unpin(node)

    def drop(self, node_id: int) -> None:
        """Remove the name of a context."""
        self._pool.files.remove(self.node(node_id))
