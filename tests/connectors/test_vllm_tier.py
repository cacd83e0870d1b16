"""vLLM's tier: stored, found, loaded; what fails is a miss. Both versions, as recorded."""

import threading
from typing import Any

import numpy as np
import pytest

import kvfs
from kvfs.connectors.vllm_pool import block_keys
from kvfs.lifecycle import destroy_pool, open_pool
from tests.connectors.engine_bench import ROW, Bench


def counts(tier: Any) -> dict[str, int]:
    stats = tier.get_stats()
    return (
        {} if stats is None else {k.removeprefix("vllm:kvfs_"): v for k, v in stats.counts.items()}
    )


def test_stored_found_and_loaded_by_a_second_engine(bench: Bench) -> None:
    keys, content = bench.keys(6), bench.fill(1)
    tier, request = bench.tier(), bench.request("a", bench.keys(6))
    assert bench.found(tier, keys, request) == [False] * 6
    result = bench.store(tier, keys, [5, 4, 3, 2, 1, 0], request)
    assert (result.success, result.transfer_bytes) == (True, 6 * ROW)
    tier.on_request_finished(request)
    figures = counts(tier)
    assert (figures["lookups"], figures["stored_chunks"]) == (6, 6)
    assert "hits" not in figures
    bench.close()

    bench.fill(2)
    tier = bench.tier()
    assert bench.found(tier, [*keys, bytes(36)], request) == [True] * 6 + [False]
    result = bench.load(tier, keys, [10, 11, 12, 13, 14, 15], request)
    assert (result.success, result.successful_keys) == (True, None)
    assert (bench.rows[10:16] == content[[5, 4, 3, 2, 1, 0]]).all()
    figures = counts(tier)
    assert (figures["hits"], figures["loaded_chunks"]) == (6, 6)
    assert figures["loaded_bytes"] == 6 * ROW
    assert tier.get_stats() is None


def test_first_answer_is_retry(bench: Bench) -> None:
    tier, request = bench.tier(), bench.request("a", [])
    (key,) = bench.keys(1)
    retry = bench.vllm.LookupResult.RETRY
    assert tier.lookup(key, request) is retry
    assert tier.lookup(key, request) is retry  # nothing is looked up before the step has ended
    tier.on_request_finished(request)
    bench.step(tier)  # nobody waits for it any more
    assert "lookups" not in counts(tier)


def test_what_cannot_be_loaded_is_a_miss_from_then_on(bench: Bench) -> None:
    keys, content = bench.keys(4), bench.fill(1)
    tier, request = bench.tier(), bench.request("a", bench.keys(4))
    bench.store(tier, keys, [0, 1, 2, 3], request)
    space = tier._link.namespace()
    named = block_keys(space.info.namespace_id, keys)
    assert space.pool.store.drop(space.info.namespace_id, named[3:]) == 1
    assert bench.found(tier, keys, request) == [True, True, True, False]
    result = bench.load(tier, keys, [4, 5, 6, 7], request)
    assert (result.success, set(result.successful_keys)) == (False, set(keys[:3]))
    assert (bench.rows[4:7] == content[:3]).all()
    assert result.transfer_bytes == 3 * ROW
    assert counts(tier)["missed_loads"] == 1
    # Found, then evicted before it was loaded: not tried again by this request.
    space.pool.store.drop(space.info.namespace_id, named[:1])
    result = bench.load(tier, keys[:1], [8], request)
    assert (result.success, result.successful_keys) == (False, None)
    assert bench.found(tier, keys, request) == [False, True, True, False]
    bench.store(tier, keys[:1], [0], request)  # computed again
    assert bench.found(tier, keys, request) == [True, True, True, False]


def test_pool_of_another_owner_is_a_miss_until_it_is_free(
    bench: Bench, expected_warnings: list[str]
) -> None:
    expected_warnings += ["no KV cache from kvfs: .*pool is in use.*engines share a pool",
                          "the pool is open now"]  # fmt: skip
    keys, request = bench.keys(2), bench.request("a", bench.keys(2))
    bench.fill(1)
    with open_pool(bench.path):
        tier = bench.tier()
        assert bench.found(tier, keys, request) == [False, False]
        assert not bench.store(tier, keys, [0, 1], request).success
        assert not bench.load(tier, keys, [2, 3], request).success
        figures = counts(tier)
        assert (figures["unavailable_lookups"], figures["failed_chunks"]) == (2, 2)
    while not bench.store(tier, keys, [0, 1], request).success:
        pass
    assert bench.found(tier, keys, bench.request("b", keys)) == [True, True]


def test_missing_pool_is_a_miss_until_it_is_made(
    bench: Bench, expected_warnings: list[str]
) -> None:
    expected_warnings += ["no KV cache .*no pool: .*pool create", "the pool is open now"]
    destroy_pool(bench.path)
    tier, request = bench.tier(), bench.request("a", [])
    keys = bench.keys(1)
    assert bench.found(tier, keys, request) == [False]
    bench.create()
    while not bench.store(tier, keys, [0], request).success:
        pass


def test_full_queue_refuses_at_once(bench: Bench) -> None:
    tier, gate = bench.tier(store_queue_chunks=2), threading.Event()
    keys, request = bench.keys(5), bench.request("a", bench.keys(5))
    tier._transfers.after_stores(gate.wait)
    tier.submit_store(bench.job(keys[:4], [0, 1, 2, 3], request, load=False))  # the queue is empty
    tier.submit_store(bench.job(keys[4:], [4], request, load=False))
    (refused,) = tier.get_finished_jobs()
    assert (refused.job_id, refused.success) == (2, False)
    gate.set()
    tier.drain_jobs()
    (stored,) = tier.get_finished_jobs()
    assert (stored.job_id, stored.success) == (1, True)
    assert counts(tier)["refused_chunks"] == 1


def test_load_that_no_thread_takes_in_time_is_given_up(bench: Bench) -> None:
    tier = bench.tier(load_threads=1, load_deadline_s=0.01)
    keys, request, gate = bench.keys(1), bench.request("a", bench.keys(1)), threading.Event()
    bench.store(tier, keys, [0], request)
    tier._transfers._loads.submit(gate.wait)
    before = bench.rows.copy()
    result = bench.load(tier, keys, [1], request)
    assert (result.success, result.successful_keys) == (False, None)
    gate.set()
    tier.drain_jobs()
    assert list(tier.get_finished_jobs()) == []
    assert (bench.rows == before).all()
    assert counts(tier)["missed_loads"] == 1


def test_failures_of_kvfs_stay_inside(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, expected_warnings: list[str]
) -> None:
    expected_warnings += [f"{what} failed, vLLM goes on without it: RuntimeError: broken"
                          for what in ("looking up", "storing", "loading", "noting an access",
                                       "writing a context")]  # fmt: skip
    keys, request = bench.keys(2), bench.request("a", bench.keys(2))
    tier = bench.tier()
    bench.store(tier, keys, [0, 1], request)

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("broken")

    for name in ("lookup", "put", "read_into", "touch", "context"):
        monkeypatch.setattr(kvfs.Namespace, name, broken)
    assert bench.found(tier, keys, request) == [False, False]
    assert not bench.store(tier, bench.keys(1, 3), [2], request).success
    assert not bench.load(tier, keys, [0, 1], request).success
    tier.touch(keys, request)
    tier.on_request_finished(request)
    tier.drain_jobs()
    tier._notes.wait_idle()
    figures = counts(tier)
    assert (figures["failures"], figures["failed_lookups"], figures["failed_chunks"]) == (5, 2, 1)


def test_engines_of_another_kind_have_another_namespace(bench: Bench) -> None:
    names = set()
    for changes in ({}, {"model": "org/other"}, {"tp_size": 2}, {"model": "org tiny"}):
        names.add(bench.tier(bench.spec(**changes)).config_info()["kvfs_namespace"])
        bench.close()
    assert len(names) == 4
    assert all(name.startswith("vllm-org") for name in names)
    path = bench.tier(bench.spec(model="/srv/models/tiny/"))
    assert path.config_info()["kvfs_namespace"].startswith("vllm-tiny-")
    bench.close()
    assert bench.tier(namespace="prod").config_info()["kvfs_namespace"].startswith("prod-org_tiny-")


def test_block_is_one_row(bench: Bench) -> None:
    layout = bench.tier()._link.namespace().layout
    assert (layout.block_bytes, layout.block_tokens, layout.model) == (ROW, 64, "org/tiny")


def test_touch_is_noted(bench: Bench) -> None:
    tier, request = bench.tier(), bench.request("a", bench.keys(2))
    bench.store(tier, bench.keys(2), [0, 1], request)
    space = tier._link.namespace()
    segment = next(iter(space.pool.store.state.devices[0].segments.values()))
    before = segment.last_access_ns
    tier.touch(bench.keys(2), request)
    tier._notes.wait_idle()
    assert segment.last_access_ns > before


def test_parents_are_those_that_are_there(bench: Bench) -> None:
    keys = bench.keys(6)
    tier, request = bench.tier(), bench.request("a", bench.keys(6))
    bench.store(tier, [keys[1], keys[0]], [0, 1], request)  # vLLM's order is any
    bench.store(tier, [keys[2]], [2], request)
    bench.store(tier, [keys[5], keys[4]], [3, 4], request)  # keys[3] is never stored
    space = tier._link.namespace()
    named = block_keys(space.info.namespace_id, keys)
    records = space.lookup(named)
    segment = next(iter(space.pool.store.state.devices[0].segments.values()))
    stored = [0, 1, 2, 4, 5]
    parents = segment.parents(records["entry"][stored].astype(np.int64))
    none = np.zeros(32, np.uint8)
    assert (parents == np.stack([none, named[0], named[1], none, named[4]])).all()


def test_events_tell_of_what_was_stored(bench: Bench) -> None:
    tier, request = bench.tier(enable_kv_events=True, locality="LOCAL"), bench.request("a", [])
    bench.store(tier, bench.keys(2), [0, 1], request)
    (event,) = tier.take_events()
    assert (event.keys, event.removed) == (bench.keys(2), False)
    assert event.medium is bench.vllm.Medium.STORAGE
    assert event.locality is tier.locality is bench.vllm.Locality.LOCAL
    assert list(tier.take_events()) == []
    bench.close()
    quiet = bench.tier()
    bench.store(quiet, bench.keys(1, 2), [0], request)
    assert list(quiet.take_events()) == []
