"""The whole store against the oracle: any operation after any other, crashes and faults too."""

import contextlib
import os
from typing import Any

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from kvfs.errors import BusyError, DeviceError, NoSpaceError, PoisonedError
from kvfs.keys import NO_PARENT
from kvfs.units import PAGE
from tests.crash.bench import Bench
from tests.crash.world import LARGE, SMALL, Geometry
from tests.invariants import check_engine
from tests.oracle import ContextValue, FileValue

_FULL = (NoSpaceError, BusyError)
_FAILED = (DeviceError, PoisonedError, NoSpaceError)
GEOMETRIES = st.sampled_from((Geometry((6,)), Geometry((5, 5)), Geometry((6,), 6)))
DURABILITIES = st.sampled_from(("none", "async", "sync"))
NAMES = st.sampled_from(("x", "y", "z"))
SPACES = st.sampled_from((("s", SMALL, "cache"), ("t", LARGE, "cache"), ("d", SMALL, "durable")))


class StoreMachine(RuleBasedStateMachine):
    """`chains` are keys put together, with the name of their namespace."""

    chains = Bundle("chains")

    def __init__(self) -> None:
        super().__init__()
        self.bench: Bench | None = None
        self.leases: list[tuple[Any, dict[bytes, bytes]]] = []

    @initialize(geometry=GEOMETRIES, seed=st.integers(0, 2**32))
    def make_pool(self, geometry: Geometry, seed: int) -> None:
        self.bench = Bench(f"{seed}", geometry)
        self.bench.may_evict = True

    def teardown(self) -> None:
        if self.bench is not None:
            self.release_all()
            self.bench.close()

    def release_all(self) -> None:
        while self.leases:
            self._release(0)

    # --- blocks

    @rule(target=chains, space=SPACES, count=st.integers(1, 9), durability=DURABILITIES,
          partial=st.sampled_from((0, 0, 1, 4095)))  # fmt: skip
    def put(self, space, count, durability, partial):
        namespace = self.bench.space(*space)
        try:
            return space, self.bench.put(namespace, count, durability, partial=partial)
        except _FULL:
            return space, np.zeros((0, 32), np.uint8)

    @rule(target=chains, chain=chains, count=st.integers(1, 4), durability=DURABILITIES)
    def put_children(self, chain, count, durability):
        space, keys = chain
        namespace = self.bench.space(*space)
        prefix = namespace.info.namespace_id.to_bytes(8, "little")
        parent = keys[-1].tobytes() if len(keys) and keys[-1].tobytes()[:8] == prefix else NO_PARENT
        try:
            return space, self.bench.put(namespace, count, durability, parent=parent)
        except _FULL:
            return space, np.zeros((0, 32), np.uint8)

    @rule(chain=chains, durability=DURABILITIES)
    def put_again(self, chain, durability):
        namespace, keys = self._own(chain)
        if len(keys):
            with contextlib.suppress(*_FULL):
                self.bench.put_again(namespace, keys, durability)

    @rule(chain=chains)
    def read(self, chain):
        namespace, keys = self._own(chain)
        if len(keys):
            self.bench.read(namespace, keys)

    @rule(chain=chains)
    def match_prefix(self, chain):
        namespace, keys = self._own(chain)
        count = namespace.match_prefix(keys)
        found = namespace.lookup(keys)["length"] > 0
        assert count == (len(keys) if found.all() else int(np.argmin(found)))

    @rule(chain=chains)
    def hold(self, chain):
        namespace, keys = self._own(chain)
        if len(keys):
            blocks = self.bench.oracle.blocks
            payloads = {key.tobytes(): blocks[key.tobytes()].payload for key in keys}
            self.leases.append((self.bench.lease(namespace, keys), payloads))

    @rule(number=st.integers(0, 9))
    def release(self, number):
        if self.leases:
            self._release(number % len(self.leases))

    def _release(self, number: int) -> None:
        """Bytes under a lease must not have changed, whatever was evicted meanwhile."""
        lease, payloads = self.leases.pop(number)
        fds = {(s.handle.device_index, s.handle.slot): s.handle.fd for s in lease.segments}
        for record in lease.records[lease.records["length"] > 0]:
            fd = fds[int(record["device"]), int(record["segment"])]
            raw = os.pread(fd, int(record["length"]), int(record["page"]) * PAGE)
            assert raw == payloads[record["key"].tobytes()]
        self.bench.release(lease)

    @rule()
    def flush(self):
        self.bench.flush()

    @rule()
    def sync(self):
        self.bench.sync()

    # --- names

    @rule(space=SPACES, name=NAMES, count=st.integers(1, 4),
          durability=st.sampled_from(("async", "sync")))  # fmt: skip
    def append(self, space, name, count, durability):
        context = self._context(space, name)
        if context is not None and not context.node.is_pinned:
            with contextlib.suppress(*_FULL):
                self.bench.append(context, count, durability)

    @rule(space=SPACES, name=NAMES)
    def drop(self, space, name):
        context = self._context(space, name)
        if context is not None and not context.node.is_pinned:
            self.bench.drop_context(context)

    @rule(space=SPACES, name=NAMES)
    def pin(self, space, name):
        context = self._context(space, name)
        if context is not None:
            with contextlib.suppress(BusyError):
                self.bench.set_pinned(context, is_pinned=not context.node.is_pinned)

    @rule(space=SPACES, name=NAMES, nbytes=st.sampled_from((0, 100, 9000, 16385, 40000)))
    def write_file(self, space, name, nbytes):
        if not isinstance(self.bench.oracle.value((space[0], f"f{name}")), ContextValue):
            with contextlib.suppress(*_FULL):
                self.bench.write_file(self.bench.space(*space), f"f{name}", nbytes)

    @rule(space=SPACES, name=NAMES)
    def remove_file(self, space, name):
        path = (space[0], f"f{name}")
        value = self.bench.oracle.value(path)
        if isinstance(value, FileValue) or path in self.bench.unpublished:
            self.bench.remove_file(self.bench.space(*space), f"f{name}")

    @rule(space=SPACES)
    def drop_space(self, space):
        if self.bench.oracle.value((space[0], "")) is not None and not self.leases:
            self.bench.drop_space(self.bench.space(*space))

    # --- faults and ends

    @rule(disk=st.integers(0, 1), syncs=st.integers(0, 2), writes=st.integers(0, 2), space=SPACES)
    def fail(self, disk, syncs, writes, space):
        """Let some of the next syncs and writes of a disk fail."""
        namespace = self.bench.space(*space)
        files = self.bench.world.disks[disk % len(self.bench.world.disks)]
        files.failing_syncs, files.failing_writes = syncs, writes
        try:
            with contextlib.suppress(*_FAILED):
                self.bench.put_failing(namespace, 3)
            with contextlib.suppress(*_FAILED):
                self.bench.flush_failing()
        finally:
            files.failing_syncs = files.failing_writes = 0

    @rule()
    def reopen(self):
        self.release_all()
        self.bench.reopen()

    @rule(seed=st.integers(0, 2**32))
    def crash(self, seed):
        self.release_all()
        self.bench.crash(seed)

    @invariant()
    def tables_agree(self):
        if self.bench is not None:
            check_engine(self.bench.pool.store.state)

    # --- internals

    def _own(self, chain):
        """Return the namespace and those keys that belong to its present life."""
        space, keys = chain
        namespace = self.bench.space(*space)
        prefix = namespace.info.namespace_id.to_bytes(8, "little")
        mine = [key for key in keys if key.tobytes()[:8] == prefix]
        return namespace, np.array(mine, np.uint8).reshape(-1, 32)

    def _context(self, space, name):
        return self.bench.context(self.bench.space(*space), name)


StoreMachine.TestCase.settings = settings(
    max_examples=80, stateful_step_count=30, deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip
TestStore = StoreMachine.TestCase
