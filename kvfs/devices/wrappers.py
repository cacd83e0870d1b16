"""Devices around devices: faults and counts, each with the interface of what it wraps.

Layer: L1.

- A wrapper changes nothing it does not say; handles are the inner device's own.
- Faults are data: which operation, the how-manieth call, what happens. Choices left open (which
  item of a batch, which bit) come from the seed, so that a failing run can be repeated.

Concurrency: as the inner device; counters have a lock.
"""

import errno
import os
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final, TypeVar

import numpy as np

from kvfs import _native
from kvfs.devices.base import (
    AddressArray,
    Device,
    DigestArray,
    Segment,
    SegmentName,
    Staging,
    StatusArray,
)
from kvfs.devices.reflink import Extent
from kvfs.units import PAGE, align_up

T = TypeVar("T")
_SECTOR: Final = 512


class WrapperDevice(Device):
    """Forwards everything to `inner`; subclasses override `_call`, or single methods."""

    def __init__(self, inner: Device) -> None:
        self.inner = inner
        self.info = inner.info

    def _call(self, operation: str, nbytes: int, action: Callable[[], T]) -> T:
        """Do one operation; `nbytes` are what it moves, 0 if that is unknown before."""
        del operation, nbytes
        return action()

    def read_superblock(self) -> bytes | None:
        """Forward."""
        return self._call("read_superblock", 0, self.inner.read_superblock)

    def write_superblock(self, raw: bytes) -> None:
        """Forward."""
        self._call("write_superblock", len(raw), lambda: self.inner.write_superblock(raw))

    def segments(self) -> list[SegmentName]:
        """Forward."""
        return self._call("segments", 0, self.inner.segments)

    def create(self, slot: int, generation: int, tag: bytes) -> Segment:
        """Forward."""
        return self._call("create", 0, lambda: self.inner.create(slot, generation, tag))

    def attach(self, name: SegmentName) -> Segment:
        """Forward."""
        return self._call("attach", 0, lambda: self.inner.attach(name))

    def write_payloads(
        self, segment: Segment, offsets: AddressArray, sources: AddressArray,
        lengths: AddressArray, digests: DigestArray, statuses: StatusArray,
    ) -> int:  # fmt: skip
        """Forward."""
        return self._call(
            "write_payloads",
            int(lengths.sum()),
            lambda: self.inner.write_payloads(
                segment, offsets, sources, lengths, digests, statuses
            ),
        )

    def write_tail(self, segment: Segment, distance: int, data: bytes) -> None:
        """Forward."""
        self._call("write_tail", len(data), lambda: self.inner.write_tail(segment, distance, data))

    def read_tail(self, segment: Segment, nbytes: int) -> bytes:
        """Forward."""
        return self._call("read_tail", nbytes, lambda: self.inner.read_tail(segment, nbytes))

    def next_data(self, segment: Segment, offset: int) -> int:
        """Forward."""
        return self._call("next_data", 0, lambda: self.inner.next_data(segment, offset))

    def persist(self, segment: Segment) -> None:
        """Forward."""
        self._call("persist", 0, lambda: self.inner.persist(segment))

    def persist_names(self) -> None:
        """Forward."""
        self._call("persist_names", 0, self.inner.persist_names)

    def free(self, segment: Segment) -> None:
        """Forward."""
        self._call("free", 0, lambda: self.inner.free(segment))

    def clear_freed(self) -> None:
        """Forward."""
        self._call("clear_freed", 0, self.inner.clear_freed)

    def release(self, segment: Segment) -> None:
        """Forward."""
        self._call("release", 0, lambda: self.inner.release(segment))

    def read(self, segment: Segment, offset: int, nbytes: int, *, uncached: bool = False) -> bytes:
        """Forward."""
        return self._call(
            "read", nbytes, lambda: self.inner.read(segment, offset, nbytes, uncached=uncached)
        )

    def assemble(self, extents: Sequence[Extent], nbytes: int) -> int:
        """Forward."""
        return self._call("assemble", nbytes, lambda: self.inner.assemble(extents, nbytes))

    def create_staging(self, name: str) -> Staging:
        """Forward."""
        return self._call("create_staging", 0, lambda: self.inner.create_staging(name))

    def write_staging(self, staging: Staging, offset: int, data: bytes | memoryview) -> None:
        """Forward."""
        nbytes = memoryview(data).nbytes
        self._call("write_staging", nbytes, lambda: self.inner.write_staging(staging, offset, data))

    def resize_staging(self, staging: Staging, nbytes: int) -> None:
        """Forward."""
        self._call("resize_staging", 0, lambda: self.inner.resize_staging(staging, nbytes))

    def persist_staging(self, staging: Staging) -> None:
        """Forward."""
        self._call("persist_staging", 0, lambda: self.inner.persist_staging(staging))

    def reserve_staging(self, staging: Staging, nbytes: int) -> None:
        """Forward."""
        self._call("reserve_staging", 0, lambda: self.inner.reserve_staging(staging, nbytes))

    def settle_staging(self, staging: Staging, reserved_bytes: int = 0) -> None:
        """Forward."""
        self._call("settle_staging", 0, lambda: self.inner.settle_staging(staging, reserved_bytes))

    def seal_staging(self, staging: Staging, *, is_shared: bool) -> bool:
        """Forward."""
        return self._call(
            "seal_staging", 0, lambda: self.inner.seal_staging(staging, is_shared=is_shared)
        )

    def adopt(self, staging: Staging, slot: int, generation: int, sidecar: bytes) -> Segment:
        """Forward."""
        return self._call(
            "adopt", len(sidecar), lambda: self.inner.adopt(staging, slot, generation, sidecar)
        )

    def drop_staging(self, staging: Staging) -> None:
        """Forward."""
        self._call("drop_staging", 0, lambda: self.inner.drop_staging(staging))

    def reap_staging(self) -> int:
        """Forward."""
        return self._call("reap_staging", 0, self.inner.reap_staging)

    def keep_raw(self, staging: Staging, number: int) -> None:
        """Forward."""
        self._call("keep_raw", 0, lambda: self.inner.keep_raw(staging, number))

    def raw_files(self) -> list[tuple[int, int]]:
        """Forward."""
        return self._call("raw_files", 0, self.inner.raw_files)

    def open_raw(self, number: int) -> Staging:
        """Forward."""
        return self._call("open_raw", 0, lambda: self.inner.open_raw(number))

    def release_raw(self, staging: Staging) -> None:
        """Forward."""
        self._call("release_raw", 0, lambda: self.inner.release_raw(staging))

    @property
    def used_bytes(self) -> int:
        """Forward."""
        return self.inner.used_bytes

    @property
    def bytes_written(self) -> int:
        """Forward."""
        return self.inner.bytes_written

    @property
    def bad_bytes(self) -> int:
        """Forward."""
        return self.inner.bad_bytes

    def note_bad(self, segment: Segment, offset: int, nbytes: int) -> None:
        """Forward."""
        self._call("note_bad", 0, lambda: self.inner.note_bad(segment, offset, nbytes))

    def location(self) -> int:
        """Forward."""
        return self._call("location", 0, self.inner.location)

    def destroy(self) -> None:
        """Forward."""
        self._call("destroy", 0, self.inner.destroy)

    def close(self) -> None:
        """Forward."""
        self.inner.close()


class CountingDevice(WrapperDevice):
    """Counts calls and the bytes they were asked to move, by operation."""

    def __init__(self, inner: Device) -> None:
        super().__init__(inner)
        self.calls: Counter[str] = Counter()
        self.nbytes: Counter[str] = Counter()
        self._lock = threading.Lock()

    def _call(self, operation: str, nbytes: int, action: Callable[[], T]) -> T:
        with self._lock:
            self.calls[operation] += 1
            self.nbytes[operation] += nbytes
        return action()


class Verb(Enum):
    """The operations that faults speak of."""

    CREATE = ("create", "create_staging", "adopt", "keep_raw", "assemble")
    WRITE = ("write_payloads", "write_tail", "write_staging", "write_superblock")
    PERSIST = ("persist", "persist_names", "persist_staging")
    READ = ("read", "read_tail", "read_superblock")
    FREE = ("free", "drop_staging")


class Effect(Enum):
    """What a fault does.

    FAIL does nothing and raises; in a batch of payloads one item fails. SHORT writes a part and
    raises. LIE says done and did nothing. FLIP changes one bit of what was read.
    """

    FAIL = 1
    SHORT = 2
    LIE = 3
    FLIP = 4


_VERBS: Final = {operation: verb for verb in Verb for operation in verb.value}
_ALLOWED: Final = {
    Effect.FAIL: set(Verb),
    Effect.SHORT: {Verb.WRITE},
    Effect.LIE: {Verb.WRITE, Verb.PERSIST},
    Effect.FLIP: {Verb.READ},
}


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault: `effect` on calls `at` to `at + times - 1` (from 1) of a verb or operation."""

    verb: Verb
    at: int = 1
    effect: Effect = Effect.FAIL
    code: int = errno.EIO
    times: int = 1
    operation: str = ""

    def __post_init__(self) -> None:
        assert self.at >= 1
        assert self.verb in _ALLOWED[self.effect], "this effect has no meaning for this verb"
        assert not self.operation or self.operation in self.verb.value


class FaultyDevice(WrapperDevice):
    """Makes faults happen as told. `injected` counts those that did."""

    def __init__(self, inner: Device, faults: Sequence[Fault], *, seed: int = 0) -> None:
        super().__init__(inner)
        self.injected: Counter[Effect] = Counter()
        self._faults = tuple(faults)
        self._random = np.random.default_rng(seed)
        self._counts: Counter[Verb | str] = Counter()
        self._lock = threading.Lock()

    def _fault_for(self, operation: str) -> Fault | None:
        """Count the call and return the fault that is due, if any."""
        verb = _VERBS.get(operation)
        if verb is None:
            return None
        with self._lock:
            self._counts[verb] += 1
            self._counts[operation] += 1
            for fault in self._faults:
                if fault.verb is not verb or fault.operation not in ("", operation):
                    continue
                count = self._counts[fault.operation or verb]
                if fault.at <= count < fault.at + fault.times:
                    self.injected[fault.effect] += 1
                    return fault
        return None

    def _choose(self, count: int) -> int:
        with self._lock:
            return int(self._random.integers(count)) if count > 0 else 0

    def _call(self, operation: str, nbytes: int, action: Callable[[], T]) -> T:
        fault = self._fault_for(operation)
        if fault is None:
            return action()
        if fault.effect is Effect.LIE:
            return None  # type: ignore[return-value]  # writes and persists return nothing
        if fault.effect is Effect.FLIP:
            return self._flipped(action())
        raise _error(fault, operation)

    def _flipped(self, result: T) -> T:
        if not isinstance(result, bytes) or not result:
            return result
        changed = bytearray(result)
        changed[self._choose(len(changed))] ^= 1 << self._choose(8)
        return bytes(changed)  # type: ignore[return-value]  # T is bytes here

    def _write_part(
        self, operation: str, data: bytes | memoryview, write: Callable[[bytes], None]
    ) -> None:
        """Write all, nothing or a part of plain bytes."""
        fault = self._fault_for(operation)
        if fault is not None and fault.effect is Effect.LIE:
            return
        if fault is None or fault.effect is Effect.SHORT:
            raw = bytes(data)
            write(raw if fault is None else raw[: self._choose(len(raw))])
        if fault is not None:
            raise _error(fault, operation)

    def write_tail(self, segment: Segment, distance: int, data: bytes) -> None:
        """Forward all, a part or nothing."""
        self._write_part(
            "write_tail", data, lambda part: self.inner.write_tail(segment, distance, part)
        )

    def write_staging(self, staging: Staging, offset: int, data: bytes | memoryview) -> None:
        """Forward all, a part or nothing."""
        self._write_part(
            "write_staging", data, lambda part: self.inner.write_staging(staging, offset, part)
        )

    def write_payloads(
        self, segment: Segment, offsets: AddressArray, sources: AddressArray,
        lengths: AddressArray, digests: DigestArray, statuses: StatusArray,
    ) -> int:  # fmt: skip
        """Forward, but for the one item that a fault takes (LIE: hash all, write nothing)."""
        fault = self._fault_for("write_payloads")
        if fault is None or len(lengths) == 0:
            return self.inner.write_payloads(segment, offsets, sources, lengths, digests, statuses)
        if fault.effect is Effect.LIE:
            scratch = np.empty(align_up(int(lengths.max()), PAGE), np.uint8)
            targets = np.full(len(lengths), scratch.ctypes.data, np.uint64)
            return _native.copy_hash(targets, sources, lengths, digests, statuses, PAGE)
        victim = self._choose(len(lengths))
        done = np.flatnonzero(np.arange(len(lengths)) != victim)
        part_digests, part_statuses = digests[done], statuses[done]
        failed = self.inner.write_payloads(
            segment, offsets[done], sources[done], lengths[done], part_digests, part_statuses
        )
        digests[done], statuses[done] = part_digests, part_statuses
        if fault.effect is Effect.SHORT:
            one = slice(victim, victim + 1)
            sectors = self._choose(int(lengths[victim]) // _SECTOR + 1)
            short = np.array([sectors * _SECTOR], np.uint64)
            self.inner.write_payloads(
                segment, offsets[one], sources[one], short, digests[one], statuses[one]
            )
        statuses[victim] = -fault.code
        return failed + 1


def _error(fault: Fault, operation: str) -> OSError:
    return OSError(fault.code, f"{os.strerror(fault.code)} (injected into {operation})")
