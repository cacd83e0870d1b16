"""MemoryDevice: frames, tags, seals, and memory that is given back."""

import errno
import mmap
import os
from collections.abc import Iterator
from typing import Any
from uuid import UUID

import pytest

from kvfs.devices.memory import MemoryDevice, available_bytes
from kvfs.errors import NoSpaceError
from kvfs.units import KIB, MIB, PAGE, format_bytes

SEGMENT = 256 * KIB
COUNT = 4


def open_memory(**changes: Any) -> MemoryDevice:
    options: dict[str, Any] = {
        "index": 0, "uuid": UUID(int=1), "capacity_bytes": COUNT * SEGMENT,
        "segment_bytes": SEGMENT, "name": "dram7",
    }  # fmt: skip
    return MemoryDevice(**{**options, **changes})


@pytest.fixture
def device() -> Iterator[MemoryDevice]:
    device = open_memory()
    yield device
    device.close()


def held_bytes() -> int:
    """Return the size of all memfds of the device but its label, as the kernel sees it."""
    found: dict[int, int] = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
            status = os.fstat(int(name))
        except OSError:
            continue
        if "memfd:kvfs-dram7" in target and "-label" not in target:
            found[status.st_ino] = status.st_size
    return sum(found.values())


def test_memory_is_taken_at_open_and_given_back_at_close() -> None:
    device = open_memory()
    assert held_bytes() == COUNT * SEGMENT
    segment = device.create(0, 1, b"a")
    assert os.fstat(segment.fd).st_blocks * 512 == SEGMENT
    assert held_bytes() == COUNT * SEGMENT
    device.close()
    assert held_bytes() == 0


def test_progress_is_told() -> None:
    seen: list[tuple[int, int]] = []
    open_memory(progress=lambda done, total: seen.append((done, total))).close()
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_an_interrupted_open_gives_everything_back() -> None:
    def interrupt(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_memory(progress=interrupt)
    assert held_bytes() == 0


def test_more_than_there_is_is_refused() -> None:
    available = available_bytes()
    asked = 4 * available
    with pytest.raises(NoSpaceError) as caught:
        open_memory(capacity_bytes=asked, segment_bytes=MIB)
    message = str(caught.value)
    assert f"dram7: {format_bytes(asked)} asked for" in message
    assert "available; give the device a smaller size" in message
    assert held_bytes() == 0


def test_a_frame_is_recycled_within_its_tag(device: MemoryDevice) -> None:
    first = device.create(0, 1, b"a")
    device.write_tail(first, PAGE, b"former life")
    fd, address = first.fd, first.address
    device.free(first)
    again = device.create(3, 2, b"a")
    assert (again.fd, again.address) == (fd, address)
    assert device.read(again, SEGMENT - PAGE, 11) == b"former life"


def test_zero_frames_are_preferred_to_destroying_one(device: MemoryDevice) -> None:
    first = device.create(0, 1, b"a")
    device.write_tail(first, PAGE, b"former life")
    device.free(first)
    others = [device.create(slot, 1, b"b") for slot in range(1, 4)]
    mine = device.create(4, 1, b"a")
    assert device.read(mine, SEGMENT - PAGE, 11) == b"former life"
    device.free(mine)
    fresh = device.create(5, 1, b"b")
    assert device.read(fresh, 0, SEGMENT) == bytes(SEGMENT)
    assert os.fstat(fresh.fd).st_blocks * 512 == SEGMENT
    assert held_bytes() == COUNT * SEGMENT
    assert len({segment.address for segment in [*others, fresh]}) == COUNT


def test_a_frame_cannot_be_resized(device: MemoryDevice) -> None:
    segment = device.create(0, 1, b"a")
    for nbytes in (0, 2 * SEGMENT):
        with pytest.raises(PermissionError):
            os.ftruncate(segment.fd, nbytes)


def test_frames_and_files_together_never_exceed_the_capacity(device: MemoryDevice) -> None:
    staging = device.create_staging("one")
    for end in range(PAGE, COUNT * SEGMENT + 1, 16 * PAGE):
        device.write_staging(staging, end - 1, b"x")
        assert held_bytes() <= COUNT * SEGMENT
    device.resize_staging(staging, COUNT * SEGMENT)
    assert held_bytes() == COUNT * SEGMENT
    with pytest.raises(NoSpaceError):
        device.create(0, 1, b"a")
    device.resize_staging(staging, SEGMENT)
    segments = [device.create(slot, 1, b"a") for slot in range(COUNT - 1)]
    assert held_bytes() == COUNT * SEGMENT
    for segment in segments:
        assert os.fstat(segment.fd).st_blocks * 512 == SEGMENT
    with pytest.raises(NoSpaceError):
        device.adopt(staging, 7, 1, b"sidecar")
    device.free(segments[0])
    file = device.adopt(staging, 7, 1, b"sidecar")
    assert held_bytes() <= COUNT * SEGMENT - PAGE
    device.free(file)
    assert held_bytes() <= COUNT * SEGMENT


def test_a_file_segment_is_sealed(device: MemoryDevice) -> None:
    staging = device.create_staging("one")
    device.write_staging(staging, 0, b"payload")
    file = device.adopt(staging, 0, 1, b"sidecar")
    assert file.address == 0
    with pytest.raises(PermissionError):
        os.pwrite(file.fd, b"x", 0)
    for nbytes in (0, 100):
        with pytest.raises(PermissionError):
            os.ftruncate(file.fd, nbytes)
    with pytest.raises(PermissionError):
        mmap.mmap(file.fd, 7)
    with mmap.mmap(file.fd, 7, prot=mmap.PROT_READ) as view:
        device.free(file)
        assert view[:] == b"payload"


def test_a_file_mapped_for_writing_is_not_adopted(device: MemoryDevice) -> None:
    staging = device.create_staging("one")
    device.write_staging(staging, 0, b"payload")
    used = device.used_bytes
    with mmap.mmap(staging.fd, 7) as writable, pytest.raises(OSError, match="busy") as caught:
        device.adopt(staging, 0, 1, b"sidecar")
    assert caught.value.errno == errno.EBUSY
    assert writable.closed
    assert (device.used_bytes, device.segments()) == (used, [])
    assert device.adopt(staging, 0, 1, b"sidecar").nbytes == 7


def test_another_owner_of_the_descriptor_keeps_the_bytes(device: MemoryDevice) -> None:
    segment = device.create(0, 1, b"a")
    device.write_tail(segment, PAGE, b"bytes")
    copy = os.dup(segment.fd)
    device.close()
    assert os.pread(copy, 5, SEGMENT - PAGE) == b"bytes"
    os.close(copy)
