"""What is known of a file that is open for writing, and of whoever writes it for kvfs.

Layer: L4.

A *foreign writer* is another process that was handed a descriptor and writes the bytes itself: the
mount's native core. What it may do, and what it says when it gives the descriptor back, is here;
`FileWriting.grant` has the protocol.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from kvfs.engine.catalog_schema import Node
from kvfs.errors import KvfsError
from kvfs.file_reading import FileReader
from kvfs.staging import Staged

DIGEST_BYTES: Final = 16
DigestArray = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class HandedIn:
    """What a foreign writer says when it gives its descriptor back.

    Attributes:
        start_bytes: Where its first byte went.
        end_bytes: Largest end of what it wrote; 0: it wrote nothing.
        digests: (n, 16) uint8, XXH3-128 of each block of the namespace's stride from the first that
            begins at or after `start_bytes`; the last ends at `end_bytes`. None: not known. They
            are only given if it wrote strictly in order, each byte once and without a gap.
        has_failed: It told somebody that a write failed.
    """

    start_bytes: int = 0
    end_bytes: int = 0
    digests: DigestArray | None = None
    has_failed: bool = False


Revoke = Callable[[], HandedIn | None]


@dataclass(frozen=True, slots=True)
class Grant:
    """Leave to write up to `credit_bytes`. `revoke` ends it and says what was written."""

    credit_bytes: int
    revoke: Revoke


class KnownDigests:
    """Digests of blocks of one file, as handed in, until somebody else writes there."""

    def __init__(self) -> None:
        self._by_block: dict[int, tuple[int, bytes]] = {}  # length and digest
        self.is_contested = False  # two wrote at the same time: nobody knows who was last

    def __len__(self) -> int:
        return len(self._by_block)

    def forget(self, start: int, end: int, stride: int) -> None:
        """Forget the blocks that bytes [start, end) lie in."""
        if not self._by_block:
            return
        first, last = start // stride, -(-end // stride)
        if last - first < len(self._by_block):
            for block in range(first, last):
                self._by_block.pop(block, None)
        else:
            kept = self._by_block.items()
            self._by_block = {b: known for b, known in kept if not first <= b < last}

    def clear(self) -> None:
        """Forget all of them."""
        self._by_block.clear()

    def take_in(self, handed: HandedIn | None, stride: int) -> None:
        """Take over what a foreign writer says, and forget what it may have overwritten."""
        if handed is None:
            self.clear()
            return
        if not handed.end_bytes:
            return
        first = -(-handed.start_bytes // stride)
        count = max(0, -(-handed.end_bytes // stride) - first)
        if handed.digests is None or self.is_contested or handed.digests.shape != (count, 16):
            self.clear()  # unknown, or not what was agreed
            return
        self.forget(handed.start_bytes, handed.end_bytes, stride)
        for block, digest in enumerate(handed.digests, first):
            length = min(stride, handed.end_bytes - block * stride)
            self._by_block[block] = (length, digest.tobytes())

    def of(self, lengths: npt.NDArray[np.uint64]) -> tuple[DigestArray, npt.NDArray[np.bool_]]:
        """Return (n, 16) digests of blocks of these lengths, and which of them are known."""
        digests = np.zeros((len(lengths), DIGEST_BYTES), np.uint8)
        known = np.zeros(len(lengths), np.bool_)
        for block, (length, digest) in self._by_block.items():
            if block < len(lengths) and int(lengths[block]) == length:
                digests[block] = np.frombuffer(digest, np.uint8)
                known[block] = True
        return digests, known


@dataclass(slots=True, eq=False)
class WriteHandle:
    """One open of a file for writing."""

    writer: "FileWriter"
    is_active: bool = False
    """Wrote since its last flush: more may come."""
    grant: Grant | None = None
    """Somebody else may write through it: counts as active."""
    is_barred: bool = False
    """Nobody else may write through it: whoever is told of its writes must be told of all."""


@dataclass(slots=True, eq=False)
class FileWriter:
    """A file that is open for writing; shared by all its handles. Fields are guarded by `lock`."""

    node: Node
    mtime_ns: int
    lock: threading.RLock = field(default_factory=threading.RLock)
    handles: list[WriteHandle] = field(default_factory=list)
    staged: Staged | None = None
    base: FileReader | None = None
    """The content so far, while nothing is staged; opened when it is needed."""
    kept_bytes: int = 0
    """Size of the content so far, without what is staged."""
    kept_version: int = 0
    """Version of the content so far, without what is staged."""
    reserved_bytes: int = 0
    """Size up to which fallocate(2) asked for room."""
    digests: KnownDigests = field(default_factory=KnownDigests)
    is_ready: bool = False
    is_dirty: bool = False
    """Differs from what was adopted."""
    is_adopting: bool = False
    """What was adopted is served in a moment: until then the writer knows best."""
    is_written: bool = False
    """Bytes were written since it was last adopted; not only made or emptied."""
    is_extended: bool = False
    """Its size was set beyond what was written."""
    has_own_mtime: bool = False
    """Its time was set, by whom it belongs to: it may lie in the future."""
    is_removed: bool = False
    failure: KvfsError | None = None

    @property
    def size_bytes(self) -> int:
        """Bytes as its writers see them."""
        return self.kept_bytes if self.staged is None else self.staged.size_bytes

    @property
    def shown_mtime_ns(self) -> int:
        """Time of the last change, by whomever."""
        changed_ns = 0 if self.staged is None else self.staged.changed_ns()
        if self.has_own_mtime:
            return changed_ns or self.mtime_ns
        return max(self.mtime_ns, changed_ns)

    def take_mtime(self) -> None:
        """Note what somebody else's writes did to the time. REQUIRES: `lock`."""
        if self.staged is not None and self.staged.changed_ns():
            self.mtime_ns, self.has_own_mtime = self.shown_mtime_ns, False
            self.staged.mark_unchanged()

    @property
    def is_busy(self) -> bool:
        """Whether a handle has written and not closed yet, or somebody else may write."""
        return any(handle.is_active or handle.grant is not None for handle in self.handles)

    @property
    def is_granted(self) -> bool:
        """Whether somebody else may write."""
        return any(handle.grant is not None for handle in self.handles)

    def is_shared_with_others(self, handle: WriteHandle, end_bytes: int) -> bool:
        """Whether what a foreign writer hashes may be changed by a write of this handle of kvfs's.

        A write of its own that was passed on ends beyond its credit; it is among what is hashed.
        """
        if handle.grant is not None and end_bytes <= handle.grant.credit_bytes:
            return True
        return any(other.grant is not None for other in self.handles if other is not handle)

    @property
    def is_raw(self) -> bool:
        """Whether it is a raw file, written in place."""
        return self.staged is not None and self.staged.is_raw

    def credit_bytes(self) -> int:
        """Return the size up to which capacity is promised."""
        grants = [handle.grant for handle in self.handles]
        return max((grant.credit_bytes for grant in grants if grant is not None), default=0)
