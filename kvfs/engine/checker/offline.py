"""Checking a pool that nobody has open.

Layer: L3.

- Holds the pool's lock from beginning to end, so that no owner comes in between.
- Without repair nothing is written: devices are opened read-only and the catalog is read from a
  copy, because opening SQLite's own file would move its log into it. Lock files are the exception.
- A damaged catalog is never opened itself. It is replaced only if the loss of all names is allowed.
- Volatile devices are empty while nobody has the pool open, and are left out.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Final, NoReturn

from kvfs.clock import SystemClock
from kvfs.config import DIRECTORY_SCHEMES, VOLATILE_SCHEMES, DeviceURL, parse_device_url
from kvfs.devices.abilities import NOTHING as NO_ABILITIES
from kvfs.devices.abilities import Abilities
from kvfs.devices.base import Device
from kvfs.devices.directory import DirectoryDevice
from kvfs.devices.open import is_formatted, open_device
from kvfs.devices.osfile import OSFile
from kvfs.devices.osfs import OSFileSystem
from kvfs.devices.reflink import NOTHING, Cloning
from kvfs.engine.catalog import Catalog
from kvfs.engine.catalog_schema import DeviceRow
from kvfs.engine.checker.devices import check_devices
from kvfs.engine.checker.repair import apply_plan
from kvfs.engine.checker.report import Action, ActionKind, CheckReport, Finding, Severity
from kvfs.engine.checker.salvage import Salvage, replace_catalog, salvage
from kvfs.engine.checker.segments import Progress
from kvfs.errors import BusyError, CorruptionError, KvfsError, NotFoundError, UsageError

_CATALOG: Final = "catalog.sqlite"
_LOCK: Final = "lock"
Confirm = Callable[[CheckReport], bool]


class ReadOnlyFileSystem(OSFileSystem):
    """A directory that is locked and read, never changed."""

    def __init__(self, root: str) -> None:
        super().__init__(root, create=False)

    def make_directory(self, path: str) -> None:
        """Leave it as it is; a missing one is found when it is listed."""

    def sync_directory(self, path: str) -> None:
        """Nothing was changed."""

    def open(self, path: str, *, writable: bool = False) -> OSFile:
        """Open for reading, whatever was asked for; a write then fails."""
        return super().open(path)

    def create(self, path: str, nbytes: int = 0) -> OSFile:
        """Refuse."""
        self._refuse(path)

    def _probe(self, f_type: int) -> Abilities:
        """Try nothing: it would take a file."""
        del f_type
        return NO_ABILITIES

    def cloning(self) -> Cloning:
        """Try nothing: it would take two files."""
        return NOTHING

    def rename(self, source: str, target: str) -> None:
        """Refuse."""
        self._refuse(target)

    def unlink(self, path: str) -> None:
        """Refuse."""
        self._refuse(path)

    def remove_tree(self) -> None:
        """Refuse."""
        self._refuse(".")

    def _refuse(self, path: str) -> NoReturn:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), f"{self.root}/{path}")


def check_pool(
    path: str | os.PathLike[str],
    *,
    data: bool = False,
    repair: bool = False,
    allow_name_loss: bool = False,
    progress: Progress | None = None,
    confirm: Confirm | None = None,
) -> CheckReport:
    """Check a pool that is closed, and repair it if asked to.

    Args:
        path: The pool's directory.
        data: Read all payloads too and compare their checksums.
        repair: Apply the plan, then check again (without `data`); see `CheckReport.remaining`.
        allow_name_loss: Put an empty catalog in the place of a damaged one. All names are lost.
        progress: Called with (bytes done, bytes in all) while payloads are read.
        confirm: Asked before the plan is applied; False leaves everything as it is.

    Returns:
        What was found; damage of the catalog too.

    Raises:
        NotFoundError: There is no pool.
        BusyError: Somebody owns it.
        FormatVersionError: The catalog was made by another version.
    """  # fmt: skip
    root = Path(path).absolute()
    if not (root / _CATALOG).exists():
        raise NotFoundError(f"no pool: {root}: {_CATALOG} is missing")
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, _lock(root))
        report = CheckReport()
        try:
            catalog = _open_catalog(root, stack, writable=repair, is_strict=allow_name_loss)
        except (CorruptionError, ValueError) as error:
            left = _plan_replacement(root, report, str(error), is_allowed=allow_name_loss)
            if left and repair and report.plan and (confirm is None or confirm(report)):
                _replace_catalog(root, left, stack, report)
            return report
        devices = _open_devices(catalog.devices(), stack, report, writable=repair)
        found = check_devices(devices, catalog, data=data, progress=progress)
        found.findings[:0] = report.findings
        if repair and found.plan and (confirm is None or confirm(found)):
            apply_plan(found, devices, catalog)
            found.remaining[:0] = report.findings
        return found


def _plan_replacement(
    root: Path, report: CheckReport, problem: str, *, is_allowed: bool
) -> Salvage | None:
    """Report a damaged catalog, and what could be made of it; None if nothing."""
    where, found = f"{root}/{_CATALOG}", salvage(root / _CATALOG)
    try:
        found.require_whole()
    except CorruptionError as error:
        report.add(
            Severity.ERROR, "catalog-damaged", where, problem,
            f"put back a copy of it, or 'kvfs-admin pool destroy': it cannot be replaced: {error}",
        )  # fmt: skip
        return None
    loss = (
        "an empty one takes its place and it is kept beside; all names of files and contexts are "
        f"LOST, blocks on {', '.join(row.name for row in found.rows)} stay as cache"
    )
    remedy = loss if is_allowed else (
        f"put back a copy of it; or 'kvfs-admin check --repair --allow-name-loss': {loss}"
    )  # fmt: skip
    action = Action(ActionKind.REPLACE_CATALOG, where)
    report.add(
        Severity.ERROR, "catalog-damaged", where, problem, remedy, action if is_allowed else None
    )
    return found


def _replace_catalog(
    root: Path, found: Salvage, stack: contextlib.ExitStack, report: CheckReport
) -> None:
    """Replace the catalog, then check the pool again."""
    devices = _open_devices(found.rows, stack, report, writable=True)
    if len(devices) < len(found.superblocks):
        return  # the report says which one cannot be opened
    clock = SystemClock()
    aside = replace_catalog(root / _CATALOG, found, devices, clock.wall_ns())
    report.is_repaired = True
    lost = Finding(
        Severity.WARNING, "names-lost", f"{root}/{_CATALOG}",
        "all names of files and contexts, pins, retention and the pool's own name are gone; "
        f"the damaged catalog is {aside}",
        "write files again, and append contexts again: their blocks are found by their keys",
    )  # fmt: skip
    catalog = Catalog.open(root / _CATALOG)
    stack.callback(catalog.close)
    again = check_devices(devices, catalog)
    report.remaining = [lost, *again.findings]
    report.counts, report.was_closed = again.counts, again.was_closed


def _lock(root: Path) -> int:
    """Take the pool's lock as an owner would, without writing into it."""
    fd = os.open(root / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise BusyError(
            f"pool is in use: {root}: a check needs it closed; unmount or stop its owner first"
        ) from None
    return fd


def _open_catalog(
    root: Path, stack: contextlib.ExitStack, *, writable: bool, is_strict: bool
) -> Catalog:
    """Open the catalog if a copy of it proves sound; only the copy unless `writable`.

    SQLite deletes the log of a file that it does not take for a database: the log of a damaged
    catalog is to be kept with it.

    Raises:
        CorruptionError: It is damaged; with `is_strict` also if it only contradicts itself.
    """
    source = root / _CATALOG
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvfs-check-")))
    for suffix in ("", "-wal"):
        if Path(f"{source}{suffix}").exists():
            shutil.copyfile(f"{source}{suffix}", folder / f"{_CATALOG}{suffix}")
    catalog = Catalog.open(folder / _CATALOG)
    stack.callback(catalog.close)
    # The first queries fail on pages that opening does not read.
    _ = catalog.pool_uuid
    problems = catalog.check()
    catalog.namespaces()
    catalog.devices()
    if problems and is_strict:
        raise CorruptionError(problems[0])
    if writable:
        catalog = Catalog.open(source)
        stack.callback(catalog.close)
    return catalog


def _open_devices(
    rows: list[DeviceRow], stack: contextlib.ExitStack, report: CheckReport, *, writable: bool
) -> list[Device]:
    devices = []
    for row in rows:
        try:
            url = parse_device_url(row.url)
            if url.scheme not in VOLATILE_SCHEMES:
                device = _open_device(row, url, writable=writable)
                stack.callback(device.close)
                devices.append(device)
        except BusyError:
            raise
        except (KvfsError, OSError) as error:
            remedy = "mount its filesystem, or make the pool anew without it"
            if isinstance(error, UsageError):
                remedy = "put back a copy of the catalog"
            report.add(Severity.ERROR, "device-missing", row.name, str(error), remedy)
    return devices


def _open_device(row: DeviceRow, url: DeviceURL, *, writable: bool) -> Device:
    if url.scheme in DIRECTORY_SCHEMES:
        return _open_directory(row, url, writable=writable)
    return open_device(
        url, index=row.index, uuid=uuid.UUID(bytes=row.uuid), capacity_bytes=url.size_bytes,
        segment_bytes=url.segment_bytes, name=row.name, create=False,
    )  # fmt: skip


def _open_directory(row: DeviceRow, url: DeviceURL, *, writable: bool) -> Device:
    if writable and not is_formatted(url.location):
        raise NotFoundError(f"device directory is not formatted: {url.location}")
    files = (
        OSFileSystem(url.location, create=False) if writable else ReadOnlyFileSystem(url.location)
    )
    try:
        return DirectoryDevice(
            files,
            index=row.index,
            uuid=uuid.UUID(bytes=row.uuid),
            capacity_bytes=url.size_bytes,
            segment_bytes=url.segment_bytes,
            name=row.name,
            tier=url.tier,
            url=str(url),
        )
    except BaseException:
        files.close()
        raise
