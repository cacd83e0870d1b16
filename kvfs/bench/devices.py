"""Devices by themselves: what they move against the same work by fio and by plain copies.

Layer: L5.

- File device: payloads with checksums, O_DIRECT by io_uring at depth 32, against fio with the same
  engine, depth, size of a block and flags, on fresh preallocated files of the same filesystem.
- Memory devices: payloads with checksums against copies without, from and to the same kinds of
  memory: the baseline's side on the device is another segment of it. Two threads have a segment
  each.
- Reopening with the page cache dropped: against reading every segment's summary with pread, dropped
  likewise. Dropped is what belongs to the device's files, not what belongs to others.
"""

import contextlib
import json
import mmap
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import numpy as np
import numpy.typing as npt

from kvfs.bench.figure import Baseline, Figure, Goal, GoalKind, Samples, Unit, ratio_at_least
from kvfs.bench.reopen import reopen_figures
from kvfs.bench.session import Session, SkipError, library_copy, stream_copy
from kvfs.bench.stopwatch import Stopwatch
from kvfs.config import parse_device_url
from kvfs.devices.base import Device, Segment
from kvfs.devices.dax_layout import HEADER_BYTES
from kvfs.devices.open import open_device
from kvfs.errors import KvfsError, UsageError
from kvfs.units import MIB, format_bytes

FILE_GOAL: Final = 0.95
MEMORY_GOAL: Final = 0.90
REOPEN_GOAL: Final = Goal(GoalKind.VALUE_AT_MOST, 5e8)
DEPTH: Final = 32
_FILE_BLOCKS: Final = (MIB, 4 * MIB)
_UUID: Final = UUID(int=1)
_TAG: Final = b"bench"


def measure_reopen(session: Session) -> Iterator[Figure]:
    """Measure opening 1,000,000 blocks after SIGKILL, on tmpfs and on disk."""
    yield from reopen_figures(session, "device reopen", REOPEN_GOAL, on_disk=False)
    yield from reopen_figures(session, "device reopen", None, on_disk=True)


# --- files


def measure_file(session: Session) -> Iterator[Figure]:
    """Measure sequential direct writes and reads of a directory on disk."""
    if shutil.which("fio") is None:
        raise SkipError("needs fio: apt-get install fio")
    for block_bytes in _FILE_BLOCKS:
        with session.directory() as root:
            yield from _race_file(session, root, block_bytes)


def _race_file(session: Session, root: Path, block_bytes: int) -> Iterator[Figure]:
    scale, case = session.scale, f"disk, {format_bytes(block_bytes)}, depth {DEPTH}"
    count = max(1, scale.size_bytes // block_bytes)
    nbytes = count * block_bytes
    samples: dict[str, list[float]] = {}
    device = _open_direct(root / "device", 2 * nbytes + 4 * scale.segment_bytes,
                          scale.segment_bytes)  # fmt: skip
    way = device.info.io
    memory = mmap.mmap(-1, nbytes)
    try:
        data = np.frombuffer(memory, np.uint8)
        data[:] = np.resize(session.memory.private, nbytes)
        plain = root / "plain"
        for repeat in range(-1, scale.repeats):  # the first one warms up
            session.progress.note(f"device file {case}", max(0, repeat), scale.repeats)
            run = _FileRun(device, data, block_bytes, scale.segment_bytes, repeat + 2)
            for name, operation in (("write", run.write), ("read", run.read)):
                sides = [
                    (name, partial(_rate, operation, nbytes)),
                    (f"fio {name}", partial(_fio, name, plain, nbytes, block_bytes, way)),
                ]
                for key, side in sides[:: 1 if repeat % 2 else -1]:
                    rate = side()
                    if repeat >= 0:
                        samples.setdefault(key, []).append(rate)
            run.close()
            plain.unlink()
        del data
    finally:
        device.close()
        with contextlib.suppress(BufferError):
            memory.close()
    for name in ("write", "read"):
        yield Figure(
            f"device {name}", case, Unit.BYTES_PER_S, Samples(tuple(samples[name])),
            Baseline("fio", Samples(tuple(samples[f"fio {name}"]))), ratio_at_least(FILE_GOAL),
        )  # fmt: skip


def _open_direct(root: Path, capacity: int, segment_bytes: int) -> Device:
    url = f"dir:{root}?cache=direct&depth={DEPTH}&size={capacity}"
    try:
        return _open(url, capacity, segment_bytes)
    except UsageError as error:
        raise SkipError(str(error)) from error


def _open(url: str, capacity: int, segment_bytes: int) -> Device:
    return open_device(
        parse_device_url(url), index=0, uuid=_UUID, capacity_bytes=capacity,
        segment_bytes=segment_bytes, name="bench",
    )  # fmt: skip


class _FileRun:
    """Fresh segments; written with one batch each, then read with one batch for all."""

    def __init__(
        self, device: Device, data: npt.NDArray[np.uint8], block_bytes: int, segment_bytes: int,
        generation: int,
    ) -> None:  # fmt: skip
        self._device = device
        count = len(data) // block_bytes
        per_segment = segment_bytes // block_bytes
        slots = range(-(-count // per_segment))
        self._segments = [device.create(slot, generation, _TAG) for slot in slots]
        index = np.arange(count, dtype=np.uint64)
        self._which = (index // np.uint64(per_segment)).astype(np.intp)
        self._offsets = index % np.uint64(per_segment) * np.uint64(block_bytes)
        self._addresses = np.uint64(data.ctypes.data) + index * np.uint64(block_bytes)
        self._lengths = np.full(count, block_bytes, np.uint64)
        self._digests = np.zeros((count, 16), np.uint8)
        self._statuses = np.zeros(count, np.int32)

    def write(self) -> None:
        """Write every block."""
        for number, segment in enumerate(self._segments):
            part = slice(*np.searchsorted(self._which, (number, number + 1)).tolist())
            self._device.write_payloads(
                segment, self._offsets[part], self._addresses[part], self._lengths[part],
                self._digests[part], self._statuses[part],
            )  # fmt: skip
        assert not self._statuses.any(), "every write succeeds"

    def read(self) -> None:
        """Read every block back to where it came from, verified."""
        failed = self._device.read_payloads(
            self._segments, self._which, self._offsets, self._lengths, self._addresses,
            self._digests, self._statuses,
        )  # fmt: skip
        assert not failed, "every read succeeds"

    def close(self) -> None:
        """Free the segments."""
        for segment in self._segments:
            self._device.free(segment)


def _rate(operation: Callable[[], object], nbytes: int) -> float:
    watch = Stopwatch()
    watch.time("it", operation)
    watch.lap()
    return nbytes * 1e9 / watch.times("it")[0]


def _fio(kind: str, path: Path, nbytes: int, block_bytes: int, way: str) -> float:
    """Run fio; return bytes per second by its own clock."""
    engine = ["--ioengine=io_uring", f"--iodepth={DEPTH}"]
    if way != "io_uring":
        raise SkipError("fio is compared by io_uring, which this kernel refuses")
    if kind == "write":
        engine.append("--fixedbufs=1")  # as kvfs writes from registered buffers
    command = ["fio", "--name=bench", f"--filename={path}", f"--rw={kind}", f"--bs={block_bytes}",
               f"--size={nbytes}", "--direct=1", *engine, "--output-format=json"]  # fmt: skip
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise KvfsError(f"fio failed: {done.stderr.strip()[-500:]}")
    answer = json.loads(done.stdout[done.stdout.index("{") :])
    return float(answer["jobs"][0][kind]["bw_bytes"])


# --- memory


@dataclass(frozen=True, slots=True)
class _Lane:
    """What one thread works on: a segment, another one for the plain copy, private memory."""

    segment: Segment
    plain: npt.NDArray[np.uint8]
    private: npt.NDArray[np.uint8]
    digests: npt.NDArray[np.uint8]


def measure_memory(session: Session) -> Iterator[Figure]:
    """Measure payloads in and out of dram: and dax: devices, one and two threads."""
    nbytes = session.memory.batch_bytes
    segment_bytes = max(16 * MIB, nbytes)
    capacity = 6 * segment_bytes
    yield from _memory_figures(session, f"dram:?size={capacity}", "dram", capacity, segment_bytes)
    with session.tmpfs(HEADER_BYTES + capacity) as root:
        path = root / "dax"
        with path.open("xb") as file:
            file.truncate(HEADER_BYTES + capacity)
        yield from _memory_figures(session, f"dax:{path}", "dax, file", capacity, segment_bytes)


def _memory_figures(
    session: Session, url: str, kind: str, capacity: int, segment_bytes: int
) -> Iterator[Figure]:
    device = _open(url, capacity, segment_bytes)
    try:
        for threads in (1, 2):
            yield from _race_memory(session, device, kind, threads)
    finally:
        device.close()


def _race_memory(session: Session, device: Device, kind: str, threads: int) -> Iterator[Figure]:
    scale, count = session.scale, session.memory.batch_bytes // MIB
    case = f"{kind}, {format_bytes(MIB)}, {threads} thread{'s' if threads > 1 else ''}"
    lanes = [_lane(session, device, number, threads) for number in range(threads)]
    turns = max(4, scale.size_bytes // (count * MIB * threads))
    watch = Stopwatch()
    copies: dict[str, Callable[[_Lane], object]] = {
        "put": lambda lane: _put(device, lane, count),
        "NT copy": lambda lane: stream_copy(lane.plain, lane.private),
        "read": lambda lane: _get(device, lane, count),
        "memmove": lambda lane: library_copy(lane.private, lane.plain),
    }
    with ThreadPoolExecutor(threads) as pool:
        ways = {
            name: lambda _, copy=copy: list(pool.map(copy, lanes)) for name, copy in copies.items()
        }
        for repeat in range(-1, scale.repeats):  # the first one warms up
            session.progress.note(f"device memory {case}", max(0, repeat), scale.repeats)
            current = watch if repeat >= 0 else Stopwatch()
            current.race(ways, turns)
            current.lap()
    moved = turns * threads * count * MIB
    for name, against in (("put", "NT copy"), ("read", "memmove")):
        yield Figure(
            f"device {name}", case, Unit.BYTES_PER_S, watch.rates(name, moved),
            Baseline(against, watch.rates(against, moved)), ratio_at_least(MEMORY_GOAL),
        )  # fmt: skip
    for lane in lanes:
        device.free(lane.segment)


def _lane(session: Session, device: Device, number: int, threads: int) -> _Lane:
    nbytes = session.memory.batch_bytes
    segment = device.create(2 * number, threads, _TAG)
    other = device.create(2 * number + 1, threads, _TAG)
    plain = _memory_at(other.address, nbytes)
    private = session.memory.private[:nbytes].copy()
    return _Lane(segment, plain, private, np.zeros((nbytes // MIB, 16), np.uint8))


def _memory_at(address: int, nbytes: int) -> npt.NDArray[np.uint8]:
    """Show memory of a device that stays as long as the device is open."""
    interface: dict[str, Any] = {
        "shape": (nbytes,), "typestr": "|u1", "data": (address, False), "version": 3
    }  # fmt: skip
    holder = type("Memory", (), {"__array_interface__": interface})()
    return np.asarray(holder)


def _arrays(lane: _Lane, count: int) -> tuple[Any, Any, Any]:
    offsets = np.arange(count, dtype=np.uint64) * np.uint64(MIB)
    addresses = offsets + np.uint64(lane.private.ctypes.data)
    return offsets, addresses, np.full(count, MIB, np.uint64)


def _put(device: Device, lane: _Lane, count: int) -> None:
    offsets, addresses, lengths = _arrays(lane, count)
    failed = device.write_payloads(
        lane.segment, offsets, addresses, lengths, lane.digests, np.zeros(count, np.int32)
    )
    assert not failed, "memory takes every block"


def _get(device: Device, lane: _Lane, count: int) -> None:
    offsets, addresses, lengths = _arrays(lane, count)
    failed = device.read_payloads(
        [lane.segment], np.zeros(count, np.intp), offsets, lengths, addresses, lane.digests,
        np.zeros(count, np.int32),
    )  # fmt: skip
    assert not failed, "memory gives every block"
