"""The options that mean the same everywhere, and how a command is declared.

Layer: L5.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Protocol

from kvfs.cli.console import Console
from kvfs.cli.runner import Parser

Handler = Callable[[argparse.Namespace, Console], int]


class AddCommand(Protocol):
    """What argparse's subparsers offer."""

    def add_parser(self, name: str, **options: object) -> Parser:
        """Make the parser of a subcommand."""
        ...


@functools.cache
def common_options() -> Parser:
    """Return the options that every command takes, before the noun as well as after the verb."""
    parser = Parser(add_help=False, argument_default=argparse.SUPPRESS)
    group = parser.add_argument_group("options of every command")
    group.add_argument("--pool", metavar="PATH|NAME", help="the pool (or $KVFS_POOL)")
    group.add_argument("--json", action="store_true", help="answer with one JSON object")
    group.add_argument("-q", "--quiet", action="store_true", help="no talk on stderr but errors")
    group.add_argument("-v", "--verbose", action="store_true", help="more talk on stderr")
    group.add_argument("--no-color", action="store_true", help="no colours")
    group.add_argument("-p", "--exact", action="store_true", help="plain numbers, no units")
    group.add_argument("-H", "--no-header", action="store_true", help="no titles, tabs between")
    return parser


def add_command(
    verbs: AddCommand, name: str, handler: Handler, command: str, text: str, epilog: str
) -> Parser:
    """Declare one command.

    Args:
        verbs: Where.
        name: Its verb.
        handler: What runs it.
        command: Noun and verb, as in `schema.command` of its JSON.
        text: What it does.
        epilog: Whether it is online, offline or both, and its exit codes.
    """
    parser = verbs.add_parser(
        name, help=text.partition(". ")[0].rstrip("."), description=text, epilog=epilog,
        parents=[common_options()],
    )  # fmt: skip
    parser.set_defaults(handler=handler, command=command)
    return parser


def add_changing(parser: Parser, *, is_destructive: bool) -> None:
    """Add the options of commands that change something."""
    parser.add_argument(
        "-n", "--dry-run", action="store_true", help="show the plan and change nothing"
    )
    if is_destructive:
        parser.add_argument(
            "-y", "--yes", action="store_true",
            help="do not ask for the pool's name (or KVFS_ASSUME_YES=NAME)",
        )  # fmt: skip
