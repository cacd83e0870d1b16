"""A mount and a plain directory on which the same operations are done, and compared.

Where the mount means other things than a plain directory, `random_model` says what. Left out:
raising sizes so that a file becomes raw by itself (files in `raw/` are), renames between `raw/` and
others, maps held beyond one operation.
"""

import contextlib
import ctypes
import errno
import mmap
import os
import random
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kvfs.engine.checker import check_pool
from kvfs.fuse.mountpoint import detach, entry_at
from tests.fuse.mounting import MIB, MountedPool, wait_until
from tests.fuse.random_model import File, Slot, content_of, version_of

Operation = tuple[Any, ...]
SLOTS = 7
DIRECTORIES = ("", "d0", "d1", "d0/s")
EXTENDED_MAX = 900_000
SIZE_MAX = 8 * MIB
PAGE = 4096
OLD_NS = 10**18
"""Times before this were set by somebody."""
_DATA = random.Random(1).randbytes(SIZE_MAX + MIB)
_libc = ctypes.CDLL(None, use_errno=True)


class DifferenceError(AssertionError):
    """The mount did what it should not."""


class Run:
    """A mount, a plain directory, and what is open on both."""

    def __init__(self, base: Path, *, core: bool) -> None:
        self.has_core = core
        self.mounted = MountedPool(base, dir_mib=512, mount_options={"core": core}).start()
        self.copy = str(base / "copy")
        os.mkdir(self.copy)
        self.real = str(self.mounted.path / "ns")
        os.mkdir(self.real)
        os.setxattr(self.real, "user.kvfs.retention", b"durable")
        self.files: dict[int, File] = {}
        self.slots: list[Slot | None] = [None] * SLOTS
        self.counts: Counter[str] = Counter()
        self.done: list[Operation] = []
        self.buffer = mmap.mmap(-1, SIZE_MAX)
        for side in (self.real, self.copy):
            os.mkdir(f"{side}/raw")
        os.setxattr(f"{self.real}/raw", "user.kvfs.raw", b"1")

    def run(self, operations: list[Operation]) -> None:
        """Do all, and compare everything at the end.

        Raises:
            DifferenceError: Something differs.
        """
        for position, operation in enumerate(operations):
            try:
                if getattr(self, f"do_{operation[0]}")(*operation[1:]) is not False:
                    self.counts[operation[0]] += 1
                    self.done.append(operation)
            except Exception as error:
                self.done.append(operation)
                text = f"operation {position} {operation}: {type(error).__name__}: {error}"
                raise DifferenceError(text) from error
        self.do_remount()

    def end(self) -> None:
        """Leave nothing behind, whatever has failed."""
        for slot in self.slots:
            if slot is not None:
                with contextlib.suppress(OSError):
                    os.close(slot.real)
                os.close(slot.copy)
        self.mounted.abandon()
        self.buffer.close()

    # --- both sides

    def both(self, function: Callable[[str], Any]) -> tuple[Any, Any]:
        """Call a function with the path of each side; both must return, or fail, alike."""
        return self.alike(lambda: function(self.real), lambda: function(self.copy))

    def alike(self, real: Callable[[], Any], copy: Callable[[], Any]) -> tuple[Any, Any]:
        """Call both; return results, or raise the OSError that both raise."""
        results, errors = [], []
        for call in (real, copy):
            try:
                results.append(call())
                errors.append(0)
            except OSError as error:
                results.append(error)
                errors.append(error.errno or -1)
        if errors[0] != errors[1]:
            names = [errno.errorcode.get(number, number) if number else "done" for number in errors]
            raise DifferenceError(f"{names[0]} on the mount, {names[1]} on the copy")
        if errors[0]:
            raise results[0]
        return results[0], results[1]

    def quietly(self, function: Callable[[str], Any]) -> bool:
        """Do something on both sides that may fail on both; return whether it was done."""
        try:
            self.both(function)
        except OSError:
            return False
        return True

    def file_at(self, path: str) -> File | None:
        try:
            found = os.lstat(f"{self.copy}/{path}")
        except OSError:
            return None
        return self.files[found.st_ino] if stat.S_ISREG(found.st_mode) else None

    # --- open and close

    def do_open(self, slot, path, other, where, flags, offset, size, number) -> Any:
        return self._open(slot, path, flags & ~os.O_CREAT)

    def do_create(self, slot, path, other, where, flags, offset, size, number) -> Any:
        flags = flags | os.O_CREAT | (os.O_EXCL if number % 3 == 0 else 0)
        if flags & os.O_ACCMODE == os.O_RDONLY:
            flags |= os.O_RDWR
        return self._open(slot, path, flags)

    def _open(self, number: int, path: str, flags: int) -> Any:
        file = self.file_at(path)
        if self.slots[number] is not None or (file is not None and len(file.slots) >= 4):
            return False
        is_writer = flags & os.O_ACCMODE != os.O_RDONLY
        cuts = bool(flags & os.O_TRUNC) and not (flags & os.O_EXCL)
        if file is not None and not is_writer and not file.look():
            return False if cuts else self._open_unborn(path, flags)
        before = None
        if file is not None and cuts:
            before = os.open(f"{self.copy}/{path}", os.O_RDONLY)
        try:
            real, copy = self.alike(
                lambda: os.open(f"{self.real}/{path}", flags, 0o640),
                lambda: os.open(f"{self.copy}/{path}", self._copy_flags(flags, before), 0o640),
            )
            inode = os.fstat(copy).st_ino
            is_new = inode not in self.files
            if is_new:
                will_be_raw = path.startswith("raw/")
                self.files[inode] = File(will_be_raw=will_be_raw, is_dirty=True, may_vanish=True)
            file = self.files[inode]
            slot = Slot(real, copy, flags, file)
            if before is not None:
                self._cut(file, before, copy)
        except OSError:
            return None
        finally:
            if before is not None:
                os.close(before)
        if not is_writer and not file.look():
            raise DifferenceError("a file that is written for the first time was opened")
        slot.is_active = is_writer and (is_new or cuts)
        if not is_writer and file.is_dirty:
            slot.snapshot, slot.is_outdated = file.committed, True
        file.slots.append(slot)
        self.slots[number] = slot
        return None

    def _copy_flags(self, flags: int, before: int | None) -> int:
        """Open the copy for reading, too, and cut it when what it held is known."""
        flags &= ~os.O_DIRECT
        if flags & os.O_ACCMODE == os.O_WRONLY:
            flags = flags & ~os.O_ACCMODE | os.O_RDWR
        return flags if before is None else flags & ~os.O_TRUNC

    def _cut(self, file: File, before: int, copy: int) -> None:
        file.begin(before)
        os.truncate(f"/proc/self/fd/{copy}", 0)
        os.utime(copy)  # as an open with O_TRUNC does, also where nothing is left to be cut
        file.is_extended = False

    def _open_unborn(self, path: str, flags: int) -> Any:
        try:
            os.close(os.open(f"{self.real}/{path}", flags))
        except OSError as error:
            if error.errno == errno.EBUSY:
                return None
            raise
        raise DifferenceError("a file that is written for the first time was opened")

    def do_close(self, number, *_) -> Any:
        slot, self.slots[number] = self.slots[number], None
        if slot is None:
            return False
        self._close(slot)
        return None

    def _close(self, slot: Slot) -> None:
        file = slot.file
        file.slots.remove(slot)
        if slot.is_writer and file.is_dirty and not file.is_written and not file.is_busy:
            # Only made or emptied, it is adopted when a reader asks, or its last writer is
            # released, for which close(2) does not wait: a reader asks.
            os.close(os.dup(slot.real))
            with contextlib.suppress(OSError):  # it has no name any more
                os.close(os.open(f"/proc/self/fd/{slot.real}", os.O_RDONLY))
            file.adopt()
        os.close(slot.real)
        os.close(slot.copy)
        if slot.is_writer:
            file.flush(slot)
            if not file.writers and file.is_dirty:
                file.adopt()

    def _close_all(self) -> None:
        for number in range(SLOTS):
            self.do_close(number)

    def do_reopen(self, number, path, other, where, flags, *_) -> Any:
        slot = self.slots[number]
        if slot is None:
            return False
        try:
            path = os.readlink(f"/proc/self/fd/{slot.copy}").removeprefix(f"{self.copy}/")
        except OSError:
            return False
        self.do_close(number)
        if path.endswith(" (deleted)"):
            return None
        return self._open(number, path, flags)

    def do_dup(self, number, *_) -> Any:
        """Close a copy of a descriptor, as every child that exits does."""
        slot = self.slots[number]
        if slot is None:
            return False
        os.close(os.dup(slot.real))
        if slot.is_writer:
            slot.file.flush(slot)
        return None

    # --- bytes

    def _writer(self, number: int) -> Slot | None:
        slot = self.slots[number]
        return slot if slot is not None and slot.is_writer else None

    def _note_write(self, slot: Slot) -> None:
        slot.file.begin(slot.copy)
        slot.is_active = slot.file.is_written = True

    def _may_grow(self, file: File, end: int) -> bool:
        return file.will_be_raw or not file.is_extended or end < EXTENDED_MAX

    def do_write(self, number, path, other, where, flags, offset, size, seed) -> Any:
        slot = self._writer(number)
        if slot is None or slot.flags & os.O_APPEND:
            return False
        if slot.is_direct:
            offset, size = offset // PAGE * PAGE, -(-size // PAGE) * PAGE
        if not self._may_grow(slot.file, offset + size):
            return False
        self._note_write(slot)
        start = seed * 7919 % MIB
        data = memoryview(_DATA)[start : start + size]
        if slot.is_direct:
            self.buffer[:size] = data
            data = memoryview(self.buffer)[:size]
        try:
            self._same(os.pwrite(slot.real, data, offset), size)
            self._same(os.pwrite(slot.copy, data, offset), size)
        finally:
            data.release()
        return None

    def do_append(self, number, path, other, where, flags, offset, size, seed) -> Any:
        slot = self._writer(number)
        if slot is None or not slot.flags & os.O_APPEND or slot.is_direct:
            return False
        end = os.fstat(slot.copy).st_size + size
        if end > SIZE_MAX or not self._may_grow(slot.file, end):
            return False
        self._note_write(slot)
        data = memoryview(_DATA)[seed % MIB :][:size]
        self._same(os.write(slot.real, data), size)
        self._same(os.write(slot.copy, data), size)
        return None

    def do_ftruncate(self, number, path, other, where, flags, offset, size, *_) -> Any:
        slot = self._writer(number)
        nbytes = min(offset + size, EXTENDED_MAX)
        if slot is None or not self._note_resize(slot.file, slot.copy, nbytes):
            return False
        slot.is_active = slot.file.is_written = True
        self.alike(lambda: os.ftruncate(slot.real, nbytes), lambda: os.ftruncate(slot.copy, nbytes))
        return None

    def _note_resize(self, file: File, copy: int, nbytes: int) -> bool:
        before = os.fstat(copy).st_size
        is_raw = file.is_raw or file.will_be_raw
        if nbytes == before or (not is_raw and nbytes > before and nbytes >= EXTENDED_MAX):
            return False
        file.begin(copy)
        file.is_extended = file.is_extended or nbytes > before
        return True

    def do_truncate(self, number, path, other, where, flags, offset, size, *_) -> Any:
        """Truncate by name: it is opened, cut and closed in one."""
        file, nbytes = self.file_at(path), min(offset + size, EXTENDED_MAX)
        if file is None:
            self.quietly(lambda side: os.truncate(f"{side}/{path}", nbytes))
            return None
        with open(f"{self.copy}/{path}", "rb") as copy:
            if not self._note_resize(file, copy.fileno(), nbytes):
                return False
        self.both(lambda side: os.truncate(f"{side}/{path}", nbytes))
        file.is_written = True
        if file.is_dirty and not file.is_busy:
            file.adopt()
        return None

    def do_fallocate(self, number, path, other, where, flags, offset, size, seed) -> Any:
        slot = self._writer(number)
        if slot is None or slot.file.is_raw or slot.file.will_be_raw:
            return False
        size = min(size, 100_000)
        mode = seed % 2  # FALLOC_FL_KEEP_SIZE
        end = offset + size
        if end >= EXTENDED_MAX:
            return False
        try:
            _fallocate(slot.real, mode, offset, size)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            return False
        if mode == 0 and end > os.fstat(slot.copy).st_size:
            self._note_resize(slot.file, slot.copy, end)
            slot.is_active = slot.file.is_written = True
        _fallocate(slot.copy, mode, offset, size)
        self._same(_shown(os.fstat(slot.real)), _shown(os.fstat(slot.copy)))
        return None

    def do_map_write(self, number, path, other, where, flags, offset, size, seed) -> Any:
        """Write through a shared map, with msync or without, and unmap."""
        slot = self._writer(number)
        if slot is None or not slot.may_read or slot.is_direct:
            return False
        nbytes = os.fstat(slot.copy).st_size
        if not nbytes:
            return False
        offset = offset % nbytes
        size = min(size, nbytes - offset)
        data = _DATA[seed % MIB :][:size]
        try:
            mapped = mmap.mmap(slot.real, 0)
        except OSError as error:
            # Opened past the cache, as a small file of which another handle had other content.
            if error.errno != errno.ENODEV:
                raise
            self.counts["maps refused"] += 1
            slot.file.flush(slot)  # the map would have had a descriptor of its own
            return None
        self._note_write(slot)
        with mmap.mmap(slot.copy, 0) as copy:
            copy[offset : offset + size] = data
        with mapped:
            mapped[offset : offset + size] = data
            if seed % 2:
                mapped.flush()
        slot.file.flush(slot)  # the map had a descriptor of its own
        return None

    def do_map_read(self, number, path, other, where, flags, offset, size, seed) -> Any:
        slot = self.slots[number]
        if slot is None or not slot.may_read or slot.is_outdated:
            return False
        expected = content_of(slot.copy)
        if not expected:
            return False
        with mmap.mmap(slot.real, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ) as mapped:
            self._same(len(mapped), len(expected))
            offset %= len(expected)
            found = self._read_map(mapped, offset, size)
        if found is None and slot.file.is_shared:
            self.counts["pages refused"] += 1
        elif found is None:
            raise DifferenceError("a map cannot be read")
        else:
            self._same_bytes(found, expected[offset : offset + size])
        if slot.is_writer:
            slot.file.flush(slot)  # the map had a descriptor of its own
        return None

    def _read_map(self, mapped: mmap.mmap, offset: int, size: int) -> bytes | None:
        """Read a map by a system call, which fails where the program would meet SIGBUS."""
        with memoryview(mapped)[offset : offset + size] as part, _memfd() as fd:
            try:
                count = os.writev(fd, [part])
            except OSError as error:
                if error.errno != errno.EFAULT:
                    raise
                return None
            return os.pread(fd, count, 0) if count == len(part) else None

    def do_read(self, number, path, other, where, flags, offset, size, *_) -> Any:
        slot = self.slots[number]
        if slot is None or not slot.may_read:
            return False
        if slot.is_direct:
            offset, size = offset // PAGE * PAGE, -(-size // PAGE) * PAGE
        if slot.snapshot is None:
            expected = os.pread(slot.copy, size, offset)
        else:
            expected = slot.snapshot[offset : offset + size]
        try:
            found = self._read(slot.real, size, offset)
        except OSError as error:
            if error.errno == errno.ESTALE and slot.is_outdated:
                self.counts["stale"] += 1
                return None
            raise
        if slot.is_outdated and len(found) < len(expected):
            self.counts["short"] += 1
            expected = expected[: len(found)]
        self._same_bytes(found, expected)
        return None

    def _read(self, fd: int, nbytes: int, offset: int) -> bytes:
        with memoryview(self.buffer)[:nbytes] as target:
            return bytes(target[: os.preadv(fd, [target], offset)])

    def do_whole(self, number, path, other, where, flags, *_) -> Any:
        """Open a file to read all of it, and close it."""
        file = self.file_at(path)
        if file is None or not file.look():
            return False
        expected = file.committed if file.is_dirty else Path(f"{self.copy}/{path}").read_bytes()
        assert expected is not None
        fd = os.open(f"{self.real}/{path}", os.O_RDONLY | (flags & os.O_DIRECT))
        try:
            found = b""
            while part := self._read(fd, MIB, len(found)):
                found += part
        except OSError as error:
            if error.errno != errno.ESTALE or not file.is_dirty:
                raise
            self.counts["stale"] += 1
        finally:
            os.close(fd)
        if file.is_dirty:
            expected = expected[: len(found)]
        self._same_bytes(found, expected)
        return None

    def do_drop_cache(self, number, *_) -> Any:
        slot = self.slots[number]
        if slot is None:
            return False
        os.posix_fadvise(slot.real, 0, 0, os.POSIX_FADV_DONTNEED)
        return None

    def do_fsync(self, number, *_) -> Any:
        slot = self.slots[number]
        if slot is None:
            return False
        os.fsync(slot.real)
        return None

    # --- names

    def do_replace(self, number, path, other, where, flags, offset, size, seed) -> Any:
        """Write a new file beside another and rename it over it, as engines do."""
        temporary = f"{path}.tmp"
        data = _DATA[seed % MIB :][:size]

        def write(side: str) -> None:
            fd = os.open(f"{side}/{temporary}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                self._same(os.write(fd, data), size)
            finally:
                os.close(fd)

        if not self.quietly(write):
            return None
        file = File(will_be_raw=path.startswith("raw/"), may_vanish=True)
        file.is_raw = file.will_be_raw
        self.files[os.stat(f"{self.copy}/{temporary}").st_ino] = file
        if not self.quietly(lambda side: os.rename(f"{side}/{temporary}", f"{side}/{path}")):
            self.both(lambda side: os.unlink(f"{side}/{temporary}"))
        return None

    def do_rename(self, number, path, other, *_) -> Any:
        if path.startswith("raw/") != other.startswith("raw/"):
            return False
        file, victim = self.file_at(path), self.file_at(other)
        is_settled = False
        if file is not None and victim is not None and victim is not file and file.is_dirty:
            # What gives way to it may be published at any moment; so that is known, now.
            self._sync()
            is_settled = victim.is_published
        if not self.quietly(lambda side: os.rename(f"{side}/{path}", f"{side}/{other}")):
            return None
        if is_settled:
            # What gives way was there to stay: so must be what comes, with writers at work.
            file.adopt()
        return None

    def do_rename_directory(self, number, path, other, where, flags, offset, size, seed) -> Any:
        target = DIRECTORIES[1:][seed % 3]
        self.quietly(lambda side: os.rename(f"{side}/{where}", f"{side}/{target}"))

    def do_unlink(self, number, path, *_) -> Any:
        self.quietly(lambda side: os.unlink(f"{side}/{path}"))

    def do_mkdir(self, number, path, other, where, *_) -> Any:
        self.quietly(lambda side: os.mkdir(f"{side}/{where}", 0o755))

    def do_rmdir(self, number, path, other, where, *_) -> Any:
        self.quietly(lambda side: os.rmdir(f"{side}/{where}"))

    def do_list(self, number, path, other, where, flags, *_) -> Any:
        where = "." if flags & os.O_WRONLY else where
        self._compare_quietly(lambda side: sorted(os.listdir(f"{side}/{where}")))

    def do_stat(self, number, path, other, where, flags, *_) -> Any:
        path = where if flags & os.O_RDWR else path
        self._compare_quietly(lambda side: _shown(os.lstat(f"{side}/{path}")))

    def do_utimens(self, number, path, other, where, flags, offset, size, seed) -> Any:
        path = where if flags & os.O_RDWR else path
        self.quietly(lambda side: os.utime(f"{side}/{path}", ns=(5, seed * 1000 + 7)))

    def do_chmod(self, number, path, other, where, flags, offset, size, seed) -> Any:
        path = where if flags & os.O_RDWR else path
        self.quietly(lambda side: os.chmod(f"{side}/{path}", 0o700 | seed & 0o777))

    def do_set_attribute(self, number, path, other, where, flags, offset, size, seed) -> Any:
        name, value = f"user.n{seed % 3}", _DATA[seed % MIB :][: min(size, 2000)]
        if seed % 4:
            self.quietly(lambda side: os.setxattr(f"{side}/{path}", name, value))
        else:
            self.quietly(lambda side: os.removexattr(f"{side}/{path}", name))

    def do_get_attribute(self, number, path, other, where, flags, offset, size, seed) -> Any:
        self._compare_quietly(lambda side: os.getxattr(f"{side}/{path}", f"user.n{seed % 3}"))

    # --- another owner

    def do_remount(self, *_) -> None:
        """Unmount, check the pool, mount, and compare all."""
        self._close_all()
        self.mounted.stop()
        findings = check_pool(self.mounted.pool_path, data=True).findings
        if findings:
            raise DifferenceError(f"the pool is not clean: {findings}")
        self.mounted.start()
        for file in self.files.values():
            file.note_sync()
        self._compare()

    def do_sync_and_kill(self, *_) -> None:
        self._sync()
        self.do_kill()

    def _sync(self) -> None:
        fd = os.open(self.real, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
        for file in self.files.values():
            file.note_sync()

    def do_kill(self, *_) -> None:
        """Kill the owner; what was not adopted is gone, the newest versions may be."""
        self.mounted.kill()
        if self.has_core:
            wait_until(lambda: entry_at(self.mounted.path) is None, "the mount is taken away")
        else:
            detach(self.mounted.path)
        self.mounted.start()
        for number, slot in enumerate(self.slots):
            if slot is not None:
                with contextlib.suppress(OSError):  # the mount that it was of is gone
                    os.close(slot.real)
                slot.file.slots.remove(slot)
                os.close(slot.copy)
                self.slots[number] = None
        for directory, _, names in os.walk(self.copy):
            for name in names:
                self._settle_after_crash(f"{directory}/{name}".removeprefix(f"{self.copy}/"))
        self.do_remount()

    def _settle_after_crash(self, path: str) -> None:
        """Let the copy be what the crash has left, if that is something it may leave."""
        copy, real = Path(f"{self.copy}/{path}"), Path(f"{self.real}/{path}")
        file = self.file_at(path)
        assert file is not None
        before = copy.read_bytes()
        is_new = file.is_dirty or bool(file.versions)  # an older version may hold the same bytes
        left, may_vanish = file.after_crash(before)
        try:
            found = real.read_bytes()
        except FileNotFoundError:
            if not may_vanish:
                raise DifferenceError(f"{path}: the crash took the name") from None
            kept = copy.parent.stat()
            copy.unlink()  # at the next open, which is nobody's change of the directory
            os.utime(copy.parent, ns=(kept.st_atime_ns, kept.st_mtime_ns))
            return
        if version_of(found) not in left:
            raise DifferenceError(f"{path}: {version_of(found)} after the crash, none of {left}")
        if is_new or found != before or file.is_raw:  # a raw one's time is noted at a close
            mtime_ns = real.stat().st_mtime_ns
            with copy.open("r+b") as target:
                target.truncate(0)
                target.write(found)
            os.utime(copy, ns=(mtime_ns, mtime_ns))

    def _compare(self) -> None:
        """Compare names, attributes and bytes of everything."""
        real, copy = _tree(self.real), _tree(self.copy)
        if real.keys() != copy.keys():
            raise DifferenceError(f"names differ: {sorted(real.keys() ^ copy.keys())}")
        for path, shown in real.items():
            if shown != copy[path]:
                raise DifferenceError(f"{path}: {shown} on the mount, {copy[path]} on the copy")
            if stat.S_ISREG(shown[0]):
                data = [Path(f"{side}/{path}").read_bytes() for side in (self.real, self.copy)]
                self._same_bytes(*data)

    # --- comparing

    def _compare_quietly(self, function: Callable[[str], Any]) -> None:
        with contextlib.suppress(OSError):
            self._same(*self.both(function))

    def _same(self, real: Any, copy: Any) -> None:
        if real != copy:
            raise DifferenceError(f"{real!r} on the mount, {copy!r} on the copy")

    def _same_bytes(self, real: bytes, copy: bytes) -> None:
        if real == copy:
            return
        low = next((i for i, (a, b) in enumerate(zip(real, copy, strict=False)) if a != b), -1)
        raise DifferenceError(
            f"bytes differ: {len(real)} on the mount, {len(copy)} expected, first at {low}: "
            f"{real[low : low + 16].hex()} and {copy[low : low + 16].hex()}"
        )


def _shown(found: os.stat_result) -> tuple[Any, ...]:
    """Return what of a stat must agree: times only if somebody has set them."""
    is_file = stat.S_ISREG(found.st_mode)
    mtime_ns = found.st_mtime_ns if found.st_mtime_ns < OLD_NS else None
    return found.st_mode, found.st_size if is_file else 0, found.st_uid, mtime_ns


def _tree(root: str) -> dict[str, tuple[Any, ...]]:
    """Return what lies below a directory: attributes by path."""
    found: dict[str, tuple[Any, ...]] = {}
    for directory, directories, names in os.walk(root):
        for name in directories + names:
            path = f"{directory}/{name}"
            keys = [key for key in os.listxattr(path) if not key.startswith("user.kvfs.")]
            attributes = {key: os.getxattr(path, key) for key in keys}
            found[path.removeprefix(f"{root}/")] = (*_shown(os.lstat(path)), attributes)
    return found


@contextlib.contextmanager
def _memfd() -> Iterator[int]:
    """Give a descriptor of fresh memory."""
    fd = os.memfd_create("random")
    try:
        yield fd
    finally:
        os.close(fd)


def _fallocate(fd: int, mode: int, offset: int, nbytes: int) -> None:
    if _libc.fallocate(fd, mode, ctypes.c_long(offset), ctypes.c_long(nbytes)):
        raise OSError(ctypes.get_errno(), "fallocate")
