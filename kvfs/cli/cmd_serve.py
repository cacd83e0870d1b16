"""`kvfs serve`: own a pool without showing it.

Layer: L5.
"""

import argparse
import logging
import os
from typing import TYPE_CHECKING

from kvfs.cli.console import Console
from kvfs.cli.daemon import EndSignal, Ready
from kvfs.cli.estate import Estate
from kvfs.cli.runner import Parser, exit_codes
from kvfs.cli.service import (
    Service,
    add_arguments,
    inheriting,
    owned,
    question_of,
    run_service,
    service_of,
)
from kvfs.cli.succession import Succession
from kvfs.cli.takeover import Heirs

if TYPE_CHECKING:
    from kvfs.pool import Pool

_log = logging.getLogger("kvfs.service")


def add_serve(parser: Parser) -> None:
    """Define `kvfs serve`."""
    parser.description = (
        "Open a pool and own it, without a mount, for other processes that open it "
        "(kvfs.open_pool): they become its clients. Returns when the pool can be used; the daemon "
        "stays its owner until SIGTERM or SIGINT, and has then written everything, or until "
        "another takes over (--takeover). Who owns what: 'kvfs-admin pool list'."
    )
    parser.epilog = exit_codes(2, 10, 11, 13, 14, 15, 16)
    parser.add_argument("pool", metavar="POOL", help="directory of the pool")
    add_arguments(parser)


def run_serve(arguments: argparse.Namespace, console: Console) -> int:
    """Serve."""
    service, question = service_of(arguments), question_of(arguments)
    has_terminal = bool(arguments.foreground) and os.isatty(0)

    def serve(ready: Ready) -> int:
        with inheriting(service, question, arguments.takeover_timeout) as estate:
            return _serve(service, estate, ready, has_terminal=has_terminal)

    return run_service(
        service, console, serve, f"serving {service.pool}", is_foreground=arguments.foreground
    )


def _serve(service: Service, estate: Estate, ready: Ready, *, has_terminal: bool) -> int:
    """Own the pool until a signal comes, or an heir that takes it."""
    heirs, made = Heirs(), list[EndSignal]()

    def work(pool: "Pool") -> None:
        if not made:
            made.append(EndSignal(has_terminal=has_terminal))
            ready()
        (end,) = made
        estate.confirm()
        heirs.open(end.wake)
        if number := end.wait():
            _log.info("%s received", number.name)
        else:
            _log.info("another process takes %s over", pool.path)

    def end_fd() -> int:
        return made[0].fileno() if made else -1

    Succession(estate, heirs, end_fd=end_fd).run(lambda: owned(service, estate, heirs=heirs), work)
    return 0
