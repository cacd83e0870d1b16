"""What namespaces, contexts and views ask of whoever has the blocks.

Layer: L4.

- Two answer: `kvfs.local.LocalBackend` in the process that owns the pool, and
  `kvfs.clients.remote.RemoteBackend` in every other one. Above, nobody knows which.
- Keys come checked: (n, 32) uint8, C-contiguous, of the namespace. Addresses and lengths are
  uint64 arrays; the caller keeps the memory behind them alive until return.
- Everything is synchronous and thread-safe, and raises KvfsError as `Namespace` and `Context` say.
  A client's raise UnavailableError, too, while the pool has no owner.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from kvfs.buffers import Addresses
from kvfs.durability import Durability, PutResult
from kvfs.engine.catalog_schema import NamespaceInfo, Node
from kvfs.engine.index import RecordArray
from kvfs.engine.stitching import Backings
from kvfs.keys import KeyArray
from kvfs.phase import Phase
from kvfs.statistics import PoolStatistics

Mask = npt.NDArray[np.bool_]


class Held(Protocol):
    """Blocks whose bytes stay where they are until they are released.

    Attributes:
        records: Where they are; length 0 for a miss.
    """

    records: RecordArray

    def backings(self) -> Backings:
        """Say where to map each block from."""

    def check(self) -> None:
        """Raise LeaseExpiredError if the bytes may have changed since."""


class Backend(Protocol):
    """Blocks by key, contexts by node."""

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

    def match_prefix(self, namespace_id: int, keys: KeyArray) -> int:
        """Return how many leading keys are resident."""

    def lookup(self, namespace_id: int, keys: KeyArray) -> RecordArray:
        """Return the fastest copy of each block; length 0 for a miss."""

    def touch(self, namespace_id: int, keys: KeyArray, phase: Phase = Phase.UNKNOWN) -> int:
        """Note an access to blocks without reading them; return how many are resident."""

    def read_into(
        self, namespace_id: int, keys: KeyArray, addresses: Addresses, lengths: Addresses,
        phase: Phase = Phase.UNKNOWN,
    ) -> Mask:  # fmt: skip
        """Copy whole blocks to memory, verified; return which were."""

    def lease(self, namespace_id: int, keys: KeyArray, phase: Phase = Phase.UNKNOWN) -> Held:
        """Hold verified blocks for reading in place; give back with `release`."""

    def release(self, lease: Any) -> None:
        """End what `lease` began; idempotent."""

    def read_ranges(
        self,
        lease: Any,
        positions: npt.NDArray[np.integer],
        offsets: Addresses,
        lengths: Addresses,
        addresses: Addresses,
    ) -> Mask:
        """Copy parts of leased blocks: `lengths[i]` bytes from `offsets[i]` of `positions[i]`."""

    # --- contexts
    def open_context(self, info: NamespaceInfo, path: str, *, create: bool) -> Node | None:
        """Return the node at a path below the namespace, made if `create` and there is none."""

    def contexts(self, info: NamespaceInfo) -> Iterator[Node]:
        """Yield the contexts made through the API, depth first, by name."""

    def node(self, node_id: int) -> Node:
        """Return a context as it is now; NotFoundError if it was dropped."""

    def path_of(self, node_id: int) -> str:
        """Return the path of a node, its namespace in front."""

    def keys(self, node_id: int) -> KeyArray:
        """Return all keys of a context."""

    def tokens(self, node_id: int) -> npt.NDArray[np.uint32] | None:
        """Return the token ids of a context, or None where those of some block are not known."""

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
        """Store blocks, then name them at the end of a context. There is at least one."""

    def link(self, info: NamespaceInfo, node_id: int, keys: KeyArray) -> int:
        """Name stored blocks at the end of a context; return how many, up to the first miss."""

    def set_pinned(self, node_id: int, is_pinned: bool) -> None:
        """Keep the blocks of a context from eviction, or stop doing so."""

    def drop(self, node_id: int) -> None:
        """Remove the name of a context."""


class AnyPool(Protocol):
    """A pool, whichever process owns it: what `Pool` and `RemotePool` have in common."""

    backend: Backend

    def statistics(self) -> PoolStatistics:
        """Return a snapshot."""

    def flush(self) -> None:
        """Persist all blocks and give new files their names."""

    def sync(self) -> None:
        """Make everything done so far survive a power cut."""

    def close(self) -> None:
        """End it; idempotent."""
