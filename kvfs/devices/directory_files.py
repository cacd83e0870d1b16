"""The files of a directory device that may be written, and the book-keeping of all its files.

Layer: L1.

    staging/NAME             growing files, reaped at the next open
    raw/NNNNNNNNNNNNNNNN     raw files: number N, sixteen hexadecimal digits

- A raw file is the medium's own: written in place, without checksums, as durable as its last sync.
- Whether a file can still be written is asked of the kernel, by a lease on a fresh descriptor that
  only reads, when ours that can write is closed. Where there are no leases, nobody else can have it
  open but who was handed a descriptor: our directories are ours alone (mode 0700).

Concurrency: see `directory`.
"""

import contextlib
import errno
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from kvfs.devices.base import Device, Segment, Staging
from kvfs.devices.filesystem import (
    RAW,
    RAW_FILE,
    SEGMENTS,
    STAGING,
    File,
    FileSystem,
    check_staging_name,
    is_own_name,
)
from kvfs.devices.ledger import Ledger
from kvfs.errors import ClosedError, NoSpaceError
from kvfs.units import format_bytes

_FULL: Final = (errno.ENOSPC, errno.EDQUOT)


@dataclass(slots=True, eq=False)
class OpenFile:
    """What the device knows of an open segment or staging file. Paths are the ledger's keys."""

    file: File
    path: str
    sidecar_path: str = ""
    is_sidecar_dirty: bool = False
    is_read_only: bool = False
    is_sealed: bool = False


class DirectoryFiles(Device):
    """Staging and raw files below a FileSystem. Subclasses set `info` first."""

    def __init__(self, files: FileSystem, ledger: Ledger) -> None:
        """Make the directories that are missing and count what is there."""
        self._files = files
        self._ledger = ledger
        self._lock = threading.Lock()
        self._open: set[OpenFile] = set()
        self._bytes_written = 0
        self._is_raw_changed = False  # names in `raw` that no sync has covered
        self._is_closed = False
        for folder in (SEGMENTS, STAGING, RAW):
            files.make_directory(folder)
            for path, nbytes in self._scan(folder):
                ledger.put(path, nbytes)
        files.sync_directory(".")

    # --- staging
    def create_staging(self, name: str) -> Staging:
        """Make an empty staging file."""
        self._check_open()
        check_staging_name(name)
        path = f"{STAGING}/{name}"
        state = self._opened(OpenFile(self._create(path, 0), path))
        return Staging(name=name, fd=state.file.fd, nbytes=0, state=state)

    def write_staging(self, staging: Staging, offset: int, data: bytes | memoryview) -> None:
        """Write; grows `staging.nbytes`. Durability: flush.

        A failed write is cut off again, so that size and accounting stay what they were.
        """
        state = self._writable(staging)
        path, nbytes = state.path, memoryview(data).nbytes
        end = max(staging.nbytes, offset + nbytes)
        with self._ledger.resizing(path, staging, state.file, end), self._as_no_space(path):
            state.file.write(offset, data)
        self._count_written(nbytes)

    def resize_staging(self, staging: Staging, nbytes: int) -> None:
        """Cut or extend with zeros (sparse, and counted in full)."""
        state = self._writable(staging)
        path = state.path
        with self._ledger.resizing(path, staging, state.file, nbytes), self._as_no_space(path):
            state.file.resize(nbytes)

    def persist_staging(self, staging: Staging) -> None:
        """Make its bytes survive a power cut; a staging file's name is reaped at the next open."""
        self._state(staging).file.sync()

    def reserve_staging(self, staging: Staging, nbytes: int) -> None:
        """Take the capacity of a size; of the filesystem's own space nothing is reserved."""
        state = self._writable(staging)
        self._ledger.take(state.path, nbytes)
        staging.reserved_bytes = max(staging.reserved_bytes, nbytes)

    def settle_staging(self, staging: Staging, reserved_bytes: int = 0) -> None:
        """Take the size from the file, keep the capacity of `reserved_bytes`."""
        state = self._state(staging)
        nbytes = os.fstat(state.file.fd).st_size
        self._count_written(max(0, nbytes - staging.nbytes))
        staging.nbytes, staging.reserved_bytes = nbytes, reserved_bytes
        self._ledger.put(state.path, max(nbytes, reserved_bytes))

    def seal_staging(self, staging: Staging, *, is_shared: bool) -> bool:
        """Close the descriptor that can write, then ask for a lease."""
        state = self._state(staging)
        if not state.is_sealed:
            self._replace(staging, state, self._files.open(state.path), is_read_only=True)
            has_writers = state.file.has_writers()
            state.is_sealed = not is_shared if has_writers is None else not has_writers
        return state.is_sealed

    def adopt(self, staging: Staging, slot: int, generation: int, sidecar: bytes) -> Segment:
        """Turn a staging file into a file segment; the sidecar is persisted before the rename."""
        state = self._state(staging)
        assert 0 <= slot < self.info.slot_count
        if not self.seal_staging(staging, is_shared=False):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), state.path)
        stem = stem_of(slot, generation)
        payload_path, sidecar_path = f"{stem}.file", f"{stem}.sum"
        state.file.sync()
        self._ledger.add(sidecar_path, len(sidecar))
        try:
            self._write_new(sidecar_path, sidecar)
        except BaseException:
            self._ledger.drop(sidecar_path)
            raise
        try:
            self._files.rename(state.path, payload_path)
        except BaseException:
            self._unlink(sidecar_path)
            raise
        self._ledger.move(state.path, payload_path)
        state.path, state.sidecar_path = payload_path, sidecar_path
        staging.state, staging.fd = None, -1
        self._count_written(len(sidecar))
        return self._handle(slot, generation, state)

    def drop_staging(self, staging: Staging) -> None:
        """Delete it, raw or not. Idempotent; nothing after `adopt` and `release_raw`."""
        self._check_open()
        state: OpenFile | None = staging.state
        if state is not None:
            self._is_raw_changed |= state.path.startswith(RAW)
            self._unlink(state.path)
            self._done(state)
            staging.state, staging.fd = None, -1

    def reap_staging(self) -> int:
        """Delete staging files and sidecars without a payload; return how many."""
        self._check_open()
        with self._lock:
            held = {state.path for state in self._open}
        dead = [path for path, _ in self._scan(STAGING) if path not in held]
        present = {path for path, _ in self._scan(SEGMENTS)}
        dead += [path for path in present
                 if path.endswith(".sum") and f"{path[:-4]}.file" not in present]  # fmt: skip
        for path in dead:
            self._unlink(path)
        return len(dead)

    # --- raw files
    def keep_raw(self, staging: Staging, number: int) -> None:
        """Persist the bytes, then rename the file."""
        state = self._writable(staging)
        path = _raw_path(number)
        state.file.sync()
        self._ledger.add(path, 0)  # holds the name, which rename would take from another
        try:
            self._files.rename(state.path, path)
        finally:
            self._ledger.drop(path)
        self._is_raw_changed = True
        self._ledger.move(state.path, path)
        state.path = path

    def raw_files(self) -> list[tuple[int, int]]:
        """List numbers and sizes of the raw files, by number."""
        self._check_open()
        return [(int(path.rpartition("/")[2], 16), nbytes) for path, nbytes in self._scan(RAW)]

    def open_raw(self, number: int) -> Staging:
        """Open a raw file for reading and writing."""
        self._check_open()
        path = _raw_path(number)
        state = self._opened(OpenFile(self._files.open(path, writable=True), path))
        nbytes = os.fstat(state.file.fd).st_size
        return Staging(name=path, fd=state.file.fd, nbytes=nbytes, state=state)

    def release_raw(self, staging: Staging) -> None:
        """Close a handle, its capacity settled; the file stays. Idempotent."""
        state: OpenFile | None = staging.state
        if state is not None:
            if state.file.fd >= 0:
                self.settle_staging(staging)
                self._done(state)
            staging.state, staging.fd = None, -1

    # --- inside
    def _check_open(self) -> None:
        if self._is_closed:
            raise ClosedError(f"device is closed: {self.info.name}")

    def _state(self, handle: Segment | Staging) -> OpenFile:
        self._check_open()
        state: OpenFile | None = handle.state
        if state is None or state.file.fd < 0:
            raise ClosedError(f"handle is closed: {self.info.name}: {handle}")
        return state

    def _writable(self, staging: Staging) -> OpenFile:
        """Return the state of a staging file, its seal taken off."""
        state = self._state(staging)
        if state.is_read_only:
            state.is_sealed = False
            file = self._files.open(state.path, writable=True)
            self._replace(staging, state, file, is_read_only=False)
        return state

    def _replace(
        self, staging: Staging, state: OpenFile, file: File, *, is_read_only: bool
    ) -> None:
        state.file.close()
        state.file, state.is_read_only, staging.fd = file, is_read_only, file.fd

    def _opened(self, state: OpenFile) -> OpenFile:
        with self._lock:
            self._open.add(state)
        return state

    def _done(self, state: OpenFile) -> None:
        with self._lock:
            self._open.discard(state)
        state.file.close()

    def _close_handles(self) -> None:
        self._is_closed = True
        for state in list(self._open):
            self._done(state)

    def _scan(self, folder: str) -> list[tuple[str, int]]:
        """Return the paths and sizes of kvfs's own files in a directory."""
        try:
            names = self._files.list(folder)
        except FileNotFoundError:
            if folder != RAW:
                raise
            return []  # only looked at, and made before there were raw files
        found = [(f"{folder}/{name}", nbytes) for name, nbytes in names]
        return [(path, nbytes) for path, nbytes in found if is_own_name(path)]

    def _create(self, path: str, nbytes: int) -> File:
        """Take the space, then make the file; a failure leaves neither."""
        self._ledger.add(path, nbytes)
        try:
            with self._as_no_space(path):
                return self._files.create(path, nbytes)
        except BaseException:
            self._ledger.drop(path)
            raise

    def _write_new(self, path: str, raw: bytes) -> None:
        """Make, fill and persist a small file; a failure leaves none."""
        with self._as_no_space(path):
            file = self._files.create(path, len(raw))
            try:
                file.write(0, raw)
                file.sync()
            except BaseException:
                with contextlib.suppress(OSError):
                    self._files.unlink(path)
                raise
            finally:
                file.close()

    def _unlink(self, path: str) -> None:
        """Remove a name that may be gone already, and give its space back."""
        with contextlib.suppress(FileNotFoundError):
            self._files.unlink(path)
        self._ledger.drop(path)

    @contextlib.contextmanager
    def _as_no_space(self, path: str) -> Iterator[None]:
        """Turn the filesystem's own 'full' into NoSpaceError."""
        try:
            yield
        except OSError as error:
            if error.errno not in _FULL:
                raise
            raise NoSpaceError(
                f"filesystem is full: {self.info.name}: {path}: {error.strerror}; with it kvfs "
                f"would use {format_bytes(self.used_bytes)} of "
                f"{format_bytes(self.info.capacity_bytes)}; make room, or give the device a "
                "smaller size"
            ) from error

    def _count_written(self, nbytes: int) -> None:
        with self._lock:
            self._bytes_written += nbytes

    def _handle(self, slot: int, generation: int, state: OpenFile) -> Segment:
        return Segment(
            device_index=self.info.index,
            slot=slot,
            generation=generation,
            is_file=bool(state.sidecar_path),
            nbytes=os.fstat(state.file.fd).st_size,
            fd=state.file.fd,
            address=0,
            state=state,
        )


def stem_of(slot: int, generation: int) -> str:
    """Return the path of a segment's files, without what follows the dot."""
    return f"{SEGMENTS}/{slot:08x}-{generation:08x}"


def _raw_path(number: int) -> str:
    path = f"{RAW}/{number:016x}"
    assert RAW_FILE.match(path.rpartition("/")[2]), "a number of 64 bits"
    return path
