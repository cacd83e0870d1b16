"""WRITE done by the core within the owner's credit, hashed as it goes; FALLOCATE."""

import errno
import mmap
import os
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.core.owner import (
    CLOSE,
    CREDIT,
    DIGESTS,
    FALLOCATE,
    FSYNC,
    GETATTR,
    LANE_WRITE,
    READ,
    SETATTR,
    SETXATTR,
    WRITE,
    AnswerError,
    ControlError,
    FakeOwner,
    Node,
    Request,
    run,
)  # fmt: skip
from tests.core.test_pending import Held
from tests.core.test_read_lane import digest
from tests.fuse.mounting import sh, sh_fails, wait_until

pytestmark = pytest.mark.fuse
STRIDE = 1 << 20
MIB = 1 << 20


@dataclass
class Written:
    """What CLOSE and DIGESTS say."""

    high_water: int
    start: int
    end: int
    flags: int
    count: int
    digests: list[bytes]

    @classmethod
    def parse(cls, raw: bytes) -> "Written":
        digests = [raw[at : at + 16] for at in range(32, len(raw), 16)]
        return cls(*struct.unpack_from("<QQQII", raw), digests)


IN_ORDER, HAS_FAILED = 1, 2


class Staged:
    """New files are written to a staging file; the owner writes there, too."""

    def __init__(self, owner: FakeOwner, directory: Path, credit: int) -> None:
        self.owner = owner
        self.credit = credit
        self.path = directory / "staging"
        self.stride = STRIDE
        self.raise_by = 0
        self.start = 0
        self.asked: list[tuple[int, ...]] = []  # fh, offset, length, mode
        owner.on_open = self.on_open
        owner.hooks[WRITE] = self.write
        owner.hooks[SETATTR] = self.setattr
        owner.hooks[GETATTR] = self.getattr
        owner.hooks[SETXATTR] = self.allocate
        owner.hooks[READ] = lambda request: b"O" * struct.unpack_from("<QQI", request.body)[2]

    def on_open(self, node: Node, fh: int) -> None:
        self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        self.fh = fh
        self.node = node
        payload = struct.pack("<QQQQ", node.inode, self.credit, self.stride, self.start)
        self.owner.call(LANE_WRITE, fh, payload, self.fd)

    def write(self, request: Request) -> bytes:
        _, offset, size = struct.unpack_from("<QQI", request.body)
        os.pwrite(self.fd, request.body[40:], offset)
        if self.raise_by:
            self.credit = offset + size + self.raise_by
            self.owner.call(CREDIT, self.fh, struct.pack("<Q", self.credit))
        return struct.pack("<II", size, 0)

    def setattr(self, request: Request) -> bytes:
        valid, _, _, size = struct.unpack_from("<IIQQ", request.body)
        if valid & 8:
            os.ftruncate(self.fd, size)
        self.node.size = os.fstat(self.fd).st_size
        return struct.pack("<QII", 0, 0, 0) + self.owner.attributes(self.node)

    def allocate(self, request: Request) -> bytes:
        """What the core makes of FALLOCATE: an attribute without a name."""
        size, flags = struct.unpack_from("<II", request.body)
        assert (size, flags, request.body[8]) == (32, 0, 0)
        fh, offset, length, mode = struct.unpack("<QQQI4x", request.body[9:])
        self.asked.append((fh, offset, length, mode))
        if mode == 0:
            os.posix_fallocate(self.fd, offset, length)
        return b""

    def getattr(self, request: Request) -> bytes:
        if request.inode != 1:
            self.node.size = os.fstat(self.fd).st_size
        return FakeOwner._HANDLERS[GETATTR](self.owner, request)  # type: ignore[no-any-return]

    def close(self) -> tuple[int, list[bytes]]:
        """Close the lane; return what it says was written."""
        written = self.stop()
        return written.high_water, written.digests

    def stop(self, first: int = 0) -> Written:
        """Close the lane; digests come from the first on."""
        return Written.parse(self.owner.call(CLOSE, self.fh, struct.pack("<I", first))[1])


@pytest.fixture
def staged(owner: FakeOwner, tmp_path: Path) -> Staged:
    return Staged(owner, tmp_path, 64 * MIB)


def digests_of(data: bytes, stride: int = STRIDE) -> list[bytes]:
    return [digest(data[at : at + stride]) for at in range(0, len(data), stride)]


def write(path: Path, data: bytes, step: int) -> int:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    for at in range(0, len(data), step):
        assert os.write(fd, data[at : at + step]) == len(data[at : at + step])
    return fd


@pytest.mark.parametrize("step", [1000, 65536, 3 * MIB])
def test_written_in_order(staged: Staged, owner: FakeOwner, rng: random.Random, step: int) -> None:
    data = rng.randbytes(min(3 * MIB + 777, step * 500))
    fd = write(owner.path / "f", data, step)
    assert staged.path.read_bytes() == data
    assert staged.close() == (len(data), digests_of(data))
    os.close(fd)
    assert owner.count(WRITE) == 0
    assert owner.status()["native_write_bytes"] == len(data)


def test_credit(staged: Staged, owner: FakeOwner, rng: random.Random) -> None:
    """Beyond the credit the owner is asked; it gives more; the digests go on."""
    data = rng.randbytes(5 * MIB + 5)
    staged.credit = MIB + 4096
    staged.raise_by = MIB
    fd = write(owner.path / "f", data, 128 << 10)
    assert staged.path.read_bytes() == data
    assert staged.close() == (len(data), digests_of(data))
    os.close(fd)
    assert 2 <= owner.count(WRITE) <= 6


def test_no_credit(staged: Staged, owner: FakeOwner) -> None:
    def refuse(request: Request) -> bytes:
        raise AnswerError(errno.ENOSPC)

    staged.credit = 4096
    owner.hooks[WRITE] = refuse
    fd = write(owner.path / "f", bytes(4096), 4096)
    with pytest.raises(OSError, match="No space"):
        os.write(fd, b"more")
    assert staged.close() == (4100, [])  # what failed is in no digest
    os.close(fd)


@pytest.mark.parametrize("how", ["back", "gap", "rewrite", "truncate"])
def test_out_of_order_has_no_digests(staged: Staged, owner: FakeOwner, how: str) -> None:
    fd = write(owner.path / "f", b"a" * 8192, 4096)
    if how == "back":
        os.pwrite(fd, b"b", 5)
    elif how == "gap":
        os.pwrite(fd, b"b", 9000)
    elif how == "rewrite":
        os.pwrite(fd, b"b" * 8192, 0)
    else:
        os.ftruncate(fd, 4096)
    high, digests = staged.close()
    os.close(fd)
    assert digests == []
    assert high == {"gap": 9001, "truncate": 4096}.get(how, 8192)


def test_extended_while_written_in_order(staged: Staged, owner: FakeOwner) -> None:
    """What others add behind changes nothing: it is written over, or is not among the digests."""
    fd = write(owner.path / "f", b"a" * 8192, 4096)
    os.ftruncate(fd, 10000)
    os.posix_fallocate(fd, 0, 30000)
    os.pwrite(fd, b"b" * 4000, 8192)
    written = staged.stop()
    os.close(fd)
    assert (written.start, written.end, written.high_water) == (0, 12192, 12192)
    assert written.digests == [digest(b"a" * 8192 + b"b" * 4000)]
    assert staged.path.stat().st_size == 30000


@pytest.mark.parametrize("start", [0, 4096, 4097, 8191, 8192])
def test_begun_in_the_middle(
    staged: Staged, owner: FakeOwner, rng: random.Random, start: int
) -> None:
    """Digests are those of the strides from the first that the lane sees whole."""
    staged.stride, staged.start = 4096, start
    data = rng.randbytes(20_000)
    fd = os.open(owner.path / "f", os.O_WRONLY | os.O_CREAT, 0o644)
    for at in range(start, len(data), 777):
        os.pwrite(fd, data[at : min(at + 777, len(data))], at)
    written = staged.stop()
    os.close(fd)
    assert (written.start, written.end, written.flags) == (start, len(data), IN_ORDER)
    first = -(-start // 4096)
    assert written.digests == digests_of(data[first * 4096 :], 4096)


def test_begun_elsewhere_than_announced(staged: Staged, owner: FakeOwner) -> None:
    staged.start = 4096
    fd = write(owner.path / "f", b"a" * 8192, 8192)
    written = staged.stop()
    os.close(fd)
    assert written == Written(8192, 4096, 4096, 0, 0, [])


def test_nothing_written(staged: Staged, owner: FakeOwner) -> None:
    staged.start = 5
    fd = os.open(owner.path / "f", os.O_WRONLY | os.O_CREAT, 0o644)
    assert staged.stop() == Written(0, 5, 5, IN_ORDER, 0, [])
    assert owner.call(CLOSE, staged.fh)[1] == b""
    os.close(fd)


@pytest.mark.parametrize("flags", [0, os.O_DIRECT])
def test_large_requests(staged: Staged, owner: FakeOwner, flags: int) -> None:
    """As large as the kernel makes them; past the page cache as well."""
    assert owner.hello[2] == MIB  # max_write
    source = mmap.mmap(-1, 8 * MIB)
    source.write(bytes(range(256)) * (8 * MIB // 256))
    fd = os.open(owner.path / "f", os.O_WRONLY | os.O_CREAT | flags, 0o644)
    assert os.write(fd, source) == 8 * MIB
    written = staged.stop()
    os.close(fd)
    assert written.digests == digests_of(source[:])
    if flags:
        assert owner.status()["native_writes"] == 8
    source.close()


def test_a_stalled_write(make_owner: Callable[..., FakeOwner]) -> None:
    """EIO in time; the owner learns that a write failed, and waits for it no longer than that."""
    slow = make_owner(options="deadline_ms=100000")
    fast = make_owner(options="deadline_ms=200")
    slow.add("staging", b"")
    held = Held(slow, WRITE)
    fd = os.open(slow.path / "staging", os.O_RDWR)

    def on_open(node: Node, fh: int) -> None:
        nonlocal handle
        handle = fh
        fast.call(LANE_WRITE, fh, struct.pack("<QQQQ", node.inode, MIB, 4096, 0), fd)

    handle = 0
    fast.on_open = on_open  # type: ignore[assignment]
    run("""
import errno, os, sys
fd = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT, 0o644)
try:
    os.write(fd, bytes(4096))
except OSError as error:
    assert error.errno == errno.EIO, error
else:
    raise AssertionError("written")
""", fast.path / "f")  # fmt: skip
    assert fast.status()["deadline_hits"] == 1
    with pytest.raises(ControlError, match="EBUSY"):
        fast.call(CLOSE, handle)
    held.answer()
    written = Written.parse(wait_until(lambda: _closed(fast, handle), "the core is out of it"))
    assert written.flags == HAS_FAILED
    os.close(fd)


def _closed(owner: FakeOwner, fh: int) -> bytes:
    try:
        return owner.call(CLOSE, fh)[1]
    except ControlError:
        return b""


def test_truncated_to_nothing_begins_anew(staged: Staged, owner: FakeOwner) -> None:
    fd = write(owner.path / "f", b"a" * 8192, 4096)
    os.ftruncate(fd, 0)
    os.pwrite(fd, b"new", 0)
    assert staged.close() == (3, [digest(b"new")])
    os.close(fd)


def test_read_back(staged: Staged, owner: FakeOwner, rng: random.Random) -> None:
    data = rng.randbytes(300_000)
    fd = write(owner.path / "f", data, 100_000)
    reader = os.open(owner.path / "f", os.O_RDWR)
    assert os.pread(reader, len(data), 0) == data
    os.close(reader)
    os.close(fd)
    assert owner.count(READ) == 0


def test_digests_before_the_close(staged: Staged, owner: FakeOwner) -> None:
    staged.stride = 4096
    data = bytes(range(256)) * 80_000  # 5000 strides: more than one message takes
    fd = write(owner.path / "f", data, MIB)
    found = Written.parse(owner.call(DIGESTS, staged.fh, struct.pack("<I", 7))[1])
    assert (found.high_water, found.count) == (len(data), 5000)
    assert found.digests == digests_of(data, 4096)[7 : 7 + len(found.digests)]
    assert len(found.digests) > 4000
    rest = staged.stop(4000)
    assert (rest.count, rest.digests) == (5000, digests_of(data, 4096)[4000:])
    os.close(fd)


def test_allocate_is_the_owners(staged: Staged, owner: FakeOwner) -> None:
    """Whatever the handle: the core has no say in what room there is."""
    fd = write(owner.path / "f", b"abc", 3)
    first = staged.fh
    os.posix_fallocate(fd, 0, 5000)
    assert os.fstat(fd).st_size == staged.path.stat().st_size == 5000
    sh(f"fallocate -n -o 5 -l 100000 {owner.path}/f")  # -n: the size stays; another handle
    assert staged.asked[0] == (first, 0, 5000, 0)
    assert staged.asked[1][1:] == (5, 100000, 1)
    run("""
import ctypes, errno, os, sys
libc = ctypes.CDLL(None, use_errno=True)
fd = os.open(sys.argv[1], os.O_RDWR)
for mode in (3, 8, 16, 32):
    assert libc.fallocate(fd, mode, ctypes.c_long(0), ctypes.c_long(4096)) == -1
    assert ctypes.get_errno() in (errno.EOPNOTSUPP, errno.EPERM), mode
""", owner.path / "f")  # fmt: skip
    assert len(staged.asked) == 2
    os.close(fd)


def test_allocate_that_the_owner_refuses(owner: FakeOwner) -> None:
    owner.add("f", b"x" * 100)

    def refuse(request: Request) -> bytes:
        raise AnswerError(errno.ENOSPC)

    owner.hooks[SETXATTR] = refuse
    assert "No space" in sh_fails(f"fallocate -l 5000 {owner.path}/f")
    assert owner.count(FALLOCATE) == 0


def test_fsync_is_the_owners(staged: Staged, owner: FakeOwner) -> None:
    fd = write(owner.path / "f", b"abc", 3)
    os.fsync(fd)
    assert owner.count(FSYNC) == 1
    os.close(fd)


def test_a_read_only_descriptor_is_refused(owner: FakeOwner, tmp_path: Path) -> None:
    (tmp_path / "s").write_bytes(b"")
    fd = os.open(tmp_path / "s", os.O_RDONLY)
    with pytest.raises(ControlError, match="EINVAL"):
        owner.call(LANE_WRITE, 5, struct.pack("<QQQQ", 2, 100, 100, 0), fd)
    os.close(fd)
