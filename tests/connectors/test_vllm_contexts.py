"""What requests leave in the pool, and what they and orchestrators may ask for."""

import threading
from typing import Any

import numpy as np
import pytest

from kvfs.connectors.vllm_contexts import Chains, context_name
from kvfs.connectors.vllm_pool import block_keys
from tests.connectors.engine_bench import CHUNK, Bench
from tests.connectors.test_vllm_tier import counts


def settle(tier: Any) -> None:
    tier.drain_jobs()
    list(tier.get_finished_jobs())
    tier._notes.wait_idle()


def contexts(tier: Any) -> dict[str, np.ndarray]:
    return {context.name: context.keys for context in tier._link.namespace().contexts()}


def run(bench: Bench, tier: Any, name: str, keys: list[bytes], **more: Any) -> None:
    """A whole request: its chunks are stored, then it finishes."""
    request = bench.request(name, keys, **more)
    tier.on_new_request(request)
    for at, key in enumerate(keys):
        tier.submit_store(bench.job([key], [at % len(bench.rows)], request, load=False))
    tier.on_request_finished(request)
    settle(tier)


def named(tier: Any, keys: list[bytes]) -> np.ndarray:
    return block_keys(tier._link.namespace().info.namespace_id, keys)


def hints(bench: Bench, *actions: tuple[str, dict[str, Any]]) -> Any:
    made = [bench.vllm.KvHintAction("1", kind, "1", payload) for kind, payload in actions]
    return bench.vllm.KvHintsEnvelope("1", "m", made)


def test_request_leaves_its_stored_chain(bench: Bench) -> None:
    tier, keys = bench.tier(), bench.keys(4)
    request = bench.request("cmpl/1", keys)
    bench.store(tier, keys[:3], [0, 1, 2], request)  # the last chunk never came
    tier.on_request_finished(request)
    settle(tier)
    ((name, found),) = contexts(tier).items()
    assert name == "requests/cmpl/1"
    assert (found == named(tier, keys[:3])).all()
    (context,) = tier._link.namespace().contexts()
    assert (context.token_count, context.resident_blocks) == (3 * CHUNK, 3)
    assert counts(tier)["contexts"] == 1


def test_request_without_stored_chunks_leaves_nothing(bench: Bench) -> None:
    tier = bench.tier()
    tier.on_request_finished(bench.request("a", bench.keys(2)))
    tier.on_request_finished(bench.request("b", []))
    settle(tier)
    assert contexts(tier) == {}


def test_session_grows_and_is_replaced_where_it_differs(bench: Bench) -> None:
    tier, keys = bench.tier(), bench.keys(6)
    params = {"kvfs.session": "chat/42"}
    for name, chain in (("a", keys[:2]), ("b", keys[:5]), ("c", keys[:3])):
        run(bench, tier, name, chain, kv_transfer_params=params)
        ((path, found),) = contexts(tier).items()
        assert path == "requests/chat/42"
    assert (found == named(tier, keys[:5])).all()  # a shorter one takes nothing away
    other = [keys[0], *bench.keys(2, seed=9)]
    run(bench, tier, "d", other, kv_transfer_params=params)
    assert (contexts(tier)["requests/chat/42"] == named(tier, other)).all()
    run(bench, tier, "e", other, kv_transfer_params={**params, "kvfs.pin": True})
    run(bench, tier, "f", keys, kv_transfer_params=params)
    (context,) = tier._link.namespace().contexts()
    assert (context.node.is_pinned, context.node.block_count) == (True, len(keys))


def test_contexts_are_bounded_and_the_oldest_go(bench: Bench) -> None:
    tier = bench.tier(contexts_max=3)
    for number in range(5):
        pin = {"kvfs.pin": True} if number == 1 else None
        run(bench, tier, f"r{number}", bench.keys(1, seed=number), kv_transfer_params=pin)
    assert set(contexts(tier)) == {"requests/r1", "requests/r2", "requests/r3", "requests/r4"}
    bench.close()
    tier = bench.tier(contexts_max=3)  # a later engine goes on with what is there
    run(bench, tier, "r5", bench.keys(1, seed=5))
    assert set(contexts(tier)) == {"requests/r1", "requests/r4", "requests/r5", "requests/r3"}
    bench.close()
    tier = bench.tier(contexts_max=0)
    run(bench, tier, "r6", bench.keys(1, seed=6))
    assert "requests/r6" not in contexts(tier)


def test_groups_have_contexts_of_their_own(bench: Bench) -> None:
    tier, request = bench.tier(), bench.request("a", bench.keys(2))
    second = bench.keys(2, group=1)
    for at, key in enumerate(second):
        request.set_offload_key_position(key, (at + 1) * CHUNK)
    bench.store(tier, [*bench.keys(2), *second], [0, 1, 2, 3], request)
    tier.on_request_finished(request)
    settle(tier)
    assert {name: len(keys) for name, keys in contexts(tier).items()} == {
        "requests/a": 2, "requests/a.g1": 2,
    }  # fmt: skip


def test_hints_pin_unpin_prefetch(bench: Bench) -> None:
    tier, keys = bench.tier(), bench.keys(3)
    params = {"kvfs.session": "s"}
    run(bench, tier, "a", keys, kv_transfer_params=params, kv_hints=hints(bench, ("kvfs.pin", {})))
    (context,) = tier._link.namespace().contexts()
    assert context.node.is_pinned
    run(bench, tier, "b", [], kv_hints=hints(bench, ("kvfs.unpin", {"session": "s"})))
    assert not context.node.is_pinned
    run(bench, tier, "c", [], kv_hints=hints(bench, ("kvfs.pin", {"session": "s"})))
    assert context.node.is_pinned
    counts(tier)
    segment = next(iter(tier._link.namespace().pool.store.state.devices[0].segments.values()))
    before = segment.last_access_ns
    actions = [("kvfs.prefetch", {"session": "s"}), ("kvfs.prefetch", {"session": "none"}),
               ("kvfs.unpin", {"session": "none"}), ("other", {})]  # fmt: skip
    run(bench, tier, "d", [], kv_hints=hints(bench, *actions))
    figures = counts(tier)
    assert (figures["hints"], figures["ignored_hints"]) == (1, 3)
    assert segment.last_access_ns > before


def test_more_pinned_than_may_be_is_no_failure_of_the_engine(
    bench: Bench, expected_warnings: list[str]
) -> None:
    expected_warnings += ["writing a context failed.*BusyError: too much is pinned"]
    tier = bench.tier()
    pinned_share = tier._link.namespace().pool.options.pinned_share
    object.__setattr__(tier._link.namespace().pool.options, "pinned_share", 0.0)
    run(bench, tier, "a", bench.keys(2), kv_transfer_params={"kvfs.pin": True})
    object.__setattr__(tier._link.namespace().pool.options, "pinned_share", pinned_share)
    assert list(contexts(tier)) == ["requests/a"]


@pytest.mark.parametrize(
    ("name", "path"),
    [("a", "d/a"), ("a/b", "d/a/b"), ("/../a//./b/", "d/a/b"), ("..", "d/_"), ("", "d/_"),
     ("a\0b\n", "d/a_b_"), ("x" * 500, "d/" + "x" * 120), ("\udc80", "d/?"),
     ("\u20ac" * 99, "d/" + "\u20ac" * 40)],
)  # fmt: skip
def test_any_name_is_a_path(name: str, path: str) -> None:
    assert context_name("d", name) == path


def test_chains_are_in_order_of_tokens() -> None:
    first, second, third = (bytes([n]) * 32 + bytes(4) for n in (3, 2, 1))
    other = bytes(32) + b"\0\0\0\1"
    chains, positions = Chains(), {third: 192, other: 64}
    chains.update(positions)
    chains.update(positions | {first: 64, second: 128})
    assert chains.by_group() == {0: (first, second, third), 1: (other,)}
    assert [chains.parent(key) for key in (first, second, third, other)] == [
        None, first, second, None,
    ]  # fmt: skip
    assert (chains.end_of(second), chains.end_of(b"x"), chains.parent(b"x")) == (128, 0, None)


def test_finished_request_counts_as_an_access(bench: Bench) -> None:
    tier, keys = bench.tier(contexts_max=0), bench.keys(2)
    bench.store(tier, keys, [0, 1], bench.request("a", keys))
    segment = next(iter(tier._link.namespace().pool.store.state.devices[0].segments.values()))
    before = segment.last_access_ns
    run(bench, tier, "b", [])  # nothing of its own
    assert segment.last_access_ns == before
    tier.on_request_finished(bench.request("c", keys))  # found in vLLM's own memory
    settle(tier)
    assert segment.last_access_ns > before


def test_notes_that_nobody_takes_are_dropped(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.module, "_NOTES_MAX", 2)
    tier, gate = bench.tier(), threading.Event()
    tier._notes.submit(gate.wait)
    request = bench.request("a", [])
    while "dropped_notes" not in counts(tier):
        tier.touch(bench.keys(1), request)
    gate.set()
    settle(tier)


def test_what_is_known_when_a_request_is_scheduled_is_its_prompt() -> None:
    first, second, third, last = (bytes([n]) * 32 + bytes(4) for n in range(4))
    chains = Chains()
    assert chains.phase_of(first) is None  # vLLM did not name it
    chains.update({first: 64})
    assert chains.phase_of(first) == "prefill"  # nothing was decoded yet
    chains.update({first: 64, second: 128})
    chains.end_prompt()
    chains.update({first: 64, second: 128, third: 192})
    chains.end_prompt()
    chains.update({first: 64, second: 128, third: 192, last: 256})
    assert [chains.phase_of(key) for key in (first, second, third, last)] == [
        "prefill", "prefill", "decode", "decode",
    ]  # fmt: skip
    short = Chains()
    short.end_prompt()  # less than a chunk
    short.update({first: 64})
    assert short.phase_of(first) == "decode"


def accesses(tier: Any) -> dict[str, int]:
    space = tier._link.namespace()
    counted = space.pool.store.state.counters[space.info.namespace_id].accesses
    return dict(zip(("unknown", "prefill", "decode", "background"), counted, strict=True))


def test_prompt_and_answer_are_noted_by_their_phases(bench: Bench) -> None:
    tier, prompt, answer = bench.tier(), bench.keys(3), bench.keys(2, seed=1)
    request = bench.request("a", prompt)
    tier.on_new_request(request)
    assert bench.found(tier, prompt, request) == [False] * 3
    bench.step(tier, request)  # vLLM has named the chunks of the prompt, and runs it
    bench.store(tier, prompt, [0, 1, 2], request)
    bench.extend(request, answer)
    bench.store(tier, answer, [3, 4], request)
    assert counts(tier)["decode_chunks"] == 2
    assert accesses(tier) == {"unknown": 0, "prefill": 0, "decode": 0, "background": 0}
    # Preempted: what it had computed comes back, the answer so far, too.
    assert bench.load(tier, [*answer, *prompt], [5, 6, 7, 8, 9], request).success
    assert (bench.rows[[7, 8, 9, 5, 6]] == bench.rows[:5]).all()
    assert accesses(tier) == {"unknown": 0, "prefill": 3, "decode": 2, "background": 0}
    tier.touch([*prompt, *answer, *bench.keys(1, seed=2)], request)
    tier._notes.wait_idle()
    assert accesses(tier) == {"unknown": 0, "prefill": 6, "decode": 4, "background": 0}
    tier.on_request_finished(request)
    settle(tier)
    assert accesses(tier) == {"unknown": 0, "prefill": 9, "decode": 6, "background": 0}

    # A conversation that goes on: the former answer is prompt now.
    later = bench.request("b", [*prompt, *answer])
    tier.on_new_request(later)
    bench.found(tier, [*prompt, *answer], later)
    assert bench.load(tier, [*prompt, *answer], [5, 6, 7, 8, 9], later).success
    bench.step(tier, later)
    assert accesses(tier) == {"unknown": 0, "prefill": 14, "decode": 6, "background": 0}
    assert "decode_chunks" not in counts(tier)
    tier.on_request_finished(later)
    settle(tier)
    assert tier._waiting == {}


def test_reading_ahead_is_for_a_prompt_and_in_the_background(bench: Bench) -> None:
    tier, keys = bench.tier(), bench.keys(3)
    run(bench, tier, "a", keys, kv_transfer_params={"kvfs.session": "s"})
    before = accesses(tier)
    run(bench, tier, "b", [], kv_hints=hints(bench, ("kvfs.prefetch", {"session": "s"})))
    after = accesses(tier)
    assert after["prefill"] - before["prefill"] == 3
    assert after["background"] - before["background"] == 3
