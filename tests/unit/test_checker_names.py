"""The checker on names and superblocks: what belongs together, and what is missing."""

import dataclasses
import os
import sqlite3
import uuid

import pytest

from kvfs.engine import format as fmt
from kvfs.engine.catalog import Catalog
from kvfs.engine.catalog_schema import ROOT_NODE_ID
from kvfs.units import PAGE
from tests.unit.checker_bench import (
    BLOCKS,
    SEGMENT_BYTES,
    checker_bench,
)


@pytest.fixture
def bench():
    with checker_bench() as made:
        yield made


# --- file segments and names


@pytest.mark.parametrize("place", [-100, -PAGE - 100, -fmt.entry_position(2) + 5])
def test_sidecar(bench, place):
    bench.flip(bench.segments(sealed=True, files=True)[0], place)
    report = bench.check()
    assert report.exit_code == 14
    assert "file-not-whole" in [finding.code for finding in report.findings]
    bench.assert_repaired()
    with bench.open() as pool:
        assert bench.read(pool, "large") is None


def test_sidecar_missing(bench):
    bench.segments(sealed=True, files=True)[0].unlink()
    assert ("NOTE", "segment-never-started") in bench.codes()
    bench.assert_repaired()


def test_payload_file_missing(bench):
    bench.segments(sealed=True, files=True)[0].with_suffix(".file").unlink()
    codes = bench.codes()
    assert ("NOTE", "staging-leftover") in codes
    assert ("WARNING", "file-not-whole") in codes
    bench.assert_repaired()


def test_payload_file_truncated(bench):
    os.truncate(bench.segments(sealed=True, files=True)[0].with_suffix(".file"), 30_000)
    assert ("ERROR", "segment-truncated") in bench.codes()
    bench.assert_repaired()


def test_unnamed_file_segment(bench):
    catalog = Catalog.open(bench.catalog_path)
    catalog.remove_nodes([catalog.resolve(ROOT_NODE_ID, "s/large").node_id])
    catalog.close()
    assert bench.codes() == [("NOTE", "file-segment-unnamed")]
    bench.assert_repaired()
    assert not list(bench.path("segments").glob("*.file"))


def test_namespace_that_is_gone(bench):
    catalog = Catalog.open(bench.catalog_path)
    catalog.drop_namespace(catalog.namespace_by_name("s").namespace_id)
    catalog.close()
    assert set(bench.codes()) == {("NOTE", "segment-namespace-unknown")}


def test_catalog_that_contradicts_itself(bench):
    with sqlite3.connect(bench.catalog_path) as connection:
        connection.execute("UPDATE nodes SET parent_id = 4711 WHERE name = x'6c61726765'")
    connection.close()
    report = bench.check()
    assert ("ERROR", "catalog") in [(f.severity.name, f.code) for f in report.findings]
    assert report.exit_code == 14


# --- superblock


def test_superblock_damaged(bench):
    bench.flip(bench.path("kvfs.superblock"), 100)
    assert bench.codes() == [("ERROR", "superblock-damaged")]
    bench.assert_repaired()
    with bench.open() as pool:
        assert bench.assert_right(pool) == BLOCKS
        assert bench.read(pool, "large") == bench.large


def test_superblock_table_damaged(bench):
    bench.flip(bench.path("kvfs.superblock"), PAGE + 20)
    assert bench.codes() == [("ERROR", "superblock-damaged")]
    bench.assert_repaired()


def test_superblock_missing(bench):
    bench.path("kvfs.superblock").unlink()
    assert bench.codes() == [("ERROR", "superblock-missing")]
    bench.assert_repaired()


def test_empty_directory_is_not_made_a_device(bench):
    """A filesystem that is not mounted must not be taken for a device that lost its superblock."""
    for path in [*bench.path("segments").iterdir(), bench.path("kvfs.superblock")]:
        path.unlink()
    report = bench.check(repair=True)
    assert [f.code for f in report.remaining] == ["superblock-missing", "names-not-checked"]
    assert "mount" in report.remaining[0].remedy
    assert not bench.path("kvfs.superblock").exists()


def superblock(bench, **changes):
    path = bench.path("kvfs.superblock")
    found = fmt.decode_superblock(path.read_bytes(), "here")
    path.write_bytes(fmt.encode_superblock(dataclasses.replace(found, **changes)))


def test_superblock_of_another_pool(bench):
    superblock(bench, pool_uuid=uuid.UUID(int=1))
    report = bench.check(repair=True)
    assert (report.findings[0].severity.name, report.findings[0].code) == (
        "ERROR",
        "superblock-foreign",
    )
    assert bench.check().exit_code == 14


def test_superblock_with_other_geometry(bench):
    superblock(bench, capacity_bytes=64 * SEGMENT_BYTES)
    assert bench.codes() == [("WARNING", "superblock-mismatch")]
    bench.assert_repaired()


def test_superblock_older_than_segments(bench):
    superblock(bench, generation_limit=2)
    codes = set(bench.codes())
    assert codes == {("ERROR", "generation-beyond-limit")}
    bench.assert_repaired()
    limit = fmt.decode_superblock(bench.path("kvfs.superblock").read_bytes(), "").generation_limit
    assert limit > 1 << 20


def test_device_that_was_moved(bench):
    superblock(bench, location=1)
    assert bench.codes() == [("WARNING", "device-moved")]
