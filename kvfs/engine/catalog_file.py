"""The catalog's files: opening them, telling whose they are, and what SQLite's errors mean.

Layer: L2.

- The database file is opened by SQLite alone. POSIX locks belong to (process, inode): closing any
  descriptor of that file, even one only read from, would drop SQLite's lock on it. The `-wal` file
  carries no locks, so a descriptor of our own is safe there.
- Nothing is written to a file before it is known to be a catalog, of this version or a former one.
- A former version is brought up to this one by the first transaction, and read as it is until then.
"""

import os
import sqlite3
from pathlib import Path
from typing import Final
from urllib.parse import quote

from kvfs.engine.catalog_schema import APPLICATION_ID, SCHEMA_VERSION, TABLES, UPGRADES
from kvfs.errors import (
    BusyError,
    CorruptionError,
    DeviceError,
    FormatVersionError,
    NoSpaceError,
    RefusedError,
)
from kvfs.units import MIB

WAL_BYTES_KEPT: Final = 64 * MIB
_BUSY: Final = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
CORRUPT_CODES: Final = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
MEDIUM_CODES: Final = (
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_PROTOCOL,
)


def connect(path: Path, *, is_new: bool) -> sqlite3.Connection:
    """Open an existing database file as its only user; a new one is empty and not yet checked.

    locking_mode=EXCLUSIVE keeps the lock from the first access to the close: a second process is
    told at once (BusyError) instead of interleaving, no `-shm` file is needed, and a transaction
    makes no lock calls. synchronous=NORMAL lets a commit return without waiting for the medium;
    `CatalogDatabase.sync` is the wait.

    Raises:
        BusyError: It is open elsewhere.
        CorruptionError: It is no database, or none of kvfs.
        FormatVersionError: Another version of kvfs made it.
        RefusedError: The filesystem cannot hold a write-ahead log.
    """
    connection = sqlite3.connect(
        f"file:{quote(str(path))}?mode=rw", uri=True, timeout=0, isolation_level=None,
        check_same_thread=False, cached_statements=256,
    )  # fmt: skip
    try:
        connection.execute("PRAGMA locking_mode=EXCLUSIVE").fetchone()
        if not is_new:
            verify_identity(connection, str(path))  # before the pragma below writes to the file
        mode = connection.execute("PRAGMA journal_mode=WAL").fetchone()[0]
        _require_wal(mode, path)
        connection.execute("PRAGMA synchronous=NORMAL")
        # Checkpoints are taken by `CatalogDatabase`, because SQLite swallows the errors of its own.
        connection.execute("PRAGMA wal_autocheckpoint=0").fetchone()
        # A large transaction, as a dropped namespace is, would leave the log large for ever.
        connection.execute(f"PRAGMA journal_size_limit={WAL_BYTES_KEPT}").fetchone()
        connection.execute("PRAGMA cache_size=-65536")
        connection.execute("PRAGMA temp_store=MEMORY")
        # Distributions differ in the default; ON would write every freed page once more.
        connection.execute("PRAGMA secure_delete=FAST").fetchone()
        # An empty write transaction takes the lock and makes the -wal file.
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("COMMIT")
    except sqlite3.Error as error:
        connection.close()
        raise translate(error, str(path)) from error
    except BaseException:
        connection.close()
        raise
    return connection


def _require_wal(mode: str, path: Path) -> None:
    if mode != "wal":
        raise RefusedError(
            f"no write-ahead log: {path}: expected journal mode wal, found {mode}; put the "
            "catalog on a local filesystem"
        )


def verify_identity(connection: sqlite3.Connection, where: str) -> None:
    """Check that a database is a catalog of this version, or of a former one.

    Raises:
        CorruptionError: It is none.
        FormatVersionError: It is one of a later version.
    """
    found = connection.execute("PRAGMA application_id").fetchone()[0]
    if found != APPLICATION_ID:
        raise CorruptionError(
            f"not a catalog of kvfs: {where}: expected application id {APPLICATION_ID:#x}, "
            f"found {found:#x}; restore the file"
        )
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version != SCHEMA_VERSION and version not in UPGRADES:
        raise FormatVersionError(
            f"catalog has another version: {where}: expected {SCHEMA_VERSION}, found {version}; "
            "use the kvfs that made it"
        )
    if version == SCHEMA_VERSION:
        _require_tables(connection, where)


def upgrade_statements(connection: sqlite3.Connection) -> list[str]:
    """Return what brings a catalog of a former version up to this one; nothing if it is."""
    found = connection.execute("PRAGMA user_version").fetchone()[0]
    statements = [sql for version in range(found, SCHEMA_VERSION) for sql in UPGRADES[version]]
    return [*statements, f"PRAGMA user_version={SCHEMA_VERSION}"] if statements else []


def _require_tables(connection: sqlite3.Connection, where: str) -> None:
    names = {row[0] for row in connection.execute("SELECT name FROM sqlite_master")}
    missing = [name for name in TABLES if name not in names]
    if missing:
        raise CorruptionError(f"catalog lacks a table: {where}: {missing[0]}; restore the file")


def open_wal(path: Path) -> int:
    """Return a descriptor of the `-wal` file, its name in the directory persisted.

    It stays open for the life of the connection: the kernel reports a failed write-back once to
    each descriptor that was open at the time, so one opened just for a sync would miss it.
    """
    fd = os.open(f"{path}-wal", os.O_RDONLY | os.O_CLOEXEC)
    try:
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except BaseException:
        os.close(fd)
        raise
    return fd


def translate(error: sqlite3.Error, where: str) -> Exception:
    """Return the error of kvfs for one of SQLite; a mistake of the program stays what it is."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    name = getattr(error, "sqlite_errorname", "no code")
    if code in CORRUPT_CODES:
        return CorruptionError(
            f"catalog is damaged: {where}: {error} ({name}); run 'kvfs-admin check'"
        )
    if code in _BUSY:
        return BusyError(f"catalog is in use: {where}: {error}; close the pool that has it open")
    if code == sqlite3.SQLITE_FULL:
        return NoSpaceError(
            f"no space for the catalog: {where}: {error}; free space on its filesystem"
        )
    if code in MEDIUM_CODES:
        return DeviceError(f"catalog could not be read or written: {where}: {error} ({name})")
    return error
