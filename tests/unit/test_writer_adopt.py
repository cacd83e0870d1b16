"""Adoption and poisoning where something fails half-way."""

import threading
from pathlib import Path
from unittest import mock

import pytest

from kvfs.errors import DeviceError
from tests.crash.bench import Bench
from tests.crash.world import Geometry
from tests.unit.engine_bench import chain, disk


def test_adoption_that_cannot_be_made_durable_leaves_nothing() -> None:
    bench = Bench("adopt", Geometry((8,)))
    space = bench.space()
    device = bench.pool.store.state.devices[0].device
    failure = OSError(5, "injected")
    with (
        mock.patch.object(device, "persist_names", side_effect=failure),
        pytest.raises(DeviceError, match="adoption failed"),
    ):
        bench.write_file(space, "file", 40_000)
    assert device.used_bytes == 0
    assert not device.segments()
    bench.unpublished.clear()
    bench.write_file(space, "other", 40_000)
    assert len(device.segments()) == 1
    bench.close()


def test_a_failed_write_waits_for_the_persist_that_covers_others(make, tmp_path: Path) -> None:
    """What a persist in another thread makes durable is not dropped with the rest."""
    engine = make(disk(tmp_path))
    first, second, third = (chain(2, start)[0] for start in (0, 100, 200))
    engine.put(first)
    engine.put(second, durability="async")
    log = next(iter(engine.state.devices[0].logs.values()))
    device = engine.devices[0]
    in_persist, failed = threading.Event(), threading.Event()
    persist, write_tail = device.persist, device.write_tail

    def slow_persist(segment: object) -> None:
        in_persist.set()
        assert failed.wait(30)
        persist(segment)

    def failing_write(segment: object, distance: int, data: bytes) -> None:
        if segment is log.state.handle:
            failed.set()
            raise OSError(5, "injected")
        write_tail(segment, distance, data)

    with mock.patch.object(device, "persist", slow_persist):
        flusher = threading.Thread(target=log.persist)
        flusher.start()
        assert in_persist.wait(30)
        with mock.patch.object(device, "write_tail", failing_write):
            engine.put(third, durability="async")
        flusher.join(30)
    assert all(engine.resident(first))
    assert all(engine.resident(second)), "it was persisted before the segment was given up"
    assert all(engine.resident(third)), "it was written again, elsewhere"
    engine.check()
