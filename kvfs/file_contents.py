"""Contents of files: reading by byte range, and naming new content once it is persisted.

Layer: L4.

- Blocks first, name second: new content of a file is *adopted* (its blocks are in the store, this
  process serves it) and later *published* (its blocks are persisted, the catalog names them). Until
  then the catalog keeps the former content, or a PENDING row that the next open deletes.
- An open file is pinned: eviction passes it over. Its keys are fixed at open; a later version is
  another file.
- A file that lost a block loses its name; whoever has it open gets MediaError for that block.

Locks: the catalog's transaction and `_lock` are never held together, nor the catalog's transaction
while the store is called.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from dataclasses import replace as with_changes
from typing import TYPE_CHECKING

import numpy as np

from kvfs.clock import Clock
from kvfs.engine.catalog import Catalog
from kvfs.engine.catalog_schema import Node, NodeState, Origin
from kvfs.engine.index import RecordArray
from kvfs.engine.store import Store
from kvfs.errors import BusyError, LeaseExpiredError, NotFoundError
from kvfs.file_reading import FileReader, FileReading
from kvfs.keys import KeyArray
from kvfs.layout import Layout

if TYPE_CHECKING:
    from kvfs.engine.reader import Lease

_OPEN_ATTEMPTS = 4
_WHOLE_MAX = 1 << 12  # contexts, a few hundred bytes each
_NAMED_MAX = 1 << 12  # as many files may be named while a row that was read is on its way


@dataclass(slots=True, eq=False)
class Adopted:
    """New content of a file that the catalog does not name yet."""

    node_id: int
    namespace_id: int
    version: int
    keys: KeyArray
    size_bytes: int
    tail_bytes: int
    mtime_ns: int
    ctime_ns: int
    pinned_bytes: int = 0
    """Pinned until it is named, in a durable namespace: only names keep blocks there."""


@dataclass(frozen=True, slots=True)
class _Figures:
    """What stat shows of content."""

    version: int
    size_bytes: int
    block_count: int
    tail_bytes: int
    mtime_ns: int
    ctime_ns: int


def _figures(adopted: Adopted) -> _Figures:
    return _Figures(
        adopted.version, adopted.size_bytes, len(adopted.keys), adopted.tail_bytes,
        adopted.mtime_ns, adopted.ctime_ns,
    )  # fmt: skip


class FileContents(FileReading):
    """Opens, publishes and drops what files hold. Thread-safe."""

    def __init__(
        self, store: Store, catalog: Catalog, layout_of: Callable[[int], Layout], clock: Clock
    ) -> None:
        """Bind to a pool.

        Args:
            store: Blocks.
            catalog: Names.
            layout_of: Layout of a namespace by id.
            clock: For times of files.
        """
        super().__init__(store, clock)
        self._catalog = catalog
        self._layout_of = layout_of
        self._lock = threading.Lock()
        self._publish_lock = threading.Lock()
        self._adopted: dict[int, Adopted] = {}
        self._named: dict[int, _Figures] = {}  # of late: rows read before know nothing of it
        self._readers: dict[int, int] = {}
        self._versions: dict[int, int] = {}  # adopted while somebody had the file open
        self._places: dict[int, Lease] = {}
        self._orphans: dict[int, tuple[int, list[KeyArray]]] = {}
        self._whole: dict[int, tuple[Node, int]] = {}  # contexts found whole; removals before that
        self.on_gone: Callable[[int], None] = lambda _: None  # told of nodes that went

    # --- looking

    def resident(self, node: Node) -> tuple[KeyArray, int]:
        """Return the leading resident keys of a context and the bytes they cover.

        All keys of a file: it is whole, or its name is about to go.
        """
        keys, size, _ = self._content(node)
        return keys, size

    def must_look(self, node: Node) -> bool:
        """Say whether `current` has to look for blocks, which may wait and take long."""
        return node.origin is Origin.API and node.block_count > 0

    def current(self, node: Node) -> Node:
        """Return a node with the size and times that stat shows, of content adopted or resident.

        What was named since the row was read is shown, too.
        """
        adopted = self._adopted.get(node.node_id)
        known = self._named.get(node.node_id) if adopted is None else _figures(adopted)
        if known is not None and (adopted is not None or known.version > node.version):
            return with_changes(
                node,
                size_bytes=known.size_bytes,
                block_count=known.block_count,
                tail_bytes=known.tail_bytes,
                version=known.version,
                mtime_ns=known.mtime_ns,
                ctime_ns=max(node.ctime_ns, known.ctime_ns),
            )
        if not self.must_look(node):
            return node
        try:
            return with_changes(node, size_bytes=self._resident_bytes(node))
        except NotFoundError:
            return node  # gone since its row was read

    def _resident_bytes(self, node: Node) -> int:
        """Return what the leading resident blocks of an API's context cover.

        Cost: reads all keys, unless the row is as it was when all blocks were found, and no block
        of the namespace was removed since.
        """
        removals = self._store.removals(node.namespace_id)
        if self._whole.get(node.node_id) == (node, removals):
            return node.size_bytes
        size = self.resident(node)[1]
        if size == node.size_bytes:
            with self._lock:
                if len(self._whole) >= _WHOLE_MAX:
                    del self._whole[next(iter(self._whole))]
                self._whole[node.node_id] = (node, removals)
        return size

    # --- reading

    def open_read(self, node: Node) -> FileReader:
        """Open the content a node has now, and pin its blocks.

        Raises:
            BusyError: The namespace has too much open.
            NotFoundError: The node is gone, or lost a block and with it its name.
        """
        for _ in range(_OPEN_ATTEMPTS):
            reader = self._pinned(self._catalog.node(node.node_id))
            if self._is_whole(reader):
                return reader
            self.close_read(reader)
            if reader.origin is Origin.FILE:
                self._note_lost(reader)
                raise NotFoundError(f"file lost a block: {node.name!r}; its name was removed")
        raise BusyError(f"context is losing blocks: {node.name!r}; open it again")

    def open_block(self, namespace_id: int, key: KeyArray) -> FileReader:
        """Open one block, (1, 32) uint8, as if it were a file.

        Raises:
            NotFoundError: It is not resident.
            BusyError: The namespace has too much open.
        """
        pinned = self._store.pin(namespace_id, key)
        length = int(self._store.lookup(namespace_id, key)["length"][0])
        reader = FileReader(
            0, key.tobytes().hex(), namespace_id, Origin.API, 0,
            self._stride(namespace_id), key, length, pinned,
        )  # fmt: skip
        if not length:
            self.close_read(reader)
            raise NotFoundError(f"no such block: {reader.name}")
        return reader

    def is_outdated(self, reader: FileReader) -> bool:
        """Say whether a file has other content by now than a reader has open."""
        return self._versions.get(reader.node_id, reader.version) != reader.version

    def catch_up(self, reader: FileReader) -> None:
        """Let a reader grow to what its context has by now, if that begins with what it has open.

        Raises:
            LeaseExpiredError: It does not: the tail was replaced.
            BusyError: The namespace has too much open.
        """
        try:
            node = self._catalog.node(reader.node_id)
        except NotFoundError:
            return  # nobody can have put anything else there
        keys, size, version = self._content(node)
        count = len(reader.keys)
        if version != reader.version or not np.array_equal(keys[:count], reader.keys[: len(keys)]):
            raise LeaseExpiredError(f"content was replaced: {reader.name!r}; open it again")
        if size <= reader.size_bytes:
            return
        more = np.ascontiguousarray(keys[count:])
        pinned = self._store.pin(reader.namespace_id, more) if len(more) else 0
        with self._lock:
            is_first = len(reader.keys) == count and not reader.is_closed
            if is_first:
                reader.keys, reader.size_bytes = keys, size
                reader.pinned_bytes += pinned
        if not is_first and len(more):  # another read of this reader came first
            self._store.unpin(reader.namespace_id, more, pinned)

    def close_read(self, reader: FileReader) -> None:
        """Unpin; the last close of a removed file drops its blocks."""
        self._end_reading(reader)
        if len(reader.keys):
            self._store.unpin(reader.namespace_id, reader.keys, reader.pinned_bytes)
        if not reader.node_id:
            return
        with self._lock:
            self._readers[reader.node_id] -= 1
            if self._readers[reader.node_id]:
                return
            del self._readers[reader.node_id]
            self._versions.pop(reader.node_id, None)
            orphan = self._orphans.pop(reader.node_id, None)
            lease = self._places.pop(reader.node_id, None)
        if lease is not None:
            self._store.release(lease)
        if orphan is not None:
            self._drop(*orphan)

    @contextmanager
    def places(self, node: Node) -> Iterator[RecordArray]:
        """Give where the resident blocks of a context lie while the block runs.

        If somebody has the file open, the places told first stay until the last close: they were
        perhaps handed to a reader that goes past the mount.
        """
        with self._lock:
            known = self._places.get(node.node_id)
        if known is not None:
            yield known.records
            return
        lease = self._store.lease(node.namespace_id, self.resident(node)[0])
        try:
            yield lease.records
        finally:
            with self._lock:
                is_kept = node.node_id in self._readers and node.node_id not in self._places
                if is_kept:
                    self._places[node.node_id] = lease
            if not is_kept:
                self._store.release(lease)

    # --- names

    def remove(self, node: Node) -> None:
        """Remove a context's name; a file's blocks follow when nobody reads them.

        Raises:
            NotFoundError: It is gone already.
        """
        with self._catalog.transaction():
            is_file = node.origin is Origin.FILE
            keys = self._catalog.keys(node.node_id) if is_file else None
            self._catalog.remove(node.node_id, self._clock.wall_ns())
        self.forget(node, keys)

    def forget(self, node: Node, keys: KeyArray | None) -> None:
        """Let go of the bytes of a node whose name is gone already. `keys`: None for an API's."""
        self.on_gone(node.node_id)  # whatever the row said when it was read
        with self._lock:
            adopted = self._adopted.pop(node.node_id, None)
        if adopted is not None:
            self._give_up(adopted)
        if keys is not None:
            self._release(node.node_id, node.namespace_id, keys)

    # --- publishing

    @property
    def has_unpublished(self) -> bool:
        """Whether adopted content waits for its blocks to be persisted."""
        return bool(self._adopted)

    def publish(self) -> None:
        """Persist all blocks, then let the catalog name new content.

        Durability: persist (names: flush).

        Raises:
            DeviceError: A persist failed; new content that lost blocks by it is dropped.
        """
        with self._publish_lock:
            with self._lock:
                batch = list(self._adopted.values())
            try:
                self._store.flush()
            finally:
                # After a flush that went well, too: a block may have been lost before it.
                for adopted in batch:
                    self._drop_if_broken(adopted)
            self._name(batch)

    def _note_adopted(self, adopted: Adopted) -> None:
        """Serve this content from now on."""
        with self._lock:
            before = self._adopted.get(adopted.node_id)
            self._adopted[adopted.node_id] = adopted
            if adopted.node_id in self._readers:
                self._versions[adopted.node_id] = adopted.version
        if before is not None:
            self._give_up(before)

    def _note_mtime(self, node_id: int, mtime_ns: int) -> None:
        """Let content that is not in the catalog yet arrive there with this time."""
        with self._lock:
            adopted = self._adopted.get(node_id)
            if adopted is not None:
                adopted.mtime_ns = mtime_ns

    def _name(self, batch: list[Adopted]) -> None:
        """Let the catalog name persisted content, and release what it replaces.

        Former content goes only when its name is sure not to come back: a crash must leave the one
        or the other.
        """
        if not batch:
            return
        former: list[tuple[Adopted, KeyArray | None]] = []
        with self._catalog.transaction():
            for adopted in batch:
                if self._adopted.get(adopted.node_id) is not adopted:
                    continue  # newer content has come, and this was released
                try:
                    node = self._catalog.node(adopted.node_id)
                    if node.version >= adopted.version or node.is_raw:
                        continue  # named already, by whoever adopted it, or raw by now
                    keys = self._catalog.keys(adopted.node_id)
                    self._write_content(adopted)
                    former.append((adopted, keys))
                except NotFoundError:
                    former.append((adopted, None))
        if any(old is not None and len(old) for _, old in former):
            self._catalog.sync()
        for adopted, old in former:
            with self._lock:
                is_latest = self._adopted.get(adopted.node_id) is adopted
                if is_latest and old is not None:
                    self._note_named(adopted)
                if is_latest:
                    del self._adopted[adopted.node_id]
            if old is None:
                if is_latest:
                    self._give_up(adopted)
                continue
            if is_latest:
                self._unpin(adopted)
            self._release(adopted.node_id, adopted.namespace_id, old)
            # Eviction may have taken a block before it could know the name that needs it.
            if is_latest and not self._is_resident(adopted.namespace_id, adopted.keys):
                self._vanish(adopted.node_id, adopted.version)

    def _note_named(self, adopted: Adopted) -> None:
        """Remember what the catalog names from now on. REQUIRES: the lock."""
        self._named.pop(adopted.node_id, None)
        if len(self._named) >= _NAMED_MAX:
            del self._named[next(iter(self._named))]
        self._named[adopted.node_id] = _figures(adopted)

    def _write_content(self, adopted: Adopted) -> None:
        self._catalog.replace_content(
            adopted.node_id,
            adopted.keys,
            stride=self._stride(adopted.namespace_id),
            tail_bytes=adopted.tail_bytes,
            version=adopted.version,
            now_ns=adopted.mtime_ns,
        )
        if adopted.ctime_ns != adopted.mtime_ns:
            self._catalog.set_attributes(adopted.node_id, now_ns=adopted.ctime_ns)

    def _drop_if_broken(self, adopted: Adopted) -> None:
        """Give up content that lost a block before it was named; former content stays."""
        try:
            if self._store.is_kept(adopted.namespace_id, adopted.keys):
                return
        except NotFoundError:
            pass  # its namespace was destroyed
        with self._lock:
            if self._adopted.get(adopted.node_id) is not adopted:
                return
            del self._adopted[adopted.node_id]
        self._lose(adopted)

    def _lose(self, adopted: Adopted) -> None:
        """Release content that lost a block before it was named, and was taken out already."""
        self._note_lost_writing(adopted.node_id)
        self._give_up(adopted)
        self._remove_if_pending(adopted.node_id)

    def _note_lost_writing(self, node_id: int) -> None:
        """Do what must be done when a file has lost what was written to it."""

    def awaits_content(self, node_id: int) -> bool:
        """Say whether new content is on its way, so that the name outlives the former one."""
        return node_id in self._adopted

    def _remove_if_pending(self, node_id: int) -> None:
        """Remove a new file that never got content, and gets none any more."""
        try:
            if self._catalog.node(node_id).state is not NodeState.PENDING:
                return
            with self._catalog.transaction():
                is_pending = self._catalog.node(node_id).state is NodeState.PENDING
                if is_pending and not self.awaits_content(node_id):
                    self._catalog.remove(node_id, self._clock.wall_ns())
        except NotFoundError:
            return

    # --- internals

    def _stride(self, namespace_id: int) -> int:
        try:
            return self._layout_of(namespace_id).stride
        except KeyError:
            raise NotFoundError(f"no such namespace: {namespace_id:#018x}") from None

    def _content(self, node: Node) -> tuple[KeyArray, int, int]:
        """Return resident keys, the bytes they cover, and the version."""
        while True:
            adopted = self._adopted.get(node.node_id)
            if adopted is not None:
                return adopted.keys, adopted.size_bytes, adopted.version
            keys = self._catalog.keys(node.node_id)
            if len(keys) == node.block_count:
                again = self._catalog.node(node.node_id)
                if again.version == node.version and again.block_count == node.block_count:
                    break
                node = again
            else:
                node = self._catalog.node(node.node_id)
        if node.origin is Origin.FILE:
            return keys, node.size_bytes, node.version
        count = self._store.match_prefix(node.namespace_id, keys)
        if count == len(keys):
            return keys, node.size_bytes, node.version
        stride = self._stride(node.namespace_id)
        return keys[:count], count * stride, node.version

    def _pinned(self, node: Node) -> FileReader:
        """Open content without looking whether it is whole."""
        with self._lock:
            self._readers[node.node_id] = self._readers.get(node.node_id, 0) + 1
        # From here on nothing that the node reaches is dropped, only orphaned.
        reader = FileReader(
            node.node_id, node.name, node.namespace_id, node.origin, 0,
            self._stride(node.namespace_id), np.zeros((0, 32), np.uint8), 0,
        )  # fmt: skip
        try:
            keys, size, reader.version = self._content(self._catalog.node(node.node_id))
            reader.pinned_bytes = self._store.pin(node.namespace_id, keys) if len(keys) else 0
            reader.keys, reader.size_bytes = keys, size
        except BaseException:
            self.close_read(reader)
            raise
        return reader

    def _is_whole(self, reader: FileReader) -> bool:
        return self._is_resident(reader.namespace_id, reader.keys)

    def _is_resident(self, namespace_id: int, keys: KeyArray) -> bool:
        try:
            return self._store.match_prefix(namespace_id, keys) == len(keys)
        except NotFoundError:
            return False

    def _note_lost(self, reader: FileReader) -> None:
        """Take the name from a file that turned out to have lost a block."""
        if reader.origin is Origin.FILE and reader.node_id:
            self._vanish(reader.node_id, reader.version)

    def _vanish(self, node_id: int, version: int) -> None:
        """Remove the name of a file that lost a block, unless it has other content by now.

        A file that is being written again keeps its name, for the content to come.
        """
        with self._lock:
            adopted = self._adopted.get(node_id)
            if adopted is not None and adopted.version == version:
                del self._adopted[node_id]
        if adopted is not None:
            if adopted.version == version:
                self._lose(adopted)
            return
        with self._catalog.transaction():
            try:
                node = self._catalog.node(node_id)
                if node.version != version or node.is_raw:
                    return
                keys = self._catalog.keys(node_id)
                if is_kept := self.awaits_content(node_id):
                    self._catalog.clear_content(node_id, self._clock.wall_ns())
                else:
                    self._catalog.remove(node_id, self._clock.wall_ns())
            except NotFoundError:
                return
        if is_kept:
            self._note_lost_writing(node_id)
        else:
            self.on_gone(node_id)
        self._release(node_id, node.namespace_id, keys)

    def _give_up(self, adopted: Adopted) -> None:
        """Release content that was taken out of `_adopted` without being named."""
        self._unpin(adopted)
        self._release(adopted.node_id, adopted.namespace_id, adopted.keys)

    def _unpin(self, adopted: Adopted) -> None:
        if adopted.pinned_bytes:
            self._store.unpin(adopted.namespace_id, adopted.keys, adopted.pinned_bytes)

    def _release(self, node_id: int, namespace_id: int, keys: KeyArray) -> None:
        """Drop blocks that no name reaches any more, once nobody has the file open."""
        if not len(keys):
            return
        with self._lock:
            if node_id in self._readers:
                self._orphans.setdefault(node_id, (namespace_id, []))[1].append(keys)
                return
        self._drop(namespace_id, [keys])

    def _drop(self, namespace_id: int, parts: list[KeyArray]) -> None:
        for keys in parts:
            try:
                self._store.drop(namespace_id, keys)
            except NotFoundError:
                return  # the namespace went first, and its blocks with it
