"""Calling programs in the guest, and the port through which it reports.

Layer: tool.
"""

import json
import os
import shlex
import subprocess
from pathlib import Path
from typing import Any, Final

_PORTS: Final = Path("/sys/class/virtio-ports")


class StepError(Exception):
    """A step found what must not be; the message says what."""


class CannotError(Exception):
    """A step cannot be done on this machine; the message says why."""


class Port:
    """The virtio-serial port: a line that was written has left the guest."""

    def __init__(self) -> None:
        """Find it by its name."""
        names = [path for path in _PORTS.iterdir() if (path / "name").read_text().strip() == "lab"]
        self._fd = os.open(f"/dev/{names[0].name}", os.O_WRONLY | os.O_CLOEXEC)

    def line(self, text: str) -> None:
        """Write a line; on return the host has it."""
        raw = f"{text}\n".encode()
        while raw:
            raw = raw[os.write(self._fd, raw) :]

    def tell(self, **fields: Any) -> None:
        """Write an object as a line."""
        self.line(json.dumps(fields))


def call(command: str, *, check: bool = True, timeout_s: float = 300) -> str:
    """Run a program, its words split as a shell does; return what it printed.

    Raises:
        StepError: It failed, and `check` is set; or it took too long.
    """
    try:
        done = subprocess.run(
            shlex.split(command), check=False, capture_output=True, text=True, timeout=timeout_s,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise StepError(f"{command}: not done after {timeout_s:.0f} s") from error
    if done.returncode and check:
        said = " / ".join((done.stderr or done.stdout).strip().splitlines()[-3:])
        raise StepError(f"{command}: exit status {done.returncode}: {said[-300:]}")
    return done.stdout


def listed(command: str) -> list[dict[str, Any]]:
    """Return the objects that a list command of ndctl, daxctl or cxl prints."""
    found = json.loads(call(command) or "[]")
    return found if isinstance(found, list) else [found]
