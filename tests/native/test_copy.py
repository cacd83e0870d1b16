import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfs import _native
from tests.native.support import PAGE, address, random_bytes, statuses, u64

MIB = 1 << 20


def digest_of(data: Any) -> Any:
    return np.frombuffer(_native.xxh3_128(np.ascontiguousarray(data)), np.uint8)


@settings(deadline=None)
@given(
    st.integers(0, 9000), st.integers(0, 130), st.integers(0, 130),
    st.sampled_from([1, 2, 64, 100, 512, 4096]),
)  # fmt: skip
def test_copy_hash_copies_pads_and_touches_nothing_else(
    length: int, from_skew: int, to_skew: int, pad_to: int
) -> None:
    source = random_bytes(length, length + from_skew)
    target = np.full(to_skew + length + 2 * 4096, 0xAA, np.uint8)
    digests, status = np.zeros((1, 16), np.uint8), statuses(1)
    failed = _native.copy_hash(
        u64(address(target) + to_skew), u64(address(source) + from_skew), u64(length), digests,
        status, pad_to,
    )  # fmt: skip
    assert (failed, status[0]) == (0, 0)
    padded = -(-length // pad_to) * pad_to
    end = to_skew + length
    assert (target[to_skew:end] == source[from_skew:]).all()
    assert (target[end : to_skew + padded] == 0).all()
    assert (target[:to_skew] == 0xAA).all()
    assert (target[to_skew + padded :] == 0xAA).all()
    assert (digests[0] == digest_of(source[from_skew:])).all()


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 700_000), min_size=1, max_size=5), st.booleans())
def test_copy_verify(lengths: list[int], has_digests: bool) -> None:
    """Small batches take the cached copy, large ones the streaming one."""
    sources = [random_bytes(i, n) for i, n in enumerate(lengths)]
    targets = [np.zeros(n, np.uint8) for n in lengths]
    digests = np.array([digest_of(s) for s in sources]) if has_digests else None
    status = statuses(len(lengths))
    failed = _native.copy_verify(
        u64(*map(address, targets)), u64(*map(address, sources)), u64(*lengths), digests, status
    )
    assert failed == 0
    assert not status.any()
    for source, target in zip(sources, targets, strict=True):
        assert (source == target).all()


@pytest.mark.parametrize("length", [1, 1000, 100_000, 2 * MIB])
def test_one_flipped_bit_is_a_mismatch(length: int) -> None:
    source, target = random_bytes(1, length), np.zeros(length, np.uint8)
    digests = np.stack([digest_of(source)] * 2)
    source[length // 2] ^= 1
    status = statuses(1)
    args = u64(address(source)), u64(length), digests[:1], status
    assert _native.copy_verify(u64(address(target)), *args) == 1
    assert status[0] == 1
    status[:] = 99
    assert _native.verify(*args) == 1
    assert status[0] == 1
    source[length // 2] ^= 1
    assert _native.verify(*args) == 0
    assert status[0] == 0


def test_empty_batch_and_empty_item() -> None:
    none = np.zeros(0, np.uint8)
    assert _native.copy_hash(none, none, none, none, none) == 0
    assert _native.verify(none, none, none, none) == 0
    digests, status = np.zeros(16, np.uint8), statuses(1)
    assert _native.copy_hash(u64(0), u64(0), u64(0), digests, status) == 0
    assert digests.tobytes() == _native.xxh3_128(b"")


def test_batches_at_odd_addresses() -> None:
    """The arrays themselves may lie anywhere."""
    data, target = random_bytes(1, 100), np.zeros(100, np.uint8)
    raw = bytearray(1 + 24 + 16 + 4)
    view = memoryview(raw)
    for i, value in enumerate((address(target), address(data), 100)):
        raw[1 + i * 8 : 9 + i * 8] = value.to_bytes(8, "little")
    assert _native.copy_hash(view[1:9], view[9:17], view[17:25], view[25:41], view[41:45]) == 0
    assert (target == data).all()
    assert bytes(view[25:41]) == _native.xxh3_128(data)


def test_ranges_past_the_address_space_fail_alone() -> None:
    data, target = random_bytes(1, 100), np.zeros(100, np.uint8)
    digests, status = np.ones((3, 16), np.uint8), statuses(3)
    failed = _native.copy_hash(
        u64(address(target), address(target), 2**64 - 10),
        u64(2**64 - 10, address(data), address(data)), u64(100, 100, 100), digests, status,
    )  # fmt: skip
    assert failed == 2
    assert list(status) == [-errno.EFAULT, 0, -errno.EFAULT]
    assert (target == data).all()
    assert not digests[0].any()
    failed = _native.verify(u64(2**64 - 1), u64(2**64 - 1), digests[1:2], status[:1])
    assert (failed, status[0]) == (1, -errno.EFAULT)


BAD_ARGUMENTS = [
    ("targets", np.zeros(1, "<u8")), ("sources", np.zeros(3, "<u8")), ("lengths", bytes(15)),
    ("digests", bytearray(31)), ("statuses", bytearray(12)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD_ARGUMENTS)
def test_wrong_lengths_touch_nothing(name: str, value: Any) -> None:
    arguments = {
        "targets": u64(1, 1), "sources": u64(1, 1), "lengths": u64(9, 9),
        "digests": bytearray(32), "statuses": bytearray(8),
    }  # fmt: skip
    arguments[name] = value
    with pytest.raises(ValueError, match=name):
        _native.copy_hash(**arguments)
    with pytest.raises(ValueError, match=name):
        _native.copy_verify(**arguments)
    if name != "targets":
        del arguments["targets"]
        with pytest.raises(ValueError, match=name):
            _native.verify(**arguments)


def test_read_only_results_are_refused() -> None:
    one = u64(0)
    with pytest.raises(BufferError):
        _native.copy_hash(one, one, one, bytes(16), bytearray(4))
    with pytest.raises(BufferError):
        _native.verify(one, one, bytes(16), bytes(4))


@pytest.mark.parametrize("pad_to", [0, -1, 2**63, 2**70])
def test_pad_out_of_range(pad_to: int) -> None:
    none = bytearray()
    with pytest.raises(ValueError, match="pad_to"):
        _native.copy_hash(none, none, none, none, none, pad_to)


@pytest.fixture
def truncated(tmp_path: Path) -> Any:
    """A mapping of four pages over a file of two."""
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.pwrite(fd, random_bytes(5, 4 * PAGE).tobytes(), 0)
    arena = _native.Arena(fd, 4 * PAGE)
    os.ftruncate(fd, 2 * PAGE)
    yield arena
    arena.close()
    os.close(fd)


def test_truncated_source_costs_one_item(truncated: Any) -> None:
    target = np.zeros(8 * PAGE, np.uint8)
    base, goal = truncated.address, address(target)
    digests, status = np.zeros((3, 16), np.uint8), statuses(3)
    lengths = u64(PAGE, 2 * PAGE, PAGE)
    sources = u64(base, base + PAGE, base + PAGE)
    targets = u64(goal, goal + PAGE, goal + 4 * PAGE)
    assert _native.copy_hash(targets, sources, lengths, digests, status) == 1
    assert list(status) == [0, 3, 0]
    assert not digests[1].any()
    for wanted in (digests, None):
        status[:] = 99
        assert _native.copy_verify(targets, sources, lengths, wanted, status) == 1
        assert list(status) == [0, 3, 0]
    status[:] = 99
    assert _native.verify(sources, lengths, digests, status) == 1
    assert list(status) == [0, 3, 0]


def test_truncated_target_costs_one_item(truncated: Any) -> None:
    source = random_bytes(1, 4 * PAGE)
    status = statuses(2)
    failed = _native.copy_hash(
        u64(truncated.address + PAGE, truncated.address), u64(address(source), address(source)),
        u64(2 * PAGE, PAGE), np.zeros((2, 16), np.uint8), status,
    )  # fmt: skip
    assert failed == 1
    assert list(status) == [3, 0]
    assert bytes(memoryview(truncated)[:PAGE]) == source[:PAGE].tobytes()


def test_padding_may_fault(truncated: Any) -> None:
    source, status = random_bytes(1, PAGE), statuses(1)
    failed = _native.copy_hash(
        u64(truncated.address + PAGE), u64(address(source)), u64(PAGE - 7),
        np.zeros(16, np.uint8), status, 2 * PAGE,
    )  # fmt: skip
    assert (failed, status[0]) == (1, 3)


def poison_or_skip(where: int, nbytes: int) -> None:
    try:
        _native.poison(where, nbytes)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM):
            pytest.skip(f"no UFFDIO_POISON: {error}")
        raise


def test_poisoned_page_of_a_memfd() -> None:
    fd = _native.memfd("poisoned", 4 * PAGE)
    arena = _native.Arena(fd, 4 * PAGE, populate=True)
    data = random_bytes(1, 4 * PAGE)
    memoryview(arena)[:] = data
    poison_or_skip(arena.address + 2 * PAGE, PAGE)
    target, status = np.zeros(4 * PAGE, np.uint8), statuses(4)
    pages = u64(*range(0, 4 * PAGE, PAGE))
    digests = np.array([digest_of(data[at : at + PAGE]) for at in range(0, 4 * PAGE, PAGE)])
    failed = _native.copy_verify(
        pages + address(target), pages + arena.address, u64(*[PAGE] * 4), digests, status
    )
    assert failed == 1
    assert list(status) == [0, 0, 3, 0]
    # The bytes are still in the memfd: another mapping is not poisoned.
    assert os.pread(fd, PAGE, 2 * PAGE) == data[2 * PAGE : 3 * PAGE].tobytes()
    arena.close()
    os.close(fd)


@pytest.mark.parametrize(
    ("where", "nbytes"), [(1, PAGE), (PAGE, 1), (PAGE, 0), (2**64 - PAGE, PAGE)]
)
def test_poison_checks_its_range(where: int, nbytes: int) -> None:
    with pytest.raises((ValueError, OSError)):
        _native.poison(where, nbytes)
