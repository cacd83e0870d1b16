"""Request handlers of open files: create, open, read, write, close.

Layer: L5.

- A node that is gone when it is opened gives ESTALE, upon which the kernel looks the name up anew:
  it is found again if somebody made it again, and otherwise reported missing.
- Bytes in memory are read in the loop, small files opened, if no lock need be waited for;
  everything else of a file happens in a worker, within the deadline.
- The loop holds the catalog for a row at a time, and looks for no blocks.
"""

import contextlib
import errno
import functools
import logging
import os
import struct
from collections.abc import Callable
from dataclasses import replace as with_changes
from typing import Final, cast

import pyfuse3
import trio
from pyfuse3 import FileHandleT, FileInfo, FileNameT, FUSEError, InodeT, ModeT

from kvfs.engine.catalog_schema import Node
from kvfs.errors import ExistsError, KvfsError, LeaseExpiredError, NotFoundError
from kvfs.file_reading import FileReader
from kvfs.files import WriteHandle
from kvfs.fuse import status
from kvfs.fuse.handles import (
    FormerHandle,
    Handle,
    ReadHandle,
    StaticHandle,
    WritingHandle,
    node_of,
)
from kvfs.fuse.opening import Opening
from kvfs.fuse.requests import handler
from kvfs.fuse.status import is_virtual
from kvfs.units import PAGE, align_up

IDLE_LEASE_NS: Final = 1_000_000_000
DROP_S: Final = 1.0
FOR_CACHE: Final = 1 << 62
"""In the offset of a read: the kernel wants a page for its cache (native/core/requests.c)."""
_FALLOCATE: Final = struct.Struct("<QQQI4x")  # linux/fuse.h, struct fuse_fallocate_in
_log = logging.getLogger("kvfs.fuse")
_Context = pyfuse3.RequestContext


def text_of(name: bytes) -> str:
    """Return a name as the catalog keeps it; bytes that are no UTF-8 are escaped."""
    return name.decode("utf-8", "surrogateescape")


def bytes_of(name: str) -> bytes:
    """Return a name as the kernel knows it."""
    return name.encode("utf-8", "surrogateescape")


def require_mutable(inode: int, name: bytes = b"") -> None:
    """Refuse to change `/.kvfs` and what lies in it."""
    if is_virtual(inode) or (inode == pyfuse3.ROOT_INODE and text_of(name) == status.NAME):
        raise FUSEError(errno.EROFS)


class FileOperations(Opening):
    """The handlers of files. Lives in one trio loop."""

    supports_dot_lookup = False
    enable_writeback_cache = False
    enable_acl = False

    def init(self) -> None:
        """Note that the kernel has agreed on a protocol: from now on the mount answers."""
        self.is_initialized.set()

    def stop_names(self) -> None:
        """Tell the core and the kernel of no more names."""
        if self.names is not None:
            self.names.close()
            self.names = None

    def close(self, *, is_left: bool = False) -> None:
        """Close what is still open; files that were not closed by their writers are given up.

        What a core that `is_left` reads stays where it is: clients may put until the pool closes.

        REQUIRES: the core, if there is one, has ended, or was left.
        """
        if self.lanes is not None:
            if is_left:
                self.lanes.leave()
            else:
                self.lanes.stop()
        self._do_late()
        for number, handle in self._handles.drain():
            try:
                if isinstance(handle, WritingHandle):
                    self._files.close_write(handle.file, is_abandoned=True)
                elif isinstance(handle, ReadHandle):
                    self._close_reader(number, handle)
            except KvfsError as error:
                _log.warning("open file could not be closed at unmount: %s", error)

    # --- files

    @handler
    async def create(
        self, parent_inode: InodeT, name: FileNameT, mode: ModeT, flags: pyfuse3.FlagT,
        ctx: _Context,
    ) -> tuple[FileInfo, pyfuse3.EntryAttributes]:  # fmt: skip
        """Make a file and open it for writing."""
        require_mutable(parent_inode)
        number = self._handles.next_number()

        def make() -> tuple[Node, WriteHandle]:
            node = self._tree.create_file(parent_inode, text_of(name), mode, ctx.uid, ctx.gid)
            try:
                file = self._opened_to_write(number, node.node_id, node, is_cut=True)
                return self._files.current(node), file
            except BaseException:
                self._files.remove(node)
                raise

        def undo(made: tuple[Node, WriteHandle]) -> None:
            self._files.close_write(made[1], is_abandoned=True)

        try:
            node, file = await self._runner.run(make, undo=undo)
        except ExistsError:
            found = await self._find(parent_inode, text_of(name))
            if flags & os.O_EXCL or found is None:
                raise
            inode = self._inodes.current(found.node_id)
            info = await self._open_node(inode, found, flags, ctx.pid)
            if flags & os.O_TRUNC:
                found = with_changes(found, size_bytes=0)
            return info, self._entry(found)
        return self._writing(number, node.node_id, node, file, flags), self._entry(node)

    @handler
    async def open(self, inode: InodeT, flags: pyfuse3.FlagT, ctx: _Context) -> FileInfo:
        """Open a file: its content as it is now, or a new one."""
        if is_virtual(inode):
            return await self._open_virtual(inode, flags)
        try:
            node = await self._look(self._pool.catalog.node, node_of(inode))
            if not self._files.must_look(node):
                node = self._files.current(node)
            return await self._open_node(inode, node, flags, ctx.pid)
        except NotFoundError as error:
            raise FUSEError(errno.ESTALE) from error

    @handler
    async def read(self, fh: FileHandleT, off: int, size: int) -> bytes:
        """Read; a short answer is the end of the file."""
        is_for_cache, off = bool(off & FOR_CACHE), off & ~FOR_CACHE
        handle = self._own(fh)
        if is_for_cache and isinstance(handle, ReadHandle | WritingHandle) and handle.is_direct:
            self._require_own_cache(handle)
        data: bytes | bytearray | memoryview
        if isinstance(handle, ReadHandle):
            await self._install_again(fh, handle)
            data = await self._read(handle, off, size)
        elif isinstance(handle, WritingHandle):
            data = await self._runner.run(
                self._files.read_staged, handle.file, off, size, nbytes=size
            )
        else:
            assert isinstance(handle, StaticHandle)
            data = handle.content[off : off + size]
        self.counters.bytes_read += len(data)
        return cast(bytes, data)  # any buffer will do

    @handler
    async def write(self, fh: FileHandleT, off: int, buf: bytes) -> int:
        """Write to the staged bytes."""
        handle = self._writing_handle(fh)
        count = await self._runner.run(
            self._write, fh, handle, off, buf, nbytes=len(buf),
            on_timeout=functools.partial(self._files.note_overdue, handle.file),
        )  # fmt: skip
        if handle.is_direct and self._handles.has_cached_writing(handle.inode, but=handle):
            await self._drop_pages(handle.inode)
        self.counters.bytes_written += count
        return count

    @handler
    async def flush(self, fh: FileHandleT) -> None:
        """Answer close(2): the file is whole, or this says why not."""
        handle = self._handles[fh]
        if isinstance(handle, FormerHandle) and handle.is_writing:
            raise FUSEError(errno.EIO)
        if isinstance(handle, WritingHandle):
            nbytes = handle.file.writer.size_bytes
            await self._runner.run(self._files.flush, handle.file, nbytes=nbytes)
            self._inodes.tell(handle.inode, handle.size_bytes)  # it has made it so long itself
            self._pool.note_written()

    @handler
    async def release(self, fh: FileHandleT) -> None:
        """Close a handle; nobody waits for this. It comes once, so it is done in any case."""
        handle = self._handles.pop(fh)
        if isinstance(handle, WritingHandle):
            nbytes = handle.file.writer.size_bytes
            self._inodes.drop_cache(handle.inode)
            await self._finish(self._files.close_write, handle.file, nbytes=nbytes)
            self._pool.note_written()
        elif isinstance(handle, ReadHandle):
            if not self._files.close_read_at_once(handle.reader):
                await self._finish(self._close_reader, fh, handle)
            elif self.lanes is not None and not self.lanes.close_at_once(fh):
                await self._finish(self.lanes.close, fh)

    async def close_late(self) -> None:
        """Do what found no thread in time when it was due."""
        if self._late:
            await trio.to_thread.run_sync(self._do_late, abandon_on_cancel=True)

    @handler
    async def fsync(self, fh: FileHandleT, datasync: bool) -> None:
        """Persist the bytes written; through a handle that only reads, all that is published."""
        handle = self._handles[fh]
        if isinstance(handle, WritingHandle):
            nbytes = handle.file.writer.size_bytes
            await self._runner.run(self._files.fsync, handle.file, nbytes=nbytes)
        elif isinstance(handle, ReadHandle):
            await self._runner.run(self._pool.sync)

    async def release_idle(self) -> None:
        """Let go of leases that open files have not used for a while."""
        before_ns = self.clock.monotonic_ns() - IDLE_LEASE_NS
        readers = [h.reader for h in self._handles.values() if isinstance(h, ReadHandle)]

        def release() -> None:
            for reader in readers:
                self._files.release_idle(reader, before_ns)

        if any(reader.window is not None for reader in readers):
            await trio.to_thread.run_sync(release, abandon_on_cancel=True)

    async def _fallocate(self, raw: bytes) -> None:
        """Answer fallocate(2), which the core passes on in this form."""
        fh, offset, nbytes, mode = _FALLOCATE.unpack(raw)
        handle = self._writing_handle(fh)
        await self._runner.run(
            self._files.fallocate, handle.file, mode, offset, nbytes,
            nbytes=handle.file.writer.size_bytes,
        )  # fmt: skip

    # --- internals

    async def _finish(self, function: Callable[..., None], *args: object, nbytes: int = 0) -> None:
        """Run what must happen in any case: within the deadline, or later."""
        late = functools.partial(function, *args)
        await self._runner.run(
            function, *args, nbytes=nbytes, unused=functools.partial(self._late.append, late)
        )

    def _do_late(self) -> None:
        """Do what is due since long. Any thread; may wait."""
        while True:
            try:
                function = self._late.popleft()
            except IndexError:
                return
            try:
                function()
                self._pool.note_written()
            except KvfsError as error:
                _log.warning("open file could not be closed: %s", error)

    def _require_own_cache(self, handle: ReadHandle | WritingHandle) -> None:
        """Let a private map of a handle past the page cache fill that cache, if it harms nobody.

        Raises:
            FUSEError: EIO: others of the inode have other bytes, and would be shown these.
        """
        for other in self._handles.of_inode(handle.inode):
            if isinstance(other, FormerHandle) or other.content != handle.content:
                raise FUSEError(errno.EIO)
        self._inodes.drop_cache(handle.inode)

    def _writing_handle(self, fh: int) -> WritingHandle:
        handle = self._handles[fh]
        if isinstance(handle, WritingHandle):
            return handle
        raise FUSEError(errno.EIO if isinstance(handle, FormerHandle) else errno.EBADF)

    def _write(self, fh: int, handle: WritingHandle, offset: int, data: bytes) -> int:
        """Write what the core did not, and let it do what follows. Any thread; may wait."""
        count = self._files.write(handle.file, offset, data)
        if self.write_lanes is not None:
            self.write_lanes.offer(fh, handle.inode, handle.file, offset + count)
        return count

    async def _read(self, handle: ReadHandle, offset: int, nbytes: int) -> memoryview:
        """Read into a buffer of the task that serves the request.

        It is used again for the task's next request, when the reply to this one is long written.
        Bytes in memory are copied here and now: handing them to a thread and back takes longer.
        """
        task = trio.lowlevel.current_task()
        buffer = self._buffers.get(task)
        if buffer is None or buffer.nbytes < nbytes:
            buffer = self._buffers[task] = memoryview(bytearray(nbytes))
        target = buffer[:nbytes]
        reader, count = handle.reader, None
        is_beyond = self._is_beyond(handle, offset + nbytes)
        if not is_beyond:
            count = self._files.read_nowait(reader, offset, target)
        if count is None:
            del self._buffers[task]  # lost to the worker, should it miss the deadline
            read = self._read_beyond if is_beyond else self._files.read_into
            count = await self._runner.run(
                read, reader, offset, target, nbytes=nbytes,
                on_timeout=lambda: self._note_stall(reader, offset, nbytes),
            )  # fmt: skip
            self._buffers[task] = buffer
        return target[:count]

    def _note_stall(self, reader: FileReader, offset: int, nbytes: int) -> None:
        """Note on which devices bytes lie that were not read within the deadline."""
        if self.lanes is None or reader.raw is not None:
            return
        state, stride = self._pool.store.state, reader.stride
        keys = reader.keys[offset // stride : -(-(offset + nbytes) // stride)]
        index = state.index(reader.namespace_id)
        self.lanes.note_stall(
            [
                tier.info.index
                for tier in state.tiers(persistent=True)
                if index.lookup(keys, tier.info.index)["length"].any()
            ]
        )

    def _is_beyond(self, handle: ReadHandle, end: int) -> bool:
        """Say whether the kernel believes a file to be longer than its reader has open.

        It keeps one size and one set of pages for all who have the file open. A short answer would
        move the size under a writer that appends, and leave zeros in pages that others read.
        """
        reader, inode = handle.reader, handle.inode
        if handle.is_direct or end <= reader.size_bytes:
            return False
        if self._inodes.current(reader.node_id) != inode and not self._handles.is_written(inode):
            return False  # a number of its own: the kernel believes what it was told of this reader
        if self._files.is_outdated(reader):
            raise LeaseExpiredError(f"file is being replaced: {reader.name!r}; open it again")
        return end > align_up(reader.size_bytes, PAGE)

    def _read_beyond(self, reader: FileReader, offset: int, target: memoryview) -> int:
        """Read where the kernel believes more to be than was there at open."""
        self._files.catch_up(reader)
        return self._files.read_into(reader, offset, target)

    async def _drop_pages(self, inode: int) -> None:
        """Let the kernel forget pages that it has read while a write went past them.

        Before the write is answered, so that nobody who knows of it reads what was before. The
        kernel may have to write and to read for it, by tasks and threads other than this; where
        they are slow the pages go later.
        """
        with trio.move_on_after(DROP_S), contextlib.suppress(OSError):
            await trio.to_thread.run_sync(
                pyfuse3.invalidate_inode, InodeT(inode), abandon_on_cancel=True
            )

    async def _truncate(self, inode: int, nbytes: int, fh: int | None, caller: int) -> None:
        handle: Handle | None = None if fh is None else self._handles[fh]
        if isinstance(handle, WritingHandle):
            await self._runner.run(
                self._files.truncate, handle.file, nbytes, nbytes=handle.file.writer.size_bytes
            )
            return
        if isinstance(handle, FormerHandle) and handle.is_writing:
            raise FUSEError(errno.EIO)
        node = await self._node(node_of(inode))
        await self._cut(inode, node, caller, self._files.truncate_node, nbytes)
