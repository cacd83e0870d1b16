"""What a command says, where and how: answers on stdout, talk on stderr, text or JSON.

Layer: L5.

- stdout is the answer and nothing else; progress, questions and errors go to stderr.
- Text is for people: IEC units, aligned columns, colour only for words of state and only on a
  terminal.
- JSON begins with `schema {command, version}`; bytes are plain numbers, times RFC 3339; fields are
  added, never changed.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from kvfs.errors import RefusedError
from kvfs.units import format_bytes

DASH: Final = "\u2013"  # a value that does not apply
SCHEMA_VERSION: Final = 1
ASSUME_YES: Final = "KVFS_ASSUME_YES"
_GAP: Final = "  "
_COLORS: Final = {
    "online": "32", "clean": "32", "degraded": "33", "warning": "33", "offline": "31",
    "error": "31",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table. Numbers are aligned to the right."""

    title: str
    is_number: bool = False


@dataclass(frozen=True, slots=True)
class Console:
    """How this run talks."""

    is_json: bool = False
    is_quiet: bool = False
    is_verbose: bool = False
    use_color: bool = False
    is_exact: bool = False
    has_header: bool = True

    # --- talk

    def say(self, text: str) -> None:
        """Tell people something they did not ask for; nothing with --quiet or --json."""
        if not self.is_quiet and not self.is_json:
            print(text, file=sys.stderr)

    def detail(self, text: str) -> None:
        """Tell what only --verbose wants to know."""
        if self.is_verbose:
            print(text, file=sys.stderr)

    def fail(self, code: int, error: str, message: str, program: str) -> None:
        """Report the error that ends the command."""
        if self.is_json:
            line = {"message_type": "exit_error", "code": code, "error": error, "message": message}
            print(msgspec.json.encode(line).decode(), file=sys.stderr)
        else:
            print(f"{program}: {message}", file=sys.stderr)

    # --- answers

    def put(self, text: str) -> None:
        """Print a line of the answer."""
        print(text)

    def put_json(self, command: str, fields: dict[str, Any]) -> None:
        """Print the answer as one JSON object."""
        answer = {"schema": {"command": command, "version": SCHEMA_VERSION}, **fields}
        print(msgspec.json.encode(answer).decode())

    def table(self, columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
        """Print a table; tab-separated and without titles under --no-header."""
        if not self.has_header:
            for row in rows:
                print("\t".join(row))
            return
        titles = [column.title for column in columns]
        widths = [max(len(line[i]) for line in [titles, *rows]) for i in range(len(columns))]
        for line_number, row in enumerate([titles, *rows]):
            cells = [
                cell.rjust(width) if column.is_number else cell.ljust(width)
                for cell, column, width in zip(row, columns, widths, strict=True)
            ]
            if line_number:
                cells = [self.paint(cell) for cell in cells]
            print(_GAP.join(cells).rstrip())

    def size(self, nbytes: int | None) -> str:
        """Format a size: IEC, or the plain number under --exact."""
        if nbytes is None:
            return DASH
        return str(nbytes) if self.is_exact else format_bytes(nbytes)

    def share(self, part: int, whole: int) -> str:
        """Format a ratio in percent."""
        return f"{100 * part / whole:.0f} %" if whole else DASH

    def time(self, wall_ns: int) -> str:
        """Format a time: local, to the second, or nanoseconds under --exact."""
        if not wall_ns:
            return DASH
        if self.is_exact:
            return str(wall_ns)
        from datetime import UTC, datetime  # only now: every command would pay for it

        return f"{datetime.fromtimestamp(wall_ns // 10**9, UTC).astimezone():%Y-%m-%d %H:%M:%S}"

    def paint(self, text: str) -> str:
        """Colour a word of state."""
        color = _COLORS.get(text.strip().lower())
        return f"\x1b[{color}m{text}\x1b[0m" if color and self.use_color else text


def counted(count: int, noun: str) -> str:
    """Return '1 context', '2 contexts'."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def rfc3339(wall_ns: int) -> str | None:
    """Return a time for JSON; None if there is none."""
    if not wall_ns:
        return None
    from datetime import UTC, datetime

    whole = datetime.fromtimestamp(wall_ns // 10**9, UTC)
    return f"{whole:%Y-%m-%dT%H:%M:%S}.{wall_ns % 10**9:09d}Z"


def as_fields(answer: msgspec.Struct) -> dict[str, Any]:
    """Return an answer as JSON fields; points in time lose their `_ns` and become RFC 3339."""

    def convert(value: Any) -> Any:
        if isinstance(value, dict):
            return dict(_convert_item(key, convert(part)) for key, part in value.items())
        return [convert(part) for part in value] if isinstance(value, list) else value

    fields: dict[str, Any] = convert(msgspec.to_builtins(answer))
    return fields


def _convert_item(key: str, value: Any) -> tuple[str, Any]:
    if key in ("modified_ns", "opened_ns"):
        return key.removesuffix("_ns"), rfc3339(value)
    return key, value


def confirm(console: Console, name: str, *, is_yes: bool) -> None:
    """Let somebody answer for a plan that was just shown: --yes, environment, or a typed name.

    `name` is the pool's, whatever the plan is about, so that one answer fits one pool.

    Raises:
        RefusedError: The name was not given, or there is no terminal to ask on.
    """
    if is_yes or os.environ.get(ASSUME_YES) == name:
        return
    if not sys.stdin.isatty() or console.is_json:
        raise RefusedError(
            f"not confirmed: nobody to ask; repeat with --yes or {ASSUME_YES}={name}, "
            "or with --dry-run to see the plan only"
        )
    print(f"type {name!r} to go on: ", end="", file=sys.stderr, flush=True)
    typed = sys.stdin.readline().strip()
    if typed != name:
        raise RefusedError(f"not confirmed: expected {name!r}, found {typed!r}; nothing was done")
