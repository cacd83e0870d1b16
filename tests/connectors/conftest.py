"""What tests of the plug-ins share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.connectors.engine_bench import Bench
from tests.connectors.fake_vllm import VERSIONS


@pytest.fixture(params=VERSIONS)
def bench(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Bench]:
    made = Bench(monkeypatch, tmp_path, request.param)
    made.create()
    yield made
    made.close()
