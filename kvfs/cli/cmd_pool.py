"""`kvfs-admin pool`: create, status, list, destroy.

Layer: L5.
"""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvfs.admin import messages as msg
from kvfs.cli.console import DASH, Column, Console, as_fields, confirm, counted
from kvfs.cli.options import AddCommand, add_changing, add_command
from kvfs.cli.runner import EXIT_WRONG, exit_codes
from kvfs.cli.session import CATALOG_NAME, POOL_VARIABLE, asking, find_pool
from kvfs.config import parse_device_url
from kvfs.control_client import ControlClient, owners
from kvfs.errors import BusyError, UsageError

if TYPE_CHECKING:
    from kvfs.engine.catalog_schema import DeviceRow

DEVICE_COLUMNS = (
    Column("tier"), Column("device"), Column("kind"), Column("state"), Column("size", True),
    Column("used", True), Column("live", True), Column("free", True), Column("blocks", True),
    Column("failures", True),
)  # fmt: skip


def add(verbs: AddCommand) -> None:
    """Define the verbs."""
    create = add_command(
        verbs, "create", create_pool, "pool create",
        "Format devices and make a pool of them in the directory --pool. Refuses devices that hold "
        "a pool already.",
        f"offline; {exit_codes(2, 11, 12, 13, 16)}",
    )  # fmt: skip
    create.add_argument(
        "devices", nargs="+", metavar="DEVICE-URL",
        help="such as 'dram:?size=4GiB' or 'dir:/mnt/nvme/kv?size=500GiB&tier=2&segment=64MiB'",
    )  # fmt: skip
    create.add_argument("--name", default="", help="name for people (default: the directory's)")
    add_changing(create, is_destructive=False)
    status = add_command(
        verbs, "status", show_status, "pool status",
        "Show how a pool is: state, devices, what is wrong.",
        f"online and offline; {exit_codes(3, 10, 11, 13, 14)}",
    )  # fmt: skip
    status.add_argument(
        "-x", dest="only_problems", action="store_true",
        help="print only what is wrong, and exit with 3 if anything is",
    )  # fmt: skip
    add_command(
        verbs, "list", list_pools, "pool list",
        "List the pools that are open, as far as this user may ask them.",
        f"online; {exit_codes()}",
    )  # fmt: skip
    destroy = add_command(
        verbs, "destroy", destroy_pool, "pool destroy",
        "Delete a pool and all it holds: what kvfs made on its devices, then its directory. Of a "
        "pool whose catalog is damaged, the devices that can still be told from it.",
        f"offline; {exit_codes(2, 10, 11, 13, 14, 16)}",
    )  # fmt: skip
    add_changing(destroy, is_destructive=True)


def create_pool(arguments: argparse.Namespace, console: Console) -> int:
    """Plan, print, make."""
    given = arguments.pool or os.environ.get(POOL_VARIABLE, "")
    if not given:
        raise UsageError("no pool given: 'kvfs-admin --pool PATH pool create ...' says where")
    path = Path(given).absolute()
    from kvfs.devices.open import free_bytes
    from kvfs.lifecycle import create_pool as create
    from kvfs.lifecycle import plan_devices, require_free

    plan = plan_devices([parse_device_url(text) for text in arguments.devices])
    require_free(path, plan)
    rows = [
        (str(row.tier), row.name, url.scheme, console.size(url.size_bytes),
         console.size(url.segment_bytes), str(url.size_bytes // url.segment_bytes),
         url.location or DASH)
        for row, url in plan
    ]  # fmt: skip
    fields: dict[str, Any] = {
        "pool": str(path),
        "name": arguments.name or path.name,
        "devices": [
            {"name": row.name, "tier": row.tier, "kind": url.scheme, "location": url.location,
             "capacity_bytes": url.size_bytes, "segment_bytes": url.segment_bytes}
            for row, url in plan
        ],
        "is_created": not arguments.dry_run,
    }  # fmt: skip
    if not console.is_json:
        verb = "would make" if arguments.dry_run else "making"
        console.put(f"{verb} pool {fields['name']} in {path}:")
        columns = (Column("tier"), Column("device"), Column("kind"), Column("size", True),
                   Column("segment", True), Column("segments", True), Column("where"))  # fmt: skip
        console.table(columns, rows)
    for row, url in plan:
        free = free_bytes(url)
        if free is not None and url.size_bytes > free:
            console.say(
                f"warning: {row.name} may grow to {console.size(url.size_bytes)}, but "
                f"{url.location} has {console.size(free)} free; it will be full before"
            )
    if not arguments.dry_run:
        urls = [str(url) for _, url in plan]
        create(path, urls, name=arguments.name or None).close()
        console.say(f"created; now 'kvfs mount {path} DIR'")
    else:
        console.say("nothing was changed")
    if console.is_json:
        console.put_json("pool create", fields)
    return 0


def show_status(arguments: argparse.Namespace, console: Console) -> int:
    """Ask and print."""
    path = find_pool(arguments)
    with asking(path, console) as ask:
        status: msg.PoolStatusAnswer = ask(msg.PoolStatus())
    problems = status.problems
    code = EXIT_WRONG if arguments.only_problems and problems else 0
    if console.is_json:
        console.put_json("pool status", as_fields(status))
    elif arguments.only_problems:
        for problem in problems:
            console.put(f"{status.pool_name}: {status.state}: {problem}")
    else:
        _print_status(status, console)
    return code


def _print_status(status: msg.PoolStatusAnswer, console: Console) -> None:
    state = console.paint(status.state.upper())
    owner = f"pid {status.owner_pid}"
    if status.owner_command:
        owner += f" ({status.owner_command}), since {console.time(status.opened_ns)}"
    else:
        owner = "nobody; opened for this question only"
    lines = [
        ("pool", f"{status.pool_name}   {status.pool_uuid[:8]}   state  {state}"),
        ("path", status.pool_path),
        ("owner", owner),
        ("mount", status.mount or DASH),
        *[("status", problem) for problem in status.problems],
    ]
    if status.problems:
        end = "'kvfs umount' it" if status.mount else "stop its owner"
        lines.append(("action", f"{end}, then run 'kvfs-admin check --data'"))
    live, capacity = console.size(status.live_bytes), console.size(status.capacity_bytes)
    held = f"{counted(status.contexts, 'context')} in {counted(status.namespaces, 'namespace')}"
    lines.append(("holds", f"{held}, {live} live of {capacity}"))
    if status.clients or status.client_revocations:
        revoked = f", {status.client_revocations} times revoked" * bool(status.client_revocations)
        hold = counted(status.client_segments, "segment")
        lines.append(("clients", f"{status.clients}, they hold {hold}{revoked}"))
    for title, text in lines:
        console.put(f"{title:>7}   {text}")
    console.put("")
    print_devices(status.devices, console)


def print_devices(
    devices: list[msg.DeviceAnswer], console: Console, *, with_places: bool = False
) -> None:
    """Print the table of devices, fastest tier first; `with_places`: with where each lies."""
    rows: list[tuple[str, ...]] = [
        (
            str(device.tier), device.name, device.kind, device.state,
            console.size(device.capacity_bytes), console.size(device.used_bytes),
            console.size(device.live_bytes),
            console.size(max(0, device.capacity_bytes - device.used_bytes)),
            str(device.block_count), str(device.failures),
            *([parse_device_url(device.url).location or DASH] if with_places else []),
        )
        for device in sorted(devices, key=lambda device: (device.tier, device.index))
    ]  # fmt: skip
    columns = (*DEVICE_COLUMNS, Column("where")) if with_places else DEVICE_COLUMNS
    console.table(columns, rows)


def list_pools(arguments: argparse.Namespace, console: Console) -> int:
    """List the owners that are registered and answer."""
    del arguments
    entries = owners()
    if console.is_json:
        pools = [
            {"name": entry.name, "uuid": entry.uuid, "path": entry.pool, "mount": entry.mount,
             "owner_pid": entry.pid}
            for entry in entries
        ]  # fmt: skip
        console.put_json("pool list", {"pools": pools})
        return 0
    rows = [
        (entry.name, entry.uuid[:8], str(entry.pid), entry.mount or DASH, entry.pool)
        for entry in entries
    ]
    columns = (Column("pool"), Column("uuid"), Column("owner", True), Column("mount"),
               Column("path"))  # fmt: skip
    console.table(columns, rows)
    return 0


def destroy_pool(arguments: argparse.Namespace, console: Console) -> int:
    """Plan, print, ask, delete."""
    path = find_pool(arguments)
    client = ControlClient.connect(path)
    if client is not None:
        client.close()
        raise BusyError(f"pool is in use: {path}: unmount it, or stop its owner, first")
    name, rows, held, missing = _what_is_lost(path)
    is_dry = arguments.dry_run
    fields: dict[str, Any] = {
        "pool": name,
        "path": str(path),
        "contexts": None if held is None else held[0],
        "devices": [{"name": row.name, "url": row.url} for row in rows],
        "is_destroyed": not is_dry,
        "is_catalog_damaged": held is None,
        "missing": missing,
    }
    if not console.is_json:
        console.put(f"would destroy pool {name} in {path}:" if is_dry else
                    f"destroying pool {name} in {path}:")  # fmt: skip
        if held is None:
            console.put("  the catalog is damaged: nobody can say how many contexts; all are LOST")
        else:
            contexts, spaces = held
            console.put(f"  {counted(contexts, 'context')} in {counted(spaces, 'namespace')} LOST")
        for row in rows:
            console.put(f"  device {row.name}: all that kvfs made in {row.url} is deleted")
        for url in missing:
            console.put(f"  no device of this pool is found in {url}: what lies there stays")
    if is_dry:
        console.say("nothing was changed")
    else:
        confirm(console, name, is_yes=arguments.yes)
        from kvfs.lifecycle import destroy_pool as destroy

        destroy(path)
        console.say(f"destroyed {name}")
    if console.is_json:
        console.put_json("pool destroy", fields)
    return 0


def _what_is_lost(
    path: Path,
) -> "tuple[str, list[DeviceRow], tuple[int, int] | None, list[str]]":
    """Return name, devices, counts of contexts and namespaces, and URLs of devices not found.

    No counts and the directory's name if the catalog is damaged.
    """
    from kvfs.admin.raw import copied_catalog
    from kvfs.engine.checker.salvage import salvage
    from kvfs.errors import CorruptionError
    from kvfs.lifecycle import require_pool

    try:
        catalog = copied_catalog(path)
        try:
            counts = (catalog.statistics().context_count, len(catalog.namespaces()))
            return catalog.meta("name") or path.name, catalog.devices(), counts, []
        finally:
            catalog.close()
    except CorruptionError:
        require_pool(path)
        found = salvage(path / CATALOG_NAME)
        return path.name, found.rows, None, found.missing
