"""The checker on whole pools: sound ones, leftovers, reports, and a pool by its path."""

import contextlib
import os
import sqlite3

import pytest

import kvfs
from kvfs.engine.catalog import Catalog
from kvfs.engine.checker import ActionKind, Severity, apply_plan, check_devices, check_pool
from kvfs.errors import BusyError, CorruptionError, NotFoundError
from tests.unit.checker_bench import (
    BLOCKS,
    LARGE_FILE,
    SEGMENT_BYTES,
    SMALL_FILE,
    checker_bench,
)


@pytest.fixture
def bench():
    with checker_bench() as made:
        yield made


# --- sound pools


def test_clean(bench):
    report = bench.check(data=True)
    assert report.is_clean
    assert report.exit_code == 0
    assert report.was_closed
    counts = report.counts
    assert (counts.devices, counts.files) == (1, 2)
    assert counts.blocks == BLOCKS + 3 + 10
    assert counts.verified_blocks == counts.blocks
    assert counts.verified_bytes == BLOCKS * 4096 + SMALL_FILE + LARGE_FILE
    assert counts.sealed_segments >= 3


def test_open_pool(bench):
    with bench.open() as pool:
        devices = [state.device for state in pool.store.state.devices]
        assert check_devices(devices, pool.catalog).is_clean


def test_killed_owner(bench):
    pool = bench.open()
    for state in pool.store.state.devices:
        state.device.close()
    pool.catalog.close()
    for index in pool.store.state.indexes.values():
        index.close()
    report = bench.check(data=True)
    assert not report.was_closed
    assert report.exit_code == 0


def test_nothing_is_modified(bench):
    bench.flip(bench.segments(sealed=True)[0], -1)
    bench.path("staging/left").write_bytes(b"x")
    before = bench.snapshot()
    assert bench.check(data=True).plan
    assert bench.snapshot() == before


def test_progress(bench):
    calls = []
    bench.check(data=True, progress=lambda done, total: calls.append((done, total)))
    assert calls == sorted(calls)
    assert {total for _, total in calls} == {BLOCKS * 4096 + SMALL_FILE + LARGE_FILE}


# --- the tree


def test_leftovers(bench):
    bench.path("staging/left").write_bytes(b"x")
    bench.path("segments/0000001e-00000001.sum").write_bytes(b"x")
    assert bench.codes() == [("NOTE", "staging-leftover")]
    bench.assert_repaired()
    assert not list(bench.path("staging").iterdir())


def test_unknown_files_are_never_touched(bench):
    bench.path("notes.txt").write_bytes(b"mine")
    bench.path("segments/README").write_bytes(b"mine")
    bench.path("segments/00ffffff-00000001.seg").write_bytes(b"")
    found = bench.check(repair=True)
    assert sorted(f.code for f in found.findings) == [
        "segment-out-of-range", "unknown-file", "unknown-file",
    ]  # fmt: skip
    assert found.exit_code == 3
    assert bench.path("notes.txt").read_bytes() == b"mine"


def test_over_capacity(bench):
    for number in range(40):
        path = bench.path(f"segments/{number + 20:08x}-00000001.seg")
        path.write_bytes(b"")
        os.truncate(path, SEGMENT_BYTES)
    assert ("WARNING", "device-over-capacity") in bench.codes()


def test_plan_is_what_is_applied(bench):
    bench.flip(bench.segments(sealed=True)[0], -100)
    device, catalog = bench.device(), Catalog.open(bench.catalog_path)
    report = check_devices([device], catalog)
    kinds = {action.kind for action in report.plan}
    assert ActionKind.FREE_SEGMENT in kinds
    assert all(str(action) for action in report.plan)
    apply_plan(report, [device], catalog)
    assert report.remaining == []
    device.close()
    catalog.close()


def test_findings_say_where_and_what_to_do(bench):
    bench.flip(bench.segments(sealed=True)[0], -100)
    finding = bench.check().findings[0]
    assert "dir0 segment" in finding.where
    assert "expected" in finding.message
    assert "kvfs-admin check --repair" in finding.remedy
    assert finding.is_repairable
    assert str(finding).startswith("error: ")


def test_worst_of_nothing(bench):
    report = bench.check()
    assert report.worst is None
    report.add(Severity.NOTE, "x", "y", "z", "w")
    assert report.exit_code == 0


# --- a pool by its path


@pytest.fixture
def pool_path(tmp_path):
    path = tmp_path / "real"
    kvfs.create_pool(path, [f"dir:{tmp_path}/device?size=64MiB&segment=16MiB"]).close()
    return path


def test_check_pool(pool_path, tmp_path):
    before = (pool_path / "catalog.sqlite").read_bytes()
    report = check_pool(pool_path, data=True)
    assert report.is_clean
    assert report.counts.devices == 1
    assert (pool_path / "catalog.sqlite").read_bytes() == before


def test_check_pool_not_found(tmp_path):
    with pytest.raises(NotFoundError, match="no pool"):
        check_pool(tmp_path)


def test_check_pool_in_use(pool_path):
    with kvfs.open_pool(pool_path), pytest.raises(BusyError, match="in use"):
        check_pool(pool_path)


def test_check_pool_without_its_device(pool_path, tmp_path):
    (tmp_path / "device").rename(tmp_path / "elsewhere")
    for is_repair in (False, True):
        report = check_pool(pool_path, repair=is_repair)
        assert [f.code for f in report.findings] == ["device-missing", "names-not-checked"]
        assert report.exit_code == 14
    assert not (tmp_path / "device").exists()


def test_catalog_whose_uuid_is_none(pool_path):
    with contextlib.closing(sqlite3.connect(pool_path / "catalog.sqlite")) as raw, raw:
        raw.execute("UPDATE meta SET value = 'junk' WHERE key = 'pool_uuid'")
    with pytest.raises(CorruptionError, match=r"no pool's uuid: 'junk'; run 'kvfs-admin check'"):
        kvfs.open_pool(pool_path)
    report = check_pool(pool_path)
    assert [f.code for f in report.findings] == ["catalog-damaged"]


def test_check_pool_with_a_damaged_catalog(pool_path):
    catalog = pool_path / "catalog.sqlite"
    catalog.write_bytes(b"this is no database" * 1000)
    report = check_pool(pool_path)
    assert [f.code for f in report.findings] == ["catalog-damaged"]
    assert report.exit_code == 14


def test_repair_needs_consent(pool_path, tmp_path):
    left = tmp_path / "device" / "staging" / "left"
    left.write_bytes(b"x")
    report = check_pool(pool_path, repair=True, confirm=lambda report: False)
    assert left.exists()
    assert not report.is_repaired
    assert check_pool(pool_path, repair=True, confirm=lambda report: True).is_repaired
    assert not left.exists()
    assert check_pool(pool_path).is_clean
