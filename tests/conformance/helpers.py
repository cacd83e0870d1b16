"""What the suites of devices share."""

from collections.abc import Callable
from typing import Any
from uuid import UUID

import numpy as np

from kvfs import _native
from kvfs.devices.base import Device, Segment, SegmentName
from kvfs.units import MIB

SEGMENT_BYTES = MIB
CAPACITY_BYTES = 8 * MIB
DEVICE_UUID = UUID("6d1f02c4-0000-4000-8000-00000000abcd")
TAG = b"tenant-1"
OTHER_TAG = b"tenant-2"

Opener = Callable[..., Device]


def random_bytes(nbytes: int, seed: int = 1) -> bytes:
    """Return bytes that repeat from run to run."""
    return np.random.default_rng(seed).bytes(nbytes)


def put(device: Device, segment: Segment, *payloads: tuple[int, Any]) -> tuple[int, list[int]]:
    """Write payloads; check the digests of those that were written; return (failed, statuses)."""
    buffers = [np.frombuffer(data, np.uint8) for _, data in payloads]
    offsets = np.array([offset for offset, _ in payloads], np.uint64)
    sources = np.array([buffer.ctypes.data for buffer in buffers], np.uint64)
    lengths = np.array([len(data) for _, data in payloads], np.uint64)
    digests = np.zeros((len(payloads), 16), np.uint8)
    statuses = np.full(len(payloads), 99, np.int32)
    failed = device.write_payloads(segment, offsets, sources, lengths, digests, statuses)
    for (_, data), digest, status in zip(payloads, digests, statuses, strict=True):
        assert status != 0 or digest.tobytes() == _native.xxh3_128(data)
    return failed, [int(status) for status in statuses]


def name_of(segment: Segment) -> SegmentName:
    """Return the name under which `segments` lists a handle."""
    return SegmentName(segment.slot, segment.generation, segment.is_file, segment.nbytes)


def make_file(device: Device, data: bytes, slot: int = 5, generation: int = 9,
              sidecar: bytes = b"s" * 8192) -> Segment:  # fmt: skip
    """Stage and adopt a file."""
    staging = device.create_staging(f"make-{slot}-{generation}")
    device.write_staging(staging, 0, data)
    device.persist_staging(staging)
    return device.adopt(staging, slot, generation, sidecar)
