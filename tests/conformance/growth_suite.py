"""What every device must do for foreign writers, for seals, and with raw files."""

import mmap
import os
from typing import ClassVar

import pytest

from kvfs.devices.base import Device, Staging
from kvfs.errors import ClosedError, NoSpaceError
from kvfs.units import PAGE
from tests.conformance.helpers import CAPACITY_BYTES, SEGMENT_BYTES, TAG, Opener, random_bytes


def staged(device: Device, data: bytes, name: str = "growing") -> Staging:
    """Return a staging file with content."""
    staging = device.create_staging(name)
    device.write_staging(staging, 0, data)
    return staging


def content_of(staging: Staging) -> bytes:
    return os.pread(staging.fd, 1 << 30, 0)


class GrowthSuite:
    """Reservations, seals, raw files. The subclass gives `device` and `opener`."""

    is_kept: ClassVar[bool] = False  # memory that its next owner gets

    # --- somebody else writes

    def test_reserved_space_is_used_space(self, device: Device) -> None:
        staging = staged(device, b"x" * PAGE)
        device.reserve_staging(staging, 3 * PAGE + 1)
        assert (staging.nbytes, staging.reserved_bytes) == (PAGE, 3 * PAGE + 1)
        assert device.used_bytes == 4 * PAGE
        device.reserve_staging(staging, 2 * PAGE)  # never gives back
        assert device.used_bytes == 4 * PAGE
        device.write_staging(staging, PAGE, b"y")
        assert device.used_bytes == 4 * PAGE
        device.resize_staging(staging, 0)
        assert device.used_bytes == 4 * PAGE
        device.settle_staging(staging, 2 * PAGE)
        assert (staging.reserved_bytes, device.used_bytes) == (2 * PAGE, 2 * PAGE)
        device.drop_staging(staging)
        assert device.used_bytes == 0

    def test_a_reservation_that_does_not_fit_takes_nothing(self, device: Device) -> None:
        staging = staged(device, b"x")
        with pytest.raises(NoSpaceError):
            device.reserve_staging(staging, CAPACITY_BYTES + PAGE)
        assert (staging.reserved_bytes, device.used_bytes) == (0, PAGE)
        device.reserve_staging(staging, CAPACITY_BYTES)
        with pytest.raises(NoSpaceError):
            device.create(0, 1, TAG)
        device.settle_staging(staging)
        device.create(0, 1, TAG)

    def test_settling_finds_what_somebody_else_wrote(self, device: Device) -> None:
        staging = staged(device, b"x" * 10)
        device.reserve_staging(staging, 10 * PAGE)
        before = device.bytes_written
        os.pwrite(staging.fd, b"y" * PAGE, 2 * PAGE)
        device.settle_staging(staging)
        assert (staging.nbytes, staging.reserved_bytes) == (3 * PAGE, 0)
        assert device.used_bytes == 3 * PAGE
        assert device.bytes_written - before == 3 * PAGE - 10

    def test_a_failed_write_leaves_what_somebody_else_wrote(self, device: Device) -> None:
        staging = staged(device, b"x")
        device.reserve_staging(staging, 2 * PAGE)
        os.pwrite(staging.fd, b"y" * PAGE, PAGE)
        with pytest.raises(NoSpaceError):
            device.write_staging(staging, CAPACITY_BYTES, b"z")
        device.settle_staging(staging)
        assert content_of(staging) == b"x" + bytes(PAGE - 1) + b"y" * PAGE

    # --- seals

    def test_a_sealed_file_has_no_writers(self, device: Device) -> None:
        staging = staged(device, b"sealed")
        for is_shared in (True, False):
            assert device.seal_staging(staging, is_shared=is_shared)
        with pytest.raises(OSError, match=r"Bad file|not permitted"):
            os.pwrite(staging.fd, b"x", 0)
        device.persist_staging(staging)
        segment = device.adopt(staging, 0, 1, b"sidecar")
        assert device.read(segment, 0, 10) == b"sealed"
        with pytest.raises(OSError, match=r"Bad file|not permitted"):
            os.pwrite(segment.fd, b"x", 0)

    def test_a_map_that_can_write_keeps_the_seal_off(self, device: Device) -> None:
        staging = staged(device, b"mapped" * 1000)
        with mmap.mmap(staging.fd, 6000) as mapped:
            assert not device.seal_staging(staging, is_shared=True)
            mapped[:3] = b"MAP"
            with pytest.raises(OSError, match="busy"):
                device.adopt(staging, 0, 1, b"sidecar")
            assert (staging.nbytes, len(device.segments())) == (6000, 0)
        assert device.seal_staging(staging, is_shared=True)
        assert device.read(device.adopt(staging, 0, 1, b"sidecar"), 0, 6) == b"MAPped"

    def test_writing_takes_the_seal_off(self, device: Device) -> None:
        staging = staged(device, random_bytes(3 * PAGE))
        assert device.seal_staging(staging, is_shared=False)
        device.write_staging(staging, PAGE, b"again")
        device.resize_staging(staging, 2 * PAGE)
        wanted = bytearray(random_bytes(3 * PAGE))
        wanted[PAGE : PAGE + 5] = b"again"
        assert content_of(staging) == wanted[: 2 * PAGE]
        segment = device.adopt(staging, 0, 1, b"sidecar")
        assert device.read(segment, 0, 1 << 20) == wanted[: 2 * PAGE]
        assert device.used_bytes == 3 * PAGE

    # --- raw files

    def test_a_raw_file_is_written_in_place(self, device: Device) -> None:
        staging = staged(device, b"raw")
        device.keep_raw(staging, 0xFEED)
        assert device.raw_files() == [(0xFEED, 3)]
        device.write_staging(staging, 3, b" and written")
        device.persist_staging(staging)
        device.persist_names()
        device.release_raw(staging)
        device.release_raw(staging)
        with pytest.raises(ClosedError):
            device.write_staging(staging, 0, b"x")
        assert device.raw_files() == [(0xFEED, 15)]
        assert (device.used_bytes, device.segments(), device.reap_staging()) == (PAGE, [], 0)
        again = device.open_raw(0xFEED)
        assert (again.nbytes, content_of(again)) == (15, b"raw and written")
        device.resize_staging(again, 2 * PAGE)
        assert device.used_bytes == 2 * PAGE
        device.drop_staging(again)
        device.persist_names()
        assert (device.used_bytes, device.raw_files()) == (0, [])
        with pytest.raises(FileNotFoundError):
            device.open_raw(0xFEED)

    def test_a_staging_name_is_free_again(self, device: Device) -> None:
        device.keep_raw(staged(device, b"first", "same"), 1)
        device.keep_raw(staged(device, b"second", "same"), 2)
        assert device.raw_files() == [(1, 5), (2, 6)]
        assert device.used_bytes == 2 * PAGE

    def test_a_number_in_use_is_refused(self, device: Device) -> None:
        first = staged(device, b"first", "a")
        device.keep_raw(first, 7)
        second = staged(device, b"second", "b")
        with pytest.raises(FileExistsError):
            device.keep_raw(second, 7)
        assert (content_of(first), content_of(second)) == (b"first", b"second")
        assert device.used_bytes == 2 * PAGE

    def test_a_sealed_file_becomes_raw_and_is_written(self, device: Device) -> None:
        staging = staged(device, b"sealed")
        assert device.seal_staging(staging, is_shared=False)
        device.keep_raw(staging, 1)
        device.write_staging(staging, 0, b"S")
        assert content_of(staging) == b"Sealed"

    def test_raw_files_keep_to_the_capacity(self, device: Device) -> None:
        staging = staged(device, b"")
        device.keep_raw(staging, 1)
        with pytest.raises(NoSpaceError):
            device.resize_staging(staging, CAPACITY_BYTES + 1)
        device.resize_staging(staging, CAPACITY_BYTES - SEGMENT_BYTES)
        device.create(0, 1, TAG)
        with pytest.raises(NoSpaceError):
            device.create(1, 1, TAG)

    def test_raw_files_survive_a_close(self, opener: Opener) -> None:
        device = opener()
        staging = staged(device, b"kept")
        device.keep_raw(staging, 3)
        device.persist_names()
        device.close()
        device.release_raw(staging)
        device = opener()
        survives = device.info.is_persistent or self.is_kept
        assert device.raw_files() == ([(3, 4)] if survives else [])
        assert device.used_bytes == (PAGE if survives else 0)
        assert device.reap_staging() == 0
        device.destroy()
        device.close()
        device = opener()
        assert (device.raw_files(), device.used_bytes) == ([], 0)
        device.close()

    def test_a_closed_device_has_no_raw_files(self, opener: Opener) -> None:
        device = opener()
        staging = staged(device, b"x")
        device.close()
        for call in (
            lambda: device.reserve_staging(staging, 1), lambda: device.settle_staging(staging),
            lambda: device.seal_staging(staging, is_shared=False),
            lambda: device.keep_raw(staging, 1), device.raw_files, lambda: device.open_raw(1),
        ):  # fmt: skip
            with pytest.raises(ClosedError):
                call()
