"""Between a transformers cache and the bytes of a context.

Layer: L5.

A context in the layout [token, layer, kv, head, dim] is one tensor. A transformers cache holds, for
each layer, keys and values as [1, head, token, dim]. Taking out is one copy; putting in makes
strided views and copies nothing: the first step of the model reads them where they lie, as it
joins them with its own new row.
"""

from typing import Any

from kvfs.errors import UsageError


def cache_to_tokens(cache: Any, token_count: int | None = None) -> Any:
    """Copy the first tokens of a cache into one tensor.

    Args:
        cache: A DynamicCache with one sequence, and no sliding window.
        token_count: How many leading tokens; all when missing.

    Returns:
        [token, layer, kv, head, dim], contiguous, of the cache's dtype, on the CPU.
    """
    import torch

    keys = cache.layers[0].keys
    batch, heads, held, dim = keys.shape
    count = held if token_count is None else token_count
    if batch != 1 or count > held:
        raise UsageError(f"cache has {batch} sequences of {held} tokens, asked for one of {count}")
    tokens = torch.empty((count, len(cache.layers), 2, heads, dim), dtype=keys.dtype)
    for number, layer in enumerate(cache.layers):
        tokens[:, number, 0].copy_(layer.keys[0, :, :count].transpose(0, 1))
        tokens[:, number, 1].copy_(layer.values[0, :, :count].transpose(0, 1))
    return tokens


def tokens_to_cache(tokens: Any, config: Any) -> Any:
    """Make a cache whose layers are views of a tensor; nothing is copied.

    Args:
        tokens: [token, layer, kv, head, dim], e.g. over a read-only mapping; kept alive by
            the cache until the model has taken its first step, never written to.
        config: The model's configuration.

    Returns:
        A DynamicCache that the model goes on from.
    """
    import transformers

    cache = transformers.DynamicCache(config=config)
    if tokens.dim() != 5 or tokens.shape[1] != len(cache.layers) or tokens.shape[2] != 2:
        raise UsageError(
            f"shape {tuple(tokens.shape)} is no [token, {len(cache.layers)} layers, 2, head, dim]"
        )
    for number, layer in enumerate(cache.layers):
        keys = tokens[:, number, 0].transpose(0, 1).unsqueeze(0)
        values = tokens[:, number, 1].transpose(0, 1).unsqueeze(0)
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
    return cache


def blocks_of(tokens: Any, block_tokens: int) -> list[Any]:
    """Cut a context's tensor into blocks, views all; the last may be partial."""
    return list(tokens.split(block_tokens))
