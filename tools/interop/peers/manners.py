"""POSIX manners that engines need of a directory, each tried by itself. No engine is run.

Layer: tool.

A case does the system calls of an engine that cannot run here, or of one that falls back silently
when a call is refused. What an engine does on a refusal is in docs/ENGINES.md.
"""

import errno
import fcntl
import mmap
import os
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Final

from interop.cases import Case, CaseError, Figures, Peer, Place, UnavailableError
from interop.driver import pattern, require
from interop.site import Site

_MIB: Final = 1 << 20
_DATA: Final = pattern(_MIB, "manners")
_READ_WRITE: Final = os.O_RDWR | os.O_CREAT


def _cases(site: Site) -> Iterator[Case]:
    for number, what in enumerate(_MANNERS):
        for place in Place:
            path = site.directory(place, "manners") / str(number)
            yield Case(what, place, partial(_try, site, what, place, path))


def _try(site: Site, what: str, place: Place, path: Path) -> Figures:
    command = (sys.executable, "-m", "interop.peers.manners", what, str(path))
    try:
        site.run(*command, timeout_s=120)
    except CaseError as error:
        if what in _NOT_OFFERED and place is Place.MOUNT:
            raise UnavailableError(f"not offered by kvfs: {error}") from None
        raise
    return {}


def main() -> None:
    """Try one manner; in a process of its own, so that nothing stays open."""
    try:
        _MANNERS[sys.argv[1]](Path(sys.argv[2]))
    except OSError as error:
        sys.exit(f"{errno.errorcode.get(error.errno or 0)}: {error}")


def _fallocate(path: Path) -> None:
    """What KVBM's disk tier and Mooncake's benchmark do first (libc falls back to writing)."""
    import ctypes

    fd = os.open(path, _READ_WRITE)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
    if libc.fallocate(fd, 0, 0, _MIB):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    require(os.fstat(fd).st_size == _MIB, "the file did not grow")


def _unlinked(path: Path) -> None:
    """KVBM's disk tier and temporary files: a file that lives on without a name."""
    fd = os.open(path, _READ_WRITE | os.O_EXCL)
    path.unlink()
    os.ftruncate(fd, _MIB)
    os.pwrite(fd, _DATA[:4096], 4096)
    require(os.pread(fd, 4096, 4096) == _DATA[:4096], "other bytes than were written")
    require(os.fstat(fd).st_nlink == 0, "a link count without a name")
    os.close(fd)


def _direct_later(path: Path) -> None:
    """KVBM: O_DIRECT switched on by fcntl on an open file."""
    fd = os.open(path, _READ_WRITE)
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_DIRECT)
    with mmap.mmap(-1, _MIB) as memory:
        memory[:] = _DATA
        require(os.pwritev(fd, [memory], 0) == _MIB, "short write")
        memory[:] = bytes(_MIB)
        require(os.preadv(fd, [memory], 0) == _MIB, "short read")
        require(memory[:] == _DATA, "other bytes than were written")
    os.close(fd)


def _second_mapping(path: Path) -> None:
    """Open and map a file once more: fio's mmap engine, workers that share a file."""
    path.write_bytes(_DATA)
    first = os.open(path, os.O_RDWR)
    with mmap.mmap(first, 0, mmap.MAP_SHARED) as one:
        second = os.open(path, os.O_RDWR)
        with mmap.mmap(second, 0, mmap.MAP_SHARED) as two:
            one[:8] = b"engine-1"
            require(two[:8] == b"engine-1", "one mapping does not see what the other wrote")
        os.close(second)
    os.close(first)


def _mapped_by_reader(path: Path) -> None:
    """A reader maps a file while its writer has it open, e.g. vLLM's and LMCache's processes."""
    writer = os.open(path, _READ_WRITE)
    os.write(writer, _DATA)
    reader = os.open(path, os.O_RDONLY)
    with mmap.mmap(reader, 0, mmap.MAP_SHARED, mmap.PROT_READ) as mapped:
        require(mapped[:] == _DATA, "other bytes than were written")
    os.close(reader)
    os.close(writer)


def _mapped_beside_writer(path: Path) -> None:
    """A reader maps a file that is whole, while another process has it open to change it."""
    path.write_bytes(_DATA)
    writer = os.open(path, os.O_RDWR)
    reader = os.open(path, os.O_RDONLY)
    with mmap.mmap(reader, 0, mmap.MAP_SHARED, mmap.PROT_READ) as mapped:
        require(mapped[:] == _DATA, "other bytes than were written")
    os.close(reader)
    os.close(writer)


def _mapped_rewritten(path: Path) -> None:
    """A file is written anew in place, as llama.cpp does, while a reader has the old one mapped."""
    path.write_bytes(_DATA)
    old = os.open(path, os.O_RDONLY)
    with mmap.mmap(old, 0, mmap.MAP_SHARED, mmap.PROT_READ) as before:
        require(before[:4096] == _DATA[:4096], "other bytes than were written")
        path.write_bytes(_DATA[::-1])
        new = os.open(path, os.O_RDONLY)
        with mmap.mmap(new, 0, mmap.MAP_SHARED, mmap.PROT_READ) as after:
            require(after[:] == _DATA[::-1], "the new mapping shows the old bytes")
        os.close(new)
    os.close(old)


def _killed_writer(path: Path) -> None:
    """A writer is killed half-way. No engine relies on what is left; it must be readable."""
    path.write_bytes(_DATA)
    child = os.fork()
    if not child:
        fd = os.open(path, os.O_WRONLY | os.O_TRUNC)
        os.write(fd, _DATA[: _MIB // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    found = path.read_bytes()
    require(found in (_DATA, _DATA[: _MIB // 2]), f"{len(found)} bytes that nobody wrote")
    sys.stdout.write(f"{len(found)} bytes are left\n")


def _write_only_mapped(path: Path) -> None:
    """A file created O_WRONLY by one process and mapped by another before it was closed."""
    writer = os.open(path, os.O_WRONLY | os.O_CREAT)
    os.write(writer, _DATA)
    other = os.open(path, os.O_RDWR)
    with mmap.mmap(other, 0, mmap.MAP_SHARED) as mapped:
        require(mapped[:] == _DATA, "other bytes than were written")
    os.close(other)
    os.close(writer)


def _mapped_extended(path: Path) -> None:
    """LMCache's dax and vLLM's region: ftruncate, map, write by the mapping, read by pread."""
    fd = os.open(path, _READ_WRITE | os.O_EXCL)
    os.ftruncate(fd, 64 * _MIB)
    with mmap.mmap(fd, 64 * _MIB, mmap.MAP_SHARED) as mapped:
        mapped[32 * _MIB : 33 * _MIB] = _DATA
        mapped.flush()
        require(os.pread(fd, _MIB, 32 * _MIB) == _DATA, "pread does not see the mapping")
    os.close(fd)
    require(path.read_bytes()[32 * _MIB : 33 * _MIB] == _DATA, "lost after close")


def _populated(path: Path) -> None:
    """Populate a shared mapping for writing, as vLLM does with its host memory."""
    fd = os.open(path, _READ_WRITE | os.O_EXCL)
    os.ftruncate(fd, _MIB)
    with mmap.mmap(fd, _MIB, mmap.MAP_SHARED) as mapped:
        mapped.madvise(23, 0, _MIB)
    os.close(fd)


def _locked(path: Path) -> None:
    """flock, and record locks as lockf takes them: huggingface_hub's and SQLite's."""
    fd = os.open(path, _READ_WRITE)
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    other = os.open(path, _READ_WRITE)
    try:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pass
    else:
        sys.exit("two descriptors hold an exclusive lock")
    fcntl.flock(fd, fcntl.LOCK_UN)
    fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(other)
    os.close(fd)


def _read_ahead(path: Path) -> None:
    """posix_fadvise and readahead, as MLPerf's benchmark and LMCache's fs adapter call them."""
    path.write_bytes(_DATA)
    fd = os.open(path, os.O_RDONLY)
    for advice in (os.POSIX_FADV_WILLNEED, os.POSIX_FADV_SEQUENTIAL, os.POSIX_FADV_DONTNEED):
        os.posix_fadvise(fd, 0, _MIB, advice)
    require(os.read(fd, _MIB) == _DATA, "other bytes than were written")
    os.close(fd)


def _no_atime(path: Path) -> None:
    """O_NOATIME on a file of one's own."""
    path.write_bytes(_DATA)
    os.close(os.open(path, os.O_RDONLY | os.O_NOATIME))


def _temporary(path: Path) -> None:
    """O_TMPFILE and its name given later by a link."""
    fd = os.open(path.parent, os.O_RDWR | os.O_TMPFILE, 0o600)
    os.write(fd, _DATA)
    os.link(f"/proc/self/fd/{fd}", path, src_dir_fd=fd)  # by linkat, which follows
    os.close(fd)
    require(path.read_bytes() == _DATA, "other bytes than were written")


def _symlink(path: Path) -> None:
    """Symbolic links, as hub caches keep their snapshots."""
    path.symlink_to("elsewhere")
    require(path.readlink() == Path("elsewhere"), "the link leads elsewhere")


def _hard_link(path: Path) -> None:
    """A second name of one file."""
    path.write_bytes(_DATA)
    os.link(path, path.with_suffix(".link"))


def _copy_range(path: Path) -> None:
    """copy_file_range and sendfile, as shutil and cp use them."""
    path.write_bytes(_DATA)
    source, target = os.open(path, os.O_RDONLY), os.open(path.with_suffix(".copy"), _READ_WRITE)
    done = os.copy_file_range(source, target, _MIB // 2)
    done += os.sendfile(target, source, None, _MIB - done)
    os.close(source)
    os.close(target)
    require(done == _MIB, f"{done} bytes copied")
    require(path.with_suffix(".copy").read_bytes() == _DATA, "other bytes than were copied")


def _holes(path: Path) -> None:
    """SEEK_DATA and SEEK_HOLE."""
    path.write_bytes(_DATA)
    fd = os.open(path, os.O_RDONLY)
    require(os.lseek(fd, 0, os.SEEK_DATA) == 0, "no data at the start")
    require(os.lseek(fd, 0, os.SEEK_HOLE) == _MIB, "a hole before the end")
    os.close(fd)


def _rename_over_open(path: Path) -> None:
    """Rename over a file that a reader has open: the reader keeps the old bytes."""
    path.write_bytes(_DATA)
    fd = os.open(path, os.O_RDONLY)
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(_DATA[::-1])
    temporary.rename(path)
    require(os.pread(fd, _MIB, 0) == _DATA, "the reader sees other bytes")
    require(path.read_bytes() == _DATA[::-1], "the name shows other bytes")
    os.close(fd)


def _many_writers(path: Path) -> None:
    """Two processes' descriptors write halves of one file with pwrite (DeepSpeed, NIXL)."""
    one, two = os.open(path, _READ_WRITE), os.open(path, os.O_WRONLY)
    os.pwrite(two, _DATA[_MIB // 2 :], _MIB // 2)
    os.pwrite(one, _DATA[: _MIB // 2], 0)
    os.close(one)
    os.close(two)
    require(path.read_bytes() == _DATA, "other bytes than were written")


def _appended(path: Path) -> None:
    """O_APPEND, and a reader that follows."""
    with path.open("ab", buffering=0) as writer, path.open("rb", buffering=0) as reader:
        writer.write(_DATA[:100])
        require(reader.read() == _DATA[:100], "the reader does not see what was appended")
        writer.write(_DATA[100:])
        require(reader.read() == _DATA[100:], "the reader does not see the second part")


def _visible_before_close(path: Path) -> None:
    """Stat a file that is being written: the bytes so far."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    os.write(fd, _DATA)
    require(path.stat().st_size == _MIB, f"stat shows {path.stat().st_size} bytes")
    os.close(fd)


def _statvfs(path: Path) -> None:
    """statvfs: SGLang's evictor and MLPerf's benchmark size themselves by it."""
    before = os.statvfs(path.parent)
    path.write_bytes(_DATA * 16)
    fd = os.open(path, os.O_RDWR)
    os.fsync(fd)
    os.close(fd)
    after = os.statvfs(path.parent)
    require(before.f_bavail > after.f_bavail, "no less is free after a file was written")


_MANNERS: Final[dict[str, Callable[[Path], None]]] = {
    "fallocate(2)": _fallocate,
    "open file without a name": _unlinked,
    "O_DIRECT by fcntl": _direct_later,
    "second shared mapping of a file that is mapped": _second_mapping,
    "reader maps a file while it is written": _mapped_by_reader,
    "reader maps a whole file that a writer has open": _mapped_beside_writer,
    "reader maps a file rewritten in place, the old one mapped": _mapped_rewritten,
    "writer killed half-way": _killed_writer,
    "shared mapping of a file that a writer has O_WRONLY": _write_only_mapped,
    "ftruncate, map, write by the mapping": _mapped_extended,
    "MADV_POPULATE_WRITE": _populated,
    "flock and record locks": _locked,
    "posix_fadvise": _read_ahead,
    "O_NOATIME": _no_atime,
    "O_TMPFILE and link": _temporary,
    "symlink": _symlink,
    "hard link": _hard_link,
    "copy_file_range and sendfile": _copy_range,
    "SEEK_DATA and SEEK_HOLE": _holes,
    "rename over an open file": _rename_over_open,
    "two writers of one file": _many_writers,
    "append and follow": _appended,
    "size visible before close": _visible_before_close,
    "statvfs follows": _statvfs,
}

# What kvfs refuses on purpose; no engine that was read needs it.
_NOT_OFFERED: Final = {
    "O_TMPFILE and link", "symlink", "hard link",
    # Half a file would be taken for a whole one.
    "reader maps a file while it is written", "append and follow",
}  # fmt: skip

PEER: Final = Peer("manners", "POSIX manners", "", lambda _: os.uname().release, _cases)

if __name__ == "__main__":
    main()
