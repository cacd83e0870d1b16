"""Reading the devices of a pool as they lie there: no lock, no owner, nothing changed.

Layer: L5.

- Works beside a running owner; what is read may be a moment old, or half-written.
- Structures are shown field by field whether or not they hold; whether they do is said beside them.
"""

import contextlib
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from kvfs import _native
from kvfs.config import DIRECTORY_SCHEMES, parse_device_url
from kvfs.devices.base import Device, Segment, SegmentName
from kvfs.devices.directory import DirectoryDevice
from kvfs.devices.filesystem import SUPERBLOCK
from kvfs.engine import format as fmt
from kvfs.engine.catalog import Catalog
from kvfs.engine.checker.offline import ReadOnlyFileSystem
from kvfs.engine.log import load_segment
from kvfs.errors import CorruptionError, DataError, NotFoundError, UsageError
from kvfs.keys import KEY_BYTES
from kvfs.units import GIB, MIB

CATALOG_NAME: Final = "catalog.sqlite"
_COPY_ATTEMPTS: Final = 3
_UNKNOWN_CAPACITY: Final = 1024 * GIB
_SEGMENT: Final = re.compile(r"(\d+)(?::(\d+))?\Z")
_SEGMENT_FILE: Final = re.compile(r"([0-9a-f]{8})-([0-9a-f]{8})(?:\.\w+)?\Z")


class FieldAnswer(msgspec.Struct, frozen=True):
    """One field of a structure. `value`: a number, text, or bytes in hexadecimal."""

    name: str
    offset: int
    size: int
    value: int | str
    meaning: str


class StructureAnswer(msgspec.Struct, frozen=True):
    """One structure. `problem`: why it does not hold, empty if it does. `raw`: its bytes."""

    where: str
    problem: str
    fields: list[FieldAnswer]
    raw: bytes = b""


class NamespaceAnswer(msgspec.Struct, frozen=True):
    """A namespace as a superblock remembers it."""

    namespace_id: str
    name: str
    layout: str


class SuperblockAnswer(msgspec.Struct, frozen=True):
    """A superblock with its table."""

    header: StructureAnswer
    namespaces: list[NamespaceAnswer]


class SegmentAnswer(msgspec.Struct, frozen=True):
    """A segment in one line. `state`: sealed, open, damaged."""

    slot: int
    generation: int
    kind: str
    size_bytes: int
    state: str
    entries: int
    problem: str


class EntryAnswer(msgspec.Struct, frozen=True):
    """An entry in one line."""

    index: int
    key: str
    parent: str
    offset: int
    stored_bytes: int
    tokens: int
    flags: int


class BlockAnswer(msgspec.Struct, frozen=True):
    """A block: its entry, and whether its payload holds. `payload`: the first bytes of it."""

    device: str
    slot: int
    generation: int
    entry: StructureAnswer
    payload_problem: str
    payload: bytes = b""


@dataclass(frozen=True, slots=True)
class DeviceTarget:
    """A device to be read: name for messages, its directory, its number."""

    name: str
    directory: str
    index: int = 0


class _UnlockedFileSystem(ReadOnlyFileSystem):
    """Beside a running owner there is no lock to be had, and none is needed to look."""

    def _take_lock(self) -> int:
        return -1


def copied_catalog(pool_path: Path) -> Catalog:
    """Open a copy of a pool's catalog; the copy is gone from the directory on return.

    Raises:
        NotFoundError: There is no pool.
        CorruptionError: It cannot be read, or its owner writes too much to it to be copied.
    """
    source = pool_path / CATALOG_NAME
    if not source.exists():
        raise NotFoundError(f"no pool: {pool_path}: {CATALOG_NAME} is missing")
    failure: DataError | None = None
    for _ in range(_COPY_ATTEMPTS):
        with tempfile.TemporaryDirectory(prefix="kvfs-look-") as folder:
            for suffix in ("", "-wal"):
                if Path(f"{source}{suffix}").exists():
                    shutil.copyfile(f"{source}{suffix}", f"{folder}/{CATALOG_NAME}{suffix}")
            try:
                catalog = Catalog.open(Path(folder) / CATALOG_NAME)
            except CorruptionError as error:
                failure = error  # copied while a checkpoint moved pages: try again
            else:
                return catalog
    assert failure is not None
    raise failure


def targets(pool_path: Path) -> list[DeviceTarget]:
    """Return the directories of a pool's persistent devices."""
    catalog = copied_catalog(pool_path)
    try:
        return targets_of([(row.index, row.name, row.url) for row in catalog.devices()])
    finally:
        catalog.close()


def targets_of(rows: list[tuple[int, str, str]]) -> list[DeviceTarget]:
    """Return the directories among devices given as (number, name, URL)."""
    urls = [(index, name, parse_device_url(text)) for index, name, text in rows]
    return [DeviceTarget(name, url.location, index) for index, name, url in urls
            if url.scheme in DIRECTORY_SCHEMES]  # fmt: skip


def open_raw(target: DeviceTarget) -> Device:
    """Open a device for reading, taking its geometry from its superblock as far as that holds.

    Raises:
        NotFoundError: There is no device in that directory.
    """
    root = Path(target.directory)
    if not (root / SUPERBLOCK).exists() and not (root / "segments").is_dir():
        raise NotFoundError(f"no device: {root}: neither {SUPERBLOCK} nor segments")
    files = _UnlockedFileSystem(str(root))
    try:
        raw = files.read(SUPERBLOCK) or b""
        try:
            found = fmt.decode_superblock(raw, target.name)
        except DataError:
            found = fmt.Superblock(uuid.UUID(int=0), uuid.UUID(int=0), target.index, 0, 16 * MIB,
                                   _UNKNOWN_CAPACITY)  # fmt: skip
        return DirectoryDevice(
            files,
            index=found.device_index,
            uuid=found.device_uuid,
            capacity_bytes=found.capacity_bytes,
            segment_bytes=found.segment_bytes,
            name=target.name,
            tier=found.tier,
            url=f"dir:{root}",
        )
    except FileNotFoundError as error:
        files.close()
        raise NotFoundError(f"device is not complete: {root}: {error.filename}") from error
    except BaseException:
        files.close()
        raise


def show_superblock(device: Device) -> SuperblockAnswer:
    """Show a device's superblock."""
    where = f"{device.info.name} superblock"
    raw = device.read_superblock() or b""
    problem = ""
    spaces: list[NamespaceAnswer] = []
    try:
        found = fmt.decode_superblock(raw, where)
    except DataError as error:
        problem = str(error)
    else:
        spaces = [
            NamespaceAnswer(f"{space.namespace_id:#018x}", space.name, space.layout_json)
            for space in found.namespaces
        ]
    page = raw[: fmt.HEADER_BYTES]
    header = _structure(where, problem, page, fmt.SUPERBLOCK, fmt.SUPERBLOCK_FIELDS)
    return SuperblockAnswer(header, spaces)


def list_segments(device: Device) -> list[SegmentAnswer]:
    """Show every segment of a device in one line."""
    found = []
    for name in device.segments():
        with _attached(device, name) as handle:
            state, entries, problem = "damaged", 0, ""
            try:
                loaded = load_segment(device, handle)
                state = "sealed" if loaded.is_sealed else "open"
                entries = len(loaded.entries)
            except DataError as error:
                problem = str(error)
        kind = "file" if name.is_file else "log"
        found.append(
            SegmentAnswer(
                name.slot, name.generation, kind, name.payload_bytes, state, entries, problem
            )
        )
    return found


def show_segment(device: Device, name: SegmentName) -> list[StructureAnswer]:
    """Show the open and the seal header of a segment."""
    where = f"{device.info.name} segment {name.slot} generation {name.generation}"
    with _attached(device, name) as handle:
        tail = device.read_tail(handle, fmt.HEADERS_BYTES)
    shown = []
    for kind, position in (
        (fmt.HeaderKind.OPEN, fmt.OPEN_POSITION),
        (fmt.HeaderKind.SEAL, fmt.SEAL_POSITION),
    ):
        start = len(tail) - position
        page = tail[start : start + fmt.HEADER_BYTES] if start >= 0 else b""
        place, problem = f"{where} {kind.name.lower()} header", ""
        try:
            fmt.decode_header(page, kind, place)
        except DataError as error:
            problem = "not written" if page and not any(page) else str(error)
        shown.append(_structure(place, problem, page, fmt.HEADER, fmt.HEADER_FIELDS))
    return shown


def show_summary(device: Device, name: SegmentName) -> list[EntryAnswer]:
    """Show the valid entries of a segment.

    Raises:
        CorruptionError: Its open header does not hold.
    """
    with _attached(device, name) as handle:
        loaded = load_segment(device, handle)
    return [
        EntryAnswer(
            index=int(index),
            key=entry["key"].tobytes().hex(),
            parent=entry["parent"].tobytes().hex(),
            offset=int(entry["offset"]),
            stored_bytes=int(entry["stored_bytes"]),
            tokens=int(entry["token_count"]),
            flags=int(entry["flags"]),
        )
        for index, entry in zip(loaded.indices, loaded.entries, strict=True)
    ]


def show_block(device: Device, name: SegmentName, entry_index: int) -> BlockAnswer:
    """Show one entry and verify its payload, from the medium.

    Raises:
        NotFoundError: The segment has no room for so many entries.
    """
    where = f"{device.info.name} segment {name.slot} generation {name.generation}"
    with _attached(device, name) as handle:
        position = fmt.entry_position(entry_index)
        tail = device.read_tail(handle, position)
        if len(tail) < position:
            raise NotFoundError(f"no such entry: {where}: entry {entry_index}")
        raw = tail[: fmt.ENTRY_BYTES]
        seed = fmt.entry_seed(device.info.uuid, name.slot, name.generation)
        expected = _native.xxh3_64(raw[:-8], seed)
        found = int.from_bytes(raw[-8:], "little")
        place, problem = f"{where} entry {entry_index}", ""
        if not any(raw):
            problem = "never written"
        elif expected != found:
            problem = f"checksum mismatch: expected {expected:#018x}, found {found:#018x}"
        structure = _structure(place, problem, raw, fmt.ENTRY, fmt.ENTRY_FIELDS)
        payload_problem, payload = "entry does not hold", b""
        if not problem:
            payload_problem, payload = _payload(device, handle, raw)
    return BlockAnswer(
        device.info.name, name.slot, name.generation, structure, payload_problem, payload
    )


def _payload(device: Device, handle: Segment, raw: bytes) -> tuple[str, bytes]:
    """Return what is wrong with an entry's payload, and its bytes."""
    record = np.frombuffer(raw, fmt.ENTRY)[0]
    offset, nbytes = int(record["offset"]), int(record["stored_bytes"])
    if offset + nbytes > handle.nbytes:
        return f"payload ends beyond the segment: {offset + nbytes:#x}", b""
    try:
        payload = device.read(handle, offset, nbytes, uncached=True)
    except OSError as error:
        return f"payload cannot be read: {error.strerror}", b""
    expected, found = record["payload_xxh3"].tobytes(), _native.xxh3_128(payload)
    if expected != found:
        return f"checksum mismatch: expected {expected.hex()}, found {found.hex()}", payload
    return "", payload


def find_block(device: Device, key: bytes) -> Iterator[tuple[SegmentName, int]]:
    """Yield segment and entry of every copy of a block on a device. Cost: reads all summaries."""
    for name in device.segments():
        with _attached(device, name) as handle:
            try:
                loaded = load_segment(device, handle)
            except DataError:
                continue
        matches = (loaded.entries["key"] == np.frombuffer(key, np.uint8)).all(axis=1)
        for index in loaded.indices[matches]:
            yield name, int(index)


def find_segment(device: Device, text: str) -> SegmentName:
    """Return the segment that somebody means by 'SLOT', 'SLOT:GENERATION' or its file's name.

    Raises:
        UsageError: Not understood.
        NotFoundError: There is none.
    """
    decimal, named = _SEGMENT.match(text), _SEGMENT_FILE.match(text)
    if named:
        slot, generation = int(named[1], 16), int(named[2], 16)
    elif decimal:
        slot, generation = int(decimal[1]), int(decimal[2]) if decimal[2] else -1
    else:
        raise UsageError(f"segment not understood: {text!r}: expected SLOT or SLOT:GENERATION")
    for name in device.segments():
        if name.slot == slot and generation in (-1, name.generation):
            return name
    raise NotFoundError(f"no such segment: {device.info.name} segment {text}")


def parse_key(text: str) -> bytes | None:
    """Return a block key given in hexadecimal, or None if the text is none."""
    try:
        key = bytes.fromhex(text)
    except ValueError:
        return None
    return key if len(key) == KEY_BYTES else None


@contextlib.contextmanager
def _attached(device: Device, name: SegmentName) -> Iterator[Segment]:
    """Hold a segment open inside a block."""
    handle = device.attach(name)
    try:
        yield handle
    finally:
        device.release(handle)


def _structure(
    where: str, problem: str, raw: bytes, dtype: np.dtype[np.void], meanings: dict[str, str]
) -> StructureAnswer:
    """Take a structure apart, field by field; bytes that are missing count as zeros."""
    record = np.frombuffer(raw.ljust(dtype.itemsize, b"\0")[: dtype.itemsize], dtype)[0]
    fields = []
    assert dtype.names is not None
    assert dtype.fields is not None
    for name in dtype.names:
        kind, offset = dtype.fields[name][:2]
        value: Any = record[name]
        if name.startswith("reserved"):
            shown: int | str = "zero" if not any(value.tobytes()) else "not zero"
        elif kind.kind == "S":
            shown = bytes(value).decode("ascii", "backslashreplace")
        elif kind.subdtype is not None:
            shown = value.tobytes().hex()
        else:
            shown = int(value)
        fields.append(FieldAnswer(name, offset, kind.itemsize, shown, meanings.get(name, "")))
    return StructureAnswer(where, problem, fields, raw)
