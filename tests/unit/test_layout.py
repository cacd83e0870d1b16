"""Layouts: sizes, canonical text, fingerprints, and what is refused."""

import dataclasses

import pytest

from kvfs.errors import UsageError
from kvfs.layout import BLOCK_BYTES_MAX, OPAQUE, Layout
from kvfs.units import MIB, PAGE

MODEL = Layout("bfloat16", (30, 2, 3, 64), 16, "token,layer", "1/2", "small@1")


@pytest.mark.parametrize(
    ("layout", "token_bytes", "block_bytes", "stride"),
    [
        (OPAQUE, MIB, MIB, MIB),
        (MODEL, 23040, 368640, 368640),
        (Layout("uint8", (1,)), 1, 1, PAGE),
        (Layout("float32", (1024,), 4), 4096, 16384, 16384),
        (Layout("float16", (3, 5), 7), 30, 210, PAGE),
        (Layout("uint8", (4097,)), 4097, 4097, 2 * PAGE),
        (Layout("uint8", (BLOCK_BYTES_MAX,)), BLOCK_BYTES_MAX, BLOCK_BYTES_MAX, BLOCK_BYTES_MAX),
    ],
)
def test_sizes(layout: Layout, token_bytes: int, block_bytes: int, stride: int) -> None:
    assert layout.token_bytes == token_bytes
    assert layout.block_bytes == block_bytes
    assert layout.stride == stride


@pytest.mark.parametrize("layout", [OPAQUE, MODEL])
def test_text_round_trip(layout: Layout) -> None:
    read = Layout.from_json(layout.to_json())
    assert read == layout
    assert read.fingerprint() == layout.fingerprint()
    assert len(read.fingerprint()) == 16


def test_text_and_fingerprint_never_change() -> None:
    assert MODEL.to_json() == (
        '{"block_tokens":16,"dtype":"bfloat16","model":"small@1","order":"token,layer",'
        '"rank":"1/2","token_shape":[30,2,3,64]}'
    )
    assert MODEL.fingerprint().hex() == "df8ad1d25a6fb032426e7cb00882d6e2"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dtype", "float16"),
        ("token_shape", (30, 2, 64, 3)),
        ("block_tokens", 32),
        ("order", "layer,token"),
        ("rank", "2/2"),
        ("model", "small@2"),
    ],
)
def test_fingerprint_differs_with_every_field(field: str, value: object) -> None:
    changed = dataclasses.replace(MODEL, **{field: value})
    assert changed.fingerprint() != MODEL.fingerprint()


def test_shape_becomes_a_tuple() -> None:
    layout = Layout("uint8", [8, 4])  # type: ignore[arg-type]
    assert layout.token_shape == (8, 4)
    assert layout == Layout("uint8", (8, 4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("int4", (8,)), "unknown dtype 'int4': expected one of bfloat16"),
        (("uint8", ()), "at least one token"),
        (("uint8", (8, 0)), "at least one token"),
        (("uint8", (8,), 0), "at least one token"),
        (("uint8", (BLOCK_BYTES_MAX + 1,)), "block too large: 268435457 bytes"),
    ],
)
def test_refused(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Layout(*arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ['{"dtype": 3}', '{"block_tokens": "x"}', "[]", "{", ""])
def test_text_not_understood(text: str) -> None:
    with pytest.raises(UsageError, match="layout not understood"):
        Layout.from_json(text)
