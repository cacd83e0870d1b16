"""A pinned context that outgrows its share has been made durable all the same."""

from pathlib import Path

import pytest

from kvfs.errors import BusyError
from tests.unit.small_pools import payloads, small_namespace, small_pool


def test_append_is_durable_before_pinning_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with small_pool(tmp_path) as pool:
        namespace = small_namespace(pool)
        context = namespace.context("c")
        keys = namespace.keys(range(8))[0]
        context.append(keys[:1], payloads(1))
        context.pin()
        synced = []
        real = pool.catalog.sync
        monkeypatch.setattr(pool.catalog, "sync", lambda: (synced.append(1), real()))

        def refuse(*_: object) -> None:
            raise BusyError("too much is pinned")

        monkeypatch.setattr(pool.pins, "follow", refuse)
        with pytest.raises(BusyError):
            context.append(keys[1:], payloads(1, 2), durability="sync")
        assert synced
        assert len(context.keys) == 2
