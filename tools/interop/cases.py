"""What a peer's module offers, and what comes of it.

Layer: tool.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from interop.site import Site

Figures = dict[str, float | str]


class CaseError(Exception):
    """A case did not do what it should. The message says what the peer saw."""


class UnavailableError(Exception):
    """A peer cannot run here. The message says why."""


class Place(StrEnum):
    """Where a case keeps its files."""

    MOUNT = "kvfs"
    PLAIN = "plain"


class Result(StrEnum):
    """How a case ended."""

    OK = "ok"
    FAILED = "failed"
    UNAVAILABLE = "not available"


@dataclass(frozen=True, slots=True)
class Case:
    """One thing to try. `run` raises CaseError or UnavailableError, or returns figures."""

    what: str
    place: Place
    run: Callable[[], Figures]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: a case that was run. `reason` says why it is not ok."""

    engine: str
    version: str
    what: str
    place: str
    result: Result
    reason: str = ""
    figures: Figures = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Peer:
    """A program to try.

    Attributes:
        name: What `--peer` calls it.
        engine: What the table calls it.
        venv: The venv it runs in, as requirements/VENV.txt; "" for none.
        version: Tells the version that runs; raises UnavailableError where there is none.
        cases: Makes the cases, in order; each is run before the next is asked for.
        pool_bytes: Size of the pool that it gets.
    """

    name: str
    engine: str
    venv: str
    version: Callable[["Site"], str]
    cases: Callable[["Site"], Iterator[Case]]
    pool_bytes: int = 2 << 30
