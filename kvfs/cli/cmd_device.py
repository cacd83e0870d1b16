"""`kvfs-admin device`: list, show, scan; what changes devices is in `cmd_device_changes`.

Layer: L5.
"""

import argparse
import dataclasses
import os
from typing import TYPE_CHECKING, Any

from kvfs.admin import messages as msg
from kvfs.cli import cmd_device_changes
from kvfs.cli.cmd_pool import print_devices
from kvfs.cli.console import DASH, Column, Console, as_fields, counted
from kvfs.cli.options import AddCommand, add_command
from kvfs.cli.runner import exit_codes
from kvfs.cli.session import asking, find_pool
from kvfs.errors import NotFoundError

if TYPE_CHECKING:
    from kvfs.devices.discovery import Found
    from kvfs.devices.nvme import Wear
    from kvfs.emulation import LinkFigures

_RANGES_SHOWN = 16


def add(verbs: AddCommand) -> None:
    """Define the verbs."""
    add_command(
        verbs, "list", list_devices, "device list",
        "List the devices of a pool, fastest tier first, and where they are.",
        f"online and offline; {exit_codes(10, 11, 13, 14)}",
    )  # fmt: skip
    show = add_command(
        verbs, "show", show_device, "device show",
        "Show all that is known of a device: of a pool, by its name, or of a place that could be "
        "one, by its URL. Health and wear of an SSD are told to root alone.",
        f"online and offline; {exit_codes(2, 10, 11, 13, 14)}",
    )  # fmt: skip
    show.add_argument("device", metavar="NAME|URL", help="such as dir0, or dax:/dev/dax0.0")
    scan = add_command(
        verbs, "scan", scan_devices, "device scan",
        "List what this machine has that could be a device, each with a URL to be pasted into "
        "'pool create'. DAX devices, CXL regions and memory devices, namespaces of persistent "
        "memory, memory nodes without processors, NVMe disks, and directories that can be written "
        "to. Changes nothing.",
        f"offline; {exit_codes()}",
    )  # fmt: skip
    scan.add_argument(
        "--bench", action="store_true",
        help="also measure: directories with a file of 256 MiB without a name, memory nodes by "
        "copying. DAX devices are not measured: that would overwrite what lies there",
    )  # fmt: skip
    cmd_device_changes.add(verbs)


def list_devices(arguments: argparse.Namespace, console: Console) -> int:
    """Ask and print."""
    with asking(find_pool(arguments), console) as ask:
        answer: msg.DeviceListAnswer = ask(msg.DeviceList())
    if console.is_json:
        console.put_json("device list", as_fields(answer))
    else:
        print_devices(answer.devices, console, with_places=True)
    return 0


def show_device(arguments: argparse.Namespace, console: Console) -> int:
    """Find out which is meant, and print."""
    if ":" in arguments.device:
        return _show_place(arguments.device, console)
    with asking(find_pool(arguments), console) as ask:
        answer: msg.DeviceListAnswer = ask(msg.DeviceList())
    device = named(answer.devices, arguments.device)
    wear = _wear_of(device.url)
    if console.is_json:
        console.put_json("device show", {**as_fields(device), **_wear_fields(wear)})
        return 0
    state = console.paint(device.state.upper())
    lines = [
        ("device", f"{device.name}   {device.kind}   tier {device.tier}   state  {state}"),
        ("url", device.url),
        ("size", f"{console.size(device.capacity_bytes)}, used {console.size(device.used_bytes)}"),
        ("holds", f"{counted(device.block_count, 'block')}, {console.size(device.live_bytes)}"),
        ("segment", f"{console.size(device.segment_bytes)}, {device.segment_count} in use"),
        ("keeps", _keeps(device.is_persistent, device.persistence)),
        ("bad", _bad(device, console)),
        ("wrote", _wrote(device, console)),
        ("wear", _wear_text(wear, console)),
        ("speed", _speed(device, console)),
    ]  # fmt: skip
    if device.kind == "emulated":
        lines.append(("energy", f"{device.energy_joules:.3f} J since it was opened"))
    if device.failures:
        lines.append(("failures", str(device.failures)))
    _print_lines(lines, console)
    return 0


def named(devices: list[msg.DeviceAnswer], name: str) -> msg.DeviceAnswer:
    """Return the device of a name.

    Raises:
        NotFoundError: There is none.
    """
    for device in devices:
        if device.name == name:
            return device
    known = ", ".join(sorted(device.name for device in devices))
    raise NotFoundError(f"no such device: {name!r}: expected one of {known}")


def _show_place(text: str, console: Console) -> int:
    """Describe a place by its URL; nothing is opened but to look."""
    from kvfs.config import DIRECTORY_SCHEMES, parse_device_url
    from kvfs.devices.discovery import describe
    from kvfs.devices.open import capacity_of
    from kvfs.devices.osfs import nearest_existing
    from kvfs.devices.place import look

    url = parse_device_url(text)
    capacity, place = capacity_of(url), look(url)
    wear = _wear_of(text)
    fields: dict[str, Any] = {
        "url": str(url), "kind": url.kind, "tier": url.tier, "capacity_bytes": capacity,
        "persistence": place.persistence, "is_persistent": place.is_persistent,
        "is_formatted": place.is_formatted, "note": place.note,
        "bad_ranges": [{"offset": start, "nbytes": size} for start, size in place.bad],
        **dataclasses.asdict(place.figures), **_wear_fields(wear),
    }  # fmt: skip
    found = None
    if url.scheme in DIRECTORY_SCHEMES:
        found = describe(nearest_existing(url.location))
    fields["abilities"] = list(found.abilities) if found else []
    if console.is_json:
        console.put_json("device show", fields)
        return 0
    ranges = [msg.RangeAnswer(start, size) for start, size in place.bad]
    lines = [
        ("place", f"{url}   {url.kind}   tier {url.tier}"),
        ("size", f"{console.size(capacity)} could be used"),
        ("holds", "a device of a pool" if place.is_formatted else "nothing of kvfs"),
        ("keeps", _keeps(place.is_persistent, place.persistence)),
        ("bad", _ranges(ranges, console)),
        ("wear", _wear_text(wear, console)),
        ("speed", _speed(place.figures, console)),
    ]
    if place.note:
        lines.append(("note", f"would be served like dir: {place.note}"))
    if found is not None:
        lines.append(("can", ", ".join(found.abilities) or DASH))
    _print_lines(lines, console)
    return 0


def _print_lines(lines: list[tuple[str, str]], console: Console) -> None:
    for title, text in lines:
        console.put(f"{title:>8}   {text}")


def _keeps(is_persistent: bool, persistence: str) -> str:
    if not is_persistent:
        return "nothing over a power cut"
    texts = {
        "cpu_cache": "what was stored, the caches are safe from a power cut",
        "memory_controller": "what was written back from the caches",
        "page": "what fdatasync has covered (it is no memory)",
        "": "what was persisted, as far as the medium does",
    }
    return texts[persistence]


def _bad(device: msg.DeviceAnswer, console: Console) -> str:
    return _ranges(device.bad_ranges, console)


def _ranges(ranges: list[msg.RangeAnswer], console: Console) -> str:
    if not ranges:
        return "nothing known"
    total = console.size(sum(one.nbytes for one in ranges))
    shown = ", ".join(f"{one.offset:#x}+{one.nbytes:#x}" for one in ranges[:_RANGES_SHOWN])
    more = len(ranges) - _RANGES_SHOWN
    return f"{total} in {counted(len(ranges), 'range')}: {shown}" + f" and {more} more" * (more > 0)


def _wrote(device: msg.DeviceAnswer, console: Console) -> str:
    text = f"{console.size(device.bytes_written)} since it was opened"
    if device.bytes_stored > 0:
        factor = device.bytes_written / device.bytes_stored
        text += f", {factor:.2f} for each byte that was to be stored"
    return text


def _wear_of(text: str) -> "Wear":
    from kvfs.config import DIRECTORY_SCHEMES, parse_device_url
    from kvfs.devices.nvme import Wear, wear_of
    from kvfs.devices.osfs import nearest_existing

    url = parse_device_url(text)
    if url.scheme not in DIRECTORY_SCHEMES:
        return Wear(reason="memory is not asked for it")
    return wear_of(nearest_existing(url.location))


def _wear_fields(wear: "Wear") -> dict[str, Any]:
    return {"wear": {
        "drive": wear.drive, "percentage_used": wear.percentage_used,
        "host_bytes_written": wear.host_bytes_written,
        "flash_bytes_written": wear.flash_bytes_written, "media_errors": wear.media_errors,
        "reason": wear.reason,
    }}  # fmt: skip


def _wear_text(wear: "Wear", console: Console) -> str:
    if wear.percentage_used is None:
        return f"not readable: {wear.reason}"
    text = (f"{wear.drive}: {wear.percentage_used} % of its rated life used, "
            f"{console.size(wear.host_bytes_written)} written by hosts")  # fmt: skip
    if wear.flash_bytes_written and wear.host_bytes_written:
        factor = wear.flash_bytes_written / wear.host_bytes_written
        text += f", {console.size(wear.flash_bytes_written)} to flash ({factor:.2f} for each)"
    return f"{text}, {counted(wear.media_errors or 0, 'media error')}"


def _speed(figures: "LinkFigures | msg.DeviceAnswer", console: Console) -> str:
    parts = [
        f"{way} {console.size(rate)}/s" for way, rate in (
            ("reads", figures.read_bytes_per_s), ("writes", figures.write_bytes_per_s)
        ) if rate
    ] + [
        f"{way} after {latency} ns" for way, latency in (
            ("reads", figures.read_latency_ns), ("writes", figures.write_latency_ns)
        ) if latency
    ]  # fmt: skip
    return ", ".join(parts) or "the kernel does not say; 'device scan --bench' measures"


def scan_devices(arguments: argparse.Namespace, console: Console) -> int:
    """Look, perhaps measure, and print."""
    from kvfs.devices.discovery import scan

    rows, items = [], []
    for found in scan():
        rates = _measure(found, console) if arguments.bench else None
        items.append({
            **dataclasses.asdict(found), "abilities": list(found.abilities),
            "measured_write_bytes_per_s": rates[0] if rates else None,
            "measured_read_bytes_per_s": rates[1] if rates else None,
        })  # fmt: skip
        row = [found.kind, found.name, console.size(found.nbytes), found.url or DASH,
               ", ".join(found.abilities) or DASH]  # fmt: skip
        if arguments.bench:
            row += [f"{console.size(rate)}/s" for rate in rates] if rates else [DASH, DASH]
        rows.append([*row, found.note or DASH])
    if console.is_json:
        console.put_json("device scan", {"found": items})
        return 0
    columns = [Column("kind"), Column("name"), Column("size", True), Column("url"), Column("can")]
    if arguments.bench:
        columns += [Column("write", True), Column("read", True)]
        console.say("DAX devices are not measured: that would overwrite what lies there")
    console.table([*columns, Column("note")], rows)
    return 0


def _measure(found: "Found", console: Console) -> tuple[int, int] | None:
    """Return bytes per second of writes and reads; None for what is not measured."""
    from kvfs.devices import quick_bench
    from kvfs.devices.numa import nodes

    try:
        if found.kind == "directory":
            console.detail(f"measuring {found.name}")
            return quick_bench.bench_directory(found.name)
        if found.kind == "node":
            for node in nodes():
                if f"node{node.number}" == found.name:
                    return quick_bench.bench_node(node)
    except OSError as error:
        console.say(f"{found.name} cannot be measured: {error.strerror or os.strerror(5)}")
    return None
