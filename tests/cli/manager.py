"""A service manager for tests: what systemd does for a service with a descriptor store.

It listens on $NOTIFY_SOCKET, keeps descriptors by name, and gives them to the next start from 3 on.
"""

import contextlib
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Self

from tests.fuse.mounting import wait_until

_FDS_MAX = 4
# Descriptors go to their places in the process that becomes the service, as LISTEN_PID says.
_LAUNCH = """
import fcntl, os, sys
fds = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 500) for fd in sys.argv[1].split(",") if fd]
for place, fd in enumerate(fds, 3):
    os.dup2(fd, place, inheritable=True)
    os.close(fd)
os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


class Manager:
    """Runs one service, again and again. Use as a context manager."""

    def __init__(self, folder: Path, *words: str | Path) -> None:
        """Run `kvfs` with these words; `folder` gets the socket and the logs."""
        self._words = [str(word) for word in words]
        self._address = folder / "notify"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(self._address))
        self._ready = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._folder = folder
        self._starts = 0
        self.stored: list[tuple[str, int]] = []
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.discard()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._socket.close()

    @property
    def names(self) -> list[str]:
        with self._lock:
            return sorted(name for name, _ in self.stored)

    @property
    def log(self) -> str:
        """What the last start has said."""
        return (self._folder / f"service{self._starts}.log").read_text()

    def start(self) -> None:
        """Start the service with what is stored, and wait until it is ready."""
        self._ready.clear()
        self._starts += 1
        with self._lock:
            stored = list(self.stored)
        fds = [fd for _, fd in stored]
        environment = {
            **os.environ, "NOTIFY_SOCKET": str(self._address), "LISTEN_FDS": str(len(fds)),
            "LISTEN_FDNAMES": ":".join(name for name, _ in stored),
        }  # fmt: skip
        with (self._folder / f"service{self._starts}.log").open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _LAUNCH, ",".join(map(str, fds)), "-m", "kvfs.cli.kvfs",
                 *self._words],
                env=environment, pass_fds=fds, stderr=log, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        process = self.process
        wait_until(lambda: self._ready.is_set() or process.poll() is not None, "READY", 60)
        assert process.poll() is None, self.log

    def end(self, number: int) -> int:
        """Send a signal; return the exit code. What is stored stays: the service is restarted."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(60)

    def discard(self) -> None:
        """Forget what is stored, as when the service is stopped for good."""
        with self._lock:
            for _, fd in self.stored:
                os.close(fd)
            self.stored = []

    def _listen(self) -> None:
        while True:
            raw, fds, _, _ = socket.recv_fds(self._socket, 1 << 16, _FDS_MAX)
            if not raw:
                return
            said = dict(line.split("=", 1) for line in raw.decode().splitlines())
            name = said.get("FDNAME", "stored")
            with self._lock:
                if said.get("FDSTORE") == "1":
                    assert len(fds) == 1
                    assert ":" not in name
                    assert len(name) < 255
                    self.stored.append((name, fds[0]))
                if said.get("FDSTOREREMOVE") == "1":
                    for each in [item for item in self.stored if item[0] == name]:
                        self.stored.remove(each)
                        os.close(each[1])
            if "READY" in said:
                self._ready.set()
