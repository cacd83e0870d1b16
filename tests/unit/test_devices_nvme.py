"""Wear of an SSD: which drive it is, and what its log pages say."""

import errno
import os
import struct
from pathlib import Path

import pytest

from kvfs.devices import nvme
from kvfs.devices.nvme import Wear, get_log, wear_of
from tests.unit.made_up_sysfs import link, write

HEALTH, EXTENDED = 0x02, 0xC0


def health(used: int, units: int, errors: int) -> bytes:
    log = bytearray(512)
    log[5] = used
    log[48:64] = units.to_bytes(16, "little")
    log[160:176] = errors.to_bytes(16, "little")
    return bytes(log)


def extended(nbytes: int, guid: bytes = bytes.fromhex("c5af1028eabff2a49c4f6f7cc914d5af")) -> bytes:
    return nbytes.to_bytes(16, "little") + bytes(480) + guid


@pytest.fixture
def sysfs(tmp_path: Path) -> Path:
    return tmp_path / "sys"


def disk(sysfs: Path, location: Path, name: str = "nvme0n1", *, partition: bool = False) -> Path:
    """Put a disk below a directory; return what it is in sysfs."""
    whole = sysfs / "devices/pci0" / name
    block = whole / f"{name}p1" if partition else whole
    if partition:
        write(block / "partition", "1")
    number = location.stat().st_dev
    link(sysfs / f"dev/block/{os.major(number)}:{os.minor(number)}", block)
    return block


def ask(sysfs: Path, location: Path, pages: dict[int, bytes]) -> tuple[Wear, list[str]]:
    asked: list[str] = []

    def read_log(path: str, page: int) -> bytes:
        asked.append(path)
        if page not in pages:
            raise OSError(errno.EIO, "the drive refuses it")
        return pages[page]

    return wear_of(str(location), sysfs=sysfs, dev=Path("/dev"), read_log=read_log), asked


@pytest.mark.parametrize("partition", [False, True])
def test_what_a_drive_says(sysfs: Path, tmp_path: Path, partition: bool) -> None:
    disk(sysfs, tmp_path, partition=partition)
    pages = {HEALTH: health(3, 2_000_000, 1), EXTENDED: extended(1_200_000_000_000)}
    wear, asked = ask(sysfs, tmp_path, pages)
    assert wear == Wear("/dev/nvme0", 3, 1_024_000_000_000, 1_200_000_000_000, 1)
    assert set(asked) == {"/dev/nvme0"}


def test_few_drives_know_of_their_flash(sysfs: Path, tmp_path: Path) -> None:
    disk(sysfs, tmp_path, "nvme1c0n1")
    for pages in ({HEALTH: health(120, 1, 0)},
                  {HEALTH: health(120, 1, 0), EXTENDED: extended(5, b"\1" * 16)}):  # fmt: skip
        wear, _ = ask(sysfs, tmp_path, pages)
        assert (wear.drive, wear.percentage_used) == ("/dev/nvme1", 120)
        assert (wear.host_bytes_written, wear.flash_bytes_written) == (512_000, None)


def test_through_a_mapped_device(sysfs: Path, tmp_path: Path) -> None:
    mapped = disk(sysfs, tmp_path, "dm-0")
    link(mapped / "slaves/nvme2n1p1", sysfs / "devices/pci0/nvme2n1/nvme2n1p1")
    write(sysfs / "devices/pci0/nvme2n1/nvme2n1p1/partition", 1)
    assert ask(sysfs, tmp_path, {HEALTH: health(1, 1, 0)})[0].drive == "/dev/nvme2"
    link(mapped / "slaves/nvme3n1", sysfs / "devices/pci0/nvme3n1")
    assert "several NVMe drives" in ask(sysfs, tmp_path, {})[0].reason


def test_why_it_is_not_readable(sysfs: Path, tmp_path: Path) -> None:
    assert ask(sysfs, tmp_path, {})[0].reason == "it lies on no block device"
    disk(sysfs, tmp_path, "sda")
    assert ask(sysfs, tmp_path, {})[0].reason == "no NVMe drive below it, but sda"


def test_a_drive_that_refuses(sysfs: Path, tmp_path: Path) -> None:
    disk(sysfs, tmp_path)
    wear, _ = ask(sysfs, tmp_path, {})
    assert wear.percentage_used is None
    assert wear.reason == "the drive does not say: the drive refuses it"

    def forbid(path: str, page: int) -> bytes:
        raise PermissionError(errno.EACCES, "Permission denied")

    wear = wear_of(str(tmp_path), sysfs=sysfs, read_log=forbid)
    assert wear.reason == "only root may ask the drive"


def test_the_command_that_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[bytes] = []

    def ioctl(fd: int, request: int, argument: bytearray) -> int:
        assert request == 0xC0484E41
        assert len(argument) == 72  # struct nvme_admin_cmd
        sent.append(bytes(argument))
        return 0

    monkeypatch.setattr(nvme.fcntl, "ioctl", ioctl)
    (tmp_path / "nvme0").touch()
    assert get_log(str(tmp_path / "nvme0"), HEALTH) == bytes(512)
    (command,) = sent
    opcode, namespace = command[0], struct.unpack_from("<I", command, 4)[0]
    address, nbytes = struct.unpack_from("<Q", command, 24)[0], command[36:40]
    assert (opcode, namespace) == (0x02, 0xFFFFFFFF)
    assert address
    assert int.from_bytes(nbytes, "little") == 512
    assert struct.unpack_from("<I", command, 40)[0] == 127 << 16 | HEALTH
    assert struct.unpack_from("<I", command, 64)[0] == 2000


def test_a_file_that_is_no_drive(tmp_path: Path) -> None:
    (tmp_path / "nvme0").touch()
    with pytest.raises(OSError, match="ioctl"):
        get_log(str(tmp_path / "nvme0"), HEALTH)
