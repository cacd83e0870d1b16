"""What every device must do with staging files and file segments; a part of DeviceSuite."""

import os

import numpy as np
import pytest

from kvfs.devices.base import Device, SegmentName
from kvfs.errors import ClosedError, UsageError
from kvfs.units import PAGE
from tests.conformance.helpers import make_file, put, random_bytes


class FileSuite:
    """Staging, adoption and sidecars. The subclass gives `device`."""

    # --- staging and file segments

    def test_staging_grows_and_serves_reads(self, device: Device) -> None:
        staging = device.create_staging("file-1.part")
        assert (staging.name, staging.nbytes) == ("file-1.part", 0)
        device.write_staging(staging, 10, memoryview(b"abcdef"))
        assert staging.nbytes == 16
        assert os.pread(staging.fd, 100, 0) == bytes(10) + b"abcdef"
        device.write_staging(staging, 0, np.arange(4, dtype=np.uint8).data)
        device.resize_staging(staging, 12)
        device.resize_staging(staging, 14)
        assert os.pread(staging.fd, 100, 0) == bytes([0, 1, 2, 3]) + bytes(6) + b"ab\0\0"
        device.persist_staging(staging)
        assert device.bytes_written == 10
        device.drop_staging(staging)
        device.drop_staging(staging)
        assert device.used_bytes == 0
        with pytest.raises(ClosedError):
            device.write_staging(staging, 0, b"x")

    @pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "../x", "a\0", "x" * 128])
    def test_staging_names_stay_inside(self, device: Device, name: str) -> None:
        with pytest.raises(UsageError):
            device.create_staging(name)

    def test_staging_names_are_unique(self, device: Device) -> None:
        staging = device.create_staging("same")
        with pytest.raises(FileExistsError):
            device.create_staging("same")
        device.drop_staging(staging)
        device.create_staging("same")

    def test_adopt_makes_a_file_segment(self, device: Device) -> None:
        data = random_bytes(100_001)
        sidecar = random_bytes(8192 + 128, 2)
        segment = make_file(device, data, 5, 9, sidecar)
        assert (segment.slot, segment.generation, segment.is_file) == (5, 9, True)
        assert segment.nbytes == len(data) == os.fstat(segment.fd).st_size
        assert device.read(segment, 0, len(data)) == data
        assert device.read(segment, 100_000, 100, uncached=True) == data[-1:]
        assert device.read_tail(segment, 128) == sidecar[-128:]
        assert device.read_tail(segment, 1 << 20) == sidecar
        assert device.segments() == [SegmentName(5, 9, True, len(data))]
        assert device.next_data(segment, len(data)) == len(data)
        assert device.bytes_written == len(data) + len(sidecar)
        device.persist(segment)
        device.persist_names()
        with pytest.raises(AssertionError):
            put(device, segment, (0, b"x"))

    def test_adopt_consumes_the_staging_handle(self, device: Device) -> None:
        staging = device.create_staging("once")
        device.write_staging(staging, 0, b"data")
        assert device.seal_staging(staging, is_shared=False)
        fd = staging.fd
        segment = device.adopt(staging, 0, 1, b"sidecar")
        assert segment.fd == fd
        device.drop_staging(staging)
        with pytest.raises(ClosedError):
            device.adopt(staging, 1, 1, b"sidecar")
        assert device.read(segment, 0, 10) == b"data"
        device.create_staging("once")

    def test_an_adopted_file_is_attached_again(self, device: Device) -> None:
        segment = make_file(device, b"payload", 1, 2, b"sidecar")
        device.release(segment)
        again = device.attach(device.segments()[0])
        assert (again.is_file, again.nbytes) == (True, 7)
        assert device.read(again, 0, 7) == b"payload"
        assert device.read_tail(again, 100) == b"sidecar"
        device.free(again)
        assert (device.used_bytes, device.segments()) == (0, [])

    def test_sidecar_bytes_can_be_rewritten(self, device: Device) -> None:
        segment = make_file(device, b"payload", 1, 2, b"0123456789")
        device.write_tail(segment, 4, b"ab")
        device.persist(segment)
        assert device.read_tail(segment, 6) == b"45ab89"
        with pytest.raises(AssertionError):
            device.write_tail(segment, 11, b"x")

    def test_adopt_of_a_name_in_use_leaves_the_staging_file(self, device: Device) -> None:
        make_file(device, b"first", 1, 2)
        staging = device.create_staging("second")
        device.write_staging(staging, 0, b"second")
        used = device.used_bytes
        with pytest.raises(FileExistsError):
            device.adopt(staging, 1, 2, b"sidecar")
        assert device.used_bytes == used
        assert os.pread(staging.fd, 10, 0) == b"second"
        assert device.adopt(staging, 1, 3, b"sidecar").nbytes == 6

    def test_an_empty_file_can_be_adopted(self, device: Device) -> None:
        segment = make_file(device, b"", 1, 2, b"sidecar")
        assert device.read(segment, 0, 10) == b""
        assert device.next_data(segment, 0) == 0
        assert device.used_bytes == PAGE

    def test_reap_spares_what_is_held(self, device: Device) -> None:
        staging = device.create_staging("held")
        make_file(device, b"file", 1, 1)
        assert device.reap_staging() == 0
        device.write_staging(staging, 0, b"still here")
        assert len(device.segments()) == 1
