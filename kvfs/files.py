"""Files on the mount: reading contexts by byte range, writing files whole.

Layer: L4.

- A file is written into a staging file and adopted when its last writer closes it: small ones are appended to the log, large ones
  become a file segment. Before that nobody but its writers sees its bytes; a crash leaves no file.
- Blocks first, name second: a new file's row stays PENDING in the catalog until its blocks are persisted, and pending rows are
  deleted at open. A rewritten file keeps its old content until the new one is persisted.
- An open file is pinned: eviction passes it over. Its keys are fixed at open; a later version is another file.
"""

import mmap
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kvfs import _native
from kvfs.clock import Clock
from kvfs.devices.base import Staging
from kvfs.engine.catalog import Catalog, Node, NodeState, Origin
from kvfs.engine.store import Store
from kvfs.engine.writer import Durability
from kvfs.errors import KvfsError, MediaError, NotFoundError, UsageError
from kvfs.keys import KeyArray, file_keys
from kvfs.layout import Layout

_COPY_BYTES = 4 << 20


@dataclass(slots=True, eq=False)
class FileReader:
    """An open file: node, keys and size as they were at open."""

    node: Node
    stride: int
    keys: KeyArray
    size_bytes: int
    pinned_bytes: int = 0


@dataclass(slots=True, eq=False)
class FileWriter:
    """A file being written; shared by all its open handles."""

    node: Node
    device_index: int
    staging: Staging
    handles: int = 1
    is_dirty: bool = True
    is_removed: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)


class Files:
    """Opens, adopts and removes the files of a pool. Thread-safe."""

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
        self._store = store
        self._catalog = catalog
        self._layout_of = layout_of
        self._clock = clock
        self._lock = threading.Lock()
        self._writers: dict[int, FileWriter] = {}
        self._readers: dict[int, int] = {}
        self._orphans: dict[int, tuple[int, list[KeyArray]]] = {}
        self._unpublished: list[int] = []

    # --- reading

    def resident(self, node: Node) -> tuple[KeyArray, int]:
        """Return the leading resident keys of a context and the bytes they cover."""
        keys = self._catalog.keys(node.node_id)
        if node.origin is Origin.FILE:
            return keys, node.size_bytes
        count = self._store.match_prefix(node.namespace_id, keys)
        stride = self._layout_of(node.namespace_id).stride
        if count == len(keys):
            return keys, node.size_bytes
        return keys[:count], count * stride

    def size_of(self, node: Node) -> int:
        """Return the size that stat shows: of the bytes being written, or of the resident prefix."""
        writer = self._writers.get(node.node_id)
        if writer is not None:
            return writer.staging.nbytes
        if node.origin is Origin.FILE:
            return node.size_bytes
        return self.resident(node)[1]

    def open_read(self, node: Node) -> FileReader:
        """Open for reading and pin the blocks.

        Raises:
            BusyError: The namespace has too much open.
            MediaError: A block of a file is gone (the name is removed).
        """
        with self._lock:
            keys, size = self.resident(node)
            pinned = self._store.pin(node.namespace_id, keys) if len(keys) else 0
            self._readers[node.node_id] = self._readers.get(node.node_id, 0) + 1
        reader = FileReader(
            node, self._layout_of(node.namespace_id).stride, keys, size, pinned_bytes=pinned
        )
        if self._store.match_prefix(node.namespace_id, keys) < len(keys):
            self.close_read(reader)
            if node.origin is Origin.FILE:
                self.remove(node)
            raise MediaError(f"file lost a block: {node.name!r}; its name was removed")
        return reader

    def read(self, reader: FileReader, offset: int, nbytes: int) -> bytes:
        """Read a range, short at the end of the file. Bytes between a block's end and its stride are zero.

        Raises:
            MediaError: A block cannot be read back.
        """
        end = min(offset + nbytes, reader.size_bytes)
        if end <= offset:
            return b""
        stride = reader.stride
        first, last = offset // stride, (end - 1) // stride
        out = bytearray(end - offset)
        base, _ = _native.buffer_address(out, True)
        lease = self._store.lease(reader.node.namespace_id, reader.keys[first : last + 1])
        try:
            lengths = lease.records["length"].astype(np.int64)
            if not lengths.all():
                raise MediaError(f"block cannot be read: {reader.node.name!r} offset {offset:#x}")
            starts = np.arange(first, last + 1, dtype=np.int64) * stride
            lows = np.maximum(offset - starts, 0)
            highs = np.minimum(end - starts, lengths)
            some = np.flatnonzero(highs > lows)
            lows, highs, starts = lows[some], highs[some], starts[some]
            targets = (base + starts + lows - offset).astype(np.uint64)
            good = self._store.reader.read_ranges(
                lease, some, lows.astype(np.uint64), (highs - lows).astype(np.uint64), targets
            )
        finally:
            self._store.release(lease)
        if not good.all():
            raise MediaError(f"block cannot be read: {reader.node.name!r} offset {offset:#x}")
        return bytes(out)

    def close_read(self, reader: FileReader) -> None:
        """Unpin; the last close of a removed file drops its blocks."""
        node = reader.node
        if len(reader.keys):
            self._store.unpin(node.namespace_id, reader.keys, reader.pinned_bytes)
        with self._lock:
            self._readers[node.node_id] -= 1
            if self._readers[node.node_id]:
                return
            del self._readers[node.node_id]
            orphan = self._orphans.pop(node.node_id, None)
        if orphan is not None:
            self._drop(*orphan)

    # --- writing

    def open_write(self, node: Node, *, truncate: bool) -> FileWriter:
        """Open for writing: a new staging file, or the one other handles write to.

        Without `truncate` the content so far is copied into it.

        Raises:
            UsageError: A context made through the API; its blocks mean something, bytes cannot be put in.
        """
        if node.origin is Origin.API and not truncate:
            raise UsageError(f"context cannot be changed in place: {node.name!r}; append to it by the API")
        with self._lock:
            writer = self._writers.get(node.node_id)
            if writer is not None:
                writer.handles += 1
            else:
                name = f"{node.node_id:x}-{self._clock.monotonic_ns():x}"
                device_index, staging = self._store.create_staging(name, node.namespace_id)
                writer = FileWriter(node, device_index, staging)
                self._writers[node.node_id] = writer
                if not truncate and node.size_bytes:
                    self._copy_in(writer)
                writer.is_dirty = truncate or node.state is NodeState.PENDING
                return writer
        if truncate:
            self.truncate(writer, 0)
        return writer

    def writer_of(self, node_id: int) -> FileWriter | None:
        """Return the writer of a file that is being written."""
        return self._writers.get(node_id)

    def write(self, writer: FileWriter, offset: int, data: bytes | memoryview) -> int:
        """Write into the staging file. Durability: flush.

        Raises:
            NoSpaceError: Nothing more can be evicted.
        """
        with writer.lock:
            self._store.write_staging(writer.device_index, writer.staging, offset, data)
            writer.is_dirty = True
        return len(data)

    def read_staged(self, writer: FileWriter, offset: int, nbytes: int) -> bytes:
        """Read back what was written."""


        end = min(offset + nbytes, writer.staging.nbytes)
        return os.pread(writer.staging.fd, end - offset, offset) if end > offset else b""

    def truncate(self, writer: FileWriter, nbytes: int) -> None:
        """Cut or extend with zeros."""
        with writer.lock:
            device = self._store.staging_device(writer.device_index).device
            device.resize_staging(writer.staging, nbytes)
            writer.is_dirty = True

    def fsync(self, writer: FileWriter) -> None:
        """Persist the staged bytes. The file appears only when it is closed. Durability: persist."""
        with writer.lock:
            self._store.staging_device(writer.device_index).device.persist_staging(writer.staging)

    def close_write(self, writer: FileWriter) -> None:
        """Close one handle; the last one adopts the file.

        Raises:
            NoSpaceError: The bytes do not fit; the file keeps its former content, or vanishes if it is new.
            DeviceError: The device failed.
        """
        with self._lock:
            writer.handles -= 1
            if writer.handles:
                return
        try:
            if writer.is_removed or not writer.is_dirty:
                self._discard(writer)
            else:
                self._adopt(writer)
        except KvfsError:
            self._discard(writer)
            node = self._catalog.node(writer.node.node_id)
            if node is not None and node.state is NodeState.PENDING:
                self._catalog.remove(node.node_id)
            raise
        finally:
            with self._lock:
                self._writers.pop(writer.node.node_id, None)

    # --- names

    def remove(self, node: Node) -> None:
        """Remove a file's name; its blocks follow when nobody reads them."""
        keys = self._catalog.keys(node.node_id) if node.origin is Origin.FILE else None
        self._catalog.remove(node.node_id)
        self.forget(node, keys)

    def forget(self, node: Node, keys: KeyArray | None) -> None:
        """Let go of the bytes of a node whose name is gone already."""
        with self._lock:
            writer = self._writers.get(node.node_id)
            if writer is not None:
                writer.is_removed = True
            if keys is None or not len(keys):
                return
            if node.node_id in self._readers:
                self._orphans.setdefault(node.node_id, (node.namespace_id, []))[1].append(keys)
                return
        self._drop(node.namespace_id, [keys])

    def publish(self) -> None:
        """Persist all blocks, then give new files their names for good. Durability: persist (names: flush).

        Raises:
            DeviceError: A persist failed; new files that lost blocks by it are removed.
        """
        with self._lock:
            batch, self._unpublished = self._unpublished, []
        try:
            self._store.flush()
        except KvfsError:
            for node_id in batch:
                self._remove_if_broken(node_id)
            self._activate(batch)
            raise
        self._activate(batch)

    @property
    def has_unpublished(self) -> bool:
        """Whether new files wait for their blocks to be persisted."""
        return bool(self._unpublished)

    # --- internals

    def _activate(self, node_ids: list[int]) -> None:
        if node_ids:
            self._catalog.activate(node_ids)

    def _remove_if_broken(self, node_id: int) -> None:
        node = self._catalog.node(node_id)
        if node is None:
            return
        keys = self._catalog.keys(node_id)
        if self._store.match_prefix(node.namespace_id, keys) < len(keys):
            self.remove(node)

    def _copy_in(self, writer: FileWriter) -> None:
        """Fill a staging file with the file's present content. REQUIRES: `_lock`."""
        node = writer.node
        keys = self._catalog.keys(node.node_id)
        reader = FileReader(node, self._layout_of(node.namespace_id).stride, keys, node.size_bytes)
        for offset in range(0, node.size_bytes, _COPY_BYTES):
            part = self.read(reader, offset, _COPY_BYTES)
            self._store.write_staging(writer.device_index, writer.staging, offset, part)

    def _adopt(self, writer: FileWriter) -> None:
        """Turn the staged bytes into blocks and publish them under the file's name."""
        node = self._catalog.node(writer.node.node_id)
        if node is None:
            self._discard(writer)
            return
        stride = self._layout_of(node.namespace_id).stride
        staging, nbytes = writer.staging, writer.staging.nbytes
        count = -(-nbytes // stride)
        keys = file_keys(node.namespace_id, node.node_id, node.version + 1, count)
        lengths = np.full(count, stride, np.uint64)
        if count:
            lengths[-1] = nbytes - (count - 1) * stride
        old = self._catalog.keys(node.node_id)
        device = self._store.staging_device(writer.device_index)
        is_large = nbytes > device.info.segment_bytes // 4
        if is_large:
            device.device.persist_staging(staging)
        if count:
            with mmap.mmap(staging.fd, nbytes, prot=mmap.PROT_READ) as mapped:
                address, _ = _native.buffer_address(mapped)
                addresses = np.uint64(address) + np.cumsum(lengths) - lengths
                if is_large:
                    digests = _digests(mapped, stride, count)
                    self._store.adopt(
                        writer.device_index, staging, node.namespace_id, keys, lengths, digests
                    )
                else:
                    self._store.put(
                        node.namespace_id, keys, addresses, lengths, durability=Durability.ASYNC
                    )
        if not is_large:
            self._discard(writer)
        self._name(node, keys, nbytes, lengths, is_persisted=is_large or not count)
        if len(old):
            self.forget(node, old)

    def _name(
        self, node: Node, keys: KeyArray, nbytes: int, lengths: npt.NDArray[np.uint64], *, is_persisted: bool
    ) -> None:
        """Write the new content's row; PENDING until persisted, unless it replaces published content."""
        state = NodeState.ACTIVE
        if not is_persisted:
            if node.state is NodeState.ACTIVE:
                self._store.flush()
            else:
                state = NodeState.PENDING
        self._catalog.replace_content(
            node.node_id,
            keys,
            size_bytes=nbytes,
            tail_bytes=int(lengths[-1]) if len(lengths) else 0,
            state=state,
            now_ns=self._clock.wall_ns(),
        )
        if state is NodeState.PENDING:
            with self._lock:
                self._unpublished.append(node.node_id)

    def _discard(self, writer: FileWriter) -> None:
        if writer.staging.fd >= 0:
            self._store.staging_device(writer.device_index).device.drop_staging(writer.staging)

    def _drop(self, namespace_id: int, parts: list[KeyArray]) -> None:
        for keys in parts:
            try:
                self._store.drop(namespace_id, keys)
            except NotFoundError:
                return  # the namespace went first, and its blocks with it


def _digests(mapped: mmap.mmap, stride: int, count: int) -> npt.NDArray[np.uint8]:
    """Return the XXH3-128 of each stride of a file, (n, 16)."""
    digests = np.zeros((count, 16), np.uint8)
    with memoryview(mapped) as whole:
        for i in range(count):
            with whole[i * stride : (i + 1) * stride] as part:
                digests[i] = np.frombuffer(_native.xxh3_128(part), np.uint8)
    return digests
