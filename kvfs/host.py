"""What tells this host and this boot from others.

Layer: L4.
"""

import os
import uuid
from pathlib import Path

from kvfs.engine.recovery import Owner


def this_process() -> Owner:
    """Return the identity that superblocks record for their owner."""
    return Owner(host=_read_id("/etc/machine-id"), boot=_boot_id(), pid=os.getpid())


def _read_id(path: str) -> bytes:
    try:
        text = Path(path).read_text(encoding="ascii").strip()
        return uuid.UUID(text).bytes
    except (OSError, ValueError):
        return uuid.uuid5(uuid.NAMESPACE_DNS, os.uname().nodename).bytes


def _boot_id() -> bytes:
    return _read_id("/proc/sys/kernel/random/boot_id")
