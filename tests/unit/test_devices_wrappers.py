"""Wrappers: faults happen where told and nowhere else; counts are right."""

import errno
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import UUID

import numpy as np
import pytest

from kvfs import _native
from kvfs.devices.base import Device, Segment
from kvfs.devices.directory import DirectoryDevice
from kvfs.devices.osfs import OSFileSystem
from kvfs.devices.wrappers import CountingDevice, Effect, Fault, FaultyDevice, Verb
from kvfs.units import KIB, MIB, PAGE

DATA = np.arange(4 * PAGE, dtype=np.uint64).view(np.uint8)


@pytest.fixture
def inner(tmp_path: Path) -> Iterator[Device]:
    device = DirectoryDevice(
        OSFileSystem(str(tmp_path)), index=0, uuid=UUID(int=1), capacity_bytes=4 * MIB,
        segment_bytes=256 * KIB, name="ssd0",
    )  # fmt: skip
    yield device
    device.close()


def put(device: Device, segment: Segment, count: int) -> tuple[int, list[int], list[bytes]]:
    """Write `count` payloads of two pages each."""
    offsets = np.arange(count, dtype=np.uint64) * np.uint64(2 * PAGE)
    sources = np.full(count, DATA.ctypes.data, np.uint64)
    lengths = np.full(count, 2 * PAGE, np.uint64)
    digests, statuses = np.zeros((count, 16), np.uint8), np.full(count, 9, np.int32)
    failed = device.write_payloads(segment, offsets, sources, lengths, digests, statuses)
    return failed, statuses.tolist(), [digest.tobytes() for digest in digests]


@pytest.mark.parametrize(
    ("verb", "call"),
    [
        (Verb.CREATE, lambda device: device.create(9, 9, b"")),
        (Verb.CREATE, lambda device: device.create_staging("x")),
        (Verb.WRITE, lambda device: device.write_superblock(b"x")),
        (Verb.PERSIST, lambda device: device.persist_names()),
        (Verb.READ, lambda device: device.read_superblock()),
    ],
)
def test_the_kth_call_fails(inner: Device, verb: Verb, call: Callable[[Device], object]) -> None:
    device = FaultyDevice(inner, [Fault(verb, at=2, code=errno.ENOSPC, times=2)])
    outcomes = []
    for _ in range(4):
        try:
            call(device)
            outcomes.append(0)
        except FileExistsError:
            outcomes.append(0)
        except OSError as error:
            outcomes.append((error.errno or -1) if "injected" in str(error) else -2)
    assert outcomes == [0, errno.ENOSPC, errno.ENOSPC, 0]
    assert device.injected[Effect.FAIL] == 2


def test_a_fault_can_aim_at_one_operation(inner: Device) -> None:
    fault = Fault(Verb.WRITE, at=2, operation="write_tail")
    device = FaultyDevice(inner, [fault])
    segment = device.create(0, 1, b"")
    device.write_superblock(b"x")
    device.write_tail(segment, 100, b"one")
    device.write_superblock(b"y")
    with pytest.raises(OSError, match="injected into write_tail"):
        device.write_tail(segment, 100, b"two")
    assert device.read_tail(segment, 100)[:3] == b"one"


@pytest.mark.parametrize("effect", [Effect.FAIL, Effect.SHORT])
@pytest.mark.parametrize("seed", range(4))
def test_one_payload_of_a_batch_fails(inner: Device, effect: Effect, seed: int) -> None:
    fault = Fault(Verb.WRITE, effect=effect, code=errno.EIO)
    device = FaultyDevice(inner, [fault], seed=seed)
    segment = device.create(0, 1, b"")
    failed, statuses, digests = put(device, segment, 5)
    assert failed == 1
    victim = statuses.index(-errno.EIO)
    assert statuses == [-errno.EIO if i == victim else 0 for i in range(5)]
    raw = DATA[: 2 * PAGE].tobytes()
    for i in range(5):
        found = device.read(segment, i * 2 * PAGE, 2 * PAGE)
        if i != victim:
            assert found == raw
            assert digests[i] == _native.xxh3_128(raw)
        elif effect is Effect.FAIL:
            assert found == bytes(2 * PAGE)
        else:
            part = len(found.rstrip(b"\0"))
            assert found[:part] == raw[:part]
    assert put(device, segment, 5)[:2] == (0, [0] * 5)


def test_a_seed_repeats_a_run(inner: Device) -> None:
    def victims(seed: int, slot: int) -> list[int]:
        faults = [Fault(Verb.WRITE, times=20)]
        device = FaultyDevice(inner, faults, seed=seed)
        segment = device.create(slot, 1, b"")
        return [put(device, segment, 10)[1].index(-errno.EIO) for _ in range(20)]

    assert victims(1, 0) == victims(1, 1)
    assert victims(1, 2) != victims(2, 3)


def test_a_short_tail_write_writes_a_part(inner: Device) -> None:
    faults = [Fault(Verb.WRITE, effect=Effect.SHORT)]
    device = FaultyDevice(inner, faults, seed=3)
    segment = device.create(0, 1, b"")
    with pytest.raises(OSError, match="injected"):
        device.write_tail(segment, 1000, b"x" * 1000)
    tail = device.read_tail(segment, 1000)
    part = len(tail.rstrip(b"\0"))
    assert 0 < part < 1000
    assert tail == b"x" * part + bytes(1000 - part)


def test_a_lost_write_says_done(inner: Device) -> None:
    faults = [Fault(Verb.WRITE, effect=Effect.LIE, times=3)]
    device = FaultyDevice(inner, faults)
    segment = device.create(0, 1, b"")
    failed, statuses, digests = put(device, segment, 3)
    assert (failed, statuses) == (0, [0, 0, 0])
    assert digests == [_native.xxh3_128(DATA[: 2 * PAGE].tobytes())] * 3
    device.write_tail(segment, 10, b"lost")
    device.write_superblock(b"lost")
    assert device.read(segment, 0, segment.nbytes) == bytes(segment.nbytes)
    assert device.read_superblock() is None
    assert device.bytes_written == 0


def test_a_lying_persist_does_nothing(inner: Device) -> None:
    counting = CountingDevice(inner)
    device = FaultyDevice(counting, [Fault(Verb.PERSIST, at=2, effect=Effect.LIE)])
    segment = device.create(0, 1, b"")
    for _ in range(3):
        device.persist(segment)
    assert counting.calls["persist"] == 2


def test_a_flipped_read_differs_in_one_bit(inner: Device) -> None:
    faults = [Fault(Verb.READ, effect=Effect.FLIP)]
    device = FaultyDevice(inner, faults, seed=5)
    segment = device.create(0, 1, b"")
    put(device, segment, 1)
    flipped = np.frombuffer(device.read(segment, 0, 2 * PAGE), np.uint8)
    right = np.frombuffer(device.read(segment, 0, 2 * PAGE), np.uint8)
    assert np.bitwise_count(flipped ^ right).sum() == 1


def test_staging_faults(inner: Device) -> None:
    faults = [Fault(Verb.WRITE, effect=Effect.FAIL), Fault(Verb.WRITE, at=2, effect=Effect.LIE)]
    device = FaultyDevice(inner, [*faults, Fault(Verb.CREATE, at=2)])
    staging = device.create_staging("x")
    with pytest.raises(OSError, match="injected"):
        device.write_staging(staging, 0, b"a")
    device.write_staging(staging, 0, b"b")
    assert staging.nbytes == 0
    device.write_staging(staging, 0, b"c")
    with pytest.raises(OSError, match="injected into adopt"):
        device.adopt(staging, 0, 1, b"sidecar")
    assert device.adopt(staging, 0, 1, b"sidecar").nbytes == 1


@pytest.mark.parametrize(
    ("verb", "effect"),
    [(Verb.READ, Effect.SHORT), (Verb.CREATE, Effect.LIE), (Verb.WRITE, Effect.FLIP)],
)
def test_meaningless_faults_are_refused(verb: Verb, effect: Effect) -> None:
    with pytest.raises(AssertionError):
        Fault(verb, effect=effect)


def test_counts(inner: Device) -> None:
    device = CountingDevice(inner)
    segment = device.create(0, 1, b"")
    put(device, segment, 3)
    device.write_tail(segment, 100, b"x" * 50)
    device.read(segment, 0, 1000)
    device.read(segment, 0, 24)
    device.persist(segment)
    device.free(segment)
    assert device.calls == {
        "create": 1, "write_payloads": 1, "write_tail": 1, "read": 2, "persist": 1, "free": 1,
    }  # fmt: skip
    assert device.nbytes["write_payloads"] == 3 * 2 * PAGE
    assert device.nbytes["write_tail"] == 50
    assert device.nbytes["read"] == 1024
    assert device.info is inner.info
