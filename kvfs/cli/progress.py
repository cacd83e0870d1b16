"""Progress of long work, on stderr.

Layer: L5. On a terminal a line that is overwritten, 5 times a second (`KVFS_PROGRESS_FPS`);
elsewhere a
line every 10 seconds; with --json lines of type 'status'.
"""

import os
import sys
from types import TracebackType
from typing import Final, Self

import msgspec

from kvfs.cli.console import Console
from kvfs.clock import Clock, SystemClock
from kvfs.units import format_bytes

RATE_VARIABLE: Final = "KVFS_PROGRESS_FPS"
_RATE: Final = 5.0
_SECONDS_BETWEEN_LINES: Final = 10.0


class Progress:
    """Call it with (bytes done, bytes in all). Use as a context manager."""

    def __init__(self, console: Console, job: str, clock: Clock | None = None) -> None:
        self._console = console
        self._job = job
        self._clock = clock or SystemClock()
        self._start_ns = self._clock.monotonic_ns()
        self._is_terminal = sys.stderr.isatty() and not console.is_json
        seconds = 1 / _frames_per_second() if self._is_terminal else _SECONDS_BETWEEN_LINES
        self._interval_ns = int(seconds * 1e9)
        self._due_ns = self._start_ns + self._interval_ns
        self._is_shown = False

    def __call__(self, done: int, total: int) -> None:
        """Show where the work is, if it is time to."""
        now = self._clock.monotonic_ns()
        if now < self._due_ns or self._console.is_quiet:
            return
        self._due_ns = now + self._interval_ns
        elapsed_s = (now - self._start_ns) / 1e9
        if self._console.is_json:
            line = {"message_type": "status", "job": self._job, "bytes_done": done,
                    "bytes_total": total, "seconds_elapsed": round(elapsed_s, 3)}  # fmt: skip
            print(msgspec.json.encode(line).decode(), file=sys.stderr)
            return
        rate = done / elapsed_s if elapsed_s else 0.0
        left = f"left {(total - done) / rate:.0f} s" if rate else ""
        text = (
            f"{self._job}   {100 * done / total if total else 100:3.0f} %   {format_bytes(done)} "
            f"of {format_bytes(total)}   {format_bytes(int(rate))}/s   {left}"
        )
        self._is_shown = self._is_terminal
        print(f"\r{text:<79}" if self._is_terminal else text,
              end="" if self._is_terminal else "\n", file=sys.stderr, flush=True)  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._is_shown:
            print(f"\r{'':<79}\r", end="", file=sys.stderr, flush=True)


def _frames_per_second() -> float:
    try:
        given = float(os.environ.get(RATE_VARIABLE, _RATE))
    except ValueError:
        return _RATE
    return min(60.0, max(0.01, given))
