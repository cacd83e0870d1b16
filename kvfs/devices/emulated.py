"""A device that behaves like another kind: slower than it is, with a count of energy.

Layer: L1.

- What the medium below takes is not taken off: the emulation adds to it. One latency is added per
  call, since the items of a batch overlap; bytes of one direction share its bandwidth, whoever
  moves them.
- The bytes of a call are those it was asked to move. Reads past the device, in place, are told of
  by the reader (`Device.meter`); those that views, clients and kvfs-core make are not seen.
- Delays too short to be waited for are saved up until they are worth it.

Concurrency: `_lock` guards the counters; nobody waits under it.
"""

import dataclasses
import threading
from collections.abc import Callable
from typing import Final, TypeVar

from kvfs.clock import Clock, SystemClock
from kvfs.devices.base import Device
from kvfs.devices.wrappers import WrapperDevice
from kvfs.emulation import Emulation, LinkFigures

T = TypeVar("T")
_WAIT_NS_MIN: Final = 200_000  # a wait of the kernel's is some 60 us longer than asked for
_READS: Final = frozenset(("read", "read_payloads", "read_tail", "read_superblock"))
_WRITES: Final = frozenset(
    ("write_payloads", "write_tail", "write_staging", "write_superblock", "adopt")
)


class EmulatedDevice(WrapperDevice):
    """Adds what an Emulation says to every call that moves bytes."""

    def __init__(
        self,
        inner: Device,
        emulation: Emulation,
        *,
        clock: Clock | None = None,
        wait: Callable[[float], object] | None = None,
    ) -> None:
        """Wrap a device, which is closed with this one.

        Args:
            inner: What holds the bytes.
            emulation: What to add.
            clock: Time; the system's when missing.
            wait: Waits for so many seconds; a test gives another.
        """
        super().__init__(inner)
        self.meter = self
        self.emulation = emulation
        self.info = dataclasses.replace(
            inner.info,
            kind="emulated",
            figures=LinkFigures(
                *(getattr(emulation, each.name) for each in dataclasses.fields(LinkFigures))
            ),
        )
        self._clock = clock or SystemClock()
        self._wait = wait or threading.Event().wait  # of an event that nobody sets
        self._lock = threading.Lock()
        self._busy_until_ns = {True: 0, False: 0}  # reads, writes
        self._owed_ns = 0
        self._picojoules = 0

    @property
    def energy_joules(self) -> float:
        """What the bytes moved since open would have taken."""
        return self._picojoules / 1e12

    def note_read(self, nbytes: int) -> None:
        """Take as long as reading so many bytes would take more."""
        self._charge(nbytes, is_read=True)

    def _call(self, operation: str, nbytes: int, action: Callable[[], T]) -> T:
        result = action()
        if operation in _WRITES:
            self._charge(nbytes, is_read=False)
        elif operation in _READS:
            self._charge(len(result) if isinstance(result, bytes) else nbytes, is_read=True)
        return result

    def _charge(self, nbytes: int, *, is_read: bool) -> None:
        added = self.emulation
        rate = added.read_bytes_per_s if is_read else added.write_bytes_per_s
        latency_ns = added.read_latency_ns if is_read else added.write_latency_ns
        energy = added.read_pj_per_byte if is_read else added.write_pj_per_byte
        now_ns = self._clock.monotonic_ns()
        with self._lock:
            self._picojoules += nbytes * energy
            start_ns = max(now_ns, self._busy_until_ns[is_read])
            done_ns = start_ns + (nbytes * 1_000_000_000 // rate if rate else 0)
            self._busy_until_ns[is_read] = done_ns
            self._owed_ns += latency_ns
            delay_ns = done_ns - now_ns + self._owed_ns
            is_due = delay_ns >= _WAIT_NS_MIN  # else the next call finds it still busy
            if is_due:
                self._owed_ns = 0
        if is_due:
            self._wait(delay_ns / 1e9)
