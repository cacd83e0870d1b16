"""What `kvfs serve` and `kvfs mount` share: owning a pool as a service.

Layer: L5.

- The options, the log, the doors through which others reach the open pool, and what the service
  manager is told.
- The order: pool, doors, READY; STOPPING, doors, pool. When the process ends all is on the medium.
- What the last owner has left (`inheriting`) comes first; what is left for the next goes last.
"""

import argparse
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from kvfs.admin import messages as msg
from kvfs.cli import notify
from kvfs.cli.console import Console
from kvfs.cli.daemon import Ready, end_on_sigterm, run_in_background
from kvfs.cli.estate import Estate
from kvfs.cli.logs import FORMATS, start_logging
from kvfs.cli.takeover import TIMEOUT_S, Heirs, ask
from kvfs.config import PoolOptions
from kvfs.devices.keeper import MEMORY_VERSION
from kvfs.errors import BusyError, KvfsError, UsageError

if TYPE_CHECKING:
    from kvfs.pool import Pool

_DEFAULTS: Final = PoolOptions()
_CLIENTS: Final = "clients"  # FileDescriptorName in contrib/systemd
_log = logging.getLogger("kvfs.service")


class Service(msgspec.Struct, frozen=True, kw_only=True):
    """How a pool is owned. Paths are absolute.

    `log`: a file, or empty. `metrics`: where to export them, or empty.
    """

    pool: str
    log: str
    log_format: str
    is_verbose: bool
    allow_moved: bool
    pool_options: PoolOptions
    metrics: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the options of every service."""
    parser.add_argument(
        "-f", "--foreground", action="store_true", help="stay here and log to stderr"
    )
    parser.add_argument(
        "--allow-moved", action="store_true",
        help="accept devices that were copied, moved, or left by another host",
    )  # fmt: skip
    parser.add_argument(
        "--takeover", action="store_true",
        help="have the process that owns the pool hand it over, with what lies in its memory and "
        "with its mount, instead of refusing",
    )  # fmt: skip
    parser.add_argument(
        "--takeover-timeout", type=float, metavar="SECONDS", default=TIMEOUT_S,
        help="how long that may take (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--async-delay", type=int, metavar="MS", default=_DEFAULTS.async_delay_ms,
        help="bound on how long an async block stays unpersisted (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--pinned-share", type=float, metavar="SHARE", default=_DEFAULTS.pinned_share,
        help="share of the persistent tiers that open files of a namespace may pin "
        "(default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--no-verify-reads", action="store_true",
        help="do not verify a block's checksum at its first read",
    )  # fmt: skip
    parser.add_argument(
        "--metrics", metavar="[ADDRESS:]PORT", default="",
        help="serve metrics for Prometheus over HTTP (ADDRESS: 127.0.0.1 when not given)",
    )  # fmt: skip
    parser.add_argument(
        "--log", metavar="FILE", default="",
        help="log file (default: the system's log; stderr in the foreground)",
    )  # fmt: skip
    parser.add_argument(
        "--log-format", choices=FORMATS, default=FORMATS[0],
        help="lines for people, or one JSON object per line (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("-v", "--verbose", action="store_true", help="log more")


def service_of(arguments: argparse.Namespace) -> Service:
    """Return what the options say.

    Raises:
        UsageError: One of them has a value that cannot be.
    """
    if arguments.metrics:
        from kvfs.exporter import parse_address

        parse_address(arguments.metrics)
    return Service(
        pool=str(Path(arguments.pool).absolute()),
        log=str(Path(arguments.log).absolute()) if arguments.log else "",
        log_format=arguments.log_format,
        is_verbose=arguments.verbose,
        allow_moved=arguments.allow_moved,
        pool_options=PoolOptions(
            async_delay_ms=arguments.async_delay,
            pinned_share=arguments.pinned_share,
            verify_reads=not arguments.no_verify_reads,
        ),
        metrics=arguments.metrics,
    )


def run_service(
    service: Service, console: Console, work: Callable[[Ready], int], done: str, *,
    is_foreground: bool,
) -> int:  # fmt: skip
    """Run `work(ready)` here or in the background; return its exit code, or 0 once it is ready.

    Args:
        service: How.
        console: Where a failure to start, and `done`, are told.
        work: Owns the pool until it is told to end.
        done: What is so when it is ready, for people.
        is_foreground: Stay here.
    """
    has_log = is_foreground and not service.log  # on stderr, where it says what is to be said

    def begin(ready: Ready) -> int:
        end_on_sigterm(is_daemon=not is_foreground)
        start_logging(
            service.log, service.log_format,
            is_foreground=is_foreground, is_verbose=service.is_verbose,
        )  # fmt: skip

        def announce() -> None:
            notify.tell_ready(done)
            _log.info("%s", done, extra={"pool": service.pool, "pid": os.getpid()})
            ready()

        return work(announce)

    if not is_foreground:
        code = run_in_background(begin)
        console.say(done)
        return code
    try:
        return begin(lambda: None if has_log else console.say(done))
    except KvfsError as error:
        if not has_log or service.log_format != "json":
            raise
        extra = {"error": type(error).__name__, "exit_code": error.exit_code}
        _log.error("%s", error, extra=extra)
        return error.exit_code


def question_of(
    arguments: argparse.Namespace, *, mount: str = "", core_version: int = 0
) -> msg.TakeOver | None:
    """Return what the last owner is asked by `--takeover`; None if the pool is just opened."""
    if not arguments.takeover:
        return None
    if arguments.takeover_timeout <= 0:
        raise UsageError(f"timeout must be positive, found {arguments.takeover_timeout}")
    return msg.TakeOver(MEMORY_VERSION, core_version, mount)


@contextmanager
def inheriting(
    service: Service, question: msg.TakeOver | None, timeout_s: float = TIMEOUT_S
) -> Iterator[Estate]:
    """Yield what there is from the last owner, and close it when the block ends.

    Args:
        service: Of which pool.
        question: What the owner is asked; None: only the service manager may have something.
        timeout_s: How long the owner may take.

    Raises:
        KvfsError: As kvfs.cli.takeover.ask.
    """
    if question is None:
        estate = Estate.of_manager()
    else:
        estate = ask(Path(service.pool), question, timeout_s)
    try:
        yield estate
    finally:
        estate.close()


@contextmanager
def owned(
    service: Service, estate: Estate, *, mount: str = "", heirs: Heirs | None = None,
    is_waited_for: bool = False, admit: "list[Callable[[], None]] | None" = None,
) -> "Iterator[Pool]":  # fmt: skip
    """Open the pool, and let others reach it, while the block runs.

    The lock stays in the estate. If an heir has come by then, whatever fails is only logged once
    all is closed: the heir finds the rest.

    Args:
        service: Which, and how.
        estate: What the last owner has left.
        mount: Where it will be mounted; empty if it is not.
        heirs: Who may take it over.
        is_waited_for: By a mount: metrics that cannot be served do not matter.
        admit: Gets a function that lets clients in, to be called once; without it they are let in
            at once. What a mount has open is pinned before anybody can put.

    Raises:
        KvfsError: As `open_pool`; a door cannot be opened.
    """
    from kvfs.lifecycle import open_pool

    pool = open_pool(
        service.pool, options=service.pool_options, allow_moved=service.allow_moved,
        keeper=estate.keeper, lock_fd=estate.share_lock(),
    )  # fmt: skip
    estate.keep_lock(pool)
    try:
        with pool, _doors(pool, service, estate, mount, heirs, admit, is_waited_for=is_waited_for):
            try:
                with notify.Watchdog(lambda: _take_a_turn(pool)):
                    yield pool
            finally:
                if heirs is None or not heirs.has_one:
                    notify.tell_stopping(f"closing {service.pool}")
                _log.info("closing %s", service.pool, extra={"pool": service.pool})
    except Exception as error:  # everything is closed all the same, but where it says Busy
        if heirs is None or not heirs.has_one or isinstance(error, BusyError):
            raise
        _log.error("%s is handed over, but: %s", service.pool, error)


@contextmanager
def _doors(
    pool: "Pool", service: Service, estate: Estate, mount: str, heirs: Heirs | None,
    admit: "list[Callable[[], None]] | None", *, is_waited_for: bool,
) -> Iterator[None]:  # fmt: skip
    """Keep everything open through which others reach the pool. Each door is a context manager.

    Clients come in by the socket that the service manager has opened for them, if there is one.
    """
    from kvfs.clients.server import ClientServer
    from kvfs.control import ControlServer

    listener = estate.sockets.pop(_CLIENTS, None)
    if heirs is not None and listener is not None:
        heirs.is_activated = True
    with ExitStack() as doors:
        doors.enter_context(ControlServer(pool, mount=mount, heirs=heirs))
        clients = ClientServer(pool, listener=listener)
        doors.callback(clients.stop)
        if admit is None:
            clients.start()
        else:
            admit.append(clients.start)
        while estate.sockets:
            name, unused = estate.sockets.popitem()
            _log.warning("socket of the service manager is not used: %s", name)
            unused.close()
        if service.metrics:
            from kvfs.exporter import Exporter, parse_address

            try:
                doors.enter_context(Exporter(pool, parse_address(service.metrics)))
            except KvfsError as error:
                if not is_waited_for:
                    raise
                _log.warning("%s", error)
        yield


def _take_a_turn(pool: "Pool") -> None:
    """Return once the engine's lock could be taken and the mount's loop has taken a turn.

    An owner that hangs never gets there.
    """
    with pool.store.state.lock:
        pass
    if pool.mount_turn is not None:
        pool.mount_turn()
