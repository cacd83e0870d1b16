"""Files on the mount: writing whole, on top of reading by byte range.

Layer: L4.

- A file is staged while it is written (see `file_writing`), and adopted when its last writer closes
  it, or before when somebody who needs it whole comes and no writer is at work. Small ones are
  appended to the log, large ones become a file segment. A crash before leaves no file, or its
  former content.
- Until then only its writers see its bytes. Others get the former content, or BusyError.
- A file one of whose writes failed is not adopted: it would be neither whole nor absent.
- What was adopted while its writers go on is opened again only if they ask for it. Eviction may be
  faster; then they get MediaError.
- What becomes of the bytes is decided in `file_adoption`.

Locks: a writer's `lock`, then those of `FileContents`.
"""

import contextlib
import os
from collections.abc import Callable
from dataclasses import replace as with_changes

import numpy as np
import numpy.typing as npt

from kvfs.clock import Clock
from kvfs.engine.catalog import Catalog
from kvfs.engine.catalog_schema import Node, NodeState, Origin
from kvfs.engine.store import Store
from kvfs.errors import (
    BusyError,
    DeviceError,
    KvfsError,
    NotFoundError,
    RefusedError,
)
from kvfs.file_adoption import FileAdoption
from kvfs.file_reading import FileReader
from kvfs.file_writer import FileWriter, WriteHandle
from kvfs.layout import Layout

__all__ = ["Files", "WriteHandle"]


class Files(FileAdoption):
    """Opens, adopts and removes the files of a pool. Thread-safe."""

    def __init__(
        self, store: Store, catalog: Catalog, layout_of: Callable[[int], Layout], clock: Clock,
        memory_bytes: int,
    ) -> None:  # fmt: skip
        """Bind to a pool; see FileWriting."""
        super().__init__(store, catalog, layout_of, clock, memory_bytes)
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
        if writer is not None and (
            writer.is_dirty or writer.is_adopting or writer.is_granted  # in this order
        ):
            return with_changes(node, size_bytes=writer.size_bytes, mtime_ns=writer.shown_mtime_ns)
        raw_bytes = self.raws.size_of(node.node_id)
        if raw_bytes is not None:
            return with_changes(node, size_bytes=raw_bytes)
        return super().current(node)

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
        begin_ns = self._clock.monotonic_ns()
        reader = self._open_read(node)
        self._count_open(node, begin_ns)
        return reader

    def _count_open(self, node: Node, begin_ns: int) -> None:
        times = self._store.state.counters[node.namespace_id].times
        times["open"].note(self._clock.monotonic_ns() - begin_ns)

    def _open_read(self, node: Node) -> FileReader:
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
        if node.node_id in self.raws:
            return self._open_raw_reader(node)
        return super().open_read(node)

    def open_read_at_once(self, node: Node) -> FileReader | None:
        """Open as `open_read` does, but only if that needs no waiting; else return None."""
        begin_ns = self._clock.monotonic_ns()
        with self._catalog.hold_at_once() as has_names, self._store.hold_at_once() as has_blocks:
            if not (has_names and has_blocks) or node.node_id in self._writers:
                return None
            if node.node_id in self.raws:
                return None
            reader = self._pinned(self._catalog.node(node.node_id))
            if self._is_whole(reader):
                self._count_open(node, begin_ns)
                return reader
            self.close_read(reader)
            return None

    def close_read(self, reader: FileReader) -> None:
        """Unpin; the last close of a removed file drops its bytes."""
        if reader.raw is not None:
            self._end_reading(reader)
        else:
            super().close_read(reader)

    def close_read_at_once(self, reader: FileReader) -> bool:
        """Close as `close_read` does, but only if that needs no waiting; say whether."""
        with self._store.hold_at_once() as is_free:
            if not is_free or reader.raw is not None or reader.node_id in self._orphans:
                return False
            self.close_read(reader)
            return True

    def catch_up(self, reader: FileReader) -> None:
        """Let a reader grow to what its file has by now; see FileContents."""
        if reader.raw is not None:
            reader.size_bytes = reader.raw.size_bytes
        else:
            super().catch_up(reader)

    def is_outdated(self, reader: FileReader) -> bool:
        """Say whether a file has, or is about to have, other content than a reader has open."""
        if reader.raw is not None:
            return False
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

    def truncate_node(self, node: Node, nbytes: int) -> None:
        """Cut or extend a file that the caller has not open."""
        handle = self.open_write(node, truncate=False)
        try:
            self.truncate(handle, nbytes)
            self.flush(handle)
        finally:
            self.close_write(handle)

    def empty_node(self, node: Node) -> None:
        """Cut a file that the caller has not open to nothing, which makes it new in any case."""
        self.close_write(self.open_write(node, truncate=True))

    def set_mtime(self, node: Node, mtime_ns: int) -> None:
        """Let content that is not in the catalog yet arrive there with this time."""
        writer = self.writer_of(node.node_id)
        if writer is not None:
            with writer.lock:
                if writer.is_granted and self._settle(writer) > 0:
                    writer.is_dirty = writer.is_written = True
                writer.take_mtime()
                writer.mtime_ns, writer.has_own_mtime = mtime_ns, True
        self._note_mtime(node.node_id, mtime_ns)

    def fsync(self, handle: WriteHandle) -> None:
        """Persist the bytes. A file not adopted yet appears only when it is closed.

        Durability: persist; of a raw file, with its name.

        Raises:
            DeviceError: They could not be persisted, now or since they were written.
        """
        writer = handle.writer
        with writer.lock:
            if writer.failure is not None:
                raise writer.failure
            is_raw = writer.is_raw
            if is_raw or writer.is_dirty or writer.is_granted:
                self._persist_staged(writer)
                if not is_raw:
                    return
                self._note_raw(writer)
        if not is_raw:
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
            self._revoke(writer, handle)
            if writer.failure is not None:
                raise writer.failure
            if writer.is_raw:
                self._note_raw(writer)
                return
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
            was_active = handle.is_active or handle.grant is not None
            self._revoke(writer, handle)
            if is_abandoned and was_active and writer.failure is None:
                self._fail(writer, DeviceError(f"file was not closed: {writer.node.name!r}"))
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

    def remove(self, node: Node) -> None:
        """Remove a context's name; who has the file open goes on, writers too."""
        self.hold_for_writers(node)
        super().remove(node)

    def hold_for_writers(self, node: Node) -> None:
        """Open what a file holds for those who have it open for writing: its name is to go."""
        writer = self.writer_of(node.node_id)
        if writer is None:
            return
        with writer.lock:
            is_open = writer.handles and writer.is_ready  # it may have been closed meanwhile
            if is_open and writer.staged is None and writer.kept_bytes:
                with contextlib.suppress(KvfsError):  # whoever asks for it will be told
                    self._opened_base(writer)

    def forget(self, node: Node, keys: npt.NDArray[np.uint8] | None) -> None:
        """Let go of the bytes of a node whose name is gone already. `keys`: None for an API's."""
        writer = self.writer_of(node.node_id)
        if writer is not None:
            with writer.lock:
                writer.is_removed = True
        super().forget(node, keys)
        self.raws.remove(node.node_id)

    # --- raw files

    def load_raw(self) -> tuple[list[int], int]:
        """Find the raw files at open; see RawFiles.load."""
        return self.raws.load(self._catalog.raw_nodes())

    def open_raw(self, node: Node) -> int:
        """Return a descriptor that reads and writes a raw file in place; the caller closes it.

        For who keeps the file open by a handle or reader meanwhile: what it wrote is accounted when
        that is closed, and the file is deleted after it if its name has gone. To make the file
        larger, `truncate` or `grant` come first: they take the capacity.

        Raises:
            NotFoundError: It is no raw file.
        """
        staged = self.raws.open(node.node_id)
        try:
            return os.dup(staged.file.fd)
        finally:
            self.raws.close(node.node_id, staged)

    def make_raw(self, node: Node) -> None:
        """Make a file raw that was marked, with the content it has; one being written, at its end.

        Raises:
            NoSpaceError: There is no room for a copy of its content.
        """
        if node.node_id in self.raws:
            return
        handle = self.open_write(node, truncate=False)
        writer = handle.writer
        try:
            with writer.lock:
                writer.is_dirty = True
                is_due = not writer.is_busy and not writer.is_removed
                if is_due and writer.failure is None:
                    self._adopt(writer)  # a close may not have arrived as the last yet
        finally:
            self.close_write(handle)

    # --- internals

    def _note_lost_writing(self, node_id: int) -> None:
        """Let a writer that goes on fail; bytes not adopted yet are whole without what is lost."""
        writer = self.writer_of(node_id)
        if writer is not None and not writer.is_dirty and not writer.is_raw:
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
        if writer.node.node_id in self.raws:
            writer.staged = self.raws.open(writer.node.node_id)
            writer.staged.mark_unchanged()
        elif not self._has_content(writer):
            writer.is_dirty = True
        elif not truncate:
            base = writer.base = super().open_read(writer.node)
            writer.kept_bytes, writer.kept_version = base.size_bytes, base.version
        writer.is_ready = True

    def _open_raw_reader(self, node: Node) -> FileReader:
        staged = self.raws.open(node.node_id)
        return FileReader(
            node.node_id, node.name, node.namespace_id, Origin.FILE, 0,
            self._stride(node.namespace_id), np.zeros((0, 32), np.uint8), staged.size_bytes,
            raw=staged,
        )  # fmt: skip

    def _release_raw(self, reader: FileReader) -> None:
        assert reader.raw is not None
        self.raws.close(reader.node_id, reader.raw)

    def _retire(self, writer: FileWriter) -> None:
        """Free what a writer holds, unless it was opened again meanwhile."""
        with self._lock:
            if writer.handles:
                return
            self._writers.pop(writer.node.node_id, None)
        self._close_base(writer)
        staged, writer.staged = writer.staged, None
        if staged is not None and staged.is_raw:
            self.staging.settle(staged, 0)
            self.raws.close(writer.node.node_id, staged)
        elif staged is not None:
            self.staging.drop(staged)
