"""How worn an SSD is: what its NVMe controller says of itself.

Layer: L1.

The health log (page 02h, NVM Express base specification) counts what the host wrote; the extended
one of the Open Compute Project (page C0h), where a drive has it, what went to the flash. Both are
read by an admin command, which root alone may send.
"""

import ctypes
import fcntl
import os
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_SYSFS: Final = Path("/sys")
_DEV: Final = Path("/dev")
_ADMIN_COMMAND: Final = 0xC0484E41  # NVME_IOCTL_ADMIN_CMD: _IOWR('N', 0x41, 72 bytes)
_COMMAND: Final = struct.Struct("<BBHIIIQQIIIIIIIIII")
_GET_LOG_PAGE: Final = 0x02
_ALL_NAMESPACES: Final = 0xFFFFFFFF
_TIMEOUT_MS: Final = 2000
_LOG_BYTES: Final = 512
_HEALTH: Final = 0x02
_HEALTH_OCP: Final = 0xC0
_OCP_GUID: Final = bytes.fromhex("c5af1028eabff2a49c4f6f7cc914d5af")
_UNIT_BYTES: Final = 512_000
_CONTROLLER: Final = re.compile(r"(nvme\d+)(?:c\d+)?n\d+\Z")
GetLog = Callable[[str, int], bytes]


@dataclass(frozen=True, slots=True)
class Wear:
    """How worn the drive below is; None for what is not known, `reason` says why.

    `percentage_used`: of its rated life, may exceed 100. Bytes are of its whole life, whoever wrote
    them.
    """

    drive: str = ""
    percentage_used: int | None = None
    host_bytes_written: int | None = None
    flash_bytes_written: int | None = None
    media_errors: int | None = None
    reason: str = ""


def get_log(path: str, page: int) -> bytes:
    """Return 512 bytes of a controller's log page; OSError if it refuses."""
    buffer = ctypes.create_string_buffer(_LOG_BYTES)
    command = _COMMAND.pack(
        _GET_LOG_PAGE, 0, 0, _ALL_NAMESPACES, 0, 0, 0, ctypes.addressof(buffer), 0, _LOG_BYTES,
        page | (_LOG_BYTES // 4 - 1) << 16, 0, 0, 0, 0, 0, _TIMEOUT_MS, 0,
    )  # fmt: skip
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        status = fcntl.ioctl(fd, _ADMIN_COMMAND, bytearray(command))
    finally:
        os.close(fd)
    if status:
        raise OSError(5, f"the drive refuses it: status {status:#x}")
    return buffer.raw


def wear_of(
    location: str, *, sysfs: Path = _SYSFS, dev: Path = _DEV, read_log: GetLog = get_log
) -> Wear:
    """Return the wear of the drive that a file or directory lies on.

    Args:
        location: A path that exists.
        sysfs: Where sysfs is mounted.
        dev: Where the devices are.
        read_log: Reads a log page of a controller.
    """
    number = os.stat(location).st_dev
    block = sysfs / "dev/block" / f"{os.major(number)}:{os.minor(number)}"
    if not block.exists():
        return Wear(reason="it lies on no block device")
    drives = {name: found for name in _disks(block.resolve())
              if (found := _CONTROLLER.match(name))}  # fmt: skip
    if len(drives) != 1:
        names = ", ".join(_disks(block.resolve()))
        what = "several NVMe drives" if drives else "no NVMe drive"
        return Wear(reason=f"{what} below it, but {names}")
    (match,) = drives.values()
    return _read(str(dev / match[1]), read_log)


def _disks(block: Path) -> list[str]:
    """Return the whole disks below a block device, through partitions and mapped devices."""
    if (block / "partition").exists():
        block = block.parent
    below = sorted((block / "slaves").iterdir()) if (block / "slaves").is_dir() else []
    return [name for child in below for name in _disks(child.resolve())] or [block.name]


def _read(drive: str, read_log: GetLog) -> Wear:
    try:
        log = read_log(drive, _HEALTH)
    except PermissionError:
        return Wear(drive, reason="only root may ask the drive")
    except OSError as error:
        return Wear(drive, reason=f"the drive does not say: {error.strerror or error}")
    flash = None
    try:
        extended = read_log(drive, _HEALTH_OCP)
        if extended[496:512] == _OCP_GUID:
            flash = int.from_bytes(extended[:16], "little")
    except OSError:
        pass  # few drives have this page
    return Wear(
        drive=drive,
        percentage_used=log[5],
        host_bytes_written=int.from_bytes(log[48:64], "little") * _UNIT_BYTES,
        flash_bytes_written=flash,
        media_errors=int.from_bytes(log[160:176], "little"),
    )
