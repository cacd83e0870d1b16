"""The public surface of a namespace: blocks by key, contexts by name.

Layer: L4.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kvfs.backend import AnyPool
from kvfs.buffers import addresses_of
from kvfs.durability import DurabilityName, PutResult, as_durability
from kvfs.engine.catalog_schema import NamespaceInfo, Node, NodeKind, Origin, name_bytes
from kvfs.engine.index import RecordArray
from kvfs.errors import ExistsError, NotFoundError, UsageError
from kvfs.keys import NO_PARENT, KeyArray, as_key_array, as_u32_array, chain_keys
from kvfs.layout import Layout
from kvfs.phase import PhaseName, as_phase
from kvfs.views import View


class Namespace:
    """One tenant and layout. Get it from `Pool.namespace`; cheap, holds nothing open. Thread-safe.

    Attributes:
        pool: The pool it belongs to.
        backend: Who has the blocks: the pool in this process, or its owner in another.
        info: Id, name, layout, fingerprint, retention.
    """

    def __init__(self, pool: AnyPool, info: NamespaceInfo) -> None:
        self.pool = pool
        self.backend = pool.backend
        self.info = info

    @property
    def layout(self) -> Layout:
        """What a block holds."""
        return self.info.layout

    def keys(
        self, token_ids: Sequence[int] | npt.NDArray[Any], parent: bytes = NO_PARENT
    ) -> tuple[KeyArray, KeyArray]:
        """Name the blocks of a token sequence; see kvfs.keys.chain_keys.

        Returns (keys, parents).
        """
        return chain_keys(self.info.namespace_id, token_ids, self.layout.block_tokens, parent)

    def put(
        self,
        keys: Any,
        buffers: Any,
        *,
        parents: Any = None,
        token_counts: Sequence[int] | npt.NDArray[np.uint32] | None = None,
        durability: DurabilityName = "async",
    ) -> PutResult:
        """Store blocks that are not there yet.

        Args:
            keys: (n, 32) uint8, or n 32-byte keys, of this namespace; see `keys`.
            buffers: n payloads: an (n, ...) array or CPU tensor, or n buffers, tensors or
                (address, length) pairs. At most `layout.stride` bytes each; fewer than
                `layout.block_bytes` make a partial block. They are read until return and not kept.
            parents: Keys of the blocks before, like `keys`; zeros or None for none. Hints for
                eviction.
            token_counts: Tokens per block; `layout.block_tokens` each when missing.
            durability: "none": in memory is enough. "async": on a persistent device within
                `PoolOptions.async_delay_ms`. "sync": on a persistent device on return.

        Returns:
            How many blocks and bytes were stored, and how many were there before.

        Raises:
            NoSpaceError: Nothing more can be evicted. Blocks before the failing one may be stored.
            UsageError: Wrong shape or size, or "sync" on a pool without a persistent device.
            DeviceError: Writes failed on every device.

        Cost: one pass over the bytes for copy and XXH3-128, per tier written.
        """
        keys = as_key_array(keys, self.info.namespace_id)
        addresses, lengths = addresses_of(buffers, len(keys))
        counts = _token_counts(self.layout, len(keys), None, token_counts)
        return self.backend.put(
            self.info.namespace_id,
            keys,
            addresses,
            lengths,
            parents=None if parents is None else as_key_array(parents),
            tokens=counts,
            durability=as_durability(durability),
        )

    def match_prefix(self, keys: Any) -> int:
        """Return how many leading blocks are resident.

        Lock-free; says nothing about the next moment.
        """
        return self.backend.match_prefix(
            self.info.namespace_id, as_key_array(keys, self.info.namespace_id)
        )

    def lookup(self, keys: Any) -> RecordArray:
        """Return the fastest copy of each block as a structured array (kvfs.engine.index.RECORD).

        Fields: key, device, segment, generation, page (offset / 4096), length (stored bytes; 0 for
            a miss), tokens. A
        copy may move at any time; hold a `view` to keep it.
        """
        return self.backend.lookup(
            self.info.namespace_id, as_key_array(keys, self.info.namespace_id)
        )

    def touch(self, keys: Any, *, phase: PhaseName | None = None) -> int:
        """Note an access to blocks without reading them: eviction takes them later.

        `phase` is as in `read_into`. Returns how many of them are resident.
        """
        return self.backend.touch(
            self.info.namespace_id, as_key_array(keys, self.info.namespace_id), as_phase(phase)
        )

    def read_into(
        self, keys: Any, buffers: Any, *, phase: PhaseName | None = None
    ) -> npt.NDArray[np.bool_]:
        """Copy blocks into memory, verifying checksums in the same pass.

        Args:
            keys: (n, 32) uint8.
            buffers: n writable buffers, as in `put`, each with room for its block.
            phase: What for: "prefill", "decode" or "background"; None: not said. It is counted
                (`kvfs_accesses_total`); what is read in the background grows no younger by that.

        Returns:
            (n,) bool: which blocks were copied. False is a miss: the buffer holds unspecified
            bytes.

        Raises:
            UsageError: Wrong shape, or no such phase.
        """
        keys = as_key_array(keys, self.info.namespace_id)
        addresses, lengths = addresses_of(buffers, len(keys), writable=True)
        return self.backend.read_into(
            self.info.namespace_id, keys, addresses, lengths, as_phase(phase)
        )

    def view(self, keys: Any, *, phase: PhaseName | None = None) -> View:
        """Map resident blocks, in order, into one contiguous read-only range; see View.

        `phase` is as in `read_into`.

        Raises:
            NotFoundError: A block is not resident.
            UsageError: A block before the last is partial.
        """
        keys = as_key_array(keys, self.info.namespace_id)
        return View(
            self.backend, self.info.namespace_id, keys,
            block_bytes=self.layout.block_bytes, stride=self.layout.stride, phase=as_phase(phase),
        )  # fmt: skip

    def context(self, name: str, *, create: bool = True) -> "Context":
        """Return the context of that name ('a/b/c' makes directories), made empty if there is none.

        Raises:
            NotFoundError: It does not exist and `create` is False.
            ExistsError: The name is a directory, or a file written through the mount.
            UsageError: It is no name.
        """
        name_bytes(name)  # refuses what is no text
        path = name.strip("/")
        if not path:
            raise UsageError("a context needs a name")
        node = self.backend.open_context(self.info, path, create=create)
        if node is None:
            raise NotFoundError(f"no such context: {self.info.name}/{path}")
        if node.kind is not NodeKind.CONTEXT or node.origin is not Origin.API:
            raise ExistsError(
                f"name is taken by a directory or plain file: {self.info.name}/{path}"
            )
        return Context(self, node)

    def contexts(self) -> Iterator["Context"]:
        """Yield all contexts made through the API, depth first, by name."""
        for node in self.backend.contexts(self.info):
            yield Context(self, node)

    def __repr__(self) -> str:
        return f"Namespace({self.info.name!r})"


class Context:
    """A named, ordered list of blocks: the KV of one token sequence; a file on the mount."""

    def __init__(self, namespace: Namespace, node: Node) -> None:
        self.namespace = namespace
        self._node_id = node.node_id

    @property
    def node(self) -> Node:
        """The catalog's row, as it is now.

        Raises:
            NotFoundError: The context was dropped.
        """
        return self.namespace.backend.node(self._node_id)

    @property
    def name(self) -> str:
        """Its path inside the namespace."""
        return self.namespace.backend.path_of(self._node_id).partition("/")[2]

    @property
    def keys(self) -> KeyArray:
        """All its keys, (n, 32) uint8; some blocks may have been evicted, see `resident_blocks`."""
        return self.namespace.backend.keys(self._node_id)

    @property
    def tokens(self) -> npt.NDArray[np.uint32] | None:
        """The token ids given to `append`, or None where those of some block were not given."""
        return self.namespace.backend.tokens(self._node_id)

    @property
    def token_count(self) -> int:
        """Tokens of all its blocks."""
        return self.node.token_count

    @property
    def resident_blocks(self) -> int:
        """How many leading blocks are resident."""
        return self.namespace.match_prefix(self.keys)

    def append(
        self,
        keys: Any,
        buffers: Any,
        *,
        tokens: Sequence[int] | npt.NDArray[Any] | None = None,
        token_counts: Sequence[int] | npt.NDArray[np.uint32] | None = None,
        durability: DurabilityName = "async",
        replace_tail: bool = False,
    ) -> PutResult:
        """Store blocks and add them to the end of the context.

        Blocks already stored, here or in another context, are not written again.

        Args:
            keys: (n, 32) uint8, continuing the chain of `self.keys`.
            buffers: n payloads as in Namespace.put; only the last may be partial.
            tokens: Token ids of these blocks, kept with the context.
            token_counts: Tokens per block; from `tokens`, else full blocks, when missing.
            durability: As in Namespace.put. With "sync" the list is persisted too, after the
                blocks.
            replace_tail: The context ends in a partial block, which the first of these replaces.

        Raises:
            UsageError: The context ends in a partial block and `replace_tail` is not set.
            BusyError: The context is pinned and has outgrown its share; the blocks are appended,
                as durable as asked, and the new ones are not pinned.
        """
        info, layout = self.namespace.info, self.namespace.layout
        keys = as_key_array(keys, info.namespace_id)
        addresses, lengths = addresses_of(buffers, len(keys))
        if not len(keys):
            return PutResult(0, 0, 0, 0)
        if (lengths[:-1] < layout.block_bytes).any():
            raise UsageError("only the last block of a context may be partial")
        token_ids = None if tokens is None else as_u32_array(tokens, "tokens")
        return self.namespace.backend.append(
            info,
            self._node_id,
            keys,
            addresses,
            lengths,
            counts=_token_counts(layout, len(keys), token_ids, token_counts),
            token_ids=token_ids,
            durability=as_durability(durability),
            replace_tail=replace_tail,
        )

    def link(self, keys: Any) -> int:
        """Add blocks that are stored already to the end of the context.

        Ends at the first block that is not resident, or after a partial one. Returns how many were
        added. Durability: flush (the list; blocks are as durable as they were put).

        Args:
            keys: (n, 32) uint8, continuing the chain of `self.keys`.

        Raises:
            UsageError: The context ends in a partial block.
            BusyError: As in `append`.
        """
        info = self.namespace.info
        keys = as_key_array(keys, info.namespace_id)
        return self.namespace.backend.link(info, self._node_id, keys) if len(keys) else 0

    def view(self, *, phase: PhaseName | None = None) -> View:
        """Map the whole context; see Namespace.view."""
        return self.namespace.view(self.keys, phase=phase)

    def pin(self) -> None:
        """Keep the blocks from eviction until `unpin`, across restarts."""
        self.namespace.backend.set_pinned(self._node_id, True)

    def unpin(self) -> None:
        """Let the blocks be evicted again."""
        self.namespace.backend.set_pinned(self._node_id, False)

    def drop(self) -> None:
        """Remove the name. Blocks stay as cache until evicted; other contexts may share them."""
        self.namespace.backend.drop(self._node_id)

    def __repr__(self) -> str:
        return f"Context({self.namespace.info.name!r}, node {self._node_id})"


def _token_counts(
    layout: Layout,
    count: int,
    tokens: npt.NDArray[np.uint32] | None,
    given: Sequence[int] | npt.NDArray[np.uint32] | None,
) -> npt.NDArray[np.uint32]:
    """Return tokens per block: as given, or by cutting `tokens` into blocks, or full blocks."""
    if given is not None:
        counts = as_u32_array(given, "token counts")
        if len(counts) != count:
            raise UsageError(f"expected {count} token counts, found {len(counts)}")
        return counts
    full = layout.block_tokens
    counts = np.full(count, full, np.uint32)
    if tokens is None:
        return counts
    if -(-len(tokens) // full) != count:
        raise UsageError(f"{len(tokens)} tokens do not make {count} blocks of {full}")
    if count:
        counts[-1] = len(tokens) - (count - 1) * full
    return counts
