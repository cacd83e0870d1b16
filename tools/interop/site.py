"""Where a peer runs: a pool of its own, mounted, and a plain directory beside it.

Layer: tool.

- The pool has one `dir:` device in a temporary directory; the plain directory is on the same file
  system, so that the two can be compared.
- Peers run as processes with a limit on their time. What they print goes to a file; its end is the
  reason of a failure.
"""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from interop.cases import CaseError, Figures, Place

TOOLS: Final = Path(__file__).resolve().parents[1]
BUILD: Final = TOOLS.parent / "build" / "interop"
MARK: Final = "INTEROP "
# Nothing is fetched while peers run: what they need was installed before.
QUIET: Final = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "DO_NOT_TRACK": "1",
                "TOKENIZERS_PARALLELISM": "false", "PYTHONDONTWRITEBYTECODE": "1"}  # fmt: skip
_STRACE: Final = ("strace", "-f", "-tt", "-T", "-y", "-s", "48", "-e",
                  "trace=%file,%desc,io_uring_setup,io_uring_enter,io_submit")  # fmt: skip


def venv_of(name: str) -> Path:
    """Return the directory of a peer's venv."""
    return BUILD / f"{name}-venv"


@dataclass(slots=True)
class Site:
    """A mounted pool, a plain directory and a venv's interpreter.

    Attributes:
        root: The temporary directory that all of it lies in.
        venv: Name of the peer's venv, or "".
        pool_bytes: Size of the pool's one device.
        strace: Directory that takes system call traces of the peers, if any.
    """

    root: Path
    venv: str
    pool_bytes: int
    strace: Path | None = None
    _count: int = field(default=0, init=False)

    @property
    def mount_point(self) -> Path:
        """Where the pool is mounted."""
        return self.root / "mount"

    @property
    def scratch(self) -> Path:
        """A plain directory for what a peer keeps that is not the subject."""
        return self.root / "scratch"

    @property
    def log(self) -> Path:
        """What the mount logged."""
        return self.root / "mount.log"

    def directory(self, place: Place, name: str) -> Path:
        """Return a directory on the mount, or the plain one of that name; made if missing."""
        base = self.mount_point if place is Place.MOUNT else self.root / "plain"
        (base / name).mkdir(parents=True, exist_ok=True)
        return base / name

    # --- the pool

    def create(self) -> None:
        """Make the pool and the directories."""
        for path in (self.mount_point, self.scratch, self.root / "plain"):
            path.mkdir(parents=True)
        device = f"dir:{self.root / 'device'}?size={self.pool_bytes}"
        self.admin(self.root / "pool", "pool", "create", device)

    def mount(self) -> None:
        """Mount the pool; returns when it answers."""
        self._own("kvfs", "mount", str(self.root / "pool"), str(self.mount_point),
                  "--log", str(self.log))  # fmt: skip

    def unmount(self) -> None:
        """Unmount; returns when the pool is closed."""
        self._own("kvfs", "umount", str(self.mount_point))

    def remount(self) -> None:
        """Let the mount's process end and another one take over."""
        self.unmount()
        self.mount()

    def check(self) -> Figures:
        """Verify every invariant and every checksum of the closed pool."""
        self.verify(self.root / "pool")
        return {"findings": 0, "warnings logged by the mount": self._warnings()}

    def verify(self, pool: Path) -> None:
        """Verify every invariant and every checksum of some closed pool.

        Raises:
            CaseError: Something does not hold.
        """
        findings = json.loads(self.admin(pool, "check", "--data", "--json")).get("findings", [])
        if findings:
            raise CaseError(f"{len(findings)} findings, first {findings[0]}")

    def admin(self, pool: Path, *arguments: str) -> str:
        """Run `kvfs-admin` on some pool; return what it printed."""
        return self._own("admin", "--pool", str(pool), *arguments)

    def abandon(self) -> None:
        """Detach the mount, whatever state it is in."""
        command = ["fusermount3", "-uz", str(self.mount_point)]
        subprocess.run(command, check=False, capture_output=True)

    def _warnings(self) -> int:
        if not self.log.exists():
            return 0
        lines = self.log.read_text(errors="replace").splitlines()
        return sum(" WARNING " in line or " ERROR " in line for line in lines)

    def _own(self, module: str, *arguments: str) -> str:
        command = [sys.executable, "-m", f"kvfs.cli.{module}", *arguments]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=900)
        if done.returncode:
            said = (done.stderr.strip() or done.stdout.strip())[-400:]
            raise CaseError(f"{module} {arguments[0]}: exit status {done.returncode}: {said}")
        return done.stdout

    # --- the peer

    @property
    def python(self) -> Path:
        """The interpreter of the peer's venv."""
        return venv_of(self.venv) / "bin" / "python"

    def run(
        self, *command: str, timeout_s: float = 300, env: Mapping[str, str] | None = None
    ) -> str:
        """Run a program; return what it printed on stdout.

        Raises:
            CaseError: It failed, or took too long.
        """
        with self.started(*command, env=env) as process:
            process.wait(timeout_s)
        return process.stdout.read_text(errors="replace")

    def drive(
        self, module: str, *arguments: str, timeout_s: float = 300,
        env: Mapping[str, str] | None = None,
    ) -> Figures:  # fmt: skip
        """Run the second half of a peer's module in its venv; return what it tells."""
        command = (str(self.python), "-m", f"interop.peers.{module}", *arguments)
        with self.started(*command, env=env) as process:
            process.wait(timeout_s)
        return process.told()

    @contextlib.contextmanager
    def started(self, *command: str, env: Mapping[str, str] | None = None) -> Iterator["Process"]:
        """Start a program; whatever is left of it ends with the context."""
        self._count += 1
        base = self.scratch / f"{self._count:03}-{Path(command[0]).name}"
        if self.strace is not None:
            trace = self.strace / f"{self.root.name}-{base.name}.strace"
            command = (*_STRACE, "-o", str(trace), *command)
        base.with_suffix(".cmd").write_text(shlex.join(command) + "\n")
        environment = {**os.environ, **QUIET, "PYTHONPATH": str(TOOLS), **(env or {})}
        out, err = base.with_suffix(".out"), base.with_suffix(".err")
        with out.open("wb") as out_file, err.open("wb") as err_file:
            popen = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out_file, stderr=err_file,
                env=environment, cwd=self.scratch, start_new_session=True,
            )  # fmt: skip
        try:
            yield Process(popen, out, err)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(popen.pid, signal.SIGKILL)
            popen.wait(60)


@dataclass(frozen=True, slots=True)
class Process:
    """A program that was started, and where its output goes."""

    popen: subprocess.Popen[bytes]
    stdout: Path
    stderr: Path

    def wait(self, timeout_s: float) -> None:
        """Wait for its end.

        Raises:
            CaseError: It failed, or took too long.
        """
        try:
            code = self.popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise CaseError(f"no end after {timeout_s:g} s; {self.last_lines()}") from None
        if code:
            raise CaseError(f"exit status {code}: {self.last_lines()}")

    def told(self) -> Figures:
        """Return what the second half of a peer's module has told."""
        printed = self.stdout.read_text(errors="replace")
        told = [line for line in printed.splitlines() if line.startswith(MARK)]
        if not told:
            raise CaseError("the driver said nothing")
        figures: Figures = json.loads(told[-1].removeprefix(MARK))
        return figures

    def last_lines(self) -> str:
        """Return the end of what it said, on one line."""
        for path in (self.stderr, self.stdout):
            lines = [line.strip() for line in path.read_text(errors="replace").splitlines()]
            # A report in JSON hides what was said before it.
            if lines := [line for line in lines if line and line[0] not in '"{}[]']:
                return " / ".join(lines[-3:])[-400:]
        return "it said nothing"
