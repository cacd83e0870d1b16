"""The catalog: names, contexts, namespaces and devices of a pool, in one SQLite database.

Layer: L2.

    Catalog          create, open; what eviction asks; statistics, check
      CatalogNamespaces  facts, devices, namespaces
        CatalogContexts    keys and tokens
          CatalogTree        rules of the tree
            CatalogAttributes  extended attributes
              CatalogNodes       single nodes
                CatalogDatabase    transactions, persistence, failure

- Written by one process, through one connection; all methods may be called from any thread.
- A method has committed when it returns, unless the caller holds a `transaction()`. Commits survive
  the process at once (flush) and power loss after `sync()` (persist), in order.
- The catalog knows nothing of where blocks lie, or whether they still do.
- An iterator reads batch by batch and holds no lock in between: it sees each row that was there all
  the time, and may or may not see one that came or went meanwhile.
"""

import os
import sqlite3
import uuid
from collections.abc import Iterable, Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Final

from kvfs.engine.catalog_check import find_problems
from kvfs.engine.catalog_database import Hook
from kvfs.engine.catalog_file import connect, open_wal, translate, verify_identity
from kvfs.engine.catalog_namespaces import CatalogNamespaces
from kvfs.engine.catalog_rows import damaged, decode_keys
from kvfs.engine.catalog_schema import (
    APPLICATION_ID,
    INSERT_NODE,
    NODE_COLUMNS,
    ROOT_NODE,
    SCHEMA,
    SCHEMA_VERSION,
    CatalogStatistics,
    Node,
    node_from_row,
    node_to_row,
)
from kvfs.errors import ExistsError, NotFoundError
from kvfs.keys import KeyArray, file_contexts

BATCH: Final = 64  # contexts per query of an iterator
_ID_BATCH: Final = 500  # ids per query; SQLite before 3.32 allows 999 parameters
_THEIR_ROWS: Final = "LEFT JOIN context_rows r ON r.node_id = n.node_id AND r.version = n.version"


class Catalog(CatalogNamespaces):
    """The small mutable part of a pool."""

    @classmethod
    def create(cls, path: Path, pool_uuid: uuid.UUID, *, epoch: int = 0) -> "Catalog":
        """Make a new catalog file and open it. Durability: persist, with its directory entry.

        `epoch`: one that the pool has not got beyond; its ids begin at the one after it.

        Raises:
            ExistsError: The path is taken.
        """
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600))
        except FileExistsError as error:
            raise ExistsError(f"catalog exists: {path}; open it, or remove it first") from error
        connection = connect(path, is_new=True)
        try:
            _initialize(connection, pool_uuid, epoch)
            catalog = cls(connection, str(path), open_wal(path))
        except BaseException:
            connection.close()
            raise
        catalog._committed += 1  # the schema is to be synced too
        catalog.sync()
        return catalog

    @classmethod
    def open(cls, path: Path) -> "Catalog":
        """Open an existing catalog as its only user.

        Raises:
            NotFoundError: There is none.
            BusyError: It is open, here or in another process.
            CorruptionError: It is no catalog, or damaged.
            FormatVersionError: Another version of kvfs made it.
        """
        if not path.exists():
            raise NotFoundError(f"no catalog: {path}; create the pool first")
        connection = connect(path, is_new=False)
        try:
            return cls(connection, str(path), open_wal(path))
        except BaseException:
            connection.close()
            raise

    @classmethod
    def from_connection(
        cls, connection: sqlite3.Connection, on_commit: Hook | None = None,
        on_sync: Hook | None = None, pool_uuid: uuid.UUID | None = None,
    ) -> "Catalog":  # fmt: skip
        """Use a connection of the caller's, in memory or an image of one; for tests.

        Args:
            connection: Made with check_same_thread=False if other threads are to use it. An empty
                one gets the tables.
            on_commit: Called after each committed transaction, in the thread that holds it.
            on_sync: Called by `sync`; an OSError from it counts as a failed sync. Neither hook may
                call the catalog.
            pool_uuid: Recorded when the tables are made.
        """
        connection.isolation_level = None
        try:
            if connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0:
                _initialize(connection, pool_uuid)
            verify_identity(connection, "connection")
        except sqlite3.Error as error:
            raise translate(error, "connection") from error
        return cls(connection, "connection", -1, on_commit, on_sync)

    # -- what eviction asks

    def file_nodes(self, node_ids: Iterable[int]) -> list[int]:
        """Return those ids that are ACTIVE contexts made through POSIX, in ascending order."""
        found: list[int] = []
        ids = sorted(set(node_ids))
        for start in range(0, len(ids), _ID_BATCH):
            part = ids[start : start + _ID_BATCH]
            rows = self._read(
                "SELECT node_id FROM nodes WHERE kind = 2 AND origin = 2 AND state = 1 "
                f"AND node_id IN ({', '.join('?' * len(part))}) ORDER BY node_id",
                part,
            )
            found += [row[0] for row in rows]
        return found

    def files_reaching(self, keys: KeyArray) -> list[int]:
        """Return the files whose present content names one of these keys of `file_keys`.

        A key of an older version of a file names that file too (`file_contexts`), but losing its
        block costs the file nothing.
        """
        lost = {key.tobytes() for key in keys}
        with self._lock:
            return [
                node_id
                for node_id in self.file_nodes(file_contexts(keys))
                if any(key.tobytes() in lost for key in self.keys(node_id))
            ]

    def remove_nodes(self, node_ids: Iterable[int], now_ns: int = 0) -> list[tuple[Node, KeyArray]]:
        """Remove contexts in one transaction; return each that was there, with its keys.

        Ids of directories and of what is not there are passed over. Durability: flush.
        """
        removed: list[tuple[Node, KeyArray]] = []
        with self.transaction():
            for node_id in node_ids:
                rows = self._read(
                    f"SELECT {NODE_COLUMNS} FROM nodes WHERE node_id = ? AND kind > 1", (node_id,)
                )
                if rows:
                    keys = self.keys(node_id)
                    removed.append((self.remove(node_id, now_ns), keys))
        return removed

    def iter_file_contexts(self, batch: int = BATCH) -> Iterator[tuple[Node, KeyArray]]:
        """Yield every ACTIVE context made through POSIX with its keys, by node id."""
        last = 0
        while True:
            rows = self._read(
                f"SELECT n.*, r.keys FROM (SELECT {NODE_COLUMNS} FROM nodes WHERE node_id > ? "
                "AND kind = 2 AND origin = 2 AND state = 1 ORDER BY node_id LIMIT ?) n "
                f"{_THEIR_ROWS} ORDER BY n.node_id, r.row_index",
                (last, batch),
            )
            count = 0
            for last, group in groupby(rows, key=itemgetter(0)):
                found = list(group)
                node = node_from_row(found[0][:-1])
                keys = decode_keys(last, [row[-1:] for row in found if row[-1] is not None])
                if len(keys) != node.block_count:
                    raise damaged(last, f"{node.block_count} keys", str(len(keys)))
                yield node, keys
                count += 1
            if count < batch:
                return

    def durable_keys(self, namespace_id: int, batch: int = BATCH) -> Iterator[KeyArray]:
        """Yield the keys that names of a namespace reach, those of some contexts in each array."""
        last = 0
        while True:
            rows = self._read(
                "SELECT r.keys, n.node_id FROM (SELECT node_id, version FROM nodes "
                "WHERE namespace_id = ? AND node_id > ? AND block_count > 0 "
                f"ORDER BY node_id LIMIT ?) n {_THEIR_ROWS} ORDER BY n.node_id, r.row_index",
                (namespace_id, last, batch),
            )
            if not rows:
                return
            last = rows[-1][1]
            yield decode_keys(last, [row for row in rows if row[0] is not None])

    def raw_nodes(self, namespace_id: int | None = None) -> list[int]:
        """Return the ids of raw files, of one namespace or all, in ascending order."""
        rows = self._read(
            "SELECT node_id FROM nodes WHERE kind = 3 AND (? IS NULL OR namespace_id = ?) "
            "ORDER BY node_id",
            (namespace_id, namespace_id),
        )
        return [row[0] for row in rows]

    def pinned_contexts(self) -> list[Node]:
        """Return the contexts whose blocks must not be dropped."""
        rows = self._read(f"SELECT {NODE_COLUMNS} FROM nodes WHERE is_pinned = 1 ORDER BY node_id")
        return [node_from_row(row) for row in rows]

    # -- looking at the whole

    @property
    def node_count(self) -> int:
        """How many directories and contexts there are. Cost: counted once, then kept."""
        count = self._node_count
        if count is None:
            with self._lock:
                count = self._node_count = int(self._read("SELECT count(*) FROM nodes")[0][0])
        return count

    def statistics(self) -> CatalogStatistics:
        """Return counts and sizes. Cost: reads the smallest index once."""
        with self._lock:
            counts = self._read(
                "SELECT (SELECT count(*) FROM nodes WHERE kind > 1), "
                "(SELECT count(*) FROM nodes WHERE state = 2), (SELECT count(*) FROM namespaces)"
            )[0]
            nodes = self.node_count
            pages = self._read("PRAGMA page_count")[0][0]
            page_bytes = self._read("PRAGMA page_size")[0][0]
            epoch = int(self.meta("epoch") or 0)
            wal_bytes = os.fstat(self._wal_fd).st_size if self._wal_fd >= 0 else 0
        contexts, pending, namespaces = counts
        return CatalogStatistics(
            nodes, contexts, pending, namespaces, pages * page_bytes, wal_bytes, epoch,
            self.is_poisoned,
        )  # fmt: skip

    def check(self) -> list[str]:
        """Return what is wrong with the whole catalog, one line each; an empty list if nothing is.

        Cost: reads everything, holding the lock.

        Raises:
            CorruptionError: The file is too damaged to be queried.
        """
        with self._lock:
            self._require_open()
            try:
                return find_problems(self._connection)
            except sqlite3.Error as error:
                raise translate(error, self._where) from error


def _initialize(
    connection: sqlite3.Connection, pool_uuid: uuid.UUID | None, epoch: int = 0
) -> None:
    """Make the tables in an empty database, in one transaction."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        for statement in SCHEMA:
            connection.execute(statement)
        connection.execute("INSERT INTO meta VALUES ('epoch', ?)", (str(epoch),))
        if pool_uuid is not None:
            connection.execute("INSERT INTO meta VALUES ('pool_uuid', ?)", (str(pool_uuid),))
        connection.execute(INSERT_NODE, node_to_row(ROOT_NODE))
        connection.execute(f"PRAGMA application_id={APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
