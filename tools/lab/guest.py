"""A guest that runs: its processes, what it says, and how it ends.

Layer: tool.
"""

import json
import os
import socket
import subprocess
import time
from pathlib import Path
from typing import Any, ClassVar, Final, Self

from lab import acks
from lab.machine import Machine, disk_command, qemu_command
from lab.paths import LabError

_POLL_S: Final = 0.05
_ANSWER_S: Final = 20.0
_TAIL_LINES: Final = 6
# Of a machine check: valid, uncorrected, enabled, with address and misc, signalled, found by the
# memory's scrubber; action optional, may be resumed; the address is physical, and of 4 KiB.
_MCE_STATUS: Final = 0xBD000000000000C0
_MCG_STATUS: Final = 0x5
_MCE_MISC: Final = 0x8C


class Guest:
    """QEMU and the disk behind it, from entering the context to leaving it: both are killed."""

    # Times all deadlines; a machine that others use needs more than one that is idle.
    patience: ClassVar[float] = 1.0

    def __init__(self, machine: Machine, *, is_interactive: bool = False) -> None:
        """Take a machine; nothing runs yet. An interactive one has the terminal as its console."""
        self.machine = machine
        self._is_interactive = is_interactive
        self._disk: subprocess.Popen[bytes] | None = None
        self._qemu: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        machine = self.machine
        machine.prepare()
        for path in (machine.port, machine.console, machine.disk_socket, machine.monitor):
            path.unlink(missing_ok=True)
        try:
            self._disk = _start(disk_command(machine), machine)
            deadline = time.monotonic() + _ANSWER_S
            while not machine.disk_socket.exists():
                if self._disk.poll() is not None or time.monotonic() > deadline:
                    raise LabError(f"nbdkit did not come up: {machine.errors.read_text()[-300:]}")
                time.sleep(_POLL_S)
            self._qemu = self._start_qemu()
        except BaseException:
            self.cut()
            raise
        return self

    def _start_qemu(self) -> subprocess.Popen[bytes]:
        if self._is_interactive:
            return subprocess.Popen(qemu_command(self.machine, is_interactive=True))
        return _start(qemu_command(self.machine), self.machine)

    def __exit__(self, *exc_info: object) -> None:
        self.cut()

    def cut(self) -> None:
        """Cut the power: SIGKILL to QEMU, and to the disk with what it had not written yet."""
        for process in (self._qemu, self._disk):
            if process is not None:
                process.kill()
        for process in (self._qemu, self._disk):
            if process is not None:
                process.wait()
        self._qemu = self._disk = None

    def machine_check(self, address: int) -> None:
        """Report an uncorrected error of memory at an address to the guest's processor.

        Raises:
            LabError: QEMU did not take it.
        """
        with socket.socket(socket.AF_UNIX) as monitor:
            monitor.settimeout(_ANSWER_S)
            monitor.connect(str(self.machine.monitor))
            command = f"mce 0 9 {_MCE_STATUS:#x} {_MCG_STATUS:#x} {address:#x} {_MCE_MISC:#x}\n"
            said = _until_prompt(monitor)
            monitor.sendall(command.encode())
            said = _until_prompt(monitor)
        if b"rror" in said or b"CPU" in said:
            raise LabError(f"QEMU's monitor says {said.decode(errors='replace')!r}")

    def heard(self) -> tuple[list[dict[str, Any]], dict[str, acks.Tally]]:
        """Return what has left through the port so far."""
        port = self.machine.port
        return acks.parse(port.read_text() if port.exists() else "")

    def wait_for(self, count: int, timeout_s: float) -> list[dict[str, Any]]:
        """Return the objects it told, once there are so many.

        Args:
            count: How many.
            timeout_s: For how long to wait, on an idle machine; see `patience`.

        Raises:
            LabError: It ended, or time is up.
        """
        timeout_s *= self.patience
        deadline = time.monotonic() + timeout_s
        while True:
            has_ended = self._qemu is None or self._qemu.poll() is not None
            told, _ = self.heard()
            if len(told) >= count:
                return told
            if has_ended or time.monotonic() > deadline:
                what = "the guest ended" if has_ended else f"no answer within {timeout_s:.0f} s"
                raise LabError(f"{what}; {self._said()}")
            time.sleep(_POLL_S)

    def wait_for_done(self, count: int, timeout_s: float) -> None:
        """Wait until so many operations were acknowledged, or time is up."""
        deadline = time.monotonic() + timeout_s * self.patience
        while time.monotonic() < deadline:
            if sum(len(tally.done) for tally in self.heard()[1].values()) >= count:
                return
            time.sleep(_POLL_S)

    def wait_for_end(self, timeout_s: float | None) -> None:
        """Wait until the guest has switched itself off.

        Raises:
            LabError: It has not by then.
        """
        assert self._qemu is not None
        try:
            self._qemu.wait(timeout_s)
        except subprocess.TimeoutExpired as error:
            raise LabError(f"not off after {timeout_s} s; {self._said()}") from error

    def _said(self) -> str:
        console = self.machine.console
        text = console.read_text(errors="replace") if console.exists() else ""
        errors = self.machine.errors.read_text(errors="replace")
        tail = " / ".join([*text.splitlines(), *errors.splitlines()][-_TAIL_LINES:])
        return f"see {console}: {tail}"


def _until_prompt(monitor: socket.socket) -> bytes:
    said = b""
    while not said.endswith(b"(qemu) ") and (part := monitor.recv(4096)):
        said += part
    return said


def write_job(directory: Path, **job: Any) -> Path:
    """Write what the guest is to run; return the file."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "job.json"
    path.write_text(json.dumps(job))
    return path


def _start(command: list[str], machine: Machine) -> subprocess.Popen[bytes]:
    with machine.errors.open("ab") as errors:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors,
            env={**os.environ, "TMPDIR": str(machine.directory)}, start_new_session=True,
        )  # fmt: skip
