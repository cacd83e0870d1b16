"""What all tests share: seeds, clocks, a checker of logs, and which tests run where."""

import faulthandler
import gc
import logging
import os
import random
import re
import signal
import zlib
from collections.abc import Iterator

import pytest

from kvfs.clock import ManualClock

_EXPECTED = pytest.StashKey[list[str]]()
faulthandler.register(signal.SIGUSR1, all_threads=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow, too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave slow tests out unless asked for; run low layers first, for -x to stop at the lowest."""
    order = ("unit", "native", "property", "conformance", "corrupt", "compat", "sim", "crash")

    def rank(item: pytest.Item) -> int:
        folder = item.path.parent.name
        return order.index(folder) if folder in order else len(order)

    items.sort(key=rank)
    if config.getoption("--slow") or "slow" in config.getoption("-m"):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]


def pytest_collection_finish() -> None:
    """Take what importing made out of the collections that follow each test."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    item.stash[_EXPECTED] = []
    if item.get_closest_marker("fuse"):
        require_fuse()
    if item.get_closest_marker("gpu") and not os.path.exists("/dev/nvidiactl"):
        pytest.skip("no GPU here: /dev/nvidiactl is missing")


def require_fuse() -> None:
    """Skip without /dev/fuse, or fail where KVFS_REQUIRE_FUSE=1 says that it must be there."""
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        reason = f"/dev/fuse cannot be opened: {error.strerror}"
        if os.environ.get("KVFS_REQUIRE_FUSE") == "1":
            pytest.fail(f"{reason}, and KVFS_REQUIRE_FUSE=1 requires it")
        pytest.skip(reason)


class _Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(f"{record.name}: {record.getMessage()}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Fail a test that logs a warning it did not expect (see `expected_warnings`)."""
    collector = _Collector()
    logger = logging.getLogger("kvfs")
    logger.addHandler(collector)
    try:
        result = yield
    finally:
        logger.removeHandler(collector)
    expected = item.stash[_EXPECTED]
    surprises = [
        message
        for message in collector.messages
        if not any(re.search(pattern, message) for pattern in expected)
    ]
    if surprises:
        pytest.fail("unexpected warnings were logged:\n" + "\n".join(surprises), pytrace=False)
    return result


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    """Collect now, so that an unclosed resource is blamed on the test that left it."""
    gc.collect()


@pytest.fixture
def expected_warnings(request: pytest.FixtureRequest) -> list[str]:
    """Patterns of warnings that the test is allowed to log; append to it."""
    return request.node.stash[_EXPECTED]


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A seed of the test's own; KVFS_SEED overrides it. Printed, so that a failure shows it."""
    value = int(os.environ.get("KVFS_SEED", zlib.crc32(request.node.nodeid.encode())))
    print(f"seed: repeat with KVFS_SEED={value}")
    return value


@pytest.fixture
def rng(seed: int) -> random.Random:
    """Seeded random choices."""
    return random.Random(seed)


@pytest.fixture
def clock() -> ManualClock:
    """Time that moves when told."""
    return ManualClock()
