"""Request handlers of names, directories and attributes, on top of those of files.

Layer: L5.

- Handlers translate; `kvfs.tree` and `kvfs.files` decide.
- Node ids of the catalog are inode numbers; `/.kvfs` has numbers far above them.
- Reading the catalog takes tens of microseconds and happens in the loop if it is free at once;
  otherwise, and for whatever writes it or touches blocks, a worker does it within the deadline.
"""

import errno
import stat
from collections.abc import Sequence
from dataclasses import replace as with_changes
from typing import Any

import pyfuse3
from pyfuse3 import FileHandleT, FileNameT, FUSEError, InodeT, ModeT, XAttrNameT

from kvfs.engine.catalog_schema import Node, NodeKind
from kvfs.errors import NotFoundError
from kvfs.fuse import status
from kvfs.fuse.attributes import Timeouts
from kvfs.fuse.core import Core
from kvfs.fuse.file_operations import FileOperations, bytes_of, require_mutable, text_of
from kvfs.fuse.handles import DirectoryHandle, ReadHandle, WritingHandle, node_of, numbers_of
from kvfs.fuse.lane_plans import Lane
from kvfs.fuse.lanes import Lanes
from kvfs.fuse.opening import LAZY_BYTES
from kvfs.fuse.requests import handler
from kvfs.fuse.status import is_virtual
from kvfs.fuse.xattrs import LANE, USER, Xattrs
from kvfs.pool import Pool
from kvfs.tree import PAGE_NODES

_Context = pyfuse3.RequestContext


class KvfsOperations(FileOperations):
    """Answers the kernel's requests for one pool. Lives in one trio loop."""

    def __init__(
        self, pool: Pool, *, deadline_s: float, threads: int, timeouts: Timeouts,
        core: Core | None = None,
    ) -> None:  # fmt: skip
        """Serve a pool; see MountOptions."""
        super().__init__(pool, deadline_s=deadline_s, threads=threads, timeouts=timeouts, core=core)
        self._xattrs = Xattrs(pool, self._tree)

    # --- names

    @handler
    async def lookup(
        self, parent_inode: InodeT, name: FileNameT, ctx: _Context
    ) -> pyfuse3.EntryAttributes:
        """Find a name and count the lookup."""
        if is_virtual(parent_inode) or self._is_status_name(parent_inode, name):
            inode = status.STATUS_DIRECTORY
            if is_virtual(parent_inode):
                inode = self._status.lookup(parent_inode, text_of(name))
            entry = await self._runner.run(self._status.entry, inode)
            self._inodes.add(inode)
            return entry
        node = await self._find(parent_inode, text_of(name))
        if node is None:
            raise FUSEError(errno.ENOENT)
        return self._entry(node, ctx.pid)

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
        require_mutable(parent_inode)
        node = await self._runner.run(
            self._tree.make_directory, parent_inode, text_of(name), mode, ctx.uid, ctx.gid
        )
        return self._entry(node)

    @handler
    async def unlink(self, parent_inode: InodeT, name: FileNameT, ctx: _Context) -> None:
        """Remove a file's name; open handles go on."""
        require_mutable(parent_inode)
        await self._runner.run(self._tree.remove_file, parent_inode, text_of(name))

    @handler
    async def rmdir(self, parent_inode: InodeT, name: FileNameT, ctx: _Context) -> None:
        """Remove an empty directory; at the root, a namespace without names."""
        require_mutable(parent_inode, name)
        await self._runner.run(self._tree.remove_directory, parent_inode, text_of(name))

    @handler
    async def rename(
        self, parent_inode_old: InodeT, name_old: FileNameT, parent_inode_new: InodeT,
        name_new: FileNameT, flags: pyfuse3.FlagT, ctx: _Context,
    ) -> None:  # fmt: skip
        """Give a name another place."""
        require_mutable(parent_inode_old, name_old)
        require_mutable(parent_inode_new)
        if flags & ~pyfuse3.RENAME_NOREPLACE:
            raise FUSEError(errno.EINVAL)
        node = await self._find(parent_inode_old, text_of(name_old))
        await self._runner.run(
            lambda: self._tree.rename(
                parent_inode_old, text_of(name_old), parent_inode_new, text_of(name_new),
                replace=not flags & pyfuse3.RENAME_NOREPLACE,
            ),
            nbytes=0 if node is None else node.size_bytes,
        )  # fmt: skip

    @handler
    async def mknod(
        self, parent_inode: InodeT, name: FileNameT, mode: ModeT, rdev: int, ctx: _Context
    ) -> pyfuse3.EntryAttributes:
        """Make an empty file; there are no devices, pipes or sockets here."""
        require_mutable(parent_inode)
        if not stat.S_ISREG(mode):
            raise FUSEError(errno.EPERM)

        def make() -> Node:
            node = self._tree.create_file(parent_inode, text_of(name), mode, ctx.uid, ctx.gid)
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
        return await self._attributes(inode)

    @handler
    async def setattr(
        self, inode: InodeT, attr: pyfuse3.EntryAttributes, fields: pyfuse3.SetattrFields,
        fh: FileHandleT | None, ctx: _Context,
    ) -> pyfuse3.EntryAttributes:  # fmt: skip
        """Change size, mode, owner and times."""
        require_mutable(inode)
        if fields.update_size:
            await self._truncate(inode, attr.st_size, fh, ctx.pid)
        if fields.update_mode or fields.update_uid or fields.update_gid or fields.update_mtime:
            changes = {
                "mode": stat.S_IMODE(attr.st_mode) if fields.update_mode else None,
                "uid": attr.st_uid if fields.update_uid else None,
                "gid": attr.st_gid if fields.update_gid else None,
                "mtime_ns": attr.st_mtime_ns if fields.update_mtime else None,
            }
            try:
                node = await self._runner.run(
                    lambda: self._tree.set_attributes(node_of(inode), **changes)
                )
                for number in numbers_of(node.node_id):
                    for handle in self._handles.opened(number):
                        handle.node = node  # what is shown once it has no name
            except NotFoundError:
                await self._set_unnamed(inode, changes)
        return await self._attributes(inode)

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
        kept = sum(tier.info.segment_bytes for tier in tiers if tier.has_reserve)
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = 4096
        data.f_blocks = capacity // 4096
        data.f_bfree = max(0, capacity - used) // 4096
        data.f_bavail = max(0, capacity - used - kept) // 4096
        data.f_files = self._pool.catalog.node_count + (1 << 32)
        data.f_ffree = data.f_favail = 1 << 32
        data.f_namemax = 255
        return data

    # --- extended attributes

    @handler
    async def getxattr(self, inode: InodeT, name: XAttrNameT, ctx: _Context) -> bytes:
        """Return one of the file's. The kernel asks for others at every write."""
        if not name.startswith(USER) or is_virtual(inode):
            raise FUSEError(errno.ENODATA)
        if name == LANE:
            return (await self._lane(inode)).value.encode()
        node_id = node_of(inode)
        return await self._runner.run(lambda: self._xattrs.get(self._tree.node(node_id), name))

    @handler
    async def listxattr(self, inode: InodeT, ctx: _Context) -> Sequence[XAttrNameT]:
        """List kvfs's own, and those that were set."""
        if is_virtual(inode):
            return []
        node_id = node_of(inode)
        names = await self._look(lambda: self._xattrs.names(self._pool.catalog.node(node_id)))
        return [XAttrNameT(name) for name in names]

    @handler
    async def setxattr(self, inode: InodeT, name: XAttrNameT, value: bytes, ctx: _Context) -> None:
        """Set an attribute of the user's, `user.kvfs.raw`, or a namespace's retention."""
        if not name:  # not from the kernel
            await self._fallocate(value)
            return
        if is_virtual(inode):
            raise FUSEError(errno.EROFS)
        if not name.startswith(USER):
            raise FUSEError(errno.ENOTSUP)
        node_id = node_of(inode)
        await self._runner.run(lambda: self._xattrs.set(self._tree.node(node_id), name, value))

    @handler
    async def removexattr(self, inode: InodeT, name: XAttrNameT, ctx: _Context) -> None:
        """Take away what was set."""
        if is_virtual(inode):
            raise FUSEError(errno.EROFS)
        node_id = node_of(inode)
        await self._runner.run(lambda: self._xattrs.remove(self._pool.catalog.node(node_id), name))

    # --- directories

    @handler
    async def opendir(self, inode: InodeT, ctx: _Context) -> FileHandleT:
        """Open a directory."""
        if is_virtual(inode):
            if not self._status.is_directory(inode):
                raise FUSEError(errno.ENOTDIR)
        elif (await self._look(self._pool.catalog.node, inode)).kind is not NodeKind.DIRECTORY:
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
                if not pyfuse3.readdir_reply(token, FileNameT(bytes_of(status.NAME)), entry, 1):
                    return
                self._inodes.add(status.STATUS_DIRECTORY)
        after = handle.names[start_id - 1] if start_id else ""
        # Read anew for each request: the kernel believes the sizes it is told here.
        children = self._pool.catalog.children
        while nodes := await self._look(children, handle.inode, after, PAGE_NODES):
            for node in await self._shown(nodes):
                handle.names.append(node.name)
                entry = self._entry_of(node)
                name = FileNameT(bytes_of(node.name))
                if not pyfuse3.readdir_reply(token, name, entry, len(handle.names)):
                    handle.names.pop()
                    return
                self._inodes.add(entry.st_ino, node.namespace_id)
                self._inodes.tell(entry.st_ino, entry.st_size)
            after = nodes[-1].name

    @handler
    async def releasedir(self, fh: FileHandleT) -> None:
        """Close a directory."""
        self._handles.pop(fh)

    @handler
    async def fsyncdir(self, fh: FileHandleT, datasync: bool) -> None:
        """Make every file closed so far, and every name, survive a power cut."""
        await self._runner.run(self._pool.sync)

    # --- internals

    def _is_status_name(self, parent_inode: int, name: bytes) -> bool:
        return parent_inode == pyfuse3.ROOT_INODE and text_of(name) == status.NAME

    async def _attributes(self, inode: int) -> pyfuse3.EntryAttributes:
        handles = self._handles.opened(inode)
        node_id, link_count = node_of(inode), 1
        try:
            node = await self._node(node_id)
        except NotFoundError:
            if not handles:
                raise
            node, link_count = handles[-1].node, 0
            writer = self._files.writer_of(node_id)
            if writer is not None:
                node = with_changes(node, mtime_ns=writer.shown_mtime_ns)
        if handles and (not link_count or self._inodes.current(node_id) != inode):
            # All share the kernel's one size; where its writers append depends on it.
            node = with_changes(node, size_bytes=self._handles.size_of(inode))
        entry = self._entry_of(node, link_count=link_count)
        entry.st_ino = inode
        self._inodes.tell(inode, entry.st_size)
        return entry

    async def _lane(self, inode: int) -> Lane:
        """Return who answers reads: of the newest open handle, else what an open would get."""
        for number, handle in reversed(self._handles.items()):
            if isinstance(handle, ReadHandle) and handle.inode == inode and self.lanes is not None:
                return self.lanes.lane_of(number)
            if isinstance(handle, WritingHandle) and handle.inode == inode:
                is_native = self.write_lanes is not None and self.write_lanes.is_native(number)
                return Lane.NATIVE if is_native else Lane.NAMESPACE
        node = await self._node(node_of(inode))
        if node.is_directory:
            raise FUSEError(errno.ENODATA)
        if self.lanes is None or self._files.writer_of(node.node_id) is not None:
            return Lane.NAMESPACE
        if node.size_bytes <= LAZY_BYTES:
            return Lane.NAMESPACE
        return await self._runner.run(self._would_be, self.lanes, node)

    def _would_be(self, lanes: Lanes, node: Node) -> Lane:
        reader = self._files.open_read(node)
        try:
            plan = lanes.plan(reader)
            if plan is None:
                return Lane.NAMESPACE
            lanes.release(plan)
            return plan.lane
        finally:
            self._files.close_read(reader)

    async def _set_unnamed(self, inode: int, changes: dict[str, Any]) -> None:
        """Change attributes of a file that lives on in its handles only."""
        handles = self._handles.opened(inode)
        if not handles:
            raise FUSEError(errno.ESTALE)
        given = {name: value for name, value in changes.items() if value is not None}
        for handle in handles:
            handle.node = with_changes(handle.node, **given)
        if "mtime_ns" in given:
            await self._runner.run(self._files.set_mtime, handles[-1].node, given["mtime_ns"])

    async def _list_virtual(self, inode: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        names = self._status.names(inode)
        for position, (name, child) in enumerate(names[start_id:], start_id + 1):
            entry = await self._runner.run(self._status.entry, child)
            if not pyfuse3.readdir_reply(token, FileNameT(bytes_of(name)), entry, position):
                return
            self._inodes.add(child)
