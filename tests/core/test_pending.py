"""Requests that the owner answers late, or never: deadlines, interrupts, what is taken back."""

import errno
import os
import signal
import struct
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.core.owner import (
    ALLOW,
    CLOSE,
    CREATE,
    FORGET,
    LOOKUP,
    OPEN,
    OPENDIR,
    READ,
    READDIR,
    RELEASE,
    RELEASEDIR,
    ControlError,
    FakeOwner,
    Request,
    SilentError,
    client,
    run,
    state_of,
)  # fmt: skip
from tests.fuse.mounting import wait_until

pytestmark = pytest.mark.fuse
SHORT = "deadline_ms=100"  # of the core's own; 1.1 s for the owner


class Held:
    """Requests of one kind whose answers wait."""

    def __init__(self, owner: FakeOwner, opcode: int) -> None:
        self.owner = owner
        self.opcode = opcode
        self.requests: list[Request] = []
        owner.hooks[opcode] = self.hold

    def hold(self, request: Request) -> bytes:
        self.requests.append(request)
        raise SilentError

    def answer(self) -> None:
        """AnswerError all as usual; nothing is held any more."""
        self.owner.hooks.pop(self.opcode, None)
        for request in self.requests:
            body = FakeOwner._HANDLERS[self.opcode](self.owner, request)
            self.owner.reply(request.unique, body)


@pytest.fixture
def hasty(make_owner: Callable[..., FakeOwner]) -> FakeOwner:
    return make_owner(options=SHORT)


def test_deadline(hasty: FakeOwner) -> None:
    hasty.add("f", b"abc")
    held = Held(hasty, OPEN)
    start = time.monotonic()
    with pytest.raises(OSError, match="Input/output"):
        os.open(hasty.path / "f", os.O_RDONLY)
    assert time.monotonic() - start > 1.0  # the owner's grace
    assert hasty.status()["deadline_hits"] == 1
    assert hasty.status()["pending"] == 0
    held.answer()
    # The handle that nobody will ever use is taken back.
    release = hasty.wait_for(RELEASE)
    assert release.fh == hasty.next_fh - 1
    assert (hasty.path / "f").read_bytes() == b"abc"
    assert hasty.status()["open_files"] <= 1


def test_more_time(hasty: FakeOwner) -> None:
    hasty.add("f", b"abc")
    held = Held(hasty, OPEN)
    hasty.call(ALLOW, 60_000)
    found: list[bytes] = []
    thread = threading.Thread(target=lambda: found.append((hasty.path / "f").read_bytes()))
    thread.start()
    time.sleep(1.6)
    held.answer()
    thread.join(10)
    hasty.call(ALLOW, 0)
    assert found == [b"abc"]


@pytest.mark.parametrize("opcode", [LOOKUP, CREATE, OPENDIR])
def test_late_answers_are_undone(hasty: FakeOwner, opcode: int) -> None:
    hasty.add("f", b"abc")
    held = Held(hasty, opcode)
    code = {LOOKUP: "os.stat(p + '/f')", CREATE: "open(p + '/new', 'w')", OPENDIR: "os.listdir(p)"}
    run(f"""
import errno, os, sys
p = sys.argv[1]
try:
    {code[opcode]}
except OSError as error:
    assert error.errno == errno.EIO, error
else:
    sys.exit("it succeeded")
""", hasty.path)  # fmt: skip
    before = len(hasty.of(FORGET))
    held.answer()
    if opcode == LOOKUP:
        forget = hasty.wait_for(FORGET, before + 1)
        assert (forget.inode, forget.body) == (2, struct.pack("<Q", 1))
    elif opcode == CREATE:
        assert hasty.wait_for(RELEASE).inode == 3
        forget = hasty.wait_for(FORGET, before + 1)
        assert (forget.inode, forget.body) == (3, struct.pack("<Q", 1))
    else:
        assert hasty.wait_for(RELEASEDIR).fh == 1 << 40


def kill_and_wait(process: subprocess.Popen[str]) -> float:
    start = time.monotonic()
    process.kill()
    process.communicate(timeout=5)
    return time.monotonic() - start


@pytest.mark.parametrize("opcode", [LOOKUP, OPEN, CREATE, READ, READDIR])
def test_a_killed_client_goes_at_once(owner: FakeOwner, opcode: int) -> None:
    """The kernel would wait for an answer for ever; the core gives one when it is interrupted."""
    owner.add("f", b"abc" * 10_000)
    held = Held(owner, opcode)
    code = {
        LOOKUP: "os.stat(p + '/f')", OPEN: "open(p + '/f')", CREATE: "open(p + '/new', 'w')",
        READ: "open(p + '/f', 'rb').read()", READDIR: "os.listdir(p)",
    }[opcode]  # fmt: skip
    process = client(f"import os, sys; p = sys.argv[1]; {code}", owner.path)
    wait_until(lambda: held.requests, "the request")
    assert kill_and_wait(process) < 2
    if opcode != READ:
        assert owner.status()["interrupts"] >= 1
    # The directory is not left locked.
    held.answer()
    assert os.listdir(owner.path) == sorted(owner.nodes[1].children)
    wait_until(lambda: owner.status()["pending"] == 0, "nothing pending")


def test_a_signal_handler_interrupts(owner: FakeOwner) -> None:
    owner.add("f", b"abc")
    held = Held(owner, OPEN)
    process = client("""
import os, signal, sys
class Stop(Exception): pass
def stop(*_): raise Stop
signal.signal(signal.SIGUSR1, stop)
try:
    os.open(sys.argv[1], os.O_RDONLY)
except Stop:
    print("stopped")
""", owner.path / "f")  # fmt: skip
    wait_until(lambda: held.requests, "the request")
    process.send_signal(signal.SIGUSR1)
    start = time.monotonic()
    assert process.communicate(timeout=5)[0].strip() == "stopped"
    assert time.monotonic() - start > 0.7  # not at once: see below
    held.answer()


def test_a_harmless_signal_does_not_fail_a_call(owner: FakeOwner) -> None:
    """Other filesystems do not fail stat(2) so, and a rename would take place all the same."""
    owner.add("f", b"abc")
    held = Held(owner, LOOKUP)
    process = client(
        """
import ctypes, os, signal, sys
signal.signal(signal.SIGUSR1, lambda *_: print("signal", flush=True))
libc = ctypes.CDLL(None, use_errno=True)
print(libc.access(sys.argv[1].encode(), 0), ctypes.get_errno())
""",
        owner.path / "f",
    )
    wait_until(lambda: held.requests, "the request")
    process.send_signal(signal.SIGUSR1)
    time.sleep(0.3)
    held.answer()
    assert process.communicate(timeout=5)[0].split("\n")[:2] in (
        ["signal", "0 0"],
        ["0 0", "signal"],
    )
    assert owner.status()["interrupts"] == 0


def test_killed_after_a_harmless_signal(owner: FakeOwner) -> None:
    """The kernel tells of the first signal only."""
    owner.add("f", b"abc")
    held = Held(owner, LOOKUP)
    code = """
import os, signal, sys
signal.signal(signal.SIGUSR1, lambda *_: None)
os.stat(sys.argv[1])
"""
    process = client(code, owner.path / "f")
    wait_until(lambda: held.requests, "the request")
    process.send_signal(signal.SIGUSR1)
    time.sleep(0.1)
    assert kill_and_wait(process) < 0.7
    held.answer()


def test_an_owner_that_does_not_read(hasty: FakeOwner) -> None:
    """What its socket does not take is queued, and fails in time; READs go on (see below)."""
    hasty.add("f", b"abc")
    gate = threading.Event()

    def stuck(request: Request) -> bytes:
        gate.wait(20)
        return FakeOwner._HANDLERS[OPEN](hasty, request)  # type: ignore[no-any-return]

    hasty.hooks[OPEN] = stuck
    processes = [
        client("import os, sys\nfor i in range(40):\n try: os.stat(sys.argv[1] + str(i))\n"
               " except OSError as e: assert e.errno in (2, 5), e", hasty.path / "n")
        for _ in range(2)
    ]  # fmt: skip
    with pytest.raises(OSError, match="Input/output"):
        os.open(hasty.path / "f", os.O_RDONLY)
    gate.set()
    hasty.hooks.clear()
    for process in processes:
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0, out
    assert (hasty.path / "f").read_bytes() == b"abc"


def test_notifications_do_not_wait_for_each_other(owner: FakeOwner) -> None:
    """The kernel holds an invalidation up until the READ of a page of it is answered."""
    owner.add("f", b"abc" * 10_000)
    held = Held(owner, READ)
    process = client("import sys; print(len(open(sys.argv[1], 'rb').read()))", owner.path / "f")
    wait_until(lambda: held.requests, "the READ")
    for _ in range(3):
        owner.notify(2, struct.pack("<Qqq", 2, 0, 0))  # inode, all of it
        owner.notify(3, struct.pack("<QII", 1, 1, 0) + b"f\0")
    time.sleep(0.2)
    # Meanwhile others are answered.
    assert os.listdir(owner.path) == ["f"]
    held.answer()
    out, _ = process.communicate(timeout=10)
    assert out.strip() == "30000"


def test_a_notification_reaches_the_kernel(owner: FakeOwner) -> None:
    owner.timeouts = 3600
    owner.add("f", b"abc")
    os.stat(owner.path / "f")
    before = owner.count(LOOKUP)
    os.stat(owner.path / "f")
    assert owner.count(LOOKUP) == before
    owner.notify(3, struct.pack("<QII", 1, 1, 0) + b"f\0")

    def asks_again() -> bool:
        os.stat(owner.path / "f")
        return owner.count(LOOKUP) > before

    wait_until(asks_again, "another LOOKUP")


def test_answers_that_make_no_sense(owner: FakeOwner) -> None:
    """Whatever the owner sends, the core lives, and the kernel gets an answer."""
    owner.add("f", b"abc")
    for junk in (
        b"x",
        b"x" * 15,
        bytes(16),
        b"\xff" * 64,
        struct.pack("<IiQ", 16, 0, 999),
        struct.pack("<IiQ", 17, 0, 2),
        struct.pack("<IiQ", 16, 99, 0),
        struct.pack("<IiQ", 16, 2, 0),
    ):
        owner.requests.send(junk)

    def wrong_size(request: Request) -> bytes:
        owner.reply(request.unique, b"short")
        raise SilentError

    owner.hooks[OPEN] = wrong_size
    with pytest.raises(OSError, match="Errno") as caught:
        os.open(owner.path / "f", os.O_RDONLY)
    assert caught.value.errno == errno.EIO
    owner.hooks[OPEN] = lambda request: owner.reply(request.unique, error=5000) or _silent()
    with pytest.raises(OSError, match="Errno"):
        os.open(owner.path / "f", os.O_RDONLY)
    owner.hooks.clear()
    assert (owner.path / "f").read_bytes() == b"abc"


def _silent() -> bytes:
    raise SilentError


def test_a_stalled_device(make_owner: Callable[..., FakeOwner], tmp_path: Path) -> None:
    """A segment on a device that does not answer: EIO in time, and the core reads on."""
    slow = make_owner(options="deadline_ms=100000")
    fast = make_owner(options="deadline_ms=200,threads=2")
    held = Held(slow, READ)
    size = 1 << 20
    slow.add("segment", bytes(size))
    fast.add("f", b"O" * size)
    fast.add_segment(1, slow.path / "segment")

    def on_open(node: object, fh: int) -> int:
        fast.install(fh, 2, size, size, [(1, 0, size, bytes(16))])
        handles.append(fh)
        return 1

    handles: list[int] = []
    fast.on_open = on_open  # type: ignore[assignment]
    code = """
import errno, os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
try:
    os.pread(fd, 4096, 0)
except OSError as error:
    assert error.errno == errno.EIO, error
    print("EIO")
"""
    for round_ in range(4):  # more than there were threads
        assert run(code, fast.path / "f").strip() == "EIO"
        assert os.listdir(fast.path) == ["f"], round_
    assert fast.status()["deadline_hits"] == 4
    assert fast.status()["threads"] > 2
    # Closing what is read still makes no other message wait, if it is not to.
    begin = time.monotonic()
    for fh in handles:
        with pytest.raises(ControlError, match="EBUSY"):
            fast.call(CLOSE, fh, struct.pack("<II", 0, 1))
    brief = time.monotonic() - begin
    with pytest.raises(ControlError, match="EBUSY"):
        fast.call(CLOSE, handles[0])
    assert brief < time.monotonic() - begin - brief, "four take less time than one that waits"
    held.answer()
    owner_pid = fast.process.pid
    wait_until(lambda: state_of(owner_pid) in "SR", "the core is out of it")
    fd = os.open(fast.path / "f", os.O_RDONLY)
    wait_until(lambda: os.pread(fd, 4096, 0) == bytes(4096), "the bytes")
    os.close(fd)
