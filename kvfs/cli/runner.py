"""The outermost edge of every command: errors become messages and exit codes.

Layer: L5.

The codes and their meanings are `MEANINGS`; errors bring theirs along (`KvfsError.exit_code`).
"""

import argparse
import os
import sys
from collections.abc import Callable
from typing import Final, NoReturn

from kvfs.cli.console import Console
from kvfs.errors import KvfsError, UsageError

EXIT_INTERNAL: Final = 1
EXIT_USAGE: Final = 2
EXIT_WRONG: Final = 3
EXIT_UNAVAILABLE: Final = 13
EXIT_REFUSED: Final = 16
EXIT_INTERRUPTED: Final = 130
MEANINGS: Final = {
    0: "done",
    1: "internal error",
    2: "usage",
    3: "done, but something is wrong, or the answer is no",
    10: "not found",
    11: "busy or locked",
    12: "no space",
    13: "device unavailable",
    14: "data corrupt",
    15: "format version",
    16: "refused",
    130: "interrupted",
}


class Parser(argparse.ArgumentParser):
    """A parser whose mistakes are UsageErrors, so that --json covers them too."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing and leaving."""
        raise UsageError(f"{message}; see '{self.prog} --help'")


def exit_codes(*codes: int) -> str:
    """Return the sentence about exit codes for a help text."""
    listed = ", ".join(f"{code} {MEANINGS[code]}" for code in (0, *codes))
    return f"exit codes: {listed}; any other code is a failure."


def run(program: str, console: Console, action: Callable[[], int]) -> int:
    """Run a command; return its exit code, having reported what went wrong."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")
    try:
        code = action()
        sys.stdout.flush()
    except KvfsError as error:
        console.fail(error.exit_code, type(error).__name__, str(error), program)
        if console.is_verbose:
            _print_traceback()
        return error.exit_code
    except KeyboardInterrupt:
        console.fail(EXIT_INTERRUPTED, "Interrupted", "interrupted", program)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read the answer has seen enough; keep the interpreter from trying again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        is_permission = isinstance(error, PermissionError)
        code = EXIT_REFUSED if is_permission else EXIT_UNAVAILABLE
        console.fail(code, type(error).__name__, str(error), program)
        return code
    except Exception as error:  # noqa: BLE001 - an edge: a bug becomes a traceback and exit 1
        _print_traceback()
        console.fail(EXIT_INTERNAL, "InternalError", f"internal error: {error!r}", program)
        return EXIT_INTERNAL
    return code


def _print_traceback() -> None:
    import traceback  # only now: every command would pay for it

    traceback.print_exc()


def set_up_logging(*, is_verbose: bool) -> None:
    """Send warnings of the library to stderr. For commands that open a pool."""
    import logging

    level = logging.DEBUG if is_verbose else logging.WARNING
    logging.basicConfig(stream=sys.stderr, level=level, format="%(levelname)s %(name)s %(message)s")
