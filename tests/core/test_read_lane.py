"""READ answered by the core: the same bytes, whatever the way, and the owner for what is odd."""

import errno
import hashlib
import mmap
import os
import random
import struct
from pathlib import Path

import pytest
import xxhash

from tests.core.owner import (
    CLOSE,
    DIRECT_IO,
    DROP_SEGMENT,
    FLUSH,
    READ,
    READ_BEGIN,
    READ_BLOCKS,
    READ_END,
    SEGMENT,
    ControlError,
    FakeOwner,
    Node,
    run,
)  # fmt: skip
from tests.fuse.mounting import wait_until

pytestmark = pytest.mark.fuse
STRIDE = 64 << 10
PAGE = 4096


def digest(data: bytes) -> bytes:
    """XXH3-128 as kvfs stores it: low half first, little-endian."""
    return xxhash.xxh3_128_digest(data)[::-1]


class Scattered:
    """A file whose blocks lie anywhere in two segments."""

    def __init__(self, owner: FakeOwner, directory: Path, rng: random.Random, count: int = 37):
        self.owner = owner
        self.segments = [bytearray(rng.randbytes(4 << 20)) for _ in range(2)]
        self.table: list[tuple[int, int, int, bytes]] = []
        parts = []
        for index in range(count):
            segment, offset = rng.randrange(2), rng.randrange(0, 3 << 20, PAGE)
            stored = rng.choice([STRIDE, STRIDE, 0, PAGE, STRIDE - PAGE])
            if index == count - 1:
                stored = 12345
            data = bytes(self.segments[segment][offset : offset + stored])
            self.table.append((segment + 1, offset, stored, digest(data)))
            parts.append(data.ljust(STRIDE, b"\0"))
        self.size = (count - 1) * STRIDE + 12345
        self.content = b"".join(parts)[: self.size]
        self.paths = []
        for index, data in enumerate(self.segments):
            path = directory / f"segment{index}"
            path.write_bytes(data)
            owner.add_segment(index + 1, path)
            self.paths.append(path)
        # What the owner says differs, so that a forwarded read shows.
        self.node = owner.add("f", b"O" * self.size, self.size)
        self.verify = False
        self.flags = 0
        owner.on_open = self.on_open

    def on_open(self, node: Node, fh: int) -> int:
        self.owner.install(
            fh, node.inode, self.size, STRIDE, self.table,
            verify=self.verify, short=self.flags == DIRECT_IO,
        )  # fmt: skip
        self.fh = fh
        return self.flags


@pytest.fixture
def scattered(owner: FakeOwner, tmp_path: Path, rng: random.Random) -> Scattered:
    return Scattered(owner, tmp_path, rng)


def test_reads_equal_the_blocks(scattered: Scattered, owner: FakeOwner) -> None:
    assert (owner.path / "f").read_bytes() == scattered.content
    assert owner.count(READ) == 0
    assert owner.status()["native_reads"] > 0


def test_close_of_a_reader_asks_nobody(scattered: Scattered, owner: FakeOwner) -> None:
    (owner.path / "f").read_bytes()
    assert owner.count(FLUSH) == 0
    owner.on_open = lambda node, fh: None  # without a lane
    (owner.path / "f").read_bytes()
    wait_until(lambda: owner.count(FLUSH) == 1, "FLUSH of a handle without a lane")


def test_any_range_reads_the_same(
    scattered: Scattered, owner: FakeOwner, rng: random.Random
) -> None:
    scattered.flags = DIRECT_IO  # direct: every read is a request of its own
    fd = os.open(owner.path / "f", os.O_RDONLY)
    try:
        for _ in range(300):
            offset = rng.randrange(scattered.size + 2 * PAGE)
            length = rng.randrange(1, 5 * STRIDE)
            expected = scattered.content[offset : offset + length]
            if offset <= -(-scattered.size // PAGE) * PAGE:
                assert os.pread(fd, length, offset) == expected
        assert os.pread(fd, 10, scattered.size) == b""
        assert owner.count(READ) == 0
        # Far beyond the end the owner decides.
        assert os.pread(fd, 10, scattered.size + 3 * PAGE) == b""
        assert owner.count(READ) == 1
    finally:
        os.close(fd)


def test_a_file_that_the_kernel_believes_longer(scattered: Scattered, owner: FakeOwner) -> None:
    """A short answer would leave zeroes in its pages: the owner decides."""
    scattered.node.size = scattered.size + 2 * PAGE
    scattered.node.content = b"O" * scattered.node.size
    data = (owner.path / "f").read_bytes()
    assert len(data) == scattered.node.size
    assert data[scattered.size :] == b"O" * (2 * PAGE)
    assert owner.count(READ) > 0


def test_ways_to_read(scattered: Scattered, owner: FakeOwner) -> None:
    code = """
import hashlib, mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDONLY | int(sys.argv[2]))
size = os.fstat(fd).st_size
if sys.argv[3] == "mmap":
    data = mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ)
else:
    buffer = mmap.mmap(-1, 8 << 20)
    data = buffer[:os.preadv(fd, [buffer], 0)]
print(hashlib.sha256(data).hexdigest())
"""
    scattered.node.content = scattered.content  # a direct read goes past the end
    expected = hashlib.sha256(scattered.content).hexdigest()
    for flags, way in ((0, "mmap"), (os.O_DIRECT, "read"), (0, "read")):
        assert run(code, owner.path / "f", flags, way).strip() == expected, (flags, way)
    assert owner.count(READ) <= 1


def test_many_parts_are_copied(owner: FakeOwner, tmp_path: Path, rng: random.Random) -> None:
    # 256 blocks of one page in reverse order: more parts than one writev takes.
    data = rng.randbytes(256 * PAGE)
    (tmp_path / "s").write_bytes(data)
    owner.add_segment(1, tmp_path / "s")
    table = [(1, (255 - i) * PAGE, PAGE, bytes(16)) for i in range(256)]
    content = b"".join(data[o : o + PAGE] for _, o, _, _ in table)
    owner.add("f", b"O" * len(content))

    def on_open(node: Node, fh: int) -> int:
        owner.install(fh, node.inode, len(content), PAGE, table, short=True)
        return 1

    owner.on_open = on_open
    assert (owner.path / "f").read_bytes() == content
    assert owner.count(READ) == 0


def test_a_block_that_does_not_verify_is_the_owners(scattered: Scattered, owner: FakeOwner) -> None:
    ref, offset, stored, _ = scattered.table[1]
    index = next(i for i, row in enumerate(scattered.table) if row[2] == STRIDE)
    ref, offset, stored, _ = scattered.table[index]
    scattered.table[index] = (ref, offset, stored, bytes(16))
    scattered.verify = True
    scattered.flags = DIRECT_IO
    data = b""
    fd = os.open(owner.path / "f", os.O_RDONLY)
    try:
        for at in range(0, scattered.size, STRIDE):
            data += os.pread(fd, STRIDE, at)
    finally:
        os.close(fd)
    start = index * STRIDE
    expected = bytearray(scattered.content)
    expected[start : start + STRIDE] = b"O" * len(expected[start : start + STRIDE])
    assert data == expected
    assert owner.count(READ) == 1
    assert owner.status()["verify_failures"] == 1


def test_verified_once(scattered: Scattered, owner: FakeOwner) -> None:
    """What was verified is not read again to be verified, in another handle either."""
    scattered.verify = True
    scattered.flags = DIRECT_IO
    assert (owner.path / "f").read_bytes() == scattered.content
    # Changing the medium behind the core shows whether it looks again; the pages are shared.
    index = next(i for i, row in enumerate(scattered.table) if row[2] == STRIDE)
    ref, offset, _, _ = scattered.table[index]
    with scattered.paths[ref - 1].open("r+b") as file:
        file.seek(offset)
        file.write(b"changed")
    fd = os.open(owner.path / "f", os.O_RDONLY)
    try:
        assert os.pread(fd, 7, index * STRIDE) == b"changed"
    finally:
        os.close(fd)
    assert owner.count(READ) == 0


@pytest.mark.parametrize("verify", [False, True])
def test_a_truncated_segment_is_the_owners(
    scattered: Scattered, owner: FakeOwner, verify: bool
) -> None:
    """Pages that are gone must neither kill the core nor fail the read."""
    scattered.flags = DIRECT_IO
    scattered.verify = verify
    for path in scattered.paths:
        os.truncate(path, 0)
    fd = os.open(owner.path / "f", os.O_RDONLY)
    try:
        index = next(i for i, row in enumerate(scattered.table) if row[2] == STRIDE)
        assert os.pread(fd, 100, index * STRIDE) == b"O" * 100
    finally:
        os.close(fd)
    assert owner.count(READ) == 1
    assert owner.status()["faults"] == 1


def test_an_unfinished_table_serves_nothing(owner: FakeOwner) -> None:
    node = owner.add("f", b"from the owner")

    def on_open(node: Node, fh: int) -> None:
        owner.call(READ_BEGIN, fh, struct.pack("<QQQII", node.inode, 14, 4096, 1, 0))
        with pytest.raises(ControlError) as caught:
            owner.call(READ_END, fh)
        assert caught.value.number == errno.EINVAL

    owner.on_open = on_open
    assert (owner.path / "f").read_bytes() == node.content
    assert owner.count(READ) > 0


def test_refused_messages(owner: FakeOwner, tmp_path: Path) -> None:
    (tmp_path / "s").write_bytes(bytes(2 * PAGE))
    owner.add_segment(7, tmp_path / "s")

    def fails(number: int, *arguments: object) -> None:
        with pytest.raises(ControlError) as caught:
            owner.call(*arguments)  # type: ignore[arg-type]
        assert caught.value.number == number, arguments

    with pytest.raises(ControlError):
        owner.add_segment(7, tmp_path / "s")
    fails(errno.EINVAL, SEGMENT, 8, struct.pack("<QQ", PAGE, PAGE))  # no descriptor
    fails(errno.ENOENT, DROP_SEGMENT, 9)
    fails(errno.EINVAL, READ_BEGIN, 1, struct.pack("<QQQII", 2, PAGE, PAGE, 2, 0))
    fails(errno.EINVAL, READ_BEGIN, 1, b"short")
    owner.call(READ_BEGIN, 1, struct.pack("<QQQII", 2, 2 * PAGE, PAGE, 2, 0))
    fails(errno.EEXIST, READ_BEGIN, 1, struct.pack("<QQQII", 2, PAGE, PAGE, 1, 0))

    def block(ref: int, offset: int, stored: int) -> bytes:
        return struct.pack("<IIQQ16sQ", ref, 0, offset, stored, bytes(16), 0)

    one = struct.pack("<II", 0, 1)
    fails(errno.ENOENT, READ_BLOCKS, 1, one + block(5, 0, PAGE))
    fails(errno.EINVAL, READ_BLOCKS, 1, one + block(7, PAGE + 1, PAGE))
    fails(errno.EINVAL, READ_BLOCKS, 1, one + block(7, 0, PAGE + 1))
    fails(errno.EINVAL, READ_BLOCKS, 1, one + block(7, 2**64 - 1, PAGE))
    fails(errno.EINVAL, READ_BLOCKS, 1, struct.pack("<II", 2, 1) + block(7, 0, PAGE))
    fails(errno.EINVAL, READ_BLOCKS, 1, struct.pack("<II", 0, 9) + block(7, 0, PAGE))
    owner.call(READ_BLOCKS, 1, one + block(7, 0, PAGE))
    fails(errno.EEXIST, READ_BLOCKS, 1, one + block(7, 0, PAGE))
    fails(errno.EINVAL, READ_END, 1)
    fails(errno.ENOSYS, 99)
    owner.call(CLOSE, 1)
    owner.call(CLOSE, 1)
    owner.call(DROP_SEGMENT, 7)
    owner.add_segment(7, tmp_path / "s")


def test_a_dropped_segment_stays_for_open_files(scattered: Scattered, owner: FakeOwner) -> None:
    with (owner.path / "f").open("rb") as file:
        owner.call(DROP_SEGMENT, 1)
        owner.call(DROP_SEGMENT, 2)
        assert file.read() == scattered.content
    assert owner.count(READ) == 0


def test_closed_lanes_are_the_owners(scattered: Scattered, owner: FakeOwner) -> None:
    scattered.flags = DIRECT_IO
    fd = os.open(owner.path / "f", os.O_RDONLY)
    try:
        assert os.pread(fd, 5, 0) == scattered.content[:5]
        owner.call(CLOSE, scattered.fh)
        assert os.pread(fd, 5, 0) == b"OOOOO"
    finally:
        os.close(fd)


def test_release_drops_the_lane(scattered: Scattered, owner: FakeOwner) -> None:
    owner.hooks[18] = lambda request: b""  # an owner that does not close
    assert (owner.path / "f").read_bytes() == scattered.content
    wait_until(lambda: owner.status()["open_files"] == 0, "empty table")


def test_ten_thousand_opens(scattered: Scattered, owner: FakeOwner) -> None:
    """Neither descriptors nor handles are left behind."""
    (owner.path / "f").read_bytes()
    before = len(os.listdir(f"/proc/{owner.process.pid}/fd"))
    code = """
import os, sys
for _ in range(10000):
    fd = os.open(sys.argv[1], os.O_RDONLY)
    os.close(fd)
"""
    owner.hooks[FLUSH] = lambda request: b""
    run(code, owner.path / "f", timeout=120)
    wait_until(lambda: owner.status()["open_files"] == 0, "empty table")
    assert len(os.listdir(f"/proc/{owner.process.pid}/fd")) == before


def test_lseek_takes_all_for_data(scattered: Scattered, owner: FakeOwner) -> None:
    fd = os.open(owner.path / "f", os.O_RDONLY)
    try:
        assert os.lseek(fd, 100, os.SEEK_DATA) == 100
        assert os.lseek(fd, 100, os.SEEK_HOLE) == scattered.size
        assert os.lseek(fd, 0, os.SEEK_END) == scattered.size
    finally:
        os.close(fd)


def test_read_ahead_is_raised(scattered: Scattered, owner: FakeOwner) -> None:
    minor = owner.hello[3]
    path = Path(f"/sys/class/bdi/0:{minor}/read_ahead_kb")
    wait_until(lambda: int(path.read_text()) == 8192, "read-ahead")
    assert mmap.PAGESIZE == PAGE
