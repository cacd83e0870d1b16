"""The command `kvfs-admin`: make, look at, check and repair pools.

Layer: L5.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any, Final, cast

from kvfs import __version__
from kvfs.cli import cmd_check, cmd_context, cmd_device, cmd_inspect, cmd_pool
from kvfs.cli.completion import SHELLS, completion_script
from kvfs.cli.console import Console
from kvfs.cli.options import AddCommand, add_command, common_options
from kvfs.cli.runner import Parser, exit_codes, run, set_up_logging

_NOUNS: Final = (
    ("pool", "pools: create, status, list, destroy", cmd_pool.add),
    ("device", "devices of a pool", cmd_device.add),
    ("context", "contexts: the files of the mount", cmd_context.add),
    ("inspect", "structures of the medium, read-only and raw", cmd_inspect.add),
)
_DEFAULTS: Final[dict[str, Any]] = {
    "pool": "", "json": False, "quiet": False, "verbose": False, "no_color": False,
    "exact": False, "no_header": False,
}  # fmt: skip


def make_parser() -> Parser:
    """Build the parser."""
    parser = Parser(
        prog="kvfs-admin",
        description="Make, look at, check and repair pools. If a process owns the pool, it is "
        "asked over its control socket; otherwise the command opens the pool itself.",
        epilog=exit_codes(1, 2, 3, 10, 11, 12, 13, 14, 15, 16, 130),
        parents=[common_options()],
    )
    nouns = parser.add_subparsers(metavar="NOUN", required=True)
    for noun, text, add in _NOUNS:
        child = nouns.add_parser(noun, help=text, description=f"{text[0].upper()}{text[1:]}.")
        add(cast(AddCommand, child.add_subparsers(metavar="VERB", required=True)))
    top = cast(AddCommand, nouns)
    cmd_check.add(top)
    add_command(top, "version", show_version, "version", "Print the version.", exit_codes())
    completion = add_command(
        top, "completion", show_completion, "completion",
        "Print a completion script: source <(kvfs-admin completion bash).", exit_codes(2),
    )  # fmt: skip
    completion.add_argument("shell", choices=SHELLS, help="for which shell")
    return parser


def show_version(arguments: argparse.Namespace, console: Console) -> int:
    """Print the version."""
    del arguments
    if console.is_json:
        console.put_json("version", {"kvfs_version": __version__})
    else:
        console.put(f"kvfs {__version__}")
    return 0


def show_completion(arguments: argparse.Namespace, console: Console) -> int:
    """Print a completion script."""
    console.put(completion_script(make_parser(), arguments.shell).rstrip("\n"))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run `kvfs-admin`; return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    # Mistakes in the words themselves are told in the form that the words ask for.
    early = Console(is_json="--json" in words, is_verbose="--verbose" in words or "-v" in words)

    def action() -> int:
        arguments = make_parser().parse_args(words)
        for name, value in _DEFAULTS.items():
            if not hasattr(arguments, name):
                setattr(arguments, name, value)
        set_up_logging(is_verbose=arguments.verbose)
        return int(arguments.handler(arguments, _console(arguments)))

    return run("kvfs-admin", early, action)


def _console(arguments: argparse.Namespace) -> Console:
    is_plain = arguments.no_color or arguments.no_header or "NO_COLOR" in os.environ
    return Console(
        is_json=arguments.json,
        is_quiet=arguments.quiet,
        is_verbose=arguments.verbose,
        use_color=not is_plain and sys.stdout.isatty(),
        is_exact=arguments.exact,
        has_header=not arguments.no_header,
    )


if __name__ == "__main__":
    raise SystemExit(main())
