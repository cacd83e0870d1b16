"""Files on the mount: writing whole, on top of reading by byte range.

Layer: L4.

- A file is written into a staging file and adopted when its last writer closes it, or before when
  somebody who needs it whole comes and no writer is at work. Small ones are appended to the log,
  large ones become a file segment. A crash before leaves no file, or its former content.
- Until then only its writers see its bytes. Others get the former content, or BusyError.
- A file one of whose writes failed is not adopted: it would be neither whole nor absent.
- Staging begins at the first write: opening for writing moves no bytes.
- What was adopted while its writers go on is opened again only if they ask for it. Eviction may be
  faster; then they get MediaError.

Locks: a writer's `lock`, then those of `FileContents`.
"""

import mmap
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from dataclasses import replace as with_changes
from functools import partial

import numpy as np
import numpy.typing as npt

from kvfs import _native
from kvfs.clock import Clock
from kvfs.devices.base import Staging
from kvfs.engine.catalog import Catalog
from kvfs.engine.catalog_schema import Node, NodeState, Origin
from kvfs.engine.store import Store
from kvfs.engine.writer import Durability
from kvfs.errors import (
    BusyError,
    DeviceError,
    KvfsError,
    MediaError,
    NoSpaceError,
    NotFoundError,
    RefusedError,
)
from kvfs.file_contents import Adopted, FileContents
from kvfs.file_reading import FileReader
from kvfs.keys import file_keys
from kvfs.layout import Layout

_COPY_BYTES = 4 << 20


@dataclass(slots=True, eq=False)
class WriteHandle:
    """One open of a file for writing."""

    writer: "FileWriter"
    is_active: bool = False
    """Wrote since its last flush: more may come."""


@dataclass(slots=True, eq=False)
class FileWriter:
    """A file that is open for writing; shared by all its handles. Fields are guarded by `lock`."""

    node: Node
    mtime_ns: int
    lock: threading.RLock = field(default_factory=threading.RLock)
    handles: list[WriteHandle] = field(default_factory=list)
    device_index: int = -1
    staging: Staging | None = None
    base: FileReader | None = None
    """The content so far, while nothing is staged; opened when it is needed."""
    kept_bytes: int = 0
    """Size of the content so far, while nothing is staged."""
    kept_version: int = 0
    """Version of the content so far."""
    is_ready: bool = False
    is_dirty: bool = False
    """Differs from what was adopted."""
    is_written: bool = False
    """Bytes were written since it was last adopted; not only made or emptied."""
    is_removed: bool = False
    failure: KvfsError | None = None

    @property
    def size_bytes(self) -> int:
        """Bytes as its writers see them."""
        return self.kept_bytes if self.staging is None else self.staging.nbytes

    @property
    def is_busy(self) -> bool:
        """Whether a handle has written and not closed yet."""
        return any(handle.is_active for handle in self.handles)


class Files(FileContents):
    """Opens, adopts and removes the files of a pool. Thread-safe."""

    def __init__(
        self, store: Store, catalog: Catalog, layout_of: Callable[[int], Layout], clock: Clock
    ) -> None:
        """Bind to a pool; see FileContents."""
        super().__init__(store, catalog, layout_of, clock)
        self._writers: dict[int, FileWriter] = {}

    def writer_of(self, node_id: int) -> FileWriter | None:
        """Return the writer of a file that is open for writing."""
        return self._writers.get(node_id)

    def awaits_content(self, node_id: int) -> bool:
        """Say whether new content is on its way, so that the name outlives the former one."""
        return node_id in self._writers or super().awaits_content(node_id)

    def current(self, node: Node) -> Node:
        """Return a node with the size and times that stat shows: of bytes being written, too."""
        writer = self.writer_of(node.node_id)
        if writer is None or not writer.is_dirty:
            return super().current(node)
        return with_changes(node, size_bytes=writer.size_bytes, mtime_ns=writer.mtime_ns)

    def size_of(self, node: Node) -> int:
        """Return the size that stat shows."""
        return self.current(node).size_bytes

    def open_read(self, node: Node) -> FileReader:
        """Open the content a node has now, and pin its blocks.

        A file whose writers have all closed or flushed is adopted first.

        Raises:
            BusyError: It is being written for the first time; or the namespace has too much open.
            NotFoundError: The node is gone, or lost a block and with it its name.
        """
        writer = self.writer_of(node.node_id)
        if writer is not None:
            with writer.lock:
                if writer.is_ready and not writer.is_dirty and not self._has_content(writer):
                    raise NotFoundError(f"file lost a block: {node.name!r}; write it again")
                if writer.is_dirty and not writer.is_removed:
                    if writer.failure is None and not writer.is_busy:
                        self._adopt(writer)
                    elif not self._has_content(writer):
                        raise BusyError(
                            f"file is being written: {node.name!r}; open it when it is closed"
                        )
        return super().open_read(node)

    def open_read_at_once(self, node: Node) -> FileReader | None:
        """Open as `open_read` does, but only if that needs no waiting; else return None."""
        with self._catalog.hold_at_once() as has_names, self._store.hold_at_once() as has_blocks:
            if not (has_names and has_blocks) or node.node_id in self._writers:
                return None
            reader = self._pinned(self._catalog.node(node.node_id))
            if self._is_whole(reader):
                return reader
            self.close_read(reader)
            return None

    def is_outdated(self, reader: FileReader) -> bool:
        """Say whether a file has, or is about to have, other content than a reader has open."""
        writer = self.writer_of(reader.node_id)
        return (writer is not None and writer.is_dirty) or super().is_outdated(reader)

    # --- writing

    def open_write(self, node: Node, *, truncate: bool) -> WriteHandle:
        """Open for writing, from the content so far or from nothing.

        Raises:
            RefusedError: A context made through the API: its blocks mean something.
            BusyError: The namespace has too much open.
        """
        if node.origin is Origin.API:
            raise RefusedError(
                f"context was made through the API: {node.name!r}; append to it there, "
                "or remove it first"
            )
        with self._lock:
            writer = self._writers.setdefault(node.node_id, FileWriter(node, node.mtime_ns))
            handle = WriteHandle(writer)
            writer.handles.append(handle)
        try:
            with writer.lock:
                self._make_ready(writer, truncate=truncate)
                if truncate:
                    self._resize(writer, 0)
                    handle.is_active = True
        except BaseException:
            self.close_write(handle)
            raise
        return handle

    def write(self, handle: WriteHandle, offset: int, data: bytes | memoryview) -> int:
        """Write into the staging file. Durability: flush.

        Raises:
            NoSpaceError: Nothing more can be evicted. The file will not be adopted.
            DeviceError: The device failed. The file will not be adopted.
        """
        writer = handle.writer
        with writer.lock:
            handle.is_active = writer.is_dirty = writer.is_written = True
            writer.mtime_ns = self._clock.wall_ns()
            try:
                self._staged(writer, writer.size_bytes)
                self._change_staging(
                    writer, offset + len(data),
                    lambda index, staging: self._store.write_staging(index, staging, offset, data),
                )  # fmt: skip
            except KvfsError as error:
                writer.failure = error
                raise
            except BaseException as error:
                # Whatever it was: bytes are missing, and the file must not appear without them.
                writer.failure = DeviceError(f"write failed: {writer.node.name!r}: {error!r}")
                if isinstance(error, OSError):
                    raise writer.failure from error
                raise
        return len(data)

    def read_staged(self, handle: WriteHandle, offset: int, nbytes: int) -> bytes | bytearray:
        """Read what the writers see."""
        writer = handle.writer
        with writer.lock:
            staging = writer.staging
            nbytes = min(nbytes, writer.size_bytes - offset)
            if nbytes <= 0:
                return b""
            if staging is not None:
                return os.pread(staging.fd, nbytes, offset)
            return self.read(self._opened_base(writer), offset, nbytes)

    def truncate(self, handle: WriteHandle, nbytes: int) -> None:
        """Cut or extend with zeros. Cutting to nothing forgives writes that failed.

        Raises:
            NoSpaceError: Nothing more can be evicted.
        """
        writer = handle.writer
        with writer.lock:
            if nbytes == writer.size_bytes and writer.failure is None:
                return
            handle.is_active = True
            self._resize(writer, nbytes)
            writer.is_written = True

    def truncate_node(self, node: Node, nbytes: int) -> None:
        """Cut or extend a file that the caller has not open."""
        handle = self.open_write(node, truncate=False)
        try:
            self.truncate(handle, nbytes)
            self.flush(handle)
        finally:
            self.close_write(handle)

    def set_mtime(self, node: Node, mtime_ns: int) -> None:
        """Let content that is not in the catalog yet arrive there with this time."""
        writer = self.writer_of(node.node_id)
        if writer is not None:
            with writer.lock:
                writer.mtime_ns = mtime_ns
        with self._lock:
            adopted = self._adopted.get(node.node_id)
            if adopted is not None:
                adopted.mtime_ns = mtime_ns

    def fsync(self, handle: WriteHandle) -> None:
        """Persist the bytes. A file not adopted yet appears only when it is closed.

        Durability: persist.

        Raises:
            DeviceError: They could not be persisted, now or since they were written.
        """
        writer = handle.writer
        with writer.lock:
            if writer.failure is not None:
                raise writer.failure
            if writer.is_dirty:
                self._persist_staging(writer)
                return
        self.publish()
        self._catalog.sync()
        if writer.failure is not None:  # an earlier persist may have failed
            raise writer.failure

    def flush(self, handle: WriteHandle) -> None:
        """Note that a descriptor of this handle was closed; adopt if nobody is writing.

        It may not be the last one: what is written after it is adopted again. So what close(2)
        returns is true of the whole, and the file is there for others when it does: the kernel
        announces the last close itself only later, to nobody.

        Raises:
            NoSpaceError, DeviceError: The bytes could not be adopted, or a write had failed.
        """
        writer = handle.writer
        with writer.lock:
            handle.is_active = False
            if writer.failure is not None:
                raise writer.failure
            is_due = writer.is_dirty and writer.is_written
            if is_due and not writer.is_removed and not writer.is_busy:
                self._adopt(writer)

    def close_write(self, handle: WriteHandle, *, is_abandoned: bool = False) -> None:
        """Close one handle; the last one adopts the file.

        With `is_abandoned`, what the handle wrote since its last flush makes the file not whole.

        Raises:
            NoSpaceError: The bytes do not fit; the file keeps its former content, or vanishes if it
                is new.
            DeviceError: The device failed.
        """
        writer = handle.writer
        with writer.lock:
            if is_abandoned and handle.is_active and writer.failure is None:
                writer.failure = DeviceError(f"file was not closed: {writer.node.name!r}")
            handle.is_active = False
            with self._lock:
                writer.handles.remove(handle)
                if writer.handles:
                    return
            try:
                if writer.is_dirty and not writer.is_removed and writer.failure is None:
                    self._adopt(writer)
            finally:
                self._retire(writer)
                self._remove_if_pending(writer.node.node_id)

    def settle(self, node: Node) -> None:
        """Adopt what a file holds now, and let the catalog name it.

        For a rename over another file, which must not be lost if this one never arrives.
        Durability: persist (names: flush).
        """
        writer = self.writer_of(node.node_id)
        if writer is not None:
            with writer.lock:
                if writer.failure is not None:
                    raise writer.failure
                if writer.is_dirty and not writer.is_removed:
                    self._adopt(writer)
        if node.node_id in self._adopted:
            self.publish()

    # --- names

    def forget(self, node: Node, keys: npt.NDArray[np.uint8] | None) -> None:
        """Let go of the bytes of a node whose name is gone already. `keys`: None for an API's."""
        writer = self.writer_of(node.node_id)
        if writer is not None:
            with writer.lock:
                writer.is_removed = True
        super().forget(node, keys)

    # --- internals

    def _note_lost_writing(self, node_id: int) -> None:
        """Let a writer that goes on fail; bytes not adopted yet are whole without what is lost."""
        writer = self.writer_of(node_id)
        if writer is not None and not writer.is_dirty:
            # Without its lock: whoever holds that may be waiting for this publication.
            writer.failure = DeviceError(
                f"file lost what was written: {writer.node.name!r}; write it again"
            )

    def _has_content(self, writer: FileWriter) -> bool:
        """Whether there is content besides what is being written."""
        node_id = writer.node.node_id
        return (
            node_id in self._adopted or self._catalog.node(node_id).state is not NodeState.PENDING
        )

    def _make_ready(self, writer: FileWriter, *, truncate: bool) -> None:
        """Find the content so far, at the first open."""
        if writer.is_ready:
            return
        if not self._has_content(writer):
            writer.is_dirty = True
        elif not truncate:
            base = writer.base = super().open_read(writer.node)
            writer.kept_bytes, writer.kept_version = base.size_bytes, base.version
        writer.is_ready = True

    def _staged(self, writer: FileWriter, kept_bytes: int) -> None:
        """Have a staging file, made from the first bytes of the content so far."""
        if writer.staging is not None:
            return
        self._stage(
            writer, self._store.file_devices(kept_bytes), kept_bytes,
            lambda offset, part: self.read_into(self._opened_base(writer), offset, part),
        )  # fmt: skip
        self._close_base(writer)

    def _stage(
        self, writer: FileWriter, devices: list[int], nbytes: int,
        read: Callable[[int, memoryview], object],
    ) -> None:  # fmt: skip
        """Make a staging file of what `read` gives, on the first device with room for it."""
        full = NoSpaceError(f"no device can hold {nbytes} bytes; use more or larger devices")
        for index in devices:
            name = f"{writer.node.node_id:x}-{self._clock.monotonic_ns():x}"
            staging = self._store.create_staging(index, name, writer.node.namespace_id)
            try:
                buffer = bytearray(min(_COPY_BYTES, nbytes))
                for offset in range(0, nbytes, _COPY_BYTES):
                    part = memoryview(buffer)[: nbytes - offset]
                    read(offset, part)
                    self._store.write_staging(index, staging, offset, part)
            except BaseException as error:
                self._store.staging_device(index).device.drop_staging(staging)
                if not isinstance(error, NoSpaceError):
                    raise
                full = error
            else:
                writer.device_index, writer.staging = index, staging
                return
        raise full

    def _change_staging(
        self, writer: FileWriter, nbytes: int, change: Callable[[int, Staging], None]
    ) -> None:
        """Change the staged bytes, up to `nbytes`; on another device if theirs has no room."""
        tried: set[int] = set()
        while True:
            staging, index = writer.staging, writer.device_index
            assert staging is not None
            try:
                return change(index, staging)
            except NoSpaceError:
                tried.add(index)
                others = [i for i in self._store.file_devices(nbytes) if i not in tried]
                if not others:
                    raise
                self._stage(writer, others, staging.nbytes, partial(_read_staged, staging))
                self._store.staging_device(index).device.drop_staging(staging)

    def _resize(self, writer: FileWriter, nbytes: int) -> None:
        """Cut or extend. REQUIRES: the writer's lock."""
        if nbytes == 0:
            self._close_base(writer)
            writer.kept_bytes = 0
            writer.failure = None
        if nbytes or writer.staging is not None:
            self._staged(writer, min(nbytes, writer.size_bytes))
            self._change_staging(
                writer, nbytes,
                lambda index, staging: self._store.resize_staging(index, staging, nbytes),
            )  # fmt: skip
        writer.is_dirty = True
        writer.mtime_ns = self._clock.wall_ns()

    def _adopt(self, writer: FileWriter) -> None:
        """Turn the bytes into blocks and serve them under the file's name.

        REQUIRES: the writer's lock, dirty.
        """
        node, nbytes = writer.node, writer.size_bytes
        try:
            version = self._catalog.next_version(node.node_id)
            stride = self._stride(node.namespace_id)
        except NotFoundError:
            writer.is_removed = True
            return
        count = -(-nbytes // stride)
        keys = file_keys(node.namespace_id, node.node_id, version, count)
        lengths = np.full(count, stride, np.uint64)
        if count:
            lengths[-1] = nbytes - (count - 1) * stride
        now = self._clock.wall_ns()
        adopted = Adopted(
            node.node_id, node.namespace_id, version, keys, nbytes,
            int(lengths[-1]) if count else 0, writer.mtime_ns, now,
        )  # fmt: skip
        if count and self._catalog.namespace(node.namespace_id).retention == "durable":
            self._pin(adopted)
        try:
            is_persisted = not count or self._store_content(writer, adopted, lengths)
        except BaseException:
            self._unpin(adopted)
            raise
        writer.is_dirty = writer.is_written = False  # from here on it can be lost
        self._note_adopted(adopted)
        if is_persisted:
            self._name([adopted])
        if writer.staging is None:
            writer.kept_bytes, writer.kept_version = nbytes, version

    def _pin(self, adopted: Adopted) -> None:
        """Pin new content until it is named."""
        try:
            adopted.pinned_bytes = self._store.pin(adopted.namespace_id, adopted.keys)
        except BusyError:
            self.publish()  # names what is pinned for the same reason
            adopted.pinned_bytes = self._store.pin(adopted.namespace_id, adopted.keys)

    def _store_content(
        self, writer: FileWriter, adopted: Adopted, lengths: npt.NDArray[np.uint64]
    ) -> bool:
        """Put the staged bytes into the store; return whether they are persisted already."""
        staging = writer.staging
        assert staging is not None
        device = self._store.staging_device(writer.device_index)
        is_large = adopted.size_bytes > device.info.segment_bytes // 4
        if is_large:
            self._persist_staging(writer)
        with mmap.mmap(staging.fd, adopted.size_bytes, prot=mmap.PROT_READ) as mapped:
            address, _ = _native.buffer_address(mapped)
            addresses = np.uint64(address) + np.cumsum(lengths) - lengths
            if not is_large:
                self._store.put(
                    adopted.namespace_id, adopted.keys, addresses, lengths,
                    durability=Durability.ASYNC,
                )  # fmt: skip
                return False
            digests = _digests(addresses, lengths)
        try:
            self._store.adopt(
                writer.device_index, staging, adopted.namespace_id, adopted.keys, lengths, digests
            )
        except DeviceError as error:
            # What the medium holds is unknown, and the staging file may be a segment that is gone.
            writer.failure = error
            raise
        finally:
            if staging.state is None:
                writer.staging = None
        return True

    def _persist_staging(self, writer: FileWriter) -> None:
        if writer.staging is None:
            return
        device = self._store.staging_device(writer.device_index).device
        try:
            device.persist_staging(writer.staging)
        except OSError as error:
            # What the medium holds now is unknown, so the bytes are given up.
            writer.failure = DeviceError(f"persist failed: {writer.node.name!r}: {error}")
            raise writer.failure from error

    def _retire(self, writer: FileWriter) -> None:
        """Free what a writer holds, unless it was opened again meanwhile."""
        with self._lock:
            if writer.handles:
                return
            self._writers.pop(writer.node.node_id, None)
        self._close_base(writer)
        if writer.staging is not None:
            device = self._store.staging_device(writer.device_index).device
            device.drop_staging(writer.staging)
            writer.staging = None

    def _opened_base(self, writer: FileWriter) -> FileReader:
        """Return the content so far, open for reading. REQUIRES: the writer's lock, no staging.

        Raises:
            MediaError: It was evicted.
            BusyError: The namespace has too much open.
        """
        if writer.base is None:
            base = super().open_read(writer.node)
            if (base.version, base.size_bytes) != (writer.kept_version, writer.kept_bytes):
                self.close_read(base)
                raise MediaError(
                    f"file lost what was written: {writer.node.name!r}: it was evicted while open; "
                    "write it again"
                )
            writer.base = base
        return writer.base

    def _close_base(self, writer: FileWriter) -> None:
        if writer.base is not None:
            self.close_read(writer.base)
            writer.base = None


def _read_staged(staging: Staging, offset: int, part: memoryview) -> None:
    if os.preadv(staging.fd, [part], offset) != part.nbytes:
        raise DeviceError("staged file could not be read back: write it again")


def _digests(
    addresses: npt.NDArray[np.uint64], lengths: npt.NDArray[np.uint64]
) -> npt.NDArray[np.uint8]:
    """Return the XXH3-128 of memory ranges, (n, 16).

    Through a copy, because the native copy survives a page that cannot be read.
    """
    digests = np.zeros((len(lengths), 16), np.uint8)
    statuses = np.zeros(len(lengths), np.int32)
    scratch = np.empty(int(lengths.max()), np.uint8)
    targets = np.full(len(lengths), scratch.ctypes.data, np.uint64)
    if _native.copy_hash(targets, addresses, lengths, digests, statuses):
        raise DeviceError("staged file could not be read back: close it and write it again")
    return digests
