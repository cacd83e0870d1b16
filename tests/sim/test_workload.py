"""A seeded day of a full pool: chats that grow and share prompts, crashes, failing disks."""

import contextlib
import random
from dataclasses import dataclass, field

import numpy as np
import pytest

from kvfs.errors import KvfsError, NoSpaceError
from kvfs.keys import NO_PARENT
from tests.crash.bench import Bench
from tests.crash.world import Geometry
from tests.invariants import check_engine

_CHATS = 16
_PROMPTS = 3
_CHAT_BLOCKS_MAX = 40


@dataclass(slots=True)
class Chat:
    """A conversation: the tokens of each of its blocks so far."""

    prompt: int
    tokens: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Figures:
    """What a run saw; equal for equal seeds."""

    asked: int = 0
    hits: int = 0
    refused: int = 0
    evicted: int = 0
    faults: int = 0
    """Crashes and failed persists: what is found after one may have to be dropped."""
    journal: int = 0


class Day:
    """Plays turns of chats on a bench."""

    def __init__(self, seed: int, geometry: Geometry) -> None:
        self.bench = Bench(f"{seed}", geometry)
        self.bench.may_evict = True
        self.random = random.Random(seed)
        self.figures = Figures()
        self.chats: list[Chat] = []

    def turn(self) -> None:
        """One request: find the cached prefix, read it, store what was missing and one answer."""
        chat = self._pick()
        chat.tokens += [self.random.getrandbits(31) for _ in range(4 * self.random.randint(1, 3))]
        space = self.bench.space()
        keys, parents = space.keys(chat.tokens)
        resident = space.match_prefix(keys)
        self.figures.asked += len(keys)
        self.figures.hits += resident
        if resident:
            assert self.bench.read(space, keys[:resident]) == resident or self.figures.faults
        payloads = [_payload(key.tobytes()) for key in keys[resident:]]
        try:
            self.bench.put_given(space, keys[resident:], parents[resident:], payloads, "async")
        except NoSpaceError:
            self.figures.refused += 1
        if self.random.random() < 0.3:
            self.bench.flush()

    def _pick(self) -> Chat:
        """Return a chat, recent ones more often; old ones end and new ones begin."""
        if len(self.chats) < _CHATS or self.random.random() < 0.05:
            prompt = self.random.randrange(_PROMPTS)
            shared = random.Random(prompt)
            self.chats.append(Chat(prompt, [shared.getrandbits(31) for _ in range(4 * 8)]))
            self.chats = self.chats[-_CHATS:]
        chat = self.chats[-1 - min(int(self.random.expovariate(0.3)), len(self.chats) - 1)]
        if len(chat.tokens) > 4 * _CHAT_BLOCKS_MAX:
            self.chats.remove(chat)
            return self._pick()
        return chat

    def crash(self) -> None:
        self.bench.crash(self.random.getrandbits(32))
        self.figures.faults += 1

    def fail(self) -> None:
        """Let a persist fail; blocks put since the last one are lost."""
        self.random.choice(self.bench.world.disks).failing_syncs = 1
        with contextlib.suppress(KvfsError):
            self.bench.flush_failing()
        for disk in self.bench.world.disks:
            disk.failing_syncs = 0
        self.figures.faults += 1

    def check(self) -> None:
        state = self.bench.pool.store.state
        check_engine(state)
        for device in state.devices:
            assert device.device.used_bytes <= device.info.capacity_bytes

    def end(self) -> Figures:
        counters = self.bench.pool.store.state.counters
        self.figures.evicted = counters.snapshot()["blocks_evicted"]
        self.figures.journal = self.bench.now
        self.bench.close()
        return self.figures


def _payload(key: bytes) -> bytes:
    return random.Random(key).randbytes(4096)


def orphans(bench: Bench) -> int:
    """Count resident blocks whose parent is not resident: they can serve nobody."""
    state = bench.pool.store.state
    count = 0
    for device in state.devices:
        for segment in device.segments.values():
            live = segment.live_indices()
            parents = np.ascontiguousarray(segment.entries["parent"][live])
            asked = [parent for parent in parents if parent.tobytes() != NO_PARENT]
            if asked:
                found = state.index(segment.namespace_id).lookup(np.stack(asked))
                count += int(np.count_nonzero(found["length"] == 0))
    return count


@pytest.mark.parametrize("geometry", [Geometry((12,)), Geometry((6, 6)), Geometry((10,), 4)])
def test_a_full_pool_goes_on_serving(seed: int, geometry: Geometry) -> None:
    day = Day(seed, geometry)
    for i in range(250):
        day.turn()
        if i % 25 == 0:
            day.check()
    assert orphans(day.bench) == 0, "eviction left blocks without their prefix"
    figures = day.end()
    assert figures.evicted > 50, figures
    assert figures.refused == 0, figures
    assert figures.hits / figures.asked > 0.4, figures


def test_days_with_crashes_and_failing_disks(seed: int) -> None:
    day = Day(seed, Geometry((8, 6)))
    for i in range(200):
        day.turn()
        if day.random.random() < 0.05:
            day.random.choice((day.crash, day.crash, day.fail, day.bench.reopen))()
        if i % 10 == 0:
            day.check()
    figures = day.end()
    assert figures.faults >= 2, figures


def test_the_same_seed_is_the_same_day() -> None:
    def play() -> Figures:
        day = Day(5, Geometry((8,)))
        for _ in range(80):
            day.turn()
        day.crash()
        for _ in range(20):
            day.turn()
        return day.end()

    assert play() == play()
