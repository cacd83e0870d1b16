import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvfs import _native
from tests.native.support import PAGE, address, i32, random_bytes, statuses, u64


@pytest.fixture
def fd(tmp_path: Path) -> Any:
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield descriptor
    os.close(descriptor)


@settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(st.integers(0, 5000) | st.integers(1_000_000, 2_200_000), min_size=1, max_size=4),
    st.sampled_from([1, 512, 4096, 100_000]),
)
def test_write_and_read_back(fd: int, lengths: list[int], pad_to: int) -> None:
    os.ftruncate(fd, 0)
    sources = [random_bytes(i, n) for i, n in enumerate(lengths)]
    padded = [-(-n // pad_to) * pad_to for n in lengths]
    offsets = np.cumsum([PAGE, *padded[:-1]]).astype("<u8")
    os.pwrite(fd, b"\xff" * (sum(padded) + 2 * PAGE), 0)
    digests, status = np.zeros((len(lengths), 16), np.uint8), statuses(len(lengths))
    failed = _native.pwrite_hash(
        fd, offsets, u64(*map(address, sources)), u64(*lengths), digests, status, pad_to
    )
    assert failed == 0
    assert not status.any()
    expected = b"".join(
        source.tobytes() + bytes(size - len(source))
        for source, size in zip(sources, padded, strict=True)
    )
    whole = os.pread(fd, 1 << 30, 0)
    assert whole == b"\xff" * PAGE + expected + b"\xff" * PAGE
    for source, digest in zip(sources, digests, strict=True):
        assert digest.tobytes() == _native.xxh3_128(source)

    targets = [np.zeros(n, np.uint8) for n in lengths]
    for wanted in (digests, None):
        status[:] = 99
        failed = _native.pread_verify(
            i32(*[fd] * len(lengths)), offsets, u64(*lengths), u64(*map(address, targets)),
            wanted, status,
        )  # fmt: skip
        assert failed == 0
        assert not status.any()
        for source, target in zip(sources, targets, strict=True):
            assert (source == target).all()
            target[:] = 0


def test_a_failed_item_does_not_stop_the_others(fd: int, tmp_path: Path) -> None:
    os.pwrite(fd, b"x" * 100, 0)
    other = os.open(tmp_path / "closed", os.O_RDWR | os.O_CREAT)
    os.close(other)
    targets = np.zeros((4, 100), np.uint8)
    digests = np.stack([np.frombuffer(_native.xxh3_128(b"x" * 100), np.uint8)] * 4)
    digests[3] ^= 1
    status = statuses(4)
    failed = _native.pread_verify(
        i32(other, fd, fd, fd), u64(0, 50, 0, 0), u64(100, 100, 100, 100),
        u64(*[address(t) for t in targets]), digests, status,
    )  # fmt: skip
    assert failed == 3
    assert list(status) == [-errno.EBADF, 2, 0, 1]


def test_errno_of_a_write() -> None:
    full = os.open("/dev/full", os.O_RDWR)
    data, status = random_bytes(1, 10), statuses(2)
    digests = np.ones((2, 16), np.uint8)
    args = u64(0, 0), u64(address(data), address(data)), u64(10, 10), digests, status
    assert _native.pwrite_hash(full, *args) == 2
    os.close(full)
    assert list(status) == [-errno.ENOSPC] * 2
    assert not digests.any()
    assert _native.pwrite_hash(-1, *args) == 2
    assert list(status) == [-errno.EBADF] * 2


def test_ranges_that_cannot_be(fd: int) -> None:
    data, status = random_bytes(1, 10), statuses(4)
    where = address(data)
    failed = _native.pwrite_hash(
        fd, u64(2**63, 2**63 - 5, 2**64 - 1, 0), u64(where, where, where, 2**64 - 5),
        u64(10, 10, 10, 10), np.zeros((4, 16), np.uint8), status,
    )  # fmt: skip
    assert failed == 4
    assert list(status) == [-errno.EOVERFLOW] * 3 + [-errno.EFAULT]
    failed = _native.pread_verify(
        i32(fd, fd), u64(2**64 - 1, 0), u64(10, 10), u64(where, 2**64 - 5), None, status[:2]
    )
    assert failed == 2
    assert list(status[:2]) == [-errno.EOVERFLOW, -errno.EFAULT]


def test_memory_faults(fd: int, tmp_path: Path) -> None:
    """Truncated memory: SIGBUS in the hash, EFAULT in the system call."""
    memory = os.open(tmp_path / "memory", os.O_RDWR | os.O_CREAT)
    os.ftruncate(memory, 2 * PAGE)
    arena = _native.Arena(memory, 2 * PAGE)
    os.ftruncate(memory, PAGE)
    status = statuses(2)
    failed = _native.pwrite_hash(
        fd, u64(0, PAGE), u64(arena.address + PAGE, arena.address), u64(PAGE, PAGE),
        np.zeros((2, 16), np.uint8), status,
    )  # fmt: skip
    assert failed == 1
    assert list(status) == [3, 0]
    assert os.fstat(fd).st_size == 2 * PAGE
    failed = _native.pread_verify(
        i32(fd, fd), u64(PAGE, PAGE), u64(PAGE, PAGE), u64(arena.address + PAGE, arena.address),
        None, status,
    )  # fmt: skip
    assert failed == 1
    assert list(status) == [3, 0]
    arena.close()
    os.close(memory)


def test_pipes_are_refused() -> None:
    reader, writer = os.pipe()
    status = statuses(1)
    data = random_bytes(1, 10)
    digests = np.zeros(16, np.uint8)
    assert _native.pwrite_hash(writer, u64(0), u64(address(data)), u64(10), digests, status) == 1
    assert status[0] == -errno.ESPIPE
    os.close(reader)
    os.close(writer)


def test_wrong_lengths(fd: int) -> None:
    with pytest.raises(ValueError, match="offsets"):
        _native.pwrite_hash(fd, u64(), u64(0), u64(0), bytearray(16), bytearray(4))
    with pytest.raises(ValueError, match="fds"):
        _native.pread_verify(u64(0), u64(0), u64(0), u64(0), None, bytearray(4))
    with pytest.raises(ValueError, match="digests"):
        _native.pread_verify(i32(0), u64(0), u64(0), u64(0), b"", bytearray(4))
