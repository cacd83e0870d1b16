"""The layout of a namespace: what the bytes of a block mean, and the fingerprint that guards it.

Layer: L0.
"""

import hashlib
import math
from dataclasses import dataclass
from typing import Final

import msgspec

from kvfs.errors import UsageError
from kvfs.units import MIB, PAGE, align_up

BLOCK_BYTES_MAX: Final = 256 * MIB
_ITEM_BYTES: Final = {"uint8": 1, "int8": 1, "float8_e4m3fn": 1, "float8_e5m2": 1, "float16": 2,
                      "bfloat16": 2, "float32": 4}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Layout:
    """What one block holds.

    Attributes:
        dtype: Element type by its torch name, e.g. 'bfloat16'; 'uint8' for opaque bytes.
        token_shape: Elements of one token, outermost first, e.g. (30, 2, 3, 64) for
            [layer, kv, head, dim]. For opaque bytes: (bytes per token,).
        block_tokens: Tokens per full block.
        order: Interior order, as the engine names it. 'token,...' (tokens outermost) makes a whole
            context one tensor.
        rank: Which part of a sharded model, 'rank/size' style, free text.
        model: Model and revision, free text; part of the fingerprint.
    """

    dtype: str = "uint8"
    token_shape: tuple[int, ...] = (MIB,)
    block_tokens: int = 1
    order: str = "token,byte"
    rank: str = "0/1"
    model: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "token_shape", tuple(int(n) for n in self.token_shape))
        if self.dtype not in _ITEM_BYTES:
            known = ", ".join(sorted(_ITEM_BYTES))
            raise UsageError(f"unknown dtype {self.dtype!r}: expected one of {known}")
        if self.block_tokens < 1 or not self.token_shape or min(self.token_shape) < 1:
            raise UsageError("a layout needs at least one token and one element per block")
        if self.block_bytes > BLOCK_BYTES_MAX:
            raise UsageError(
                f"block too large: {self.block_bytes} bytes, at most {BLOCK_BYTES_MAX}; "
                "use fewer tokens per block"
            )

    @property
    def token_bytes(self) -> int:
        """Bytes of one token."""
        return math.prod(self.token_shape) * _ITEM_BYTES[self.dtype]

    @property
    def block_bytes(self) -> int:
        """Bytes of a full block, without padding."""
        return self.token_bytes * self.block_tokens

    @property
    def stride(self) -> int:
        """Distance of two blocks in a file or view: `block_bytes` rounded up to 4 KiB."""
        return align_up(self.block_bytes, PAGE)

    def to_json(self) -> str:
        """Encode canonically (sorted keys); the fingerprint is taken over this."""
        return msgspec.json.encode(self, order="sorted").decode()

    @classmethod
    def from_json(cls, text: str) -> "Layout":
        """Decode what `to_json` made."""
        try:
            return msgspec.json.decode(text, type=cls)
        except msgspec.DecodeError as error:
            raise UsageError(f"layout not understood: {error}") from error

    def fingerprint(self) -> bytes:
        """Return 16 bytes that differ when any field differs."""
        return hashlib.blake2b(self.to_json().encode(), digest_size=16).digest()


OPAQUE: Final = Layout()
