"""Recovering from an image and comparing what is found with the oracle."""

import ctypes
import os

import numpy as np

from kvfs import _native
from kvfs.devices.base import Device, Segment
from kvfs.engine.catalog import Catalog
from kvfs.engine.checker import Severity, check_devices
from kvfs.pool import Pool
from kvfs.units import PAGE
from tests.crash.events import Journal
from tests.crash.medium import Image
from tests.crash.world import Geometry, World, names_of
from tests.invariants import check_engine
from tests.oracle import NamespaceValue, Oracle

_STRIDE_MAX = 16 << 10
_SOUND: set[bytes] = set()
Found = dict[bytes, bytes]


def recover(image: Image, geometry: Geometry, journal: Journal | None = None) -> World:
    """Open what a power cut left, a second after it."""
    world = World(geometry, journal=journal)
    world.clock.advance(3_600_000_000_000)
    try:
        world.recover(image.disks, image.catalog)
    except BaseException:
        world.discard()
        raise
    return world


def read_blocks(pool: Pool, *, by_lease: bool) -> Found:
    """Read all that the index knows: by verified copies, or in place under a verified lease."""
    found: Found = {}
    for namespace_id, index in pool.store.state.indexes.items():
        keys = np.unique(index.snapshot()["key"], axis=0)
        if not len(keys):
            continue
        if by_lease:
            found.update(_read_leased(pool, namespace_id, keys))
        else:
            found.update(_read_copied(pool, namespace_id, keys))
    return found


def _read_copied(pool: Pool, namespace_id: int, keys: np.ndarray) -> Found:
    lengths = pool.store.lookup(namespace_id, keys)["length"]
    out = np.zeros((len(keys), _STRIDE_MAX), np.uint8)
    base = out.ctypes.data
    addresses = base + np.arange(len(keys), dtype=np.uint64) * np.uint64(_STRIDE_MAX)
    room = np.full(len(keys), _STRIDE_MAX, np.uint64)
    done = pool.store.read_into(namespace_id, keys, addresses, room)
    return {keys[i].tobytes(): out[i, : lengths[i]].tobytes() for i in np.flatnonzero(done)}


def _read_leased(pool: Pool, namespace_id: int, keys: np.ndarray) -> Found:
    """Read through the descriptors that views map, or where the owner has it mapped."""
    lease = pool.store.lease(namespace_id, keys)
    try:
        handles = {
            (s.handle.device_index, s.handle.slot, s.handle.generation): s.handle
            for s in lease.segments
        }
        found = {}
        for record in lease.records:
            nbytes = int(record["length"])
            if nbytes:
                place = (int(record["device"]), int(record["segment"]), int(record["generation"]))
                found[record["key"].tobytes()] = _bytes_of(
                    handles[place], int(record["page"]) * PAGE, nbytes
                )
        return found
    finally:
        pool.store.release(lease)


def _bytes_of(handle: Segment, offset: int, nbytes: int) -> bytes:
    if handle.fd >= 0:
        return os.pread(handle.fd, nbytes, offset)
    return ctypes.string_at(handle.address + offset, nbytes)


def check_crashed(image: Image, geometry: Geometry) -> None:
    """`kvfs-admin check` must take what a power cut leaves for what it is, before any recovery."""
    world = World(geometry)
    world.restore(image.disks)
    devices, catalog = world.open_parts(image.catalog)
    try:
        check_medium(devices, catalog)
    finally:
        for device in devices:
            device.close()
        catalog.close()
        world.discard()


def check_repaired(image: Image, geometry: Geometry, oracle: Oracle, position: int) -> None:
    """`kvfs-admin check --repair` on what a power cut left must lose nothing acknowledged."""
    world = World(geometry)
    world.restore(image.disks)
    devices, catalog = world.open_parts(image.catalog)
    try:
        check_devices(devices, catalog, repair=True)
        repaired = catalog._connection.serialize()
    finally:
        for device in devices:
            device.close()
        catalog.close()
    try:
        world.open(repaired)
        check_world(world, oracle, position, by_lease=False)
    finally:
        world.discard()


def check_medium(devices: list[Device], catalog: Catalog) -> None:
    """`kvfs-admin check` must find nothing but what the next opening puts right by itself.

    The catalog's own check is a function of its bytes: bytes that passed are not checked again.
    """
    digest = _native.xxh3_128(catalog._connection.serialize())
    if digest in _SOUND:
        catalog.check = list  # type: ignore[method-assign]
    report = check_devices(devices, catalog)
    _SOUND.add(digest)
    bad = [str(finding) for finding in report.findings if finding.severity > Severity.NOTE]
    assert not bad, "; ".join(bad)


def check_world(
    world: World, oracle: Oracle, position: int, *, by_lease: bool, checks: bool = True
) -> Found:
    """Compare a recovered pool with the oracle; return the blocks found.

    A power cut alone must leave nothing that recovery has to complain about.
    """
    pool = world.pool
    assert not pool.recovery.problems, pool.recovery.problems
    check_engine(pool.store.state)
    if checks:
        check_medium([state.device for state in pool.store.state.devices], pool.catalog)
    oracle.check_names(names_of(pool), position)
    found = read_blocks(pool, by_lease=by_lease)
    oracle.check_blocks(found, position)
    if by_lease:  # bad blocks were dropped meanwhile
        check_engine(pool.store.state)
    assert all(not s.leases for d in pool.store.state.devices for s in d.segments.values())
    return found


def check_goes_on(world: World, rng_seed: int) -> None:
    """The pool must go on working: a sync put, a kill, and the block is there."""
    rng = np.random.default_rng(rng_seed)
    pool = world.pool
    for path, value in names_of(pool).items():
        if path[1] == "" and isinstance(value, NamespaceValue):
            space = pool.namespace(path[0])
            break
    else:
        return
    keys, parents = space.keys(rng.integers(1 << 31, size=space.layout.block_tokens))
    payload = rng.integers(256, size=space.layout.block_bytes, dtype=np.uint8)
    before = set(read_blocks(pool, by_lease=False))
    space.put(keys, payload[None, :], parents=parents, durability="sync")
    after = set(read_blocks(pool, by_lease=False))
    image = pool.catalog._connection.serialize()
    world.abandon()
    world.open(image)
    found = read_blocks(world.pool, by_lease=True)
    assert found.pop(keys[0].tobytes()) == payload.tobytes(), "a sync put did not survive"
    dropped = before - after  # the put may have evicted
    assert before - dropped <= found.keys(), "blocks were lost at the second opening"
    check_engine(world.pool.store.state)


def check_image(
    image: Image,
    geometry: Geometry,
    oracle: Oracle,
    position: int,
    *,
    checks: bool = True,
    goes_on: bool = False,
) -> None:
    """Recover from an image and check everything."""
    world = recover(image, geometry)
    try:
        by_lease = bool(image.digest[0] & 1)
        check_world(world, oracle, position, by_lease=by_lease, checks=checks)
        if goes_on:
            check_goes_on(world, int.from_bytes(image.digest[:4], "little"))
    finally:
        world.discard()
