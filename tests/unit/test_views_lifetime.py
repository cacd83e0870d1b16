"""Views hold what they show for as long as anything shows it, and no longer."""

import gc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvfs.errors import UsageError
from kvfs.layout import Layout
from kvfs.namespace import Namespace
from kvfs.pool import Pool
from tests.unit.small_pools import leases, payloads, small_namespace, small_pool


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    with small_pool(tmp_path) as made:
        yield made


@pytest.fixture
def namespace(pool: Pool) -> Namespace:
    made = small_namespace(pool)
    made.put(made.keys(range(12))[0], payloads(3))
    return made


def test_an_array_keeps_the_lease_of_a_dropped_view(pool: Pool, namespace: Namespace) -> None:
    keys = namespace.keys(range(12))[0]
    array = namespace.view(keys).numpy(np.uint8, (3, -1))
    part = array[1:, 5:9]
    expected = part.copy()
    gc.collect()
    assert leases(pool) == 1
    del array
    gc.collect()
    assert leases(pool) == 1
    assert (part == expected).all()
    del part
    gc.collect()
    assert leases(pool) == 0


def test_the_last_of_several_buffers_ends_the_lease(pool: Pool, namespace: Namespace) -> None:
    view = namespace.view(namespace.keys(range(12))[0])
    first, second = view.memory(), view.memory()
    assert first.readonly
    del view, first
    assert leases(pool) == 1
    del second
    assert leases(pool) == 0


def test_close_ends_the_lease_and_is_refused_while_shown(pool: Pool, namespace: Namespace) -> None:
    view = namespace.view(namespace.keys(range(12))[0])
    array = view.numpy()
    with pytest.raises(BufferError):
        view.close()
    assert leases(pool) == 1
    del array
    view.close()
    view.close()
    assert leases(pool) == 0


def test_a_dropped_view_without_buffers_ends_its_lease(pool: Pool, namespace: Namespace) -> None:
    view = namespace.view(namespace.keys(range(12))[0])
    del view
    assert leases(pool) == 0


@pytest.mark.parametrize(("dtype", "shape"), [("no-such", None), ("u1", (7, 7)), ("u1", ("a",))])
def test_types_and_shapes_that_do_not_fit(
    pool: Pool, namespace: Namespace, dtype: str, shape: tuple[int, ...] | None
) -> None:
    with (
        namespace.view(namespace.keys(range(12))[0]) as view,
        pytest.raises(UsageError, match="view of"),
    ):
        view.numpy(dtype, shape)


def test_a_block_in_the_middle_must_be_whole(pool: Pool) -> None:
    layout = Layout(dtype="uint8", token_shape=(1024,), block_tokens=8, model="m")
    namespace = pool.namespace("small", layout)
    keys = namespace.keys(range(16))[0]
    namespace.put(keys, [b"a" * 7168, b"b" * 8192], token_counts=[7, 8])
    with pytest.raises(UsageError, match="number 0 of 2 has 7168 bytes"):
        namespace.view(keys)
    assert leases(pool) == 0


def test_blocks_with_padding_between(pool: Pool) -> None:
    layout = Layout(dtype="uint8", token_shape=(1000,), block_tokens=5, model="m")
    namespace = pool.namespace("padded", layout)
    keys = namespace.keys(range(10))[0]
    namespace.put(keys, [b"a" * 5000, b"b" * 3000], token_counts=[5, 3])
    with namespace.view(keys) as view:
        assert view.nbytes == layout.stride + 3000
        assert bytes(view.memory()[:5000]) == b"a" * 5000
        assert bytes(view.memory()[layout.stride :]) == b"b" * 3000
    with pytest.raises(UsageError, match="partial"):
        namespace.view(keys[::-1])
