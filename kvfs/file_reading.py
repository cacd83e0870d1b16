"""Reading open files by byte range.

Layer: L4.

- A reader's keys and size are fixed; where its bytes lie is kept in a window (kvfs.file_window).
- A block that cannot be read is tried from its other copies; then it is a miss.

Locks: `_window_lock` guards the windows of all readers, and is taken last.
"""

import os
import threading
from dataclasses import dataclass

from kvfs.clock import Clock
from kvfs.engine.catalog_schema import Origin
from kvfs.engine.store import Store
from kvfs.errors import ClosedError, MediaError
from kvfs.file_window import WINDOW_BLOCKS, LostBlockError, Window
from kvfs.keys import KeyArray
from kvfs.staging import Staged

_READ_ATTEMPTS = 3  # copies of one block tried before it is a miss


@dataclass(slots=True, eq=False)
class FileReader:
    """Open content: keys and size as they were at open. `node_id` 0: a bare block, not a file."""

    node_id: int
    name: str
    namespace_id: int
    origin: Origin
    version: int
    stride: int
    keys: KeyArray
    size_bytes: int
    pinned_bytes: int = 0
    window: Window | None = None
    is_closed: bool = False
    raw: Staged | None = None
    """A raw file, read where it lies; it may grow and change while it is open."""
    raw_users: int = 0
    """Reads at work in it."""


class FileReading:
    """Reads what `FileReader`s have open. Thread-safe."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._window_lock = threading.Lock()

    def read(self, reader: FileReader, offset: int, nbytes: int) -> bytearray:
        """Read a range, short at the end of the file; see `read_into`."""
        if reader.raw is not None and not reader.is_closed:
            reader.size_bytes = reader.raw.size_bytes
        out = bytearray(max(0, min(nbytes, reader.size_bytes - offset)))
        if out:
            count = self.read_into(reader, offset, memoryview(out))
            del out[count:]
        return out

    def read_into(self, reader: FileReader, offset: int, target: memoryview) -> int:
        """Fill memory from `offset` on; return the bytes there were, fewer at the end of the file.

        Bytes between a block's end and its stride are zero.

        Raises:
            MediaError: A block cannot be read back. A file has lost its name by it.
        """
        if reader.raw is not None:
            return self._read_raw(reader, reader.raw, offset, target) or 0
        end = min(offset + target.nbytes, reader.size_bytes)
        position = offset
        while position < end:
            first = position // reader.stride
            limit = (first // WINDOW_BLOCKS + 1) * WINDOW_BLOCKS * reader.stride
            part = target[position - offset : min(end, limit) - offset]
            self._read_part(reader, position, part)
            position += part.nbytes
        return position - offset

    def read_nowait(self, reader: FileReader, offset: int, target: memoryview) -> int | None:
        """Fill memory as `read_into` does, but only if that needs no waiting; else return None."""
        if reader.raw is not None:
            return self._read_raw(reader, reader.raw, offset, target, wait=False)
        end = min(offset + target.nbytes, reader.size_bytes)
        if end <= offset:
            return 0
        first, last = offset // reader.stride, (end - 1) // reader.stride + 1
        if last > first // WINDOW_BLOCKS * WINDOW_BLOCKS + WINDOW_BLOCKS:
            return None
        window = self._enter_known(reader, first, last)
        if window is None:
            with self._store.hold_at_once() as is_held:
                if not is_held:
                    return None
                window = self._enter(reader, first, last)
        try:
            if not window.is_vouched(first, last):
                return None
            done = window.copy(offset, target[: end - offset], wait=False)
        except LostBlockError:
            return None
        finally:
            self._leave(window)
        return end - offset if done else None

    def release_idle(self, reader: FileReader, before_ns: int) -> None:
        """Let go of a lease that was not used since `before_ns` (monotonic)."""
        window = reader.window
        if window is not None and window.used_ns < before_ns:
            self._retire_window(reader)

    # --- internals

    def _read_part(self, reader: FileReader, offset: int, target: memoryview) -> None:
        """Read a range inside one window, from another copy if one fails."""
        first = offset // reader.stride
        last = (offset + target.nbytes - 1) // reader.stride + 1
        reason = ""
        for _ in range(_READ_ATTEMPTS):
            window = self._enter(reader, first, last)
            try:
                window.vouch(first, last)
                window.copy(offset, target)
            except LostBlockError as error:
                reason = str(error)
                self._retire_window(reader)
            else:
                return
            finally:
                self._leave(window)
        self._note_lost(reader)
        raise MediaError(
            f"block cannot be read: {reader.name!r}: offset {offset:#x}, {target.nbytes} bytes: "
            f"{reason}; it is a miss now"
        )

    def _enter_known(self, reader: FileReader, first: int, last: int) -> Window | None:
        """Return the window that a reader has, if it covers blocks [first, last)."""
        with self._window_lock:
            window = reader.window
            if window is None or not window.covers(first, last):
                return None
            window.users += 1
            window.used_ns = self._clock.monotonic_ns()
            return window

    def _enter(self, reader: FileReader, first: int, last: int) -> Window:
        """Return the window around blocks [first, last), which stays until `_leave`."""
        known = self._enter_known(reader, first, last)
        if known is not None:
            return known
        if reader.is_closed:
            raise ClosedError(f"file is closed: {reader.name!r}")
        window = Window(self._store, reader.namespace_id, reader.keys, reader.stride, first)
        window.users, window.used_ns = 1, self._clock.monotonic_ns()
        with self._window_lock:
            if reader.is_closed:
                unused: Window | None = window
            else:
                unused, reader.window = reader.window, window
                if unused is not None and not self._retired(unused):
                    unused = None
        if unused is not None:
            unused.release()
        if unused is window:
            raise ClosedError(f"file is closed: {reader.name!r}")
        return window

    def _leave(self, window: Window) -> None:
        with self._window_lock:
            window.users -= 1
            is_free = window.is_retired and not window.users
        if is_free:
            window.release()

    def _retire_window(self, reader: FileReader) -> None:
        """Let go of a reader's window, at once or when its last read is done."""
        with self._window_lock:
            window, reader.window = reader.window, None
            is_free = window is not None and self._retired(window)
        if window is not None and is_free:
            window.release()

    def _end_reading(self, reader: FileReader) -> None:
        """Let go of what a reader holds; a read that comes late finds it closed."""
        with self._window_lock:
            is_free = reader.raw is not None and not reader.is_closed and not reader.raw_users
            reader.is_closed = True
        if is_free:
            self._release_raw(reader)
        self._retire_window(reader)

    def _read_raw(
        self, reader: FileReader, raw: Staged, offset: int, target: memoryview, *, wait: bool = True
    ) -> int | None:
        """Read a raw file; None without `wait`, if the bytes are not in memory."""
        with self._window_lock:
            if reader.is_closed:
                raise ClosedError(f"file is closed: {reader.name!r}")
            reader.raw_users += 1
        is_persistent = self._store.staging_device(raw.device_index).info.is_persistent
        flags = 0 if wait or not is_persistent else os.RWF_NOWAIT
        done = 0
        try:
            while done < target.nbytes:
                count = os.preadv(raw.file.fd, [target[done:]], offset + done, flags)
                if not count:
                    break
                done += count
        except OSError as error:
            if not wait:
                return None
            raise MediaError(
                f"raw file cannot be read: {reader.name!r}: offset {offset:#x}: {error}"
            ) from error
        finally:
            with self._window_lock:
                reader.raw_users -= 1
                is_free = reader.is_closed and not reader.raw_users
            if is_free:
                self._release_raw(reader)
        return done

    def _release_raw(self, reader: FileReader) -> None:
        """Let go of the raw file that a reader had open."""

    def _note_lost(self, reader: FileReader) -> None:
        """Do what must be done when a reader's content has lost a block."""

    def _retired(self, window: Window) -> bool:
        """Mark a window; return whether it can be released now. REQUIRES: `_window_lock`."""
        window.is_retired = True
        return not window.users
