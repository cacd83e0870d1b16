"""Where the bytes of a file lie while it is being written: in memory, or on its device.

Layer: L4.

- A file begins in a memfd. It stays there while it has at most a quarter of a segment, so that what
  goes into the log is written to the medium once.
- It moves to a staging file of the device it will lie on when it grows beyond that, when memory has
  been used up, or when it must survive. It never moves back; but on to the next device where one
  has no room for it, unless somebody else may be writing it.
- A raw file is a staged file that is never adopted; see `raw_files`.
- Holes stay holes, wherever bytes are moved: how much was written decides what a file becomes.

Nothing here is locked but the budget: a staged file belongs to the writer whose lock is held.
"""

import errno
import itertools
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

from kvfs.devices.base import Device, Staging
from kvfs.engine.store import Store
from kvfs.errors import DeviceError, NoSpaceError
from kvfs.units import PAGE, align_up

_COPY_BYTES: Final = 4 << 20
_QUARTER: Final = 4
_NO_DEVICE: Final = -1
_UNCHANGED_NS: Final = 0


class MemoryBudget:
    """Bytes of memory that files being written may take together. Thread-safe."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.used_bytes = 0
        self._lock = threading.Lock()

    def take(self, nbytes: int, *, is_ahead: bool = False) -> bool:
        """Take some; False if there is not so much left. Ahead of need only half can be had."""
        limit_bytes = self.limit_bytes // 2 if is_ahead else self.limit_bytes
        with self._lock:
            if self.used_bytes + nbytes > limit_bytes:
                return False
            self.used_bytes += nbytes
            return True

    def change(self, taken_bytes: int, nbytes: int) -> None:
        """Have so much instead of what was taken, whatever the limit says."""
        with self._lock:
            self.used_bytes += nbytes - taken_bytes
            assert self.used_bytes >= 0, "more memory given back than taken"


@dataclass(slots=True, eq=False)
class Staged:
    """The bytes of one file that may be written.

    Attributes:
        namespace_id: Whose.
        file: Descriptor and size; a staging file of the device, or a memfd of our own.
        device_index: The device; -1 in memory.
        is_shared: A descriptor was handed to somebody else, who may have it still.
        is_raw: A raw file.
        taken_bytes: What it has of the budget.
        is_growing: Somebody else may write now, so that only the file itself knows its size.
        guard: Held to ask the file for its size, and to end that; its descriptor stays until then.
    """

    namespace_id: int
    file: Staging
    device_index: int = _NO_DEVICE
    is_shared: bool = False
    is_raw: bool = False
    taken_bytes: int = 0
    is_growing: bool = False
    guard: threading.Lock = field(default_factory=threading.Lock)

    @property
    def in_memory(self) -> bool:
        """Whether a crash would take it."""
        return self.device_index == _NO_DEVICE

    @property
    def size_bytes(self) -> int:
        """Its size, also while somebody else writes. Needs no lock of the writer's."""
        with self.guard:
            return os.fstat(self.file.fd).st_size if self.is_growing else self.file.nbytes

    def changed_ns(self) -> int:
        """Return when somebody else wrote last; 0: not since `mark_unchanged`. As above."""
        with self.guard:
            return os.fstat(self.file.fd).st_mtime_ns if self.is_growing else _UNCHANGED_NS

    def mark_unchanged(self) -> None:
        """Let every write from now on be told by the file's own time.

        By a time that no write gives it: the kernel's clock may stand still for milliseconds.
        """
        os.utime(self.file.fd, ns=(_UNCHANGED_NS, _UNCHANGED_NS))

    def start_growing(self) -> None:
        """Note that somebody else may write from now on."""
        with self.guard:
            if not self.is_growing:
                self.mark_unchanged()
            self.is_shared = self.is_growing = True

    def stop_growing(self) -> None:
        """Note that nobody else writes any more: the size is what was settled last."""
        with self.guard:
            self.is_growing = False


class StagingArea:
    """Makes, grows and moves staged files of one pool."""

    def __init__(self, store: Store, budget_bytes: int) -> None:
        self.budget = MemoryBudget(budget_bytes)
        self._store = store
        self._serial = itertools.count(1)

    def memory_limit(self) -> int:
        """Return the size up to which a file goes into the log, and may be staged in memory."""
        devices = self._store.file_devices(0)
        if not devices:
            return self.budget.limit_bytes
        stores = [self._store.staging_device(device) for device in devices]
        return min(store.info.segment_bytes for store in stores) // _QUARTER

    def log_limit(self, staged: Staged) -> int:
        """Return the size up to which a staged file goes into the log."""
        if staged.in_memory:
            return self.memory_limit()
        return self._store.staging_device(staged.device_index).info.segment_bytes // _QUARTER

    def create(self, name: str, namespace_id: int, nbytes: int, *, on_device: bool) -> Staged:
        """Stage an empty file that will soon have `nbytes`; in memory if that is possible.

        Raises:
            NoSpaceError: No device can hold as much.
            UnavailableError: No device in service takes files.
        """
        devices = self._store.file_devices(nbytes)
        staged = self._in_memory(name, namespace_id)
        if not on_device and self.hold(staged, nbytes):
            return staged
        self._settle_budget(staged, 0)
        os.close(staged.file.fd)
        if not devices:
            raise _too_large(nbytes)
        file = self._store.create_staging(devices[0], self._fresh_name(name), namespace_id)
        return Staged(namespace_id, file, devices[0])

    def hold(self, staged: Staged, nbytes: int, *, is_ahead: bool = False) -> bool:
        """Take memory for a size; False if the file must move to its device to have it.

        What is taken ahead of need leaves the others' need half of the memory.

        True for a file on its device: that takes its space as it grows.
        """
        if not staged.in_memory:
            return True
        if nbytes > self.memory_limit():
            return False
        more = align_up(nbytes, PAGE) - staged.taken_bytes
        if more > 0:
            if not self.budget.take(more, is_ahead=is_ahead):
                return False
            staged.taken_bytes += more
        return True

    def write(self, staged: Staged, offset: int, data: bytes | memoryview) -> None:
        """Write. REQUIRES: `hold` of the end said yes. Durability: flush.

        Raises:
            NoSpaceError: Nothing more can be evicted.
        """
        file = staged.file
        view = memoryview(data).cast("B")
        end = offset + len(view)
        if not staged.in_memory:
            self._change(
                staged, end,
                lambda index, file: self._store.write_staging(index, file, offset, data),
            )  # fmt: skip
            return
        while len(view):
            done = os.pwrite(file.fd, view, end - len(view))
            view = view[done:]
        file.nbytes = max(file.nbytes, end)

    def resize(self, staged: Staged, nbytes: int) -> None:
        """Cut or extend with zeros. REQUIRES: `hold` of the size said yes.

        Raises:
            NoSpaceError: Nothing more can be evicted.
        """
        if not staged.in_memory:
            self._change(
                staged, nbytes,
                lambda index, file: self._store.resize_staging(index, file, nbytes),
            )  # fmt: skip
            return
        os.ftruncate(staged.file.fd, nbytes)
        staged.file.nbytes = nbytes
        self._settle_budget(staged, max(nbytes, staged.file.reserved_bytes))

    def reserve(self, staged: Staged, nbytes: int) -> None:
        """Take capacity up to a size for a foreign writer. REQUIRES: `hold` of it said yes.

        Raises:
            NoSpaceError: Nothing more can be evicted from the file's device.
        """
        if staged.in_memory:
            staged.file.reserved_bytes = max(staged.file.reserved_bytes, nbytes)
        else:
            self._store.reserve_staging(staged.device_index, staged.file, nbytes)

    def settle(self, staged: Staged, reserved_bytes: int) -> int:
        """Take the size from the file, keep what is reserved still; return by how much it grew."""
        file, before = staged.file, staged.file.nbytes
        if not staged.in_memory:
            self._device(staged).settle_staging(file, reserved_bytes)
        else:
            file.nbytes, file.reserved_bytes = os.fstat(file.fd).st_size, reserved_bytes
            self._settle_budget(staged, max(file.nbytes, reserved_bytes))
        return file.nbytes - before

    def move(self, staged: Staged) -> None:
        """Copy the bytes to the device and go on there.

        REQUIRES: nobody else can write; whoever could has given that up.

        Raises:
            NoSpaceError: Nothing more can be evicted; the file is what it was.
        """
        assert staged.in_memory
        moved = self._copied(staged, self._store.file_devices(staged.file.nbytes))
        os.close(staged.file.fd)
        self._settle_budget(staged, 0)
        staged.file, staged.device_index = moved.file, moved.device_index
        staged.is_shared = False

    def replace(self, staged: Staged) -> None:
        """Go on with a copy that nobody has a descriptor of; the former file is dropped.

        Raises:
            NoSpaceError: Nothing more can be evicted; the file is what it was.
        """
        self._replace(staged, self._store.file_devices(staged.file.nbytes))

    def persist(self, staged: Staged) -> None:
        """Make the bytes survive a power cut. REQUIRES: on its device.

        Raises:
            OSError: The device failed.
        """
        self._device(staged).persist_staging(staged.file)

    def seal(self, staged: Staged) -> bool:
        """Give up our descriptors that can write; say whether nobody can now.

        Raises:
            DeviceError: The device failed.
        """
        device = self._device(staged)
        try:
            return device.seal_staging(staged.file, is_shared=staged.is_shared)
        except OSError as error:
            raise DeviceError(f"file cannot be sealed: {device.info.name}: {error}") from error

    def drop(self, staged: Staged) -> None:
        """Delete it."""
        if not staged.in_memory:
            self._device(staged).drop_staging(staged.file)
        elif staged.file.fd >= 0:
            os.close(staged.file.fd)
            staged.file.fd = -1
            self._settle_budget(staged, 0)

    # --- internals

    def _device(self, staged: Staged) -> Device:
        return self._store.staging_device(staged.device_index).device

    def _in_memory(self, name: str, namespace_id: int) -> Staged:
        # Not sealable: it never becomes a segment, and must stay writable for whoever has it.
        fd = os.memfd_create(f"kvfs-{name}", os.MFD_CLOEXEC)
        return Staged(namespace_id, Staging(name, fd, 0))

    def _fresh_name(self, name: str) -> str:
        return f"{name}-{next(self._serial):x}"

    def _change(self, staged: Staged, nbytes: int, change: Callable[[int, Staging], None]) -> None:
        """Change a file up to `nbytes`; on another device if its own has no room.

        Raises:
            NoSpaceError: None has; or somebody else may be writing, so that it cannot move.
        """
        tried: set[int] = set()
        while True:
            try:
                return change(staged.device_index, staged.file)
            except NoSpaceError:
                tried.add(staged.device_index)
                others = [i for i in self._store.file_devices(nbytes) if i not in tried]
                if not others or staged.is_growing:
                    raise
                self._replace(staged, others)

    def _replace(self, staged: Staged, devices: list[int]) -> None:
        """Go on with a copy on the first of these devices that has room."""
        copy = self._copied(staged, devices)
        self._device(staged).drop_staging(staged.file)
        staged.file, staged.device_index, staged.is_shared = copy.file, copy.device_index, False

    def _copied(self, staged: Staged, devices: list[int]) -> Staged:
        """Return a copy on the first of these devices that has room.

        Raises:
            NoSpaceError: None has.
        """
        full = _too_large(staged.file.nbytes)
        for index in devices:
            try:
                return self._copied_to(index, staged)
            except NoSpaceError as error:
                full = error
        raise full

    def _copied_to(self, device_index: int, staged: Staged) -> Staged:
        name = self._fresh_name(staged.file.name.partition("-")[0])
        file = self._store.create_staging(device_index, name, staged.namespace_id)
        try:
            for start, end in data_ranges(staged.file.fd):
                self._copy_range(staged.file.fd, start, end, device_index, file)
            if file.nbytes < staged.file.nbytes:
                self._store.resize_staging(device_index, file, staged.file.nbytes)
        except BaseException:
            self._store.staging_device(device_index).device.drop_staging(file)
            raise
        return Staged(staged.namespace_id, file, device_index)

    def _copy_range(self, fd: int, start: int, end: int, device_index: int, file: Staging) -> None:
        first = start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        with (
            mmap.mmap(
                fd, end - first, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ, offset=first
            ) as mapped,
            memoryview(mapped) as view,
        ):
            for offset in range(start, end, _COPY_BYTES):
                with view[offset - first : min(end, offset + _COPY_BYTES) - first] as part:
                    self._store.write_staging(device_index, file, offset, part)

    def _settle_budget(self, staged: Staged, nbytes: int) -> None:
        self.budget.change(staged.taken_bytes, align_up(nbytes, PAGE))
        staged.taken_bytes = align_up(nbytes, PAGE)


def _too_large(nbytes: int) -> NoSpaceError:
    return NoSpaceError(
        f"no device can hold a file of {nbytes} bytes; use more or larger directories (dir:)"
    )


def data_ranges(fd: int) -> Iterator[tuple[int, int]]:
    """Yield the ranges of a file that hold data, and not only zeros that were never written."""
    end = 0
    while True:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
            end = os.lseek(fd, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        yield start, end


def is_mostly_written(fd: int, nbytes: int) -> bool:
    """Say whether at least half of a file of this size was ever written."""
    total = 0
    for start, end in data_ranges(fd):
        total += end - start
        if 2 * total >= nbytes:
            return True
    return 2 * total >= nbytes
