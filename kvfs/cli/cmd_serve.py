"""`kvfs serve`: own a pool without showing it.

Layer: L5.
"""

import argparse
import logging
import os

from kvfs.cli.console import Console
from kvfs.cli.daemon import EndSignal, Ready
from kvfs.cli.runner import Parser, exit_codes
from kvfs.cli.service import Service, add_arguments, owned, run_service, service_of

_log = logging.getLogger("kvfs.service")


def add_serve(parser: Parser) -> None:
    """Define `kvfs serve`."""
    parser.description = (
        "Open a pool and own it, without a mount, for other processes that open it "
        "(kvfs.open_pool): they become its clients. Returns when the pool can be used; the daemon "
        "stays its owner until SIGTERM or SIGINT, and has then written everything. Who owns what: "
        "'kvfs-admin pool list'."
    )
    parser.epilog = exit_codes(2, 10, 11, 13, 14, 15, 16)
    parser.add_argument("pool", metavar="POOL", help="directory of the pool")
    add_arguments(parser)


def run_serve(arguments: argparse.Namespace, console: Console) -> int:
    """Serve."""
    service = service_of(arguments)
    has_terminal = bool(arguments.foreground) and os.isatty(0)
    return run_service(
        service, console, lambda ready: _serve(service, ready, has_terminal=has_terminal),
        f"serving {service.pool}", is_foreground=arguments.foreground,
    )  # fmt: skip


def _serve(service: Service, ready: Ready, *, has_terminal: bool) -> int:
    """Own the pool until a signal comes."""
    with owned(service):
        end = EndSignal(has_terminal=has_terminal)
        ready()
        _log.info("%s received", end.wait().name)
    return 0
