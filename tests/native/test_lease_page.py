"""Lease pages: what a client publishes, what the owner sees, what neither may do."""

import fcntl
import mmap
import os
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest

from kvfs import _native
from kvfs.engine.index import RECORD

ROOT = Path(__file__).parents[2]


def records(*places: tuple[int, int, int], length: int = 1) -> np.ndarray:
    made = np.zeros(len(places), RECORD)
    for i, (device, slot, generation) in enumerate(places):
        made[i]["device"], made[i]["segment"], made[i]["generation"] = device, slot, generation
        made[i]["length"] = length
    return made


def place(device: int, slot: int, generation: int) -> int:
    return device << 56 | slot << 32 | generation


@pytest.fixture
def pair():
    owner = _native.LeasePage(8)
    client = _native.LeasePage.attach(owner.fd, owner.notice_fd)
    yield owner, client
    client.close()
    owner.close()


def test_owner_sees_what_is_held_until_the_last_release(pair) -> None:
    owner, client = pair
    first = client.hold(records((1, 2, 3), (1, 2, 3), (1, 9, 3)))
    second = client.hold(records((1, 2, 3)))
    assert owner.is_held(place(1, 2, 3))
    assert owner.is_held(place(1, 9, 3))
    assert not owner.is_held(place(1, 2, 4))
    held = sorted(np.frombuffer(owner.places(), np.uint64).tolist())
    assert held == [place(1, 2, 3), place(1, 9, 3)]
    client.release(first)
    assert owner.is_held(place(1, 2, 3))
    assert not owner.is_held(place(1, 9, 3))
    client.release(second)
    assert owner.places() == b""


def test_misses_hold_nothing(pair) -> None:
    owner, client = pair
    assert client.hold(records((1, 2, 3), length=0)) == b""
    assert owner.places() == b""


def test_a_full_page_holds_all_or_nothing(pair) -> None:
    owner, client = pair
    kept = client.hold(records(*[(0, slot, 1) for slot in range(7)]))
    with pytest.raises(OSError, match="No space"):
        client.hold(records((0, 3, 1), (0, 100, 1), (0, 101, 1)))
    client.release(kept)
    assert owner.places() == b""
    client.hold(records(*[(0, slot, 1) for slot in range(8)]))
    assert len(owner.places()) == 8 * 8


def test_release_of_what_is_not_held_changes_nothing(pair) -> None:
    owner, client = pair
    client.hold(records((1, 2, 3)))
    client.release(np.array([place(7, 7, 7)], np.uint64).tobytes())
    assert owner.is_held(place(1, 2, 3))
    with pytest.raises(ValueError, match="items of 8 bytes"):
        client.release(b"abc")


def test_a_revoked_page_holds_nothing_and_says_so(pair) -> None:
    owner, client = pair
    client.hold(records((1, 2, 3)))
    assert not client.is_revoked
    owner.revoke()
    assert client.is_revoked
    assert not owner.is_held(place(1, 2, 3))
    assert owner.places() == b""


def test_each_side_keeps_to_its_own(pair) -> None:
    owner, client = pair
    for call in (client.revoke, lambda: owner.hold(records((1, 2, 3))), lambda: owner.beat(1)):
        with pytest.raises(OSError, match="Read-only"):
            call()


def test_the_client_cannot_write_the_notice_or_resize(pair) -> None:
    owner, _ = pair
    with pytest.raises(PermissionError):
        mmap.mmap(owner.notice_fd, 4096, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    for fd in (owner.fd, owner.notice_fd):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, 0)
        assert os.fstat(fd).st_mode & 0o777 == 0o600


def test_heart_beats_until_close(pair) -> None:
    owner, client = pair
    assert owner.heartbeat_ns == 0
    client.beat(1)
    with pytest.raises(OSError, match="already"):
        client.beat(1)
    first = 0
    while not first:
        first = owner.heartbeat_ns
    while owner.heartbeat_ns == first:
        pass
    client.close()
    last = owner.heartbeat_ns
    threading.Event().wait(0.05)
    assert owner.heartbeat_ns == last


def test_a_forked_child_ends_without_the_heart(pair) -> None:
    _, client = pair
    client.beat(1)
    child = os.fork()
    if child == 0:
        client.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize(
    ("offset", "raw"), [(0, b"X"), (8, b"\x09"), (12, b"\xff\xff"), (12, b"\0\0\0\0")]
)
def test_attach_refuses_a_strange_header(offset: int, raw: bytes) -> None:
    owner = _native.LeasePage(8)
    os.pwrite(owner.fd, raw, offset)
    with pytest.raises(ValueError, match="not a lease page"):
        _native.LeasePage.attach(owner.fd, owner.notice_fd)


def test_attach_refuses_strange_files(tmp_path) -> None:
    owner = _native.LeasePage(8)
    plain = os.open(tmp_path / "f", os.O_RDWR | os.O_CREAT)
    unsealed = os.memfd_create("x", os.MFD_ALLOW_SEALING)
    os.ftruncate(unsealed, 8192)
    short = os.memfd_create("x", os.MFD_ALLOW_SEALING)
    fcntl.fcntl(short, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    for fd in (plain, unsealed, short):
        with pytest.raises(ValueError, match="not a lease page"):
            _native.LeasePage.attach(fd, owner.notice_fd)
        with pytest.raises(ValueError, match="not a lease page"):
            _native.LeasePage.attach(owner.fd, fd)
        os.close(fd)
    with pytest.raises(PermissionError):  # it cannot be mapped for writing
        _native.LeasePage.attach(owner.notice_fd, owner.notice_fd)


def test_garbage_in_the_page_harms_nobody() -> None:
    owner = _native.LeasePage(64)
    os.pwrite(owner.fd, os.urandom(64 * 8), 4096)
    os.pwrite(owner.fd, b"\xff" * 64, 0)
    assert not owner.is_held(place(1, 2, 3))
    assert len(owner.places()) <= 64 * 8


def test_retired_index_tells_readers() -> None:
    writer = _native.Index(16)
    reader = _native.Index.attach(writer.fd)
    assert not reader.is_superseded
    writer.retire()
    assert reader.is_superseded
    with pytest.raises(ValueError, match="superseded"):
        writer.insert(records((1, 1, 1)))
    with pytest.raises(ValueError, match="read-only"):
        reader.retire()


def test_nothing_is_recycled_under_a_reader() -> None:
    """The protocol under load; without its second look the same program must fail."""
    build = next((p for p in (ROOT / "build").glob("*/build.ninja")), None)
    if build is None:
        pytest.skip("no build folder: 'make setup' makes one")
    folder = build.parent
    cmake = ROOT / ".venv/bin/cmake"
    subprocess.run([cmake, "--build", folder, "--target", "lease_stress"], check=True,
                   capture_output=True)  # fmt: skip
    program = folder / "lease_stress"
    sound = subprocess.run([program, "200000"], check=False, capture_output=True, text=True)
    assert sound.returncode == 0, sound.stdout
    careless = subprocess.run([program, "200000", "careless"], check=False)
    assert careless.returncode == 1
