"""The background thread survives failures; closing a pool releases it whatever fails."""

import threading
from pathlib import Path

import pytest

from kvfs.background import Background
from kvfs.errors import DeviceError
from kvfs.lifecycle import open_pool
from kvfs.namespace import Namespace
from tests.unit.small_pools import payloads, small_namespace, small_pool

WAIT_S = 20.0


def keys_of(namespace: Namespace, count: int, seed: int = 0) -> object:
    return namespace.keys([seed + i for i in range(4 * count)])[0]


@pytest.mark.parametrize("error", [OSError(5, "odd"), DeviceError("failed"), ValueError("bug")])
def test_a_failed_step_is_tried_again(error: Exception, expected_warnings: list[str]) -> None:
    expected_warnings.append("background persist failed")
    calls, enough = [], threading.Event()

    def step() -> None:
        calls.append(1)
        if len(calls) <= 3:
            raise error
        enough.set()

    background = Background(step, delay_ms=2)
    background.start()
    background.wake()
    assert enough.wait(WAIT_S)
    background.stop()
    assert len(calls) == 4


def test_blocks_are_persisted_after_a_passing_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected_warnings: list[str]
) -> None:
    expected_warnings.append("background persist failed")
    with small_pool(tmp_path, async_delay_ms=5) as pool:
        publish, failed = pool.files.publish, threading.Event()

        def fail_once() -> None:
            monkeypatch.setattr(pool.files, "publish", publish)
            failed.set()
            raise OSError(5, "odd")

        monkeypatch.setattr(pool.files, "publish", fail_once)
        namespace = small_namespace(pool)
        namespace.put(keys_of(namespace, 2), payloads(2))
        assert failed.wait(WAIT_S)
        for _ in range(400):
            if not pool.store.has_unsynced:
                break
            threading.Event().wait(0.05)
        assert not pool.store.has_unsynced


def test_close_releases_everything_whatever_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise ValueError("odd")

    with pytest.raises(ValueError, match="odd"), small_pool(tmp_path) as pool:
        monkeypatch.setattr(pool.files, "publish", fail)
    pool.close()
    open_pool(tmp_path / "pool").close()
