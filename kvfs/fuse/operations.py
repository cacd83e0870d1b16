"""The request handlers of the mount: they translate, `kvfs.tree` and `kvfs.files` decide.

Layer: L5.

- Node ids of the catalog are inode numbers; `/.kvfs` has numbers far above them.
- Reading the catalog takes tens of microseconds and happens in the loop; whatever writes it, or
  touches blocks, runs in a worker within the deadline.
- A node that is gone when it is opened gives ESTALE, upon which the kernel looks the name up anew:
  it is found again if somebody made it again, and otherwise reported missing.
"""

import errno
import logging
import os
import stat
from collections.abc import Sequence
from dataclasses import replace as with_changes
from typing import Any, Final, cast
from weakref import WeakKeyDictionary

import pyfuse3
import trio
from pyfuse3 import FileHandleT, FileInfo, FileNameT, FUSEError, InodeT, ModeT, XAttrNameT

from kvfs.engine.catalog_schema import Node, NodeKind
from kvfs.errors import ExistsError, KvfsError, NotFoundError
from kvfs.files import WriteHandle
from kvfs.fuse import status
from kvfs.fuse.attributes import Timeouts, entry_of
from kvfs.fuse.handles import (
    DirectoryHandle,
    Handle,
    Handles,
    Inodes,
    ReadHandle,
    StaticHandle,
    WritingHandle,
)
from kvfs.fuse.requests import RequestCounters, Runner, handler
from kvfs.fuse.status import StatusTree, is_virtual
from kvfs.fuse.xattrs import PREFIX, Xattrs
from kvfs.pool import Pool
from kvfs.tree import Tree

_log = logging.getLogger("kvfs.fuse")
_Context = pyfuse3.RequestContext
IDLE_LEASE_NS: Final = 1_000_000_000


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _bytes(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


class KvfsOperations(pyfuse3.Operations):
    """Answers the kernel's requests for one pool. Lives in one trio loop."""

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
        self._xattrs = Xattrs(pool, self._tree)
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

    # --- names

    @handler
    async def lookup(
        self, parent_inode: InodeT, name: FileNameT, ctx: _Context
    ) -> pyfuse3.EntryAttributes:
        """Find a name and count the lookup."""
        if is_virtual(parent_inode) or self._is_status_name(parent_inode, name):
            inode = status.STATUS_DIRECTORY
            if is_virtual(parent_inode):
                inode = self._status.lookup(parent_inode, _text(name))
            entry = await self._runner.run(self._status.entry, inode)
            self._inodes.add(inode)
            return entry
        node = self._tree.lookup(parent_inode, _text(name))
        if node is None:
            raise FUSEError(errno.ENOENT)
        return self._entry(node)

    async def forget(self, inode_list: Sequence[tuple[InodeT, int]]) -> None:
        """Take back lookups. No answer, no errors."""
        for inode, count in inode_list:
            if self._inodes.forget(inode, count) and is_virtual(inode):
                self._status.forget(inode)

    @handler
    async def mkdir(
        self, parent_inode: InodeT, name: FileNameT, mode: ModeT, ctx: _Context
    ) -> pyfuse3.EntryAttributes:
        """Make a directory; at the root, a namespace."""
        _require_mutable(parent_inode)
        node = await self._runner.run(
            self._tree.make_directory, parent_inode, _text(name), mode, ctx.uid, ctx.gid
        )
        return self._entry(node)

    @handler
    async def unlink(self, parent_inode: InodeT, name: FileNameT, ctx: _Context) -> None:
        """Remove a file's name; open handles go on."""
        _require_mutable(parent_inode)
        await self._runner.run(self._tree.remove_file, parent_inode, _text(name))

    @handler
    async def rmdir(self, parent_inode: InodeT, name: FileNameT, ctx: _Context) -> None:
        """Remove an empty directory; at the root, a namespace without names."""
        _require_mutable(parent_inode, name)
        await self._runner.run(self._tree.remove_directory, parent_inode, _text(name))

    @handler
    async def rename(
        self, parent_inode_old: InodeT, name_old: FileNameT, parent_inode_new: InodeT,
        name_new: FileNameT, flags: pyfuse3.FlagT, ctx: _Context,
    ) -> None:  # fmt: skip
        """Give a name another place."""
        _require_mutable(parent_inode_old, name_old)
        _require_mutable(parent_inode_new)
        if flags & ~pyfuse3.RENAME_NOREPLACE:
            raise FUSEError(errno.EINVAL)
        node = self._tree.lookup(parent_inode_old, _text(name_old))
        await self._runner.run(
            lambda: self._tree.rename(
                parent_inode_old, _text(name_old), parent_inode_new, _text(name_new),
                replace=not flags & pyfuse3.RENAME_NOREPLACE,
            ),
            nbytes=0 if node is None else node.size_bytes,
        )  # fmt: skip

    @handler
    async def mknod(
        self, parent_inode: InodeT, name: FileNameT, mode: ModeT, rdev: int, ctx: _Context
    ) -> pyfuse3.EntryAttributes:
        """Make an empty file; there are no devices, pipes or sockets here."""
        _require_mutable(parent_inode)
        if not stat.S_ISREG(mode):
            raise FUSEError(errno.EPERM)

        def make() -> Node:
            node = self._tree.create_file(parent_inode, _text(name), mode, ctx.uid, ctx.gid)
            self._files.close_write(self._files.open_write(node, truncate=True))
            return self._tree.node(node.node_id)

        return self._entry(await self._runner.run(make))

    @handler
    async def symlink(
        self, parent_inode: InodeT, name: FileNameT, target: FileNameT, ctx: _Context
    ) -> pyfuse3.EntryAttributes:
        """Refuse: there are no symbolic links here."""
        raise FUSEError(errno.EPERM)

    @handler
    async def link(
        self, inode: InodeT, new_parent_inode: InodeT, new_name: FileNameT, ctx: _Context
    ) -> pyfuse3.EntryAttributes:
        """Refuse: there are no hard links here."""
        raise FUSEError(errno.EPERM)

    @handler
    async def readlink(self, inode: InodeT, ctx: _Context) -> FileNameT:
        """Refuse: nothing here is a symbolic link."""
        raise FUSEError(errno.EINVAL)

    # --- attributes

    @handler
    async def getattr(self, inode: InodeT, ctx: _Context) -> pyfuse3.EntryAttributes:
        """Return what stat shows, of an open file without a name too."""
        if is_virtual(inode):
            return await self._runner.run(self._status.entry, inode)
        return self._attributes(inode)

    @handler
    async def setattr(
        self, inode: InodeT, attr: pyfuse3.EntryAttributes, fields: pyfuse3.SetattrFields,
        fh: FileHandleT | None, ctx: _Context,
    ) -> pyfuse3.EntryAttributes:  # fmt: skip
        """Change size, mode, owner and times."""
        _require_mutable(inode)
        if fields.update_size:
            await self._truncate(inode, attr.st_size, fh)
        if fields.update_mode or fields.update_uid or fields.update_gid or fields.update_mtime:
            changes = {
                "mode": stat.S_IMODE(attr.st_mode) if fields.update_mode else None,
                "uid": attr.st_uid if fields.update_uid else None,
                "gid": attr.st_gid if fields.update_gid else None,
                "mtime_ns": attr.st_mtime_ns if fields.update_mtime else None,
            }
            try:
                await self._runner.run(lambda: self._tree.set_attributes(inode, **changes))
            except NotFoundError:
                self._set_unnamed(inode, changes)
        return self._attributes(inode)

    @handler
    async def access(self, inode: InodeT, mode: ModeT, ctx: _Context) -> bool:
        """Allow: the kernel checks permissions (default_permissions)."""
        return True

    @handler
    async def statfs(self, ctx: _Context) -> pyfuse3.StatvfsData:
        """Return the figures of the tiers that files are written to."""
        return await self._runner.run(self._statfs)

    def _statfs(self) -> pyfuse3.StatvfsData:
        state = self._pool.store.state
        tiers = state.tiers(persistent=True) or state.tiers(persistent=False)
        capacity = sum(tier.info.capacity_bytes for tier in tiers)
        used = sum(tier.device.used_bytes for tier in tiers)
        counts = self._pool.catalog.statistics()
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = 4096
        data.f_blocks = capacity // 4096
        data.f_bfree = data.f_bavail = max(0, capacity - used) // 4096
        data.f_files = counts.node_count + (1 << 32)
        data.f_ffree = data.f_favail = 1 << 32
        data.f_namemax = 255
        return data

    # --- extended attributes

    @handler
    async def getxattr(self, inode: InodeT, name: XAttrNameT, ctx: _Context) -> bytes:
        """Return one of kvfs's own. The kernel asks for others at every write."""
        if not name.startswith(PREFIX) or is_virtual(inode):
            raise FUSEError(errno.ENODATA)
        node = self._tree.node(inode)
        return await self._runner.run(self._xattrs.get, node, name)

    @handler
    async def listxattr(self, inode: InodeT, ctx: _Context) -> Sequence[XAttrNameT]:
        """List kvfs's own."""
        if is_virtual(inode):
            return []
        return [XAttrNameT(name) for name in self._xattrs.names(self._tree.node(inode))]

    @handler
    async def setxattr(self, inode: InodeT, name: XAttrNameT, value: bytes, ctx: _Context) -> None:
        """Set a namespace's retention; nothing else can be set."""
        if is_virtual(inode):
            raise FUSEError(errno.EROFS)
        if not name.startswith(PREFIX):
            raise FUSEError(errno.ENOTSUP)
        await self._runner.run(self._xattrs.set, self._tree.node(inode), name, value)

    @handler
    async def removexattr(self, inode: InodeT, name: XAttrNameT, ctx: _Context) -> None:
        """Refuse."""
        if is_virtual(inode):
            raise FUSEError(errno.EROFS)
        self._xattrs.remove(self._tree.node(inode), name)

    # --- files

    @handler
    async def create(
        self, parent_inode: InodeT, name: FileNameT, mode: ModeT, flags: pyfuse3.FlagT,
        ctx: _Context,
    ) -> tuple[FileInfo, pyfuse3.EntryAttributes]:  # fmt: skip
        """Make a file and open it for writing."""
        _require_mutable(parent_inode)

        def make() -> tuple[Node, WriteHandle]:
            node = self._tree.create_file(parent_inode, _text(name), mode, ctx.uid, ctx.gid)
            try:
                return node, self._files.open_write(node, truncate=True)
            except BaseException:
                self._files.remove(node)
                raise

        def undo(made: tuple[Node, WriteHandle]) -> None:
            self._files.close_write(made[1], is_abandoned=True)

        try:
            node, file = await self._runner.run(make, undo=undo)
        except ExistsError:
            found = self._tree.lookup(parent_inode, _text(name))
            if flags & os.O_EXCL or found is None:
                raise
            info = await self._open_node(found, flags)
            return info, self._entry(found)
        return self._writing(node, file, flags), self._entry(node)

    @handler
    async def open(self, inode: InodeT, flags: pyfuse3.FlagT, ctx: _Context) -> FileInfo:
        """Open a file: its content as it is now, or a new one."""
        if is_virtual(inode):
            return await self._open_virtual(inode, flags)
        try:
            return await self._open_node(self._tree.node(inode), flags)
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

    # --- directories

    @handler
    async def opendir(self, inode: InodeT, ctx: _Context) -> FileHandleT:
        """Open a directory."""
        if is_virtual(inode):
            if not self._status.is_directory(inode):
                raise FUSEError(errno.ENOTDIR)
        elif self._tree.node(inode).kind is not NodeKind.DIRECTORY:
            raise FUSEError(errno.ENOTDIR)
        return FileHandleT(self._handles.add(DirectoryHandle(inode)))

    @handler
    async def readdir(self, fh: FileHandleT, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """Hand out entries from a position on; each that is taken counts as a lookup."""
        handle = self._handles.directory(fh)
        if is_virtual(handle.inode):
            await self._list_virtual(handle.inode, start_id, token)
            return
        if start_id == 0:
            handle.names.clear()
            if handle.inode == pyfuse3.ROOT_INODE:
                entry = await self._runner.run(self._status.entry, status.STATUS_DIRECTORY)
                # The first position stands for no name: what follows it is the first name.
                handle.names.append("")
                if not pyfuse3.readdir_reply(token, FileNameT(_bytes(status.NAME)), entry, 1):
                    return
                self._inodes.add(status.STATUS_DIRECTORY)
        after = handle.names[start_id - 1] if start_id else ""
        # Read anew for each request: the kernel believes the sizes it is told here.
        while nodes := self._tree.children(handle.inode, after):
            for node in nodes:
                handle.names.append(node.name)
                entry = entry_of(node, self._timeouts)
                name = FileNameT(_bytes(node.name))
                if not pyfuse3.readdir_reply(token, name, entry, len(handle.names)):
                    handle.names.pop()
                    return
                self._inodes.add(node.node_id)
            after = nodes[-1].name

    @handler
    async def releasedir(self, fh: FileHandleT) -> None:
        """Close a directory."""
        self._handles.pop(fh)

    @handler
    async def fsyncdir(self, fh: FileHandleT, datasync: bool) -> None:
        """Make every file closed so far, and every name, survive a power cut."""
        await self._runner.run(self._pool.sync)

    def release_idle(self) -> None:
        """Let go of leases that open files have not used for a while."""
        before_ns = self.clock.monotonic_ns() - IDLE_LEASE_NS
        for handle in self._handles:
            if isinstance(handle, ReadHandle):
                self._files.release_idle(handle.reader, before_ns)

    # --- internals

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
        count = self._files.read_nowait(handle.reader, offset, target)
        if count is None:
            del self._buffers[task]  # lost to the worker, should it miss the deadline
            count = await self._runner.run(
                self._files.read_into, handle.reader, offset, target, nbytes=nbytes
            )
            self._buffers[task] = buffer
        return target[:count]

    def _is_status_name(self, parent_inode: int, name: bytes) -> bool:
        return parent_inode == pyfuse3.ROOT_INODE and _text(name) == status.NAME

    def _entry(self, node: Node) -> pyfuse3.EntryAttributes:
        """Return a node's entry and count the lookup."""
        self._inodes.add(node.node_id)
        return entry_of(self._files.current(node), self._timeouts)

    def _attributes(self, inode: int) -> pyfuse3.EntryAttributes:
        try:
            return entry_of(self._tree.node(inode), self._timeouts)
        except NotFoundError:
            handles = self._handles.of_inode(inode)
            if not handles:
                raise
        newest = handles[-1]
        entry = entry_of(newest.node, self._timeouts, link_count=0)
        if isinstance(newest, WritingHandle):
            entry.st_size = newest.file.writer.size_bytes
        else:
            entry.st_size = newest.reader.size_bytes
        return entry

    def _set_unnamed(self, inode: int, changes: dict[str, Any]) -> None:
        """Change attributes of a file that lives on in its handles only."""
        handles = self._handles.of_inode(inode)
        if not handles:
            raise FUSEError(errno.ESTALE)
        given = {name: value for name, value in changes.items() if value is not None}
        for handle in handles:
            handle.node = with_changes(handle.node, **given)

    async def _truncate(self, inode: int, nbytes: int, fh: int | None) -> None:
        handle: Handle | None = None if fh is None else self._handles[fh]
        if isinstance(handle, WritingHandle):
            await self._runner.run(
                self._files.truncate, handle.file, nbytes, nbytes=handle.file.writer.size_bytes
            )
            return
        node = self._tree.node(inode)
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
        reader = await self._runner.run(
            self._files.open_read, node, nbytes=node.size_bytes, undo=self._files.close_read
        )
        identity = (reader.version, reader.size_bytes, node.mtime_ns)
        is_direct = self._handles.must_bypass_cache(node.node_id, identity)
        is_kept = not is_direct and self._inodes.may_keep_cache(node.node_id, identity)
        number = self._handles.add(ReadHandle(node, reader, identity))
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

    async def _list_virtual(self, inode: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        names = self._status.names(inode)
        for position, (name, child) in enumerate(names[start_id:], start_id + 1):
            entry = await self._runner.run(self._status.entry, child)
            if not pyfuse3.readdir_reply(token, FileNameT(_bytes(name)), entry, position):
                return
            self._inodes.add(child)


def _require_mutable(inode: int, name: bytes = b"") -> None:
    """Refuse to change `/.kvfs` and what lies in it."""
    if is_virtual(inode) or (inode == pyfuse3.ROOT_INODE and _text(name) == status.NAME):
        raise FUSEError(errno.EROFS)
