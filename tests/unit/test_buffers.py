"""Addresses of what callers hand over."""

import ctypes
import mmap

import numpy as np
import pytest

from kvfs.buffers import addresses_of
from kvfs.errors import UsageError


def bytes_at(address: int, nbytes: int) -> bytes:
    return ctypes.string_at(int(address), int(nbytes))


def test_rows_of_an_array() -> None:
    array = np.arange(24, dtype=np.float32).reshape(3, 2, 4)
    addresses, lengths = addresses_of(array, 3)
    assert addresses.dtype == lengths.dtype == np.uint64
    assert lengths.tolist() == [32, 32, 32]
    for row, address in zip(array, addresses, strict=True):
        assert bytes_at(address, 32) == row.tobytes()


def test_sequence_of_buffers() -> None:
    raw, array = b"hello", np.arange(6, dtype=np.uint16)
    area = bytearray(b"area")
    pair = (array.ctypes.data + 2, 4)
    addresses, lengths = addresses_of([raw, array, area, memoryview(raw)[1:3], pair], 5)
    assert lengths.tolist() == [5, 12, 4, 2, 4]
    found = [bytes_at(a, n) for a, n in zip(addresses, lengths, strict=True)]
    assert found == [raw, array.tobytes(), b"area", b"el", array[1:3].tobytes()]


@pytest.mark.parametrize("make", [bytes, bytearray, lambda raw: memoryview(bytearray(raw))])
def test_one_buffer_alone(make) -> None:
    _, lengths = addresses_of(make(b"12345"), 1)
    assert lengths.tolist() == [5]


def test_nothing() -> None:
    for nothing in ([], (), np.zeros((0, 8), np.uint8)):
        addresses, lengths = addresses_of(nothing, 0)
        assert len(addresses) == len(lengths) == 0


def test_writable() -> None:
    with mmap.mmap(-1, 4096) as area:
        assert addresses_of([area], 1, writable=True)[1].tolist() == [4096]
    assert addresses_of([bytearray(7)], 1, writable=True)[1].tolist() == [7]
    read_only = np.zeros(8, np.uint8)
    read_only.flags.writeable = False
    for buffer in (b"bytes", read_only):
        assert addresses_of([buffer], 1)[1][0] > 0
        with pytest.raises(UsageError, match="buffer cannot be used"):
            addresses_of([buffer], 1, writable=True)


@pytest.mark.parametrize(
    ("buffers", "count", "message"),
    [
        ([b"one"], 2, "expected 2 buffers"),
        (b"one", 2, "expected 2 buffers"),
        ({b"a", b"b"}, 2, "expected 2 buffers"),
        (np.zeros((3, 8), np.uint8), 2, "expected 2 rows"),
        (np.zeros((), np.uint8), 1, "expected 1 rows"),
        (np.zeros((4, 8), np.uint8)[:, ::2], 4, "buffer cannot be used"),
        ([np.zeros((4, 8), np.uint8)[:, ::2]], 1, "buffer cannot be used"),
        ([object()], 1, "buffer cannot be used"),
        (["text"], 1, "buffer cannot be used"),
    ],
)
def test_refused(buffers: object, count: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        addresses_of(buffers, count)


def test_tensors() -> None:
    torch = pytest.importorskip("torch")
    tensor = torch.arange(12, dtype=torch.int16).reshape(3, 4)
    addresses, lengths = addresses_of(tensor, 3)
    assert lengths.tolist() == [8, 8, 8]
    assert bytes_at(addresses[2], 8) == tensor[2].numpy().tobytes()
    assert addresses_of([tensor[1], tensor[0]], 2)[0].tolist() == addresses[[1, 0]].tolist()
    half = tensor.to(torch.bfloat16)
    assert addresses_of([half], 1)[1].tolist() == [24]
    with pytest.raises(UsageError, match="contiguous"):
        addresses_of([tensor.t()], 1)
    with pytest.raises(UsageError, match="on the CPU"):
        addresses_of([tensor.to("meta")], 1)
