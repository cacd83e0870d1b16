"""`kvfs-admin inspect`: structures of the medium, field by field, as they lie there.

Layer: L5.
"""

import argparse
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvfs.admin import messages as msg
from kvfs.cli.console import DASH, Column, Console
from kvfs.cli.options import AddCommand, add_command
from kvfs.cli.runner import Parser, exit_codes
from kvfs.cli.session import find_pool
from kvfs.control_client import ControlClient
from kvfs.errors import NotFoundError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvfs.admin.raw import DeviceTarget, StructureAnswer
    from kvfs.devices.base import Device

_EXIT_CORRUPT = 14
_ALWAYS = "online and offline, read-only, beside a running owner too"


def add(verbs: AddCommand) -> None:
    """Define the verbs."""
    codes = exit_codes(2, 3, 10, 13, 14)
    superblock = _add(
        verbs, "superblock", show_superblock,
        "Show a device's superblock and the namespaces it remembers.", codes,
    )  # fmt: skip
    del superblock
    segment = _add(
        verbs, "segment", show_segment,
        "List the segments of a device, or show the headers of one.", codes,
    )  # fmt: skip
    segment.add_argument("segment", nargs="?", metavar="SLOT[:GENERATION]", help="which segment")
    summary = _add(verbs, "summary", show_summary, "List the valid entries of a segment.", codes)
    summary.add_argument("segment", metavar="SLOT[:GENERATION]", help="which segment")
    block = _add(
        verbs, "block", show_block,
        "Show an entry and verify its payload, or find all copies of a block by its key.", codes,
        device_help="device, or the 64 hexadecimal digits of a block key",
    )  # fmt: skip
    block.add_argument("segment", nargs="?", metavar="SLOT[:GENERATION]", help="which segment")
    block.add_argument("entry", nargs="?", type=int, metavar="ENTRY", help="which entry")
    block.add_argument(
        "--bytes", type=int, default=256, metavar="N",
        help="how much of the payload --hex shows (default: %(default)s)",
    )  # fmt: skip


def _add(
    verbs: AddCommand, name: str, handler: Any, text: str, codes: str,
    device_help: str = "a device of the pool, or the directory of one",
) -> Parser:  # fmt: skip
    parser = add_command(verbs, name, handler, f"inspect {name}", text, f"{_ALWAYS}; {codes}")
    parser.add_argument("device", metavar="DEVICE", help=device_help)
    parser.add_argument("--hex", action="store_true", help="show the bytes, too")
    return parser


def show_superblock(arguments: argparse.Namespace, console: Console) -> int:
    """Print a superblock."""
    from kvfs.admin import raw

    with _device(arguments, console) as device:
        shown = raw.show_superblock(device)
    if console.is_json:
        fields = _fields(shown.header)
        fields["namespaces"] = [
            {"namespace_id": space.namespace_id, "name": space.name, "layout": space.layout}
            for space in shown.namespaces
        ]
        console.put_json("inspect superblock", fields)
    else:
        _print(shown.header, arguments, console)
        for space in shown.namespaces:
            console.put(f"  namespace {space.namespace_id}  {space.name}  {space.layout}")
    return _EXIT_CORRUPT if shown.header.problem else 0


def show_segment(arguments: argparse.Namespace, console: Console) -> int:
    """Print the headers of a segment, or all segments in a line each."""
    from kvfs.admin import raw

    with _device(arguments, console) as device:
        if arguments.segment is None:
            return _list_segments(device, console)
        shown = raw.show_segment(device, raw.find_segment(device, arguments.segment))
    if console.is_json:
        console.put_json("inspect segment", {"headers": [_fields(header) for header in shown]})
    else:
        for header in shown:
            _print(header, arguments, console)
    is_damaged = any(header.problem not in ("", "not written") for header in shown)
    return _EXIT_CORRUPT if is_damaged else 0


def _list_segments(device: "Device", console: Console) -> int:
    from kvfs.admin import raw

    segments = raw.list_segments(device)
    if console.is_json:
        names = raw.SegmentAnswer.__struct_fields__
        rows = [{name: getattr(segment, name) for name in names} for segment in segments]
        console.put_json("inspect segment", {"segments": rows})
    else:
        columns = (Column("slot", True), Column("generation", True), Column("kind"),
                   Column("size", True), Column("state"), Column("entries", True),
                   Column("problem"))  # fmt: skip
        console.table(
            columns,
            [
                (str(found.slot), str(found.generation), found.kind,
                 console.size(found.size_bytes), found.state, str(found.entries),
                 found.problem or DASH)
                for found in segments
            ],
        )  # fmt: skip
    return _EXIT_CORRUPT if any(segment.problem for segment in segments) else 0


def show_summary(arguments: argparse.Namespace, console: Console) -> int:
    """Print the entries of a segment."""
    from kvfs.admin import raw

    with _device(arguments, console) as device:
        entries = raw.show_summary(device, raw.find_segment(device, arguments.segment))
    if console.is_json:
        names = raw.EntryAnswer.__struct_fields__
        rows = [{name: getattr(entry, name) for name in names} for entry in entries]
        console.put_json("inspect summary", {"entries": rows})
        return 0
    columns = (Column("entry", True), Column("offset", True), Column("stored", True),
               Column("tokens", True), Column("flags", True), Column("key"))  # fmt: skip
    console.table(
        columns,
        [
            (str(entry.index), f"{entry.offset:#x}", str(entry.stored_bytes), str(entry.tokens),
             str(entry.flags), entry.key)
            for entry in entries
        ],
    )  # fmt: skip
    return 0


def show_block(arguments: argparse.Namespace, console: Console) -> int:
    """Print a block, or all copies of one."""
    from kvfs.admin import raw

    key = raw.parse_key(arguments.device)
    if key is None and (arguments.segment is None or arguments.entry is None):
        raise UsageError("which block: give DEVICE, SLOT and ENTRY, or a key of 64 hex digits")
    found = []
    if key is None:
        with _device(arguments, console) as device:
            name = raw.find_segment(device, arguments.segment)
            found.append(raw.show_block(device, name, arguments.entry))
    else:
        for target in _targets(find_pool(arguments), console):
            with contextlib.closing(raw.open_raw(target)) as device:
                for name, index in raw.find_block(device, key):
                    found.append(raw.show_block(device, name, index))
        if not found:
            raise NotFoundError(f"no copy of this block on any device: {arguments.device}")
    if console.is_json:
        blocks = [
            {"device": block.device, "slot": block.slot, "generation": block.generation,
             "entry": _fields(block.entry), "payload_problem": block.payload_problem}
            for block in found
        ]  # fmt: skip
        console.put_json("inspect block", {"blocks": blocks})
    else:
        for block in found:
            _print(block.entry, arguments, console)
            console.put(f"  payload           {block.payload_problem or 'checksum holds'}")
            if arguments.hex:
                _dump(block.payload[: arguments.bytes], console)
    is_damaged = any(block.entry.problem or block.payload_problem for block in found)
    return _EXIT_CORRUPT if is_damaged else 0


@contextlib.contextmanager
def _device(arguments: argparse.Namespace, console: Console) -> "Iterator[Device]":
    """Yield the device that is meant, for reading."""
    from kvfs.admin import raw

    if arguments.device.startswith("/"):
        target = raw.DeviceTarget(Path(arguments.device).name, arguments.device)
    else:
        target = _target(arguments, console)
    with contextlib.closing(raw.open_raw(target)) as device:
        yield device


def _target(arguments: argparse.Namespace, console: Console) -> "DeviceTarget":
    found = _targets(find_pool(arguments), console)
    for target in found:
        if target.name == arguments.device:
            return target
    names = ", ".join(target.name for target in found) or "none"
    raise NotFoundError(
        f"no such device: {arguments.device!r}: expected one of {names} (volatile devices cannot "
        "be inspected), or a directory's path"
    )


def _targets(pool_path: Path, console: Console) -> "list[DeviceTarget]":
    """Return the pool's directories, as its owner says, else as its catalog does."""
    from kvfs.admin import raw

    client = ControlClient.connect(pool_path)
    if client is None:
        return raw.targets(pool_path)
    console.detail(f"asking the owner of {pool_path}")
    with client:
        answer: msg.DeviceListAnswer = client.ask(msg.DeviceList())
    return raw.targets_of([(device.index, device.name, device.url) for device in answer.devices])


def _fields(structure: "StructureAnswer") -> dict[str, Any]:
    """Return a structure as JSON fields."""
    return {
        "where": structure.where,
        "problem": structure.problem or None,
        "fields": {field.name: field.value for field in structure.fields},
    }


def _print(structure: "StructureAnswer", arguments: argparse.Namespace, console: Console) -> None:
    console.put(f"{structure.where}: {structure.problem or 'checksum holds'}")
    if structure.problem != "not written":
        for field in structure.fields:
            meaning = f"   {field.meaning}" if console.is_verbose and field.meaning else ""
            console.put(f"  {field.offset:#06x}  {field.name:<16}  {field.value}{meaning}")
    if arguments.hex:
        _dump(structure.raw, console)


def _dump(raw: bytes, console: Console) -> None:
    """Print bytes as hexdump(1) does; repeated lines become one '*'."""
    previous = b""
    is_starred = False
    for i in range(0, len(raw), 16):
        part = raw[i : i + 16]
        if part == previous:
            if not is_starred:
                console.put("  *")
            is_starred = True
            continue
        previous, is_starred = part, False
        text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in part)
        console.put(f"  {i:08x}  {part[:8].hex(' '):<23}  {part[8:].hex(' '):<23}  |{text}|")
    console.put(f"  {len(raw):08x}")
