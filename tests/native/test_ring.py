import fcntl
import os
import struct
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfs import _native
from tests.native.support import EVENT, make_keys, make_records


def records(count: int, start: int = 0) -> Any:
    rows = make_records(make_keys(count), device=3, segment=4)
    rows["entry"] = np.arange(start, start + count)
    return rows


def drain(ring: Any, limit: int = 65536) -> Any:
    return np.frombuffer(ring.drain(limit), EVENT)


def test_events_say_what_was_read() -> None:
    ring = _native.AccessRing(100)
    rows = records(5)
    rows["flags"] = 0x1FE
    rows["length"][2] = 0  # a miss
    ring.push(rows, phase=7, tag=2**32 - 1)
    ring.push(rows[:1])
    events = drain(ring)
    assert list(events["entry"]) == [0, 1, 3, 4, 0]
    assert list(events["phase"]) == [7] * 4 + [0]
    assert list(events["tag"]) == [2**32 - 1] * 4 + [0]
    assert (events["device"] == 3).all()
    assert (events["segment"] == 4).all()
    assert (events["flags"] == 0xFE).all()
    assert ring.lost == 0
    assert ring.drain() == b""


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=30))
def test_ring_equals_a_bounded_queue(steps: list[tuple[int, int]]) -> None:
    ring = _native.AccessRing(16)
    queue: list[int] = []
    lost = serial = 0
    for pushed, drained in steps:
        ring.push(records(pushed, serial))
        fits = min(pushed, 16 - len(queue))
        queue += range(serial, serial + fits)
        lost += pushed - fits
        serial += pushed
        assert list(drain(ring, drained)["entry"]) == queue[:drained]
        del queue[:drained]
    assert ring.lost == lost
    ring.close()


def test_the_other_side_attaches() -> None:
    ring = _native.AccessRing(100)
    other = _native.AccessRing.attach(ring.fd)
    ring.push(records(3))
    assert list(drain(other)["entry"]) == [0, 1, 2]
    assert ring.drain() == b""
    ring.close()
    other.push(records(1))
    assert len(drain(other)) == 1


def test_one_producer_one_consumer() -> None:
    ring = _native.AccessRing(1000)
    total = 50_000
    seen: list[Any] = []

    def consume() -> None:
        taken = 0
        while taken + ring.lost < total:
            events = drain(ring)
            taken += len(events)
            seen.append(events["entry"])

    consumer = threading.Thread(target=consume)
    consumer.start()
    for start in range(0, total, 100):
        ring.push(records(100, start))
    consumer.join()
    entries = np.concatenate(seen)
    assert len(entries) + ring.lost == total
    assert (np.diff(entries.astype(np.int64)) > 0).all()


@pytest.mark.parametrize(("at", "value"), [(0, 1), (8, 9), (12, 9), (16, 0), (16, 24), (16, 2**62)])
def test_attach_refuses(at: int, value: int) -> None:
    ring = _native.AccessRing(16)
    image = bytearray(os.pread(ring.fd, 1 << 20, 0))
    struct.pack_into("<Q" if at % 16 == 0 else "<I", image, at, value)
    fd = os.memfd_create("forged", os.MFD_ALLOW_SEALING)
    os.write(fd, image)
    with pytest.raises(ValueError, match="sealed"):
        _native.AccessRing.attach(fd)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    with pytest.raises(ValueError, match="not an access ring"):
        _native.AccessRing.attach(fd)
    os.close(fd)


def test_positions_that_cannot_be() -> None:
    ring = _native.AccessRing(16)
    arena = _native.Arena(ring.fd, 4096 + 16 * 16)
    ring.push(records(3))
    for head in (2**64 - 1, 1000, 2**63):
        memoryview(arena)[64:72] = head.to_bytes(8, "little")
        assert ring.drain() == b""
        ring.push(records(1))
        assert len(drain(ring)) == 1
    memoryview(arena)[128:136] = bytes(8)
    ring.push(records(1))
    assert ring.lost == 1
    arena.close()


def test_arguments() -> None:
    ring = _native.AccessRing(1)
    for bad in (0, -1, 2**31):
        with pytest.raises(ValueError, match="capacity"):
            _native.AccessRing(bad)
    with pytest.raises(ValueError, match="records"):
        ring.push(bytes(63))
    with pytest.raises(ValueError, match="phase"):
        ring.push(b"", phase=256)
    with pytest.raises(ValueError, match="tag"):
        ring.push(b"", tag=-1)
    with pytest.raises(ValueError, match="limit"):
        ring.drain(-1)
    assert ring.drain(0) == b""
    assert not os.get_inheritable(ring.fd)
    ring.close()
    ring.close()
    for call in (lambda: ring.fd, lambda: ring.lost, lambda: ring.push(b""), ring.drain):
        with pytest.raises(ValueError, match="closed"):
            call()
