"""The bytes of files that are open for writing: staged, grown, granted to foreign writers.

Layer: L4.

- Staging begins at the first write: opening for writing moves no bytes.
- Who writes through kvfs and who was granted a descriptor write the same staged bytes; the kernel
  orders them.

Locks: a writer's `lock`, then those of `FileContents`. A revocation is called with the lock held.
"""

import contextlib
import errno
import logging
import os
from collections.abc import Callable
from typing import Final

from kvfs.clock import Clock
from kvfs.engine.catalog import Catalog
from kvfs.engine.store import Store
from kvfs.errors import (
    BusyError,
    DeviceError,
    KvfsError,
    MediaError,
    NoSpaceError,
    NotFoundError,
    UsageError,
)
from kvfs.file_contents import FileContents
from kvfs.file_reading import FileReader
from kvfs.file_writer import FileWriter, Grant, HandedIn, Revoke, WriteHandle
from kvfs.layout import Layout
from kvfs.raw_files import RawFiles
from kvfs.staging import Staged, StagingArea

GRANT_STEP_BYTES: Final = 16 << 20
GRANT_SHARE: Final = 4  # of a large file a quarter of its size ahead
_GRANT_STEP_MAX: Final = 256 << 20
_MEMORY_STEP_BYTES: Final = 4 << 20
FALLOC_KEEP_SIZE: Final = 1  # linux/falloc.h
_COPY_BYTES: Final = 4 << 20
_log = logging.getLogger("kvfs.files")


class UnsupportedError(UsageError):
    """Raised if a system call asks for what files here cannot do."""

    errno = errno.EOPNOTSUPP


class FileWriting(FileContents):
    """Writes, and lets others write, the bytes of open files. Thread-safe."""

    def __init__(
        self, store: Store, catalog: Catalog, layout_of: Callable[[int], Layout], clock: Clock,
        memory_bytes: int,
    ) -> None:  # fmt: skip
        """Bind to a pool; see FileContents. `memory_bytes`: what small files may take."""
        super().__init__(store, catalog, layout_of, clock)
        self.staging = StagingArea(store, memory_bytes)
        self.raws = RawFiles(store)

    # --- writing through kvfs

    def write(self, handle: WriteHandle, offset: int, data: bytes | memoryview) -> int:
        """Write into the staged bytes. Durability: flush.

        Raises:
            NoSpaceError: Nothing more can be evicted. The file will not be adopted.
            DeviceError: The device failed. The file will not be adopted.
        """
        writer = handle.writer
        with writer.lock:
            handle.is_active = True
            _note_written(writer)
            if writer.is_shared_with_others(handle, offset + memoryview(data).nbytes):
                writer.digests.is_contested = True
            try:
                self._touch(writer)
                self._write(writer, offset, data)
            except KvfsError as error:
                self._fail(writer, error)
                raise
            except BaseException as error:
                # Whatever it was: bytes are missing, and the file must not appear without them.
                failure = DeviceError(f"write failed: {writer.node.name!r}: {error!r}")
                self._fail(writer, failure)
                if isinstance(error, OSError):
                    raise failure from error
                raise
        return len(data)

    def note_overdue(self, handle: WriteHandle) -> None:
        """Keep a file from being adopted one of whose writes was given up.

        It may be done late or never. Its writer was told so, and may have written there again.
        """
        # Without its lock: whoever holds that may be what the write waits for.
        writer = handle.writer
        self._fail(writer, DeviceError(f"write took too long: {writer.node.name!r}"))

    def read_staged(self, handle: WriteHandle, offset: int, nbytes: int) -> bytes | bytearray:
        """Read what the writers see."""
        writer = handle.writer
        with writer.lock:
            nbytes = min(nbytes, writer.size_bytes - offset)
            if nbytes <= 0:
                return b""
            if writer.staged is not None:
                return os.pread(writer.staged.file.fd, nbytes, offset)
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

    def fallocate(self, handle: WriteHandle, mode: int, offset: int, nbytes: int) -> None:
        """Extend, as `truncate` does, in mode 0; with KEEP_SIZE reserve room until the last close.

        The file's time becomes now in any case, as on other filesystems.

        Raises:
            UnsupportedError: Any other mode.
            NoSpaceError: Nothing more can be evicted.
        """
        if mode & ~FALLOC_KEEP_SIZE or offset < 0 or nbytes <= 0:
            raise UnsupportedError(f"fallocate is not supported here: mode {mode:#x}")
        writer, end = handle.writer, offset + nbytes
        with writer.lock:
            if mode == 0 and end > writer.size_bytes:
                self.truncate(handle, end)
                return
            if mode == FALLOC_KEEP_SIZE:
                staged = self._staged(writer, writer.size_bytes)
                self._fit(writer, end)
                self.staging.reserve(staged, end)
                writer.reserved_bytes = max(writer.reserved_bytes, end)
            self._touch_unchanged(writer)

    # --- foreign writers

    def grant(self, handle: WriteHandle, upto_bytes: int, revoke: Revoke) -> tuple[int, int]:
        """Let somebody else write, with pwrite to a descriptor, up to a credit; return both.

        The capacity is taken ahead, in steps that grow with the file, so a write inside the credit
        meets no full pool; of the memory for small files only half is. It must not go beyond: what
        ends there is written by `write`, after which more may be granted.

        The protocol, for a file that is open through `handle`:

        1. After a `write` the caller asks for a grant, duplicates the descriptor (it stays kvfs's)
           and lets the foreign writer go on. To raise the credit it asks again; while the grant
           lasts the descriptor is the same. Without leave it goes on by `write`.
        2. Whenever kvfs needs the bytes for itself it calls `revoke`, in the thread of whatever
           call needs them, the writer's lock held: revoke must stop the foreign writer, wait for
           writes under way, close every duplicate, and say what was written; it calls nothing here.
           The grant is over when it returns, and cannot be used again; step 1 may follow.
           That happens at every `flush` and `close_write` of the handle; before the file is adopted
           (flush, rename, an open by a reader); and before bytes move from memory to their device:
           at `fsync`, and when a write goes beyond a quarter of a segment. There the credit ends,
           so that this write comes to `write`, which revokes first and moves then.
        3. The caller may end a grant by itself: it stops the writer, then calls `hand_in`.

        `revoke` that raises makes the file fail, for nobody knows what is in it. So does one that
        says so (`HandedIn.has_failed`).

        Raises:
            NoSpaceError: Not even `upto_bytes` can be had. Nothing has failed yet; a write will.
            BusyError: Grants were barred.
        """
        writer = handle.writer
        with writer.lock:
            if writer.failure is not None:
                raise writer.failure
            if handle.is_barred:
                raise BusyError(f"every write is to be seen: {writer.node.name!r}; use write")
            self._staged(writer, writer.size_bytes)
            if any(other.grant is not None for other in writer.handles if other is not handle):
                writer.digests.is_contested = True
            credit = self._reserve(writer, upto_bytes)
            staged = writer.staged
            assert staged is not None
            staged.start_growing()
            handle.grant = Grant(credit, revoke)
            return staged.file.fd, credit

    def hand_in(self, handle: WriteHandle, handed: HandedIn | None) -> None:
        """End a grant whose foreign writer was stopped already. None: what it wrote is not known.

        Unused capacity is given back.
        """
        writer = handle.writer
        with writer.lock:
            if handle.grant is not None:
                handle.grant = None
                self._take_in(writer, handed)

    def revoke(self, handle: WriteHandle) -> None:
        """End a grant, if there is one, as kvfs does when it needs the bytes itself."""
        with handle.writer.lock:
            self._revoke(handle.writer, handle)

    def bar_grants(self, handle: WriteHandle) -> None:
        """End a grant, and give no more through this handle: every write comes to kvfs."""
        with handle.writer.lock:
            handle.is_barred = True
            self._revoke(handle.writer, handle)

    def _revoke(self, writer: FileWriter, handle: WriteHandle) -> None:
        """End the grant of one handle, if it has one. REQUIRES: the writer's lock."""
        grant, handle.grant = handle.grant, None
        if grant is None:
            return
        handed: HandedIn | None = None
        try:
            handed = grant.revoke()
        except Exception as error:  # noqa: BLE001 - it is the caller's; the file fails
            failure = DeviceError(
                f"foreign writer could not be stopped: {writer.node.name!r}: {error}"
            )
            failure.__cause__ = error
            self._fail(writer, failure)
            if writer.is_raw:
                _log.warning("%s", failure)
        self._take_in(writer, handed)

    def _revoke_all(self, writer: FileWriter) -> None:
        """End all grants. REQUIRES: the writer's lock."""
        for handle in list(writer.handles):
            self._revoke(writer, handle)

    def _take_in(self, writer: FileWriter, handed: HandedIn | None) -> None:
        """Settle after a grant: size, capacity, digests. REQUIRES: the writer's lock."""
        writer.take_mtime()
        grew = self._settle(writer)
        writer.digests.take_in(handed, self.stride_of(writer))
        if grew > 0 or handed is None or handed.end_bytes:
            _note_written(writer)
        if handed is not None and handed.has_failed:
            self._fail(writer, DeviceError(f"write failed or took too long: {writer.node.name!r}"))

    def _settle(self, writer: FileWriter) -> int:
        """Take the size from the file; keep the capacity that is promised."""
        if writer.staged is None:
            return 0
        kept = max(writer.credit_bytes(), writer.reserved_bytes)
        grew = self.staging.settle(writer.staged, kept)
        if not writer.is_granted and not writer.is_raw:
            writer.staged.stop_growing()
        return grew

    def _reserve(self, writer: FileWriter, upto_bytes: int) -> int:
        """Take capacity for a grant, a step ahead if that is to be had; return the credit."""
        staged = writer.staged
        assert staged is not None
        if staged.in_memory:
            limit = self.staging.memory_limit()
            ahead = min(limit, upto_bytes + max(_MEMORY_STEP_BYTES, upto_bytes))
            for end in (ahead, upto_bytes):
                is_ahead = end > upto_bytes
                if upto_bytes <= end and self.staging.hold(staged, end, is_ahead=is_ahead):
                    self.staging.reserve(staged, end)
                    return end
            self._move(writer)
        step = min(max(GRANT_STEP_BYTES, upto_bytes // GRANT_SHARE), _GRANT_STEP_MAX)
        ahead = upto_bytes + step
        try:
            self.staging.reserve(staged, ahead)
        except NoSpaceError:
            self.staging.reserve(staged, upto_bytes)
            return upto_bytes
        return ahead

    # --- internals

    def _fail(self, writer: FileWriter, failure: KvfsError) -> None:
        """Keep a file that lacks bytes from appearing; a raw file was there before."""
        if not writer.is_raw:
            writer.failure = failure

    def _touch(self, writer: FileWriter) -> None:
        writer.has_own_mtime = False
        writer.mtime_ns = self._clock.wall_ns()

    def _touch_unchanged(self, writer: FileWriter) -> None:
        """Note that a file changed of whose bytes none did. REQUIRES: the writer's lock."""
        self._touch(writer)
        if writer.is_raw:
            writer.is_dirty = True  # at its close its time goes to the catalog, and no bytes
        elif not writer.is_dirty:  # no adoption will tell the catalog
            now_ns = writer.mtime_ns
            with contextlib.suppress(NotFoundError):  # it was removed
                node_id = writer.node.node_id
                self._catalog.set_attributes(node_id, mtime_ns=now_ns, now_ns=now_ns)
            self._note_mtime(writer.node.node_id, now_ns)

    def _write(self, writer: FileWriter, offset: int, data: bytes | memoryview) -> None:
        staged = self._staged(writer, writer.size_bytes)
        if staged.is_growing:
            self._settle(writer)
        end = offset + memoryview(data).nbytes
        self._fit(writer, max(end, staged.file.nbytes))
        self._change(writer, lambda: self.staging.write(staged, offset, data))
        writer.digests.forget(offset, end, self.stride_of(writer))

    def _staged(self, writer: FileWriter, kept_bytes: int) -> Staged:
        """Return the staged bytes, made from the first bytes of the content so far."""
        if writer.staged is not None:
            return writer.staged
        node = writer.node
        staged = self.staging.create(
            f"{node.node_id:x}", node.namespace_id, kept_bytes, on_device=False
        )
        try:
            buffer = bytearray(min(_COPY_BYTES, kept_bytes))
            for offset in range(0, kept_bytes, _COPY_BYTES):
                part = memoryview(buffer)[: kept_bytes - offset]
                self.read_into(self._opened_base(writer), offset, part)
                self.staging.write(staged, offset, part)
        except BaseException:
            self.staging.drop(staged)
            raise
        writer.staged = staged
        self._close_base(writer)
        return staged

    def _fit(self, writer: FileWriter, nbytes: int) -> None:
        """Make sure that the staged bytes may grow to a size where they are, or move them."""
        assert writer.staged is not None
        if not self.staging.hold(writer.staged, nbytes):
            self._move(writer)

    def _change(self, writer: FileWriter, change: Callable[[], None]) -> None:
        """Change the staged bytes; where that takes another device, nobody else may write then."""
        try:
            change()
        except NoSpaceError:
            if writer.is_raw or not writer.is_granted:
                raise
            self._revoke_all(writer)
            if writer.failure is not None:
                raise writer.failure from None
            change()

    def _move(self, writer: FileWriter) -> None:
        """Move staged bytes from memory to their device; nobody else may write meanwhile."""
        self._revoke_all(writer)
        if writer.failure is not None:
            raise writer.failure
        assert writer.staged is not None
        self.staging.move(writer.staged)
        if writer.reserved_bytes:
            self.staging.reserve(writer.staged, writer.reserved_bytes)

    def _resize(self, writer: FileWriter, nbytes: int) -> None:
        """Cut or extend. REQUIRES: the writer's lock."""
        before = writer.size_bytes
        if nbytes < before and writer.is_granted:
            # Of what was cut off, too. Who cuts at open tells the foreign writer nothing of it.
            writer.digests.is_contested = True
        if nbytes == 0:
            self._close_base(writer)
            writer.kept_bytes = 0
            writer.failure = None
            writer.digests.clear()
        if nbytes or writer.staged is not None:
            staged = self._staged(writer, min(nbytes, before))
            self._settle(writer)
            self._fit(writer, nbytes)
            self._change(writer, lambda: self.staging.resize(staged, nbytes))
            low, stride = min(before, nbytes), self.stride_of(writer)
            writer.digests.forget(low, max(before, nbytes, low + 1), stride)
        writer.is_extended = nbytes > 0 and (writer.is_extended or nbytes > before)
        writer.is_dirty = True
        self._touch(writer)

    def _persist_staged(self, writer: FileWriter) -> None:
        """Make the staged bytes survive, on their device. REQUIRES: the writer's lock."""
        if writer.staged is None:
            return
        if writer.staged.in_memory:
            self._move(writer)
        try:
            self.staging.persist(writer.staged)
        except OSError as error:
            # What the medium holds now is unknown, so the bytes are given up.
            failure = DeviceError(f"persist failed: {writer.node.name!r}: {error}")
            self._fail(writer, failure)
            raise failure from error

    def stride_of(self, writer: FileWriter) -> int:
        """Return the namespace's stride; of one that is gone, anything."""
        try:
            return self._layout_of(writer.node.namespace_id).stride
        except KeyError:
            return 1 << 20

    def _opened_base(self, writer: FileWriter) -> FileReader:
        """Return the content so far, open for reading. REQUIRES: the writer's lock, nothing staged.

        Raises:
            MediaError: It was evicted.
            BusyError: The namespace has too much open.
        """
        if writer.base is None:
            base = FileContents.open_read(self, writer.node)
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


def _note_written(writer: FileWriter) -> None:
    writer.is_dirty = writer.is_written = True
