"""The DAX device: header, bad memory, and what it is opened on."""

import errno
import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from unittest import mock
from uuid import UUID

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfs import _native
from kvfs.devices import dax_layout as layout
from kvfs.devices.base import Segment
from kvfs.devices.dax import DaxDevice
from kvfs.devices.dax_memory import DaxMemory
from kvfs.devices.dax_source import DaxSource, open_source, size_of
from kvfs.devices.deep_flush import DeepFlush
from kvfs.errors import BusyError, CorruptionError, NoSpaceError, NotFoundError, UsageError
from kvfs.units import MIB, PAGE

_DEVICE = UUID(int=7)
_PLACES = 4


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "device"
    with path.open("wb") as file:
        file.truncate(layout.HEADER_BYTES + _PLACES * MIB)
    return path


def opened(path: Path | str, source: DaxSource | None = None) -> DaxDevice:
    return DaxDevice(
        source or open_source(str(path)), index=1, uuid=_DEVICE, capacity_bytes=_PLACES * MIB,
        segment_bytes=MIB, name="pm0",
    )  # fmt: skip


def put(device: DaxDevice, segment: Segment, offset: int, data: bytes) -> int:
    source = np.frombuffer(data, np.uint8)
    return device.write_payloads(
        segment, np.array([offset], np.uint64), np.array([source.ctypes.data], np.uint64),
        np.array([len(data)], np.uint64), np.zeros((1, 16), np.uint8), np.zeros(1, np.int32),
    )  # fmt: skip


# --- the header


@given(st.integers(0, 7000), st.integers(0, (1 << 24) - 1), st.integers(0, (1 << 32) - 1),
       st.integers(0, 63), st.integers(1, 255))  # fmt: skip
def test_a_torn_label_is_a_free_place(
    place: int, slot: int, generation: int, where: int, change: int
) -> None:
    raw = layout.encode_label(_DEVICE, place, slot, generation)
    assert len(raw) == layout.LABEL_BYTES
    assert layout.decode_label(_DEVICE, place, raw) == (slot, generation)
    assert layout.decode_label(_DEVICE, place + 1, raw) is None
    assert layout.decode_label(UUID(int=8), place, raw) is None
    torn = bytearray(raw)
    torn[where] ^= change
    assert layout.decode_label(_DEVICE, place, bytes(torn)) is None


@given(st.lists(st.tuples(st.integers(0, 1 << 40), st.integers(1, 1 << 20)), max_size=50))
def test_bad_ranges_come_back(ranges: list[layout.Range]) -> None:
    merged = layout.merged(ranges)
    assert all(sum(a) < b[0] for a, b in pairwise(merged))
    for offset, nbytes in ranges:
        assert any(start <= offset and offset + nbytes <= start + n for start, n in merged)
    raw = layout.encode_bad(merged)
    assert layout.decode_bad(raw.ljust(layout.BAD_BYTES, b"\0")) == merged
    assert layout.decode_bad(bytes(layout.BAD_BYTES)) == []


@pytest.mark.parametrize("number", range(layout.BAD_COPIES))
def test_a_torn_table_of_bad_ranges_is_not_the_only_one(
    path: Path, number: int, expected_warnings: list[str]
) -> None:
    """A power cut while a range is added takes none of those that were known."""
    expected_warnings.append("memory is bad")
    device = opened(path)
    segment = device.create(0, 1, b"a")
    bad = [(layout.HEADER_BYTES, PAGE)]
    with mock.patch.object(DaxMemory, "faults", return_value=bad):
        device.note_bad(segment, 0, PAGE)
    device.close()
    with path.open("r+b") as file:
        file.seek(layout.BAD_OFFSET + number * layout.BAD_BYTES)
        file.write(layout.encode_bad([*bad, (layout.HEADER_BYTES + MIB, PAGE)])[:16])
    device = opened(path)
    assert device.bad_ranges == bad
    device.close()


def test_the_header_has_room_for_what_is_in_it() -> None:
    assert layout.COPIES * layout.COPY_BYTES == layout.LABELS_OFFSET
    assert layout.LABELS_OFFSET + layout.PLACES_MAX * layout.LABEL_BYTES <= layout.BAD_OFFSET
    many = [(2 * i * PAGE, PAGE) for i in range(layout.BAD_RANGES_MAX + 5)]
    raw = layout.encode_bad(many)
    assert len(raw) <= layout.BAD_BYTES
    assert layout.decode_bad(raw.ljust(layout.BAD_BYTES, b"\0")) == many[:-5]


def damage(path: Path, *copies: int) -> None:
    with path.open("r+b") as file:
        for number in copies:
            file.seek(number * layout.COPY_BYTES + PAGE)
            file.write(b"damaged")


def copy_of(path: Path, number: int, raw: bytes | None = None) -> bytes:
    """Return a copy's area; put `raw` there first."""
    with path.open("r+b") as file:
        file.seek(number * layout.COPY_BYTES)
        if raw is not None:
            file.write(raw)
            file.seek(number * layout.COPY_BYTES)
        return file.read(layout.COPY_BYTES)


@pytest.mark.parametrize("left", [(0, 1), (2, 3), (0, 3), (1, 2)])
def test_any_two_copies_have_the_newest(path: Path, left: tuple[int, int]) -> None:
    device = opened(path)
    device.write_superblock(b"first" * 1000)
    old = copy_of(path, 0)
    device.write_superblock(b"second" * 1000)
    device.close()
    copy_of(path, left[0], old)  # one of four may have missed the last write
    damage(path, *set(range(4)) - set(left))
    device = opened(path)
    assert device.read_superblock() == b"second" * 1000
    device.write_superblock(b"third")  # makes all four whole again
    device.close()
    damage(path, 0, 2)
    device = opened(path)
    assert device.read_superblock() == b"third"
    device.close()


def test_one_copy_is_too_few(path: Path) -> None:
    device = opened(path)
    device.write_superblock(b"superblock")
    device.close()
    damage(path, 0, 1, 3)
    device = opened(path)
    with pytest.raises(CorruptionError, match="at least 2 of 4 copies that hold, found 1"):
        device.read_superblock()
    device.close()


@pytest.mark.parametrize("whole", [0, 1])
@pytest.mark.parametrize("torn_bytes", [0, 8, 16, PAGE])
def test_a_crash_in_the_first_write_leaves_a_device_never_formatted(
    path: Path, whole: int, torn_bytes: int
) -> None:
    device = opened(path)
    device.write_superblock(b"first")
    for number in range(whole, 4):
        kept = copy_of(path, number)[: torn_bytes if number == whole else 0]
        copy_of(path, number, kept.ljust(layout.COPY_BYTES, b"\0"))
    assert device.read_superblock() is None
    device.write_superblock(b"again")
    assert device.read_superblock() == b"again"
    device.close()


def test_what_was_never_a_superblock_is_a_device_never_formatted(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(os.urandom(layout.HEADER_BYTES))
    device = opened(path)
    assert (device.read_superblock(), device.segments(), device.bad_ranges) == (None, [], [])
    device.write_superblock(b"first")
    assert device.read_superblock() == b"first"
    device.close()


def test_a_write_that_was_not_finished_is_followed_by_a_newer_one(path: Path) -> None:
    device = opened(path)
    device.write_superblock(b"old")
    old = [copy_of(path, number) for number in range(4)]
    device.write_superblock(b"torn")
    device.close()
    for number in (1, 2, 3):
        copy_of(path, number, old[number])
    device = opened(path)
    assert device.read_superblock() == b"torn"
    device.write_superblock(b"new")
    device.close()
    damage(path, 1, 2)
    device = opened(path)
    assert device.read_superblock() == b"new"
    device.close()


def test_a_superblock_that_does_not_fit_is_refused(path: Path) -> None:
    device = opened(path)
    device.write_superblock(b"x" * layout.SUPERBLOCK_BYTES_MAX)
    with pytest.raises(OSError, match="too many namespaces"):
        device.write_superblock(b"x" * (layout.SUPERBLOCK_BYTES_MAX + 1))
    assert device.read_superblock() == b"x" * layout.SUPERBLOCK_BYTES_MAX
    device.close()


def test_the_platform_is_flushed_after_a_superblock(path: Path, tmp_path: Path) -> None:
    flush = tmp_path / "deep_flush"
    flush.write_text("1\n")
    found = open_source(str(path))
    device = opened(
        path,
        DaxSource(found.fd, found.nbytes, "memory_controller", False, deep_flush=DeepFlush(flush)),
    )
    flush.write_text("")
    device.persist_names()
    assert flush.read_text() == ""
    device.write_superblock(b"x")
    assert flush.read_text() == "1"
    assert (device.info.persistence, device.location()) == ("memory_controller", 0)
    device.close()


# --- bad memory


@pytest.fixture
def memfd() -> Iterator[str]:
    fd = os.memfd_create("kvfs-dax")
    os.truncate(fd, layout.HEADER_BYTES + _PLACES * MIB)
    yield f"/proc/self/fd/{fd}"
    os.close(fd)


def poison_or_skip(address: int) -> None:
    try:
        _native.poison(address, PAGE)
    except OSError as error:
        pytest.skip(f"no UFFDIO_POISON: {error}")


def test_a_poisoned_page_costs_its_bytes_and_then_its_place(
    memfd: str, expected_warnings: list[str]
) -> None:
    expected_warnings.append("memory is bad: pm0")
    device = opened(memfd)
    segment, other = device.create(0, 1, b"a"), device.create(1, 1, b"a")
    for one in (segment, other):
        assert put(device, one, 0, b"d" * 8 * PAGE) == 0
    poison_or_skip(segment.address + 2 * PAGE)
    with pytest.raises(OSError, match="memory fault"):
        device.read(segment, 0, 8 * PAGE)
    start = layout.HEADER_BYTES
    assert device.bad_ranges == [(start + 2 * PAGE, PAGE)]
    assert device.bad_bytes == PAGE
    assert device.read(segment, 3 * PAGE, PAGE) == b"d" * PAGE
    assert device.read(other, 0, 8 * PAGE) == b"d" * 8 * PAGE
    assert device.used_bytes == 2 * MIB
    device.free(segment)
    assert device.used_bytes == 2 * MIB, "the place is used up"
    fresh = [device.create(slot, 2, b"a") for slot in (2, 3)]
    with pytest.raises(NoSpaceError):
        device.create(4, 2, b"a")
    assert all(device.read(one, 0, MIB) == bytes(MIB) for one in fresh)
    device.close()
    device = opened(memfd)  # a new map is not poisoned; what was found stays known
    assert device.bad_ranges == [(start + 2 * PAGE, PAGE)]
    assert device.used_bytes == 4 * MIB
    device.close()


def test_memory_that_is_gone_fails_writes_and_is_not_given_out(
    path: Path, expected_warnings: list[str]
) -> None:
    expected_warnings.append("memory is bad: pm0")
    device = opened(path)
    segments = [device.create(slot, 1, b"a") for slot in range(_PLACES)]
    os.truncate(path, layout.HEADER_BYTES + 2 * MIB + PAGE)
    assert put(device, segments[1], 0, b"x" * PAGE) == 0
    assert put(device, segments[2], 0, b"x" * 2 * PAGE) == 1
    with pytest.raises(OSError, match="memory fault"):
        device.write_tail(segments[3], PAGE, b"x")
    for segment in segments:
        device.free(segment)
    assert device.used_bytes == 2 * MIB
    device.close()


def test_a_fresh_segment_passes_bad_places_by(path: Path, expected_warnings: list[str]) -> None:
    expected_warnings.append("memory is bad: pm0")
    device = opened(path)
    os.truncate(path, layout.HEADER_BYTES + MIB)
    segment = device.create(0, 1, b"a")
    with pytest.raises(NoSpaceError, match="the places left are bad"):
        device.create(1, 1, b"a")
    assert device.used_bytes == 4 * MIB
    assert len(device.segments()) == 1
    device.free(segment)
    assert device.used_bytes == 3 * MIB
    device.create(2, 2, b"a")
    device.close()


def test_ranges_the_kernel_knows_are_not_given_out(path: Path) -> None:
    found = open_source(str(path))
    bad = ((layout.HEADER_BYTES + 2 * MIB - 512, 1024), (0, 512))
    device = opened(path, DaxSource(found.fd, found.nbytes, "none", True, bad=bad))
    assert device.used_bytes == 2 * MIB
    segments = [device.create(slot, 1, b"a") for slot in range(2)]
    with pytest.raises(NoSpaceError):
        device.create(2, 1, b"a")
    first = segments[0].address
    assert segments[1].address == first + 3 * MIB
    assert not device.info.is_persistent
    device.close()


# --- what it is opened on


def fake_device(tmp_path: Path, **region: str) -> Path:
    """Make a sysfs that takes /dev/full for a DAX device; return its root."""
    status = os.stat("/dev/full")
    device = tmp_path / "devices/region0/dax0.0"
    device.mkdir(parents=True)
    for name, text in {"size": "4194304", "align": "2097152", "resource": "0x101000000"}.items():
        (device / name).write_text(f"{text}\n")
    for name, text in region.items():
        (tmp_path / "devices/region0" / name).write_text(f"{text}\n")
    link = tmp_path / "dev/char" / f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    link.parent.mkdir(parents=True)
    link.symlink_to(device)
    return tmp_path


@pytest.mark.parametrize(
    ("domain", "persistence"),
    [("cpu_cache", "cpu_cache"), ("memory_controller", "memory_controller"), ("", "none")],
)
def test_a_character_device_is_described_by_sysfs(
    tmp_path: Path, domain: str, persistence: str
) -> None:
    sysfs = fake_device(
        tmp_path, persistence_domain=domain, deep_flush="1", resource="0x100000000",
        badblocks="32768 2\n0 1\n40959 4",
    )  # fmt: skip
    assert size_of("/dev/full", sysfs=sysfs) == 4 * MIB
    found = open_source("/dev/full", sysfs=sysfs)
    os.close(found.fd)
    assert (found.nbytes, found.is_file, found.location) == (4 * MIB, False, 0)
    assert (found.persistence, found.is_persistent) == (persistence, bool(domain))
    assert found.deep_flush is not None
    assert found.deep_flush.path == sysfs / "devices/region0/deep_flush"
    assert found.bad == ((0, 1024), (4 * MIB - 512, 512))


def test_memory_without_a_region_is_volatile(tmp_path: Path) -> None:
    found = open_source("/dev/full", sysfs=fake_device(tmp_path))
    os.close(found.fd)
    assert (found.persistence, found.bad, found.deep_flush) == ("none", (), None)
    found = open_source("/dev/full", sysfs=tmp_path, persistence="memory_controller")
    os.close(found.fd)
    assert (found.persistence, found.is_persistent) == ("memory_controller", True)


def test_bad_blocks_of_an_unknown_place_are_left_to_be_met(
    tmp_path: Path, expected_warnings: list[str]
) -> None:
    expected_warnings.append("bad blocks of dax0.0 are not known")
    sysfs = fake_device(tmp_path, persistence_domain="cpu_cache", badblocks="0 1", deep_flush="0")
    found = open_source("/dev/full", sysfs=sysfs)
    os.close(found.fd)
    assert (found.bad, found.deep_flush) == ((), None)


def test_what_is_no_dax_device_is_refused(path: Path, tmp_path: Path) -> None:
    for location, kind, message in (
        (str(tmp_path / "missing"), NotFoundError, "'daxctl list'"),
        (str(tmp_path), UsageError, "use dir:"),
        ("/dev/full", UsageError, "not a DAX device"),
    ):
        with pytest.raises(kind, match=message):
            open_source(location)
    with pytest.raises(UsageError, match="not a DAX device"):
        size_of("/dev/full")
    with pytest.raises(NotFoundError, match="no DAX device"):
        size_of(str(tmp_path / "missing"))
    os.truncate(path, 5 * MIB)
    with pytest.raises(UsageError, match=r"not 2 MiB aligned.*make it 4194304"):
        open_source(str(path))
    os.truncate(path, 4 * MIB)
    with pytest.raises(UsageError, match=r"device too small.*expected at least 6.0 MiB"):
        opened(path)


def test_too_many_places_are_refused(path: Path) -> None:
    os.truncate(path, 64 * MIB)
    with pytest.raises(UsageError, match="too many segments"):
        DaxDevice(
            open_source(str(path)), index=1, uuid=_DEVICE,
            capacity_bytes=(layout.PLACES_MAX + 1) * PAGE, segment_bytes=PAGE, name="pm0",
        )  # fmt: skip


def test_one_owner_at_a_time(path: Path) -> None:
    device = opened(path)
    with pytest.raises(BusyError, match="device is in use"):
        open_source(str(path))
    device.close()
    opened(path).close()


def test_a_files_space_is_taken_when_it_is_opened(path: Path) -> None:
    opened(path).close()
    assert path.stat().st_blocks * 512 >= layout.HEADER_BYTES + _PLACES * MIB


# --- the order in which things reach the medium


def test_a_place_is_free_for_good_before_it_is_filled(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = opened(path)
    segment = device.create(0, 1, b"a")
    put(device, segment, 0, b"old")
    device.free(segment)
    memory = device._memory
    seen: list[tuple[bool, bytes]] = []
    assert memory is not None
    label = (layout.LABELS_OFFSET, layout.LABEL_BYTES)

    def persist() -> None:
        seen.append((any(memory.read(*label)), memory.read(layout.HEADER_BYTES, 3)))

    monkeypatch.setattr(memory, "persist", persist)
    device.create(1, 2, b"a")
    assert seen == [(False, b"old"), (False, bytes(3))]
    device.persist_names()
    assert seen[2:] == [(True, bytes(3))]
    device.close()


def test_labels_that_cannot_be_read_cost_their_places(
    memfd: str, monkeypatch: pytest.MonkeyPatch, expected_warnings: list[str]
) -> None:
    device = opened(memfd)
    device.create(0, 1, b"a")
    device.write_superblock(b"superblock")
    device.close()
    read = DaxMemory.read

    def fail(memory: DaxMemory, offset: int, nbytes: int) -> bytes:
        if layout.LABELS_OFFSET <= offset < layout.HEADER_BYTES:
            raise OSError(errno.EIO, "memory fault")
        return read(memory, offset, nbytes)

    monkeypatch.setattr(DaxMemory, "read", fail)
    expected_warnings.append("labels of pm0 cannot be read, 4 places are lost")
    device = opened(memfd)
    assert device.read_superblock() == b"superblock"
    assert (device.segments(), device.used_bytes) == ([], 4 * MIB)
    with pytest.raises(NoSpaceError):
        device.create(1, 2, b"a")
    device.close()


def test_a_place_whose_label_went_bad_is_passed_by(expected_warnings: list[str]) -> None:
    """One page has the labels of 64 places: the next ones are used, until there are none."""
    expected_warnings += ["is lost: its label cannot be read"]
    fd = os.memfd_create("kvfs-dax")
    os.truncate(fd, layout.HEADER_BYTES + 66 * MIB)
    device = DaxDevice(
        open_source(f"/proc/self/fd/{fd}"), index=1, uuid=_DEVICE, capacity_bytes=66 * MIB,
        segment_bytes=MIB, name="pm0",
    )  # fmt: skip
    first = device.create(0, 1, b"a")
    poison_or_skip(first.address - layout.HEADER_BYTES + layout.LABELS_OFFSET)
    for slot in (1, 2):
        assert put(device, device.create(slot, 1, b"a"), 0, b"data") == 0
    assert device.used_bytes == 66 * MIB
    with pytest.raises(NoSpaceError):
        device.create(3, 1, b"a")
    device.close()
    os.close(fd)


# --- a file whose sync fails


def test_what_a_failed_sync_left_is_synced_by_the_next(path: Path) -> None:
    """The kernel reports a failure once, and takes the pages for written from then on."""
    fails = [OSError(errno.EIO, "injected")]

    def sync(fd: int) -> None:
        if fails:
            raise fails.pop()
        os.fdatasync(fd)

    with path.open("r+b") as file:
        memory = DaxMemory(file.fileno(), 4 * MIB, sync)
        memory.store(3 * PAGE + 100, b"stored")
        memory.zero(MIB, PAGE)
        with mock.patch.object(memory, "touch", wraps=memory.touch) as touch:
            with pytest.raises(OSError, match="injected"):
                memory.persist()
            memory.store(0, b"later")
            memory.persist()
            assert touch.call_args_list == [
                mock.call(3 * PAGE + 100, 6), mock.call(MIB, PAGE), mock.call(0, 5),
            ]  # fmt: skip
            touch.reset_mock()
            memory.store(0, b"again")
            memory.persist()
            touch.assert_not_called()
        assert memory.read(3 * PAGE + 100, 6) == b"stored"
        memory.close()


def test_a_sync_that_fails_again_forgets_nothing(path: Path) -> None:
    fails = [OSError(errno.EIO, "injected"), OSError(errno.EIO, "injected")]
    with path.open("r+b") as file:
        memory = DaxMemory(file.fileno(), 4 * MIB, lambda _fd: raise_one(fails))
        memory.store(PAGE, b"stored")
        for _ in range(2):
            with pytest.raises(OSError, match="injected"):
                memory.persist()
        with mock.patch.object(memory, "touch") as touch:
            memory.persist()
        touch.assert_called_once_with(PAGE, 6)
        memory.close()


def raise_one(failures: list[OSError]) -> None:
    if failures:
        raise failures.pop()
