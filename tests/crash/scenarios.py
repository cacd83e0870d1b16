"""What is crashed: small histories that together touch every kind of write."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from unittest import mock

from kvfs.config import PoolOptions
from kvfs.errors import KvfsError
from tests.crash import history
from tests.crash.bench import Bench
from tests.crash.world import LARGE, Geometry

Play = Callable[[Bench], None]


@dataclass(frozen=True, slots=True)
class Scenario:
    """A history on a pool of some shape. `has_files`: it needs a device that takes files."""

    name: str
    geometry: Geometry
    play: Play
    has_files: bool = False

    def run(self, seed: str) -> Bench:
        """Play it; the caller closes the bench."""
        bench = Bench(f"{seed}/{self.name}", self.geometry, OPTIONS)
        try:
            self.play(bench)
        except BaseException:
            bench.close()
            raise
        return bench


HISTORIES_PER_TURN = 8
OPTIONS = PoolOptions(device_failures_max=1000)
DOMAINS = ("block", "pmem", "page", "volatile")
_FRAMES = 6
SCENARIOS: dict[str, Scenario] = {}


def scenario_named(name: str) -> Scenario:
    """Return a scenario by name: 'DOMAIN/SCENARIO', in the domain of block devices without one.

    'history-N' is the random history number N.
    """
    domain, _, wanted = name.rpartition("/")
    if wanted.startswith("history-"):
        number = int(wanted.partition("-")[2])
        geometry = history.GEOMETRIES[number % len(history.GEOMETRIES)]
        has_files = number // len(history.GEOMETRIES) % 2 == 1
        found = Scenario(wanted, geometry, history.play, has_files)
    else:
        found = SCENARIOS[wanted]
    return replace(found, name=name, geometry=_in_domain(found, domain or "block"))


def _in_domain(scenario: Scenario, domain: str) -> Geometry:
    """Return the pool of a scenario with disks of another domain.

    - "block": directories on disks.
    - "pmem": mapped memory that stays, alone, or beside directories of the same size for files.
    - "page": files in place of that memory.
    - "volatile": memory that a power cut takes, before directories.
    """
    geometry, count = scenario.geometry, len(scenario.geometry.disks)
    if domain in ("pmem", "page"):
        disks = geometry.disks * 2 if scenario.has_files else geometry.disks
        return replace(geometry, disks=disks, dax=count, are_files=domain == "page")
    if domain == "volatile":
        return replace(geometry, frames=geometry.frames or _FRAMES)
    assert domain == "block", f"no such domain: {domain}"
    return geometry


def names_of_turn(turn: int, domains: Sequence[str] = DOMAINS) -> list[str]:
    """Return the scenarios to walk in a turn: all that are written down, and new random ones.

    Each in every one of these domains.
    """
    first = turn * HISTORIES_PER_TURN
    names = [*SCENARIOS, *(f"history-{i}" for i in range(first, first + HISTORIES_PER_TURN))]
    return [f"{domain}/{name}" for name in names for domain in domains]


def scenario(*disks: int, frames: int = 0, has_files: bool = False) -> Callable[[Play], Play]:
    """Register a scenario on a pool with disks of so many segments, and frames of memory."""

    def register(function: Play) -> Play:
        name = function.__name__
        geometry = Geometry(disks or (16,), frames)
        SCENARIOS[name] = Scenario(name, geometry, function, has_files)
        return function

    return register


@scenario()
def put(bench: Bench) -> None:
    """Sync puts of different shapes, one after the other, in two namespaces."""
    space = bench.space()
    first = bench.put(space, 1)
    bench.put(space, 3, parent=first[-1].tobytes())
    bench.put(space, 1, partial=700)
    bench.put_again(space, first, "sync")
    wide = bench.space("wide", LARGE)
    bench.put(wide, 2, "async")
    bench.put(wide, 1)


@scenario()
def group_commit(bench: Bench) -> None:
    """Several async puts that one flush persists; a sync put that carries async ones along."""
    space = bench.space()
    for _ in range(3):
        bench.put(space, 2, "async")
    bench.flush()
    bench.put(space, 1, "none")
    bench.put(space, 1, "async")
    bench.put(space, 1, "sync")
    bench.put(space, 2, "async")
    bench.sync()


@scenario()
def entries(bench: Bench) -> None:
    """More entries than one page of the summary holds, so that pages are rewritten and added."""
    space = bench.space("tiny")
    for size in (20, 11, 2):
        keys, parents, payloads = bench.blocks(space, size)
        short = [payload[: 64 + i] for i, payload in enumerate(payloads)]
        for start in range(0, size, 7):
            part = slice(start, start + 7)
            bench.put_given(space, keys[part], parents[part], short[part], "async")
        bench.flush()


@scenario()
def seal(bench: Bench) -> None:
    """Segments that fill up: set aside, persisted, sealed; the next one opened."""
    space = bench.space()
    bench.put(space, 10, "async")
    bench.put(space, 10, "async")
    bench.flush()
    bench.put(space, 13, "sync")
    bench.put(space, 13, "sync")
    bench.flush()


@scenario(5)
def evict(bench: Bench) -> None:
    """A full disk: segments are given back and their slots used again."""
    space = bench.space()
    bench.may_evict = True
    chains = [bench.put(space, 8, "sync") for _ in range(3)]
    for _ in range(4):
        bench.read(space, chains[0])
        chains.append(bench.put(space, 8, "async"))
        bench.flush()
    bench.put(space, 6, "sync")


@scenario(5)
def evict_shared(bench: Bench) -> None:
    """Eviction of segments that clients have open: their bytes are taken, too."""
    space = bench.space()
    bench.may_evict = True
    for _ in range(6):
        bench.put(space, 8, "sync")
        for device in bench.pool.store.state.devices:
            for segment in device.segments.values():
                segment.handle.is_shared = True
    bench.flush()


@scenario(5)
def relocate(bench: Bench) -> None:
    """Eviction that copies what is pinned before it gives its segment back."""
    space = bench.space()
    bench.may_evict = True
    pinned = bench.context(space, "pinned")
    bench.append(pinned, 3)
    bench.set_pinned(pinned, is_pinned=True)
    bench.sync()
    for _ in range(6):
        bench.put(space, 9, "sync")
    bench.set_pinned(pinned, is_pinned=False)
    bench.sync()
    bench.put(space, 9, "sync")


@scenario(5)
def relocate_unsealed(bench: Bench) -> None:
    """Eviction copies blocks out of a segment that no seal header vouches for."""
    space = bench.space()
    bench.may_evict = True
    pinned = bench.context(space, "pinned")
    bench.append(pinned, 3)
    bench.set_pinned(pinned, is_pinned=True)
    bench.reopen()
    space = bench.space()
    for _ in range(6):
        bench.put(space, 9, "async")
    bench.flush()


@scenario(6)
def durable(bench: Bench) -> None:
    """A durable namespace beside one that is cache, on a full disk."""
    keep = bench.space("keep", retention="durable")
    cache = bench.space("cache")
    bench.may_evict = True
    named = bench.context(keep, "named")
    for _ in range(6):
        bench.append(named, 2)
        bench.put(cache, 8, "async")
        bench.put(keep, 3, "async")
    bench.drop_context(named)
    bench.sync()


@scenario()
def contexts(bench: Bench) -> None:
    """Contexts that grow, share blocks, are renamed, replaced and dropped."""
    space = bench.space()
    one = bench.context(space, "one")
    keys = bench.append(one, 2)
    bench.append(one, 1, "async")
    two = bench.context(space, "two")
    bench.append(two, 0, "sync", keys=keys)
    bench.append(two, 2, "async")
    bench.rename(space, "two", "three")
    bench.sync()
    bench.rename(space, "three", "one")
    bench.put(space, 1)
    bench.sync()
    bench.drop_context(bench.context(space, "one"))
    bench.put(space, 1)
    bench.sync()
    bench.context(space, "deep/down/here")


@scenario(8, 8)
def two_disks(bench: Bench) -> None:
    """Two disks, the first of which fills up."""
    space = bench.space()
    bench.may_evict = True
    for _ in range(5):
        bench.put(space, 12, "sync")
    bench.context(space, "name")
    bench.sync()


@scenario(6, frames=6)
def memory_tier(bench: Bench) -> None:
    """A memory tier that takes copies; blocks that are only there are no promise."""
    space = bench.space()
    bench.may_evict = True
    bench.put(space, 4, "none")
    bench.put(space, 4, "sync")
    bench.put(space, 4, "async")
    keys = bench.put(space, 2, "none")
    bench.flush()
    bench.put_again(space, keys, "sync")
    for _ in range(4):
        bench.put(space, 9, "sync")


@scenario()
def superblock(bench: Bench) -> None:
    """Superblock updates: new namespaces, generations reserved, a clean close, a new owner."""
    with (
        mock.patch("kvfs.engine.device_state.GENERATIONS_RESERVED", 2),
        mock.patch("kvfs.engine.recovery.GENERATIONS_RESERVED", 2),
    ):
        space = bench.space()
        bench.reopen()
        for _ in range(4):
            space = bench.space("other", LARGE) if space.info.name == "s" else bench.space()
            bench.put(space, 4 if space.info.name == "other" else 12)
        bench.reopen()
    space = bench.space()
    bench.put(space, 2)
    bench.drop_space(bench.space("other"))
    bench.put(space, 2)


@scenario()
def resume(bench: Bench) -> None:
    """A new owner appends to the segment that its predecessor left open."""
    space = bench.space()
    bench.put(space, 5)
    bench.reopen()
    space = bench.space()
    bench.put(space, 3, "async")
    bench.put(space, 2)
    bench.reopen()
    bench.put(bench.space(), 9)


@scenario()
def failing_sync(bench: Bench) -> None:
    """A persist that fails: the segment is poisoned, what it held unpersisted is no promise."""
    space = bench.space()
    bench.put(space, 3)
    bench.put(space, 3, "async")
    bench.world.disks[0].failing_syncs = 1
    try:
        bench.flush_failing()
    except KvfsError:
        pass
    else:
        raise AssertionError("the failure was not reported")
    bench.put(space, 3)
    bench.world.disks[0].failing_syncs = 1
    try:
        bench.put_failing(space, 2)
    except KvfsError:
        pass
    else:
        raise AssertionError("the failure was not reported")
    bench.put(space, 2)
    bench.sync()


@scenario()
def failing_sync_beside_others(bench: Bench) -> None:
    """A persist that fails while other segments wait for theirs, and while names change."""
    one, two = bench.space("one"), bench.space("two")
    for _ in range(2):
        bench.put(one, 2, "async")
        bench.put(two, 2, "async")
        bench.world.disks[0].failing_syncs = 1
        try:
            bench.flush_failing()
        except KvfsError:
            pass
        else:
            raise AssertionError("the failure was not reported")
        bench.flush()
        bench.put(two, 1)
    bench.put(one, 12, "async")
    bench.put(one, 5)
    bench.sync()


@scenario()
def namespaces(bench: Bench) -> None:
    """Namespaces that come and go; one comes back under the same name, with another id."""
    one = bench.space("one")
    bench.put(one, 2)
    bench.append(bench.context(one, "c"), 2)
    bench.drop_space(one)
    one = bench.space("one", LARGE)
    bench.put(one, 1)
    bench.drop_space(one)
    bench.put(bench.space("two"), 1)


@scenario(has_files=True)
def small_files(bench: Bench) -> None:
    """Files that go into the log: written, published, written again, removed."""
    space = bench.space()
    bench.write_file(space, "one", 5000)
    bench.write_file(space, "two", 100)
    bench.write_file(space, "empty", 0)
    bench.write_file(space, "synced", 4500, fsync=True)
    bench.sync()
    bench.write_file(space, "one", 9000)
    bench.flush()
    bench.put(space, 1)
    bench.write_file(space, "two", 3000)
    bench.sync()
    bench.remove_file(space, "one")
    bench.write_file(space, "new", 4096)
    bench.remove_file(space, "new")
    bench.sync()


@scenario(has_files=True)
def large_files(bench: Bench) -> None:
    """Files that become segments of their own: adopted, replaced, removed."""
    space = bench.space()
    bench.write_file(space, "one", 20000)
    bench.write_file(space, "two", 40960, fsync=True)
    bench.sync()
    bench.write_file(space, "one", 30001, parts=3)
    bench.put(space, 1)
    bench.write_file(space, "three", 17000)
    bench.sync()
    bench.remove_file(space, "two")
    bench.write_file(space, "two", 18000)
    bench.write_file(space, "three", 500)
    bench.sync()


@scenario(has_files=True)
def copied_files(bench: Bench) -> None:
    """Files that somebody could still write: a copy becomes the segment."""
    space = bench.space()
    bench.write_file(space, "one", 20000)
    bench.sync()
    for name, nbytes in (("one", 30001), ("two", 17000)):
        bench.world.disks[0].refused_seals = 1
        bench.write_file(space, name, nbytes, parts=3)
        bench.put(space, 1)
    bench.sync()


@scenario(has_files=True)
def renamed_files(bench: Bench) -> None:
    """Files written under another name and renamed over the old one."""
    space = bench.space()
    bench.write_file(space, "f", 20000)
    bench.write_file(space, "g", 3000)
    bench.sync()
    bench.write_file(space, "f.tmp", 22000)
    bench.rename(space, "f.tmp", "f")
    bench.write_file(space, "g.tmp", 4000)
    bench.rename(space, "g.tmp", "g")
    bench.write_file(space, "h.tmp", 4000)
    bench.rename(space, "h.tmp", "h")
    bench.put(space, 1)
    bench.sync()
    bench.rename(space, "g", "f")
    bench.sync()


@scenario(6, has_files=True)
def evicted_files(bench: Bench) -> None:
    """A full disk of files and blocks: files are whole or absent."""
    space = bench.space()
    bench.may_evict = True
    for i in range(5):
        bench.write_file(space, f"large{i}", 30000)
        bench.write_file(space, f"small{i}", 9000)
        bench.put(space, 5, "async")
        bench.sync()


@scenario(has_files=True)
def raw_files(bench: Bench) -> None:
    """Files outside the log: made, written in place, made of others, renamed over, removed."""
    space = bench.space()
    bench.write_file(space, "large", 20000)
    bench.write_file(space, "small", 3000)
    bench.sync()
    bench.make_raw(space, "one", 9000)
    bench.put(space, 1)
    bench.write_raw(space, "one", 4096)
    bench.make_raw(space, "large")
    bench.make_raw(space, "small")
    bench.write_raw(space, "large", 64)
    bench.make_raw(space, "two", 5000)
    bench.rename(space, "two", "one")
    bench.sync()
    bench.write_file(space, "plain", 18000)
    bench.rename(space, "plain", "small")
    bench.make_raw(space, "three", 200)
    bench.remove_file(space, "three")
    bench.reopen()
    space = bench.space()
    bench.write_raw(space, "one", 4864)
    bench.remove_file(space, "large")
    bench.make_raw(space, "four", 3000)
    bench.drop_space(space)
    bench.put(bench.space("other"), 1)


@scenario(6, has_files=True)
def raw_file_on_a_full_disk(bench: Bench) -> None:
    """Eviction around a raw file, which stays."""
    space = bench.space()
    bench.may_evict = True
    bench.make_raw(space, "raw", 70_000)
    bench.sync()
    for i in range(4):
        bench.put(space, 8, "async")
        bench.write_file(space, f"large{i}", 30000)
        bench.write_raw(space, "raw", 64 * i)
        bench.sync()
        assert bench.oracle.value(("s", "raw")) is not None
