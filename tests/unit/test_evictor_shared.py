"""Small devices that many namespaces share: each has segments of its own."""

from pathlib import Path

from tests.unit.small_pools import payloads, small_namespace, small_pool


def test_a_namespace_gets_room_where_all_have_little(tmp_path: Path) -> None:
    """Copying survivors into a segment of their own frees nothing: what is cache goes instead."""
    with small_pool(tmp_path, size="64MiB") as pool:
        for number in range(10):
            space = small_namespace(pool, f"n{number}")
            keys, parents = space.keys(range(40))
            space.put(keys, payloads(10, number), parents=parents)
            assert space.match_prefix(keys) == 10
        counters = pool.statistics().counters
        assert counters["blocks_relocated"] <= 10 * 10
        assert counters["segments_evicted"] <= 3 * 10
