"""The door: another owner comes in, and a mount whose owner is gone waits for one."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.core.owner import HOLD, FakeOwner, is_mounted
from tests.core.test_owner_death import SIZE
from tests.fuse.mounting import wait_until

pytestmark = pytest.mark.fuse


@pytest.fixture
def owner(make_owner: Callable[..., FakeOwner], tmp_path: Path) -> Iterator[FakeOwner]:
    owner = make_owner(has_door=True)
    owner.add("f", b"first")
    yield owner
    if owner.process.poll() is None:
        os.kill(owner.process.pid, signal.SIGTERM)
        owner.process.wait(10)


def second(owner: FakeOwner) -> FakeOwner:
    other = owner.enter()
    other.next_fh = 10_000
    other.add("f", b"second")
    return other


def test_requests_wait_for_who_comes(owner: FakeOwner, tmp_path: Path) -> None:
    """Held, they reach neither the owner that goes nor, before it is there, anybody."""
    content = os.urandom(SIZE)
    (tmp_path / "segment").write_bytes(content)
    owner.add_segment(1, tmp_path / "segment")
    node = owner.add("native", b"", SIZE)

    def on_open(found: object, fh: int) -> int:
        owner.install(fh, node.inode, SIZE, SIZE, [(1, 0, SIZE, bytes(16))])
        return 1

    owner.on_open = on_open
    fd = os.open(owner.path / "native", os.O_RDONLY)
    owner.call(HOLD, 30_000)
    found: list[bytes] = []
    thread = threading.Thread(target=lambda: found.append((owner.path / "f").read_bytes()))
    seen = len(owner.seen)
    thread.start()
    assert os.pread(fd, 100, 50) == content[50:150]  # the core reads on
    owner.die()
    assert os.pread(fd, 100, 50) == content[50:150]
    assert len(owner.seen) == seen
    other = second(owner).start()
    thread.join(10)
    assert found == [b"second"]
    assert os.pread(fd, 100, 50) == content[50:150]
    os.close(fd)
    other.call(HOLD, 0)
    assert is_mounted(owner.path)
    other.stop()
    other.close()


def test_a_hold_can_be_taken_back(owner: FakeOwner) -> None:
    owner.call(HOLD, 30_000)
    found: list[bytes] = []
    thread = threading.Thread(target=lambda: found.append((owner.path / "f").read_bytes()))
    thread.start()
    owner.call(HOLD, 0)
    thread.join(10)
    assert found == [b"first"]
    owner.stop()


def test_who_comes_takes_the_place_of_one_that_is_there(owner: FakeOwner) -> None:
    assert (owner.path / "f").read_bytes() == b"first"
    other = second(owner).start()
    assert (owner.path / "f").read_bytes() == b"second"
    other.stop()
    other.close()


def test_one_that_came_and_went_leaves_the_door_open(owner: FakeOwner) -> None:
    owner.call(HOLD, 30_000)
    owner.die()
    other = second(owner).start()
    other.die()  # it never said that it stays
    third = second(owner).start()
    assert (owner.path / "f").read_bytes() == b"second"
    third.stop()
    third.close()


@pytest.mark.parametrize("has_held", [False, True])
def test_the_mount_ends_when_nobody_can_come(owner: FakeOwner, has_held: bool) -> None:
    if has_held:
        owner.call(HOLD, 30_000)
    owner.die()
    assert is_mounted(owner.path)
    assert owner.door is not None
    owner.door.close()
    assert owner.process.wait(10) == 1
    assert not is_mounted(owner.path)
    assert "the owner is gone" in owner.log.read_text()


def test_packets_that_bring_no_sockets(owner: FakeOwner) -> None:
    assert owner.door is not None
    owner.door.send(b"nothing at all")
    for command in (b"x", b"x" * 60_000):
        other = owner.enter(command, count=1)
        for end in (other.requests, other.control):
            end.close()
        os.close(other.core_requests)
    wait_until(lambda: "brings no sockets" in owner.log.read_text(), "a line in the log")
    assert (owner.path / "f").read_bytes() == b"first"
    owner.stop()
