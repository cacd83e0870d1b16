"""Checking one segment: headers, entries, and on request payloads.

Layer: L3.

- What this module takes for valid is what `load_segment` takes for valid; it only looks closer at
  the rest.
- Slots of an unsealed summary that hold neither zeros nor a valid entry were damaged: entries do
  not straddle sectors, so a torn write cannot make them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from kvfs import _native
from kvfs.devices.base import Device, Segment, SegmentName
from kvfs.engine import format as fmt
from kvfs.engine.checker.report import Action, ActionKind, CheckReport, Severity
from kvfs.engine.format import ENTRY_BYTES, HEADERS_BYTES, EntryArray, SegmentHeader
from kvfs.engine.log import LoadedSegment, is_unborn, load_segment, segment_where
from kvfs.engine.segment_table import page_round
from kvfs.errors import CorruptionError, FormatVersionError
from kvfs.units import PAGE, align_up

WINDOW_BYTES: Final = 8 << 20  # payloads are read in runs of this size; a larger block alone
_ENTRIES_PER_PAGE: Final = PAGE // ENTRY_BYTES
_SHOWN: Final = 4
_FREED_LATER: Final = "the next open frees it"
_REPAIR: Final = "run 'kvfs-admin check --repair'"
Mask = npt.NDArray[np.bool_]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class KnownNamespace:
    """What segments of a namespace are compared with. `stride` in bytes."""

    name: str
    digest: bytes
    stride: int


@dataclass(slots=True, eq=False)
class Expected:
    """What a device's segments must agree with.

    Attributes:
        pool_uuid: 16 bytes.
        generation_limit: Generations below it may have been used; 0 when the superblock cannot be
            read.
        was_closed: The last owner closed the device, so that leftovers of a crash are not expected.
    """

    pool_uuid: bytes
    namespaces: dict[int, KnownNamespace]
    generation_limit: int = 0
    was_closed: bool = True


@dataclass(slots=True, eq=False)
class CheckedSegment:
    """A segment that could be read.

    Attributes:
        good: Which of `entries` hold.
        is_doomed: The plan frees the segment.
    """

    device: Device
    name: SegmentName
    header: SegmentHeader
    is_sealed: bool
    indices: npt.NDArray[np.uint32]
    entries: EntryArray
    good: Mask
    is_doomed: bool = False

    @property
    def where(self) -> str:
        """Name the segment for messages."""
        return segment_where(self.device, self.name)

    def action(self, kind: ActionKind, entries: tuple[int, ...] = ()) -> Action:
        """Return a repair of this segment."""
        return action_on(self.device, self.name, kind, entries)


def action_on(
    device: Device, name: SegmentName, kind: ActionKind, entries: tuple[int, ...] = ()
) -> Action:
    """Return a repair of a segment."""
    where = segment_where(device, name)
    return Action(kind, where, device.info.index, name.slot, name.generation, entries)


def check_segment(
    device: Device, name: SegmentName, handle: Segment, expected: Expected, report: CheckReport
) -> CheckedSegment | None:
    """Check headers and entries of one segment; None if nothing in it can be used."""
    where = segment_where(device, name)
    try:
        loaded = load_segment(device, handle)
    except FormatVersionError as error:
        report.add(
            Severity.ERROR, "format-version", where, str(error), "use the release that wrote it"
        )
        return None
    except CorruptionError as error:
        _report_headless(device, name, handle, str(error), report)
        return None
    except OSError as error:
        report.add(
            Severity.ERROR, "segment-unreadable", where, f"cannot be read: {error.strerror}",
            f"check the medium, then {_REPAIR}",
            action_on(device, name, ActionKind.FREE_SEGMENT),
        )  # fmt: skip
        return None
    report.counts.segments += 1
    report.counts.sealed_segments += int(loaded.is_sealed)
    if not _check_header(device, name, loaded, expected, report):
        return None
    checked = CheckedSegment(
        device, name, loaded.header, loaded.is_sealed, loaded.indices, loaded.entries,
        np.ones(len(loaded.entries), np.bool_),
    )  # fmt: skip
    if not loaded.is_sealed:
        _check_unsealed(checked, handle, loaded, expected, report)
    namespace = expected.namespaces[loaded.header.namespace_id]
    _check_entries(checked, loaded, namespace, report)
    if checked.is_doomed:
        checked.good[:] = False
    return checked


def _report_headless(
    device: Device, name: SegmentName, handle: Segment, problem: str, report: CheckReport
) -> None:
    """Tell a segment that a crash left before its first payload from a damaged one."""
    where = segment_where(device, name)
    action = action_on(device, name, ActionKind.FREE_SEGMENT)
    beside = device.read_tail(handle, HEADERS_BYTES + PAGE)[: -fmt.HEADER_BYTES]
    is_cut = not name.is_file and name.payload_bytes not in (0, device.info.segment_bytes)
    if is_unborn(device, handle) and not any(beside) and not is_cut:
        report.add(
            Severity.NOTE, "segment-never-started", where, "no header was persisted",
            _FREED_LATER, action,
        )  # fmt: skip
        return
    report.add(
        Severity.ERROR, "segment-header-damaged", where, problem,
        f"nothing in it is served; {_REPAIR} to free it", action,
    )  # fmt: skip


def _check_header(
    device: Device,
    name: SegmentName,
    loaded: LoadedSegment,
    expected: Expected,
    report: CheckReport,
) -> bool:
    """Compare the open header with the device, the catalog and the file; say whether to go on."""
    where = segment_where(device, name)
    header = loaded.header
    free = action_on(device, name, ActionKind.FREE_SEGMENT)
    kind = fmt.SegmentKind.FILE if name.is_file else fmt.SegmentKind.LOG
    problems = (
        (header.pool_uuid.bytes != expected.pool_uuid or header.device_uuid != device.info.uuid,
         "segment-foreign", "it belongs to another pool or device"),
        (header.segment_kind is not kind, "segment-foreign",
         f"expected a {kind.name.lower()} segment, found kind {int(header.segment_kind)}"),
        (header.segment_bytes != name.payload_bytes, "segment-truncated",
         f"expected {header.segment_bytes} bytes, found {name.payload_bytes}"),
    )  # fmt: skip
    for is_wrong, code, message in problems:
        if is_wrong:
            remedy = f"nothing in it is served; {_REPAIR} to free it"
            report.add(Severity.ERROR, code, where, message, remedy, free)
            return False
    if 0 < expected.generation_limit <= header.generation:
        report.add(
            Severity.ERROR, "generation-beyond-limit", where,
            f"expected a generation below {expected.generation_limit}, found {header.generation}",
            f"the superblock is older than the segment; {_REPAIR}",
            Action(ActionKind.REBUILD_SUPERBLOCK, f"{device.info.name} superblock",
                   device.info.index),
        )  # fmt: skip
    namespace = expected.namespaces.get(header.namespace_id)
    if namespace is None:
        report.add(
            Severity.NOTE, "segment-namespace-unknown", where,
            f"namespace {header.namespace_id:#018x} is not in the catalog", _FREED_LATER, free,
        )  # fmt: skip
        return False
    if header.layout_digest != namespace.digest:
        report.add(
            Severity.ERROR, "segment-layout-mismatch", where,
            f"expected layout {namespace.digest.hex()} of {namespace.name}, "
            f"found {header.layout_digest.hex()}",
            f"nothing in it is served; {_REPAIR} to free it", free,
        )  # fmt: skip
        return False
    return True


def _check_unsealed(
    checked: CheckedSegment,
    handle: Segment,
    loaded: LoadedSegment,
    expected: Expected,
    report: CheckReport,
) -> None:
    """Look at what a seal header would have vouched for."""
    device, where = checked.device, checked.where
    summary_pages = loaded.entry_count // _ENTRIES_PER_PAGE + 1
    tail = device.read_tail(handle, HEADERS_BYTES + summary_pages * PAGE)
    if checked.name.is_file:
        # A sidecar is written in one piece before its payload has a name: it is whole or damaged.
        checked.is_doomed = True
        report.add(
            Severity.ERROR, "sidecar-damaged", where, "the sidecar's seal header does not hold",
            f"its blocks are verified before they are served; {_REPAIR} to free it",
            checked.action(ActionKind.FREE_SEGMENT),
        )  # fmt: skip
        return
    if any(tail[-fmt.SEAL_POSITION : -fmt.OPEN_POSITION]):
        report.add(
            Severity.WARNING if expected.was_closed else Severity.NOTE, "seal-damaged", where,
            "the seal header does not hold",
            f"its blocks are verified before they are served; {_REPAIR} to forget the seal",
            checked.action(ActionKind.FORGET_SEAL),
        )  # fmt: skip
    slots = np.frombuffer(tail[:-HEADERS_BYTES], np.uint64)
    slots = slots[len(slots) % (ENTRY_BYTES // 8) :].reshape(-1, ENTRY_BYTES // 8)[::-1]
    is_used: Mask = (slots != 0).any(axis=1)
    is_used[checked.indices[checked.indices < len(is_used)]] = False
    damaged = [int(index) for index in np.flatnonzero(is_used)]
    if damaged:
        # A power cut tears entries that were not persisted yet; the next opening zeroes them.
        report.add(
            Severity.ERROR if expected.was_closed else Severity.NOTE,
            "entry-damaged", f"{where} {_places(damaged)}",
            "the checksum of a summary entry does not hold",
            f"its block is lost; {_REPAIR}",
            checked.action(ActionKind.DROP_BLOCKS, tuple(damaged)),
        )  # fmt: skip


def _check_entries(
    checked: CheckedSegment, loaded: LoadedSegment, namespace: KnownNamespace, report: CheckReport
) -> None:
    """Check the bounds of valid entries and that no two payloads overlap."""
    entries = checked.entries
    if not len(entries):
        return
    offsets, stored = entries["offset"], entries["stored_bytes"]
    limit = checked.name.payload_bytes
    if not checked.name.is_file:
        limit = max(0, limit - HEADERS_BYTES - align_up(loaded.entry_count * ENTRY_BYTES, PAGE))
    owners = np.ascontiguousarray(entries["key"]).view("<u8").reshape(-1, 4)[:, 0]
    in_bounds = (stored <= limit) & (offsets <= limit - np.minimum(stored, limit))
    tests = (
        (~in_bounds, "entry-out-of-bounds", f"its payload must end at {limit:#x}"),
        (offsets % PAGE != 0, "entry-misaligned", "its payload must start at a multiple of 4096"),
        ((stored == 0) | (stored > namespace.stride) | (entries["logical_bytes"] != stored),
         "entry-size", f"its payload must have 1 to {namespace.stride} bytes"),
        (entries["codec"] != fmt.Codec.RAW, "entry-codec", "its codec must be 0"),
        (owners != checked.header.namespace_id, "entry-foreign", "its key is of another namespace"),
        (_overlaps(offsets, stored, in_bounds), "entry-overlap", "its payload overlaps another's"),
    )  # fmt: skip
    for mask, code, message in tests:
        if mask.any():
            drop_blocks(checked, mask, report, Severity.ERROR, code, message)
    report.counts.blocks += len(entries)
    report.counts.block_bytes += int(stored[in_bounds].sum())
    if checked.name.is_file and not checked.is_doomed:
        _check_file_extent(checked, report)


def _check_file_extent(checked: CheckedSegment, report: CheckReport) -> None:
    """A file segment holds its blocks one after the other and not one byte more."""
    lengths = checked.entries["stored_bytes"]
    starts = np.cumsum(lengths) - lengths
    total = int(lengths.sum())
    if total != checked.name.payload_bytes or (checked.entries["offset"] != starts).any():
        checked.is_doomed = True
        report.add(
            Severity.ERROR, "file-extent", checked.where,
            f"expected blocks of {checked.name.payload_bytes} bytes in a row, found {total}",
            f"{_REPAIR} to free it", checked.action(ActionKind.FREE_SEGMENT),
        )  # fmt: skip


def _overlaps(
    offsets: npt.NDArray[np.uint64], stored: npt.NDArray[np.uint64], in_bounds: Mask
) -> Mask:
    """Return which payloads start before an earlier one (by offset) has ended."""
    found = np.zeros(len(offsets), np.bool_)
    chosen = np.flatnonzero(in_bounds)
    order = chosen[np.argsort(offsets[chosen], kind="stable")]
    if len(order) > 1:
        starts = offsets[order].astype(np.int64)
        ends = np.maximum.accumulate(starts + page_round(stored[order]))
        found[order[1:]] = starts[1:] < ends[:-1]
    return found


def drop_blocks(
    checked: CheckedSegment,
    mask: Mask,
    report: CheckReport,
    severity: Severity,
    code: str,
    message: str,
) -> None:
    """Report entries and plan to drop them: one by one in a log segment, all in a file segment."""
    checked.good[mask] = False
    entries = [int(index) for index in checked.indices[mask]]
    action: Action | None = None
    if not checked.name.is_file:
        action = checked.action(ActionKind.DROP_BLOCKS, tuple(entries))
    elif not checked.is_doomed:
        checked.is_doomed = True
        checked.good[:] = False
        action = checked.action(ActionKind.FREE_SEGMENT)
    where = f"{checked.where} {_places(entries)}"
    report.add(severity, code, where, message, f"it is never served; {_REPAIR}", action)


def _places(entries: list[int]) -> str:
    shown = ", ".join(str(index) for index in entries[:_SHOWN])
    more = f" and {len(entries) - _SHOWN} more" if len(entries) > _SHOWN else ""
    return f"{'entry' if len(entries) == 1 else 'entries'} {shown}{more}"


def check_payloads(
    checked: CheckedSegment,
    handle: Segment,
    expected: Expected,
    report: CheckReport,
    advance: Callable[[int], None],
) -> None:
    """Read every payload from the medium and compare its checksum.

    Cost: at most 8 MiB, or one block, of memory.
    """
    chosen = np.flatnonzero(checked.good)
    chosen = chosen[np.argsort(checked.entries["offset"][chosen], kind="stable")]
    corrupt = np.zeros(len(checked.entries), np.bool_)
    unreadable = np.zeros(len(checked.entries), np.bool_)
    for run in _runs(checked.entries, chosen):
        start = int(checked.entries["offset"][run[0]])
        ends = checked.entries["offset"][run] + checked.entries["stored_bytes"][run]
        nbytes = int(ends.max()) - start
        try:
            raw = checked.device.read(handle, start, nbytes, uncached=True)
        except OSError:
            if len(run) == 1:
                unreadable[run] = True
            else:
                _verify_singly(checked, handle, run, corrupt, unreadable)
            advance(nbytes)
            continue
        corrupt[run] = ~_matching(checked.entries[run], raw, start)
        advance(nbytes)
    report.counts.verified_blocks += len(chosen)
    report.counts.verified_bytes += int(checked.entries["stored_bytes"][chosen].sum())
    if unreadable.any():
        drop_blocks(checked, unreadable, report, Severity.ERROR, "payload-unreadable",
                    "the medium does not give its payload back")  # fmt: skip
    if corrupt.any():
        severity, message = Severity.ERROR, "the payload's checksum does not hold"
        if not checked.is_sealed:
            severity = Severity.WARNING if expected.was_closed else Severity.NOTE
            message = "the payload never reached the medium, or has been damaged since"
        drop_blocks(checked, corrupt, report, severity, "payload-corrupt", message)


def _runs(entries: EntryArray, order: npt.NDArray[np.intp]) -> list[npt.NDArray[np.intp]]:
    """Cut payloads, ordered by offset, into runs that span at most a window."""
    runs: list[npt.NDArray[np.intp]] = []
    first = 0
    for i in range(1, len(order) + 1):
        if i < len(order):
            start = int(entries["offset"][order[first]])
            end = int(entries["offset"][order[i]] + entries["stored_bytes"][order[i]])
            if end - start <= WINDOW_BYTES:
                continue
        runs.append(order[first:i])
        first = i
    return runs


def _verify_singly(
    checked: CheckedSegment,
    handle: Segment,
    run: npt.NDArray[np.intp],
    corrupt: Mask,
    unreadable: Mask,
) -> None:
    """Find which payloads of a run cannot be read."""
    for i in run:
        entry = checked.entries[i : i + 1]
        start = int(entry["offset"][0])
        try:
            raw = checked.device.read(handle, start, int(entry["stored_bytes"][0]), uncached=True)
        except OSError:
            unreadable[i] = True
        else:
            corrupt[i] = not _matching(entry, raw, start)[0]


def _matching(entries: EntryArray, raw: bytes, start: int) -> Mask:
    """Return which payloads, lying in `raw` from segment offset `start`, hold their checksum."""
    good = np.zeros(len(entries), np.bool_)
    lows = entries["offset"].astype(np.int64) - start
    lengths = entries["stored_bytes"].astype(np.int64)
    whole = np.flatnonzero(lows + lengths <= len(raw))
    if not len(whole):
        return good
    base, _ = _native.buffer_address(raw)
    statuses = np.zeros(len(whole), np.int32)
    _native.verify(
        (lows[whole] + base).astype(np.uint64),
        entries["stored_bytes"][whole].astype(np.uint64),
        np.ascontiguousarray(entries["payload_xxh3"][whole]),
        statuses,
    )
    good[whole] = statuses == 0
    return good
