"""Which inode number of a node an open file belongs to: one content, one page cache.

Layer: L5.

The kernel has one page cache, one size and one way of reading for all handles of an inode. So who
comes with other bytes than those who have an inode open is told ESTALE: the kernel looks the name
up once more and finds another number of the same node.

- Writers of a file see the same bytes, and share a number: the one by which everybody finds the
  node. If readers of the former content have it, the writers move on to the next.
- A reader of former content gets a detour: the caller that was told ESTALE finds the number of its
  like, or a fresh one, and nobody else does.
- A caller comes back once. If it does not get a number of its own then, as when it opens by
  /proc/self/fd, it is opened past the page cache, and cannot map the file shared.
- Locks are the inode's. Files that are small enough to be lock files stay on one number: who has
  other bytes than the first is opened past the page cache.

Used by the mount's loop alone, without locks.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from dataclasses import replace as with_changes
from typing import Final, NoReturn

from pyfuse3 import FUSEError

from kvfs.clock import Clock
from kvfs.engine.catalog_schema import Node, Origin
from kvfs.errors import BusyError
from kvfs.fuse.handles import RAW, WRITTEN, Handles, Identity, Inodes, ReadHandle, node_of

YIELD_NS: Final = 1_000_000_000
LOCK_FILE_BYTES: Final = 4096
NOBODY: Final = -1
"""A caller that is not to be told to come by another number."""


@dataclass(frozen=True, slots=True)
class _Detour:
    """Where a caller that was told ESTALE finds a node, for as long as it needs to come back."""

    inode: int
    node: Node | None
    end_ns: int


class Places:
    """Chooses inode numbers for handles, and tells callers to look names up again."""

    def __init__(self, handles: Handles, inodes: Inodes, clock: Clock) -> None:
        """Choose among what is open and what the kernel knows."""
        self._handles = handles
        self._inodes = inodes
        self._clock = clock
        self._yields: dict[int, int] = {}
        self._detours: dict[tuple[int, int], _Detour] = {}

    def require_no_passthrough(self, inode: int, caller: int = NOBODY) -> None:
        """Raise ESTALE, and give the node another number, if the kernel reads this one's file.

        The caller has been told to come back then, and is not told again for another reason.
        """
        if not self._handles.is_passthrough(inode):
            return
        node_id = node_of(inode)
        while self._handles.is_passthrough(self._inodes.current(node_id)):
            self._inodes.renumber(node_id)
        self._expect(caller, node_id, self._inodes.current(node_id))
        raise FUSEError(errno.ESTALE)

    def must_yield(self, inode: int) -> bool:
        """Say whether somebody is about to open an inode who could not if it was passed through."""
        return self._yields.get(inode, 0) > self._clock.monotonic_ns()

    @contextmanager
    def writing(self, inode: int, node: Node, caller: int) -> Iterator[None]:
        """Keep a number for a caller that writes a node, or tell it to come by another.

        Inside the block the caller may wait for what it does, and registers its handle.

        Raises:
            FUSEError: ESTALE.
        """
        is_raw = node.is_raw or self._handles.where(node.node_id, RAW) is not None
        identity = RAW if is_raw else WRITTEN
        self._choose_for_writing(inode, node, identity, caller)
        with self._handles.expecting(inode, identity):
            yield

    def _choose_for_writing(self, inode: int, node: Node, identity: Identity, caller: int) -> None:
        self.require_no_passthrough(inode, caller)
        was_told = self._has_come_back(caller, node.node_id)
        taken = self._handles.where(node.node_id, identity)
        if taken is not None and taken != inode:  # what writers see is cached there alone
            self._inodes.point(node.node_id, taken)
            self._tell(caller, node, taken)
        others = self._handles.of_other_content(inode, identity)
        is_alone = all(other.size_bytes <= LOCK_FILE_BYTES for other in others)
        if is_alone or was_told or taken == inode:
            return
        current = self._inodes.current(node.node_id)
        if current == inode or self._handles.must_bypass_cache(current, identity):
            try:
                current = self._fresh(node.node_id)
            except BusyError:
                return
            self._inodes.point(node.node_id, current)
        self._tell(caller, node, current)

    def for_reading(self, handle: ReadHandle, caller: int) -> None:
        """Let a caller open this for reading, or tell it to come by another number.

        Raises:
            FUSEError: ESTALE.
        """
        node, identity = handle.node, handle.identity
        was_told = self._has_come_back(caller, node.node_id)
        is_apart = self._handles.must_bypass_cache(handle.inode, identity)
        is_known = self._inodes.is_told(handle.inode, handle.size_bytes)
        if not is_known and not is_apart and not was_told:  # replaced since the kernel asked
            self._tell(caller, node, self._inodes.current(node.node_id))
        handle.is_direct = is_apart or not is_known
        if was_told or not is_apart:
            return
        if node.origin is not Origin.FILE or handle.size_bytes <= LOCK_FILE_BYTES:
            return
        target = self._handles.where(node.node_id, identity)
        if target is None or self._handles.is_passthrough(target):
            try:
                target = self._fresh(node.node_id)
            except BusyError:
                return
        self._tell(caller, node, target, with_changes(node, size_bytes=handle.size_bytes))

    def detour(self, caller: int, node_id: int) -> tuple[int, Node] | None:
        """Return the number, and what to show by it, if this caller was told to come by one."""
        detour = self._detours.get((caller, node_id))
        if detour is None or detour.node is None or detour.end_ns <= self._clock.monotonic_ns():
            return None
        return detour.inode, detour.node

    # --- internals

    def _has_come_back(self, caller: int, node_id: int) -> bool:
        """Say whether a caller was told to come by another number, and note that it has come."""
        if caller == NOBODY:
            return True
        detour = self._detours.pop((caller, node_id), None)
        return detour is not None and detour.end_ns > self._clock.monotonic_ns()

    def _tell(self, caller: int, node: Node, inode: int, shown: Node | None = None) -> NoReturn:
        self._expect(caller, node.node_id, inode, shown)
        raise FUSEError(errno.ESTALE)

    def _expect(self, caller: int, node_id: int, inode: int, shown: Node | None = None) -> None:
        """Note that a caller is about to come back by a number."""
        now_ns = self._clock.monotonic_ns()
        self._detours = {k: known for k, known in self._detours.items() if known.end_ns > now_ns}
        self._detours[caller, node_id] = _Detour(inode, shown, now_ns + YIELD_NS)
        self._keep_clear(inode)

    def _keep_clear(self, inode: int) -> None:
        """Let nobody take a number for passthrough until who was told to has come back by it."""
        now_ns = self._clock.monotonic_ns()
        self._yields = {number: end for number, end in self._yields.items() if end > now_ns}
        self._yields[inode] = now_ns + YIELD_NS

    def _fresh(self, node_id: int) -> int:
        """Return a number of a node that nobody uses.

        Raises:
            BusyError: There is none.
        """
        return self._inodes.fresh(
            node_id, lambda inode: not self._handles.of_inode(inode) and inode not in self._yields
        )
