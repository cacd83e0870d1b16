"""What reaches the device for files written through a mount, by the device's own counters."""

import os
import struct
from pathlib import Path

import pytest

from tests.fuse.loop_mounts import zram_mount
from tests.fuse.mounting import MIB, MountedPool

pytestmark = pytest.mark.fuse
FILE_BYTES = 4 * MIB
SEGMENT_MIB = 64
SECTOR = 512
SECTORS_WRITTEN = 6  # of the counters


def written_bytes(counters: Path) -> int:
    return int(counters.read_text().split()[SECTORS_WRITTEN]) * SECTOR


@pytest.mark.parametrize("count", [96, pytest.param(10_000, marks=pytest.mark.slow)])
def test_bytes_reach_the_device_once(tmp_path: Path, count: int) -> None:
    """Files as an engine's disk tier writes them: created, written, closed, renamed."""
    stored = count * FILE_BYTES
    with zram_mount(tmp_path, gib=stored * 5 // 4 // 2**30 + 2) as (base, counters):
        mount = MountedPool(
            base, dir_mib=stored * 9 // 8 // MIB + 512, dram_mib=0, segment_mib=SEGMENT_MIB
        )
        try:
            mount.start()
            (mount.path / "d").mkdir()
            directory = os.open(mount.path / "d", os.O_DIRECTORY)
            os.fsync(directory)
            os.sync()
            before = written_bytes(counters)
            for number in range(count):
                write_renamed(directory, f"{number}.bin", struct.pack("<Q", number + 1))
            os.fsync(directory)
            os.sync()
            factor = (written_bytes(counters) - before) / stored
            files = sum(len(names) for _, _, names in os.walk(mount.device_path))
            print(
                f"{count} files: {factor:.4f} bytes written per byte, {files} files on the device"
            )
            assert factor <= 1.05
            # The last block's place is the summary's.
            segments = -(-stored // ((SEGMENT_MIB - 1) * MIB))
            assert files <= segments + 10
            for number in range(0, count, max(1, count // 50)):
                data = (mount.path / "d" / f"{number}.bin").read_bytes()
                assert data == struct.pack("<Q", number + 1) * (FILE_BYTES // 8)
            os.close(directory)
            mount.close()
        finally:
            mount.abandon()


def write_renamed(directory: int, name: str, word: bytes) -> None:
    fd = os.open(f".{name}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=directory)
    assert os.write(fd, word * (FILE_BYTES // 8)) == FILE_BYTES
    os.close(fd)
    os.rename(f".{name}", name, src_dir_fd=directory, dst_dir_fd=directory)
