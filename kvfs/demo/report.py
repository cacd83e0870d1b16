"""What the demo prints: headings, what tools say of the mount, and one table at the end.

Layer: L5.
"""

import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

from kvfs.units import format_bytes, format_duration


def say(text: str = "") -> None:
    """Print a line now, so that lines of child processes fall between the right ones."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def heading(number: int, text: str) -> None:
    """Print the title of a step."""
    say(f"\n[{number}] {text}")


def quote(text: str) -> None:
    """Print what the model said, indented."""
    body = " ".join(text.split())
    say(textwrap.fill(body, 92, initial_indent='    "', subsequent_indent="     ") + '"')


def show(command: Sequence[str], directory: str) -> None:
    """Run a tool of the system on the mount and print what it prints.

    A tool that is missing or fails is said so; the demo goes on.
    """
    say(f"    $ {' '.join(command)}")
    if shutil.which(command[0]) is None:
        say(f"      ({command[0]} is not installed)")
        return
    environment = {**os.environ, "LC_ALL": "C"}
    done = subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, check=False
    )
    for line in (done.stdout + done.stderr).strip().splitlines():
        say(f"      {line if len(line) < 200 else line[:197] + '...'}")


def table(rows: Sequence[tuple[str, str]]) -> str:
    """Lay out names and values in two columns."""
    width = max(len(name) for name, _ in rows)
    rule = "-" * (width + 2 + max(len(value) for _, value in rows))
    return "\n".join([rule, *(f"{name:<{width}}  {value}" for name, value in rows), rule])


def rows(
    cold: dict[str, Any],
    restored: dict[str, Any],
    shared: dict[str, Any],
    again: dict[str, Any],
    recovered: dict[str, int],
) -> list[tuple[str, str]]:
    """Return the rows of the last table.

    Args:
        cold: The server's answer to the first prompt.
        restored: The answer of the process that mapped the file.
        shared: The server's answer to the second prompt.
        again: The answer of the process that mapped the file after the kill.
        recovered: What came back after the kill, and how long it took.
    """
    factor = cold["first_ns"] / restored["first_ns"]
    stored_bytes = cold["bytes_stored"] + shared["bytes_stored"]
    stored_blocks = cold["blocks_stored"] + shared["blocks_stored"]
    count = len(cold["tokens"])
    tiers = [
        f"tier {device['tier']} ({device['kind']}) {format_bytes(device['live_bytes'])}"
        for device in shared["devices"]
    ]
    values = {
        "time to first token, cold": (
            f"{format_duration(cold['first_ns'])} ({cold['prompt_tokens']} tokens computed)"
        ),
        "time to first token, restored from the file": (
            f"{format_duration(restored['first_ns'])} (1 token computed; {factor:.0f} x faster)"
        ),
        "time to first token, shared prefix": (
            f"{format_duration(shared['first_ns'])} ({shared['computed_tokens']} of "
            f"{shared['prompt_tokens']} tokens computed; "
            f"cold {format_duration(shared['cold_first_ns'])})"
        ),
        "time to first token, after kill -9 and remount": format_duration(again["first_ns"]),
        "recovery: kvfs mount, until the file is whole": format_duration(recovered["recovery_ns"]),
        "lost after kill -9": f"{recovered['lost_blocks']} of {recovered['blocks']} blocks",
        "stored": f"{format_bytes(stored_bytes)} in {stored_blocks} blocks",
        "not stored twice": (
            f"{format_bytes(shared['bytes_deduplicated'])} in "
            f"{shared['blocks_deduplicated']} blocks of the second context"
        ),
        "live bytes by tier": ", ".join(tiers),
        "tokens equal to a cold run": (
            f"restored {count} of {count}, after the kill {count} of {count}, "
            f"shared prefix {shared['same_tokens']} of {len(shared['tokens'])}"
        ),
    }
    return list(values.items())
