"""What every device must do with staging files and file segments; a part of DeviceSuite."""

import os
from typing import ClassVar

import numpy as np
import pytest

from kvfs.devices.base import Device, SegmentName
from kvfs.errors import ClosedError, NoSpaceError, UsageError
from kvfs.units import PAGE
from tests.conformance.helpers import (
    CAPACITY_BYTES,
    SEGMENT_BYTES,
    TAG,
    Opener,
    make_file,
    put,
    random_bytes,
)


class FileSuite:
    """Staging, adoption and sidecars. The subclass gives `device` and `opener`."""

    is_kept: ClassVar[bool] = False  # memory that its next owner gets

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

    @pytest.mark.parametrize("uncached", [False, True])
    def test_ranges_of_file_segments_are_read(self, device: Device, uncached: bool) -> None:
        data = [random_bytes(100_001, seed) for seed in (1, 2)]
        segments = [make_file(device, each, slot, 1, b"sidecar") for slot, each in enumerate(data)]
        offsets = np.array([PAGE, 7, 100_000], np.uint64)
        lengths = np.array([50_000, 100, 2], np.uint64)
        target, statuses = np.zeros(60_000, np.uint8), np.full(3, 99, np.int32)
        failed = device.read_payloads(
            segments, np.array([1, 0, 1], np.intp), offsets, lengths,
            np.cumsum(lengths) - lengths + np.uint64(target.ctypes.data), None, statuses,
            uncached=uncached,
        )  # fmt: skip
        assert (failed, list(statuses)) == (1, [0, 0, 2])
        assert target[:50_100].tobytes() == data[1][PAGE : PAGE + 50_000] + data[0][7:107]

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

    # --- capacity

    def test_files_and_segments_share_the_capacity(self, device: Device) -> None:
        count = CAPACITY_BYTES // SEGMENT_BYTES
        segments = [device.create(slot, 1, TAG) for slot in range(count)]
        staging = device.create_staging("x")
        with pytest.raises(NoSpaceError):
            device.write_staging(staging, 0, b"1")
        with pytest.raises(NoSpaceError):
            device.resize_staging(staging, 1)
        assert staging.nbytes == 0
        assert device.used_bytes == CAPACITY_BYTES
        assert len(device.segments()) == count
        device.free(segments[0])
        device.write_staging(staging, 0, b"1" * SEGMENT_BYTES)
        with pytest.raises(NoSpaceError):
            device.adopt(staging, 0, 2, b"sidecar")
        assert device.used_bytes == CAPACITY_BYTES
        device.free(segments[1])
        device.adopt(staging, 0, 2, b"sidecar")
        assert device.used_bytes == CAPACITY_BYTES - SEGMENT_BYTES + PAGE
        with pytest.raises(NoSpaceError):
            device.create(count, 1, TAG)

    def test_used_bytes_is_exact_to_the_page(self, device: Device) -> None:
        assert device.used_bytes == 0
        staging = device.create_staging("one")
        assert device.used_bytes == 0
        for end, used in ((1, PAGE), (PAGE, PAGE), (PAGE + 1, 2 * PAGE)):
            device.write_staging(staging, end - 1, b"x")
            assert (staging.nbytes, device.used_bytes) == (end, used)
        device.resize_staging(staging, 10 * PAGE)
        assert device.used_bytes == 10 * PAGE
        device.resize_staging(staging, 5)
        assert device.used_bytes == PAGE
        device.write_staging(staging, 1, b"yz")
        assert (staging.nbytes, device.used_bytes) == (5, PAGE)
        segment = device.adopt(staging, 0, 1, b"s" * (PAGE + 1))
        assert device.used_bytes == PAGE + 2 * PAGE
        other = device.create(1, 1, TAG)
        assert device.used_bytes == 3 * PAGE + SEGMENT_BYTES
        device.free(segment)
        assert device.used_bytes == SEGMENT_BYTES
        device.free(other)
        assert device.used_bytes == 0

    def test_files_survive_a_close(self, opener: Opener) -> None:
        device = opener()
        if not (device.info.is_persistent or self.is_kept):
            device.close()
            return  # see test_what_survives_a_close
        device.create(7, 11, TAG)
        make_file(device, b"file" * 1000, 8, 12, b"sidecar")
        staging = device.create_staging("lost")
        device.write_staging(staging, 0, b"x" * 5000)
        device.persist_names()
        used = device.used_bytes
        device.close()

        device = opener()
        assert used == SEGMENT_BYTES + 2 * PAGE + 2 * PAGE
        assert device.reap_staging() == (0 if self.is_kept else 1)
        names = [name for name in device.segments() if name.is_file]
        assert names == [SegmentName(8, 12, True, 4000)]
        file = device.attach(names[0])
        assert device.read(file, 0, 5000) == b"file" * 1000
        device.free(file)
        assert device.used_bytes in (0, SEGMENT_BYTES)  # memory knows a segment once persisted
        device.close()
