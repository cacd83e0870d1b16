"""Random histories: any operation after any other, chosen by the seed."""

from collections.abc import Callable

import numpy as np

from kvfs.errors import BusyError, KvfsError, NoSpaceError
from kvfs.namespace import Context, Namespace
from tests.crash.bench import Bench
from tests.crash.world import LARGE, SMALL, Geometry
from tests.oracle import ContextValue, FileValue

GEOMETRIES = (Geometry((16,)), Geometry((6,)), Geometry((5, 5)), Geometry((6,), 6))
_STEPS = 14
_FILES = ("a", "b", "c")
_CONTEXTS = ("x", "y", "z")
Step = Callable[[], None]


class History:
    """Plays random operations on a bench."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.random = bench.random
        bench.may_evict = bench.world.geometry.is_small
        retention = self.random.choice(("cache", "cache", "durable"))
        self.spaces = [("s", SMALL, "cache"), ("t", self.random.choice((SMALL, LARGE)), retention)]
        self.steps: list[tuple[int, Step]] = [
            (6, self.put), (2, self.put_again), (3, self.append), (2, self.write_file),
            (1, self.remove_file), (2, self.rename), (1, self.drop_context), (1, self.pin),
            (3, self.bench.flush), (2, self.bench.sync), (1, self.bench.reopen), (2, self.read),
            (1, self.fail_sync), (1, self.drop_space),
        ]  # fmt: skip

    def play(self) -> None:
        for _ in range(_STEPS):
            weights = [weight for weight, _ in self.steps]
            step = self.random.choices([step for _, step in self.steps], weights)[0]
            try:
                step()
            except (NoSpaceError, BusyError):
                continue  # a full disk, or too much pinned, is a legal answer

    def space(self) -> Namespace:
        return self.bench.space(*self.random.choice(self.spaces))

    def keys(self, space: Namespace) -> np.ndarray:
        """Return some keys that were put into a namespace, as an array."""
        prefix = space.info.namespace_id.to_bytes(8, "little")
        known = [k for k in self.bench.oracle.blocks if k[:8] == prefix and k[24:] != b"kvfsfile"]
        chosen = self.random.sample(known, min(len(known), self.random.randint(1, 6)))
        return np.frombuffer(b"".join(chosen), np.uint8).reshape(-1, 32)

    def durability(self) -> str:
        return self.random.choice(("sync", "sync", "async", "none"))

    def put(self) -> None:
        partial = self.random.choice((0, 0, 1, 100, 4095))
        self.bench.put(self.space(), self.random.randint(1, 9), self.durability(), partial=partial)

    def put_again(self) -> None:
        space = self.space()
        keys = self.keys(space)
        if len(keys):
            self.bench.put_again(space, keys, self.durability())

    def read(self) -> None:
        space = self.space()
        keys = self.keys(space)
        if len(keys):
            self.bench.read(space, keys)

    def context(self, space: Namespace) -> Context | None:
        """Return a context by a name that no file has."""
        name = self.random.choice(_CONTEXTS)
        if isinstance(self.bench.oracle.value((space.info.name, name)), FileValue):
            return None
        return self.bench.context(space, name)

    def append(self) -> None:
        context = self.context(self.space())
        if context is None:
            return
        value = self.bench.oracle.value((context.namespace.info.name, context.name))
        if isinstance(value, ContextValue) and not value.is_pinned:
            durability = self.random.choice(("sync", "async"))
            self.bench.append(context, self.random.randint(1, 4), durability)

    def drop_context(self) -> None:
        context = self.context(self.space())
        if context is not None and not context.node.is_pinned:
            self.bench.drop_context(context)

    def pin(self) -> None:
        context = self.context(self.space())
        if context is not None:
            self.bench.set_pinned(context, is_pinned=not context.node.is_pinned)

    def write_file(self) -> None:
        space, name = self.space(), self.random.choice(_FILES)
        if isinstance(self.bench.oracle.value((space.info.name, name)), ContextValue):
            return
        nbytes = self.random.choice((0, 1, 4096, 7000, 16384, 16385, 30000, 50000))
        self.bench.write_file(space, name, nbytes, fsync=self.random.random() < 0.3)

    def remove_file(self) -> None:
        space, name = self.space(), self.random.choice(_FILES)
        path = (space.info.name, name)
        if path in self.bench.unpublished or isinstance(self.bench.oracle.value(path), FileValue):
            self.bench.remove_file(space, name)

    def rename(self) -> None:
        space = self.space()
        names = _FILES if self.random.random() < 0.7 else _CONTEXTS
        source, target = self.random.sample(names, 2)
        path = (space.info.name, source)
        if path in self.bench.unpublished or self.bench.oracle.value(path) is not None:
            self.bench.rename(space, source, target)

    def fail_sync(self) -> None:
        self.random.choice(self.bench.world.disks).failing_syncs = 1
        try:
            if self.random.random() < 0.5:
                self.bench.put_failing(self.space(), 2)
            else:
                self.bench.flush_failing()
        except KvfsError:
            pass
        for disk in self.bench.world.disks:
            disk.failing_syncs = 0

    def drop_space(self) -> None:
        self.bench.drop_space(self.space())


def play(bench: Bench) -> None:
    """Play one random history."""
    History(bench).play()
