"""Processes and the place they work in, and that nothing of either is left.

Layer: L5.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Final, Self

from kvfs.errors import UnavailableError

STOP_SECONDS: Final = 20.0


class _Interrupts:
    """Whether interrupts are put off, and whether one came meanwhile. Main thread only."""

    held = 0
    is_pending = False


@contextlib.contextmanager
def signals_as_interrupts() -> Iterator[None]:
    """Let SIGTERM and SIGHUP clean up as Ctrl-C does, and `held_interrupts` put all off."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        _Interrupts.is_pending = True
        if not _Interrupts.held:
            _raise_pending()

    numbers = [signal.SIGTERM, signal.SIGHUP]
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as of a job in the background
        numbers.append(signal.SIGINT)
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def held_interrupts() -> Iterator[None]:
    """Put interrupts off until the block ends: a child that is half made could not be ended."""
    _Interrupts.held += 1
    try:
        yield
    finally:
        _Interrupts.held -= 1
    if not _Interrupts.held:
        _raise_pending()


def _raise_pending() -> None:
    if _Interrupts.is_pending:
        _Interrupts.is_pending = False
        raise KeyboardInterrupt


@contextlib.contextmanager
def workplace(directory: str | None) -> Iterator[Path]:
    """Make a temporary directory; on leaving, unmount what is mounted in it and remove it."""
    root = Path(tempfile.mkdtemp(prefix="kvfs-demo-", dir=directory))
    try:
        for name in ("blocks", "mount"):
            (root / name).mkdir()
        yield root
    finally:
        with held_interrupts():
            unmount(root / "mount")
            if os.path.ismount(root / "mount"):
                sys.stderr.write(f"demo: {root}/mount is still mounted; nothing was removed\n")
            else:
                shutil.rmtree(root, ignore_errors=True)


def unmount(mountpoint: Path) -> None:
    """Unmount, even when the process behind the mount is dead; nothing if it is not mounted."""
    with open("/proc/self/mounts", encoding="utf-8") as mounts:
        points = {line.split()[1] for line in mounts}
    if str(mountpoint).replace(" ", "\\040") in points:
        command = ["fusermount3", "-u", "-z", "-q", str(mountpoint)]
        subprocess.run(command, check=False)


class Child:
    """A Python process of the demo, talked to in lines of JSON. Ends with the `with` block."""

    def __init__(self, command: Sequence[str]) -> None:
        """Name the arguments of the interpreter; the process starts with the `with` block."""
        self._command = [sys.executable, *command]
        self._started: subprocess.Popen[str] | None = None

    @property
    def _process(self) -> "subprocess.Popen[str]":
        assert self._started is not None
        return self._started

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def ask(self, command: str) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{command}\n")
        self._process.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """Wait for one line of JSON.

        Raises:
            UnavailableError: The process ended without one.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait(STOP_SECONDS)
            raise UnavailableError(f"{self._command[2]} ended with status {status}; see above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def kill(self) -> None:
        """SIGKILL, as a crash or the kernel out of memory would."""
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> Self:
        try:
            with held_interrupts():
                # A session of its own: Ctrl-C reaches this process, which ends its children.
                self._started = subprocess.Popen(
                    self._command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    start_new_session=True,
                )
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with held_interrupts():
            self._end()

    def _end(self) -> None:
        if self._started is None:
            return
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
