"""Sizes, alignment and how they are printed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfs.errors import UsageError
from kvfs.units import (
    GIB,
    KIB,
    MIB,
    align_up,
    format_bytes,
    format_duration,
    is_power_of_two,
    parse_bytes,
)


@given(st.integers(0, 1 << 60), st.integers(1, 1 << 30))
def test_align_up_is_the_next_multiple(value: int, alignment: int) -> None:
    found = align_up(value, alignment)
    assert found % alignment == 0
    assert value <= found < value + alignment


def test_powers_of_two() -> None:
    assert [n for n in range(-4, 20) if is_power_of_two(n)] == [1, 2, 4, 8, 16]
    assert is_power_of_two(1 << 60)
    assert not is_power_of_two((1 << 60) + 1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0), ("65536", 65536), ("1b", 1), ("4GiB", 4 * GIB), ("4gib", 4 * GIB),
        ("512M", 512 * MIB), ("512 MiB", 512 * MIB), (" 1k ", KIB), ("1.5GiB", 3 * GIB // 2),
        ("1kB", 1000), ("2TB", 2 * 10**12), ("2TiB", 2048 * GIB), ("3t", 3072 * GIB),
    ],
)  # fmt: skip
def test_parse_bytes(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1", "4 G B", "1e9", "0x10", "4GiBs", "1,5G", "nan", "inf", "1.", ".5"]
)
def test_sizes_not_understood(text: str) -> None:
    with pytest.raises(UsageError, match="expected a number with KiB, MiB, GiB or TiB"):
        parse_bytes(text)


@given(st.integers(0, 1 << 50), st.sampled_from(["", "b", "k", "KiB", "m", "MiB", "g", "GiB"]))
def test_whole_numbers_are_exact(value: int, suffix: str) -> None:
    factor = {"": 1, "b": 1, "k": KIB, "m": MIB, "g": GIB}[suffix.lower()[:1]]
    assert parse_bytes(f"{value}{suffix}") == value * factor


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536, "1.5 KiB"), (MIB, "1.0 MiB"),
        (int(7.1 * GIB), "7.1 GiB"), (1 << 40, "1.0 TiB"), (5000 << 40, "5000.0 TiB"),
        (-2048, "-2.0 KiB"),
    ],
)  # fmt: skip
def test_format_bytes(count: int, text: str) -> None:
    assert format_bytes(count) == text


@given(st.integers(0, 1 << 60))
def test_printed_sizes_are_read_back_nearly(count: int) -> None:
    assert parse_bytes(format_bytes(count)) == pytest.approx(count, rel=0.05)


@pytest.mark.parametrize(
    ("nanoseconds", "text"),
    [
        (0, "0 ns"), (9_999, "9999 ns"), (11_000, "11 us"), (999_499, "999 us"),
        (1_100_000, "1.10 ms"), (1_500_000_000, "1.5 s"), (101_000_000_000, "1m41s"),
        (3_600_000_000_000, "60m00s"),
    ],
)  # fmt: skip
def test_format_duration(nanoseconds: int, text: str) -> None:
    assert format_duration(nanoseconds) == text
