"""Queues of transfers, by io_uring and by threads."""

import errno
import os
import resource
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvfs import _native
from tests.native.support import PAGE, address, i32, random_bytes, statuses, u64

MIB = 1 << 20
LENGTHS = st.integers(0, 5000) | st.sampled_from([MIB - 1, MIB, MIB + 1, 2 * MIB + 4096, 5 * MIB])


@pytest.fixture(params=["io_uring", "threads"])
def queue(request: pytest.FixtureRequest) -> Iterator[_native.IOQueue]:
    try:
        queue = _native.IOQueue(4, request.param)
    except OSError as error:
        pytest.skip(f"no io_uring here: {error}")
    yield queue
    queue.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "file").touch()
    return tmp_path / "file"


@pytest.fixture
def fd(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDWR)
    yield descriptor
    os.close(descriptor)


def direct(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_DIRECT)
    except OSError as error:
        pytest.skip(f"no O_DIRECT in {path.parent}: {error}")


@settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(LENGTHS, min_size=1, max_size=6), st.booleans(), st.sampled_from([1, 16, 512, 4096]),
    st.sampled_from([-1, 3_600_000]),
)  # fmt: skip
def test_write_and_read_back(
    queue: _native.IOQueue, path: Path, lengths: list[int], is_direct: bool, align: int,
    timeout_ms: int,
) -> None:  # fmt: skip
    fd = direct(path) if is_direct else os.open(path, os.O_RDWR)
    offset_align = 4096 if is_direct else align
    sources = [random_bytes(i, n) for i, n in enumerate(lengths)]
    padded = [-(-n // PAGE) * PAGE for n in lengths]
    offsets = np.cumsum([PAGE, *padded[:-1]]).astype("<u8")
    path.write_bytes(b"\xff" * (sum(padded) + 2 * PAGE))
    digests, status = np.zeros((len(lengths), 16), np.uint8), statuses(len(lengths))
    failed = queue.write_hash(
        fd, offsets, u64(*map(address, sources)), u64(*lengths), digests, status, PAGE,
        timeout_ms=timeout_ms,
    )  # fmt: skip
    assert failed == 0
    assert not status.any()
    expected = b"".join(
        source.tobytes() + bytes(size - len(source))
        for source, size in zip(sources, padded, strict=True)
    )
    assert path.read_bytes() == b"\xff" * PAGE + expected + b"\xff" * PAGE
    for source, digest in zip(sources, digests, strict=True):
        assert digest.tobytes() == _native.xxh3_128(source)

    skip = 7  # nothing is aligned in the file
    for start in (0, skip):
        wanted = [source[start:] for source in sources]
        targets = [np.zeros(n + align, np.uint8)[align:] for n in map(len, wanted)]
        for i, part in enumerate(wanted):
            digests[i] = np.frombuffer(_native.xxh3_128(part), np.uint8)
        failed = queue.read_verify(
            i32(*[fd] * len(lengths)), offsets + np.uint64(start), u64(*map(len, wanted)),
            u64(*map(address, targets)), digests, status, offset_align,
            4096 if is_direct else align, timeout_ms=timeout_ms,
        )  # fmt: skip
        assert failed == 0, status
        for part, target in zip(wanted, targets, strict=True):
            assert (part == target).all()
    os.close(fd)


def test_a_failed_item_does_not_stop_the_others(
    queue: _native.IOQueue, fd: int, tmp_path: Path
) -> None:
    os.pwrite(fd, b"x" * 100, 0)
    other = os.open(tmp_path / "closed", os.O_RDWR | os.O_CREAT)
    os.close(other)
    targets = np.zeros((5, 100), np.uint8)
    digests = np.stack([np.frombuffer(_native.xxh3_128(b"x" * 100), np.uint8)] * 5)
    digests[3] ^= 1
    status = statuses(5)
    failed = queue.read_verify(
        i32(other, fd, fd, fd, fd), u64(0, 50, 0, 0, 1000), u64(100, 100, 100, 100, 100),
        u64(*[address(t) for t in targets]), digests, status,
    )  # fmt: skip
    assert failed == 4
    assert list(status) == [-errno.EBADF, 2, 0, 1, 2]


def test_a_short_read_of_a_direct_file_is_one(queue: _native.IOQueue, path: Path) -> None:
    path.write_bytes(b"y" * (PAGE + 100))
    fd = direct(path)
    target, status = np.zeros(2 * PAGE, np.uint8), statuses(2)
    failed = queue.read_verify(
        i32(fd, fd), u64(0, 0), u64(PAGE + 100, PAGE + 101), u64(address(target), address(target)),
        None, status, PAGE, PAGE,
    )  # fmt: skip
    os.close(fd)
    assert (failed, list(status)) == (1, [0, 2])
    assert target[: PAGE + 100].tobytes() == b"y" * (PAGE + 100)


def test_errno_of_a_write(queue: _native.IOQueue) -> None:
    full = os.open("/dev/full", os.O_RDWR)
    data, status = random_bytes(1, 10), statuses(2)
    digests = np.ones((2, 16), np.uint8)
    args = u64(0, 0), u64(address(data), address(data)), u64(10, 10), digests, status
    assert queue.write_hash(full, *args) == 2
    os.close(full)
    assert list(status) == [-errno.ENOSPC] * 2
    assert not digests.any()
    assert queue.write_hash(-1, *args) == 2
    assert list(status) == [-errno.EBADF] * 2


def test_a_short_write_is_resumed_until_it_fails(queue: _native.IOQueue, fd: int) -> None:
    """The limit of a file's size cuts a write short; the rest of it gets an error."""
    data, status = random_bytes(1, MIB), statuses(2)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB + MIB // 2, before[1]))
    try:
        failed = queue.write_hash(
            fd, u64(0, MIB), u64(address(data), address(data)), u64(MIB, MIB),
            np.zeros((2, 16), np.uint8), status,
        )  # fmt: skip
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (failed, list(status)) == (1, [0, -errno.EFBIG])
    assert os.fstat(fd).st_size == MIB + MIB // 2


def test_ranges_that_cannot_be(queue: _native.IOQueue, fd: int) -> None:
    data, status = random_bytes(1, 10), statuses(5)
    where = address(data)
    failed = queue.write_hash(
        fd, u64(2**63, 2**63 - 5, 2**64 - 1, 0, 0), u64(where, where, where, 2**64 - 5, 0),
        u64(10, 10, 10, 10, 10), np.zeros((5, 16), np.uint8), status,
    )  # fmt: skip
    assert failed == 5
    assert list(status) == [-errno.EOVERFLOW] * 3 + [-errno.EFAULT, 3]
    failed = queue.read_verify(
        i32(fd, fd), u64(2**64 - 1, 0), u64(10, 10), u64(where, 2**64 - 5), None, status[:2]
    )
    assert failed == 2
    assert list(status[:2]) == [-errno.EOVERFLOW, -errno.EFAULT]


@pytest.mark.parametrize("align", [1, PAGE])
def test_memory_faults(queue: _native.IOQueue, fd: int, tmp_path: Path, align: int) -> None:
    memory = os.open(tmp_path / "memory", os.O_RDWR | os.O_CREAT)
    os.ftruncate(memory, 2 * PAGE)
    arena = _native.Arena(memory, 2 * PAGE)
    os.ftruncate(memory, PAGE)
    status = statuses(2)
    failed = queue.write_hash(
        fd, u64(0, PAGE), u64(arena.address + PAGE, arena.address), u64(PAGE, PAGE),
        np.zeros((2, 16), np.uint8), status,
    )  # fmt: skip
    assert failed == 1
    assert list(status) == [3, 0]
    assert os.fstat(fd).st_size == 2 * PAGE
    for timeout_ms in (-1, 3_600_000):  # straight, and by way of a buffer
        failed = queue.read_verify(
            i32(fd, fd), u64(PAGE, PAGE), u64(PAGE, PAGE),
            u64(arena.address + PAGE, arena.address), None, status, align, align,
            timeout_ms=timeout_ms,
        )  # fmt: skip
        assert failed == 1
        assert list(status) == [3, 0]
    arena.close()
    os.close(memory)


def test_what_stalls_is_left_behind(fd: int) -> None:
    """A pipe that nobody writes to is a device that does not answer."""
    try:
        queue = _native.IOQueue(2, "io_uring")
    except OSError as error:
        pytest.skip(f"no io_uring here: {error}")
    os.pwrite(fd, b"z" * 100, 0)
    reader, writer = os.pipe()
    target, status = np.zeros((2, 100), np.uint8), statuses(2)
    where = u64(*[address(row) for row in target])
    lengths, zeros = u64(100, 100), u64(0, 0)
    failed = queue.read_verify(i32(reader, fd), zeros, lengths, where, None, status, timeout_ms=100)
    assert (failed, list(status)) == (1, [-errno.ETIMEDOUT, 0])
    assert queue.stalled() == 1
    failed = queue.read_verify(i32(fd, fd), zeros, lengths, where, None, status, timeout_ms=60_000)
    assert failed == 0  # with the place that is left
    assert queue.read_verify(i32(reader), u64(0), u64(100), where[:1], None, status[:1],
                             timeout_ms=100) == 1  # fmt: skip
    assert queue.read_verify(i32(fd, fd), zeros, lengths, where, None, status, timeout_ms=100) == 2
    assert list(status) == [-errno.ETIMEDOUT] * 2  # no place is left
    target[:] = 0
    os.write(writer, b"late" * 50)
    while queue.stalled():
        pass
    assert not target.any(), "what comes late goes nowhere"
    assert queue.read_verify(i32(fd, fd), zeros, lengths, where, None, status) == 0
    queue.close()
    os.close(reader)
    os.close(writer)


def test_closing_leaves_what_stalls() -> None:
    try:
        queue = _native.IOQueue(2, "io_uring")
    except OSError as error:
        pytest.skip(f"no io_uring here: {error}")
    reader, writer = os.pipe()
    target, status = np.zeros(100, np.uint8), statuses(1)
    args = i32(reader), u64(0), u64(100), u64(address(target)), None, status
    assert queue.read_verify(*args, timeout_ms=50) == 1
    queue.close()
    queue.close()
    with pytest.raises(ValueError, match="closed"):
        queue.stalled()
    os.close(reader)
    os.close(writer)


def test_a_fork_leaves_the_queue_alone(queue: _native.IOQueue, fd: int) -> None:
    """It has none of its threads, and would take the results of the ring away."""
    os.pwrite(fd, b"z" * 100, 0)
    target, status = np.zeros(100, np.uint8), statuses(1)
    args = i32(fd), u64(0), u64(100), u64(address(target)), None, status
    assert queue.read_verify(*args) == 0
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(20)  # ends a child that waits for threads it does not have
        queue.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert queue.read_verify(*args) == 0


def test_one_batch_at_a_time() -> None:
    try:
        queue = _native.IOQueue(1, "io_uring")
    except OSError as error:
        pytest.skip(f"no io_uring here: {error}")
    reader, writer = os.pipe()
    target, status = np.zeros(100, np.uint8), statuses(1)
    args = i32(reader), u64(0), u64(4), u64(address(target)), None, status
    thread = threading.Thread(target=lambda: queue.read_verify(*args))
    thread.start()
    with pytest.raises(RuntimeError, match="in use"):
        _ask_while(queue, thread)
    queue.close()  # ends when the batch does
    os.write(writer, b"done")
    thread.join()
    assert (target[:4].tobytes(), status[0]) == (b"done", 0)
    os.close(reader)
    os.close(writer)


def _ask_while(queue: _native.IOQueue, thread: threading.Thread) -> None:
    while thread.is_alive():
        queue.stalled()


def test_wrong_arguments(queue: _native.IOQueue, fd: int) -> None:
    make: Any = _native.IOQueue
    for depth, kind in ((0, None), (100_000, None), (4, "aio")):
        with pytest.raises(ValueError, match=r"depth|kind"):
            make(depth, kind)
    with pytest.raises(ValueError, match="offsets"):
        queue.write_hash(fd, u64(), u64(0), u64(0), bytearray(16), bytearray(4))
    with pytest.raises(ValueError, match="fds"):
        queue.read_verify(u64(0), u64(0), u64(0), u64(0), None, bytearray(4))
    with pytest.raises(ValueError, match="power of two"):
        queue.read_verify(i32(fd), u64(0), u64(0), u64(0), None, bytearray(4), 3)
