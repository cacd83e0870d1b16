"""Device URLs and pool options."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfs.config import (
    SEGMENT_BYTES_MAX,
    SEGMENT_BYTES_MIN,
    DeviceURL,
    PoolOptions,
    default_segment_bytes,
    parse_device_url,
)
from kvfs.errors import UsageError
from kvfs.units import GIB, MIB, is_power_of_two


def test_a_memory_device() -> None:
    url = parse_device_url("dram:?size=4GiB")
    assert (url.scheme, url.location, url.size_bytes) == ("dram", "", 4 * GIB)
    assert (url.segment_bytes, url.tier, url.name) == (0, 0, "")


def test_a_directory() -> None:
    url = parse_device_url("dir:/mnt/nvme/kv?size=500GiB&tier=3&segment=64MiB&name=ssd0")
    assert (url.scheme, url.location) == ("dir", "/mnt/nvme/kv")
    assert (url.size_bytes, url.segment_bytes) == (500 * GIB, 64 * MIB)
    assert (url.tier, url.name) == (3, "ssd0")
    assert parse_device_url("dir:/x").tier == 2
    dax = parse_device_url("dax:/dev/dax0.0?persistence=memory_controller&size=4GiB")
    assert (dax.scheme, dax.location, dax.tier, dax.size_bytes) == (
        "dax",
        "/dev/dax0.0",
        1,
        4 * GIB,
    )
    assert parse_device_url(str(dax)) == dax
    assert parse_device_url("dir:/x").size_bytes == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected one of dram:, dax:, dir:"),
        ("/mnt/kv", "expected one of dram:, dax:, dir:"),
        ("nvme:/x", "unknown device 'nvme:/x'"),
        ("dir:relative", "needs an absolute path"),
        ("dir:", "needs an absolute path"),
        ("dax:dax0.0", "needs an absolute path"),
        ("dax:/dev/dax0.0?persistence=maybe", "one of cpu_cache, memory_controller, page, none"),
        ("dax:/dev/dax0.0?colour=red", "expected size, segment, tier, name or persistence"),
        ("dir:/x?persistence=none", "unknown device option 'persistence'"),
        ("dram:", "is written 'dram:?size=4GiB'"),
        ("dram:/x?size=1GiB", "is written 'dram:?size=4GiB'"),
        ("dir:/x?colour=red", "unknown device option 'colour'"),
        ("dir:/x?size", "options not understood"),
        ("dir:/x?size=big", "size not understood: 'big'"),
        ("dir:/x?segment=17MiB", "segment must be a power of two"),
        ("dir:/x?segment=8MiB", "segment must be a power of two"),
        ("dir:/x?segment=2GiB", "segment must be a power of two"),
        ("dir:/x?tier=16", "tier must be a number from 0 to 15"),
        ("dir:/x?tier=-1", "tier must be a number from 0 to 15"),
        ("dir:/x?tier=fast", "tier must be a number from 0 to 15"),
        ("dir:/x?name=Up", "device name 'Up'"),
        ("dir:/x?name=../x", "device name '../x'"),
        ("dir:/x?name=" + "n" * 33, "device name"),
    ],
)
def test_bad_urls_say_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_device_url(text)
    assert message in str(caught.value)


@given(
    st.sampled_from(["dram:", "dir:/mnt/kv", "dir:/a-b_c/d.e"]),
    st.sampled_from(["1GiB", "500GiB", "1073741824"]),
    st.sampled_from([None, "16MiB", "1GiB"]),
    st.sampled_from([None, "0", "15"]),
    st.sampled_from([None, "ssd0", "a.b-c_d"]),
)
def test_printing_and_parsing_agree(
    start: str, size: str, segment: str | None, tier: str | None, name: str | None
) -> None:
    given_options = {"size": size, "segment": segment, "tier": tier, "name": name}
    options = [f"{key}={value}" for key, value in given_options.items() if value is not None]
    url = parse_device_url(f"{start}?{'&'.join(options)}")
    assert parse_device_url(str(url)) == url


@given(st.text(max_size=60))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    for prefix in ("", "dir:/", "dram:?", "dir:/x?size="):
        try:
            assert isinstance(parse_device_url(prefix + text), DeviceURL)
        except UsageError:
            continue


@given(st.integers(0, 1 << 50))
def test_default_segments_are_powers_near_a_256th(capacity: int) -> None:
    found = default_segment_bytes(capacity)
    assert is_power_of_two(found)
    assert SEGMENT_BYTES_MIN <= found <= SEGMENT_BYTES_MAX
    if SEGMENT_BYTES_MIN < found < SEGMENT_BYTES_MAX:
        assert 2 / 3 <= capacity / 256 / found <= 3 / 2 + 1e-6


@pytest.mark.parametrize(
    ("capacity", "expected"),
    [
        (0, 16 * MIB), (4 * GIB, 16 * MIB), (16 * GIB, 64 * MIB), (500 * GIB, GIB),
        (100 * GIB, 512 * MIB), (1 << 50, GIB),
    ],
)  # fmt: skip
def test_default_segments(capacity: int, expected: int) -> None:
    assert default_segment_bytes(capacity) == expected


def test_pool_options_have_limits() -> None:
    assert PoolOptions().verify_reads
    for changes in (
        {"async_delay_ms": 0}, {"async_delay_ms": 60_001}, {"pinned_share": -0.1},
        {"pinned_share": 1.1},
    ):  # fmt: skip
        with pytest.raises(UsageError, match=next(iter(changes))):
            PoolOptions(**changes)
