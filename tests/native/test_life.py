"""Nothing is left behind: descriptors, mappings, references."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvfs import _native
from tests.native.support import PAGE


def make_arena() -> Any:
    fd = _native.memfd("life", PAGE)
    arena = _native.Arena(fd, PAGE, populate=True, huge=True)
    os.close(fd)
    return arena


def attached_index() -> Any:
    index = _native.Index(10)
    return _native.Index.attach(index.fd)


def grown_index() -> Any:
    return _native.Index(10).grow(100)


def attached_ring() -> Any:
    ring = _native.AccessRing(10)
    return _native.AccessRing.attach(ring.fd)


def refused() -> None:
    fd = _native.memfd("life", PAGE)
    for attempt in (_native.Index.attach, _native.AccessRing.attach):
        with pytest.raises(ValueError, match="magic"):
            attempt(fd)
    with pytest.raises(ValueError, match="size of the file"):
        _native.Arena(fd, 2 * PAGE)
    with pytest.raises(OSError, match="not supported"):
        _native.Arena(fd, PAGE, sync=True)
    with pytest.raises(OSError, match=r"memory|space"):
        _native.Mapping(2**46, 2**46)
    os.close(fd)


def count_resources() -> tuple[int, int, tuple[int, ...]]:
    types = (_native.Index, _native.AccessRing, _native.Mapping, _native.Arena)
    return (
        len(os.listdir("/proc/self/fd")),
        sum("memfd:" in line for line in Path("/proc/self/maps").read_text().splitlines()),
        tuple(sys.getrefcount(type_) for type_ in types),
    )


MAKERS: list[Callable[[], Any]] = [
    make_arena, attached_index, grown_index, attached_ring, refused,
    lambda: _native.Index(10), lambda: _native.AccessRing(10), lambda: _native.Mapping(PAGE),
    lambda: memoryview(_native.Mapping(PAGE)), lambda: memoryview(make_arena()),
]  # fmt: skip


@pytest.mark.parametrize("make", MAKERS)
def test_dropping_gives_all_back(make: Callable[[], Any]) -> None:
    make()
    before = count_resources()
    for _ in range(20):
        make()
    assert count_resources() == before


@pytest.mark.parametrize("name", ["Index", "AccessRing", "Mapping", "Arena"])
def test_types_are_final(name: str) -> None:
    with pytest.raises(TypeError, match="not an acceptable base type"):
        type("Sub", (getattr(_native, name),), {})
    with pytest.raises(TypeError, match="immutable"):
        getattr(_native, name).extra = 1
