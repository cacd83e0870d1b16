"""What tests of engine and pool share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import kvfs
from kvfs.config import PoolOptions
from kvfs.devices.base import Device
from tests.unit.engine_bench import Engine, MakeEngine
from tests.unit.pool_bench import Place


@pytest.fixture
def make() -> Iterator[MakeEngine]:
    made: list[Engine] = []

    def build(*devices: Device, **options: object) -> Engine:
        made.append(Engine(devices, PoolOptions(**options)))  # type: ignore[arg-type]
        return made[-1]

    yield build
    for engine in made:
        engine.abandon()


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture
def pool(place: Place) -> Iterator[kvfs.Pool]:
    with place.create() as made:
        yield made
