"""Recovery step by step: who may take a device, and what becomes of each kind of segment."""

import uuid
from collections.abc import Iterator
from dataclasses import replace as with_changes

import numpy as np
import pytest

from kvfs.engine import format as fmt
from kvfs.engine.recovery import Owner, claim_device
from kvfs.errors import CorruptionError, RefusedError
from kvfs.units import PAGE
from tests.crash.bench import Bench
from tests.crash.simfs import LOCATION, SimFileSystem
from tests.crash.verify import read_blocks
from tests.crash.world import OWNER, POOL_UUID, SEGMENT_BYTES, Geometry, World, names_of
from tests.invariants import check_engine

SUPERBLOCK = "kvfs.superblock"
Files = dict[str, bytes]


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench("recovery", Geometry((8,)))
    yield made
    made.close()


def contents(bench: Bench) -> tuple[Files, bytes]:
    """Return the disk and the catalog as they are now."""
    return bench.world.disks[0].files(), bench.journal.last_commit()


def opened(files: Files, catalog: bytes) -> World:
    """Recover; the caller discards."""
    world = World(Geometry((8,)))
    world.recover((files,), catalog)
    check_engine(world.pool.store.state)
    return world


def flipped(raw: bytes, position: int) -> bytes:
    changed = bytearray(raw)
    changed[position] ^= 0xFF
    return bytes(changed)


def segments(files: Files) -> list[str]:
    return sorted(path for path in files if path.endswith((".seg", ".file")))


# --- claiming


def claim(files: Files, owner: Owner = OWNER, location: int = LOCATION, *, moved: bool = False):
    world = World(Geometry((8,)))
    world.restore((files,))
    device = world.open_parts(None)[0][0]
    try:
        return claim_device(device, POOL_UUID, location, owner, world.clock, allow_moved=moved)
    finally:
        world.discard()


def test_a_claim_counts_owners_and_reserves_generations(bench: Bench) -> None:
    files, _ = contents(bench)
    before = fmt.decode_superblock(files[SUPERBLOCK], "before")
    after = claim(files).superblock
    assert after.owner_epoch == before.owner_epoch + 1
    assert after.sequence == before.sequence + 1
    assert after.generation_limit == before.generation_limit + 4096
    assert (after.owner_host, after.owner_pid) == (OWNER.host, OWNER.pid)


def test_no_generation_is_used_twice(bench: Bench) -> None:
    space = bench.space()
    used: set[int] = set()
    for _ in range(3):
        bench.put(space, 14)
        names = bench.world.disks[0].files()
        generations = {int(path[-12:-4], 16) for path in segments(names)}
        assert len(generations - used) >= 1
        used |= generations
        bench.reopen()
        space = bench.space()
    files, catalog = contents(bench)
    limit = fmt.decode_superblock(files[SUPERBLOCK], "").generation_limit
    assert max(used) < limit
    for path in segments(files):
        del files[path]  # as a crash or a careless hand may do
    world = opened(files, catalog)
    world.pool.namespace("s").put(bench.blocks(space, 1)[0], [bytes(4096)], durability="sync")
    fresh = {int(path[-12:-4], 16) for path in segments(world.disks[0].files())}
    assert not fresh & used
    world.discard()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pool_uuid": uuid.UUID(int=9)}, "belongs to another pool"),
        ({"device_uuid": uuid.UUID(int=9)}, "belongs to another pool"),
        ({"location": 77}, "copied or moved"),
        ({"owner_host": b"x" * 16}, "another host"),
    ],
)
def test_other_peoples_devices_are_refused(bench: Bench, change: dict, message: str) -> None:
    files, _ = contents(bench)
    superblock = fmt.decode_superblock(files[SUPERBLOCK], "")
    files[SUPERBLOCK] = fmt.encode_superblock(with_changes(superblock, **change))
    with pytest.raises(RefusedError, match=message):
        claim(files)
    if "uuid" not in next(iter(change)):
        claim(files, moved=True)


def test_a_device_closed_by_another_host_may_be_taken(bench: Bench) -> None:
    files, _ = contents(bench)
    superblock = fmt.decode_superblock(files[SUPERBLOCK], "")
    closed = with_changes(superblock, owner_host=b"x" * 16, owner_pid=0)
    files[SUPERBLOCK] = fmt.encode_superblock(closed)
    claim(files)


def test_a_device_without_superblock_is_no_device(bench: Bench) -> None:
    files, _ = contents(bench)
    with pytest.raises(CorruptionError, match="never formatted"):
        claim({path: raw for path, raw in files.items() if path != SUPERBLOCK})
    with pytest.raises(CorruptionError, match="superblock"):
        claim({**files, SUPERBLOCK: flipped(files[SUPERBLOCK], 100)})


# --- segments


def test_a_damaged_segment_is_set_aside_and_goes_by_eviction(
    bench: Bench, expected_warnings: list[str]
) -> None:
    expected_warnings.append("set aside")
    space = bench.space()
    bench.put(space, 13)
    keys = bench.put(space, 5)
    files, catalog = contents(bench)
    path = segments(files)[0]
    files[path] = flipped(files[path], SEGMENT_BYTES - PAGE + 40)
    world = opened(files, catalog)
    assert "checksum mismatch" in world.pool.recovery.problems[0]
    assert world.pool.namespace("s").match_prefix(keys) == 5
    assert world.pool.statistics().state == "degraded"
    space = world.pool.namespace("s")
    for i in range(12):
        more, _ = space.keys(list(range(i * 100, i * 100 + 52)))
        space.put(more, [bytes(4096)] * 13, durability="sync")
    assert path not in world.disks[0].files()
    check_engine(world.pool.store.state)
    world.discard()


def test_of_two_segments_on_a_slot_the_newer_stays(bench: Bench) -> None:
    space = bench.space()
    keys = bench.put(space, 3)
    files, catalog = contents(bench)
    path = segments(files)[0]
    old = files[path]
    bench.drop_space(space)
    space = bench.space()
    bench.world.pool.store.state.devices[0]._next_slot = 0
    newer = bench.put(space, 2)
    files, catalog = contents(bench)
    assert segments(files)[0][:17] == path[:17] != segments(files)[0]
    world = opened({**files, path: old}, catalog)
    assert world.pool.recovery.freed == 1
    assert path not in world.disks[0].files()
    found = read_blocks(world.pool, by_lease=False)
    assert found.keys() == {key.tobytes() for key in newer}
    assert not found.keys() & {key.tobytes() for key in keys}
    world.discard()


def test_segments_of_unknown_namespaces_are_freed(bench: Bench) -> None:
    before = bench.journal.last_commit()
    bench.put(bench.space(), 3)
    files, _ = contents(bench)
    world = opened(files, before)
    assert (world.pool.recovery.freed, world.pool.recovery.problems) == (1, [])
    assert not segments(world.disks[0].files())
    world.discard()


def test_a_segment_of_another_layout_is_not_served(
    bench: Bench, expected_warnings: list[str]
) -> None:
    expected_warnings.append("layout mismatch")
    keys = bench.put(bench.space(), 3)
    files, catalog = contents(bench)
    path = segments(files)[0]
    raw = files[path]
    header = fmt.decode_header(raw[-PAGE:], fmt.HeaderKind.OPEN, "")
    other = fmt.encode_header(with_changes(header, layout_digest=b"?" * 16))
    world = opened({**files, path: raw[:-PAGE] + other}, catalog)
    assert "layout mismatch" in world.pool.recovery.problems[0]
    assert world.pool.namespace("s").match_prefix(keys) == 0
    world.discard()


def test_a_file_loses_its_name_with_its_blocks_and_a_segment_with_its_name(bench: Bench) -> None:
    space = bench.space()
    bench.write_file(space, "kept", 30_000)
    bench.write_file(space, "broken", 30_000)
    bench.sync()
    files, catalog = contents(bench)
    broken = [path for path in segments(files) if path.endswith(".file")][1]
    del files[broken]
    world = opened(files, catalog)
    assert set(names_of(world.pool)) == {("s", ""), ("s", "kept")}
    assert world.pool.recovery.files_dropped == 1
    world.discard()
    bench.write_file(space, "new", 30_000)
    files, _ = contents(bench)
    world = opened(files, catalog)
    assert set(names_of(world.pool)) == {("s", ""), ("s", "kept"), ("s", "broken")}
    assert world.pool.recovery.freed == 1
    assert len([path for path in world.disks[0].files() if path.endswith(".file")]) == 2
    world.discard()


def test_staging_files_are_reaped(bench: Bench) -> None:
    bench.space()
    device = bench.pool.store.state.devices[0].device
    staging = device.create_staging("left-behind")
    device.write_staging(staging, 0, b"bytes")
    files, catalog = contents(bench)
    assert "staging/left-behind" in files
    world = opened(files, catalog)
    assert "staging/left-behind" not in world.disks[0].files()
    assert world.pool.store.state.devices[0].device.used_bytes == 0
    world.discard()


def test_what_was_put_after_the_last_persist_is_verified_before_it_is_served(bench: Bench) -> None:
    space = bench.space()
    bench.put(space, 2)
    keys = bench.put(space, 2, "async")
    files, catalog = contents(bench)
    path = segments(files)[0]
    torn = bytearray(files[path])
    torn[3 * PAGE : 3 * PAGE + 64] = bytes(64)
    world = opened({**files, path: bytes(torn)}, catalog)
    again = world.pool.namespace("s")
    assert again.match_prefix(keys) == 2, "its entry is there"
    out = np.zeros((2, 4096), np.uint8)
    assert again.read_into(keys, out).tolist() == [True, False]
    assert again.match_prefix(keys) == 1
    assert isinstance(world.disks[0], SimFileSystem)
    world.discard()


def test_a_crash_while_a_device_is_destroyed_leaves_a_whole_one_or_none(bench: Bench) -> None:
    space = bench.space()
    bench.put(space, 20)
    bench.write_file(space, "file", 30_000)
    bench.sync()
    before = bench.world.disks[0].files()
    start = bench.now
    bench.pool.store.state.devices[0].device.destroy()
    medium = bench.base
    for event in bench.journal.events[bench.start : start]:
        medium.apply(event)
    for event in [None, *bench.journal.events[start:]]:
        if event is not None:
            medium.apply(event)
        for choice in medium.choices("destroy", 20):
            files = medium.image(choice, 0, {}).disks[0]
            if SUPERBLOCK in files:
                assert before.items() <= files.items()
    assert not medium.image(choice, 0, {}).disks[0]
