"""Counting: per namespace and device, by reason; and what Prometheus is shown of it."""

import http.client
import urllib.request

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

import kvfs
from kvfs.errors import DeviceError, UnavailableError, UsageError
from kvfs.exporter import Address, Exporter, parse_address
from kvfs.exposition import render
from kvfs.metrics import Counters, Histogram, Tally
from tests.unit.engine_bench import SPACE, chain, disk, flip

# --- counters


def test_histogram():
    histogram = Histogram()
    for nanoseconds in (0, 1, 1023, 1024, 1 << 40):
        histogram.note(nanoseconds)
    assert {bits: count for bits, count in enumerate(histogram.counts) if count} == {
        0: 1, 1: 1, 10: 1, 11: 1, 41: 1,
    }  # fmt: skip
    assert len(histogram.counts) == 64
    assert histogram.count == 5
    assert histogram.sum_ns == 1 + 1023 + 1024 + (1 << 40)


def test_what_a_namespace_did_outlives_it():
    counters = Counters(2)
    counters.begin(1)
    counters.begin(2)
    counters[1].blocks_put += 3
    counters[2].blocks_put += 4
    counters[1].read[1] += np.array([5, 50], np.uint64)
    counters[1].evicted[1] += 6
    counters[1].times["put"].note(100)
    before = counters.snapshot()
    counters.retire(1)
    counters.retire(1)
    assert counters.snapshot() == before
    assert (before["blocks_put"], before["blocks_read"], before["segments_evicted"]) == (7, 5, 6)
    assert before["bytes_read"] == 50
    assert counters.total().times["put"].count == 1
    assert set(counters) == {2}
    assert counters[1] is counters[99] is counters.gone  # nonsense takes no room
    assert set(counters) == {2}


def test_a_tally_adds_all_it_has():
    """A field that `add` forgets would get lost with its namespace."""
    one = Tally(2)
    for name in Tally.__slots__:
        value = getattr(one, name)
        if isinstance(value, int) and name != "devices":
            setattr(one, name, 3)
        elif isinstance(value, list | np.ndarray):
            value[1] = 5
    one.times["lease"].note(7)
    sums = Tally(2)
    sums.add(one)
    sums.add(one)
    for name in Tally.__slots__:
        if name not in ("devices", "times", "prefix_times"):
            mine, theirs = np.asarray(getattr(sums, name)), np.asarray(getattr(one, name))
            assert theirs.any(), name
            assert (mine == 2 * theirs).all(), name
    assert sums.times["lease"].sum_ns == 14
    assert sums.prefix_times is sums.times["match_prefix"]


# --- where things happen


def test_bad_blocks_and_broken_pins(make, tmp_path):
    engine = make(disk(tmp_path))
    keys, _ = chain(4)
    engine.put(keys)
    flip(engine, keys[1], tmp_path)
    flip(engine, keys[2], tmp_path)
    engine = engine.reopen(lambda: disk(tmp_path))
    engine.store.pin(SPACE, keys[:2])
    assert engine.read(keys[:2]) == [True, False]
    lease = engine.store.lease(SPACE, keys)
    engine.store.release(lease)
    tally = engine.state.counters[SPACE]
    assert tally.bad_checksums == [2]
    assert tally.bad_reads == [0]
    assert tally.pins_broken == 1  # the one that was pinned
    assert tally.misses_unreadable == 2
    assert tally.misses_absent == 1  # the first bad one, asked for again
    assert tally.leased.tolist() == [[2, 2 * 4096]]
    assert tally.read.tolist() == [[1, 4096]]
    engine.close()


def test_refusals_by_reason(make, tmp_path):
    engine = make(disk(tmp_path, 4))
    kept = engine.fill(2)
    engine.store.pin(SPACE, kept[:13])
    engine.state.devices[0].is_offline = True
    with pytest.raises(UnavailableError):
        engine.put(chain(1)[0])
    tally = engine.state.counters[SPACE]
    assert (tally.refused_no_device, tally.refused_no_space) == (1, 0)
    engine.abandon()


def test_times_are_those_of_the_clock(make, tmp_path):
    engine = make(disk(tmp_path))
    keys, _ = chain(2)
    engine.put(keys)
    engine.resident(keys)
    times = engine.state.counters[SPACE].times
    assert times["put"].count == 1
    assert times["put"].sum_ns == 0  # the clock stood still
    with engine.state.activity.during(SPACE, times["lookup"]):
        engine.clock.advance(5000)
    assert times["lookup"].sum_ns == 5000
    with (
        pytest.raises(DeviceError),
        engine.state.activity.during(SPACE, times["lookup"]),
    ):
        raise DeviceError("it took as long all the same")
    assert times["lookup"].count == 2
    engine.close()


# --- what is shown


def test_names_that_are_no_text(pool):
    pool.namespace('a"b\\c\nd\udce9', kvfs.Layout("uint8", (4096,), 1))
    text = render(pool).decode("utf-8")
    labels = {
        sample.labels["namespace"]
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if "namespace" in sample.labels
    }
    assert labels == {"default", 'a"b\\c\nd\\xe9'}


def test_histograms_are_cumulative(pool):
    space = pool.namespace("m", kvfs.Layout("uint8", (4096,), 1))
    keys, _ = space.keys(range(3))
    for _ in range(5):
        space.lookup(keys)
    pool.store.state.counters[space.info.namespace_id].times["lookup"].note(1 << 50)
    buckets = [
        (float(sample.labels["le"]), sample.value)
        for family in text_string_to_metric_families(render(pool).decode())
        for sample in family.samples
        if sample.name == "kvfs_operation_seconds_bucket" and sample.labels["operation"] == "lookup"
    ]
    assert buckets == sorted(buckets)
    assert buckets[0][0] == 1.024e-6
    assert buckets[-1] == (float("inf"), 6)
    assert buckets[-2][1] == 5


@pytest.mark.parametrize(
    ("text", "address", "shown"),
    [
        ("9105", ("127.0.0.1", 9105), "127.0.0.1:9105"),
        ("0.0.0.0:9105", ("0.0.0.0", 9105), "0.0.0.0:9105"),
        ("[::1]:9105", ("::1", 9105), "[::1]:9105"),
        ("localhost:0", ("localhost", 0), "localhost:0"),
    ],
)
def test_addresses(text, address, shown):
    assert parse_address(text) == address
    assert str(parse_address(text)) == shown


@pytest.mark.parametrize("text", ["", "x", ":9105", "65536", "1.2.3.4:", "1.2.3.4:x"])
def test_no_address(text):
    with pytest.raises(UsageError, match="expected PORT or ADDRESS:PORT"):
        parse_address(text)


def test_address_of_another_host(pool):
    with pytest.raises(UnavailableError, match="give an address of this host"):
        Exporter(pool, Address("192.0.2.1", 0))


def test_scrape_of_a_closed_pool_ends_nothing(place):
    with place.create() as pool:
        exporter = Exporter(pool, Address("127.0.0.1", 0))
        url = f"http://{exporter.address}/metrics"
    for _ in range(2):
        with pytest.raises(http.client.RemoteDisconnected):
            urllib.request.urlopen(url, timeout=30)
    exporter.close()
    exporter.close()
