"""Small stores that are written back line by line."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kvfs import _native
from tests.native.support import PAGE, address, random_bytes

_WAYS = ("fence", "clflush", "clflushopt", "clwb")


@pytest.mark.parametrize("way", _WAYS)
def test_a_store_writes_what_it_is_given_and_nothing_else(way: str) -> None:
    best = _WAYS.index(_native.write_back())
    target = np.full(3 * PAGE, 0xAA, np.uint8)
    for skew, nbytes in ((0, 64), (1, 1), (63, 2), (PAGE - 1, PAGE + 2), (5, 0)):
        data = random_bytes(nbytes + 1, nbytes).tobytes()
        if _WAYS.index(way) > best:
            with pytest.raises(ValueError, match="its best is"):
                _native.store(address(target), data, way)
            continue
        target[:] = 0xAA
        assert _native.store(address(target) + skew, data, way) == 0
        assert target[skew : skew + nbytes].tobytes() == data
        assert (target[:skew] == 0xAA).all()
        assert (target[skew + nbytes :] == 0xAA).all()


def test_an_unknown_way_is_refused() -> None:
    target = np.zeros(1, np.uint8)
    with pytest.raises(ValueError, match="this CPU has no clean"):
        _native.store(address(target), b"x", "clean")
    assert target[0] == 0


def test_a_page_that_is_not_there_is_a_fault() -> None:
    fd = _native.memfd("truncated", 2 * PAGE, is_final=False)
    arena = _native.Arena(fd, 2 * PAGE)
    os.truncate(fd, PAGE)
    assert _native.store(arena.address, b"here") == 0
    assert _native.store(arena.address + PAGE - 2, b"gone") == 3
    assert _native.store(arena.address, bytes(memoryview(arena)[:4])) == 0
    source = memoryview(arena)[PAGE : PAGE + 8]
    assert _native.store(arena.address, source) == 3
    source.release()
    arena.close()
    os.close(fd)


def test_a_touch_changes_no_byte_and_stops_at_a_fault() -> None:
    fd = _native.memfd("truncated", 3 * PAGE, is_final=False)
    arena = _native.Arena(fd, 3 * PAGE)
    data = random_bytes(1, 2 * PAGE).tobytes()
    assert _native.store(arena.address, data) == 0
    os.truncate(fd, 2 * PAGE)
    assert _native.touch(arena.address, 2 * PAGE) == 0
    assert _native.touch(arena.address + 5, 0) == 0
    assert _native.touch(arena.address + PAGE + 7, PAGE) == 3
    assert bytes(memoryview(arena)[: 2 * PAGE]) == data
    arena.close()
    os.close(fd)


def test_a_touch_makes_a_clean_page_dirty(tmp_path: Path) -> None:
    """Seen by the file's time, which the first store into a clean page changes."""
    path = tmp_path / "file"
    path.write_bytes(bytes(2 * PAGE))
    with path.open("r+b") as file:
        arena = _native.Arena(file.fileno(), 2 * PAGE)

        def is_dirtied_by(change: Callable[[], int]) -> bool:
            assert _native.store(arena.address + PAGE, b"dirty") == 0
            os.fsync(file.fileno())
            os.utime(path, ns=(0, 0))
            assert change() == 0
            return path.stat().st_mtime_ns != 0

        by_store = is_dirtied_by(lambda: _native.store(arena.address + PAGE, b"dirty"))
        by_touch = is_dirtied_by(lambda: _native.touch(arena.address + PAGE + 9, 1))
        arena.close()
    if not by_store:
        pytest.skip("this filesystem writes nothing back, so it keeps no account of dirty pages")
    assert by_touch
