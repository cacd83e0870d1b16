"""The pool: where devices, engine, catalog and background work are put together.

Layer: L4.

- One process owns an open pool. A second opener becomes its client (`kvfs.opening`) if the owner
  serves it (`clients.server`), and gets BusyError with the owner's pid if not.
- Open: lock, catalog, devices (claimed one by one), all summaries, then names are reconciled with
  blocks: files whose blocks are gone lose their names, file segments without a name are freed.
- Close: new files are published, everything is flushed, superblocks note the clean end.

Directory of a pool: `catalog.sqlite` (and its -wal, -shm), `lock`, `control.sock`, `clients.sock`.
"""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

from kvfs.background import Background
from kvfs.clock import Clock
from kvfs.config import PoolOptions
from kvfs.engine.catalog import Catalog
from kvfs.engine.catalog_schema import (
    DEADLINE_ATTRIBUTE,
    ROOT_NODE_ID,
    NamespaceInfo,
    Node,
    NodeKind,
    NodeState,
    Origin,
    Retention,
    checked_deadline_ms,
)
from kvfs.engine.device_state import DeviceState, NamespaceSpec
from kvfs.engine.recovery import (
    RecoveryReport,
    reap_unnamed_files,
)
from kvfs.engine.state import EngineState
from kvfs.engine.store import Store
from kvfs.errors import (
    BusyError,
    ClosedError,
    DeviceError,
    ExistsError,
    NotFoundError,
    RefusedError,
    UsageError,
)
from kvfs.files import Files
from kvfs.keys import KeyArray, new_namespace_id
from kvfs.layout import OPAQUE, Layout
from kvfs.local import LocalBackend
from kvfs.metrics import LossListener, LossReports
from kvfs.namespace import Namespace
from kvfs.pins import Pins
from kvfs.statistics import PoolStatistics
from kvfs.units import format_bytes

if TYPE_CHECKING:
    from kvfs.backend import Backend

CATALOG_NAME: Final = "catalog.sqlite"
CONTROL_NAME: Final = "control.sock"
CLIENTS_NAME: Final = "clients.sock"
DEFAULT_NAMESPACE: Final = "default"
SEGMENTS_MIN: Final = 4
_log = logging.getLogger("kvfs.pool")


class _CatalogNames:
    """What eviction asks of the catalog."""

    def __init__(
        self, catalog: Catalog, awaits_content: Callable[[int], bool], clock: Clock
    ) -> None:
        self._catalog = catalog
        self._awaits_content = awaits_content
        self._clock = clock

    def reachable_keys(self, namespace_id: int) -> Iterable[KeyArray]:
        """Yield the keys that names of the namespace reach."""
        return self._catalog.durable_keys(namespace_id)

    def forget_files(self, lost: KeyArray) -> list[KeyArray]:
        """Remove the names of files that need one of these keys; return all keys of each.

        A file that is being written again keeps its name, for the content to come.
        """
        keys, now = [], self._clock.wall_ns()
        with self._catalog.transaction():
            for node_id in self._catalog.files_reaching(lost):
                keys.append(self._catalog.keys(node_id))
                if self._awaits_content(node_id):
                    self._catalog.clear_content(node_id, now)
                else:
                    self._catalog.remove(node_id, now)
        return keys


class Pool:
    """An open pool, owned by this process. Thread-safe. Use as a context manager, or call `close`.

    Attributes:
        path: The pool's directory.
        uuid: Its identity.
        catalog: Names (for kvfs's own layers).
        store: Blocks (for kvfs's own layers).
        files: Files on the mount (for kvfs's own layers).
        pins: Pinned contexts (for kvfs's own layers).
        losses: Who has heard of lost blocks.
        backend: What namespaces, contexts and views of it use.
        recovery: What opening found.
        deadlines_ms: Longest that requests of a mount may take, of namespaces by id that have a
            limit of their own; see `set_deadline`.
        mount_snapshot: How the mount is that shows the pool, in figures; None without one.
        mount_turn: Returns once the mount's loop has taken a turn, or ended; None without one.
    """

    def __init__(
        self,
        path: Path,
        catalog: Catalog,
        devices: Sequence[DeviceState],
        *,
        options: PoolOptions,
        clock: Clock,
        lock_fd: int = -1,
    ) -> None:
        """Put an opened catalog and claimed devices together; see create_pool and open_pool."""
        self.path = path
        self.name = catalog.meta("name") or path.name
        self.uuid = catalog.pool_uuid
        self.options = options
        self.clock = clock
        self.catalog = catalog
        self.mount_snapshot: Callable[[], dict[str, Any]] | None = None
        self.mount_turn: Callable[[], None] | None = None
        self._lock_fd = lock_fd
        self._is_closed = False
        names = _CatalogNames(catalog, lambda node_id: self.files.awaits_content(node_id), clock)
        state = EngineState(self.uuid, list(devices), names, options, clock)
        self.store = Store(state)
        self.losses = LossReports(state.counters)
        self.losses.listen()
        for info in catalog.namespaces():
            state.add_namespace(_spec(info))
        self._layouts = {info.namespace_id: info.layout for info in catalog.namespaces()}
        self.deadlines_ms: dict[int, int] = {}
        self.files = Files(
            self.store, catalog, self._layouts.__getitem__, clock, options.staging_memory_bytes
        )
        self.pins = Pins(self.store, catalog, lambda number: self._layouts[number].stride)
        self.files.on_gone = self.pins.release
        self.backend: Backend = LocalBackend(self)
        self.recovery = self.store.load()
        self._reconcile(self.recovery)  # writes, so that a former schema is this one from here on
        self._load_deadlines()
        self._background: Background | None = None
        catalog.on_checkpoint_due = self.note_written

    def _load_deadlines(self) -> None:
        found = self.catalog.attributes_named(DEADLINE_ATTRIBUTE)
        self.deadlines_ms = {
            info.namespace_id: checked_deadline_ms(found[info.root_node_id])
            for info in self.catalog.namespaces()
            if info.root_node_id in found
        }

    # --- namespaces

    def namespace(
        self,
        name: str,
        layout: Layout | None = None,
        *,
        retention: Retention = "cache",
        uid: int | None = None,
        gid: int | None = None,
    ) -> Namespace:
        """Return a namespace, made if it is not there and `layout` is given.

        Args:
            name: A file name; the namespace is the directory of that name on the mount.
            layout: What its blocks hold. Must equal that of an existing namespace.
            retention: "cache": a full pool drops it. "durable": what a name reaches is kept. For
                new ones only.
            uid: Whose a new one is; this process's user's when missing.
            gid: As `uid`.

        Raises:
            NotFoundError: It does not exist and no layout is given.
            RefusedError: It exists with another layout; both fingerprints are in the message.

        Durability: persist (a new namespace survives a crash on return).
        """
        self._require_open()
        self.losses.listen()
        if layout is not None:
            self._check_layout(layout)
        info = self.catalog.namespace_by_name(name)
        if info is None:
            if layout is None:
                raise NotFoundError(f"no such namespace: {name!r}; give a layout to make it")
            try:
                info = self.make_namespace(name, layout, retention=retention, uid=uid, gid=gid)
            except ExistsError:
                info = self.catalog.namespace_by_name(name)
                if info is None:
                    raise
                self.catalog.sync()  # another thread has made it just now
        if layout is not None and layout.fingerprint() != info.fingerprint:
            raise RefusedError(
                f"layout mismatch: namespace {name!r}: it has {info.fingerprint.hex()} "
                f"{info.layout.to_json()}, asked for {layout.fingerprint().hex()} "
                f"{layout.to_json()}; use another namespace for another layout"
            )
        return Namespace(self, info)

    def namespaces(self) -> list[NamespaceInfo]:
        """List the namespaces."""
        self._require_open()
        return self.catalog.namespaces()

    def make_namespace(
        self,
        name: str,
        layout: Layout = OPAQUE,
        *,
        retention: Retention = "cache",
        mode: int = 0o755,
        uid: int | None = None,
        gid: int | None = None,
    ) -> NamespaceInfo:
        """Make a namespace. Durability: persist.

        Raises:
            ExistsError: The name is taken.
            UsageError: The name cannot be a directory, or the retention is unknown.
        """
        self._check_layout(layout)
        now, namespace_id, state = self.clock.wall_ns(), new_namespace_id(), self.store.state
        # Known before it is named: whoever finds the name can use it.
        info = NamespaceInfo(namespace_id, name, layout, layout.fingerprint(), retention, 0, now)
        self._layouts[namespace_id] = layout
        state.add_namespace(_spec(info))
        try:
            info = self.catalog.create_namespace(
                namespace_id, name, layout, retention,
                now_ns=now,
                mode=mode,
                uid=os.getuid() if uid is None else uid,
                gid=os.getgid() if gid is None else gid,
            )  # fmt: skip
        except BaseException:
            with state.lock:
                del state.namespaces[namespace_id], state.indexes[namespace_id]
            del self._layouts[namespace_id]
            raise
        self.catalog.sync()
        return info

    def drop_namespace(self, name: str, *, only_empty: bool = False) -> None:
        """Destroy a namespace: names first, then its segments.

        Nothing of it comes back. Durability: persist.

        Raises:
            ExistsError: With `only_empty`, it holds a name; blocks without one do not count.
            DeviceError: It is gone, but a device failed; the next open frees what is left of it.
        """
        info = self.namespace(name).info
        with self.catalog.transaction():
            raw = self.catalog.raw_nodes(info.namespace_id)
            if only_empty:
                self.catalog.remove(info.root_node_id, self.clock.wall_ns())
            else:
                self.catalog.drop_namespace(info.namespace_id)
        self.catalog.sync()
        for node_id in raw:
            self.files.raws.remove(node_id)
        self.pins.release_namespace(info.namespace_id)
        try:
            self.store.destroy_namespace(info.namespace_id)
        finally:
            self._layouts.pop(info.namespace_id, None)
            if name == DEFAULT_NAMESPACE:
                self.make_namespace(DEFAULT_NAMESPACE)

    def rename_namespace(self, name: str, new_name: str) -> None:
        """Give a namespace another name. Durability: persist.

        Raises:
            ExistsError: The new name is taken.
            RefusedError: Files at the root belong to it.
        """
        info = self.namespace(name).info
        self.catalog.rename(
            info.root_node_id, ROOT_NODE_ID, new_name, self.clock.wall_ns(), replace=False
        )
        self.catalog.sync()
        self.store.state.add_namespace(_spec(self.namespace(new_name).info))

    def set_retention(self, name: str, retention: Retention) -> None:
        """Change what a full pool may do to a namespace: "cache" or "durable".

        Durability: persist.
        """
        self.catalog.set_retention(self.namespace(name).info.namespace_id, retention)
        self.catalog.sync()
        self.store.state.add_namespace(_spec(self.namespace(name).info))

    def set_deadline(self, name: str, deadline_ms: int | None) -> None:
        """Change how long a request of a mount may take that concerns a namespace.

        Then it fails with EIO. None: as long as the mount's own. Durability: persist.

        Raises:
            UsageError: Not 10 to 3,600,000.
        """
        node_id, now = self.namespace(name).info.root_node_id, self.clock.wall_ns()
        if deadline_ms is not None:
            value = str(checked_deadline_ms(str(deadline_ms).encode())).encode()
            self.catalog.set_attribute(node_id, DEADLINE_ATTRIBUTE, value, now_ns=now)
        elif DEADLINE_ATTRIBUTE in self.catalog.attribute_names(node_id):
            self.catalog.remove_attribute(node_id, DEADLINE_ATTRIBUTE, now_ns=now)
        self.catalog.sync()
        self._load_deadlines()

    def make_context(self, info: NamespaceInfo, path: str, *, uid: int, gid: int) -> Node:
        """Return the context at a path, made with the directories above it if it is not there.

        What is made belongs to `uid` and `gid`.
        """
        self._require_open()
        now = self.clock.wall_ns()
        name = path
        with self.catalog.transaction():
            parent = info.root_node_id
            if "/" in path:
                parent, name = self.catalog.make_parents(
                    parent, path, mode=0o755, uid=uid, gid=gid, now_ns=now
                )
            return self.catalog.lookup(parent, name) or self.catalog.create_context(
                parent, name, info.namespace_id, Origin.API, NodeState.ACTIVE,
                mode=0o644, uid=uid, gid=gid, now_ns=now,
            )  # fmt: skip

    def walk(self, node_id: int) -> Iterator[Node]:
        """Yield the contexts below a directory, depth first, by name."""
        after = ""
        while page := self.catalog.children(node_id, after):
            for node in page:
                if node.kind is NodeKind.DIRECTORY:
                    yield from self.walk(node.node_id)
                else:
                    yield node
            after = page[-1].name

    # --- life

    def flush(self) -> None:
        """Persist all blocks and give new files their names. Durability: persist (names: flush)."""
        self._require_open()
        self.files.publish()

    def sync(self, losses: LossListener | None = None) -> None:
        """Make everything done so far survive a power cut: blocks, then names. Durability: persist.

        Args:
            losses: Who is told of losses; this thread when missing.

        Raises:
            DeviceError: A persist failed, now or before: blocks put before are lost. Every thread
                that has put since the pool was opened, or opened it, is told once of each loss; of
                the others the first.
            PoisonedError: The catalog takes no more writes.
        """
        self.flush()
        self.catalog.sync()
        if count := (losses or self.losses.listen()).news():
            raise DeviceError(
                f"{count} blocks were lost by failed persists since this thread's last sync; "
                "put them again"
            )

    def note_written(self) -> None:
        """Tell the background that something of this thread's waits to be persisted."""
        self.losses.listen()
        if self._background is not None:
            self._background.wake()

    def start_background(self) -> None:
        """Start the background thread: persists async blocks within the bounded delay."""
        if self._background is None:
            self._background = Background(self._background_step, self.options.async_delay_ms)
            self._background.start()

    def statistics(self) -> PoolStatistics:
        """Return a snapshot."""
        self._require_open()
        devices = tuple(self.store.device_statistics())
        counts = self.catalog.statistics()
        is_healthy = all(device.state == "online" for device in devices)
        is_healthy = is_healthy and not self.recovery.problems
        return PoolStatistics(
            name=self.name,
            uuid=str(self.uuid),
            path=str(self.path),
            state="online" if is_healthy else "degraded",
            devices=devices,
            namespaces=len(self._layouts),
            contexts=counts.context_count,
            capacity_bytes=sum(d.capacity_bytes for d in devices),
            used_bytes=sum(d.used_bytes for d in devices),
            live_bytes=sum(d.live_bytes for d in devices),
            counters=self.store.state.counters.snapshot(),
        )

    def client_figures(self) -> tuple[int, int, int, int]:
        """Return clients, segments they hold; revocations and failed requests since open."""
        state = self.store.state
        holds = state.holds
        with state.lock:
            segments = [one for device in state.devices for one in device.segments.values()]
            return holds.count, len(holds.snapshot(segments)), holds.revoked, holds.failures

    def close(self) -> None:
        """Publish, flush, close; idempotent.

        Errors of the last flush are raised after everything is closed.

        Raises:
            BusyError: Operations did not end in time; devices stay open.
            DeviceError: Blocks were lost; everything is closed.
        """
        if self._is_closed:
            return
        steps = [self.sync, self.store.close, self.catalog.close]
        if self._background is not None:
            steps.insert(0, self._background.stop)
        failure: Exception | None = None
        for step in steps:
            try:
                step()
            except Exception as error:  # noqa: BLE001 - raised again when all is closed
                is_worse = isinstance(error, BusyError)  # devices are still open
                failure = error if is_worse else failure or error
        self._is_closed = True
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1
        if failure is not None:
            raise failure

    def share_lock(self) -> int:
        """Return another descriptor of the pool's lock: the lock is held until all are closed."""
        self._require_open()
        return os.dup(self._lock_fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.close()

    def __repr__(self) -> str:
        return f"Pool({str(self.path)!r})"

    # --- internals

    def _background_step(self) -> None:
        if self.store.has_unsynced or self.files.has_unpublished:
            self.files.publish()
        self.catalog.checkpoint_if_due()

    def _reconcile(self, report: RecoveryReport) -> None:
        """Bring names and blocks together after opening."""
        self.catalog.reap_pending()
        versions: dict[int, int] = {}
        broken: list[int] = []
        for node, keys in self.catalog.iter_file_contexts():
            if self.store.match_prefix(node.namespace_id, keys) < len(keys):
                broken.append(node.node_id)
            else:
                versions[node.node_id] = node.version
        if broken:
            self.catalog.remove_nodes(broken)
            report.files_dropped = len(broken)
        lost, freed = self.files.load_raw()
        if lost:
            self.catalog.remove_nodes(lost)
            report.files_dropped += len(lost)
        report.freed += freed
        reap_unnamed_files(self.store.state, versions, report)
        self.pins.load()
        for problem in report.problems:
            _log.warning("%s", problem)

    def _check_layout(self, layout: Layout) -> None:
        if not isinstance(layout, Layout):
            raise UsageError(f"expected a kvfs.Layout, found {layout!r:.80}")
        smallest = min(device.info.segment_bytes for device in self.store.state.devices)
        if layout.stride > smallest // 2:
            raise UsageError(
                f"blocks of {format_bytes(layout.stride)} do not fit: the pool has segments of "
                f"{format_bytes(smallest)}; use fewer tokens per block, or make the pool with "
                "segment=... of at least twice the block"
            )

    def _require_open(self) -> None:
        if self._is_closed:
            raise ClosedError("the pool is closed")


def _spec(info: NamespaceInfo) -> NamespaceSpec:
    return NamespaceSpec(
        namespace_id=info.namespace_id,
        name=info.name,
        layout_json=info.layout.to_json(),
        digest=info.fingerprint,
        block_bytes=info.layout.block_bytes,
        stride=info.layout.stride,
        is_durable=info.retention == "durable",
    )
