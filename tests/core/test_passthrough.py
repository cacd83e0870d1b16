"""Passthrough: the reply to OPEN completed, one backing id per inode, given back with the last."""

import hashlib
import os
import random
from pathlib import Path

import pytest

from tests.core.owner import (
    BACKING,
    KEEP_CACHE,
    READ,
    RELEASE,
    ControlError,
    FakeOwner,
    Node,
    is_mounted,
    run,
)  # fmt: skip

pytestmark = pytest.mark.fuse


class Backed:
    def __init__(self, owner: FakeOwner, path: Path, content: bytes) -> None:
        path.write_bytes(content)
        self.owner = owner
        self.fd = os.open(path, os.O_RDONLY)
        self.ids: list[int] = []
        owner.add("f", b"O" * len(content))
        owner.on_open = self.on_open

    def on_open(self, node: Node, fh: int) -> int:
        payload = node.inode.to_bytes(8, "little")
        self.ids.append(self.owner.call(BACKING, fh, payload, self.fd)[0])
        return KEEP_CACHE  # which does not go with passthrough: the core takes it out


@pytest.fixture
def content(rng: random.Random) -> bytes:
    return rng.randbytes(3_000_001)


@pytest.fixture
def backed(owner: FakeOwner, tmp_path: Path, content: bytes) -> Backed:
    return Backed(owner, tmp_path / "backing", content)


def test_read_and_map(backed: Backed, owner: FakeOwner, content: bytes) -> None:
    code = """
import hashlib, mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
print(hashlib.sha256(os.pread(fd, 1 << 30, 0)).hexdigest())
print(hashlib.sha256(mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ)).hexdigest())
"""
    expected = hashlib.sha256(content).hexdigest()
    assert run(code, owner.path / "f").split() == [expected, expected]
    assert owner.count(READ) == 0
    assert owner.status()["native_reads"] == 0


def test_one_id_per_inode(backed: Backed, owner: FakeOwner, content: bytes) -> None:
    files = [(owner.path / "f").open("rb") for _ in range(3)]
    assert len(set(backed.ids)) == 1
    for file in files:
        assert file.read() == content
        file.close()
    owner.wait_for(RELEASE, 3)
    # Given back with the last handle: another backing may follow.
    other = owner.path.parent / "other"
    other.write_bytes(b"another content")
    backed.fd = os.open(other, os.O_RDONLY)
    owner.nodes[2].size = 15
    assert (owner.path / "f").read_bytes() == b"another content"


def test_refused(make_owner: object, tmp_path: Path) -> None:
    owner = make_owner(options="no_passthrough")  # type: ignore[operator]
    assert owner.hello[1] == 0
    owner.add("f", b"from the owner")

    def on_open(node: Node, fh: int) -> None:
        with pytest.raises(ControlError, match="EPERM"):
            owner.call(BACKING, fh, node.inode.to_bytes(8, "little"), 0)

    owner.on_open = on_open
    assert (owner.path / "f").read_bytes() == b"from the owner"


def test_goes_on_without_the_core(backed: Backed, owner: FakeOwner, content: bytes) -> None:
    fd = os.open(owner.path / "f", os.O_RDONLY)
    assert os.pread(fd, 10, 0) == content[:10]
    owner.process.kill()
    owner.process.wait()
    assert os.pread(fd, 100, 1_000_000) == content[1_000_000:1_000_100]
    with pytest.raises(OSError, match="not connected"):
        os.stat(owner.path / "f2")
    with pytest.raises(OSError, match="not connected"):
        os.close(fd)  # which asks to flush
    assert is_mounted(owner.path)
    owner.close()
