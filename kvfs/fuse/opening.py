"""What a mount keeps of its open files, and how they are opened: for reading, with the best lane.

Layer: L5.

- The kernel demands one way of reading for all handles of an inode while it reads the inode's file
  itself. A handle takes its place among them before anything is waited for, so that two opens never
  choose what does not go together. One that cannot join is told ESTALE: the kernel looks the name
  up anew and finds the node under another inode number (`fuse.places`).
- While a file is written, or has other content than a handle has open, no table is installed for
  the handle: where the content ends is then for the request handler to say.
"""

import contextlib
import errno
import functools
import logging
import os
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, TypeVar
from weakref import WeakKeyDictionary

import pyfuse3
import trio
from pyfuse3 import FileHandleT, FileInfo, FUSEError

from kvfs.engine.catalog_schema import Node
from kvfs.errors import KvfsError, LeaseExpiredError, UnavailableError
from kvfs.files import WriteHandle
from kvfs.fuse.attributes import Timeouts, entry_of
from kvfs.fuse.core import Core
from kvfs.fuse.core_messages import OpenFile
from kvfs.fuse.handles import (
    RAW,
    FormerHandle,
    Handle,
    Handles,
    Inodes,
    ReadHandle,
    StaticHandle,
    WritingHandle,
    identity_of,
    is_version,
    node_of,
)
from kvfs.fuse.lane_plans import Lane, Plan
from kvfs.fuse.lanes import Lanes
from kvfs.fuse.places import NOBODY, Places
from kvfs.fuse.requests import RequestCounters, Runner
from kvfs.fuse.status import StatusTree
from kvfs.fuse.write_lanes import WriteLanes
from kvfs.pool import Pool
from kvfs.tree import Tree

if TYPE_CHECKING:
    from kvfs.fuse.name_filter import NameFilter

SMALL_BLOCKS: Final = 64
LAZY_BYTES: Final = 1 << 20  # what a few reads fetch does not pay for a table
LAZY_READS: Final = 4
_NS_PER_S: Final = 1_000_000_000
_BY_HANDLE: Final = frozenset(
    ("read", "write", "flush", "release", "fsync", "readdir", "releasedir", "fsyncdir", "fallocate")
)
_T = TypeVar("_T")
_log = logging.getLogger("kvfs.fuse")


class Opening(pyfuse3.Operations):
    """The state of a mount, and opens. Lives in one trio loop."""

    def __init__(
        self, pool: Pool, *, deadline_s: float, threads: int, timeouts: Timeouts,
        core: Core | None = None,
    ) -> None:  # fmt: skip
        """Serve a pool, directly or through a core; see MountOptions."""
        super().__init__()
        self.clock = pool.clock
        self.counters = RequestCounters()
        self.is_initialized = trio.Event()
        self.lanes: Lanes | None = None
        self.write_lanes: WriteLanes | None = None
        self.names: NameFilter | None = None
        self._core = core
        self._pool = pool
        self._files = pool.files
        self._tree = Tree(pool)
        self._status = StatusTree(pool, self.snapshot)
        self._timeouts = timeouts
        # Numbers of a later owner of the same mount are above those of an earlier one.
        self._handles = Handles((pool.clock.wall_ns() // _NS_PER_S & 0xFFFFFF) << 24)
        self._inodes = Inodes()
        self._places = Places(self._handles, self._inodes, self.clock)
        self._late: deque[Callable[[], None]] = deque()  # found no thread when it was due
        self._buffers: WeakKeyDictionary[trio.lowlevel.Task, memoryview] = WeakKeyDictionary()
        self._runner = Runner(deadline_s, threads, self.counters, lambda: pool.deadlines_ms)
        if core is not None:
            self.lanes = Lanes(
                pool.store, core.client, pool.clock, has_passthrough=core.hello.has_passthrough,
                deadlines_ms=lambda: pool.deadlines_ms,
            )  # fmt: skip
            self.write_lanes = WriteLanes(pool.files, core.client)
            self._runner.on_patience = core.client.allow

    def snapshot(self) -> dict[str, Any]:
        """Return what the mount counted, and what is open."""
        return {
            **self.counters.snapshot(),
            "timeouts_by_namespace": self._timeouts_by_namespace(),
            "open_handles": len(self._handles),
            "known_inodes": len(self._inodes),
            "stalled_devices": [] if self.lanes is None else self.lanes.stalled(),
            "core": {} if self._core is None else dict(self._core.counters),
            "views": {} if self.lanes is None else self.lanes.views.snapshot(),
        }

    def namespace_of(self, name: str, number: int) -> int:
        """Return the namespace that a request is about, or 0 if that is not known."""
        inode = self._handles.inode_of(number) if name in _BY_HANDLE else number
        return self._inodes.namespace_of(inode)

    def _timeouts_by_namespace(self) -> dict[str, int]:
        """Return how many requests missed their deadline, by namespace; "" for all others."""
        counts, found = self.counters.timeouts.copy(), {"": 0}
        if counts:
            names = {info.namespace_id: info.name for info in self._pool.catalog.namespaces()}
            for namespace_id, count in counts.items():
                name = names.get(namespace_id, "")
                found[name] = found.get(name, 0) + count
        return found

    def restore(self, core: Core) -> None:
        """Take over the files that the kernel has open since a former owner, and pin what is read.

        Before a request is answered, and clients are let in: nothing was evicted meanwhile.
        """
        for file in core.client.open_files():
            is_writing = file.flags & os.O_ACCMODE != os.O_RDONLY
            handle: Handle | None = None if is_writing else self._opened_again(file)
            if handle is None:
                handle = FormerHandle(file.inode, is_writing, file.is_passthrough)
            elif not file.is_passthrough:
                _close_former(core, file.fh)
            self._handles.put(file.fh, handle)

    def _opened_again(self, file: OpenFile) -> ReadHandle | None:
        """Open what a former owner had open for a reader; None if that is not there any more."""
        try:
            node = self._files.current(self._pool.catalog.node(node_of(file.inode)))
            reader = self._files.open_read(node)
        except KvfsError as error:
            _log.info("open file is lost to its reader: inode %d: %s", file.inode, error)
            return None
        if not is_version(file.fh, reader.version):
            self._files.close_read(reader)
            return None
        handle = ReadHandle(file.inode, node, reader, identity_of(reader, node))
        handle.is_passthrough = file.is_passthrough
        return handle

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

    async def _node(self, node_id: int) -> Node:
        """Return a node as stat shows it."""
        return (await self._shown([await self._look(self._pool.catalog.node, node_id)]))[0]

    async def _find(self, parent_inode: int, name: str) -> Node | None:
        """Return the child of this name as stat shows it."""
        node = await self._look(self._pool.catalog.lookup, parent_inode, name)
        return None if node is None else (await self._shown([node]))[0]

    def _entry(self, node: Node, caller: int = 0) -> pyfuse3.EntryAttributes:
        """Return the entry of a node as the tree shows it to a caller, and count the lookup."""
        entry = self._entry_of(node)
        detour = self._places.detour(caller, node.node_id)
        if detour is not None:
            entry = self._entry_of(detour[1])
            entry.st_ino = pyfuse3.InodeT(detour[0])
        self._inodes.add(entry.st_ino, node.namespace_id)
        self._inodes.tell(entry.st_ino, entry.st_size)
        return entry

    def _entry_of(self, node: Node, *, link_count: int = 1) -> pyfuse3.EntryAttributes:
        """Return the entry of a node by the inode number that it has now."""
        entry = entry_of(node, self._timeouts, link_count=link_count)
        entry.st_ino = pyfuse3.InodeT(self._inodes.current(node.node_id))
        return entry

    async def _open_node(self, inode: int, node: Node, flags: int, caller: int) -> FileInfo:
        if flags & os.O_ACCMODE == os.O_RDONLY:
            if flags & os.O_TRUNC:
                node = await self._cut(inode, node, caller, self._files.empty_node)
                caller = NOBODY  # the kernel would not come back once more
            return await self._open_read(inode, node, caller)
        with self._places.writing(inode, node, caller):
            return await self._open_write(inode, node, flags)

    async def _open_write(self, inode: int, node: Node, flags: int) -> FileInfo:
        is_cut, number = bool(flags & os.O_TRUNC), self._handles.next_number()
        file = await self._runner.run(
            lambda: self._opened_to_write(number, inode, node, is_cut=is_cut),
            undo=lambda file: self._files.close_write(file, is_abandoned=True),
        )
        try:
            await self._revoke(inode)
            info = self._writing(number, inode, node, file, flags)
            await self._bar_direct_writers(inode)
        except BaseException:
            self._handles.pop(number)
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(self._files.close_write, file)
            raise
        return info

    async def _bar_direct_writers(self, inode: int) -> None:
        """Let those who write past the page cache write here, if anybody uses it.

        A write past it leaves pages behind that are stale then: they are dropped before the answer.
        A handle that reads, too, uses it when it is mapped privately; those pages come from here.
        """
        is_cached = self._handles.has_cached_writing(inode)
        for other in self._handles.opened(inode):
            if not isinstance(other, WritingHandle) or other.file.is_barred:
                continue
            if other.is_direct and (is_cached or other.may_be_mapped):
                await self._runner.run(self._files.bar_grants, other.file)

    async def _cut(
        self, inode: int, node: Node, caller: int, function: Callable[..., None], *args: object
    ) -> Node:
        """Change the size of a file that the caller has not open for writing; return what it is.

        Raises:
            FUSEError: ESTALE: come by another number.
        """
        with self._places.writing(inode, node, caller):
            await self._runner.run(function, node, *args, nbytes=2 * node.size_bytes)
            await self._revoke(inode)  # the answer moves the end of the file in the kernel
        self._inodes.drop_cache(inode)
        self._pool.note_written()
        node = await self._node(node.node_id)
        self._inodes.tell(inode, node.size_bytes)
        return node

    def _opened_to_write(self, number: int, inode: int, node: Node, *, is_cut: bool) -> WriteHandle:
        """Open for writing, and let the core write what is empty so far. Any thread; may wait."""
        file = self._files.open_write(node, truncate=is_cut)
        if is_cut and self.write_lanes is not None:
            self.write_lanes.offer(number, inode, file, 0)
        return file

    def _writing(
        self, number: int, inode: int, node: Node, file: WriteHandle, flags: int
    ) -> FileInfo:
        """Return the answer to an open for writing.

        Past the page cache if only written: each request then carries the caller's own pages, up to
        the largest size. A handle that reads too may be mapped shared, which needs the cache; so
        do all of a raw file, which others may have mapped, and all beside one that uses the cache.
        """
        handle = WritingHandle(inode, node, file)
        handle.may_be_mapped = flags & os.O_ACCMODE == os.O_RDWR
        is_raw = handle.identity == RAW
        if not handle.may_be_mapped and not is_raw:
            handle.is_direct = not self._handles.has_cached_writing(inode)
        if self._handles.must_bypass_cache(inode, handle.identity):
            handle.is_direct = True
        is_kept = is_raw and not handle.is_direct and self._inodes.may_keep_cache(inode, RAW)
        if not is_raw:
            self._inodes.drop_cache(inode)
        self._handles.put(number, handle)
        return FileInfo(fh=FileHandleT(number), direct_io=handle.is_direct, keep_cache=is_kept)

    async def _open_read(self, inode: int, node: Node, caller: int) -> FileInfo:
        reader = None
        if node.block_count <= SMALL_BLOCKS:  # no bytes move; a thread would take longer
            reader = self._files.open_read_at_once(node)
        if reader is None:
            reader = await self._runner.run(
                self._files.open_read, node, nbytes=node.size_bytes, undo=self._files.close_read
            )
        identity = identity_of(reader, node)
        handle = ReadHandle(inode, node, reader, identity)
        number, unused = 0, None
        try:
            plan = unused = None if reader.size_bytes <= LAZY_BYTES else await self._plan(handle)
            if self.lanes is not None:
                self.lanes.views.note_open(reader)
            number = self._take_place(handle, plan, caller)
            unused = None
            if plan is not None:
                await self._install(number, handle, plan)
        except BaseException:
            self._handles.pop(number)
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(self._close_reader, number, handle, unused)
            raise
        is_kept = not (handle.is_direct or handle.is_passthrough) and self._inodes.may_keep_cache(
            inode, identity
        )
        return FileInfo(fh=FileHandleT(number), direct_io=handle.is_direct, keep_cache=is_kept)

    def _take_place(self, handle: ReadHandle, plan: Plan | None, caller: int) -> int:
        """Register a handle among those of its inode, with the way of reading that goes with them.

        Raises:
            FUSEError: ESTALE: none does.
        """
        self._places.for_reading(handle, caller)
        if not self._may_pass_through(handle):
            self._places.require_no_passthrough(handle.inode, caller)
            if plan is not None:
                plan.lane = Lane.NATIVE
        elif plan is None or plan.lane is not Lane.PASSTHROUGH:
            self._places.require_no_passthrough(handle.inode, caller)
        handle.is_passthrough = plan is not None and plan.lane is Lane.PASSTHROUGH
        return self._handles.add(handle)

    def _close_reader(self, number: int, handle: ReadHandle, plan: Plan | None = None) -> None:
        """Let go of what a handle for reading holds, here and in the core, and of its plan.

        Any thread; may wait.
        """
        self._files.close_read(handle.reader)
        if self.lanes is not None:
            self.lanes.close(number)
            if plan is not None:
                self.lanes.release(plan)

    # --- lanes

    async def _plan(self, handle: ReadHandle, *, may_pass: bool = True) -> Plan | None:
        """Return what lane a handle could have; files are verified for passthrough."""
        lanes = self.lanes
        if lanes is None or self._is_contested(handle):
            return None
        reader, plan, is_planned = handle.reader, None, False
        may_pass = may_pass and self._may_pass_through(handle)
        if len(reader.keys) <= SMALL_BLOCKS:
            with self._pool.store.hold_at_once() as is_planned:
                if is_planned:
                    plan = lanes.plan(reader, may_pass=may_pass)
        if not is_planned:
            plan = await self._runner.run(
                lambda: lanes.plan(reader, may_pass=may_pass), undo=_release(lanes)
            )
        if plan is not None and not lanes.is_vouched(plan):
            plan = await self._vouched(lanes, plan)
        return plan

    async def _vouched(self, lanes: Lanes, plan: Plan) -> Plan | None:
        """Verify what a plan holds, and make the view it needs; consumes the plan.

        A view that takes too long is no reason to fail: the handlers can read what it would hold.
        """
        is_file, devices = plan.offer is None, lanes.devices_of(plan.lease)
        try:
            return await self._runner.run(
                lanes.vouched, plan, nbytes=plan.reader.size_bytes, undo=_release(lanes),
                unused=functools.partial(lanes.release, plan),
                on_timeout=functools.partial(lanes.note_stall, devices) if is_file else None,
            )  # fmt: skip
        except FUSEError:
            if is_file:
                raise
            return None

    async def _install(self, number: int, handle: ReadHandle, plan: Plan) -> None:
        """Install a lane for a registered handle, if the core agrees.

        Here and now if nothing need be waited for, else in a worker.
        """
        assert self.lanes is not None
        lanes, inode = self.lanes, handle.inode
        plan.is_direct = handle.is_direct
        if not self._is_contested(handle) and lanes.install_at_once(number, inode, plan):
            return
        lane = await self._runner.run(
            lanes.install, number, inode, plan, unused=functools.partial(lanes.release, plan)
        )
        if handle.is_passthrough and lane is not Lane.PASSTHROUGH:
            handle.is_passthrough = False
            self._places.require_no_passthrough(inode)
        if lane is Lane.NATIVE and self._is_contested(handle):
            await self._runner.run(lanes.close, number)

    async def _install_again(self, number: int, handle: ReadHandle) -> None:
        """Let the core answer the next reads of a handle, one of whose reads came to this side.

        That read does not wait for a busy engine on this account, and does not fail by it.
        """
        lanes = self.lanes
        if lanes is None or handle.is_passthrough or self._is_contested(handle):
            return
        handle.read_count += 1
        is_worth_it = handle.reader.size_bytes > LAZY_BYTES or handle.read_count >= LAZY_READS
        if not is_worth_it or not lanes.is_due(number, handle.reader):
            return
        lanes.refuse(number)  # others that come meanwhile do not try as well
        with self._pool.store.hold_at_once() as is_free:
            pass
        if not is_free:
            return
        with contextlib.suppress(FUSEError):
            plan = await self._plan(handle, may_pass=False)
            if plan is not None:
                await self._install(number, handle, plan)

    def _is_contested(self, handle: ReadHandle) -> bool:
        """Say whether what a handle reads may end where others see it go on."""
        if self._files.writer_of(handle.node.node_id) is not None:
            return True
        return self._files.is_outdated(handle.reader)

    async def _revoke(self, inode: int) -> None:
        """Take the tables of an inode's readers back: it is about to be written."""
        if self.lanes is None:
            return
        for number, other in self._handles.items():
            if isinstance(other, FormerHandle) and other.inode == inode and self._core is not None:
                await self._runner.run(_close_former, self._core, number)
            if isinstance(other, ReadHandle) and other.inode == inode and not other.is_passthrough:
                await self._runner.run(self.lanes.close, number)

    def _may_pass_through(self, handle: ReadHandle) -> bool:
        """Say whether a handle that is not registered yet may be opened for passthrough."""
        inode = handle.inode
        return not self._places.must_yield(inode) and self._handles.may_pass_through(
            inode, handle.identity
        )

    # --- handles of a former owner

    def _own(self, number: int) -> Handle:
        """Return a handle that was opened here, or opened again (`restore`).

        Raises:
            UnavailableError: It wrote.
            LeaseExpiredError: Its content is gone.
        """
        handle = self._handles[number]
        if isinstance(handle, FormerHandle):
            if handle.is_writing:
                raise UnavailableError("file was being written when its owner died; write it again")
            raise LeaseExpiredError(
                f"content was removed or replaced: inode {handle.inode}; open it again"
            )
        return handle

    # --- virtual files

    async def _open_virtual(self, inode: int, flags: int) -> FileInfo:
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise FUSEError(errno.EROFS)
        block = self._status.block(inode)
        if block is None:
            content = await self._runner.run(self._status.content, inode)
        else:
            content = await self._runner.run(self._read_block, *block)
        number = self._handles.add(StaticHandle(inode, content))
        return FileInfo(fh=FileHandleT(number), direct_io=True)

    def _read_block(self, namespace_id: int, key: Any) -> bytes:
        reader = self._files.open_block(namespace_id, key)
        try:
            return bytes(self._files.read(reader, 0, reader.size_bytes))
        finally:
            self._files.close_read(reader)


def _close_former(core: Core, number: int) -> None:
    """Take from a handle the table that a former owner has installed."""
    with contextlib.suppress(OSError, UnavailableError):  # it is as true as ever
        core.client.close_lane(number)


def _release(lanes: Lanes) -> Callable[[Plan | None], None]:
    """Return what undoes a plan that came too late."""

    def undo(plan: Plan | None) -> None:
        if plan is not None:
            lanes.release(plan)

    return undo
