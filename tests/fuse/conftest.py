"""Mounts for the tests: each ends with an unmount, a look at the log, and a check of the pool."""

import sqlite3
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import kvfs
from kvfs.engine.catalog_schema import NODE_COLUMNS
from kvfs.engine.checker import check_pool
from kvfs.fuse.mount import Mount, mount_in_background
from kvfs.pool import CATALOG_NAME, Pool
from tests.conftest import require_fuse
from tests.fuse.mounting import MountedPool, write_file


@pytest.fixture
def make_mount(tmp_path: Path) -> Iterator[Callable[..., MountedPool]]:
    """Make a pool and mount it in another process."""
    made: list[MountedPool] = []

    def make(**options: Any) -> MountedPool:
        base = tmp_path / f"m{len(made)}"
        base.mkdir()
        mounted = MountedPool(base, **options)
        made.append(mounted)
        return mounted.start()

    try:
        yield make
        for mounted in made:
            mounted.close()
    finally:
        for mounted in made:
            mounted.abandon()


@pytest.fixture
def mounted(make_mount: Callable[..., MountedPool]) -> MountedPool:
    """A pool with an SSD and a DRAM tier, mounted in another process."""
    return make_mount()


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    """An open pool; it is checked when the test is done."""
    (tmp_path / "device").mkdir()
    devices = [
        f"dir:{tmp_path / 'device'}?size=128MiB&segment=16MiB",
        "dram:?size=64MiB&segment=16MiB",
    ]
    pool = kvfs.create_pool(tmp_path / "pool", devices)
    with pool:
        yield pool
    report = check_pool(tmp_path / "pool", data=True)
    assert report.is_clean, report.findings


@pytest.fixture
def mount(pool: Pool, tmp_path: Path) -> Iterator[Mount]:
    """The same pool, mounted by a thread of the test's process."""
    path = tmp_path / "mnt"
    path.mkdir()
    with mount_in_background(pool, path) as mount:
        yield mount


@pytest.fixture(scope="session", params=[True, False], ids=["core", "no-core"])
def shared(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[MountedPool]:
    """One mount for all tests that need none of their own, through kvfs-core and without."""
    require_fuse()
    options = {"core": request.param}
    mounted = MountedPool(tmp_path_factory.mktemp("shared"), dir_mib=1024, mount_options=options)
    mounted.expected_log.append(r"user\.kvfs\.raw of 'f' was not set")  # test_tree.test_errnos
    mounted.start()
    try:
        yield mounted
        mounted.close()
    finally:
        mounted.abandon()


@pytest.fixture
def area(shared: MountedPool, request: pytest.FixtureRequest) -> Path:
    """A namespace of the test's own on the shared mount."""
    path = shared.path / f"area-{zlib.crc32(request.node.nodeid.encode()):x}"
    path.mkdir()
    return path


@pytest.fixture
def mounted_many(
    make_mount: Callable[..., MountedPool], request: pytest.FixtureRequest
) -> MountedPool:
    """A mounted pool with a directory of very many files, made in bulk: 100,000 unless asked."""
    mounted = make_mount()
    mounted.name_count = getattr(request, "param", 100_000)
    (mounted.path / "many").mkdir()
    write_file(mounted.path / "many/file", b"")
    mounted.stop()
    with closing(sqlite3.connect(mounted.pool_path / CATALOG_NAME)) as connection, connection:
        columns = NODE_COLUMNS.replace("node_id, ", "", 1)
        connection.execute(
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?) "
            f"INSERT INTO nodes (node_id, {columns}) "
            f"SELECT node_id + i, {columns.replace(' name,', ' CAST(printf(?, i) AS BLOB),')} "
            "FROM nodes, n WHERE name = CAST(? AS BLOB)",
            (mounted.name_count - 1, "file-%06d", "file"),
        )
    return mounted.start()
