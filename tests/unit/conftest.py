"""What tests of the engine share."""

from collections.abc import Iterator

import pytest

from kvfs.config import PoolOptions
from kvfs.devices.base import Device
from tests.unit.engine_bench import Engine, MakeEngine


@pytest.fixture
def make() -> Iterator[MakeEngine]:
    made: list[Engine] = []

    def build(*devices: Device, **options: object) -> Engine:
        made.append(Engine(devices, PoolOptions(**options)))  # type: ignore[arg-type]
        return made[-1]

    yield build
    for engine in made:
        engine.abandon()
