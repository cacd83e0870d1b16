"""Cores with an owner in the test; each ends without a trace in the tree of mounts."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.core.owner import FakeOwner, is_mounted


@pytest.fixture
def make_owner(tmp_path: Path) -> Iterator[Callable[..., FakeOwner]]:
    """Start a core with an owner."""
    made: list[FakeOwner] = []

    def make(**options: Any) -> FakeOwner:
        path = tmp_path / f"mnt{len(made)}"
        path.mkdir()
        owner = FakeOwner(path, **options)
        made.append(owner)
        return owner.start()

    try:
        yield make
        for owner in made:
            if owner.process.poll() is None:
                assert owner.stop() == 0, owner.log.read_text()
            owner.close()
            assert not is_mounted(owner.path)
    finally:
        for owner in made:
            owner.close()


@pytest.fixture
def owner(make_owner: Callable[..., FakeOwner]) -> FakeOwner:
    """A core and its owner."""
    return make_owner()
