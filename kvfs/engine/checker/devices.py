"""Checking devices against a catalog, all of them open already.

Layer: L3.

- Takes no lock and keeps no handle; whoever calls makes sure that nobody writes meanwhile.
- Cost without `data`: reads superblocks and summaries, about 0.1 ms per segment plus the catalog's
  own check.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from kvfs.config import VOLATILE_SCHEMES, scheme_of
from kvfs.devices.base import Device, Segment, SegmentName
from kvfs.devices.directory import DirectoryDevice
from kvfs.devices.filesystem import (
    RAW,
    SEGMENT_FILE,
    SEGMENTS,
    STAGING,
    FileSystem,
    is_own_name,
)
from kvfs.devices.open import location_of
from kvfs.engine import format as fmt
from kvfs.engine.catalog import Catalog
from kvfs.engine.catalog_schema import DeviceRow, Node, NodeState
from kvfs.engine.checker.report import Action, ActionKind, CheckReport, Severity
from kvfs.engine.checker.segments import (
    CheckedSegment,
    Expected,
    KnownNamespace,
    Progress,
    check_payloads,
    check_segment,
)
from kvfs.engine.format import Superblock
from kvfs.errors import CorruptionError, FormatVersionError
from kvfs.keys import KEY_BYTES, KeyArray
from kvfs.units import format_bytes

_FILE_TAG: Final = b"kvfsfile"
_IGNORED: Final = frozenset(("lost+found",))
_REPAIR: Final = "run 'kvfs-admin check --repair'"


@dataclass(slots=True)
class _Session:
    """One run of the check."""

    report: CheckReport
    pool_uuid: bytes
    namespaces: dict[int, KnownNamespace]
    rows: dict[int, DeviceRow]
    has_memory: bool
    progress: Progress | None = None
    bytes_total: int = 0
    bytes_done: int = 0
    segments: list[tuple[CheckedSegment, Expected]] = field(default_factory=list)
    raw: dict[int, Device] = field(default_factory=dict)  # raw files by number

    def advance(self, nbytes: int) -> None:
        """Count payload bytes read."""
        self.bytes_done += nbytes
        if self.progress is not None:
            self.progress(self.bytes_done, self.bytes_total)


def check_devices(
    devices: Sequence[Device],
    catalog: Catalog,
    *,
    data: bool = False,
    repair: bool = False,
    progress: Progress | None = None,
) -> CheckReport:
    """Check every invariant of a pool whose parts are open.

    Args:
        devices: Those that are there; where one of the catalog is missing, or cannot be
            judged, names are left alone: what they need may lie there.
        catalog: Names.
        data: Read all payloads too and compare their checksums, from the medium.
        repair: Apply the plan, then check again (without `data`); see `CheckReport.remaining`.
        progress: Called with (bytes done, bytes in all) while payloads are read.

    Returns:
        What was found. Nothing was modified unless `repair` is set.
    """  # fmt: skip
    from kvfs.engine.checker.repair import apply_plan

    report = _check(devices, catalog, data=data, progress=progress)
    if repair:
        apply_plan(report, devices, catalog)
    return report


def _check(
    devices: Sequence[Device], catalog: Catalog, *, data: bool, progress: Progress | None
) -> CheckReport:
    rows = catalog.devices()
    session = _Session(
        CheckReport(),
        catalog.pool_uuid.bytes,
        {
            info.namespace_id: KnownNamespace(info.name, info.fingerprint, info.layout.stride)
            for info in catalog.namespaces()
        },
        {row.index: row for row in rows},
        has_memory=any(scheme_of(row.url) in VOLATILE_SCHEMES for row in rows),
        progress=progress,
    )
    report = session.report
    for problem in catalog.check():
        report.add(
            Severity.ERROR, "catalog", "catalog", str(problem),
            "remove the context it names; or 'kvfs-admin check --repair --allow-name-loss' puts an "
            "empty catalog in its place",
        )  # fmt: skip
    unjudged = {row.index: row.name for row in rows if scheme_of(row.url) not in VOLATILE_SCHEMES}
    for device in devices:
        report.counts.devices += 1
        expected = _check_superblock(device, catalog, session)
        if expected is not None:
            report.was_closed = report.was_closed and expected.was_closed
            _check_device(device, expected, session)
            unjudged.pop(device.info.index, None)
    if data:
        _check_data(session)
    if unjudged:
        names = ", ".join(unjudged.values())
        report.add(
            Severity.WARNING, "names-not-checked", "catalog",
            f"whether files are whole cannot be told without {names}",
            "nothing is lost by that: bring it back, and check again",
        )  # fmt: skip
    else:
        _check_names(catalog, session)
    return report


def _check_superblock(device: Device, catalog: Catalog, session: _Session) -> Expected | None:
    """Check the superblock; None if the device's segments cannot be judged."""
    report, where = session.report, f"{device.info.name} superblock"
    rebuild = Action(ActionKind.REBUILD_SUPERBLOCK, where, device.info.index)
    expected = Expected(session.pool_uuid, session.namespaces)
    try:
        raw = device.read_superblock()
        if raw is None:
            has_segments = bool(device.segments())
            report.add(
                Severity.ERROR, "superblock-missing", where, "there is none",
                "mount the device's filesystem" if not has_segments else _REPAIR,
                rebuild if has_segments else None,
            )  # fmt: skip
            return expected if has_segments else None
        superblock = fmt.decode_superblock(raw, where)
    except FormatVersionError as error:
        report.add(
            Severity.ERROR, "format-version", where, str(error), "use the release that wrote it"
        )
        return None
    except CorruptionError as error:
        report.add(Severity.ERROR, "superblock-damaged", where, str(error), _REPAIR, rebuild)
        return expected
    found = (superblock.pool_uuid.bytes, superblock.device_uuid)
    if found != (session.pool_uuid, device.info.uuid):
        report.add(
            Severity.ERROR, "superblock-foreign", where,
            f"expected pool {session.pool_uuid.hex()[:8]} device {str(device.info.uuid)[:8]}, "
            f"found pool {found[0].hex()[:8]} device {str(found[1])[:8]}",
            "the device belongs to another pool; give this pool its own back",
        )  # fmt: skip
        return None
    _compare_geometry(device, superblock, report)
    expected.generation_limit = superblock.generation_limit
    expected.was_closed = superblock.owner_pid == 0
    return expected


def _compare_geometry(device: Device, superblock: Superblock, report: CheckReport) -> None:
    info, where = device.info, f"{device.info.name} superblock"
    pairs = (
        ("device_index", info.index, superblock.device_index),
        ("tier", info.tier, superblock.tier),
        ("segment_bytes", info.segment_bytes, superblock.segment_bytes),
        ("capacity_bytes", info.capacity_bytes, superblock.capacity_bytes),
    )
    wrong = [f"{name} {given}, found {found}" for name, given, found in pairs if given != found]
    if wrong:
        report.add(
            Severity.WARNING, "superblock-mismatch", where, f"expected {'; '.join(wrong)}",
            f"superblock and catalog disagree; {_REPAIR} to follow the catalog",
            Action(ActionKind.REBUILD_SUPERBLOCK, where, info.index),
        )  # fmt: skip
    place = location_of(device)
    if superblock.location and place and superblock.location != place:
        report.add(
            Severity.WARNING, "device-moved", where, "the device was copied or moved",
            "open with --allow-moved if the original is gone",
        )  # fmt: skip


def _check_device(device: Device, expected: Expected, session: _Session) -> None:
    """Check the segments of a device, its space and its leftovers."""
    report = session.report
    by_slot: dict[int, CheckedSegment] = {}
    for name in device.segments():
        handle = _attach(device, name, report)
        if handle is None:
            continue
        try:
            checked = check_segment(device, name, handle, expected, report)
        finally:
            device.release(handle)
        if checked is None or not len(checked.entries):
            continue
        session.segments.append((checked, expected))
        other = by_slot.setdefault(name.slot, checked)
        if other is not checked:
            older = min(other, checked, key=lambda segment: segment.name.generation)
            older.is_doomed = True
            older.good[:] = False
            # A power cut may bring the name of a segment back that was freed before.
            report.add(
                Severity.ERROR if expected.was_closed else Severity.NOTE,
                "segment-slot-twice", older.where,
                f"generations {other.name.generation} and {checked.name.generation} share a slot",
                f"the older one is freed by the next open; or {_REPAIR}",
                older.action(ActionKind.FREE_SEGMENT),
            )  # fmt: skip
    session.raw.update((number, device) for number, _ in device.raw_files())
    used, capacity = device.used_bytes, device.info.capacity_bytes
    if used > capacity:
        # A crash may bring back segments freed just before it, beside those made in their place.
        report.add(
            Severity.WARNING if expected.was_closed else Severity.NOTE,
            "device-over-capacity", device.info.name,
            f"expected at most {format_bytes(capacity)}, found {format_bytes(used)}",
            "open the pool and write: eviction brings it below",
        )  # fmt: skip
    _check_tree(device, report)


def _check_data(session: _Session) -> None:
    """Read all payloads. One segment is open at a time: a pool has more than a process may open."""
    session.bytes_total = sum(
        int(checked.entries["stored_bytes"][checked.good].sum()) for checked, _ in session.segments
    )
    for checked, expected in session.segments:
        handle = _attach(checked.device, checked.name, session.report)
        if handle is None:
            continue
        try:
            check_payloads(checked, handle, expected, session.report, session.advance)
        finally:
            checked.device.release(handle)


def _attach(device: Device, name: SegmentName, report: CheckReport) -> Segment | None:
    try:
        return device.attach(name)
    except OSError as error:
        report.add(
            Severity.ERROR, "segment-unreadable",
            f"{device.info.name} segment {name.slot} generation {name.generation}",
            f"cannot be opened: {error.strerror}", "check permissions and medium",
        )  # fmt: skip
        return None


def _check_tree(device: Device, report: CheckReport) -> None:
    """Look for what a crash left behind and for files that are not kvfs's."""
    files = _files_of(device)
    if files is None:
        return
    name = device.info.name
    staging = [path for path, _ in files.list(STAGING) if is_own_name(f"{STAGING}/{path}")]
    present = {path for path, _ in files.list(SEGMENTS)}
    orphans = sorted(
        path for path in present
        if path.endswith(".sum") and f"{path[:-4]}.file" not in present
    )  # fmt: skip
    reap = Action(ActionKind.REAP_STAGING, f"{name} staging", device.info.index)
    if staging or orphans:
        report.add(
            Severity.NOTE, "staging-leftover", f"{name} {(staging + orphans)[0]}",
            f"{len(staging)} staging files and {len(orphans)} sidecars without a payload",
            "the next open deletes them", reap,
        )  # fmt: skip
    for path in _unknown(files):
        report.add(
            Severity.WARNING, "unknown-file", f"{name} {path}", "kvfs did not make this file",
            "move it elsewhere; kvfs never touches it",
        )  # fmt: skip
    for path in present:
        match = SEGMENT_FILE.match(path)
        if match and int(match[1], 16) >= device.info.slot_count:
            report.add(
                Severity.WARNING, "segment-out-of-range", f"{name} {path}",
                f"expected a slot below {device.info.slot_count}", "move it elsewhere",
            )  # fmt: skip


def _unknown(files: FileSystem) -> Iterator[str]:
    for folder in (".", SEGMENTS, STAGING, RAW):
        try:
            names = files.list(folder)
        except FileNotFoundError:
            if folder != RAW:
                raise
            continue  # made before there were raw files
        for name, _ in names:
            path = name if folder == "." else f"{folder}/{name}"
            if not is_own_name(path) and name not in _IGNORED:
                yield path


def _files_of(device: Device) -> FileSystem | None:
    """Return the files below a directory device, through wrappers, or None for other kinds."""
    while not isinstance(device, DirectoryDevice):
        inner = getattr(device, "inner", None)
        if not isinstance(inner, Device):
            return None
        device = inner
    return device._files


def _check_names(catalog: Catalog, session: _Session) -> None:
    """Files are whole or absent, and file segments have a name."""
    report = session.report
    stored = _file_blocks(segment for segment, _ in session.segments)
    versions: dict[int, int] = {}
    for node, keys in catalog.iter_file_contexts():
        if node.state is not NodeState.ACTIVE:
            continue
        report.counts.files += 1
        problem = _file_problem(node, keys, stored, session.namespaces)
        if problem is None:
            versions[node.node_id] = node.version
            continue
        _report_broken(catalog, node.node_id, problem, session)
    _check_raw(catalog, session)
    for segment, _ in session.segments:
        if segment.name.is_file and not segment.is_doomed:
            _check_named(segment, versions, report)


def _report_broken(catalog: Catalog, node_id: int, problem: str, session: _Session) -> None:
    report, where = session.report, f"file {catalog.path_of(node_id)}"
    # A block may have been evicted but for a copy in memory, which ended with the last owner.
    is_expected = session.has_memory or not report.was_closed
    report.add(
        Severity.NOTE if is_expected else Severity.WARNING, "file-not-whole", where, problem,
        "the next open removes its name",
        Action(ActionKind.REMOVE_NAMES, where, node_ids=(node_id,)),
    )  # fmt: skip


def _check_raw(catalog: Catalog, session: _Session) -> None:
    """Raw files and their names belong together; what is in them nobody can judge."""
    named = set(catalog.raw_nodes())
    session.report.counts.files += len(named)
    for node_id in sorted(named - session.raw.keys()):
        _report_broken(catalog, node_id, "its raw file is not on any device", session)
    for number in sorted(session.raw.keys() - named):
        info = session.raw[number].info
        where = f"{info.name} raw file {number:016x}"
        session.report.add(
            Severity.NOTE, "raw-file-unnamed", where, "no name reaches it",
            "the next open deletes it",
            Action(ActionKind.FREE_RAW, where, info.index, node_ids=(number,)),
        )  # fmt: skip


def _file_blocks(segments: Iterable[CheckedSegment]) -> dict[bytes, int]:
    """Return the stored bytes of every good block whose key belongs to a file."""
    stored: dict[bytes, int] = {}
    for segment in segments:
        keys = segment.entries["key"]
        is_file = (keys[:, 24:] == np.frombuffer(_FILE_TAG, np.uint8)).all(axis=1) & segment.good
        if not is_file.any():
            continue
        raw = np.ascontiguousarray(keys[is_file]).tobytes()
        for i, length in enumerate(segment.entries["stored_bytes"][is_file]):
            stored[raw[i * KEY_BYTES : (i + 1) * KEY_BYTES]] = int(length)
    return stored


def _file_problem(
    node: Node, keys: KeyArray, stored: dict[bytes, int], namespaces: dict[int, KnownNamespace]
) -> str | None:
    """Say what is wrong with a file's blocks."""
    namespace = namespaces.get(node.namespace_id)
    if namespace is None:
        return f"its namespace {node.namespace_id:#018x} is not in the catalog"
    for i, key in enumerate(keys):
        length = stored.get(key.tobytes())
        wanted = namespace.stride if i < len(keys) - 1 else node.tail_bytes
        if length is None:
            return f"block {i} of {len(keys)} is not on any device"
        if length != wanted:
            return f"block {i} of {len(keys)}: expected {wanted} bytes, found {length}"
    return None


def _check_named(segment: CheckedSegment, versions: dict[int, int], report: CheckReport) -> None:
    keys = np.ascontiguousarray(segment.entries["key"])
    contexts = set(keys.view("<u8").reshape(-1, 4)[:, 1].tolist())
    numbers = set(keys.view("<u4")[:, 5].tolist())
    if len(contexts) == len(numbers) == 1 and versions.get(contexts.pop()) == numbers.pop():
        return
    segment.is_doomed = True
    report.add(
        Severity.NOTE, "file-segment-unnamed", segment.where, "no name reaches it",
        "the next open frees it", segment.action(ActionKind.FREE_SEGMENT),
    )  # fmt: skip
