"""The control connection to kvfs-core, against a stand-in."""

import errno
import socket
import struct
from collections.abc import Iterator

import numpy as np
import pytest

import kvfs
from kvfs.fuse import core_client, core_messages
from kvfs.fuse.core_messages import BLOCK, COUNTERS, Kind, Message
from tests.fuse.fake_core import FakeCore


@pytest.fixture
def core() -> Iterator[FakeCore]:
    core = FakeCore()
    try:
        yield core
    finally:
        core.close()


def test_hello_and_status(core: FakeCore) -> None:
    core.answers[Kind.HELLO] = lambda *_: (0, struct.pack("<IIIIQ", 1, 1, 1 << 20, 57, 57))
    hello = core.client.hello()
    assert (hello.has_passthrough, hello.max_write, hello.device_minor) == (True, 1 << 20, 57)
    # A core that counts more than we know, or less.
    core.answers[Kind.STATUS] = lambda *_: (0, struct.pack("<20Q", *range(20)))
    assert core.client.status() == dict(zip(COUNTERS, range(20), strict=False))
    core.answers[Kind.STATUS] = lambda *_: (0, struct.pack("<2Q", 7, 8))
    assert core.client.status() == {"requests_native_read": 7, "bytes_native_read": 8}


def test_refusals_are_errors(core: FakeCore) -> None:
    core.answers[Kind.STATUS] = lambda *_: (-errno.EINVAL, b"")
    with pytest.raises(OSError, match="Invalid"):
        core.client.status()
    assert core.client.call(Message(Kind.NAMES)) == (0, b"")


def test_large_tables_arrive_whole(core: FakeCore) -> None:
    blocks = np.zeros(50_000, BLOCK)
    blocks["offset"] = np.arange(50_000)
    core.client.install_read(9, 4, 50_000 * 4096, 4096, blocks, 3)
    assert core.count(Kind.READ_BLOCKS) == -(-50_000 // 1364)
    assert (core.tables[9][2] == blocks).all()


def test_busy_close_is_tried_again(core: FakeCore) -> None:
    left = [2]

    def answer(*_: object) -> tuple[int, bytes]:
        left[0] -= 1
        return (-errno.EBUSY if left[0] >= 0 else 0, b"")

    core.answers[Kind.CLOSE] = answer
    core.client.close_lane(1)
    assert core.count(Kind.CLOSE) == 3
    left[0] = 99
    with pytest.raises(OSError, match="busy"):
        core.client.close_lane(1)


def test_open_files_come_in_parts(core: FakeCore) -> None:
    rows = [struct.pack("<QQII", n, n + 100, n % 2, 3 * (n % 3 == 0)) for n in range(10)]
    core.answers[Kind.HANDLES] = lambda start, _: (0, b"".join(rows[start : start + 4]))
    files = core.client.open_files()
    assert [file.fh for file in files] == list(range(10))
    assert files[3].is_passthrough
    assert files[3].flags == 1


def test_late_answer_is_no_answer_to_the_next(
    core: FakeCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core_client, "_DEADLINE_S", 0.2)
    core.answers[Kind.STATUS] = lambda *_: None
    with pytest.raises(kvfs.UnavailableError, match="did not answer"):
        core.client.status()
    late = struct.pack("<IIq", Kind.STATUS | core_messages.ANSWER, 1, 99)
    core._socket.send(late)
    assert core.client.call(Message(Kind.NAMES)) == (0, b"")
    assert not core.client.has_ended


def test_end_of_the_core(core: FakeCore) -> None:
    core._socket.shutdown(socket.SHUT_RDWR)
    with pytest.raises(kvfs.UnavailableError, match="has ended"):
        core.client.status()
    assert core.client.has_ended
    with pytest.raises(kvfs.UnavailableError, match="has ended"):
        core.client.stop()
