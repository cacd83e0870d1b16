"""Namespaces and contexts are returned, or made, whoever else makes them at that moment."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvfs.engine.catalog_schema import NamespaceInfo, Node
from kvfs.errors import ExistsError
from kvfs.layout import OPAQUE
from kvfs.pool import Pool
from kvfs.tree import Tree
from tests.unit.small_pools import small_pool


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    with small_pool(tmp_path) as made:
        yield made


def test_a_namespace_made_between_look_and_make(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = pool.catalog.namespace_by_name

    def look_too_early(name: str) -> NamespaceInfo | None:
        monkeypatch.setattr(pool.catalog, "namespace_by_name", real)
        pool.make_namespace(name, OPAQUE)  # as another thread does
        return None

    monkeypatch.setattr(pool.catalog, "namespace_by_name", look_too_early)
    space = pool.namespace("n", OPAQUE)
    assert space.put(space.keys([1])[0], [b"x"]).blocks_stored == 1
    assert pool.statistics().namespaces == 2


def test_a_file_of_that_name_is_in_the_way(pool: Pool) -> None:
    Tree(pool).create_file(1, "n", 0o644, 0, 0)
    with pytest.raises(ExistsError):
        pool.namespace("n", OPAQUE)
    assert pool.statistics().namespaces == 1


def test_a_namespace_that_can_be_found_can_be_used(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = pool.catalog.create_namespace
    stored = []

    def create(*args: Any, **options: Any) -> NamespaceInfo:
        info = real(*args, **options)
        space = pool.namespace("n")  # as another thread does, before `make_namespace` returns
        stored.append(space.put(space.keys([1])[0], [b"x"]).blocks_stored)
        pool.set_retention("n", "durable")
        return info

    monkeypatch.setattr(pool.catalog, "create_namespace", create)
    info = pool.make_namespace("n", OPAQUE)
    assert stored == [1]
    assert pool.store.state.namespaces[info.namespace_id].is_durable


def test_a_context_made_between_look_and_make(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    space = pool.namespace("n", OPAQUE)
    real = pool.catalog.resolve
    made = []

    def look_too_early(start_node_id: int, path: str) -> Node | None:
        monkeypatch.setattr(pool.catalog, "resolve", real)
        made.append(space.context(path).node)  # as another thread does
        return None

    monkeypatch.setattr(pool.catalog, "resolve", look_too_early)
    assert space.context("a/b").node == made[0]
