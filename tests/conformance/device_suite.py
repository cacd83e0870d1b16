"""What every device must do, as tests.

A new device is finished when a subclass of DeviceSuite passes, or of FilelessSuite if it takes no
files: give it an `opener`. Each test names a sentence of kvfs.devices.base.
"""

import errno
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from typing import ClassVar

import numpy as np
import pytest

from kvfs import _native
from kvfs.devices.base import Device, SegmentName, Staging, slot_count_of
from kvfs.errors import ClosedError, NoSpaceError
from kvfs.units import KIB, PAGE
from tests.conformance.file_suite import FileSuite
from tests.conformance.growth_suite import GrowthSuite
from tests.conformance.helpers import (
    CAPACITY_BYTES,
    DEVICE_UUID,
    OTHER_TAG,
    SEGMENT_BYTES,
    TAG,
    Opener,
    make_file,
    name_of,
    put,
    random_bytes,
)


class SegmentSuite:
    """What every device must do, with files or without.

    Subclasses give `opener`: a fixture that returns a function (capacity_bytes=...) -> Device.

    For a persistent device, and one that `is_kept`, a second call, after close, opens the same
    medium; but staging files of memory are not kept.
    """

    is_kept: ClassVar[bool] = False  # memory that its next owner gets
    tells_copies: ClassVar[bool] = True  # by its location, if it is persistent

    @pytest.fixture
    def opener(self) -> Opener:
        raise NotImplementedError

    @pytest.fixture
    def device(self, opener: Opener) -> Iterator[Device]:
        device = opener()
        yield device
        device.close()

    # --- info

    def test_info_is_what_was_asked_for(self, device: Device) -> None:
        info = device.info
        assert (info.index, info.uuid, info.name) == (3, DEVICE_UUID, "subject")
        assert (info.capacity_bytes, info.segment_bytes) == (CAPACITY_BYTES, SEGMENT_BYTES)
        assert info.slot_count == slot_count_of(CAPACITY_BYTES, SEGMENT_BYTES)
        assert info.write_atomic_bytes % 8 == 0

    def test_location_stays(self, opener: Opener) -> None:
        locations = set()
        for _ in range(2):
            device = opener()
            locations.add(device.location())
            tells = device.info.is_persistent and self.tells_copies
            assert tells == (device.location() != 0)
            device.close()
        assert len(locations) == 1

    # --- superblock

    def test_a_device_never_formatted_has_no_superblock(self, device: Device) -> None:
        assert device.read_superblock() is None

    def test_the_newest_superblock_is_read(self, device: Device) -> None:
        for seed, nbytes in ((1, 8192), (2, 4096), (3, 12288)):
            device.write_superblock(random_bytes(nbytes, seed))
            assert device.read_superblock() == random_bytes(nbytes, seed)
        assert device.used_bytes == 0

    # --- log segments

    def test_a_fresh_segment_is_whole_and_zero(self, device: Device) -> None:
        segment = device.create(0, 1, TAG)
        assert (segment.slot, segment.generation, segment.is_file) == (0, 1, False)
        assert segment.device_index == device.info.index
        assert segment.nbytes == SEGMENT_BYTES
        assert segment.fd >= 0 or segment.address
        assert segment.fd < 0 or os.fstat(segment.fd).st_size == SEGMENT_BYTES
        assert device.read(segment, 0, SEGMENT_BYTES) == bytes(SEGMENT_BYTES)
        assert device.segments() == [SegmentName(0, 1, False, SEGMENT_BYTES)]
        assert device.used_bytes == SEGMENT_BYTES

    def test_space_is_reserved(self, device: Device) -> None:
        segment = device.create(0, 1, TAG)
        if segment.fd >= 0:  # else the device reserved it when it was opened
            assert os.fstat(segment.fd).st_blocks * 512 >= SEGMENT_BYTES

    def test_payloads_are_hashed_and_zero_filled(self, device: Device) -> None:
        segment = device.create(0, 1, TAG)
        put(device, segment, (0, b"\xff" * 16384))
        payloads = [(0, random_bytes(1, 1)), (PAGE, random_bytes(PAGE + 1, 2))]
        payloads.append((SEGMENT_BYTES - 8192, random_bytes(8192, 3)))
        before = device.bytes_written
        assert put(device, segment, *payloads) == (0, [0, 0, 0])
        assert device.bytes_written - before == PAGE + 2 * PAGE + 8192
        for offset, data in payloads:
            padded = data + bytes(-len(data) % PAGE)
            assert device.read(segment, offset, len(padded)) == padded
        assert device.read(segment, 3 * PAGE, PAGE) == b"\xff" * PAGE

    def test_descriptor_and_address_show_the_payload(self, device: Device) -> None:
        segment = device.create(0, 1, TAG)
        data = random_bytes(PAGE)
        put(device, segment, (PAGE, data))
        if segment.fd >= 0:
            with mmap.mmap(segment.fd, SEGMENT_BYTES, prot=mmap.PROT_READ) as view:
                assert view[PAGE : 2 * PAGE] == data
        if segment.address:
            lengths = np.array([PAGE], np.uint64)
            source = np.array([segment.address + PAGE], np.uint64)
            digest = np.frombuffer(_native.xxh3_128(data), np.uint8)
            assert _native.verify(source, lengths, digest, np.zeros(1, np.int32)) == 0

    def test_an_unreadable_source_fails_alone(self, device: Device) -> None:
        segment = device.create(0, 1, TAG)
        good = random_bytes(PAGE)
        fd = os.memfd_create("truncated")
        os.ftruncate(fd, PAGE)
        with mmap.mmap(fd, PAGE) as gone:
            os.ftruncate(fd, 0)  # whoever touches the map now gets SIGBUS
            failed, statuses = put(device, segment, (0, gone), (PAGE, good))
        os.close(fd)
        assert failed == 1
        assert statuses[0] != 0
        assert statuses[1] == 0
        assert device.read(segment, PAGE, PAGE) == good
        assert device.bytes_written == PAGE

    def test_stray_payloads_are_caught(self, device: Device) -> None:
        segment = device.create(0, 1, TAG)
        for offset, nbytes in ((1, 1), (SEGMENT_BYTES - PAGE, PAGE + 1), (SEGMENT_BYTES + PAGE, 1)):
            with pytest.raises(AssertionError):
                put(device, segment, (offset, bytes(nbytes)))
        assert device.bytes_written == 0

    def test_an_empty_batch_is_fine(self, device: Device) -> None:
        assert put(device, device.create(0, 1, TAG)) == (0, [])

    def test_tail_distances_count_from_the_end(self, device: Device) -> None:
        segment = device.create(0, 1, TAG)
        device.write_tail(segment, 4096, b"open".ljust(4096, b"o"))
        device.write_tail(segment, 8192, b"seal".ljust(4096, b"s"))
        device.write_tail(segment, 8192 + 128, b"entry".ljust(128, b"e"))
        tail = device.read_tail(segment, 8192 + 128)
        assert tail[:5] == b"entry"
        assert tail[128:132] == b"seal"
        assert tail[-4096:-4092] == b"open"
        assert device.read(segment, SEGMENT_BYTES - 4096, 4) == b"open"
        assert len(device.read_tail(segment, 2 * SEGMENT_BYTES)) == SEGMENT_BYTES
        assert device.bytes_written == 4096 + 4096 + 128
        for distance in (10, SEGMENT_BYTES + PAGE):
            with pytest.raises(AssertionError):
                device.write_tail(segment, distance, b"x" * 11)

    def test_next_data_never_skips_data(self, device: Device) -> None:
        segment = device.create(0, 1, TAG)
        put(device, segment, (64 * KIB, b"d" * PAGE))
        device.write_tail(segment, PAGE, b"t" * PAGE)
        assert device.next_data(segment, 0) <= 64 * KIB
        assert device.next_data(segment, 64 * KIB) == 64 * KIB
        assert device.next_data(segment, 68 * KIB) <= SEGMENT_BYTES - PAGE
        assert device.next_data(segment, SEGMENT_BYTES - 1) == SEGMENT_BYTES - 1
        assert device.next_data(segment, SEGMENT_BYTES) == SEGMENT_BYTES

    def test_reads_end_at_the_end(self, device: Device) -> None:
        segment = device.create(0, 1, TAG)
        put(device, segment, (SEGMENT_BYTES - PAGE, b"z" * PAGE))
        device.persist(segment)
        for uncached in (False, True):
            assert device.read(segment, SEGMENT_BYTES - 10, 100, uncached=uncached) == b"z" * 10
            assert device.read(segment, SEGMENT_BYTES, 100, uncached=uncached) == b""
            assert device.read(segment, 0, 0, uncached=uncached) == b""

    @pytest.mark.parametrize(("offset", "nbytes"), [(0, 1), (3, 5000), (4096, 4096), (4095, 2)])
    def test_uncached_reads_are_the_same_bytes(
        self, device: Device, offset: int, nbytes: int
    ) -> None:
        segment = device.create(0, 1, TAG)
        data = random_bytes(16384)
        put(device, segment, (0, data))
        for persisted in (False, True):
            if persisted:
                device.persist(segment)
            read = device.read(segment, offset, nbytes, uncached=True)
            assert read == data[offset : offset + nbytes]

    @pytest.mark.parametrize("uncached", [False, True])
    def test_ranges_are_read_as_one_batch(self, device: Device, uncached: bool) -> None:
        data = [random_bytes(SEGMENT_BYTES // 2, seed) for seed in (1, 2)]
        segments = [device.create(slot, 1, TAG) for slot in range(2)]
        for segment, payload in zip(segments, data, strict=True):
            put(device, segment, (PAGE, payload))
        which = np.array([1, 0, 1, 0, 0], np.intp)
        offsets = np.array([PAGE, 3 * PAGE, PAGE + 3, PAGE, SEGMENT_BYTES - 8], np.uint64)
        lengths = np.array([SEGMENT_BYTES // 2, 2 * PAGE, 70_001, 0, 9], np.uint64)
        wanted = [data[1], data[0][2 * PAGE : 4 * PAGE], data[1][3:70_004], b""]
        for shift in (0, 5):  # aligned targets and others
            with mmap.mmap(-1, SEGMENT_BYTES + shift) as memory:
                target = np.frombuffer(memory, np.uint8)
                starts = np.cumsum(lengths) - lengths + np.uint64(shift)
                digests = np.zeros((5, 16), np.uint8)
                for i, part in enumerate(wanted):
                    digests[i] = np.frombuffer(_native.xxh3_128(part), np.uint8)
                statuses = np.full(5, 99, np.int32)
                digests[1] ^= 1
                failed = device.read_payloads(
                    segments, which, offsets, lengths, starts + np.uint64(target.ctypes.data),
                    digests, statuses, uncached=uncached,
                )  # fmt: skip
                assert (failed, list(statuses)) == (2, [0, 1, 0, 0, 2])
                for start, part in zip(starts.tolist(), wanted, strict=False):
                    assert target[start : start + len(part)].tobytes() == part
                del target

    def test_a_map_shows_what_was_written_since(self, device: Device) -> None:
        segment = device.create(0, 1, TAG)
        if segment.fd < 0:
            return  # `address` is the memory itself
        with mmap.mmap(segment.fd, SEGMENT_BYTES, prot=mmap.PROT_READ) as view:
            for seed in (1, 2):
                data = random_bytes(3 * PAGE, seed)
                put(device, segment, (PAGE, data))
                assert view[PAGE : 4 * PAGE] == data
                assert device.read(segment, PAGE, 3 * PAGE, uncached=True) == data

    # --- names and generations

    def test_a_name_in_use_is_refused(self, device: Device) -> None:
        device.create(4, 2, TAG)
        with pytest.raises(FileExistsError):
            device.create(4, 2, TAG)
        assert device.used_bytes == SEGMENT_BYTES

    def test_a_slot_lives_again_under_another_generation(self, device: Device) -> None:
        first = device.create(4, 2, TAG)
        put(device, first, (0, b"old" * 1000))
        device.free(first)
        second = device.create(4, 3, OTHER_TAG)
        assert device.segments() == [SegmentName(4, 3, False, SEGMENT_BYTES)]
        assert device.read(second, 0, SEGMENT_BYTES) == bytes(SEGMENT_BYTES)

    def test_the_same_tag_sees_zeros_or_its_own_former_life(self, device: Device) -> None:
        first = device.create(0, 1, TAG)
        put(device, first, (0, b"mine" * 1024))
        device.free(first)
        found = device.read(device.create(1, 2, TAG), 0, 4096)
        assert found in (bytes(4096), b"mine" * 1024)

    def test_no_other_tag_ever_sees_former_bytes(self, device: Device) -> None:
        count = CAPACITY_BYTES // SEGMENT_BYTES
        old = [device.create(slot, 1, TAG) for slot in range(count)]
        for segment in old:
            put(device, segment, (0, b"secret" * 1000))
            device.write_tail(segment, 6, b"secret")
        for segment in old:
            device.free(segment)
        for slot in range(count):
            segment = device.create(slot, 2, OTHER_TAG)
            assert device.read(segment, 0, SEGMENT_BYTES) == bytes(SEGMENT_BYTES)

    def test_the_last_slot_works(self, device: Device) -> None:
        last = device.info.slot_count - 1
        segment = device.create(last, 0xFFFFFFFF, TAG)
        assert device.segments() == [SegmentName(last, 0xFFFFFFFF, False, SEGMENT_BYTES)]
        device.free(segment)
        with pytest.raises(AssertionError):
            device.create(last + 1, 1, TAG)

    # --- capacity

    def test_the_capacity_is_hard(self, device: Device) -> None:
        count = CAPACITY_BYTES // SEGMENT_BYTES
        segments = [device.create(slot, 1, TAG) for slot in range(count)]
        assert device.used_bytes == CAPACITY_BYTES
        with pytest.raises(NoSpaceError, match=r"subject: 8.0 MiB of 8.0 MiB used, 1.0 MiB more"):
            device.create(count, 1, TAG)
        assert device.used_bytes == CAPACITY_BYTES
        assert len(device.segments()) == count
        device.free(segments[0])
        device.create(count, 1, TAG)
        with pytest.raises(NoSpaceError):
            device.create(count + 1, 1, TAG)

    def test_used_bytes_follows_segments(self, device: Device) -> None:
        assert device.used_bytes == 0
        segments = [device.create(slot, 1, TAG) for slot in range(2)]
        assert device.used_bytes == 2 * SEGMENT_BYTES
        for segment in segments:
            device.free(segment)
        assert device.used_bytes == 0

    # --- free, release, attach

    def test_free_twice_gives_back_once(self, device: Device) -> None:
        first, second = device.create(0, 1, TAG), device.create(1, 1, TAG)
        device.free(first)
        device.free(first)
        device.release(first)
        assert device.used_bytes == SEGMENT_BYTES
        assert device.segments() == [name_of(second)]
        with pytest.raises(ClosedError):
            device.read(first, 0, 1)

    def test_a_map_outlives_the_free_of_another_segment(self, device: Device) -> None:
        kept, freed = device.create(0, 1, TAG), device.create(1, 1, TAG)
        put(device, kept, (0, b"k" * PAGE))
        if kept.fd >= 0:
            with mmap.mmap(kept.fd, PAGE, prot=mmap.PROT_READ) as view:
                device.free(freed)
                device.create(2, 2, TAG)
                assert view[:] == b"k" * PAGE
        else:  # who reads at the address
            device.free(freed)
            device.create(2, 2, TAG)
            digest = np.frombuffer(_native.xxh3_128(b"k" * PAGE), np.uint8)
            source, length = np.array([kept.address], np.uint64), np.array([PAGE], np.uint64)
            assert _native.verify(source, length, digest, np.zeros(1, np.int32)) == 0

    def test_release_keeps_the_segment(self, device: Device) -> None:
        segment = device.create(0, 1, TAG)
        put(device, segment, (0, b"kept" * 1024))
        device.write_tail(segment, 4, b"tail")
        device.release(segment)
        device.release(segment)
        with pytest.raises(ClosedError):
            device.read(segment, 0, 4)
        assert device.used_bytes == SEGMENT_BYTES
        (name,) = device.segments()
        again = device.attach(name)
        assert device.read(again, 0, 4096) == b"kept" * 1024
        assert device.read_tail(again, 4) == b"tail"
        assert again.nbytes == SEGMENT_BYTES
        assert put(device, again, (0, b"more")) == (0, [0])  # an unsealed segment is resumed
        device.write_tail(again, 4, b"next")
        device.persist(again)
        assert device.read(again, 0, 4) == b"more"
        assert device.read_tail(again, 4) == b"next"
        device.free(again)
        assert (device.used_bytes, device.segments()) == (0, [])

    def test_a_released_segment_can_be_freed(self, device: Device) -> None:
        segment = device.create(0, 1, TAG)
        device.release(segment)
        device.free(segment)
        assert (device.used_bytes, device.segments()) == (0, [])

    def test_attach_of_nothing_fails(self, device: Device) -> None:
        for is_file in (False, True):
            with pytest.raises(FileNotFoundError):
                device.attach(SegmentName(1, 1, is_file, 0))

    # --- surviving a close

    def test_what_survives_a_close(self, opener: Opener) -> None:
        device = opener()
        survives = device.info.is_persistent or self.is_kept
        device.close()
        if survives:
            self.check_that_segments_survive(opener)
        else:
            self.check_that_nothing_survives(opener)

    def check_that_segments_survive(self, opener: Opener) -> None:
        device = opener()
        log = device.create(7, 11, TAG)
        put(device, log, (0, b"log" * 1000))
        device.write_tail(log, 3, b"end")
        device.persist(log)
        device.write_superblock(b"superblock")
        device.persist_names()
        device.close()

        device = opener()
        assert device.used_bytes == SEGMENT_BYTES
        assert device.bytes_written == 0
        assert device.read_superblock() == b"superblock"
        assert device.reap_staging() == 0
        names = device.segments()
        assert names == [SegmentName(7, 11, False, SEGMENT_BYTES)]
        log = device.attach(names[0])
        assert device.read(log, 0, 3000) == b"log" * 1000
        assert device.read_tail(log, 3) == b"end"
        device.free(log)
        assert (device.used_bytes, device.segments()) == (0, [])
        device.persist_names()
        device.close()
        device = opener()
        assert (device.used_bytes, device.segments()) == (0, [])
        device.close()

    def check_that_nothing_survives(self, opener: Opener) -> None:
        device = opener()
        put(device, device.create(0, 1, TAG), (0, b"secret" * 1000))
        device.write_superblock(b"superblock")
        device.close()
        device = opener()
        assert (device.read_superblock(), device.segments(), device.used_bytes) == (None, [], 0)
        assert device.read(device.create(0, 1, TAG), 0, PAGE) == bytes(PAGE)
        device.close()

    def test_destroy_leaves_nothing(self, opener: Opener) -> None:
        device = opener()
        device.write_superblock(b"superblock")
        put(device, device.create(0, 1, TAG), (0, b"x"))
        if device.info.takes_files:
            make_file(device, b"file")
            device.create_staging("s")
        device.destroy()
        with pytest.raises(ClosedError):
            device.segments()
        device.close()
        device = opener()
        assert (device.read_superblock(), device.segments(), device.used_bytes) == (None, [], 0)
        device.close()

    def test_close_is_idempotent_and_final(self, opener: Opener) -> None:
        device = opener()
        segment, staging = device.create(0, 1, TAG), Staging("s", -1, 0)
        if device.info.takes_files:
            staging = device.create_staging("s")
        before = len(os.listdir("/proc/self/fd"))
        device.close()
        device.close()
        assert len(os.listdir("/proc/self/fd")) < before
        device.release(segment)
        calls: list[Callable[[], object]] = [
            device.read_superblock, lambda: device.write_superblock(b"x"), device.segments,
            lambda: device.create(1, 1, TAG), lambda: device.attach(SegmentName(0, 1, False, 1)),
            lambda: put(device, segment, (0, b"x")), lambda: device.write_tail(segment, 1, b"x"),
            lambda: device.read_tail(segment, 1), lambda: device.next_data(segment, 0),
            lambda: device.persist(segment), device.persist_names, lambda: device.free(segment),
            lambda: device.read(segment, 0, 1), lambda: device.create_staging("t"),
            lambda: device.write_staging(staging, 0, b"x"),
            lambda: device.resize_staging(staging, 1), lambda: device.persist_staging(staging),
            lambda: device.adopt(staging, 0, 2, b""), lambda: device.drop_staging(staging),
            device.reap_staging, device.destroy,
        ]  # fmt: skip
        for call in calls:
            with pytest.raises(ClosedError):
                call()

    # --- threads

    def test_writers_of_different_segments_do_not_disturb_each_other(self, device: Device) -> None:
        count, rounds = 4, 12
        errors: list[BaseException] = []
        barrier = threading.Barrier(count)

        def work(number: int) -> None:
            try:
                barrier.wait(30)
                for turn in range(rounds):
                    data = random_bytes(5 * PAGE, number * 100 + turn)
                    segment = device.create(number, turn + 1, TAG)
                    put(device, segment, (0, data), (8 * PAGE, data[: PAGE + 7]))
                    device.write_tail(segment, 128, data[:128])
                    device.persist(segment)
                    if device.info.takes_files:
                        staging = device.create_staging(f"s{number}")
                        device.write_staging(staging, 0, data)
                        file = device.adopt(staging, count + number, turn + 1, data[:100])
                        assert device.read(file, 0, len(data)) == data
                        device.free(file)
                    assert device.read(segment, 0, len(data)) == data
                    assert device.read_tail(segment, 128) == data[:128]
                    device.free(segment)
            except BaseException as error:  # noqa: BLE001
                errors.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not errors
        assert (device.used_bytes, device.segments()) == (0, [])
        each = 5 * PAGE + 2 * PAGE + 128
        each += 5 * PAGE + 100 if device.info.takes_files else 0
        assert device.bytes_written == count * rounds * each

    def test_threads_racing_for_the_last_space_never_exceed_it(self, device: Device) -> None:
        count = CAPACITY_BYTES // SEGMENT_BYTES
        outcomes: list[str] = []
        barrier = threading.Barrier(4)

        def work(number: int) -> None:
            barrier.wait(30)
            for turn in range(count):
                try:
                    device.create(number * count + turn, 1, TAG)
                    outcomes.append("made")
                except NoSpaceError:
                    outcomes.append("full")
                except OSError as error:
                    outcomes.append(errno.errorcode[error.errno or 0])

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert sorted(outcomes) == ["full"] * (3 * count) + ["made"] * count
        assert device.used_bytes == CAPACITY_BYTES


class DeviceSuite(SegmentSuite, FileSuite, GrowthSuite):
    """A device that takes files."""


class FilelessSuite(SegmentSuite):
    """A device that takes none, and says so."""

    def test_files_are_refused(self, device: Device) -> None:
        assert not device.info.takes_files
        assert (device.reap_staging(), device.raw_files()) == (0, [])
        staging = Staging("s", -1, 0)
        calls: list[Callable[[], object]] = [
            lambda: device.create_staging("s"), lambda: device.write_staging(staging, 0, b"x"),
            lambda: device.resize_staging(staging, 1), lambda: device.persist_staging(staging),
            lambda: device.reserve_staging(staging, 1), lambda: device.settle_staging(staging),
            lambda: device.seal_staging(staging, is_shared=False),
            lambda: device.adopt(staging, 0, 1, b""), lambda: device.drop_staging(staging),
            lambda: device.keep_raw(staging, 1), lambda: device.open_raw(1),
            lambda: device.release_raw(staging),
        ]  # fmt: skip
        for call in calls:
            with pytest.raises(OSError, match="not supported"):
                call()
