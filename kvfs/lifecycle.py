"""Making, opening and destroying pools.

Layer: L4.

- One process owns an open pool: the lock is taken first and held until `Pool.close`.
- Making a pool undoes what it did if it fails half-way.
- A pool's directory holds `catalog.sqlite` (with its -wal and -shm), `lock`, `control.sock`,
  `clients.sock`, and `catalog.sqlite.damaged` where a repair has replaced the catalog.
"""

import dataclasses
import logging
import os
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Final

from kvfs import pool_lock
from kvfs.clock import Clock, SystemClock
from kvfs.config import (
    DIRECTORY_SCHEMES,
    DeviceURL,
    PoolOptions,
    default_segment_bytes,
    parse_device_url,
    scheme_of,
)
from kvfs.devices.base import Device
from kvfs.devices.filesystem import SUPERBLOCK
from kvfs.devices.keeper import Keeper
from kvfs.devices.open import capacity_of, location_of, open_device, require_memory
from kvfs.engine.catalog import Catalog
from kvfs.engine.catalog_schema import APPLICATION_ID, OFFLINE, ROOT_NODE_ID, DeviceRow
from kvfs.engine.checker.salvage import salvage
from kvfs.engine.device_state import DeviceState
from kvfs.engine.recovery import claim_device, format_device
from kvfs.errors import (
    CorruptionError,
    DataError,
    ExistsError,
    NotFoundError,
    RefusedError,
    UsageError,
)
from kvfs.host import this_process
from kvfs.keys import new_uuid
from kvfs.pool import (
    CATALOG_NAME,
    CLIENTS_NAME,
    CONTROL_NAME,
    DEFAULT_NAMESPACE,
    SEGMENTS_MIN,
    Pool,
)
from kvfs.pool_lock import LOCK_NAME
from kvfs.units import format_bytes

_log = logging.getLogger("kvfs.pool")
_OWN_NAMES: Final = (
    CATALOG_NAME, f"{CATALOG_NAME}-wal", f"{CATALOG_NAME}-shm", f"{CATALOG_NAME}.new",
    f"{CATALOG_NAME}.new-wal", CLIENTS_NAME, CONTROL_NAME, LOCK_NAME,
)  # fmt: skip
Step = Callable[[], object]


def create_pool(
    path: str | os.PathLike[str],
    devices: Sequence[str],
    *,
    name: str | None = None,
    options: PoolOptions | None = None,
    clock: Clock | None = None,
) -> Pool:
    """Format devices and open them as a new pool.

    Args:
        path: Directory for catalog and lock; made if missing, must be empty, on a persistent local
            filesystem.
        devices: URLs such as 'dram:?size=4GiB' and 'dir:/mnt/nvme/kv?size=500GiB'.
        name: For people; the directory's name when missing.
        options: How this process runs it.
        clock: Time; the system's when missing.

    Raises:
        ExistsError: The directory holds a pool, or a device does.
        UsageError: A URL is wrong or a device too small.
        NoSpaceError: The machine has not as much memory as the devices want.

    Durability: persist.
    """
    if isinstance(devices, str):
        raise UsageError(f"devices: expected a list of URLs, found {devices!r}; put it in a list")
    root = Path(path).absolute()
    clock = clock or SystemClock()
    urls = [parse_device_url(text) for text in devices]
    plan = plan_devices(urls)
    require_free(root, plan)
    _make_root(root)
    lock_fd = pool_lock.take(root)
    pool_uuid = new_uuid()
    opened: list[DeviceState] = []
    catalog: Catalog | None = None
    try:
        for row, url in plan:
            opened.append(format_row(row, url, pool_uuid, clock))
        catalog = Catalog.create(root / CATALOG_NAME, pool_uuid)
        catalog.set_meta("name", name or root.name)
        for row, _ in plan:
            catalog.add_device(row)
        pool = Pool(root, catalog, opened, options=options or PoolOptions(), clock=clock,
                    lock_fd=lock_fd)  # fmt: skip
        pool.make_namespace(DEFAULT_NAMESPACE)
        catalog.set_attributes(
            ROOT_NODE_ID, uid=os.getuid(), gid=os.getgid(), now_ns=clock.wall_ns()
        )
    except BaseException:
        _abandon(root, opened, catalog, lock_fd)
        raise
    pool.start_background()
    return pool


def require_free(root: Path, plan: Sequence[tuple[DeviceRow, DeviceURL]]) -> None:
    """Refuse to make a pool where there is one, on somebody's device, or of memory not there.

    Changes nothing.

    Raises:
        ExistsError: There is a pool, or the directory holds something.
        NoSpaceError: The machine has not that much memory.
    """
    if (root / CATALOG_NAME).exists():
        raise ExistsError(f"a pool is there already: {root}; 'kvfs-admin pool destroy' removes it")
    if root.is_dir() and any(root.iterdir()):
        raise ExistsError(
            f"directory is not empty: {root}; give the pool one of its own, made if missing"
        )
    require_unused(plan)


def require_unused(plan: Sequence[tuple[DeviceRow, DeviceURL]]) -> None:
    """Refuse directories that are somebody's device. Changes nothing.

    Raises:
        ExistsError: One is.
    """
    for _, url in plan:
        if url.scheme in DIRECTORY_SCHEMES and (Path(url.location) / SUPERBLOCK).exists():
            raise _taken(url)
    require_memory((row.name, url) for row, url in plan)


def _taken(url: DeviceURL) -> ExistsError:
    is_directory = url.scheme in DIRECTORY_SCHEMES
    remedy = "delete the directory" if is_directory else "write zeros over its first 2 MiB"
    return ExistsError(f"device belongs to a pool: {url}; destroy that pool or {remedy}")


def plan_devices(
    urls: Sequence[DeviceURL], others: Sequence[DeviceRow] = (), first_index: int = 0
) -> list[tuple[DeviceRow, DeviceURL]]:
    """Return row and URL, all sizes chosen, for each device of a pool to be made, or to be added.

    Args:
        urls: What is to be planned.
        others: The devices that the pool has.
        first_index: Number of the first one.

    Raises:
        UsageError: None given, a name twice, one inside another, or one too small for its segments.
    """
    if not urls:
        raise UsageError("a pool needs at least one device, e.g. 'dir:/mnt/nvme/kv?size=100GiB'")
    present = [parse_device_url(row.url) for row in others]
    roots = [Path(url.location).resolve() for url in [*urls, *present]
             if url.scheme in DIRECTORY_SCHEMES]  # fmt: skip
    for root in roots:
        if not set(roots).isdisjoint(root.parents):
            raise UsageError(f"a device cannot lie inside another: {root}; put it beside it")
    plan = []
    taken = {row.name for row in others}
    names = set(taken)
    counts: dict[str, int] = {}
    for index, url in enumerate(urls, first_index):
        number = counts.get(url.kind, 0)
        while f"{url.kind}{number}" in taken:
            number += 1
        counts[url.kind] = number + 1
        name = url.name or f"{url.kind}{number}"
        if name in names:
            raise UsageError(f"two devices are called {name!r}; give one another name=")
        names.add(name)
        capacity = capacity_of(url)
        segment = url.segment_bytes or default_segment_bytes(capacity)
        if capacity < SEGMENTS_MIN * segment:
            raise UsageError(
                f"device too small: {url} has {format_bytes(capacity)}, with segments of "
                f"{format_bytes(segment)} it needs at least {format_bytes(SEGMENTS_MIN * segment)}"
            )
        capacity = capacity // segment * segment
        # The sizes go into the URL that is kept: what was left to choose is chosen once.
        url = dataclasses.replace(
            url, size_bytes=capacity, segment_bytes=segment,
            options={**url.options, "size": str(capacity), "segment": str(segment)},
        )  # fmt: skip
        plan.append((DeviceRow(index, new_uuid().bytes, name, str(url), url.tier, "online"), url))
    return plan


def open_pool(
    path: str | os.PathLike[str],
    *,
    options: PoolOptions | None = None,
    clock: Clock | None = None,
    allow_moved: bool = False,
    background: bool = True,
    keeper: Keeper | None = None,
    lock_fd: int = -1,
) -> Pool:
    """Open a pool and become its owner.

    Args:
        path: The pool's directory.
        options: How this process runs it.
        clock: Time; the system's when missing.
        allow_moved: Accept devices that were copied, moved, or left by another host.
        background: Start the background thread; without it nothing persists async blocks but
            `flush`.
        keeper: Holds the memory of memory devices, and what an earlier owner left of it; stays
            open.
        lock_fd: The pool's lock as its last owner handed it over (`Pool.share_lock`); the pool's
            from here on, closed if it does not open.

    Raises:
        NotFoundError: There is no pool.
        BusyError: Another process owns it; the message has its pid.
        DataError: Catalog or superblock damaged, or of another format.
    """
    root = Path(path).absolute()
    if lock_fd >= 0:
        lock_fd = pool_lock.inherit(root, lock_fd)
    if not (root / CATALOG_NAME).exists():
        raise NotFoundError(f"no pool: {root}: make one with 'kvfs-admin pool create'")
    clock = clock or SystemClock()
    if lock_fd < 0:
        lock_fd = pool_lock.take(root)
    opened: list[DeviceState] = []
    catalog: Catalog | None = None
    try:
        catalog = Catalog.open(root / CATALOG_NAME)
        pool_uuid = catalog.pool_uuid
        for row in catalog.devices():
            # One by one: those opened so far are closed if the next one fails.
            device = _open_row(row, pool_uuid, clock, keeper, allow_moved=allow_moved)
            device.is_offline = row.state == OFFLINE
            opened.append(device)
        pool = Pool(root, catalog, opened, options=options or PoolOptions(), clock=clock,
                    lock_fd=lock_fd)  # fmt: skip
    except BaseException:
        steps: list[Step] = [state.device.close for state in opened]
        if catalog is not None:
            steps.append(catalog.close)
        _undo(root, [*steps, partial(os.close, lock_fd)])
        raise
    if background:
        pool.start_background()
    return pool


def _open_device(
    row: DeviceRow, url: DeviceURL, *, create: bool = False, keeper: Keeper | None = None
) -> Device:
    return open_device(
        url, index=row.index, uuid=uuid.UUID(bytes=row.uuid), capacity_bytes=url.size_bytes,
        segment_bytes=url.segment_bytes, name=row.name, create=create, keeper=keeper,
    )  # fmt: skip


def format_row(row: DeviceRow, url: DeviceURL, pool_uuid: uuid.UUID, clock: Clock) -> DeviceState:
    """Make one device of a new pool; what belongs to another pool is left as it is."""
    device = _open_device(row, url, create=True)
    try:
        is_taken = device.read_superblock() is not None
    except BaseException:
        device.close()
        raise
    if is_taken:
        device.close()
        raise _taken(url)
    try:
        return format_device(device, pool_uuid, location_of(device), this_process(), clock)
    except BaseException:
        _undo(device.info.url, [device.destroy, device.close])
        raise


def _open_row(
    row: DeviceRow, pool_uuid: uuid.UUID, clock: Clock, keeper: Keeper | None, *, allow_moved: bool
) -> DeviceState:
    """Open one device of an existing pool and claim it; memory that nobody has kept is empty."""
    url = parse_device_url(row.url)
    device = _open_device(row, url, keeper=keeper)
    try:
        location, is_persistent = location_of(device), device.info.is_persistent
        if is_persistent or device.segments() or device.raw_files() or _is_formatted(device):
            try:
                return claim_device(
                    device, pool_uuid, location, this_process(), clock, allow_moved=allow_moved
                )
            except (DataError, RefusedError) as error:
                if device.info.is_persistent:
                    raise
                _log.warning("memory of the last owner is not used, %s starts empty: %s",
                             row.name, error)  # fmt: skip
            device.destroy()
            device = _open_device(row, url, keeper=keeper)
        return format_device(device, pool_uuid, location, this_process(), clock)
    except BaseException:
        device.close()
        raise


def _is_formatted(device: Device) -> bool:
    try:
        return device.read_superblock() is not None
    except DataError:
        return True


def destroy_pool(path: str | os.PathLike[str]) -> None:
    """Delete a pool: what kvfs made on its devices, then its directory.

    Of a pool whose catalog is damaged, the devices that can be told from it (see `salvage`).

    Raises:
        NotFoundError: There is no pool.
        BusyError: Somebody owns it.
        RefusedError: See `require_pool`.
    """
    root = Path(path).absolute()
    if not (root / CATALOG_NAME).exists():
        raise NotFoundError(f"no pool: {root}")
    require_pool(root)  # before the lock makes its file
    lock_fd = pool_lock.take(root)
    try:
        for row in _devices_left(root):
            _open_device(row, parse_device_url(row.url)).destroy()
    finally:
        os.close(lock_fd)
    _remove_pool_files(root)


def require_pool(root: Path) -> None:
    """Refuse a directory whose catalog is damaged beyond telling that it was one of kvfs.

    Raises:
        RefusedError: Neither the catalog's head, nor a device that it names, nor a lock file says
            that this is a pool.
    """
    with (root / CATALOG_NAME).open("rb") as file:
        file.seek(68)  # where SQLite keeps the application's id
        is_catalog = file.read(4) == APPLICATION_ID.to_bytes(4, "big")
    if not (is_catalog or pool_lock.is_signed(root) or salvage(root / CATALOG_NAME).superblocks):
        raise RefusedError(
            f"not known for a pool: {root}: {CATALOG_NAME} is no catalog of kvfs; if it was one, "
            "delete the directory yourself"
        )


def _devices_left(root: Path) -> list[DeviceRow]:
    """Return the devices of a pool; of one with a damaged catalog the directories it tells of."""
    try:
        catalog = Catalog.open(root / CATALOG_NAME)
        try:
            rows = catalog.devices()
        finally:
            catalog.close()
        for row in rows:
            parse_device_url(row.url)
    except (CorruptionError, ValueError):
        rows = salvage(root / CATALOG_NAME).rows
        return [row for row in rows if scheme_of(row.url) in DIRECTORY_SCHEMES]
    return rows


def _remove_pool_files(root: Path) -> None:
    """Delete what kvfs makes in a pool's directory, and that if nothing else is in it."""
    aside = root.glob(f"{CATALOG_NAME}.damaged*")
    for path in (*aside, *(root / name for name in _OWN_NAMES)):
        path.unlink(missing_ok=True)
    if not any(root.iterdir()):
        root.rmdir()


def _make_root(root: Path) -> None:
    """Make a pool's directory, with those above it."""
    try:
        root.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(
            f"pool directory cannot be made: {str(root)!r}: {reason}; choose another path"
        ) from error


def _abandon(root: Path, opened: list[DeviceState], catalog: Catalog | None, lock_fd: int) -> None:
    """Undo a creation that failed half-way."""
    steps: list[Step] = []
    for state in opened:
        steps += [state.device.destroy, state.device.close]  # closed even if it stays
    if catalog is not None:
        steps.append(catalog.close)
    _undo(root, [*steps, partial(os.close, lock_fd), partial(_remove_pool_files, root)])


def _undo(where: object, steps: Sequence[Step]) -> None:
    """Take all steps, whatever becomes of those before.

    What fails is logged: the error that is on its way out says why all this is undone.
    """
    for step in steps:
        try:
            step()
        except Exception as error:  # noqa: BLE001 - the next step is due all the same
            _log.warning("could not be undone: %s: %s", where, error)
