"""A device that is not there: nothing is judged, repaired or written without it."""

from pathlib import Path

import pytest

from kvfs.engine.checker import check_pool
from kvfs.errors import CorruptionError, NotFoundError
from kvfs.lifecycle import create_pool, open_pool
from kvfs.tree import Tree


@pytest.fixture
def absent(tmp_path: Path) -> Path:
    """A closed pool with a file, whose device is elsewhere: its filesystem is not mounted."""
    url = f"dir:{tmp_path}/blocks?size=64MiB&segment=16MiB"
    with create_pool(tmp_path / "pool", [url]) as pool:
        handle = pool.files.open_write(Tree(pool).create_file(1, "f", 0o644, 0, 0), truncate=True)
        pool.files.write(handle, 0, b"content")
        pool.files.close_write(handle)
    (tmp_path / "blocks").rename(tmp_path / "elsewhere")
    return tmp_path


def bring_back(root: Path) -> None:
    if (root / "blocks").exists():
        assert not list((root / "blocks").iterdir()), "something was put into a bare mountpoint"
        (root / "blocks").rmdir()
    (root / "elsewhere").rename(root / "blocks")
    with open_pool(root / "pool") as pool:
        reader = pool.files.open_read(pool.catalog.resolve(1, "f"))
        assert bytes(pool.files.read(reader, 0, 100)) == b"content"
        pool.files.close_read(reader)


@pytest.mark.parametrize("is_mountpoint_there", [False, True])
def test_repair_takes_no_names_while_a_device_is_absent(
    absent: Path, *, is_mountpoint_there: bool
) -> None:
    if is_mountpoint_there:
        (absent / "blocks").mkdir()
    report = check_pool(absent / "pool", repair=True)
    assert [finding.code for finding in report.findings] == ["device-missing", "names-not-checked"]
    assert not report.plan
    assert report.exit_code == 14
    bring_back(absent)


def test_opening_puts_nothing_into_a_bare_mountpoint(absent: Path) -> None:
    with pytest.raises(NotFoundError, match="mount"):
        open_pool(absent / "pool")
    (absent / "blocks").mkdir()
    with pytest.raises(CorruptionError, match="never formatted; mount"):
        open_pool(absent / "pool")
    bring_back(absent)
