"""Names that cannot exist, answered by the core."""

import errno
import mmap
import os
import struct

import pytest
import xxhash

from tests.core.owner import LOOKUP, NAMES, ControlError, FakeOwner

pytestmark = pytest.mark.fuse
SEED = 0x1234567


class Filter:
    """The owner's side of it."""

    def __init__(self, slots: int, seed: int = SEED) -> None:
        self.seed = seed
        self.slots = slots
        self.fd = os.memfd_create("names", os.MFD_CLOEXEC)
        os.truncate(self.fd, 64 + 8 * slots)
        self.map = mmap.mmap(self.fd, 64 + 8 * slots)
        self.map[:32] = struct.pack("<8sQQQ", b"KVFSNAM1", slots, 0, seed)

    def hash_of(self, parent: int, name: str) -> int:
        key = struct.pack("<Q", parent) + name.encode()
        return xxhash.xxh3_64_intdigest(key, self.seed) or 1

    def insert(self, parent: int, name: str) -> None:
        value = slot = self.hash_of(parent, name)
        while True:
            at = 64 + 8 * (slot & (self.slots - 1))
            if self.map[at : at + 8] == bytes(8):
                self.map[at : at + 8] = struct.pack("<Q", value)
                return
            slot += 1

    def complete(self) -> None:
        self.map[16:24] = struct.pack("<Q", 1)

    def install(self, owner: FakeOwner, milliseconds: int = 0) -> None:
        owner.call(NAMES, milliseconds, struct.pack("<Q", len(self.map)), self.fd)


def lookups(owner: FakeOwner, name: str) -> int:
    return sum(request.body == name.encode() + b"\0" for request in owner.of(LOOKUP))


def test_missing_names(owner: FakeOwner) -> None:
    names = Filter(1024)
    for index in range(400):  # among them, some probe past others
        names.insert(1, f"n{index}")
        owner.add(f"n{index}")
    names.install(owner)
    with pytest.raises(FileNotFoundError):
        os.stat(owner.path / "early")  # not complete: the owner is asked
    assert lookups(owner, "early") == 1
    names.complete()
    for index in range(400):
        os.stat(owner.path / f"n{index}")
    for index in range(400):
        with pytest.raises(FileNotFoundError):
            os.stat(owner.path / f"missing{index}")
    assert not any(lookups(owner, f"missing{index}") for index in range(400))
    assert owner.status()["lookups"] == 400
    # A name goes in before it exists.
    names.insert(1, "missing7")
    owner.add("missing7")
    os.stat(owner.path / "missing7")
    assert lookups(owner, "missing7") == 1
    # Longer than a name may be: not in the filter.
    with pytest.raises(OSError, match=r"too long|No such"):
        os.stat(owner.path / ("x" * 256))


def test_negative_timeout(owner: FakeOwner) -> None:
    names = Filter(64)
    names.complete()
    names.install(owner, 60_000)
    for _ in range(50):
        with pytest.raises(FileNotFoundError):
            os.stat(owner.path / "missing")
    assert owner.status()["lookups"] == 1


def test_a_later_filter_replaces(owner: FakeOwner) -> None:
    names = Filter(64)
    names.complete()
    names.install(owner)
    owner.add("f")
    with pytest.raises(FileNotFoundError):
        os.stat(owner.path / "f")
    larger = Filter(128, seed=5)
    larger.insert(1, "f")
    larger.complete()
    larger.install(owner)
    os.stat(owner.path / "f")


def test_a_full_filter_knows_nothing(owner: FakeOwner) -> None:
    names = Filter(8)
    for index in range(8):
        names.insert(1, f"n{index}")
    names.complete()
    names.install(owner)
    with pytest.raises(FileNotFoundError):
        os.stat(owner.path / "missing")
    assert lookups(owner, "missing") == 1


def test_a_filter_that_shrinks(owner: FakeOwner) -> None:
    """Reading past its end must not kill the core."""
    names = Filter(1 << 16)
    names.complete()
    names.install(owner)
    owner.add("f")
    os.truncate(names.fd, 0)
    os.stat(owner.path / "f")
    assert lookups(owner, "f") == 1


def test_refused(owner: FakeOwner) -> None:
    good = Filter(64)

    def fails(nbytes: int, milliseconds: int = 0, fd: int | None = good.fd) -> None:
        with pytest.raises(ControlError) as caught:
            owner.call(NAMES, milliseconds, struct.pack("<Q", nbytes), fd)
        assert caught.value.number == errno.EINVAL

    whole = len(good.map)
    fails(whole + 4096)
    fails(8)
    fails(whole - 8)
    fails(whole, 1 << 40)
    fails(whole, fd=None)
    for header in (
        struct.pack("<8sQQQ", b"KVFSNAM2", 64, 1, 0), struct.pack("<8sQQQ", b"KVFSNAM1", 63, 1, 0),
        struct.pack("<8sQQQ", b"KVFSNAM1", 128, 1, 0), struct.pack("<8sQQQ", b"KVFSNAM1", 0, 1, 0),
    ):  # fmt: skip
        good.map[:32] = header
        fails(whole)
