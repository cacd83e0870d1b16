"""Transactions, persistence, failure and files of the catalog."""

import contextlib
import errno
import os
import resource
import shutil
import sqlite3
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvfs.engine.catalog import Catalog
from kvfs.engine.catalog_database import CHECKPOINT_CHANGES
from kvfs.engine.catalog_schema import EPOCH_MAX, EPOCH_NODE_BITS, ROOT_NODE_ID, NodeState, Origin
from kvfs.errors import (
    BusyError,
    ClosedError,
    CorruptionError,
    ExistsError,
    FormatVersionError,
    NoSpaceError,
    NotFoundError,
    PoisonedError,
    RefusedError,
    UsageError,
)
from kvfs.layout import OPAQUE

POOL = uuid.UUID(int=7)
NS = 0x1234


def add_namespace(catalog: Catalog) -> int:
    return catalog.create_namespace(NS, "default", OPAQUE, "cache", 1, 0o755, 0, 0).root_node_id


def add_file(catalog: Catalog, name: str) -> int:
    return catalog.create_context(
        ROOT_NODE_ID, name, NS, Origin.FILE, NodeState.PENDING, 0o644, 0, 0, 2
    ).node_id


def add_files(catalog: Catalog, count: int) -> None:
    with catalog.transaction():
        for index in range(count):
            add_file(catalog, f"file-{index}")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "catalog.db"


@pytest.fixture
def catalog(path: Path) -> Iterator[Catalog]:
    made = Catalog.create(path, POOL)
    yield made
    made.close()


@contextlib.contextmanager
def file_size_limit(nbytes: int) -> Iterator[None]:
    """Let every write beyond `nbytes` of any file fail with EFBIG, a real I/O error."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class TestFiles:
    def test_content_survives_close_and_open(self, path: Path) -> None:
        catalog = Catalog.create(path, POOL)
        add_namespace(catalog)
        catalog.close()
        with contextlib.closing(Catalog.open(path)) as again:
            assert again.meta("pool_uuid") == str(POOL)
            assert [found.name for found in again.namespaces()] == ["default"]
            assert again.check() == []

    def test_create_refuses_a_path_that_is_taken(self, path: Path) -> None:
        path.write_bytes(b"mine")
        with pytest.raises(ExistsError, match=r"catalog exists: .*; open it"):
            Catalog.create(path, POOL)
        assert path.read_bytes() == b"mine"

    def test_open_reports_a_missing_file_and_makes_none(self, path: Path) -> None:
        with pytest.raises(NotFoundError, match="no catalog"):
            Catalog.open(path)
        assert not path.exists()

    def test_open_refuses_another_version(self, path: Path) -> None:
        Catalog.create(path, POOL).close()
        with contextlib.closing(sqlite3.connect(path)) as raw:
            raw.execute("PRAGMA user_version=3")
        with pytest.raises(FormatVersionError, match=r"expected 2, found 3"):
            Catalog.open(path)

    @pytest.mark.parametrize("content", [b"", b"x", b"no database at all" * 500])
    def test_open_refuses_what_is_no_catalog_and_leaves_it_alone(
        self, path: Path, content: bytes
    ) -> None:
        path.write_bytes(content)
        with pytest.raises(CorruptionError):
            Catalog.open(path)
        assert path.read_bytes() == content

    def test_open_refuses_a_database_of_another_program(self, path: Path) -> None:
        with contextlib.closing(sqlite3.connect(path)) as raw:
            raw.execute("CREATE TABLE songs (name TEXT)")
        before = path.read_bytes()
        with pytest.raises(CorruptionError, match="not a catalog of kvfs"):
            Catalog.open(path)
        assert path.read_bytes() == before

    def test_open_refuses_a_catalog_without_a_table(self, path: Path) -> None:
        Catalog.create(path, POOL).close()
        with contextlib.closing(sqlite3.connect(path)) as raw:
            raw.execute("DROP TABLE devices")
        with pytest.raises(CorruptionError, match=r"lacks a table: .*: devices"):
            Catalog.open(path)

    def test_second_open_is_busy(self, path: Path, catalog: Catalog) -> None:
        with pytest.raises(BusyError, match="in use"):
            Catalog.open(path)
        assert catalog.check() == []

    def test_damaged_pages_are_reported(self, path: Path) -> None:
        catalog = Catalog.create(path, POOL)
        root = add_namespace(catalog)
        add_files(catalog, 200)
        catalog.close()
        raw = bytearray(path.read_bytes())
        for page in range(4096, len(raw), 4096):
            raw[page : page + 64] = b"\xff" * 64
        path.write_bytes(raw)
        with pytest.raises(CorruptionError), contextlib.closing(Catalog.open(path)) as again:
            again.children(root)

    def test_close_twice_and_use_after_close(self, path: Path) -> None:
        catalog = Catalog.create(path, POOL)
        catalog.close()
        catalog.close()
        for use in (
            lambda: catalog.node(ROOT_NODE_ID),
            lambda: catalog.set_meta("a", "b"),
            catalog.sync,
            catalog.check,
        ):
            with pytest.raises(ClosedError):
                use()
        assert not path.with_name("catalog.db-wal").exists()

    def test_a_name_with_uri_characters(self, tmp_path: Path) -> None:
        path = tmp_path / "what?mode=memory#%41.db"
        Catalog.create(path, POOL).close()
        assert path.stat().st_size > 0
        Catalog.open(path).close()


class TestTransactions:
    def test_nested_scopes_join(self, catalog: Catalog) -> None:
        with contextlib.suppress(ZeroDivisionError), catalog.transaction():
            with catalog.transaction():
                add_namespace(catalog)
            raise ZeroDivisionError
        assert catalog.namespaces() == []

    def test_a_refused_call_inside_a_scope_leaves_the_rest(self, catalog: Catalog) -> None:
        with catalog.transaction():
            add_namespace(catalog)
            with pytest.raises(ExistsError):
                add_namespace(catalog)
            with pytest.raises(NotFoundError):
                catalog.node(999)
            add_file(catalog, "kept")
        assert catalog.lookup(ROOT_NODE_ID, "kept") is not None

    def test_other_threads_wait_for_the_end(self, catalog: Catalog) -> None:
        add_namespace(catalog)
        seen: list[int] = []
        with catalog.transaction():
            add_file(catalog, "a")
            reader = threading.Thread(
                target=lambda: seen.append(catalog.count_children(ROOT_NODE_ID))
            )
            reader.start()
            add_file(catalog, "b")
            assert seen == []
        reader.join()
        assert seen == [3]

    def test_many_threads(self, catalog: Catalog) -> None:
        add_namespace(catalog)
        failures: list[BaseException] = []

        def work(number: int) -> None:
            try:
                for index in range(25):
                    add_file(catalog, f"{number}-{index}")
                    if index % 5 == number:
                        catalog.sync()
                    assert catalog.lookup(ROOT_NODE_ID, f"{number}-{index}") is not None
            except BaseException as error:  # noqa: BLE001
                failures.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        assert catalog.count_children(ROOT_NODE_ID) == 101

    def test_hooks_follow_commits_and_syncs(self) -> None:
        events: list[str] = []
        connection = sqlite3.connect(":memory:")
        catalog = Catalog.from_connection(
            connection, lambda: events.append("commit"), lambda: events.append("sync")
        )
        assert events == []
        add_namespace(catalog)
        assert events == ["commit", "sync", "commit"]  # the epoch is persisted first
        events.clear()
        with catalog.transaction():
            add_file(catalog, "a")
            add_file(catalog, "b")
        catalog.sync()
        with pytest.raises(ZeroDivisionError), catalog.transaction():
            raise ZeroDivisionError
        catalog.lookup(ROOT_NODE_ID, "a")
        assert events == ["commit", "sync"]

    def test_an_image_of_a_connection_opens(self) -> None:
        connection = sqlite3.connect(":memory:")
        catalog = Catalog.from_connection(connection, pool_uuid=POOL)
        add_namespace(catalog)
        copy = sqlite3.connect(":memory:")
        copy.deserialize(connection.serialize())
        again = Catalog.from_connection(copy)
        assert again.meta("pool_uuid") == str(POOL)
        assert add_file(again, "x") >= 2 << EPOCH_NODE_BITS
        assert again.check() == []


class TestFailure:
    def memory_catalog(self, codes: list[int]) -> Catalog:
        """A catalog whose syncs fail with these error numbers, first one first."""

        def on_sync() -> None:
            if codes:
                code = codes.pop(0)
                raise OSError(code, os.strerror(code))

        connection = sqlite3.connect(":memory:")
        return Catalog.from_connection(connection, on_sync=on_sync)

    def assert_poisoned(self, catalog: Catalog) -> None:
        assert catalog.is_poisoned
        for use in (lambda: catalog.set_meta("a", "b"), catalog.sync):
            with pytest.raises(PoisonedError, match=r"takes no more writes: .*reopen the pool"):
                use()
        assert catalog.node(ROOT_NODE_ID).is_directory

    @pytest.mark.parametrize(
        ("code", "kind"),
        [
            (errno.EIO, PoisonedError),
            (errno.ENOSPC, NoSpaceError),
            (errno.EDQUOT, NoSpaceError),
        ],
    )
    def test_failed_sync_poisons(self, code: int, kind: type[Exception]) -> None:
        codes: list[int] = []
        catalog = self.memory_catalog(codes)
        add_namespace(catalog)
        codes.append(code)
        with pytest.raises(kind, match="could not be made durable"):
            catalog.sync()
        self.assert_poisoned(catalog)

    def test_failed_sync_of_the_epoch_lets_nothing_be_written(self) -> None:
        catalog = self.memory_catalog([errno.EIO])
        with pytest.raises(PoisonedError):
            add_namespace(catalog)
        self.assert_poisoned(catalog)
        assert catalog.namespaces() == []

    def test_failed_fdatasync_poisons(self, catalog: Catalog) -> None:
        add_namespace(catalog)
        reader, writer = os.pipe()  # a pipe cannot be synced: EINVAL
        os.dup2(writer, catalog._wal_fd)
        os.close(reader)
        os.close(writer)
        with pytest.raises(PoisonedError, match="could not be made durable"):
            catalog.sync()
        self.assert_poisoned(catalog)

    def test_failed_write_poisons_and_is_rolled_back(self, catalog: Catalog, path: Path) -> None:
        add_namespace(catalog)
        wal = path.with_name("catalog.db-wal")
        with file_size_limit(wal.stat().st_size), pytest.raises(PoisonedError, match="not be writ"):
            add_file(catalog, "lost")
        self.assert_poisoned(catalog)
        assert catalog.lookup(ROOT_NODE_ID, "lost") is None
        catalog.close()
        with contextlib.closing(Catalog.open(path)) as again:
            assert again.check() == []
            add_file(again, "after")

    def test_no_space_rolls_back_and_does_not_poison(self, catalog: Catalog) -> None:
        add_namespace(catalog)
        pages = catalog._connection.execute("PRAGMA page_count").fetchone()[0]
        catalog._connection.execute(f"PRAGMA max_page_count={pages}").fetchone()
        with pytest.raises(NoSpaceError, match="no space for the catalog"):
            add_files(catalog, 1000)
        assert not catalog.is_poisoned
        assert catalog.count_children(ROOT_NODE_ID) == 1
        catalog._connection.execute("PRAGMA max_page_count=1000000").fetchone()
        add_file(catalog, "more")
        assert catalog.check() == []

    def test_a_swallowed_failure_dooms_the_transaction(self, catalog: Catalog) -> None:
        add_namespace(catalog)
        pages = catalog._connection.execute("PRAGMA page_count").fetchone()[0]
        catalog._connection.execute(f"PRAGMA max_page_count={pages}").fetchone()
        with pytest.raises(NoSpaceError), catalog.transaction():  # noqa: PT012
            with pytest.raises(NoSpaceError):
                add_files(catalog, 1000)
            with pytest.raises(NoSpaceError):
                catalog.set_meta("late", "1")
        assert catalog.count_children(ROOT_NODE_ID) == 1
        assert catalog.meta("late") is None

    def test_failed_checkpoint_poisons_without_taking_back_the_commit(
        self, catalog: Catalog
    ) -> None:
        reader, writer = os.pipe()
        catalog.set_meta("a", "0")
        os.dup2(writer, catalog._wal_fd)
        os.close(reader)
        os.close(writer)
        with catalog.transaction():
            for index in range(CHECKPOINT_CHANGES):
                catalog.set_meta("a", str(index))
        assert catalog.meta("a") == str(CHECKPOINT_CHANGES - 1)
        self.assert_poisoned(catalog)

    def test_checkpoints_bound_the_wal(self, catalog: Catalog, path: Path) -> None:
        for index in range(3 * CHECKPOINT_CHANGES):
            catalog.set_meta("a", str(index))
        assert path.with_name("catalog.db-wal").stat().st_size < 3 * CHECKPOINT_CHANGES * 4096


class TestEpoch:
    def test_each_session_that_writes_has_its_own(self, path: Path) -> None:
        Catalog.create(path, POOL).close()
        for epoch in (1, 2):
            catalog = Catalog.open(path)
            catalog.lookup(ROOT_NODE_ID, "nothing")
            assert catalog.statistics().epoch == epoch - 1
            catalog.set_meta("a", "b")
            assert catalog.statistics().epoch == epoch
            catalog.close()

    def test_an_id_lost_in_a_crash_is_not_given_again(self) -> None:
        images: list[bytes] = []
        connection = sqlite3.connect(":memory:")
        catalog = Catalog.from_connection(
            connection, on_commit=lambda: images.append(connection.serialize())
        )
        add_namespace(catalog)
        synced = len(images)
        given = {add_file(catalog, f"file-{index}") for index in range(3)}
        for image in images[synced - 1 :]:
            copy = sqlite3.connect(":memory:")
            copy.deserialize(image)
            again = Catalog.from_connection(copy)
            assert add_file(again, "new") not in given
            assert again.check() == []

    def test_it_ends(self, catalog: Catalog) -> None:
        catalog._connection.execute("UPDATE meta SET value = ? WHERE key = 'epoch'", (EPOCH_MAX,))
        with pytest.raises(RefusedError, match="no more ids"):
            catalog.set_meta("a", "b")
        assert catalog.meta("a") is None

    def test_its_fact_cannot_be_set(self, catalog: Catalog) -> None:
        with pytest.raises(UsageError):
            catalog.set_meta("epoch", "0")


def test_what_was_synced_survives_the_loss_of_any_part_of_the_wal_behind(
    tmp_path: Path, path: Path, catalog: Catalog
) -> None:
    add_namespace(catalog)
    wal = path.with_name("catalog.db-wal")
    synced: list[tuple[int, int]] = []
    for index in range(6):
        add_file(catalog, f"file-{index}")
        if index % 2:
            catalog.sync()
            synced.append((wal.stat().st_size, index + 1))
    content = wal.read_bytes()
    for number, cut in enumerate(range(synced[0][0], len(content) + 1, 1500)):
        copy = tmp_path / f"copy-{number}.db"
        shutil.copy(path, copy)
        copy.with_name(copy.name + "-wal").write_bytes(content[:cut])
        with contextlib.closing(Catalog.open(copy)) as again:
            names = [node.name for node in again.children(ROOT_NODE_ID) if not node.is_directory]
            assert names == [f"file-{index}" for index in range(len(names))]
            assert len(names) >= max(count for size, count in synced if size <= cut)
            assert again.check() == []
            assert again.reap_pending() == len(names)
