"""Request handlers of open files: create, open, read, write, close.

Layer: L5.

- A node that is gone when it is opened gives ESTALE, upon which the kernel looks the name up anew:
  it is found again if somebody made it again, and otherwise reported missing.
- Bytes in memory are read in the loop, small files opened, if no lock need be waited for;
  everything else of a file happens in a worker, within the deadline.
- The loop holds the catalog for a row at a time, and looks for no blocks.
"""

import errno
import logging
import os
from collections.abc import Callable
from dataclasses import replace as with_changes
from typing import Any, Final, TypeVar, cast
from weakref import WeakKeyDictionary

import pyfuse3
import trio
from pyfuse3 import FileHandleT, FileInfo, FileNameT, FUSEError, InodeT, ModeT

from kvfs.engine.catalog_schema import Node
from kvfs.errors import ExistsError, KvfsError, LeaseExpiredError, NotFoundError
from kvfs.file_reading import FileReader
from kvfs.files import WriteHandle
from kvfs.fuse import status
from kvfs.fuse.attributes import Timeouts, entry_of
from kvfs.fuse.handles import Handle, Handles, Inodes, ReadHandle, StaticHandle, WritingHandle
from kvfs.fuse.requests import RequestCounters, Runner, handler
from kvfs.fuse.status import StatusTree, is_virtual
from kvfs.pool import Pool
from kvfs.tree import Tree
from kvfs.units import PAGE, align_up

IDLE_LEASE_NS: Final = 1_000_000_000
SMALL_BLOCKS: Final = 64
_log = logging.getLogger("kvfs.fuse")
_Context = pyfuse3.RequestContext
_T = TypeVar("_T")


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


class FileOperations(pyfuse3.Operations):
    """What a mount keeps, and the handlers of files. Lives in one trio loop."""

    supports_dot_lookup = False
    enable_writeback_cache = False
    enable_acl = False

    def __init__(self, pool: Pool, *, deadline_s: float, threads: int, timeouts: Timeouts) -> None:
        """Serve a pool; see MountOptions."""
        super().__init__()
        self.clock = pool.clock
        self.counters = RequestCounters()
        self.is_initialized = trio.Event()
        self._pool = pool
        self._files = pool.files
        self._tree = Tree(pool)
        self._status = StatusTree(pool, self.snapshot)
        self._timeouts = timeouts
        self._handles = Handles()
        self._inodes = Inodes()
        self._buffers: WeakKeyDictionary[trio.lowlevel.Task, memoryview] = WeakKeyDictionary()
        self._runner = Runner(deadline_s, threads, self.counters)

    def init(self) -> None:
        """Note that the kernel has agreed on a protocol: from now on the mount answers."""
        self.is_initialized.set()

    def snapshot(self) -> dict[str, Any]:
        """Return what the mount counted, and what is open."""
        return {
            **self.counters.snapshot(),
            "open_handles": len(self._handles),
            "known_inodes": len(self._inodes),
        }

    def close(self) -> None:
        """Close what is still open; files that were not closed by their writers are given up."""
        for handle in self._handles.drain():
            try:
                if isinstance(handle, WritingHandle):
                    self._files.close_write(handle.file, is_abandoned=True)
                elif isinstance(handle, ReadHandle):
                    self._files.close_read(handle.reader)
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

        def make() -> tuple[Node, WriteHandle]:
            node = self._tree.create_file(parent_inode, text_of(name), mode, ctx.uid, ctx.gid)
            try:
                file = self._files.open_write(node, truncate=True)
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
            info = await self._open_node(found, flags)
            if flags & os.O_TRUNC:
                found = with_changes(found, size_bytes=0)
            return info, self._entry(found)
        return self._writing(node, file, flags), self._entry(node)

    @handler
    async def open(self, inode: InodeT, flags: pyfuse3.FlagT, ctx: _Context) -> FileInfo:
        """Open a file: its content as it is now, or a new one."""
        if is_virtual(inode):
            return await self._open_virtual(inode, flags)
        try:
            node = await self._look(self._pool.catalog.node, inode)
            if not self._files.must_look(node):
                node = self._files.current(node)
            return await self._open_node(node, flags)
        except NotFoundError as error:
            raise FUSEError(errno.ESTALE) from error

    @handler
    async def read(self, fh: FileHandleT, off: int, size: int) -> bytes:
        """Read; a short answer is the end of the file."""
        handle = self._handles[fh]
        data: bytes | bytearray | memoryview
        if isinstance(handle, ReadHandle):
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
        handle = self._handles[fh]
        if not isinstance(handle, WritingHandle):
            raise FUSEError(errno.EBADF)
        count = await self._runner.run(self._files.write, handle.file, off, buf, nbytes=len(buf))
        self.counters.bytes_written += count
        return count

    @handler
    async def flush(self, fh: FileHandleT) -> None:
        """Answer close(2): the file is whole, or this says why not."""
        handle = self._handles[fh]
        if isinstance(handle, WritingHandle):
            nbytes = handle.file.writer.size_bytes
            await self._runner.run(self._files.flush, handle.file, nbytes=nbytes)
            self._pool.note_written()

    @handler
    async def release(self, fh: FileHandleT) -> None:
        """Close a handle; nobody waits for this."""
        handle = self._handles.pop(fh)
        if isinstance(handle, WritingHandle):
            nbytes = handle.file.writer.size_bytes
            self._inodes.drop_cache(handle.node.node_id)
            await self._runner.run(self._files.close_write, handle.file, nbytes=nbytes)
            self._pool.note_written()
        elif isinstance(handle, ReadHandle):
            await self._runner.run(self._files.close_read, handle.reader)

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
        readers = [handle.reader for handle in self._handles if isinstance(handle, ReadHandle)]

        def release() -> None:
            for reader in readers:
                self._files.release_idle(reader, before_ns)

        if any(reader.window is not None for reader in readers):
            await trio.to_thread.run_sync(release, abandon_on_cancel=True)

    # --- internals

    async def _look(self, function: Callable[..., _T], *args: object) -> _T:
        """Read the catalog alone: here and now if it is free at once, else in a worker."""
        with self._pool.catalog.hold_at_once() as is_held:
            if is_held:
                return function(*args)
        return await self._runner.run(function, *args)

    async def _shown(self, nodes: list[Node]) -> list[Node]:
        """Return nodes as stat shows them; in a worker if that takes a look for blocks."""

        def show() -> list[Node]:
            return [self._files.current(node) for node in nodes]

        if not any(self._files.must_look(node) for node in nodes):
            return show()
        return await self._runner.run(show)

    async def _node(self, inode: int) -> Node:
        """Return a node as stat shows it."""
        return (await self._shown([await self._look(self._pool.catalog.node, inode)]))[0]

    async def _find(self, parent_inode: int, name: str) -> Node | None:
        """Return the child of this name as stat shows it."""
        node = await self._look(self._pool.catalog.lookup, parent_inode, name)
        return None if node is None else (await self._shown([node]))[0]

    def _entry(self, node: Node) -> pyfuse3.EntryAttributes:
        """Return the entry of a node as the tree shows it, and count the lookup."""
        self._inodes.add(node.node_id)
        return entry_of(node, self._timeouts)

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
            count = await self._runner.run(read, reader, offset, target, nbytes=nbytes)
            self._buffers[task] = buffer
        return target[:count]

    def _is_beyond(self, handle: ReadHandle, end: int) -> bool:
        """Say whether the kernel believes a file to be longer than its reader has open.

        It keeps one size and one set of pages for all who have the file open. A short answer would
        move the size under a writer that appends, and leave zeros in pages that others read.
        """
        reader = handle.reader
        if handle.is_direct or end <= reader.size_bytes:
            return False
        if self._files.is_outdated(reader):
            raise LeaseExpiredError(f"file is being replaced: {reader.name!r}; open it again")
        return end > align_up(reader.size_bytes, PAGE)

    def _read_beyond(self, reader: FileReader, offset: int, target: memoryview) -> int:
        """Read where the kernel believes more to be than was there at open."""
        self._files.catch_up(reader)
        return self._files.read_into(reader, offset, target)

    async def _truncate(self, inode: int, nbytes: int, fh: int | None) -> None:
        handle: Handle | None = None if fh is None else self._handles[fh]
        if isinstance(handle, WritingHandle):
            await self._runner.run(
                self._files.truncate, handle.file, nbytes, nbytes=handle.file.writer.size_bytes
            )
            return
        node = await self._node(inode)
        await self._runner.run(self._files.truncate_node, node, nbytes, nbytes=2 * node.size_bytes)
        self._inodes.drop_cache(inode)
        self._pool.note_written()

    async def _open_node(self, node: Node, flags: int) -> FileInfo:
        if flags & os.O_ACCMODE != os.O_RDONLY:
            is_cut = bool(flags & os.O_TRUNC)
            file = await self._runner.run(
                lambda: self._files.open_write(node, truncate=is_cut),
                undo=lambda file: self._files.close_write(file, is_abandoned=True),
            )
            return self._writing(node, file, flags)
        reader = None
        if node.block_count <= SMALL_BLOCKS:  # no bytes move; a thread would take longer
            reader = self._files.open_read_at_once(node)
        if reader is None:
            reader = await self._runner.run(
                self._files.open_read, node, nbytes=node.size_bytes, undo=self._files.close_read
            )
        identity = (reader.version, reader.size_bytes, node.mtime_ns)
        is_direct = self._handles.must_bypass_cache(node.node_id, identity)
        is_kept = not is_direct and self._inodes.may_keep_cache(node.node_id, identity)
        number = self._handles.add(ReadHandle(node, reader, identity, is_direct))
        return FileInfo(fh=FileHandleT(number), direct_io=is_direct, keep_cache=is_kept)

    def _writing(self, node: Node, file: WriteHandle, flags: int) -> FileInfo:
        """Return the answer to an open for writing.

        Past the page cache if only written: each request then carries the caller's own pages, up to
        the largest size. A handle that reads too may be mapped shared, which needs the cache.
        """
        is_direct = flags & os.O_ACCMODE == os.O_WRONLY
        is_direct = is_direct or self._handles.must_bypass_cache(node.node_id, None)
        self._inodes.drop_cache(node.node_id)
        number = self._handles.add(WritingHandle(node, file))
        return FileInfo(fh=FileHandleT(number), direct_io=is_direct, keep_cache=False)

    async def _open_virtual(self, inode: int, flags: int) -> FileInfo:
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise FUSEError(errno.EROFS)
        handle: Handle
        block = self._status.block(inode)
        if block is None:
            content = await self._runner.run(self._status.content, inode)
            handle = StaticHandle(inode, content)
        else:
            content = await self._runner.run(self._read_block, *block)
            handle = StaticHandle(inode, content)
        return FileInfo(fh=FileHandleT(self._handles.add(handle)), direct_io=True)

    def _read_block(self, namespace_id: int, key: Any) -> bytes:
        reader = self._files.open_block(namespace_id, key)
        try:
            return bytes(self._files.read(reader, 0, reader.size_bytes))
        finally:
            self._files.close_read(reader)
