"""The files of a memory device that may be written, and the book-keeping of all its memory.

Layer: L1.

- Staging and raw files are memfds. A raw file stays until it is dropped, or its keeper ends.
- A seal of the kernel's keeps everybody from writing, for ever; who writes to a sealed staging file
  all the same writes to a copy.

Concurrency: see `memory`.
"""

import contextlib
import errno
import fcntl
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from kvfs import _native
from kvfs.devices.base import Device, Segment, Staging
from kvfs.devices.filesystem import RAW, STAGING, check_staging_name
from kvfs.devices.ledger import Ledger
from kvfs.devices.memory_kept import KeptMemory
from kvfs.devices.numa import Node, bind
from kvfs.devices.osfile import OSFile
from kvfs.errors import ClosedError

_SEALS: Final = fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL


@dataclass(slots=True, eq=False)
class Frame:
    """One memfd of a segment's size.

    `number`: its keeper's. `tag`: whose bytes it holds; None if it is still zero. `is_fixed`: an
    earlier owner made it, so that nobody can write it.
    """

    file: OSFile
    arena: _native.Arena
    number: int
    tag: bytes | None = None
    is_fixed: bool = False

    def close(self) -> None:
        """Give the memory back."""
        self.arena.close()
        self.file.close()


@dataclass(slots=True, eq=False)
class OpenMemory:
    """What the device knows of a segment or staging file. `key`: its name in the ledger.

    Log segments have a frame, file segments a sidecar.
    """

    file: OSFile
    key: str
    frame: Frame | None = None
    sidecar: bytearray | None = None
    is_sealed: bool = False


class MemoryFiles(Device):
    """Staging and raw files in memory. Subclasses set `info` first."""

    def __init__(self, ledger: Ledger, kept: KeptMemory, node: Node | None) -> None:
        self._ledger = ledger
        self._node = node
        self._kept = kept
        self._lock = threading.Lock()
        self._segments: dict[tuple[int, int], OpenMemory] = {}
        self._staging: set[OpenMemory] = set()
        self._raw: dict[int, OpenMemory] = {}
        self._free_frames: list[Frame] = []
        self._bytes_written = 0
        self._is_closed = False

    # --- staging
    def create_staging(self, name: str) -> Staging:
        """Make an empty staging memfd."""
        self._check_open()
        check_staging_name(name)
        key = f"{STAGING}/{name}"
        self._ledger.add(key, 0)
        try:
            state = OpenMemory(self._make_memfd(), key)
        except BaseException:
            self._ledger.drop(key)
            raise
        with self._lock:
            self._staging.add(state)
        return Staging(name=name, fd=state.file.fd, nbytes=0, state=state)

    def write_staging(self, staging: Staging, offset: int, data: bytes | memoryview) -> None:
        """Write; grows `staging.nbytes`, and gives up free frames for it."""
        state = self._writable(staging)
        nbytes = memoryview(data).nbytes
        with self._resizing(staging, state, max(staging.nbytes, offset + nbytes)):
            state.file.write(offset, data)
        self._count_written(nbytes)

    def resize_staging(self, staging: Staging, nbytes: int) -> None:
        """Cut or extend with zeros."""
        state = self._writable(staging)
        with self._resizing(staging, state, nbytes):
            state.file.resize(nbytes)

    def persist_staging(self, staging: Staging) -> None:
        """Do nothing."""
        self._state(staging)

    def reserve_staging(self, staging: Staging, nbytes: int) -> None:
        """Take the capacity of a size, and give up free frames for it."""
        state = self._writable(staging)
        self._ledger.take(state.key, nbytes)
        staging.reserved_bytes = max(staging.reserved_bytes, nbytes)
        with self._lock:
            self._trim_frames()

    def settle_staging(self, staging: Staging, reserved_bytes: int = 0) -> None:
        """Take the size from the file, keep the capacity of `reserved_bytes`."""
        state = self._state(staging)
        nbytes = os.fstat(state.file.fd).st_size
        self._count_written(max(0, nbytes - staging.nbytes))
        staging.nbytes, staging.reserved_bytes = nbytes, reserved_bytes
        self._ledger.put(state.key, max(nbytes, reserved_bytes))

    def seal_staging(self, staging: Staging, *, is_shared: bool) -> bool:
        """Seal it against every write; refused while somebody has it mapped for writing."""
        state = self._state(staging)
        del is_shared  # the kernel knows
        if not state.is_sealed:
            try:
                fcntl.fcntl(state.file.fd, fcntl.F_ADD_SEALS, _SEALS)
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
                return False
            state.is_sealed = True
        return True

    def adopt(self, staging: Staging, slot: int, generation: int, sidecar: bytes) -> Segment:
        """Turn the memfd into a file segment, sealed against every write.

        Raises:
            OSError: EBUSY if somebody has it mapped for writing; it stays a staging file.
        """
        state = self._state(staging)
        assert 0 <= slot < self.info.slot_count
        key = key_of(slot, generation)
        self._ledger.add(sidecar_key(key), len(sidecar))
        try:
            with self._lock:
                self._trim_frames()
            if not self.seal_staging(staging, is_shared=True):
                raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), state.key)
            self._kept.keep_file(slot, generation, state.file.fd, sidecar)
        except BaseException:
            self._ledger.drop(sidecar_key(key))
            raise
        with self._lock:
            self._ledger.move(state.key, key)
            state.key, state.sidecar = key, bytearray(sidecar)
            self._staging.discard(state)
            self._segments[slot, generation] = state
        staging.state, staging.fd = None, -1
        self._count_written(len(sidecar))
        return self._handle(slot, generation, state)

    def drop_staging(self, staging: Staging) -> None:
        """Delete it, raw or not. Idempotent; nothing after `adopt` and `release_raw`."""
        self._check_open()
        state: OpenMemory | None = staging.state
        if state is not None:
            with self._lock:
                self._staging.discard(state)
                numbers = [number for number, raw in self._raw.items() if raw is state]
                for number in numbers:
                    del self._raw[number]
                    self._kept.drop_raw(number)
            state.file.close()
            self._ledger.drop(state.key)
            staging.state, staging.fd = None, -1

    def reap_staging(self) -> int:
        """Return 0: nothing of an earlier owner is left."""
        self._check_open()
        return 0

    # --- raw files
    def keep_raw(self, staging: Staging, number: int) -> None:
        """Note that the memfd stays."""
        state = self._writable(staging)
        key = f"{RAW}/{number:016x}"
        with self._lock:
            if number in self._raw:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), key)
            self._ledger.move(state.key, key)
            state.key = key
            self._staging.discard(state)
            self._raw[number] = state
            self._kept.keep_raw(number, state.file.fd)

    def raw_files(self) -> list[tuple[int, int]]:
        """List numbers and sizes of the raw files, by number."""
        self._check_open()
        with self._lock:
            return sorted((n, os.fstat(state.file.fd).st_size) for n, state in self._raw.items())

    def open_raw(self, number: int) -> Staging:
        """Return a handle of a raw file; all of them share the memfd's descriptor."""
        self._check_open()
        with self._lock:
            state = self._raw.get(number)
        if state is None:
            name = f"{RAW}/{number:016x}"
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        nbytes = os.fstat(state.file.fd).st_size
        return Staging(name=state.key, fd=state.file.fd, nbytes=nbytes, state=state)

    def release_raw(self, staging: Staging) -> None:
        """Forget a handle, its capacity settled; the memory stays. Idempotent."""
        if staging.state is not None:
            if staging.state.file.fd >= 0 and not self._is_closed:
                self.settle_staging(staging)
            staging.state, staging.fd = None, -1

    # --- inside
    def _check_open(self) -> None:
        if self._is_closed:
            raise ClosedError(f"device is closed: {self.info.name}")

    def _state(self, handle: Segment | Staging) -> OpenMemory:
        self._check_open()
        state: OpenMemory | None = handle.state
        if state is None or handle.fd < 0:
            raise ClosedError(f"handle is closed: {self.info.name}: {handle}")
        return state

    def _writable(self, staging: Staging) -> OpenMemory:
        """Return the state of a staging file; of a sealed one, that of a copy in its place."""
        state = self._state(staging)
        if state.is_sealed:
            copy = self._make_memfd()
            try:
                done = 0
                while done < staging.nbytes:
                    done += os.sendfile(copy.fd, state.file.fd, done, staging.nbytes - done)
            except BaseException:
                copy.close()
                raise
            state.file.close()
            state.file, state.is_sealed, staging.fd = copy, False, copy.fd
        return state

    def _make_memfd(self) -> OSFile:
        flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
        file = OSFile(os.memfd_create(f"kvfs-{self.info.name}-staging", flags))
        if self._node is not None:
            try:
                bind(file.fd, self.info.capacity_bytes, self._node, self.info.name)
            except BaseException:
                file.close()
                raise
        return file

    def _handle(self, slot: int, generation: int, state: OpenMemory) -> Segment:
        return Segment(
            device_index=self.info.index,
            slot=slot,
            generation=generation,
            is_file=state.frame is None,
            nbytes=os.fstat(state.file.fd).st_size,
            fd=state.file.fd,
            address=state.frame.arena.address if state.frame is not None else 0,
            is_fixed=state.frame is not None and state.frame.is_fixed,
            state=state,
        )

    def _trim_frames(self) -> None:
        """Give up free frames until frames and files fit the capacity. REQUIRES: `_lock`."""
        segment_bytes = self.info.segment_bytes
        while self._free_frames:
            free_bytes = len(self._free_frames) * segment_bytes
            if self._ledger.used_bytes + free_bytes <= self.info.capacity_bytes:
                break
            self._end_frame(self._free_frames.pop(0))

    def _end_frame(self, frame: Frame) -> None:
        """Give a frame's memory back."""
        self._kept.drop_frame(frame.number)
        frame.close()

    @contextlib.contextmanager
    def _resizing(self, staging: Staging, state: OpenMemory, nbytes: int) -> Iterator[None]:
        with self._ledger.resizing(state.key, staging, state.file, nbytes):
            with self._lock:
                self._trim_frames()
            yield

    def _count_written(self, nbytes: int) -> None:
        with self._lock:
            self._bytes_written += nbytes


def key_of(slot: int, generation: int) -> str:
    """Return what the ledger calls a segment."""
    return f"{slot:08x}-{generation:08x}"


def sidecar_key(key: str) -> str:
    """Return what the ledger calls the sidecar of a segment."""
    return f"{key}.sum"
