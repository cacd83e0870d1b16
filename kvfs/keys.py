"""Block keys and ids.

Layer: L0.

A block key is 32 bytes: the namespace id (8 bytes, little-endian) and a digest of 24 bytes. To the
store a key is opaque, apart from the namespace in front. Two makers of digests live here:

- `chain_keys`: the hash chain of token ids (BLAKE2b-192 over parent digest and tokens), which lets
  prefixes be shared.
- `file_keys`: for files written through the mount: context id, block number and a tag. They share
  nothing, and the context can be read back from the key, so that losing a block takes its file's
  name with it.
"""

import hashlib
import os
import struct
import uuid
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from kvfs.errors import UsageError

KEY_BYTES: Final = 32
U32_MAX: Final = (1 << 32) - 1
DIGEST_BYTES: Final = 24
NO_PARENT: Final = bytes(KEY_BYTES)
KeyArray = npt.NDArray[np.uint8]

_FILE_TAG: Final = np.frombuffer(b"kvfsfile", np.uint8)


def new_uuid() -> uuid.UUID:
    """Return a random id for a pool or device."""
    return uuid.UUID(bytes=os.urandom(16), version=4)


def new_namespace_id() -> int:
    """Return 63 random bits, never zero: the id of a namespace, never reused.

    63, because SQLite's integers are signed.
    """
    return int.from_bytes(os.urandom(8), "little") >> 1 or 1


def as_key_array(keys: Any, namespace_id: int | None = None) -> KeyArray:
    """Return keys as a C-contiguous (n, 32) uint8 array.

    Args:
        keys: An (n, 32) uint8 array, a bytes-like object of n x 32 bytes, or a sequence of 32-byte
            keys.
        namespace_id: When given, every key must lie in this namespace.

    Raises:
        UsageError: The type or shape is wrong, or a key belongs to another namespace.
    """
    if isinstance(keys, (list, tuple)):
        keys = b"".join(_key_bytes(key) for key in keys)
    if isinstance(keys, (bytes, bytearray, memoryview)):
        nbytes = memoryview(keys).nbytes
        if nbytes % KEY_BYTES:
            raise UsageError(f"{nbytes} bytes are no whole number of {KEY_BYTES}-byte keys")
        keys = np.frombuffer(keys, np.uint8).reshape(-1, KEY_BYTES)
    array = np.asarray(keys)
    if array.ndim != 2 or array.shape[1] != KEY_BYTES:
        raise UsageError(f"keys must have shape (n, {KEY_BYTES}), found {array.shape}")
    if array.dtype.kind not in "iu":
        raise UsageError(f"keys must be uint8, found {array.dtype}")
    if array.dtype != np.uint8 and array.size and (array.min() < 0 or array.max() > 255):
        raise UsageError(f"keys must be uint8, found {array.min()} to {array.max()}")
    array = np.ascontiguousarray(array, np.uint8)
    if namespace_id is not None and len(array):
        ids = array.view("<u8")[:, 0]
        if not bool((ids == np.uint64(namespace_id)).all()):
            raise UsageError("a key belongs to another namespace")
    return array


def _key_bytes(key: Any) -> bytes:
    """Return one key of a list."""
    try:
        raw = bytes(memoryview(key))
    except (TypeError, ValueError):
        raw = b""
    if len(raw) != KEY_BYTES:
        raise UsageError(f"block keys have {KEY_BYTES} bytes each, found {key!r:.80}")
    return raw


def as_u32_array(values: Any, what: str) -> npt.NDArray[np.uint32]:
    """Return token ids, or counts of tokens, as a C-contiguous array; nothing wraps round.

    Raises:
        UsageError: They are no flat sequence of whole numbers from 0 to 2**32 - 1.
    """
    try:
        array = np.asarray(values)
    except (TypeError, ValueError, OverflowError):
        array = np.empty((), object)
    if array.ndim == 1 and array.size == 0:
        return np.empty(0, np.uint32)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise UsageError(f"{what}: expected a flat sequence of whole numbers")
    if array.dtype != np.uint32 and (int(array.min()) < 0 or int(array.max()) > U32_MAX):
        raise UsageError(
            f"{what}: expected 0 to {U32_MAX}, found {int(array.min())} to {int(array.max())}"
        )
    return np.ascontiguousarray(array, np.uint32)


def chain_keys(
    namespace_id: int,
    token_ids: Sequence[int] | npt.NDArray[Any],
    block_tokens: int,
    parent: bytes = NO_PARENT,
) -> tuple[KeyArray, KeyArray]:
    """Name the blocks of a token sequence by the hash chain of all tokens up to each block's end.

    The last block may be partial; its key covers the tokens it has, so it changes when the block
    grows.

    Args:
        namespace_id: Where the blocks live.
        token_ids: The whole sequence, or what follows `parent`.
        block_tokens: Tokens per full block.
        parent: Key of the block before, or zeros for the start.

    Returns:
        keys and parents, both (n, 32) uint8; the first parent is `parent`.

    Raises:
        UsageError: A token id is out of range, or `parent` is no key.
    """
    parent = _key_bytes(parent)
    tokens = as_u32_array(token_ids, "token ids").astype("<u4", copy=False)
    count = -(-len(tokens) // block_tokens)
    keys = np.zeros((count, KEY_BYTES), np.uint8)
    prefix = struct.pack("<Q", namespace_id)
    digest = parent
    for index in range(count):
        part = tokens[index * block_tokens : (index + 1) * block_tokens].tobytes()
        chained = hashlib.blake2b(digest, digest_size=DIGEST_BYTES)
        chained.update(part)
        digest = prefix + chained.digest()
        keys[index] = np.frombuffer(digest, np.uint8)
    parents = np.vstack([np.frombuffer(parent, np.uint8)[None, :], keys[:-1]])[:count]
    return keys, np.ascontiguousarray(parents)


def file_keys(namespace_id: int, context_id: int, version: int, count: int) -> KeyArray:
    """Name the blocks of one version of a file that was written through the mount."""
    keys = np.zeros((count, KEY_BYTES), np.uint8)
    words = keys.view("<u8")
    words[:, 0] = namespace_id
    words[:, 1] = context_id
    numbers = keys.view("<u4")
    numbers[:, 4] = np.arange(count, dtype=np.uint32)
    numbers[:, 5] = version
    keys[:, 24:32] = _FILE_TAG
    return keys


def file_contexts(keys: KeyArray) -> list[int]:
    """Return the distinct context ids of those keys that `file_keys` made."""
    ids = np.ascontiguousarray(keys[is_file_key(keys)]).view("<u8").reshape(-1, 4)[:, 1]
    return [int(value) for value in np.unique(ids)]


def is_file_key(keys: KeyArray) -> npt.NDArray[np.bool_]:
    """Say of each key whether `file_keys` made it."""
    return np.asarray((keys[:, 24:32] == _FILE_TAG).all(axis=1))
