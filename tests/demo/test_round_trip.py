"""The model side of the demo on a tiny random Llama: same tokens through a pool and a file."""

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import kvfs
from kvfs.demo.model import Model, layout_of, now_ns
from kvfs.errors import UsageError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
torch = pytest.importorskip("torch", reason="the demo's packages are not installed")
transformers = pytest.importorskip("transformers", reason="the demo's packages are not installed")
from kvfs.demo import cache  # noqa: E402 - only where torch is there

TOKENS = 200
COUNT = 16


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(1)
    torch.set_num_threads(1)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=512,
    )  # fmt: skip
    return Model(transformers.LlamaForCausalLM(config).eval(), None)


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    generator = torch.Generator().manual_seed(7)
    ids: list[int] = torch.randint(0, 256, (TOKENS + 1,), generator=generator).tolist()
    return ids


def prefilled(model: Model, ids: list[int], *, label: str = "prefill") -> Any:
    held = transformers.DynamicCache(config=model.config)
    model.prefill(held, ids[:-1], label=label)
    return held


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[kvfs.Pool]:
    devices = ["dram:?size=64MiB", f"dir:{tmp_path}/blocks?size=128MiB"]
    (tmp_path / "blocks").mkdir()
    with kvfs.create_pool(tmp_path / "pool", devices) as opened:
        yield opened


def test_taking_out_and_putting_in_is_exact(model: Model, prompt: list[int]) -> None:
    held = prefilled(model, prompt)
    tokens = cache.cache_to_tokens(held)
    assert tokens.shape == (TOKENS, *model.layout.token_shape)
    assert tokens.is_contiguous()
    again = cache.tokens_to_cache(tokens, model.config)
    for ours, theirs in zip(again.layers, held.layers, strict=True):
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)
        assert ours.keys.untyped_storage().data_ptr() == tokens.untyped_storage().data_ptr()
    assert torch.equal(cache.cache_to_tokens(again, 64), tokens[:64])


def test_restored_run_is_token_identical(model: Model, prompt: list[int], tmp_path: Path) -> None:
    held = prefilled(model, prompt)
    tokens = cache.cache_to_tokens(held)
    cold = model.generate(held, prompt[-1], COUNT, since_ns=now_ns())
    file = tmp_path / "context"
    file.write_bytes(tokens.numpy().tobytes())
    with file.open("r+b") as opened:
        mapped = mmap.mmap(opened.fileno(), 0)
    flat = torch.frombuffer(mapped, dtype=torch.float32)
    restored = cache.tokens_to_cache(flat.reshape(tokens.shape), model.config)
    warm = model.generate(restored, prompt[-1], COUNT, since_ns=now_ns())
    assert warm.tokens == cold.tokens
    assert 0 < warm.first_ns <= warm.total_ns


def test_through_a_pool_with_a_shared_prefix(
    model: Model, prompt: list[int], pool: kvfs.Pool
) -> None:
    space = pool.namespace("tiny", model.layout)
    held = prefilled(model, prompt)
    tokens = cache.cache_to_tokens(held)
    keys, _ = space.keys(prompt[:-1])
    blocks = cache.blocks_of(tokens, model.layout.block_tokens)
    assert len(blocks) == len(keys) == 4
    first = space.context("a").append(keys, blocks, tokens=prompt[:-1], durability="sync")
    assert (first.blocks_stored, first.blocks_deduplicated) == (4, 0)

    other = prompt[:128] + [(token + 1) % 256 for token in prompt[128:]]
    keys, _ = space.keys(other[:-1])
    assert space.match_prefix(keys) == 2
    with space.view(keys[:2]) as view:
        shape = (128, *model.layout.token_shape)
        restored = cache.tokens_to_cache(view.torch(torch.float32, shape), model.config)
        model.prefill(restored, other[128:-1])
    # From memory, not from a cold run: a prefill cut elsewhere rounds elsewhere.
    expected = cache.tokens_to_cache(tokens[:128], model.config)
    model.prefill(expected, other[128:-1])
    assert torch.equal(cache.cache_to_tokens(restored), cache.cache_to_tokens(expected))
    blocks = cache.blocks_of(cache.cache_to_tokens(restored), model.layout.block_tokens)
    second = space.context("b").append(keys, blocks, tokens=other[:-1])
    assert (second.blocks_stored, second.blocks_deduplicated) == (2, 2)
    warm = model.generate(restored, other[-1], COUNT, since_ns=now_ns())
    cold = model.generate(expected, other[-1], COUNT, since_ns=now_ns())
    assert warm.tokens == cold.tokens


def test_layout_without_head_dim(model: Model) -> None:
    class Config:
        hidden_size, num_attention_heads, num_hidden_layers, num_key_value_heads = 64, 4, 3, 2

    assert layout_of(Config(), "x").token_shape == (3, 2, 2, 16)
    assert model.layout.block_tokens == 64


def test_wrong_shapes_are_refused(model: Model, prompt: list[int]) -> None:
    held = prefilled(model, prompt[:9])
    with pytest.raises(UsageError, match="asked for one of 9"):
        cache.cache_to_tokens(held, 9)
    with pytest.raises(UsageError, match="is no"):
        cache.tokens_to_cache(torch.zeros((4, 2, 2, 2, 32)), model.config)
