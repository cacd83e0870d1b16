"""The operations that scenarios are made of, each reported to the oracle.

An operation tells the oracle when it began and, where it promises durability, when it was
acknowledged. Everything is deterministic: ids, contents and times come from the seed.
"""

import contextlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np

from kvfs.config import PoolOptions
from kvfs.engine.reader import Lease
from kvfs.errors import DeviceError, KvfsError
from kvfs.keys import KEY_BYTES, NO_PARENT
from kvfs.layout import Layout
from kvfs.namespace import Context, Namespace
from kvfs.tree import Tree
from tests.crash.events import Journal
from tests.crash.medium import Medium
from tests.crash.verify import check_world
from tests.crash.world import (
    SEGMENT_BYTES,
    SMALL,
    Geometry,
    World,
    file_names,
    files_of,
    names_of,
    resident_keys,
)
from tests.oracle import ContextValue, FileValue, NamespaceValue, Oracle, Path

_MILLISECOND = 1_000_000
_FILE_TAG = b"kvfsfile"
_LARGE_FILE = SEGMENT_BYTES // 4


class Bench:
    """One pool, one oracle, one journal."""

    def __init__(
        self, seed: str, geometry: Geometry | None = None, options: PoolOptions | None = None
    ) -> None:
        """Make a new pool; `base` is the medium before the first operation."""
        self.random = random.Random(seed)
        self.seed = seed
        self.oracle = Oracle()
        geometry = geometry or Geometry()
        self.journal = Journal(geometry.kinds)
        self.world = World(geometry, journal=self.journal)
        if options is not None:
            self.world.options = options
        self.may_evict = False
        self.spaces = 0
        self.written: set[bytes] = set()
        self.unpublished: dict[Path, FileValue] = {}
        self.publishing: set[Path] = set()
        self.world.format()
        self.start = len(self.journal)
        self.base = Medium.replay(self.journal)

    @property
    def now(self) -> int:
        """The present position in the journal."""
        return len(self.journal)

    @property
    def pool(self) -> Any:
        return self.world.pool

    @contextmanager
    def operation(self, *, may_drop: bool = False, may_lose: bool = False) -> Iterator[int]:
        """Run one operation; note what it dropped. Yields where in the journal it began.

        `may_drop`: it may drop blocks of files, by replacing or removing them. `may_lose`: any.
        """
        begin = self.now
        self.world.clock.advance(_MILLISECOND)
        before, files = resident_keys(self.pool), file_names(self.pool)
        try:
            yield begin
        finally:
            lost = before - resident_keys(self.pool)
            expected = may_lose or self.may_evict
            others = lost if not may_drop else {key for key in lost if key[24:] != _FILE_TAG}
            assert expected or not others, f"{len(others)} blocks were dropped"
            assert may_lose or not lost & self._protected(), "protected blocks were dropped"
            self.oracle.release(lost, begin)
            for path, keys in files_of(self.pool).items() if lost else ():
                if not lost.isdisjoint(keys) and self.oracle.value(path) is not None:
                    self.oracle.evict(path, begin)
            for path in (files | self.publishing) - file_names(self.pool):
                if self.oracle.value(path) is not None:
                    assert expected, f"file {path} lost its name"
                    self.oracle.assign(path, None, begin)
            self.publishing.clear()

    def _protected(self) -> set[bytes]:
        """Return the blocks that eviction must spare: pinned, or named in a durable namespace."""
        durable = {
            path[0]
            for path in self.oracle.names
            if isinstance(value := self.oracle.value(path), NamespaceValue)
            and value.retention == "durable"
        }
        found: set[bytes] = set()
        for path in self.oracle.names:
            value = self.oracle.value(path)
            if isinstance(value, ContextValue) and (value.is_pinned or path[0] in durable):
                found.update(value.keys)
        return found

    # --- namespaces

    def space(self, name: str = "s", layout: Layout = SMALL, retention: str = "cache") -> Namespace:
        """Make a namespace, its id from the seed, or return it."""
        if self.oracle.value((name, "")) is not None:
            return self.pool.namespace(name)
        with self.operation() as begin:
            self.spaces += 1
            number = random.Random(f"{self.seed}/{self.spaces}").getrandbits(62) | 1
            self.oracle.assign((name, ""), NamespaceValue(number, retention), begin)
            with mock.patch("kvfs.pool.new_namespace_id", return_value=number):
                space = self.pool.namespace(name, layout, retention=retention)
        self.oracle.settle_names(self.now)
        return space

    def drop_space(self, space: Namespace) -> None:
        """Destroy a namespace with all that is in it."""
        name = space.info.name
        with self.operation(may_lose=True) as begin:
            for path in [p for p in self.oracle.names if p[0] == name]:
                self.oracle.assign(path, None, begin)
            for path in [p for p in self.unpublished if p[0] == name]:
                del self.unpublished[path]
            self.pool.drop_namespace(name)
        self.oracle.settle_names(self.now)

    # --- blocks

    def blocks(
        self, space: Namespace, count: int, parent: bytes = NO_PARENT, partial: int = 0
    ) -> tuple[np.ndarray, np.ndarray, list[bytes]]:
        """Make keys, parents and payloads; the last block has `partial` bytes if that is not 0."""
        tokens = [self.random.getrandbits(31) for _ in range(count * space.layout.block_tokens)]
        keys, parents = space.keys(tokens, parent)
        payloads = [self.random.randbytes(space.layout.block_bytes) for _ in range(count)]
        if partial:
            payloads[-1] = payloads[-1][:partial]
        return keys, parents, payloads

    def put(
        self, space: Namespace, count: int = 1, durability: str = "sync", *,
        parent: bytes = NO_PARENT, partial: int = 0,
    ) -> np.ndarray:  # fmt: skip
        """Put new blocks, a chain."""
        keys, parents, payloads = self.blocks(space, count, parent, partial)
        self.put_given(space, keys, parents, payloads, durability)
        return keys

    def put_given(
        self, space: Namespace, keys: Any, parents: Any, payloads: list[bytes], durability: str
    ) -> None:
        """Put blocks that were made before."""
        with self.operation() as begin:
            for key, payload in zip(keys, payloads, strict=True):
                self.oracle.offer(key.tobytes(), payload, begin)
            space.put(keys, payloads, parents=parents, durability=durability)
            self.written.update(key.tobytes() for key in keys)
        if durability == "sync":
            self._promise({key.tobytes() for key in keys})

    def put_again(self, space: Namespace, keys: np.ndarray, durability: str) -> None:
        """Put blocks that were put before; dropped ones are written again."""
        payloads = [self.oracle.blocks[key.tobytes()].payload for key in keys]
        self.put_given(space, keys, None, payloads, durability)

    def flush(self) -> None:
        """Persist all blocks and publish new files."""
        with self.operation(may_drop=True) as begin:
            self._publish(begin)
            self.pool.flush()
        self._promise_resident()

    def sync(self) -> None:
        """Persist everything."""
        with self.operation(may_drop=True) as begin:
            self._publish(begin)
            self._report_lost()
            self.pool.sync()
        self._promise_resident()
        self.oracle.settle_names(self.now)

    def flush_failing(self) -> None:
        """Persist all blocks while a device fails; what was not persisted is gone."""
        with self.operation(may_lose=True) as begin:
            try:
                self.pool.flush()
            except KvfsError:
                self._forget_broken()
                raise
            self._publish(begin)

    def put_failing(self, space: Namespace, count: int) -> None:
        """Put while a device fails."""
        with self.operation(may_lose=True) as begin:
            keys, parents, payloads = self.blocks(space, count)
            for key, payload in zip(keys, payloads, strict=True):
                self.oracle.offer(key.tobytes(), payload, begin)
            try:
                space.put(keys, payloads, parents=parents, durability="sync")
            finally:
                self._forget_broken()

    def _forget_broken(self) -> None:
        """Forget new content of files that lost a block before it was published."""
        for path in list(self.unpublished):
            root = self.pool.catalog.namespace_by_name(path[0]).root_node_id
            node = self.pool.catalog.resolve(root, path[1])
            if node is None or not self.pool.files.awaits_content(node.node_id):
                del self.unpublished[path]

    def _report_lost(self) -> None:
        """Let `sync` say what earlier failures took, as it does once."""
        with contextlib.suppress(DeviceError):
            self.pool.sync()

    def read(self, space: Namespace, keys: np.ndarray) -> int:
        """Read blocks; those that are there must be right. Return how many."""
        out = np.zeros((len(keys), space.layout.stride), np.uint8)
        with self.operation():
            done = space.read_into(keys, out)
        for i in np.flatnonzero(done):
            payload = self.oracle.blocks[keys[i].tobytes()].payload
            assert out[i].tobytes()[: len(payload)] == payload
        return int(done.sum())

    def lease(self, space: Namespace, keys: np.ndarray) -> Lease:
        """Hold blocks; give back with `release`."""
        return self.pool.store.lease(space.info.namespace_id, keys)

    def release(self, lease: Lease) -> None:
        """End a lease, which may give back a segment."""
        self.pool.store.release(lease)

    # --- contexts

    def context(self, space: Namespace, name: str) -> Context:
        """Return a context, made if it is not there."""
        with self.operation() as begin:
            path = (space.info.name, name)
            if self.oracle.value(path) is None:
                self.oracle.assign(path, ContextValue((), ()), begin)
            return space.context(name)

    def append(
        self, context: Context, count: int, durability: str = "sync", *,
        keys: np.ndarray | None = None,
    ) -> np.ndarray:  # fmt: skip
        """Append new blocks, or blocks that were put before."""
        space = context.namespace
        path = (space.info.name, context.name)
        before = self.oracle.value(path)
        assert isinstance(before, ContextValue)
        with self.operation() as begin:
            if keys is None:
                parent = before.keys[-1] if before.keys else NO_PARENT
                keys, _, payloads = self.blocks(space, count, parent)
            else:
                payloads = [self.oracle.blocks[key.tobytes()].payload for key in keys]
            assert keys.shape[1] == KEY_BYTES
            names = tuple(key.tobytes() for key in keys)
            tokens = tuple(self.random.getrandbits(31) for _ in range(4 * len(keys)))
            for key, payload in zip(names, payloads, strict=True):
                self.oracle.offer(key, payload, begin)
            value = ContextValue(
                before.keys + names, (before.tokens or ()) + tokens, before.is_pinned
            )
            self.oracle.assign(path, value, begin)
            context.append(keys, payloads, tokens=tokens, durability=durability)
            self.written.update(names)
        if durability == "sync":
            self._promise(set(names))
            self.oracle.settle_names(self.now)
        return keys

    def drop_context(self, context: Context) -> None:
        """Remove a context's name; its blocks stay."""
        with self.operation() as begin:
            self.oracle.assign((context.namespace.info.name, context.name), None, begin)
            context.drop()

    def set_pinned(self, context: Context, *, is_pinned: bool) -> None:
        """Pin or unpin a context."""
        with self.operation() as begin:
            path = (context.namespace.info.name, context.name)
            before = self.oracle.value(path)
            assert isinstance(before, ContextValue)
            self.oracle.assign(path, ContextValue(before.keys, before.tokens, is_pinned), begin)
            (context.pin if is_pinned else context.unpin)()

    def rename(self, space: Namespace, source: str, target: str) -> None:
        """Rename a context or file, over whatever is there, as the mount does."""
        root = space.info.root_node_id
        old, new = (space.info.name, source), (space.info.name, target)
        with self.operation(may_drop=True) as begin:
            if self.oracle.value(new) is not None and old in self.unpublished:
                self._publish(begin)  # what gives way goes only when what comes is there to stay
            self.unpublished.pop(new, None)
            if old in self.unpublished:
                self.unpublished[new] = self.unpublished.pop(old)
            if self.oracle.value(old) is not None:
                self.oracle.rename(old, new, begin)
            Tree(self.pool).rename(root, source, root, target, replace=True)

    # --- files

    def write_file(
        self, space: Namespace, name: str, nbytes: int, *, fsync: bool = False, parts: int = 2
    ) -> None:
        """Write a file whole, as the mount does: staged, adopted when the last writer closes it."""
        catalog, files = self.pool.catalog, self.pool.files
        root, path = space.info.root_node_id, (space.info.name, name)
        content = self.random.randbytes(nbytes)
        with self.operation(may_drop=True) as begin:
            node = catalog.resolve(root, name)
            if node is None:
                node = Tree(self.pool).create_file(root, name, 0o644, 0, 0)
            if 0 < nbytes <= (_LARGE_FILE if self.world.geometry.takes_files else nbytes):
                self.unpublished[path] = FileValue(content)
            else:
                self.unpublished.pop(path, None)
                self.oracle.assign(path, FileValue(content), begin)
            handle = files.open_write(node, truncate=True)
            step = -(-nbytes // parts) or 1
            for offset in range(0, nbytes, step):
                files.write(handle, offset, content[offset : offset + step])
            if fsync:
                files.fsync(handle)
            files.close_write(handle)
            stride = space.layout.stride
            for i, key in enumerate(files.resident(node)[0]):
                self.oracle.offer(key.tobytes(), content[i * stride : (i + 1) * stride], begin)

    def make_raw(self, space: Namespace, name: str, nbytes: int | None = None) -> None:
        """Make a raw file of so many bytes, the first half of them written; None: of one there."""
        tree, files = Tree(self.pool), self.pool.files
        root, path = space.info.root_node_id, (space.info.name, name)
        with self.operation(may_drop=True) as begin:
            if nbytes is None:
                self._publish(begin)
                node = self.pool.catalog.resolve(root, name)
                tree.set_attribute(node, b"user.kvfs.raw", b"1")
                return
            content = self.random.randbytes(nbytes // 2)
            self.oracle.assign(path, FileValue(content.ljust(nbytes, b"\0")), begin)
            node = tree.create_file(root, name, 0o644, 0, 0)
            handle = files.open_write(node, truncate=True)
            tree.set_attribute(node, b"user.kvfs.raw", b"1")
            files.write(handle, 0, content)
            files.truncate(handle, nbytes)
            files.close_write(handle)
            assert node.node_id in files.raws

    def write_raw(self, space: Namespace, name: str, offset: int, nbytes: int = 48) -> None:
        """Write into a raw file in place, less than is ever torn, and sync it."""
        assert offset % 64 + nbytes <= 64
        files, path = self.pool.files, (space.info.name, name)
        data = self.random.randbytes(nbytes)
        with self.operation() as begin:
            before = self.oracle.value(path)
            assert isinstance(before, FileValue)
            content = bytearray(before.content)
            assert offset + nbytes <= len(content), "a size may survive without its bytes"
            content[offset : offset + nbytes] = data
            self.oracle.assign(path, FileValue(bytes(content)), begin)
            node = self.pool.catalog.resolve(space.info.root_node_id, name)
            handle = files.open_write(node, truncate=False)
            files.write(handle, offset, data)
            files.fsync(handle)
            files.close_write(handle)
        self.oracle.settle_names(self.now)

    def remove_file(self, space: Namespace, name: str) -> None:
        """Remove a file's name and blocks."""
        path = (space.info.name, name)
        with self.operation(may_drop=True) as begin:
            self.unpublished.pop(path, None)
            if self.oracle.value(path) is not None:
                self.oracle.assign(path, None, begin)
            Tree(self.pool).remove_file(space.info.root_node_id, name)

    def _promise_resident(self) -> None:
        """What this process put is durable now, if nothing dropped it since.

        Not what it found at opening and did not verify; nor files' blocks, which stand and fall
        with their names.
        """
        self.oracle.promise(self.written & resident_keys(self.pool), self.now)

    def _promise(self, keys: set[bytes]) -> None:
        """These were put durably. In a full pool some may have been evicted by the rest."""
        resident = resident_keys(self.pool)
        assert self.may_evict or keys <= resident, "an acknowledged block is not there"
        self.oracle.promise(keys & resident, self.now)

    def _publish(self, begin: int) -> None:
        for path, value in self.unpublished.items():
            self.oracle.assign(path, value, begin)
        self.publishing |= self.unpublished.keys()
        self.unpublished.clear()

    # --- life

    def reopen(self) -> None:
        """Close cleanly and open again."""
        with self.operation(may_drop=True) as begin:
            self._publish(begin)
            self._report_lost()
            before = resident_keys(self.pool)
            self.pool.close()
            self.world._pool = None
            self.oracle.settle_names(self.now)
            self.world.open(self.journal.last_commit())
            self.written &= before
        self._promise_resident()

    def crash(self, seed: int) -> None:
        """Cut the power, open what that may have left, and compare; go on from there."""
        medium = Medium.replay(self.journal)
        choice, catalog = medium.random_choice(random.Random(seed))
        image = medium.image(choice, catalog, {})
        position, options = self.now, self.world.options
        self.close()
        self.journal = Journal(self.world.geometry.kinds, image.disks, image.catalog)
        self.start, self.base = 0, Medium.of(self.journal)
        clock = self.world.clock
        self.world = World(self.world.geometry, options, clock, self.journal)
        self.world.recover(image.disks, image.catalog)
        found = check_world(self.world, self.oracle, position, by_lease=False)
        self.oracle.restart(found, names_of(self.pool))
        self.written.clear()
        self.unpublished.clear()

    def close(self) -> None:
        """Let go of everything; nothing is flushed."""
        self.world.discard()
