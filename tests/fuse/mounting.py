"""Mounts of temporary pools, and waiting."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvfs.engine.checker import check_pool
from kvfs.fuse.mountpoint import detach, entry_at

ROOT = Path(__file__).parents[2]
MIB = 1 << 20
DEADLINE_S = 30.0
PAUSE_S = 0.005


def wait_until(condition: Callable[[], Any], what: str, seconds: float = DEADLINE_S) -> Any:
    """Return the first true value of a condition, or fail."""
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < end, f"waited {seconds:.0f} s in vain: {what}"
        time.sleep(PAUSE_S)


def sh(command: str, cwd: Path | None = None, timeout: float = DEADLINE_S) -> str:
    """Run a shell command that must succeed; return what it printed."""
    result = subprocess.run(
        command, shell=True, cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert result.returncode == 0, f"{command}: {result.returncode}: {result.stderr}"
    return result.stdout


def sh_fails(command: str, cwd: Path | None = None) -> str:
    """Run a shell command that must fail; return what it said."""
    result = subprocess.run(
        command, shell=True, cwd=cwd, capture_output=True, text=True, timeout=DEADLINE_S,
        check=False,
    )  # fmt: skip
    assert result.returncode != 0, f"{command}: succeeded: {result.stdout}"
    return result.stderr


def python(code: str, *arguments: object, timeout: float = DEADLINE_S) -> str:
    """Run Python in another process; return what it printed."""
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


def launch(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Start Python in another process; `end` it."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def end(process: subprocess.Popen[str]) -> None:
    """Kill a process that `launch` has started, if it still runs."""
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            stream.close()


class MountedPool:
    """A pool in a temporary directory, mounted by another process."""

    def __init__(
        self, base: Path, *, dir_mib: int = 256, dram_mib: int = 64, segment_mib: int = 16,
        pool_options: dict[str, Any] | None = None, mount_options: dict[str, Any] | None = None,
        kind: str = "dir",
    ) -> None:  # fmt: skip
        self.pool_path = base / "pool"
        self.path = base / "mnt"
        self.device_path = base / "device"
        if kind == "dir":
            self.device_path.mkdir()
        else:
            with self.device_path.open("wb") as file:
                file.truncate((dir_mib + 2) * MIB)
        self.path.mkdir()
        self.expected_log: list[str] = []
        self.name_count = 0
        self.expected_findings: set[str] = set()
        self._log_path = base / "mount.log"
        self._config: dict[str, Any] = {
            "pool": str(self.pool_path),
            "mountpoint": str(self.path),
            "pool_options": pool_options or {},
            "mount_options": mount_options or {},
        }
        self._devices = [f"{kind}:{self.device_path}?size={dir_mib}MiB&segment={segment_mib}MiB"]
        if dram_mib:
            self._devices.append(f"dram:?size={dram_mib}MiB&segment=16MiB")
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> "MountedPool":
        """Mount; the pool is made at the first call."""
        config = dict(self._config, devices=[] if self.pool_path.exists() else self._devices)
        with self._log_path.open("a") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.fuse.serve", json.dumps(config)],
                cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip
        self._process = process
        assert process.stdout is not None
        line = process.stdout.readline().strip()
        assert line == "ready", f"mount did not come up: {self._log_path.read_text()}"
        return self

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def core_pid(self) -> int:
        """The process of kvfs-core."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children")
        tasks = Path(f"/proc/{self.pid}/task").glob("*/children")
        found = [int(pid) for path in (children, *tasks) for pid in path.read_text().split()]
        return next(pid for pid in found if Path(f"/proc/{pid}/comm").read_text() == "kvfs-core\n")

    def remount(self, **options: Any) -> None:
        """Mount again with other options of the mount."""
        self.stop()
        self._config["mount_options"] = options
        self.start()

    def wait(self) -> int:
        """Wait for the process to end."""
        process, self._process = self._process, None
        assert process is not None
        assert process.stdout is not None
        code = process.wait(DEADLINE_S)
        process.stdout.close()
        return code

    def kill(self) -> None:
        """End the process as a crash would."""
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        self.wait()

    def stop(self) -> None:
        """Unmount as a service manager does."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        assert self.wait() == 0, self._log_path.read_text()
        assert entry_at(self.path) is None

    def close(self) -> None:
        """End what runs, then check log and pool."""
        if self._process is not None:
            self.stop()
        if entry_at(self.path) is not None:
            detach(self.path)
        self.check_log()
        findings = check_pool(self.pool_path, data=True).findings
        assert {finding.code for finding in findings} <= self.expected_findings, findings

    def abandon(self) -> None:
        """Leave nothing behind after a failed test."""
        if self._process is not None:
            self.kill()
        if entry_at(self.path) is not None:
            detach(self.path)

    @property
    def log(self) -> str:
        """What the mount's owner has logged so far."""
        return self._log_path.read_text()

    def check_log(self) -> None:
        surprises = [
            line
            for line in self._log_path.read_text().splitlines()
            if not any(re.search(pattern, line) for pattern in self.expected_log)
        ]
        assert not surprises, "\n".join(surprises)

    def core_counters(self) -> dict[str, int]:
        """What kvfs-core counted, up to its last ping."""
        counters = self.status()["mount"]["core"]
        assert isinstance(counters, dict)
        return counters

    def status(self) -> dict[str, Any]:
        status = json.loads((self.path / ".kvfs/status.json").read_text())
        assert isinstance(status, dict)
        return status


def write_file(path: Path, data: bytes, flags: int = 0) -> None:
    """Write a new file in one go, and close it."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | flags, 0o644)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view[:MIB]) :]
    finally:
        os.close(fd)
