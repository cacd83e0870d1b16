"""Counters of a pool: plain integers, read as a snapshot; and who has heard of losses.

Layer: L0. What they are called for people and machines: kvfs.metric_list.

- One `Tally` per namespace, in it one row per device where a device has a part. What happens is
  counted where it happens: once per batch, under a lock that is held there anyway or in one step of
  the interpreter, which no other thread comes between.
- Times are counted in buckets of powers of two, of nanoseconds: `Histogram`, which is native.
"""

import threading
from dataclasses import dataclass, field, fields
from typing import Final

import numpy as np
import numpy.typing as npt

from kvfs._native import Histogram as Histogram
from kvfs.phase import Phase

PHASES: Final = tuple(phase.name.lower() for phase in Phase)
OPERATIONS: Final = ("put", "lookup", "match_prefix", "read_into", "lease", "open")
Rows = npt.NDArray[np.uint64]  # (devices, 2): blocks and bytes


@dataclass(slots=True, eq=False)
class Tally:
    """What happened in one namespace since the pool was opened. Byte counts are stored bytes.

    Attributes:
        prefix: Keys that `match_prefix` was asked for, and those it matched.
        prefix_times: `times` of match_prefix, at hand.
        looked_up: Rows of blocks that `lookup` found.
        leased: Rows of blocks that were leased verified, for a view or an adoption.
        read: Rows of blocks that `read_into` copied.
        accesses: Blocks that were read, held or touched, by `Phase`; by clients, too, who report
            it in their access rings.
        file_bytes: Bytes of files that were copied, by device.
        written: Bytes appended or adopted, by device, with padding; extra copies and relocated
            blocks count too.
        evicted: Segments evicted, by device.
        bad_checksums: Blocks that did not hold what was written, by device.
        bad_reads: Blocks that could not be read, by device.
        times: How long operations took.
    """

    devices: int
    blocks_put: int = 0
    blocks_deduplicated: int = 0
    bytes_put: int = 0
    bytes_deduplicated: int = 0
    misses_absent: int = 0
    misses_unreadable: int = 0
    misses_room: int = 0
    lookups_missed: int = 0
    blocks_verified: int = 0
    blocks_evicted: int = 0
    blocks_relocated: int = 0
    bytes_relocated: int = 0
    files_evicted: int = 0
    refused_no_space: int = 0
    refused_no_device: int = 0
    blocks_lost: int = 0
    pins_broken: int = 0
    prefix: npt.NDArray[np.uint64] = field(init=False)
    prefix_times: Histogram = field(init=False)
    looked_up: Rows = field(init=False)
    leased: Rows = field(init=False)
    read: Rows = field(init=False)
    written: list[int] = field(init=False)
    accesses: list[int] = field(init=False)
    file_bytes: list[int] = field(init=False)
    evicted: list[int] = field(init=False)
    bad_checksums: list[int] = field(init=False)
    bad_reads: list[int] = field(init=False)
    times: dict[str, Histogram] = field(init=False)

    def __post_init__(self) -> None:
        for name in _ROWS:
            setattr(self, name, np.zeros((self.devices, 2), np.uint64))
        for name in _LISTS:
            setattr(self, name, [0] * self.devices)
        self.accesses = [0] * len(Phase)
        self.prefix = np.zeros(2, np.uint64)
        self.times = {name: Histogram() for name in OPERATIONS}
        self.prefix_times = self.times["match_prefix"]

    def add(self, other: "Tally") -> None:
        """Count what another has counted."""
        for name in _NUMBERS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in (*_ROWS, "prefix"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in (*_LISTS, "accesses"):
            sums = zip(getattr(self, name), getattr(other, name), strict=True)
            setattr(self, name, [a + b for a, b in sums])
        for name, histogram in other.times.items():
            self.times[name].add(histogram)


_ROWS: Final = ("looked_up", "leased", "read")
_LISTS: Final = ("written", "file_bytes", "evicted", "bad_checksums", "bad_reads")
_NUMBERS: Final = tuple(
    each.name for each in fields(Tally) if each.type is int and each.name != "devices"
)


class Counters(dict[int, Tally]):
    """What a pool did since it was opened: a tally per namespace id.

    Of an id that is unknown, `[]` gives `gone`, so that whoever asks for nonsense costs no memory.

    Attributes:
        gone: What namespaces did that were dropped since.
        write_errors: Writes and persists of devices that failed.
        segments_poisoned: Segments given up after such a failure.
        blocks_lost: Blocks that failed persists have lost, in all namespaces.
    """

    def __init__(self, devices: int = 1) -> None:
        """Start from zero; `devices` is the highest number of a device, plus one."""
        super().__init__()
        self._devices = devices
        self.gone = Tally(devices)
        self.write_errors = 0
        self.segments_poisoned = 0
        self.blocks_lost = 0

    def __missing__(self, namespace_id: int) -> Tally:
        return self.gone

    def begin(self, namespace_id: int) -> None:
        """Count a namespace by itself from now on."""
        self.setdefault(namespace_id, Tally(self._devices))

    def retire(self, namespace_id: int) -> None:
        """Count a namespace no more; what it did stays in the sums."""
        tally = self.pop(namespace_id, None)
        if tally is not None:
            self.gone.add(tally)

    def total(self) -> Tally:
        """Return the sum of all namespaces."""
        total = Tally(self._devices)
        for tally in [self.gone, *list(self.values())]:
            total.add(tally)
        return total

    def snapshot(self) -> dict[str, int]:
        """Return names and values for people: of all namespaces and devices together."""
        total = self.total()
        return {
            "blocks_put": total.blocks_put,
            "blocks_deduplicated": total.blocks_deduplicated,
            "bytes_put": total.bytes_put,
            "bytes_deduplicated": total.bytes_deduplicated,
            "lookups_hit": int(total.looked_up[:, 0].sum()),
            "lookups_missed": total.lookups_missed,
            "blocks_read": int(total.read[:, 0].sum()),
            "bytes_read": int(total.read[:, 1].sum()) + sum(total.file_bytes),
            "blocks_verified": total.blocks_verified,
            "checksum_errors": sum(total.bad_checksums),
            "media_errors": sum(total.bad_reads),
            "write_errors": self.write_errors,
            "blocks_evicted": total.blocks_evicted,
            "blocks_relocated": total.blocks_relocated,
            "bytes_relocated": total.bytes_relocated,
            "segments_evicted": sum(total.evicted),
            "files_evicted": total.files_evicted,
            "puts_refused": total.refused_no_space + total.refused_no_device,
            "segments_poisoned": self.segments_poisoned,
            "blocks_lost": self.blocks_lost,
        }


class LossListener:
    """One who hears of losses: a thread of the owner, or a client."""

    def __init__(self, reports: "LossReports") -> None:
        self._reports = reports
        self._heard = reports.heard

    def news(self) -> int:
        """Return how many blocks were lost that this listener has not heard of."""
        lost = self._reports.lost
        count, self._heard = lost - self._heard, lost
        self._reports.heard = max(self._reports.heard, lost)
        return count


class LossReports:
    """Tells every listener once of each loss, as Linux tells every descriptor of a failed write.

    Who deals with the pool only after a loss hears of it only if nobody has before: he cannot have
    relied on what was lost.
    """

    def __init__(self, counters: Counters) -> None:
        self._counters = counters
        self.heard = 0  # by somebody; needs no lock: a race makes somebody hear twice
        self._own = threading.local()

    @property
    def lost(self) -> int:
        """How many blocks were lost since open."""
        return self._counters.blocks_lost

    def new_listener(self) -> LossListener:
        """Return one who hears of what is lost from now on, and of what nobody has heard of yet."""
        return LossListener(self)

    def listen(self) -> LossListener:
        """Let this thread hear of what is lost from now on, and of what nobody has heard of yet."""
        if not hasattr(self._own, "listener"):
            self._own.listener = LossListener(self)
        listener: LossListener = self._own.listener
        return listener
