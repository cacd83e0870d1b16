"""The file behind vLLM's rows, so that the owner of a pool can read them where they are.

Layer: L5, without vLLM.

vLLM maps its offload region from a file in /dev/shm, whole. Which one is asked of the kernel, not
of vLLM: a wrong answer would store other bytes under the keys.
"""

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager

_DIRECTORY = "/dev/shm/"


@contextmanager
def file_behind(address: int, nbytes: int) -> Iterator[int | None]:
    """Yield a descriptor of the file whose first `nbytes` are mapped at `address`.

    None if it is private memory, or a file that has no name in /dev/shm any more.
    """
    found, fd = _find(address, nbytes), None
    try:
        if found is not None:
            device, inode, path = found
            with contextlib.suppress(OSError):
                fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
                status = os.fstat(fd)
                name = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
                if (name, str(status.st_ino)) != (device, inode):
                    found = None  # another file by now
        yield fd if found is not None else None
    finally:
        if fd is not None:
            os.close(fd)


def _find(address: int, nbytes: int) -> tuple[str, str, str] | None:
    """Return device, inode and path of what is mapped there, shared and from its start."""
    at, found = address, None
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
        for line in maps:
            span, mode, offset, device, inode, *path = line.rstrip("\n").split(maxsplit=5)
            low, high = (int(one, 16) for one in span.split("-"))
            if not low <= at < high:
                continue
            this = (device, inode, path[0] if path else "")
            is_start = int(offset, 16) + at - low == at - address
            is_file = mode[3] == "s" and this[2].startswith(_DIRECTORY)
            if not is_start or not is_file or found not in (None, this):
                return None
            at, found = high, this
            if at >= address + nbytes:
                return found
    return None
