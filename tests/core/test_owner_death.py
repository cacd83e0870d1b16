"""The owner dies: what is pending fails, installed files are read on, another owner comes."""

import errno
import json
import os
import signal
import struct
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.core.owner import (
    LANE_WRITE,
    NAMES,
    OPEN,
    FakeOwner,
    Node,
    Request,
    SilentError,
    is_mounted,
    state_of,
)  # fmt: skip
from tests.core.test_name_filter import Filter
from tests.fuse.mounting import ROOT, wait_until

pytestmark = pytest.mark.fuse
SIZE = 100_000


class Dying:
    """An owner whose core may start another (tests.core.serve)."""

    def __init__(
        self, make: Callable[..., FakeOwner], directory: Path, *, deadline_ms: int = 5000,
        **config: Any,
    ) -> None:  # fmt: skip
        self.handles_path = directory / "handles"
        files = {"f": "native", "g": "second owner", "w": ""}
        text = json.dumps({"handles_path": str(self.handles_path), "files": files, **config})
        command = ["env", f"PYTHONPATH={ROOT}", sys.executable, "-m", "tests.core.serve", text]
        self.owner = make(command=command, options=f"deadline_ms={deadline_ms}")
        self.content = os.urandom(SIZE)
        (directory / "segment").write_bytes(self.content)
        self.owner.add_segment(1, directory / "segment")
        for name in files:
            self.owner.add(name, b"x" * 12, SIZE if name == "f" else 12)
        self.owner.on_open = self.on_open
        self.directory = directory

    def on_open(self, node: Node, fh: int) -> int:
        if node.inode == 2:
            self.owner.install(fh, 2, SIZE, SIZE, [(1, 0, SIZE, bytes(16))])
        if node.inode == 4:
            fd = os.open(self.directory / "staging", os.O_RDWR | os.O_CREAT)
            self.owner.call(LANE_WRITE, fh, struct.pack("<QQQQ", 4, 1 << 20, 4096, 0), fd)
            os.close(fd)
        return 1

    def handles(self) -> list[tuple[int, int, int, int]]:
        """What the second owner was told is open."""
        wait_until(
            lambda: self.handles_path.exists() and self.handles_path.read_text().endswith("]"),
            "the second owner",
        )
        number, payload, self.pid = json.loads(self.handles_path.read_text())
        found = list(struct.iter_unpack("<QQII", bytes.fromhex(payload)))
        assert len(found) == number
        return found

    def end(self) -> None:
        """Unmount; the core ends, and the second owner with it."""
        os.kill(self.owner.process.pid, signal.SIGTERM)
        assert self.owner.process.wait(10) == 0, self.owner.log.read_text()
        wait_until(lambda: state_of(self.pid) in ("", "Z"), "the end of the second owner")
        self.owner.close()


@pytest.fixture
def dying(make_owner: Callable[..., FakeOwner], tmp_path: Path) -> Dying:
    return Dying(make_owner, tmp_path)


def test_another_owner_comes(dying: Dying) -> None:
    path = dying.owner.path
    fd = os.open(path / "f", os.O_RDONLY)
    dying.owner.die()
    # READs of what is installed never stop.
    for _ in range(100):
        assert os.pread(fd, 1000, 5000) == dying.content[5000:6000]
    # Requests that come while there is no owner wait for the next one.
    assert (path / "g").read_bytes() == b"second owner"
    assert dying.handles() == [(100, 2, os.O_RDONLY | 0o100000, 1)]
    assert os.pread(fd, 1000, 5000) == dying.content[5000:6000]
    os.close(fd)
    assert sorted(os.listdir(path)) == ["f", "g", "w"]
    dying.end()


def test_what_is_pending_fails_at_once(
    make_owner: Callable[..., FakeOwner], tmp_path: Path
) -> None:
    dying = Dying(make_owner, tmp_path, deadline_ms=100_000)

    def hold(request: Request) -> bytes:
        raise SilentError

    dying.owner.hooks[OPEN] = hold
    found: list[int | None] = []

    def client() -> None:
        try:
            os.open(dying.owner.path / "g", os.O_RDONLY)
        except OSError as error:
            found.append(error.errno)

    thread = threading.Thread(target=client)
    thread.start()
    dying.owner.wait_for(OPEN)
    dying.owner.die()
    thread.join(10)
    assert found == [errno.EIO]  # long before its deadline
    assert dying.handles() == []
    dying.end()


def test_writers_are_broken_until_released(dying: Dying) -> None:
    path = dying.owner.path
    fd = os.open(path / "w", os.O_RDWR)
    os.write(fd, b"abc")
    dying.owner.die()
    assert dying.handles()[0][3] == 2
    for operation in (
        lambda: os.write(fd, b"more"), lambda: os.pread(fd, 3, 0), lambda: os.fsync(fd),
        lambda: os.posix_fallocate(fd, 0, 4096), lambda: os.close(fd),
    ):  # fmt: skip
        with pytest.raises(OSError, match="Input/output"):
            operation()
    assert (path / "g").read_bytes() == b"second owner"
    dying.end()


def test_the_name_filter_goes_with_its_owner(dying: Dying) -> None:
    names = Filter(64)
    names.complete()
    dying.owner.call(NAMES, 1000, struct.pack("<Q", len(names.map)), names.fd)
    with pytest.raises(FileNotFoundError):
        os.stat(dying.owner.path / "g")
    dying.owner.die()
    dying.handles()
    wait_until((dying.owner.path / "g").exists, "a LOOKUP that is asked")
    dying.end()


def test_the_second_owner_may_die_too(dying: Dying) -> None:
    fd = os.open(dying.owner.path / "f", os.O_RDONLY)
    dying.owner.die()
    for _ in range(3):
        dying.handles()
        dying.handles_path.unlink()
        os.kill(dying.pid, signal.SIGKILL)
        assert os.pread(fd, 10, 0) == dying.content[:10]
    assert dying.handles() == [(100, 2, os.O_RDONLY | 0o100000, 1)]
    assert (dying.owner.path / "g").read_bytes() == b"second owner"
    os.close(fd)
    dying.end()


def test_an_owner_that_cannot_live_ends_the_mount(
    make_owner: Callable[..., FakeOwner], tmp_path: Path
) -> None:
    dying = Dying(make_owner, tmp_path, die=True)
    dying.owner.die()
    assert dying.owner.process.wait(20) == 1
    assert not is_mounted(dying.owner.path)
    assert "died 6 times" in dying.owner.log.read_text()


def test_a_command_that_is_not_there(make_owner: Callable[..., FakeOwner]) -> None:
    owner = make_owner(command=["/nonexistent/program"])
    owner.die()
    assert owner.process.wait(10) == 1
    assert "/nonexistent/program: No such file" in owner.log.read_text()
    assert not is_mounted(owner.path)


def test_without_a_command_the_mount_ends(owner: FakeOwner) -> None:
    def hold(request: Request) -> bytes:
        raise SilentError

    owner.hooks[OPEN] = hold
    owner.add("f", b"abc")
    found: list[int | None] = []

    def client() -> None:
        try:
            os.open(owner.path / "f", os.O_RDONLY)
        except OSError as error:
            found.append(error.errno)

    thread = threading.Thread(target=client)
    thread.start()
    owner.wait_for(OPEN)
    owner.die()
    thread.join(10)
    assert found == [errno.ENOTCONN]
    assert owner.process.wait(10) == 1
    assert not is_mounted(owner.path)
    assert "the owner is gone" in owner.log.read_text()
