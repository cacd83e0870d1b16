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
    scheme_of,
)
from kvfs.emulation import PROFILES, emulation_of
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
        ("", "expected one of dram:, cxl:, dax:, pmem:, dir:"),
        ("/mnt/kv", "expected one of dram:, cxl:, dax:, pmem:, dir:"),
        ("/mnt/kv?size=1GiB", "for a directory write 'dir:/mnt/kv?size=1GiB'"),
        ("nvme:/x", "unknown device 'nvme:/x'"),
        ("dir:relative", "needs an absolute path"),
        ("dir:", "needs an absolute path"),
        ("dax:dax0.0", "needs an absolute path"),
        ("dax:/dev/dax0.0?persistence=maybe", "one of cpu_cache, memory_controller, page, none"),
        ("dax:/dev/dax0.0?colour=red", "expected size, segment, tier, name or persistence"),
        ("dir:/x?persistence=none", "unknown device option 'persistence'"),
        ("dram:", "is written 'dram:?size=4GiB'"),
        ("dram:/x?size=1GiB", "is written 'dram:?size=4GiB'"),
        ("dram:?size=1GiB&numa=fast", "numa must be the number of a node"),
        ("dram:?size=1GiB&huge=perhaps", "huge must be yes or no"),
        ("dir:/x?numa=1", "unknown device option 'numa'"),
        ("cxl:", "is written 'cxl:node=1?size=64GiB'"),
        ("cxl:node=1", "is written 'cxl:node=1?size=64GiB'"),
        ("cxl:node=x?size=1GiB", "is written 'cxl:node=1?size=64GiB'"),
        ("pmem:mnt", "needs an absolute path"),
        ("emulated:dram:?size=1GiB", "expected one of cxl, pmem, rdma, ssd, then a device"),
        ("emulated:tape:dram:?size=1GiB", "unknown profile 'tape'"),
        ("emulated:cxl", "unknown profile"),
        ("emulated:cxl:emulated:ssd:dir:/x", "unknown device 'emulated:ssd:dir:/x'"),
        ("emulated:cxl:dir:/x?read_latency_ns=-1", "read_latency_ns must be a number from 0"),
        ("emulated:cxl:dir:/x?write_pj_per_byte=1e9", "write_pj_per_byte must be a number"),
        ("emulated:cxl:dir:/x?read_bandwidth=fast", "size not understood"),
        ("dir:/x?read_bandwidth=1GiB", "unknown device option 'read_bandwidth'"),
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


def test_memory_of_a_node() -> None:
    url = parse_device_url("cxl:node=2?size=4GiB&huge=yes")
    assert (url.scheme, url.kind, url.node, url.tier) == ("cxl", "cxl", 2, 1)
    assert parse_device_url("dram:?numa=3&size=4GiB").node == 3
    assert parse_device_url("dram:?size=4GiB").node == -1


def test_an_emulated_device_is_what_lies_below() -> None:
    url = parse_device_url("emulated:ssd:dir:/x?read_bandwidth=2GB&size=1GiB&write_latency_ns=7")
    assert (url.scheme, url.location, url.kind) == ("dir", "/x", "emulated")
    assert (url.profile, url.tier) == ("ssd", 2)
    assert url.options["read_bandwidth"] == "2000000000"
    found = emulation_of(url.profile, url.options)
    assert (found.read_bytes_per_s, found.write_latency_ns) == (2_000_000_000, 7)
    assert found.read_latency_ns == PROFILES["ssd"].emulation.read_latency_ns
    assert parse_device_url(str(url)) == url
    assert parse_device_url("emulated:cxl:dram:?size=1GiB").tier == 1
    assert scheme_of(str(url)) == "dir"
    assert scheme_of("dax:/dev/dax0.0") == "dax"


@given(
    st.sampled_from(["dram:", "cxl:node=1", "dir:/mnt/kv", "emulated:cxl:dir:/a-b_c/d.e"]),
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
