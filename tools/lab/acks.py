"""What left the guest: objects and acknowledgements, line by line.

Layer: tool.
"""

import json
import re
from dataclasses import dataclass, field
from typing import Any, Final

_LINE: Final = re.compile(r"(\w+) (begin|done) (\d+)")


@dataclass(slots=True)
class Tally:
    """The operations of one pool: how many were begun, and which were acknowledged."""

    begun: int = 0
    done: set[int] = field(default_factory=set)

    def to_json(self) -> dict[str, Any]:
        """Return it as the guest takes it."""
        return {"begun": self.begun, "done": sorted(self.done)}


def parse(text: str) -> tuple[list[dict[str, Any]], dict[str, Tally]]:
    """Return what was told, and the tally of each pool.

    A last line without its end was cut off in the middle, and counts for nothing: what was not
    wholly out was not acknowledged. But an operation that was begun is, with its number torn off,
    still one more than there were: its pool may hold it, so that the guest says `begin` and waits
    until the line is out before it writes.
    """
    told: list[dict[str, Any]] = []
    tallies: dict[str, Tally] = {}
    for line in text.split("\n")[:-1]:
        if line.startswith("{"):
            told.append(json.loads(line))
        elif found := _LINE.fullmatch(line):
            tally = tallies.setdefault(found[1], Tally())
            number = int(found[3])
            if found[2] == "begin":
                tally.begun = max(tally.begun, number + 1)
            else:
                tally.done.add(number)
    return told, tallies


def merge(all_tallies: dict[str, Tally], later: dict[str, Tally]) -> None:
    """Add what a later boot acknowledged."""
    for kind, tally in later.items():
        known = all_tallies.setdefault(kind, Tally())
        known.begun = max(known.begun, tally.begun)
        known.done |= tally.done
