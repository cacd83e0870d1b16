"""Descriptors made of descriptors.

Layer: L1.
"""

import os


def read_only(fd: int) -> int:
    """Return a descriptor of the same file that can only read; the caller closes it."""
    return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
