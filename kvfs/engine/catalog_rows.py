"""Blocks on their way into rows of the catalog, and rows on their way out.

Layer: L2, pure.

- What comes from a caller is checked once, here, before a transaction begins.
- What comes from the database is checked against its node: a row never makes an array longer than
  the node says.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import zstandard

from kvfs.engine.catalog_schema import Row
from kvfs.errors import CorruptionError, UsageError
from kvfs.keys import KEY_BYTES, KeyArray, as_key_array

TokenArray = npt.NDArray[np.uint32]
NO_KEYS: Final = np.empty((0, KEY_BYTES), np.uint8)
NO_TOKENS: Final = np.empty(0, "<u4")
_TOKEN_BYTES: Final = 4


@dataclass(frozen=True, slots=True)
class Blocks:
    """Blocks to be written: keys (n, 32), tokens of each (n,), and all their ids or None."""

    keys: KeyArray
    token_counts: npt.NDArray[np.int64]
    tokens: TokenArray | None

    @property
    def token_count(self) -> int:
        """Tokens of all blocks."""
        return int(self.token_counts.sum())

    @property
    def tail_tokens(self) -> int:
        """Tokens of the last block."""
        return int(self.token_counts[-1]) if len(self.token_counts) else 0


@dataclass(frozen=True, slots=True)
class RowHead:
    """The part of a row that stays when blocks are written behind it."""

    keys: KeyArray
    token_count: int
    tokens: TokenArray | None


EMPTY_ROW: Final = RowHead(NO_KEYS, 0, NO_TOKENS)


def checked_blocks(
    keys: Any, token_counts: Sequence[int] | npt.NDArray[Any] | None,
    tokens: Sequence[int] | npt.NDArray[Any] | None,
) -> Blocks:  # fmt: skip
    """Return the arguments as arrays, if they fit together."""
    array = as_key_array(keys)
    if token_counts is None:
        if tokens is not None:
            raise UsageError("tokens need token_counts: how many belong to each block")
        return Blocks(array, np.zeros(len(array), np.int64), None)
    counts = np.asarray(token_counts, np.int64)
    if counts.shape != (len(array),) or (counts < 0).any():
        raise UsageError(
            f"token_counts does not fit: expected {len(array)} counts, found shape {counts.shape}"
        )
    if tokens is None:
        return Blocks(array, counts, None)
    ids = np.ascontiguousarray(tokens, dtype="<u4")
    if ids.shape != (int(counts.sum()),):
        raise UsageError(f"tokens do not fit: expected {counts.sum()} ids, found shape {ids.shape}")
    return Blocks(array, counts, ids)


def check_size(block_count: int, stride: int, tail_bytes: int) -> None:
    """Raise unless a file may have this shape."""
    is_empty = block_count == 0
    if block_count < 0 or not 0 <= tail_bytes <= stride or is_empty != (tail_bytes == 0):
        raise UsageError(
            f"sizes do not fit: found {block_count} blocks, stride {stride}, tail {tail_bytes}; "
            "expected 0 < tail_bytes <= stride, or no block and no tail"
        )


def decode_keys(node_id: int, rows: list[Row]) -> KeyArray:
    """Return the keys of rows in order, read-only; each row starts with its keys."""
    raw = b"".join(row[0] for row in rows)
    if len(raw) % KEY_BYTES:
        raise damaged(node_id, f"whole keys of {KEY_BYTES} bytes", f"{len(raw)} bytes")
    return np.frombuffer(raw, np.uint8).reshape(-1, KEY_BYTES)


def damaged(node_id: int, expected: str, found: str) -> CorruptionError:
    """Return the error for rows that do not fit their node."""
    return CorruptionError(
        f"context does not hold what it says: node {node_id}: "
        f"expected {expected}, found {found}; run 'kvfs-admin check'"
    )


class TokenCodec:
    """Token ids as a row stores them: a zstd frame that carries its size.

    Not thread-safe: used under the catalog's lock. Made once, because making zstd's contexts takes
    longer than using them on a row. Level 1: level 3 takes three times as long for the same size.
    """

    def __init__(self) -> None:
        self._compressor = zstandard.ZstdCompressor(level=1)
        self._decompressor = zstandard.ZstdDecompressor()

    def compress(self, tokens: TokenArray) -> bytes:
        """Return the frame of some token ids."""
        return self._compressor.compress(tokens.tobytes())

    def decompress(self, node_id: int, blob: bytes, token_count: int) -> TokenArray:
        """Return the token ids of a row; never allocates more than the row may hold.

        Raises:
            CorruptionError: The frame is damaged or has another size.
        """
        nbytes = token_count * _TOKEN_BYTES
        try:
            found = zstandard.get_frame_parameters(blob).content_size
            raw = self._decompressor.decompress(blob) if found == nbytes else b""
        except zstandard.ZstdError as error:
            raise damaged(node_id, f"{nbytes} bytes of tokens", str(error)) from error
        if len(raw) != nbytes:
            raise damaged(node_id, f"{nbytes} bytes of tokens", str(found))
        return np.frombuffer(raw, "<u4")
