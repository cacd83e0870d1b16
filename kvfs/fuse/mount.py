"""Mounting a pool: in the foreground until a signal, or in a thread of this process.

Layer: L5.

- The order of a mount: checks, mount (by kvfs-core, or without one by pyfuse3), the kernel's INIT
  answered, read-ahead raised, READY last.
- The order of an unmount: leave the tree while requests are still answered; if files are open,
  stop answering and detach; then close what is open. The pool stays open: it is the caller's.
- A mount that passes on to another owner (`passing`) is left as it is, and its core with it.
- The core ends when the mount does. If it ends before, the mount is dead: it is taken away, and the
  session fails.
- pyfuse3 keeps its session in globals: one mount per process at a time.
"""

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import pyfuse3
import trio

from kvfs.engine.catalog_schema import STATUS_NAME
from kvfs.errors import BusyError, KvfsError, UnavailableError, UsageError
from kvfs.fuse import mountpoint as mountpoints
from kvfs.fuse.attributes import Timeouts
from kvfs.fuse.core import Core, find
from kvfs.fuse.mountpoint import unmount
from kvfs.fuse.name_filter import TIMEOUT_MS, NameFilter
from kvfs.fuse.operations import KvfsOperations
from kvfs.fuse.passing import Passing
from kvfs.pool import Pool
from kvfs.units import MIB

__all__ = [
    "Mount", "MountOptions", "mount", "mount_in_background", "serve_inherited", "unmount",
]  # fmt: skip

_STOP_TIMEOUT_S: Final = 30.0
_SWEEP_S: Final = 1.0
_TURN_S: Final = 0.5
_NOBODY: Final = ("No such file or directory", "Broken pipe")
_one_mount: Final = threading.Lock()
_log = logging.getLogger("kvfs.fuse")


@dataclass(frozen=True, slots=True)
class MountOptions:
    """How a mount behaves.

    Attributes:
        allow_other: Let other users in; permissions are checked by the kernel. Without it only the
            user that mounts. Needs root, or `user_allow_other` in /etc/fuse.conf.
        allow_nonempty: Mount over a directory that holds something, hiding it.
        deadline_s: Longest a request may take before it fails with EIO; longer by the bytes it
            moves.
        timeouts: How long the kernel may keep attributes.
        read_ahead_kb: How far the kernel reads ahead, where it lets us say; 0 leaves it.
        page_cache_bytes: What the kernel may keep cached of files that the core reads, in all; the
            oldest is dropped then, and all of a file with its last close. A quarter of the
            machine's memory if None.
        threads: Requests that may wait for blocks at the same time.
        requests: Requests taken from the kernel at the same time.
        core: Put kvfs-core in front, which answers most reads itself. Without it, or where it
            cannot run, every request is answered by this process.
        passthrough: Let the kernel read whole files itself, where it can.
        respawn: Command that the core starts when this process dies, to serve the mount on; see
            `serve_inherited`. Without one the mount ends with this process.
    """

    allow_other: bool = False
    allow_nonempty: bool = False
    deadline_s: float = 5.0
    timeouts: Timeouts = field(default_factory=Timeouts)
    read_ahead_kb: int = 8192
    page_cache_bytes: int | None = None
    threads: int = 32
    requests: int = 64
    core: bool = True
    passthrough: bool = True
    respawn: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0.01 <= self.deadline_s <= 3600:
            raise UsageError(f"deadline_s must be 0.01 to 3600, found {self.deadline_s}")
        if self.page_cache_bytes is not None and self.page_cache_bytes < 0:
            raise UsageError(f"page_cache_bytes must not be negative: {self.page_cache_bytes}")
        if self.threads < 1 or self.requests < 1:
            raise UsageError("a mount needs at least one thread and one request")


def mount(
    pool: Pool,
    mountpoint: str | os.PathLike[str],
    *,
    foreground: bool = True,
    options: MountOptions | None = None,
    on_ready: Callable[[], None] | None = None,
    passing: Passing | None = None,
) -> None:
    """Show a pool at a directory until it is unmounted, or SIGTERM or SIGINT arrives.

    Blocks. Call it from the main thread; a daemon forks before.

    Args:
        pool: Open; it stays open.
        mountpoint: An empty directory. A stale mount there is taken away.
        foreground: The process has a terminal: SIGHUP ends the mount too. A daemon ignores it.
        options: See MountOptions.
        on_ready: Called once, when the mount answers.
        passing: How it comes from the last owner, or passes to the next; without one it does not.

    Raises:
        KvfsError: The mount could not be made; see kvfs.fuse.mountpoint.prepare.
    """
    signals = {signal.SIGTERM, signal.SIGINT}
    if foreground:
        signals.add(signal.SIGHUP)
    options = options or MountOptions()
    path, core = Path(mountpoint), None
    if passing is not None:
        core = passing.enter(path, pool.clock, options.respawn)
    session = _Session(pool, path, options, on_ready, core, passing)
    session.run(signals)


def serve_inherited(
    pool: Pool, options: MountOptions, *, on_ready: Callable[[], None], passing: Passing
) -> None:
    """Serve a mount whose owner died; for a process that its core started. Blocks, as `mount`.

    Raises:
        UnavailableError: No core started this process, or it has ended.
    """
    core = Core.inherited(pool.clock)
    passing.keep_door(core.take_door())
    session = _Session(pool, core.mountpoint, options, on_ready, core, passing)
    session.run({signal.SIGTERM, signal.SIGINT})


class Mount:
    """A mount served by a thread of this process. Use as a context manager, or call `close`.

    This process must not touch its own mount while it holds the GIL, for it would wait for itself:
    ordinary file calls of Python let go of it, but a page fault in a mapped file does not, nor does
    C code that reads files without releasing it. Give such work to another process.

    Attributes:
        mountpoint: Where it is.
    """

    def __init__(self, session: "_Session") -> None:
        """Start serving; see mount_in_background."""
        self.mountpoint = session.mountpoint
        self._session = session
        self._failure: BaseException | None = None
        self._is_ready = threading.Event()
        session.on_ready = self._is_ready.set
        self._thread = threading.Thread(target=self._main, name="kvfs-mount", daemon=True)
        self._thread.start()
        self._is_ready.wait()
        self._raise_failure()

    def close(self) -> None:
        """Unmount and wait for the thread; idempotent.

        Raises:
            UnavailableError: It did not end in time; the mount is detached.
        """
        self._session.request_stop()
        self._thread.join(_STOP_TIMEOUT_S)
        if self._thread.is_alive():
            raise UnavailableError(f"mount did not end within {_STOP_TIMEOUT_S:.0f} s")
        self._raise_failure()

    @property
    def is_alive(self) -> bool:
        """Whether the mount still answers; an operator may have unmounted it."""
        return self._thread.is_alive()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.close()

    def _main(self) -> None:
        try:
            self._session.run(set())
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            self._failure = error
            _log.debug("mount ended: %s", error)
        finally:
            self._is_ready.set()

    def _raise_failure(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure


def mount_in_background(
    pool: Pool, mountpoint: str | os.PathLike[str], options: MountOptions | None = None
) -> Mount:
    """Show a pool at a directory from a thread of this process; returns when it answers.

    Raises:
        KvfsError: As `mount`.
    """
    return Mount(_Session(pool, Path(mountpoint), options or MountOptions(), None))


class _Session:
    """One mount, from its checks to its end. `core`: of a mount that is there already."""

    def __init__(
        self, pool: Pool, path: Path, options: MountOptions,
        on_ready: Callable[[], None] | None, core: Core | None = None,
        passing: Passing | None = None,
    ) -> None:  # fmt: skip
        self.mountpoint = path if core is None else core.mountpoint
        self._passing = passing
        if core is None:
            self.mountpoint = mountpoints.prepare(path, allow_nonempty=options.allow_nonempty)
        self.on_ready = on_ready
        self._pool = pool
        self._options = options
        self._core = core
        self._is_inherited = core is not None
        self._token: trio.lowlevel.TrioToken | None = None
        self._stop = trio.Event()
        self._leave = trio.Event()
        self._is_initialized = False
        self._is_serving = False

    def run(self, signals: set[signal.Signals]) -> None:
        """Mount, serve, unmount."""
        if not _one_mount.acquire(blocking=False):
            raise BusyError("this process serves a mount already; use another process")
        logger = logging.getLogger("pyfuse3")
        logger.addFilter(_is_worth_logging)
        try:
            trio.run(self._main, signals)
        finally:
            logger.removeFilter(_is_worth_logging)
            _one_mount.release()

    def request_stop(self) -> None:
        """Let the mount end. Any thread; nothing if it has ended."""
        self._soon(self._stop.set)

    def _take_a_turn(self) -> None:
        """Return once the loop has run something, or has ended. Any other thread."""
        assert self._token is not None
        turned = threading.Event()
        try:
            self._token.run_sync_soon(turned.set)
        except trio.RunFinishedError:
            return
        while self._is_serving and not turned.wait(_TURN_S):
            pass

    def _soon(self, function: Callable[[], None]) -> None:
        if self._token is not None:
            with contextlib.suppress(trio.RunFinishedError):
                self._token.run_sync_soon(function)

    async def _main(self, signals: set[signal.Signals]) -> None:
        self._token = trio.lowlevel.current_trio_token()
        if self._passing is not None:
            self._passing.is_left = False
            self._passing.bind(lambda: self._soon(self._leave.set))
        if not self._is_inherited:
            self._core = self._start_core()
        options, core = self._options, self._core
        operations = KvfsOperations(
            self._pool,
            deadline_s=options.deadline_s,
            threads=options.threads,
            timeouts=options.timeouts,
            core=core,
        )
        try:
            self._init(operations)
            if core is not None:
                self._set_up(core, operations)
            self._is_serving = True
            self._pool.mount_turn = self._take_a_turn
            await self._serve(operations, signals)
        finally:
            self._pool.mount_turn = None
            self._is_serving = False
            self._end(operations)
        if core is not None and not self._is_left and self._was_lost(core):
            raise UnavailableError(f"kvfs-core has died; mount taken away: {self.mountpoint}")

    def _start_core(self) -> Core | None:
        """Start the core; None, said once, if it is not wanted or not there."""
        options = self._options
        if not options.core:
            return None
        flags = [*_flags(options), f"deadline_ms={int(options.deadline_s * 1000)}"]
        if not options.passthrough:
            flags.append("no_passthrough")
        if options.page_cache_bytes is not None:
            flags.append(f"page_cache_mb={options.page_cache_bytes // MIB}")
        try:
            find()
        except UnavailableError as error:
            _log.warning("mounted without kvfs-core, reads are slower: %s", error)
            return None
        core = Core.start(self.mountpoint, flags, self._pool.clock, respawn=options.respawn)
        if self._passing is not None:
            self._passing.keep_door(core.take_door())
        if options.passthrough and not core.hello.has_passthrough:
            _log.info("no passthrough: it needs root and Linux 6.9; kvfs-core reads instead")
        return core

    def _init(self, operations: KvfsOperations) -> None:
        target = str(self.mountpoint)
        if self._core is not None:
            target = f"/dev/fd/{self._core.requests_fd}"
        try:
            pyfuse3.init(operations, target, set(_flags(self._options)))
        except RuntimeError as error:
            raise UnavailableError(
                f"mount failed: {self.mountpoint}: {error}; the reason is on standard error"
            ) from error
        self._is_initialized = True

    def _set_up(self, core: Core, operations: KvfsOperations) -> None:
        """Begin what goes on beside requests when there is a core."""
        if self._is_inherited:
            operations.restore(core)
        operations.names = NameFilter(
            self._pool.catalog,
            lambda table: core.client.install_names(table.fd, table.nbytes, TIMEOUT_MS),
            also=[(pyfuse3.ROOT_INODE, STATUS_NAME.encode())],
            seed=self._pool.clock.wall_ns() & 0xFFFF_FFFF,
        )
        core.watch(lambda: self._soon(self._terminate))

    async def _serve(self, operations: KvfsOperations, signals: set[signal.Signals]) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._announce, operations)
            nursery.start_soon(self._wait_stop)
            nursery.start_soon(self._wait_leave)
            nursery.start_soon(_sweep, operations)
            nursery.start_soon(_close_late, operations)
            if signals:
                nursery.start_soon(self._wait_signal, signals)
            await pyfuse3.main(min_tasks=1, max_tasks=self._options.requests)
            nursery.cancel_scope.cancel()

    def _terminate(self) -> None:
        if self._is_serving:
            pyfuse3.terminate()

    def _end(self, operations: KvfsOperations) -> None:
        """Take the mount away if it is still there, and close everything."""
        operations.stop_names()
        if self._is_left:
            assert self._core is not None
            pyfuse3.close(unmount=False)
            self._core.leave()
            operations.close(is_left=True)
            _log.info("left mounted: %s", self.mountpoint)
            return
        if self._core is not None and not self._core.has_ended:
            self._core.stop()
        if self._is_initialized:
            pyfuse3.close(unmount=self._core is None)
        if self._core is not None:
            self._core.close()
        operations.close()
        _log.info("unmounted: %s", self.mountpoint)

    def _was_lost(self, core: Core) -> bool:
        """Take away what a core that died has left; return whether it had."""
        entry = mountpoints.entry_at(self.mountpoint)
        if entry is None or entry.device != f"0:{core.hello.device_minor}":
            return False
        core.abort()
        mountpoints.detach(self.mountpoint)
        return True

    async def _announce(self, operations: KvfsOperations) -> None:
        await operations.is_initialized.wait()
        mountpoints.set_read_ahead(self.mountpoint, self._options.read_ahead_kb)
        _log.info("mounted: %s", self.mountpoint)
        if self.on_ready is not None:
            self.on_ready()
        if self._core is not None and self._is_inherited:
            await trio.to_thread.run_sync(self._core.client.hold, 0)  # this owner stays

    async def _wait_signal(self, signals: set[signal.Signals]) -> None:
        with trio.open_signal_receiver(*signals) as received:
            async for number in received:
                if self._stop.is_set():
                    pyfuse3.terminate()  # the second signal does not wait
                    return
                name = signal.Signals(number).name
                stays = self._passing is not None and self._passing.stays
                if stays and number == signal.SIGTERM and self._core is not None:
                    _log.info("%s received, leaving the mount to the next owner", name)
                    self._leave.set()
                    continue
                _log.info("%s received, unmounting", name)
                self._stop.set()

    async def _wait_stop(self) -> None:
        await self._stop.wait()
        try:
            await trio.to_thread.run_sync(
                lambda: unmount(self.mountpoint, lazy=False), abandon_on_cancel=True
            )
        except KvfsError as error:
            _log.info("%s", error)
            pyfuse3.terminate()

    @property
    def _is_left(self) -> bool:
        return self._passing is not None and self._passing.is_left

    async def _wait_leave(self) -> None:
        await self._leave.wait()
        if self._core is None or self._passing is None:
            return
        try:
            await trio.to_thread.run_sync(self._core.hold)
        except (OSError, KvfsError) as error:
            _log.warning("requests under way may fail: %s", error)
        self._passing.is_left = True
        self._terminate()


def _flags(options: MountOptions) -> list[str]:
    """Return what the kernel is told of a mount."""
    flags = ["fsname=kvfs", "subtype=kvfs", "default_permissions", "nosuid", "nodev"]
    return [*flags, "allow_other"] if options.allow_other else flags


def _is_worth_logging(record: logging.LogRecord) -> bool:
    """Leave out replies that found nobody: the caller was killed, or the mount left the tree."""
    text = record.getMessage()
    return "fuse_reply_* failed with" not in text or not text.endswith(_NOBODY)


async def _close_late(operations: KvfsOperations) -> None:
    while True:  # apart from the sweep: a device may stall it
        await trio.sleep(_SWEEP_S)
        await operations.close_late()


async def _sweep(operations: KvfsOperations) -> None:
    while True:
        await trio.sleep(_SWEEP_S)
        await operations.release_idle()
        if operations.lanes is not None:
            await trio.to_thread.run_sync(operations.lanes.sweep)
