"""One client of a pool, as its owner sees it: what it may, what it holds, answers to what it asks.

Layer: L5.

- A session begins with Hello on its first connection and ends with that connection: then its
  lease page is forgotten, and what it held is free. Other connections join it, one per thread.
- Everything that a client says is checked here or below: sizes, permissions, kinds of nodes.

Concurrency: each connection is answered by a thread of its own; the engine's lock guards
the holder.
"""

import os
import secrets
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from kvfs import __version__, _native
from kvfs.clients import channel
from kvfs.clients import messages as msg
from kvfs.clients.peer import READ, WRITE, Peer
from kvfs.clients.regions import Regions
from kvfs.clients.tray import Tray
from kvfs.devices.descriptors import read_only
from kvfs.durability import as_durability
from kvfs.engine.catalog_schema import (
    ROOT_NODE_ID,
    NamespaceInfo,
    Node,
    NodeKind,
    Origin,
    name_bytes,
)
from kvfs.engine.holds import LEASE_SLOTS, Holder
from kvfs.engine.reader import EVENT
from kvfs.engine.segment_table import SegmentState, SegmentStatus
from kvfs.errors import NotFoundError, UsageError
from kvfs.keys import KEY_BYTES, KeyArray, as_key_array
from kvfs.layout import Layout
from kvfs.local import LocalBackend
from kvfs.phase import Phase

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvfs.pool import Pool

RING_EVENTS: Final = 1 << 16
HEARTBEAT_MS: Final = 500
_DIGESTS_BYTES_MAX: Final = 8 << 20  # of one answer
_CONTEXTS_MAX: Final = 1000  # of one answer


@dataclass(slots=True, eq=False)
class Connection:
    """One connection of a session: what came with a message, what it shares, what goes back."""

    regions: Regions
    tray: Tray | None = None
    received: list[int] = field(default_factory=list)
    outgoing: list[int] = field(default_factory=list)

    def close(self) -> None:
        """Close descriptors on their way, and forget the memory. To be called once."""
        channel.close_all(self.received)
        channel.close_all(self.outgoing)
        self.regions.close()
        if self.tray is not None:
            self.tray.close()


class Session:
    """A client's session."""

    def __init__(self, pool: "Pool", peer: Peer, command: str) -> None:
        self.pool = pool
        self.peer = peer
        self.token = secrets.token_bytes(16)
        self.name = f"pid {peer.pid} ({msg.printable(command)[:80] or 'unknown'})"
        self._backend = LocalBackend(pool, peer.uid, peer.gid)
        self._losses = pool.losses.new_listener()
        self._ring = _native.AccessRing(RING_EVENTS)
        self.pidfd = -1  # the server's
        self._is_ended = False
        self.holder = Holder(self.name, _native.LeasePage(LEASE_SLOTS), pool.clock.monotonic_ns())
        with pool.store.state.lock:
            pool.store.state.holds.add(self.holder)

    def welcome(self, connection: Connection) -> msg.Welcome:
        """Answer Hello."""
        page = self.holder.page
        connection.outgoing += [os.dup(page.fd), read_only(page.notice_fd), os.dup(self._ring.fd)]
        state = self.pool.store.state
        return msg.Welcome(
            version=msg.VERSION, kvfs_version=__version__, owner_pid=os.getpid(),
            token=self.token, name=self.name, pool_name=self.pool.name,
            pool_uuid=str(self.pool.uuid), verify_reads=state.options.verify_reads,
            heartbeat_ms=HEARTBEAT_MS, ranks=bytes(state.ranks()),
        )  # fmt: skip

    def answer(self, request: msg.Request, connection: Connection) -> Any:
        """Answer a request; the type of the answer is `messages.ANSWERS[type(request)]`."""
        handler: Callable[[Session, Any, Connection], Any] | None
        handler = _HANDLERS.get(type(request))
        if handler is None:
            raise UsageError("the session has begun already")
        return handler(self, request, connection)

    def drain(self) -> int:
        """Take note of what the client has read; return how many events there were."""
        events = np.frombuffer(self._ring.drain(), EVENT)
        if len(events):
            self.pool.store.reader.touch(events, self.holder.namespaces)
        return len(events)

    def end(self, *, is_told: bool) -> None:
        """Forget the client, and free what it held; idempotent.

        A client that `is_told` finds that its views may be other bytes. One whose owner leaves is
        not: what it has mapped stays as it is.
        """
        state = self.pool.store.state
        with state.lock:
            if self._is_ended:
                return
            self._is_ended = True
            self.drain()  # what it read last counts as well
            if is_told:
                self.holder.page.revoke()
            state.holds.remove(self.holder)
        state.free_drained()
        self.holder.page.close()
        self._ring.close()

    # --- namespaces

    def _list(self, request: msg.NamespaceList, connection: Connection) -> msg.NamespaceListAnswer:
        del request, connection
        infos = [info for info in self.pool.namespaces() if self.peer.may(self._root(info), READ)]
        return msg.NamespaceListAnswer([msg.from_info(info) for info in infos])

    def _open(self, request: msg.NamespaceOpen, connection: Connection) -> msg.NamespaceAnswer:
        del connection
        name = msg.from_name(request.name)
        layout = Layout.from_json(request.layout) if request.layout else None
        if layout is not None and self.pool.catalog.namespace_by_name(name) is None:
            self.peer.require(self.pool.catalog.node(ROOT_NODE_ID), WRITE)
        if request.retention not in ("cache", "durable"):
            raise UsageError(f"retention {request.retention!r}: expected 'cache' or 'durable'")
        space = self.pool.namespace(
            name, layout, retention="durable" if request.retention == "durable" else "cache",
            uid=self.peer.uid, gid=self.peer.gid,
        )  # fmt: skip
        self.peer.require(self._root(space.info), READ)
        return msg.from_info(space.info)

    def _attach(self, request: msg.Attach, connection: Connection) -> msg.NamespaceAnswer:
        info = self._namespace(request.namespace_id, READ)
        state = self.pool.store.state
        with state.activity.during(info.namespace_id), state.lock:
            self.holder.namespaces.add(info.namespace_id)  # before it sees where blocks are
            connection.outgoing.append(read_only(state.index(info.namespace_id).fd))
        return msg.from_info(info)

    # --- blocks

    def _segments(self, request: msg.Segments, connection: Connection) -> msg.SegmentsAnswer:
        places = _array(request.places, np.uint64, "places").tolist()
        if places:  # else it is about what is gone
            self._namespace(request.namespace_id, READ)
        known = _array(request.known, np.uint64, "places").tolist()
        if len(places) > msg.PLACES_MAX or len(known) > LEASE_SLOTS:
            raise UsageError(f"at most {msg.PLACES_MAX} segments can be asked for at once")
        state, answers, done, nbytes = self.pool.store.state, list[msg.SegmentAnswer](), 0, 0
        fetched: list[int] = []
        with state.lock:
            for place in places:
                segment = self._segment(place)
                if segment is None or segment.namespace_id != request.namespace_id:
                    pass
                elif segment.handle.fd < 0:
                    fetched.append(place)
                else:
                    answers.append(_describe(place, segment))
                    nbytes += len(answers[-1].digests)
                    connection.outgoing.append(read_only(segment.handle.fd))
                    segment.handle.is_shared = True
                done += 1
                if nbytes > _DIGESTS_BYTES_MAX:
                    break
            gone = [place for place in known if self._is_gone(place)]
        return msg.SegmentsAnswer(
            answers, done, np.array(gone, np.uint64).tobytes(),
            np.array(fetched, np.uint64).tobytes(),
        )  # fmt: skip

    def _segment(self, place: int) -> SegmentState | None:
        """Return a segment by its place, unless it is gone or about to go."""
        found = self.pool.store.state.segment_at(place >> 56, (place >> 32) & 0xFFFFFF)
        if found is None or found.handle.generation != place & 0xFFFFFFFF:
            return None
        return None if found.status is SegmentStatus.DRAINING else found

    def _is_gone(self, place: int) -> bool:
        """Say whether there is no such segment; those of others are none."""
        found = self._segment(place)
        return found is None or found.namespace_id not in self.holder.namespaces

    def _verify(self, request: msg.Verify, connection: Connection) -> msg.VerifyAnswer:
        del connection
        info = self._namespace(request.namespace_id, READ)
        keys = _keys(request.keys, info.namespace_id)
        store = self.pool.store
        if request.again:
            with store.state.activity.during(info.namespace_id):
                good = store.reader.verify_again(info.namespace_id, keys)
        else:
            lease = store.lease(info.namespace_id, keys, phase=Phase.BACKGROUND)
            good = lease.records["length"] > 0
            store.release(lease)
        return msg.VerifyAnswer(good.astype(np.uint8).tobytes())

    def _fetch(self, request: msg.Fetch, connection: Connection) -> msg.FetchAnswer:
        info = self._namespace(request.namespace_id, READ)
        keys = _keys(request.keys, info.namespace_id)
        offsets = _array(request.offsets, np.uint64, "offsets")
        lengths = _array(request.lengths, np.uint64, "lengths")
        if not len(offsets) == len(lengths) == len(keys):
            raise UsageError(f"{len(keys)} keys need as many offsets and lengths")
        places = msg.tray_places(lengths)
        if connection.tray is None:
            connection.tray = Tray()
            connection.outgoing.append(connection.tray.descriptor())
        phase = Phase(request.phase) if request.phase in set(Phase) else Phase.UNKNOWN
        good = connection.tray.fill(
            self.pool.store, info.namespace_id, keys, offsets, lengths, places, phase
        )
        return msg.FetchAnswer(good.astype(np.uint8).tobytes())

    def _share(self, request: msg.Share, connection: Connection) -> msg.ShareAnswer:
        if len(connection.received) != 1:
            raise UsageError("a descriptor of the shared memory must come with the message")
        return msg.ShareAnswer(connection.regions.share(connection.received[0], request.nbytes))

    def _unshare(self, request: msg.Unshare, connection: Connection) -> msg.Done:
        connection.regions.unshare(request.region)
        return msg.Done()

    def _put(self, request: msg.Put, connection: Connection) -> msg.PutAnswer:
        info = self._namespace(request.namespace_id, WRITE)
        keys = _keys(request.keys, info.namespace_id)
        parents = as_key_array(request.parents) if request.parents else None
        if parents is not None and len(parents) != len(keys):
            raise UsageError(f"{len(keys)} keys need as many parents")
        addresses, lengths, counts = _ranges(request, connection, len(keys), info)
        return msg.PutAnswer(
            self._backend.put(
                info.namespace_id,
                keys,
                addresses,
                lengths,
                parents=parents,
                tokens=counts,
                durability=as_durability(request.durability),
            )
        )

    # --- contexts

    def _context_open(self, request: msg.ContextOpen, connection: Connection) -> msg.ContextAnswer:
        del connection
        info = self._namespace(request.namespace_id, WRITE if request.create else READ)
        path = msg.from_name(request.path).strip("/")
        name_bytes(path)
        if not path:
            raise UsageError("a context needs a name")
        node = self._backend.open_context(info, path, create=request.create)
        return msg.ContextAnswer(None if node is None else msg.from_node(node))

    def _context_list(
        self, request: msg.ContextList, connection: Connection
    ) -> msg.ContextListAnswer:
        del connection
        info = self._namespace(request.namespace_id, READ)
        first = max(0, request.skip)
        found = list(islice(self._backend.contexts(info), first, first + _CONTEXTS_MAX + 1))
        nodes = [msg.from_node(node) for node in found[:_CONTEXTS_MAX]]
        return msg.ContextListAnswer(nodes, len(found) > _CONTEXTS_MAX)

    def _context_node(self, request: msg.ContextNode, connection: Connection) -> msg.ContextAnswer:
        del connection
        return msg.ContextAnswer(msg.from_node(self._context(request.node_id, READ)))

    def _context_path(self, request: msg.ContextPath, connection: Connection) -> msg.PathAnswer:
        del connection
        node = self._context(request.node_id, READ)
        return msg.PathAnswer(msg.to_name(self._backend.path_of(node.node_id)))

    def _context_keys(self, request: msg.ContextKeys, connection: Connection) -> msg.ArrayAnswer:
        del connection
        node = self._context(request.node_id, READ)
        start = min(max(0, request.start), node.block_count)
        stop = min(start + msg.KEYS_MAX, node.block_count)
        keys = self.pool.catalog.keys(node.node_id, start, stop)
        return msg.ArrayAnswer(keys.tobytes(), node.block_count)

    def _context_tokens(
        self, request: msg.ContextTokens, connection: Connection
    ) -> msg.ArrayAnswer:
        del connection
        node = self._context(request.node_id, READ)
        tokens = self._backend.tokens(node.node_id)
        if tokens is None:
            return msg.ArrayAnswer(None, 0)
        start = max(0, request.start)
        part = tokens[start : start + 32 * msg.KEYS_MAX]
        return msg.ArrayAnswer(part.astype("<u4").tobytes(), len(tokens))

    def _context_append(self, request: msg.ContextAppend, connection: Connection) -> msg.PutAnswer:
        node = self._context(request.node_id, WRITE)
        info = self._namespace(request.put.namespace_id, WRITE)
        if node.namespace_id != info.namespace_id:
            raise UsageError("the context belongs to another namespace")
        keys = _keys(request.put.keys, info.namespace_id)
        addresses, lengths, counts = _ranges(request.put, connection, len(keys), info)
        if not len(keys) or (lengths[:-1] < info.layout.block_bytes).any():
            raise UsageError("only the last block of a context may be partial")
        tokens = None if request.tokens is None else _array(request.tokens, np.uint32, "tokens")
        if tokens is not None and len(tokens) != int(counts.sum(dtype=np.uint64)):
            raise UsageError(f"{len(tokens)} tokens do not make blocks of as many as said")
        return msg.PutAnswer(
            self._backend.append(
                info,
                node.node_id,
                keys,
                addresses,
                lengths,
                counts=counts,
                token_ids=tokens,
                durability=as_durability(request.put.durability),
                replace_tail=request.replace_tail,
            )
        )

    def _context_link(self, request: msg.ContextLink, connection: Connection) -> msg.LinkAnswer:
        del connection
        node = self._context(request.node_id, WRITE)
        info = self._namespace(node.namespace_id, WRITE)
        keys = _keys(request.keys, info.namespace_id)
        return msg.LinkAnswer(self._backend.link(info, node.node_id, keys) if len(keys) else 0)

    def _context_pin(self, request: msg.ContextPin, connection: Connection) -> msg.Done:
        del connection
        node = self._context(request.node_id, WRITE)
        self._backend.set_pinned(node.node_id, request.is_pinned)
        return msg.Done()

    def _context_drop(self, request: msg.ContextDrop, connection: Connection) -> msg.Done:
        del connection
        self._backend.drop(self._context(request.node_id, WRITE).node_id)
        return msg.Done()

    # --- the pool

    def _ping(self, request: msg.Ping, connection: Connection) -> msg.Done:
        del request, connection
        return msg.Done()

    def _flush(self, request: msg.Flush, connection: Connection) -> msg.Done:
        del request, connection
        self.pool.flush()
        return msg.Done()

    def _sync(self, request: msg.Sync, connection: Connection) -> msg.Done:
        del request, connection
        self.pool.sync(self._losses)
        return msg.Done()

    def _status(self, request: msg.Status, connection: Connection) -> msg.StatusAnswer:
        del request, connection
        return msg.StatusAnswer(self.pool.statistics())

    # --- checks

    def _root(self, info: NamespaceInfo) -> Node:
        return self.pool.catalog.node(info.root_node_id)

    def _namespace(self, namespace_id: int, bits: int) -> NamespaceInfo:
        """Return a namespace that the client may use so."""
        info = self.pool.catalog.namespace(namespace_id)
        self.peer.require(self._root(info), bits)
        return info

    def _context(self, node_id: int, bits: int) -> Node:
        """Return a context made through the API that the client may use so."""
        node = self._backend.node(node_id)
        if node.kind is not NodeKind.CONTEXT or node.origin is not Origin.API:
            raise NotFoundError(f"no such context: node {node_id}")
        self._namespace(node.namespace_id, bits)
        return node


def _describe(place: int, segment: SegmentState) -> msg.SegmentAnswer:
    handle = segment.handle
    digests = b""
    if handle.is_file:
        digests = segment.digests(np.arange(segment.entry_count)).tobytes()
    return msg.SegmentAnswer(
        place, handle.nbytes, not handle.is_file, segment.needs_verify, digests
    )


def _array(raw: bytes, dtype: Any, what: str) -> npt.NDArray[Any]:
    try:
        return np.frombuffer(raw, dtype)
    except ValueError as error:
        raise UsageError(f"{what}: {len(raw)} bytes are no whole number of items") from error


def _keys(raw: bytes, namespace_id: int) -> KeyArray:
    if len(raw) > KEY_BYTES * msg.KEYS_MAX:
        raise UsageError(f"at most {msg.KEYS_MAX} keys can be sent at once")
    return as_key_array(raw, namespace_id)


def _ranges(
    put: msg.Put, connection: Connection, count: int, info: NamespaceInfo
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64], npt.NDArray[np.uint32]]:
    """Return addresses, lengths and token counts of what is to be stored."""
    regions = _array(put.regions, np.uint32, "regions")
    offsets = _array(put.offsets, np.uint64, "offsets")
    lengths = _array(put.lengths, np.uint64, "lengths")
    counts = _array(put.counts, np.uint32, "token counts")
    if not len(regions) == len(offsets) == len(lengths) == len(counts) == count:
        raise UsageError(f"{count} keys need as many ranges and token counts")
    if (lengths > info.layout.stride).any():  # before anybody looks at so much memory
        raise UsageError(
            f"block size out of range: namespace {info.name}: expected 1 to {info.layout.stride} "
            f"bytes, found {int(lengths.max())}"
        )
    return connection.regions.addresses(regions, offsets, lengths), lengths, counts


_HANDLERS: Final[dict[type[msg.Request], Any]] = {
    msg.Ping: Session._ping, msg.NamespaceList: Session._list, msg.NamespaceOpen: Session._open,
    msg.Attach: Session._attach, msg.Segments: Session._segments, msg.Verify: Session._verify,
    msg.Fetch: Session._fetch, msg.Share: Session._share,
    msg.Unshare: Session._unshare, msg.Put: Session._put,
    msg.ContextOpen: Session._context_open, msg.ContextList: Session._context_list,
    msg.ContextNode: Session._context_node, msg.ContextPath: Session._context_path,
    msg.ContextKeys: Session._context_keys, msg.ContextTokens: Session._context_tokens,
    msg.ContextAppend: Session._context_append, msg.ContextLink: Session._context_link,
    msg.ContextPin: Session._context_pin, msg.ContextDrop: Session._context_drop,
    msg.Flush: Session._flush, msg.Sync: Session._sync, msg.Status: Session._status,
}  # fmt: skip
