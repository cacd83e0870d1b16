"""`kvfs mount` and `kvfs umount`.

Layer: L5.

- Mounting opens the pool, so the mounting process is its owner until it is unmounted.
- Unmounting returns only when the owner has closed the pool, so that the next command finds it
  free.
"""

import argparse
from pathlib import Path

from kvfs.cli.console import Console
from kvfs.cli.daemon import Ready
from kvfs.cli.respawn import Plan, wait_closed
from kvfs.cli.runner import Parser, exit_codes
from kvfs.cli.service import add_arguments, inheriting, question_of, run_service, service_of
from kvfs.control_client import owners
from kvfs.errors import UsageError
from kvfs.units import parse_bytes


def add_mount(parser: Parser) -> None:
    """Define `kvfs mount`."""
    parser.description = (
        "Open a pool and show its contexts as files below DIR. Returns when the mount is ready; "
        "the daemon stays the pool's owner until 'kvfs umount DIR', or until another takes over "
        "(--takeover). A daemon that dies is replaced."
    )
    parser.epilog = exit_codes(2, 10, 11, 13, 14, 15, 16)
    parser.add_argument("pool", metavar="POOL", help="directory of the pool")
    parser.add_argument("directory", metavar="DIR", help="empty directory to mount on")
    add_arguments(parser)
    parser.add_argument("--allow-other", action="store_true", help="let other users see the mount")
    parser.add_argument(
        "--allow-nonempty", action="store_true", help="hide what DIR holds instead of refusing"
    )
    parser.add_argument(
        "--no-passthrough", action="store_true",
        help="do not let the kernel read whole files itself",
    )  # fmt: skip
    parser.add_argument(
        "--page-cache", metavar="SIZE",
        help="what the kernel may keep of files that kvfs-core reads; dropped at their last close "
        "in any case (default: a quarter of the memory)",
    )  # fmt: skip
    parser.add_argument(
        "--stay-mounted", action="store_true",
        help="at SIGTERM leave the mount to the next start, for a service manager that stores "
        "descriptors; without one the mount ends all the same",
    )  # fmt: skip
    parser.add_argument(
        "--no-core", action="store_true",
        help="answer every request in Python, without kvfs-core in front",
    )  # fmt: skip


def run_mount(arguments: argparse.Namespace, console: Console) -> int:
    """Mount."""
    plan = Plan(
        service=service_of(arguments),
        directory=str(Path(arguments.directory).absolute()),
        allow_other=arguments.allow_other,
        core=not arguments.no_core,
        passthrough=not arguments.no_passthrough,
        page_cache_bytes=None
        if arguments.page_cache is None
        else parse_bytes(arguments.page_cache),
        stays_mounted=arguments.stay_mounted,
    )

    def serve(ready: Ready) -> int:
        from kvfs.cli.mounting import own_mounted
        from kvfs.fuse.core_messages import VERSION

        question = question_of(arguments, mount=plan.directory, core_version=VERSION)
        options = plan.mount_options(
            allow_nonempty=arguments.allow_nonempty, is_daemon=not arguments.foreground
        )
        with inheriting(plan.service, question, arguments.takeover_timeout) as estate:
            own_mounted(plan, estate, options, ready, foreground=arguments.foreground)
        return 0

    return run_service(
        plan.service, console, serve, f"mounted {plan.service.pool} on {plan.directory}",
        is_foreground=arguments.foreground,
    )  # fmt: skip


def add_umount(parser: Parser) -> None:
    """Define `kvfs umount`."""
    parser.description = (
        "Unmount DIR and wait until its owner has written everything and closed the pool."
    )
    parser.epilog = exit_codes(2, 10, 11, 13)
    parser.add_argument("directory", metavar="DIR", help="where the pool is mounted")
    parser.add_argument(
        "--timeout", type=float, metavar="SECONDS", default=60.0,
        help="how long to wait for the owner (default: %(default)s)",
    )  # fmt: skip


def run_umount(arguments: argparse.Namespace, console: Console) -> int:
    """Unmount."""
    from kvfs.fuse.mountpoint import unmount

    if arguments.timeout <= 0:
        raise UsageError(f"timeout must be positive, found {arguments.timeout}")
    directory = Path(arguments.directory).absolute()
    pool_path = _pool_at(directory)
    unmount(directory, lazy=False)
    if pool_path is None:
        console.say(f"unmounted {directory}; no owner of it was found, so none was waited for")
        return 0
    wait_closed(pool_path, arguments.timeout)
    console.say(f"unmounted {directory}; pool {pool_path} is closed")
    return 0


def _pool_at(directory: Path) -> Path | None:
    """Return the pool that is mounted on a directory, as its owner registered it."""
    # The last component may be a mount that does not answer; it is not looked at.
    real = directory.parent.resolve() / directory.name
    for entry in owners():
        if entry.mount and Path(entry.mount) in (directory, real):
            return Path(entry.pool)
    return None
