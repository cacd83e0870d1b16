"""What eviction must hold: where it learns of it, and on which devices it matters."""

import threading
from dataclasses import dataclass, field

import numpy as np
import pytest

from kvfs.engine.held import HeldKeys
from kvfs.engine.state import EngineState
from kvfs.keys import KeyArray
from tests.unit.engine_bench import (
    BLOCKS_PER_SEGMENT,
    SPACE,
    Engine,
    Names,
    chain,
    disk,
    memory,
)


@dataclass(slots=True)
class Asked(Names):
    """Names that note whether the engine's lock was free whenever they were read."""

    state: EngineState | None = None
    was_free: list[bool] = field(default_factory=list)

    def reachable_keys(self, namespace_id: int) -> list[KeyArray]:
        thread = threading.Thread(target=self._try_lock)
        thread.start()
        thread.join()
        return Names.reachable_keys(self, namespace_id)

    def _try_lock(self) -> None:
        assert self.state is not None
        self.was_free.append(self.state.lock.acquire(blocking=False))
        if self.was_free[-1]:
            self.state.lock.release()


def test_what_is_named_during_a_round_is_kept_and_the_catalog_read_without_a_lock(
    monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    names = Asked()
    engine = Engine([disk(tmp_path, 8)], names=names, is_durable=True)
    names.state = engine.state
    keys, parents = chain(2 * BLOCKS_PER_SEGMENT)
    engine.put(keys, parents)
    prepare = HeldKeys.prepare

    def name_after(held: HeldKeys, namespace_ids: set[int]) -> None:
        prepare(held, namespace_ids)
        monkeypatch.setattr(HeldKeys, "prepare", prepare)
        with engine.store.being_named(SPACE, keys):
            names.reached.append(keys)

    monkeypatch.setattr(HeldKeys, "prepare", name_after)
    for i in range(8):
        engine.fill(1, start=10_000 * (i + 1))
    assert all(engine.read(keys))
    assert names.was_free
    assert all(names.was_free), "the catalog was read under the engine's lock"
    assert engine.state.unpinned is None
    engine.close()


def test_held_blocks_that_lie_on_disk_do_not_fill_memory(tmp_path) -> None:
    engine = Engine([disk(tmp_path, 16), memory(6)], is_durable=True)
    keys, parents = chain(8 * BLOCKS_PER_SEGMENT)
    engine.put(keys, parents)
    engine.names.reached.append(keys)
    fresh = engine.fill(4, durability="none")
    assert all(engine.resident(fresh[-BLOCKS_PER_SEGMENT:], device=1))
    assert all(engine.resident(keys, device=0))
    assert all(engine.read(keys))
    engine.close()


def test_held_blocks_in_memory_alone_stay_there(tmp_path) -> None:
    engine = Engine([disk(tmp_path, 16), memory(6)], is_durable=True)
    keys, parents = chain(2 * BLOCKS_PER_SEGMENT)
    engine.put(keys, parents, durability="none")
    held = engine.store.pin(SPACE, np.ascontiguousarray(keys[:3]))
    engine.fill(8, durability="none")
    assert all(engine.read(keys[:3]))
    engine.store.unpin(SPACE, np.ascontiguousarray(keys[:3]), held)
    engine.close()
