"""WRITE done by the core within the owner's credit, hashed as it goes; FALLOCATE."""

import errno
import os
import random
import struct
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
    WRITE,
    AnswerError,
    ControlError,
    FakeOwner,
    Node,
    Request,
    run,
)  # fmt: skip
from tests.core.test_read_lane import digest
from tests.fuse.mounting import sh, sh_fails

pytestmark = pytest.mark.fuse
STRIDE = 1 << 20
MIB = 1 << 20


class Staged:
    """New files are written to a staging file; the owner writes there, too."""

    def __init__(self, owner: FakeOwner, directory: Path, credit: int) -> None:
        self.owner = owner
        self.credit = credit
        self.path = directory / "staging"
        self.stride = STRIDE
        self.raise_by = 0
        owner.on_open = self.on_open
        owner.hooks[WRITE] = self.write
        owner.hooks[SETATTR] = self.setattr
        owner.hooks[GETATTR] = self.getattr
        owner.hooks[READ] = lambda request: b"O" * struct.unpack_from("<QQI", request.body)[2]

    def on_open(self, node: Node, fh: int) -> None:
        self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        self.fh = fh
        self.node = node
        payload = struct.pack("<QQQ", node.inode, self.credit, self.stride)
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

    def getattr(self, request: Request) -> bytes:
        if request.inode != 1:
            self.node.size = os.fstat(self.fd).st_size
        return FakeOwner._HANDLERS[GETATTR](self.owner, request)  # type: ignore[no-any-return]

    def close(self) -> tuple[int, list[bytes]]:
        """Close the lane; return what it says was written."""
        payload = self.owner.call(CLOSE, self.fh)[1]
        high, count = struct.unpack_from("<QI", payload)
        return high, [payload[12 + 16 * i : 28 + 16 * i] for i in range(count)]


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


@pytest.mark.parametrize("how", ["back", "gap", "rewrite", "truncate", "extend"])
def test_out_of_order_has_no_digests(staged: Staged, owner: FakeOwner, how: str) -> None:
    fd = write(owner.path / "f", b"a" * 8192, 4096)
    if how == "back":
        os.pwrite(fd, b"b", 5)
    elif how == "gap":
        os.pwrite(fd, b"b", 9000)
    elif how == "rewrite":
        os.pwrite(fd, b"b" * 8192, 0)
    elif how == "truncate":
        os.ftruncate(fd, 4096)
    else:
        os.ftruncate(fd, 10000)
    high, digests = staged.close()
    os.close(fd)
    assert digests == []
    assert high == {"gap": 9001, "truncate": 4096, "extend": 10000}.get(how, 8192)


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
    found: list[bytes] = []
    while True:
        payload = owner.call(DIGESTS, staged.fh, struct.pack("<I", len(found)))[1]
        _, total = struct.unpack_from("<QI", payload)
        found += [payload[at : at + 16] for at in range(12, len(payload), 16)]
        if len(found) == total:
            break
    assert found == digests_of(data, 4096)
    assert staged.close() == (len(data), [])
    os.close(fd)


def test_allocate(staged: Staged, owner: FakeOwner) -> None:
    staged.credit = MIB
    fd = write(owner.path / "f", b"abc", 3)
    os.posix_fallocate(fd, 0, 5000)
    assert os.fstat(fd).st_size == staged.path.stat().st_size == 5000
    sh(f"fallocate -n -l 100000 {owner.path}/f")  # -n: the size stays; another handle
    # Beyond the credit it is the owner who makes the file longer.
    os.posix_fallocate(fd, 0, 2 * MIB)
    assert os.fstat(fd).st_size == staged.path.stat().st_size == 2 * MIB
    assert owner.count(SETATTR) == 1
    assert owner.count(FALLOCATE) == 0
    os.posix_fallocate(fd, MIB, MIB)  # inside the file
    assert owner.count(SETATTR) == 1
    run("""
import ctypes, errno, os, sys
libc = ctypes.CDLL(None, use_errno=True)
fd = os.open(sys.argv[1], os.O_RDWR)
for mode in (3, 8, 16, 32):
    assert libc.fallocate(fd, mode, ctypes.c_long(0), ctypes.c_long(4096)) == -1
    assert ctypes.get_errno() in (errno.EOPNOTSUPP, errno.EPERM), mode
""", owner.path / "f")  # fmt: skip
    os.close(fd)


def test_allocate_is_refused_elsewhere(owner: FakeOwner) -> None:
    owner.add("f", b"x" * 100)
    assert "not supported" in sh_fails(f"fallocate -l 5000 {owner.path}/f")
    assert owner.count(SETATTR) == 0


def test_fsync_is_the_owners(staged: Staged, owner: FakeOwner) -> None:
    fd = write(owner.path / "f", b"abc", 3)
    os.fsync(fd)
    assert owner.count(FSYNC) == 1
    os.close(fd)


def test_a_read_only_descriptor_is_refused(owner: FakeOwner, tmp_path: Path) -> None:
    (tmp_path / "s").write_bytes(b"")
    fd = os.open(tmp_path / "s", os.O_RDONLY)
    with pytest.raises(ControlError, match="EINVAL"):
        owner.call(LANE_WRITE, 5, struct.pack("<QQQ", 2, 100, 100), fd)
    os.close(fd)
