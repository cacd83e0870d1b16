"""The command `kvfs-admin`: make, look at, check and repair pools.

Layer: L5.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any, Final, cast

from kvfs import __version__
from kvfs.cli.console import Console
from kvfs.cli.options import AddCommand, add_command, common_options
from kvfs.cli.runner import Parser, exit_codes, run

_NOUNS: Final = {
    "pool": "pools: create, status, list, destroy",
    "device": "devices of a pool",
    "context": "contexts: the files of the mount",
    "inspect": "structures of the medium, read-only and raw",
}
_SHELLS: Final = ("bash", "zsh")
_DEFAULTS: Final[dict[str, Any]] = {
    "pool": "", "json": False, "quiet": False, "verbose": False, "no_color": False,
    "exact": False, "no_header": False,
}  # fmt: skip


def make_parser(words: Sequence[str] | None = None) -> Parser:
    """Build the parser; of the nouns only those among `words`, if some are given.

    A command needs its own noun; building all of them would take as long as the rest of it.
    """
    parser = Parser(
        prog="kvfs-admin",
        description="Make, look at, check and repair pools. If a process owns the pool, it is "
        "asked over its control socket; otherwise the command opens the pool itself.",
        epilog=exit_codes(1, 2, 3, 10, 11, 12, 13, 14, 15, 16, 130),
        parents=[common_options()],
    )
    nouns = parser.add_subparsers(metavar="NOUN", required=True)
    for noun, text in _NOUNS.items():
        child = nouns.add_parser(noun, help=text, description=f"{text[0].upper()}{text[1:]}.")
        if words is None or noun in words:
            verbs = cast(AddCommand, child.add_subparsers(metavar="VERB", required=True))
            _add_verbs(noun, verbs)
    top = cast(AddCommand, nouns)
    if words is None or "check" in words:
        _add_verbs("check", top)
    else:
        top.add_parser("check", help="Check every invariant of a pool that is closed")
    add_command(top, "version", show_version, "version", "Print the version.", exit_codes())
    completion = add_command(
        top, "completion", show_completion, "completion",
        "Print a completion script: source <(kvfs-admin completion bash).", exit_codes(2),
    )  # fmt: skip
    completion.add_argument("shell", choices=_SHELLS, help="for which shell")
    return parser


def _add_verbs(noun: str, verbs: AddCommand) -> None:
    """Define the verbs of a noun, importing its module only now."""
    match noun:
        case "pool":
            from kvfs.cli.cmd_pool import add
        case "device":
            from kvfs.cli.cmd_device import add
        case "context":
            from kvfs.cli.cmd_context import add
        case "inspect":
            from kvfs.cli.cmd_inspect import add
        case _:
            from kvfs.cli.cmd_check import add
    add(verbs)


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
    from kvfs.cli import kvfs
    from kvfs.cli.completion import completion_script

    parsers = [make_parser(), kvfs.make_parser()]
    console.put(completion_script(parsers, arguments.shell).rstrip("\n"))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run `kvfs-admin`; return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    # Mistakes in the words themselves are told in the form that the words ask for.
    early = Console(is_json="--json" in words, is_verbose="--verbose" in words or "-v" in words)

    def action() -> int:
        arguments = make_parser(words).parse_args(words)
        for name, value in _DEFAULTS.items():
            if not hasattr(arguments, name):
                setattr(arguments, name, value)
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
