"""The SQLite connection below the catalog: transactions, persistence, failure.

Layer: L2.

- One connection, guarded by one reentrant lock that is held for the whole of a transaction, and by
  another, taken before it, that only writers take. Who waits for the medium holds a lock of its own
  (`sync`), or that of the writers (a new epoch, a checkpoint), so that reads go on meanwhile. What
  remains is SQLite's own sync of the database file at a checkpoint: `hold_at_once` is for readers
  that must not wait at all. Order: write lock, connection lock, sync lock.
- Checkpoints are due after some changes, and taken by `sync`, or by whoever `on_checkpoint_due`
  wakes; a writer takes one itself if none of them comes.
- After a failed write or sync nothing is written any more: a page that could not be written may be
  clean in the cache and missing on the medium. Reads go on.
"""

import errno
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Final

from kvfs.engine.catalog_file import CORRUPT_CODES, MEDIUM_CODES, translate, upgrade_statements
from kvfs.engine.catalog_schema import (
    EPOCH_MAX,
    EPOCH_NODE_BITS,
    Row,
)
from kvfs.errors import (
    ClosedError,
    KvfsError,
    NoSpaceError,
    PoisonedError,
    RefusedError,
)

CHECKPOINT_CHANGES: Final = 2048  # rows changed between checkpoints: a WAL of about 10 MiB
_OVERDUE_CHANGES: Final = 3 * CHECKPOINT_CHANGES  # more, until a writer takes it itself
_NO_SPACE: Final = (errno.ENOSPC, errno.EDQUOT)
Hook = Callable[[], None]


class Transaction:
    """A scope of writes; scopes inside it join it."""

    __slots__ = ("_database",)

    def __init__(self, database: "CatalogDatabase") -> None:
        self._database = database

    def __enter__(self) -> None:
        self._database._begin()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self._database._end(keep=kind is None)


class CatalogDatabase:
    """One connection and what can go wrong with it."""

    def __init__(
        self, connection: sqlite3.Connection, where: str, wal_fd: int = -1,
        on_commit: Hook | None = None, on_sync: Hook | None = None,
    ) -> None:  # fmt: skip
        self._connection = connection
        self._where = where
        self._wal_fd = wal_fd  # -1 in memory
        self._on_commit = on_commit
        self._on_sync = on_sync
        self.on_checkpoint_due: Hook | None = None  # called by writers, who wait for it
        # Called in a transaction before a directory (by node id) gets a name that it may lack.
        self.on_name: Callable[[int, bytes], None] | None = None
        self._write_lock = threading.RLock()
        self._lock = threading.RLock()
        self._sync_lock = threading.Lock()
        self._scope = Transaction(self)
        self._depth = 0
        self._failure: Exception | None = None  # dooms the open transaction
        self._poison = ""  # why nothing is written any more
        self._is_closed = False
        self._committed = 0  # transactions
        self._synced = 0  # of them on the medium
        self._checkpoint_at = connection.total_changes + CHECKPOINT_CHANGES
        self._epoch = 0
        self._is_epoch_due = True
        self._next_node_id = 0
        self._reserved: dict[int, int] = {}  # node: last version given out and not yet published
        self._published: list[tuple[int, int]] = []  # node, version: in this transaction
        self._node_count: int | None = None  # None: to be counted

    @property
    def is_poisoned(self) -> bool:
        """Whether a failure has ended writing."""
        return bool(self._poison)

    def transaction(self) -> Transaction:
        """Return a scope whose writes are committed together, or not at all.

        An inner scope joins the outer one. A method that raises has written nothing, so an error
        may be caught inside a scope; only an error of the database itself dooms the whole of it.
        Durability: flush. Concurrency: other threads wait, readers too.

        Raises:
            PoisonedError: An earlier write or sync failed.
            NoSpaceError: The filesystem is full; nothing was written.
        """
        return self._scope

    def sync(self) -> None:
        """Wait until everything committed before the call is on the medium.

        A commit lies in the WAL, or it has been moved to the database file. It is moved by a
        checkpoint, which syncs the WAL before and the database file after; only then are frames of
        the WAL overwritten, after their new header was synced. So fdatasync of the WAL is all that
        is missing under synchronous=NORMAL. Callers that come together share one.

        Durability: persist.

        Raises:
            NoSpaceError: The medium ran full behind the page cache; nothing more is written.
            PoisonedError: This or an earlier write or sync failed.
        """
        self._sync_wal()
        self.checkpoint_if_due()

    def checkpoint_if_due(self) -> None:
        """Move the WAL into the database file if enough was written; else return at once.

        Waits for the medium. Not inside a transaction: there it is left to the next.
        """
        if self._is_checkpoint_due():
            with self._write_lock:
                if self._is_checkpoint_due() and not (self._depth or self._poison):
                    self._checkpoint()

    @contextmanager
    def hold_at_once(self) -> Iterator[bool]:
        """Hold the connection for reading if it is free at once; yield whether it is."""
        is_held = self._lock.acquire(blocking=False)
        try:
            yield is_held
        finally:
            if is_held:
                self._lock.release()

    def _sync_wal(self) -> None:
        target = self._committed
        with self._sync_lock:
            self._require_writable()
            try:
                if self._synced < target and self._wal_fd >= 0:
                    covered = self._committed
                    os.fdatasync(self._wal_fd)
                    self._synced = covered
                if self._on_sync is not None:
                    self._on_sync()
            except OSError as error:
                self._poison = f"sync failed: {error.strerror or error}"
                kind = NoSpaceError if error.errno in _NO_SPACE else PoisonedError
                raise kind(
                    f"catalog could not be made durable: {self._where}: {error}; reopen the pool"
                ) from error

    def close(self) -> None:
        """Close the connection; idempotent. SQLite moves the WAL into the database file."""
        with self._write_lock, self._lock, self._sync_lock:
            assert self._depth == 0, "a transaction must end before the catalog is closed"
            if self._is_closed:
                return
            self._is_closed = True
            self._connection.close()
            if self._wal_fd >= 0:
                os.close(self._wal_fd)
                self._wal_fd = -1

    def _read(self, sql: str, parameters: Sequence[Any] = ()) -> list[Row]:
        """Run one query and return its rows."""
        with self._lock:
            self._require_open()
            try:
                return self._connection.execute(sql, parameters).fetchall()
            except sqlite3.Error as error:
                raise translate(error, self._where) from error

    def _write(self, sql: str, parameters: Sequence[Any] = ()) -> int:
        """Run one statement and return how many rows it changed. REQUIRES: a transaction.

        Raises:
            sqlite3.IntegrityError: A name or id is taken; nothing was changed.
        """
        assert self._depth > 0, "a write outside a transaction"
        if self._failure is not None:
            # SQLite may have rolled back already; what came now would be committed by itself.
            raise self._failure
        try:
            return self._connection.execute(sql, parameters).rowcount
        except sqlite3.IntegrityError:
            raise
        except sqlite3.Error as error:
            self._failure = self._note_failure(error)
            raise self._failure from error

    def _write_nodes(self, sql: str, parameters: Sequence[Any] = ()) -> int:
        """Insert or delete nodes as `_write` does, and keep count of them."""
        changed = self._write(sql, parameters)
        if self._node_count is not None:
            self._node_count += changed if sql.startswith("INSERT") else -changed
        return changed

    def _new_node_id(self) -> int:
        """Return an id that was never used. REQUIRES: a transaction."""
        self._next_node_id += 1
        return self._next_node_id

    def _require_open(self) -> None:
        if self._is_closed:
            raise ClosedError(f"catalog is closed: {self._where}")

    def _require_writable(self) -> None:
        self._require_open()
        if self._poison:
            raise PoisonedError(
                f"catalog takes no more writes: {self._where}: {self._poison}; reopen the pool"
            )

    def _note_failure(self, error: sqlite3.Error) -> Exception:
        """Translate the failure of a write, and poison unless SQLite could take it back cleanly."""
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        found = translate(error, self._where)
        if code in MEDIUM_CODES or code in CORRUPT_CODES:
            self._poison = f"write failed: {error}"
            if code in MEDIUM_CODES:
                return PoisonedError(
                    f"catalog could not be written: {self._where}: {error}; reopen the pool"
                )
        # A full filesystem (NoSpaceError) does not poison: the write was refused before anything
        # could be lost, and eviction must be able to remove names in order to make room.
        return found

    def _begin(self) -> None:
        self._write_lock.acquire()
        try:
            if self._depth == 0:
                self._require_writable()
                if self._is_epoch_due:
                    self._advance_epoch()
            self._lock.acquire()
            try:
                if self._depth == 0:
                    self._require_writable()
                    self._execute("BEGIN IMMEDIATE")
                self._depth += 1
            except BaseException:
                self._lock.release()
                raise
        except BaseException:
            self._write_lock.release()
            raise

    def _end(self, *, keep: bool) -> None:
        try:
            try:
                self._depth -= 1
                if self._depth:
                    return
                failure, self._failure = self._failure, None
                if keep and failure is None:
                    self._commit()
                else:
                    self._roll_back()
                    if keep and failure is not None:
                        raise failure
            finally:
                self._lock.release()
            self._call_checkpoint()
        finally:
            self._write_lock.release()

    def _commit(self) -> None:
        try:
            self._execute("COMMIT")
        except BaseException:
            self._roll_back()
            raise
        finally:
            # Also when interrupted: one count too many costs a sync, one too few loses a commit.
            self._committed += 1
        for node_id, version in self._published:
            if self._reserved.get(node_id) == version:
                del self._reserved[node_id]  # the node remembers it from here on
        self._published.clear()
        if self._on_commit is not None:
            self._on_commit()

    def _roll_back(self) -> None:
        self._published.clear()
        self._node_count = None
        # SQLite has rolled back by itself after some failures.
        if self._connection.in_transaction:
            self._execute("ROLLBACK")

    def _execute(self, sql: str) -> None:
        try:
            self._connection.execute(sql)
        except sqlite3.Error as error:
            raise self._note_failure(error) from error

    def _is_checkpoint_due(self, extra: int = 0) -> bool:
        changes = 0 if self._is_closed else self._connection.total_changes
        return self._wal_fd >= 0 and changes >= self._checkpoint_at + extra

    def _call_checkpoint(self) -> None:
        """Have a checkpoint taken if one is due. REQUIRES: the write lock, depth 0."""
        if not self._is_checkpoint_due():
            return
        if self.on_checkpoint_due is None or self._is_checkpoint_due(_OVERDUE_CHANGES):
            self.checkpoint_if_due()
        else:
            self.on_checkpoint_due()

    def _checkpoint(self) -> None:
        """Move the WAL into the database file, so that it starts again from its beginning.

        REQUIRES: the write lock, depth 0. Nothing is committed between the sync and the move, so
        the connection is held for the move alone.

        A failure poisons, but is not raised: the transactions that brought us here are committed.
        The sync comes first because an error of SQLite's own could be the second report of a page
        lost earlier, which the kernel gives once per descriptor.
        """
        self._checkpoint_at = self._connection.total_changes + CHECKPOINT_CHANGES
        try:
            self._sync_wal()
            with self._lock:
                self._connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
        except (KvfsError, sqlite3.Error) as error:
            self._poison = self._poison or f"checkpoint failed: {error}"

    def _advance_epoch(self) -> None:
        """Persist a new epoch before the first write of a session; upgrade a former schema with it.

        REQUIRES: the write lock, depth 0.
        """
        epoch = int(self._read("SELECT value FROM meta WHERE key = 'epoch'")[0][0]) + 1
        if epoch > EPOCH_MAX:
            raise RefusedError(
                f"catalog has no more ids: {self._where}: it was opened for writing {EPOCH_MAX} "
                "times; move its contexts to a new pool"
            )
        self._is_epoch_due = False
        try:
            with self.transaction():
                for statement in upgrade_statements(self._connection):
                    self._write(statement)
                self._write("UPDATE meta SET value = ? WHERE key = 'epoch'", (str(epoch),))
            self._sync_wal()
        except BaseException:
            self._is_epoch_due = True
            raise
        self._epoch = epoch
        self._next_node_id = max(self._next_node_id, epoch << EPOCH_NODE_BITS)
