"""The simulated disk is a disk, and the model of a power cut takes what it may and no more."""

import random
import uuid
from collections.abc import Iterator

import pytest

from kvfs.devices.directory import DirectoryDevice
from tests.conformance.device_suite import (
    CAPACITY_BYTES,
    DEVICE_UUID,
    SEGMENT_BYTES,
    DeviceSuite,
    Opener,
)
from tests.crash.events import Commit, Journal, SyncCatalog
from tests.crash.medium import Medium
from tests.crash.simfs import SimFileSystem


class TestSimulatedDisk(DeviceSuite):
    """A directory device cannot tell it from a real directory, but for the space it reserves."""

    @pytest.fixture
    def opener(self) -> Iterator[Opener]:
        files = SimFileSystem()

        def opened(capacity_bytes: int = CAPACITY_BYTES) -> DirectoryDevice:
            return DirectoryDevice(
                files, index=3, uuid=uuid.UUID(bytes=DEVICE_UUID.bytes), name="subject",
                capacity_bytes=capacity_bytes, segment_bytes=SEGMENT_BYTES,
            )  # fmt: skip

        yield opened
        files.discard()

    def test_a_map_that_can_write_keeps_the_seal_off(self) -> None:
        """Nothing tells of maps here: a scenario says how often a seal is refused."""

    def test_space_is_reserved(self) -> None:
        """Files are sparse here, so that a state costs no more than its contents."""


@pytest.fixture
def journal() -> Journal:
    return Journal()


@pytest.fixture
def disk(journal: Journal) -> Iterator[SimFileSystem]:
    files = SimFileSystem(0, journal)
    yield files
    files.discard()


def outcomes(journal: Journal, randoms: int = 40) -> list[dict[str, bytes]]:
    """Return the distinct sets of files that a power cut may leave now."""
    medium = Medium.replay(journal)
    found = []
    for choice in medium.choices("test", randoms):
        files = medium.image(choice, 0, {}).disks[0]
        if files not in found:
            found.append(files)
    return found


def test_what_was_synced_stays(disk: SimFileSystem, journal: Journal) -> None:
    file = disk.create("a", 8192)
    file.write(0, b"x" * 8192)
    file.sync()
    disk.sync_directory(".")
    assert outcomes(journal) == [{"a": b"x" * 8192}]
    file.close()


def test_a_synced_file_without_a_synced_name_may_be_lost(
    disk: SimFileSystem, journal: Journal
) -> None:
    file = disk.create("a")
    file.write(0, b"content")
    file.sync()
    file.close()
    assert sorted(outcomes(journal), key=len) == [{}, {"a": b"content"}]


def test_a_name_without_synced_contents_may_be_anything(
    disk: SimFileSystem, journal: Journal
) -> None:
    file = disk.create("a", 4096)
    file.write(0, b"x" * 4096)
    file.close()
    disk.sync_directory(".")
    found = [files["a"] for files in outcomes(journal)]
    assert b"" in found
    assert bytes(4096) in found
    assert b"x" * 4096 in found
    torn = [raw for raw in found if len(set(raw)) == 2]
    assert torn, "no write was torn"
    for raw in torn:
        assert all(len(set(raw[i : i + 64])) == 1 for i in range(0, 4096, 64))


def test_later_writes_may_arrive_without_earlier_ones(
    disk: SimFileSystem, journal: Journal
) -> None:
    file = disk.create("a", 8192)
    file.sync()
    disk.sync_directory(".")
    file.write(0, b"1" * 4096)
    file.write(4096, b"2" * 4096)
    file.close()
    found = {(files["a"][:1], files["a"][4096:4097]) for files in outcomes(journal)}
    assert {(b"\0", b"\0"), (b"1", b"\0"), (b"\0", b"2"), (b"1", b"2")} <= found


def test_a_renaming_in_one_directory_is_atomic(disk: SimFileSystem, journal: Journal) -> None:
    for name, content in (("a", b"old"), ("b", b"new")):
        file = disk.create(name)
        file.write(0, content)
        file.sync()
        file.close()
    disk.sync_directory(".")
    disk.rename("b", "a")
    assert outcomes(journal) == [{"a": b"new"}, {"a": b"old", "b": b"new"}]
    disk.sync_directory(".")
    assert outcomes(journal) == [{"a": b"new"}]


def test_a_renaming_between_directories_never_loses_both_names(
    disk: SimFileSystem, journal: Journal
) -> None:
    disk.create("x/a").close()
    disk.sync_directory("x")
    disk.rename("x/a", "y/a")
    assert {tuple(files) for files in outcomes(journal)} == {("x/a",), ("y/a",), ("x/a", "y/a")}
    disk.sync_directory("x")
    disk.sync_directory("y")
    assert outcomes(journal) == [{"y/a": b""}]


def test_an_unlinked_file_may_come_back_until_its_directory_is_synced(
    disk: SimFileSystem, journal: Journal
) -> None:
    disk.create("a").close()
    disk.sync_directory(".")
    disk.unlink("a")
    assert sorted(outcomes(journal), key=len) == [{}, {"a": b""}]
    disk.sync_directory(".")
    assert outcomes(journal) == [{}]


def test_the_catalog_loses_only_its_last_commits(journal: Journal) -> None:
    for event in (Commit(b"1"), Commit(b"2"), SyncCatalog(), Commit(b"3"), Commit(b"4")):
        journal.add(event)
    medium = Medium.replay(journal)
    assert [medium.commits[i] for i in medium.catalogs()] == [b"2", b"3", b"4"]


def test_a_failed_sync_leaves_the_cache_clean_and_the_medium_behind(
    disk: SimFileSystem, journal: Journal
) -> None:
    file = disk.create("a", 4096 * 64)
    file.sync()
    disk.sync_directory(".")
    for i in range(64):
        file.write(4096 * i, b"x" * 4096)
    disk.failing_syncs, disk.random = 1, random.Random(1)
    with pytest.raises(OSError, match="injected"):
        file.sync()
    medium = disk.read_uncached("a", 0, 4096 * 64)
    assert disk.read("a") == b"x" * 4096 * 64 != medium
    file.write(0, b"y" * 4096)
    file.sync()
    file.close()
    after = b"y" * 4096 + medium[4096:]
    assert disk.read_uncached("a", 0, 4096 * 64) == after
    assert outcomes(journal) == [{"a": after}], "a later sync must not bring back what was lost"
