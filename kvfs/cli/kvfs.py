"""The command `kvfs`: serve and mount pools, and show what they are good for.

Layer: L5.
"""

import importlib
import sys
from collections.abc import Sequence
from typing import Any, Final

from kvfs import __version__
from kvfs.cli import cmd_mount, cmd_serve
from kvfs.cli.console import Console
from kvfs.cli.runner import Parser, exit_codes, run
from kvfs.errors import UnavailableError

_EXTERNAL: Final = {
    "demo": ("kvfs.demo.run", "watch a language model answer from KV caches on a mount"),
    "bench": ("kvfs.bench.run", "measure a pool on this machine"),
}


def make_parser(chosen: str = "") -> Parser:
    """Build the parser; only the chosen one of the outside commands is imported for it."""
    parser = Parser(
        prog="kvfs",
        description="A context memory for LLM inference: KV caches as files. "
        "Pools are made and looked at with kvfs-admin.",
        epilog=exit_codes(1, 2, 10, 11, 13, 14, 16, 130),
    )
    parser.add_argument("--version", action="version", version=f"kvfs {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    cmd_serve.add_serve(commands.add_parser("serve", help="own a pool, without a mount"))
    cmd_mount.add_mount(commands.add_parser("mount", help="show a pool as files"))
    cmd_mount.add_umount(commands.add_parser("umount", help="unmount, and close the pool"))
    for name, (module, text) in _EXTERNAL.items():
        command = commands.add_parser(name, help=text, description=f"{text.capitalize()}.")
        if name == chosen:
            _load(module, name).add_arguments(command)
    return parser


def _load(module: str, name: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or module
        remedy = "this build has none" if missing.startswith("kvfs") else f"install {missing!r}"
        raise UnavailableError(
            f"'kvfs {name}' cannot run: no module {missing!r}; {remedy}"
        ) from error


def main(argv: Sequence[str] | None = None) -> int:
    """Run `kvfs`; return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    console = Console()

    def action() -> int:
        chosen = next((word for word in words if not word.startswith("-")), "")
        arguments = make_parser(chosen).parse_args(words)
        if arguments.command == "serve":
            return cmd_serve.run_serve(arguments, console)
        if arguments.command == "mount":
            return cmd_mount.run_mount(arguments, console)
        if arguments.command == "umount":
            return cmd_mount.run_umount(arguments, console)
        module, _ = _EXTERNAL[arguments.command]
        return int(_load(module, arguments.command).main(arguments) or 0)

    return run("kvfs", console, action)


if __name__ == "__main__":
    raise SystemExit(main())
