"""A pool that another process owns: the same surface as `Pool`, and what is behind it.

Layer: L4.

- Reads go past the owner (`reading`); everything that changes something is a message to it
  (`writing`). An object of this process is worth nothing in a forked child.
- When the owner goes, what is mapped can still be read, and views stay; what needs the owner raises
  UnavailableError. A thread looks for the next owner and attaches to it. Whether a put or append
  that was under way has been done is not known then: a put can be repeated, an append be looked up.
"""

import logging
import os
import threading
import uuid
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt

from kvfs import _native
from kvfs.backend import Backend, Mask
from kvfs.buffers import Addresses
from kvfs.clients import messages as msg
from kvfs.clients.link import Link
from kvfs.clients.reading import RemoteLease, RemoteReader
from kvfs.clients.segments import Attached
from kvfs.clients.writing import SharedMemory, put_message, ranges, total
from kvfs.durability import Durability, PutResult
from kvfs.engine.catalog_schema import NamespaceInfo, Node
from kvfs.engine.index import RecordArray
from kvfs.errors import ClosedError, KvfsError, UsageError
from kvfs.keys import KEY_BYTES, KeyArray
from kvfs.layout import Layout
from kvfs.namespace import Namespace
from kvfs.phase import Phase
from kvfs.statistics import PoolStatistics

_RETRY_S: Final = 0.05
_RETRY_S_MAX: Final = 1.0
_log = logging.getLogger("kvfs.client")
_pools: "weakref.WeakSet[RemotePool]" = weakref.WeakSet()


def _leave_to_parent() -> None:
    for pool in _pools:
        pool.leave_to_parent()


# Asking for the process's id at every read would be a system call.
os.register_at_fork(after_in_child=_leave_to_parent)


class RemotePool:
    """A pool owned by another process. Thread-safe. Use as a context manager, or call `close`.

    Attributes:
        path: The pool's directory.
        name: Its name.
        uuid: Its identity.
        backend: What namespaces, contexts and views of it use.
    """

    def __init__(self, path: Path) -> None:
        """Attach to the owner; see kvfs.open_pool.

        Raises:
            UnavailableError: The pool has no owner that serves it.
        """
        self.path = path
        self._is_forked = False
        _pools.add(self)
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._memory = SharedMemory()
        link = Link(path)
        self._attached = Attached(link)
        self.name = link.welcome.pool_name
        self.uuid = uuid.UUID(link.welcome.pool_uuid)
        self.backend: Backend = RemoteBackend(self.attached, self.link, self._memory)
        self._watcher = threading.Thread(target=self._watch, name="kvfs-client", daemon=True)
        self._watcher.start()

    def leave_to_parent(self) -> None:
        """Refuse everything: this process was forked from the client, and shares what it holds."""
        self._is_forked = True

    # --- namespaces

    def namespace(
        self, name: str, layout: Layout | None = None, *, retention: str = "cache"
    ) -> Namespace:
        """Return a namespace, made if it is not there and `layout` is given; see Pool.namespace.

        Raises:
            RefusedError: This user may not read it, or not make it.
        """
        if layout is not None and not isinstance(layout, Layout):
            raise UsageError(f"expected a kvfs.Layout, found {layout!r:.80}")
        text = "" if layout is None else layout.to_json()
        answer = self.link().ask(msg.NamespaceOpen(msg.to_name(name), text, retention))
        return Namespace(self, msg.to_info(answer))

    def namespaces(self) -> list[NamespaceInfo]:
        """List the namespaces that this user may read."""
        return [msg.to_info(one) for one in self.link().ask(msg.NamespaceList()).namespaces]

    # --- life

    def share(self, fd: int, buffer: Any) -> None:
        """Let the owner read from memory of this process, so that puts from it copy nothing here.

        Args:
            fd: A memory file (memfd, or in /dev/shm).
            buffer: A map of it from its start, which lives as long as this pool is open.
        """
        address, nbytes = _native.buffer_address(buffer)
        self._memory.add(fd, address, nbytes)

    def flush(self) -> None:
        """Persist all blocks. Durability: persist."""
        self.link().ask(msg.Flush())

    def sync(self) -> None:
        """Make everything done so far survive a power cut; see Pool.sync.

        Raises:
            DeviceError: A persist failed, now or before: blocks put before are lost. A client is
                told once of each loss, whichever of its threads asks.
        """
        self.link().ask(msg.Sync())

    def statistics(self) -> PoolStatistics:
        """Return a snapshot."""
        statistics: PoolStatistics = self.link().ask(msg.Status()).statistics
        return statistics

    def close(self) -> None:
        """Leave the owner; idempotent. Open views stay mapped, held no more: they say so."""
        if self._closing.is_set():
            return
        self._closing.set()
        with self._lock:
            link = self._attached.link
        if not self._is_forked:
            link.close()
            self._watcher.join()
        link.dispose()
        self._memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.close()

    def __repr__(self) -> str:
        return f"RemotePool({str(self.path)!r})"

    # --- internals

    def attached(self) -> Attached:
        """Return what is attached; anew where the owner has taken the lease page away."""
        if self._closing.is_set():
            raise ClosedError("the pool is closed")
        if self._is_forked:
            raise ClosedError("the pool belongs to the parent process: open it after the fork")
        attached = self._attached
        if attached.link.page.is_revoked and not attached.link.is_lost:
            attached.link.close()  # the watcher attaches again
            self._renew(attached)
        return self._attached

    def link(self) -> Link:
        """Return the link for a request; if the owner is gone, looks once for another."""
        attached = self.attached()
        if attached.link.is_lost:
            self._renew(attached)
        return self._attached.link

    def _renew(self, old: Attached) -> None:
        """Attach to whoever owns the pool now.

        Raises:
            UnavailableError: Nobody serves it.
        """
        with self._lock:
            if self._attached is not old or self._closing.is_set():
                return
            self._attached = Attached(Link(self.path))
        old.link.close()
        old.forget_all()
        _log.info("attached again: %s", self.path)

    def _watch(self) -> None:
        while not self._closing.is_set():
            attached = self._attached
            attached.link.wait_lost(attached.forget_freed)
            attached.link.close()
            wait_s = _RETRY_S
            while self._attached is attached and not self._closing.is_set():
                try:
                    self._renew(attached)
                except (KvfsError, OSError, MemoryError):  # later there may be room
                    self._closing.wait(wait_s)
                    wait_s = min(_RETRY_S_MAX, 2 * wait_s)
            attached.link.dispose()


class RemoteBackend:
    """What `kvfs.backend.Backend` says, done by the owner or past it."""

    def __init__(self, attached: Any, link: Any, memory: SharedMemory) -> None:
        """Bind to a pool: functions that return what is attached, and the link for requests."""
        self._reader = RemoteReader(attached)
        self._link = link
        self._memory = memory

    # --- blocks
    def match_prefix(self, namespace_id: int, keys: KeyArray) -> int:
        """Return how many leading keys are resident."""
        return self._reader.match_prefix(namespace_id, keys)

    def lookup(self, namespace_id: int, keys: KeyArray) -> RecordArray:
        """Return the fastest copy of each block; length 0 for a miss."""
        return self._reader.lookup(namespace_id, keys)

    def touch(self, namespace_id: int, keys: KeyArray, phase: Phase = Phase.UNKNOWN) -> int:
        """Note an access to blocks without reading them; return how many are resident."""
        return self._reader.touch(namespace_id, keys, phase)

    def read_into(
        self, namespace_id: int, keys: KeyArray, addresses: Addresses, lengths: Addresses,
        phase: Phase = Phase.UNKNOWN,
    ) -> Mask:  # fmt: skip
        """Copy whole blocks to memory, verified; return which were."""
        return self._reader.read_into(namespace_id, keys, addresses, lengths, phase)

    def lease(self, namespace_id: int, keys: KeyArray, phase: Phase = Phase.UNKNOWN) -> RemoteLease:
        """Hold verified blocks for reading in place; give back with `release`."""
        return self._reader.lease(namespace_id, keys, phase)

    def release(self, lease: RemoteLease) -> None:
        """End a lease; idempotent."""
        lease.release()

    def read_ranges(
        self,
        lease: RemoteLease,
        positions: npt.NDArray[np.integer],
        offsets: Addresses,
        lengths: Addresses,
        addresses: Addresses,
    ) -> Mask:
        """Copy parts of leased blocks."""
        return self._reader.read_ranges(lease, positions, offsets, lengths, addresses)

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
        if parents is not None and len(parents) != len(keys):
            raise UsageError(f"{len(keys)} keys need as many parents and buffers")
        results = []
        with self._link().line() as line:
            for where in ranges(line, self._memory, addresses, lengths):
                message = put_message(
                    namespace_id, keys, parents, lengths, tokens, durability.value, where
                )
                results.append(line.ask(message)[0].result)
        return total(results)

    # --- contexts
    def open_context(self, info: NamespaceInfo, path: str, *, create: bool) -> Node | None:
        """Return the node at a path below the namespace, made if `create` and there is none."""
        request = msg.ContextOpen(info.namespace_id, msg.to_name(path), create=create)
        answer = self._link().ask(request)
        return None if answer.node is None else msg.to_node(answer.node)

    def contexts(self, info: NamespaceInfo) -> Iterator[Node]:
        """Yield the contexts made through the API, depth first, by name."""
        skip = 0
        while True:
            answer = self._link().ask(msg.ContextList(info.namespace_id, skip))
            yield from map(msg.to_node, answer.nodes)
            skip += len(answer.nodes)
            if not answer.has_more:
                return

    def node(self, node_id: int) -> Node:
        """Return a context as it is now."""
        return msg.to_node(self._link().ask(msg.ContextNode(node_id)).node)

    def path_of(self, node_id: int) -> str:
        """Return the path of a node, its namespace in front."""
        return msg.from_name(self._link().ask(msg.ContextPath(node_id)).path)

    def keys(self, node_id: int) -> KeyArray:
        """Return all keys of a context."""
        raw = self._array(lambda start: msg.ContextKeys(node_id, start), KEY_BYTES)
        return np.frombuffer(raw or b"", np.uint8).reshape(-1, KEY_BYTES)

    def tokens(self, node_id: int) -> npt.NDArray[np.uint32] | None:
        """Return the token ids of a context, or None where those of some block are not known."""
        raw = self._array(lambda start: msg.ContextTokens(node_id, start), 4)
        return None if raw is None else np.frombuffer(raw, np.uint32)

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
        """Store blocks, then name them; more than a message's worth in several steps."""
        results = []
        ends = np.cumsum(counts, dtype=np.int64)
        with self._link().line() as line:
            for where in ranges(line, self._memory, addresses, lengths):
                tokens = None
                if token_ids is not None:
                    first = int(ends[where.start - 1]) if where.start else 0
                    tokens = token_ids[first : int(ends[where.stop - 1])].tobytes()
                message = put_message(
                    info.namespace_id, keys, None, lengths, counts, durability.value, where
                )
                request = msg.ContextAppend(
                    node_id=node_id, put=message, tokens=tokens,
                    replace_tail=replace_tail and not where.start,
                )  # fmt: skip
                results.append(line.ask(request)[0].result)
        return total(results)

    def link(self, info: NamespaceInfo, node_id: int, keys: KeyArray) -> int:
        """Name stored blocks; more than a message's worth in several steps."""
        count = 0
        while True:
            part = keys[count : count + msg.KEYS_MAX]
            added = int(self._link().ask(msg.ContextLink(node_id, part.tobytes())).count)
            count += added
            if added < len(part) or count == len(keys):
                return count
            if self.node(node_id).tail_bytes < info.layout.block_bytes:
                return count  # after a partial block

    def set_pinned(self, node_id: int, is_pinned: bool) -> None:
        """Keep the blocks of a context from eviction, or stop doing so."""
        self._link().ask(msg.ContextPin(node_id, is_pinned))

    def drop(self, node_id: int) -> None:
        """Remove the name of a context."""
        self._link().ask(msg.ContextDrop(node_id))

    def _array(self, request: Any, item_bytes: int) -> bytes | None:
        """Ask for an array in parts."""
        parts, count = [], 0
        while True:
            answer = self._link().ask(request(count))
            if answer.raw is None:
                return None
            parts.append(answer.raw)
            count += len(answer.raw) // item_bytes
            if count >= answer.total or not answer.raw:
                return b"".join(parts)
