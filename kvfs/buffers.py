"""Addresses and lengths of whatever callers hand over: arrays, tensors, memoryviews, pointers.

Layer: L0/L1 helper, no I/O.
"""

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kvfs import _native
from kvfs.errors import UsageError

Addresses = npt.NDArray[np.uint64]


def addresses_of(
    buffers: Any, count: int, *, writable: bool = False
) -> tuple[Addresses, Addresses]:
    """Return (addresses, lengths in bytes) of `count` buffers, without copying.

    Args:
        buffers: A C-contiguous numpy array or CPU torch tensor whose first axis has `count`
            entries, or a sequence of `count` items: objects with the buffer protocol, CPU tensors,
            or (address, length) pairs.
        count: How many there must be.
        writable: The memory will be written to.

    The caller keeps `buffers` alive while the addresses are in use.

    Raises:
        UsageError: Wrong count, a buffer that is not contiguous, not on the CPU or read-only.
    """
    if isinstance(buffers, np.ndarray) or hasattr(buffers, "data_ptr"):
        return _rows_of(buffers, count, writable)
    if isinstance(buffers, (bytes, bytearray, memoryview)) and count == 1:
        buffers = (buffers,)
    if not isinstance(buffers, Sequence) or len(buffers) != count:
        raise UsageError(f"expected {count} buffers, one per key")
    pairs = [_one(buffer, writable) for buffer in buffers]
    try:
        table = np.array(pairs, dtype=np.uint64).reshape(count, 2)
    except OverflowError as error:
        raise UsageError(f"address or length out of range: {error}") from error
    return np.ascontiguousarray(table[:, 0]), np.ascontiguousarray(table[:, 1])


def _rows_of(array: Any, count: int, writable: bool) -> tuple[Addresses, Addresses]:
    if len(array.shape) == 0 or array.shape[0] != count:
        raise UsageError(f"expected {count} rows, one per key, found shape {tuple(array.shape)}")
    address, nbytes = _one(array, writable)
    row = nbytes // count if count else 0
    addresses = np.uint64(address) + np.arange(count, dtype=np.uint64) * np.uint64(row)
    return addresses, np.full(count, row, np.uint64)


def _one(buffer: Any, writable: bool) -> tuple[int, int]:
    if isinstance(buffer, tuple) and len(buffer) == 2:
        try:
            return operator.index(buffer[0]), operator.index(buffer[1])
        except TypeError as error:
            raise UsageError(f"expected (address, length) of whole numbers: {error}") from error
    if hasattr(buffer, "data_ptr"):
        if buffer.device.type != "cpu" or not buffer.is_contiguous():
            raise UsageError("a tensor must be contiguous and on the CPU; see Tensor.contiguous()")
        return int(buffer.data_ptr()), int(buffer.numel() * buffer.element_size())
    try:
        return _native.buffer_address(buffer, writable)
    except (BufferError, TypeError, ValueError) as error:
        raise UsageError(f"buffer cannot be used: {error}") from error
