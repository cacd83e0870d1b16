"""transformers and torch: a context's file on the mount becomes tensors by mmap, without a copy.

Layer: tool.

A small Llama with random weights (nothing is downloaded) computes a prompt's KV and writes it to a
file; another process, after the mount's own was replaced, maps the file and goes on.
"""

import mmap
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

from interop.cases import Case, Figures, Peer, Place
from interop.driver import rate_mib_s, require, tell
from interop.site import Site

_VERSION: Final = "5.23.0"
_PROMPT: Final = 700
_ANSWER: Final = 24
_LAYERS, _HEADS, _DIM = 4, 2, 64
# (name, what the table says)
_WAYS: Final = (
    ("frombuffer", "KV file, mmap MAP_SHARED, torch.frombuffer, generate"),
    ("private", "KV file, mmap MAP_PRIVATE writable, torch.frombuffer, generate"),
    ("safetensors", "safetensors file, load_file, generate"),
    ("torch-save", "torch.save, torch.load(mmap=True), generate"),
    ("from-file", "torch.from_file(shared=True), written by mapping, generate"),
)


def _cases(site: Site) -> Iterator[Case]:
    for way, what in _WAYS:
        for place in Place:
            yield Case(what, place, partial(_run, site, place, way))


def _run(site: Site, place: Place, way: str) -> Figures:
    path = site.directory(place, "transformers") / f"context.{way}"
    tokens = site.scratch / f"{place}-{way}.tokens"
    written = site.drive("transformers", "write", way, str(path), str(tokens))
    if place is Place.MOUNT:
        site.remount()
    return written | site.drive("transformers", "read", way, str(path), str(tokens))


PEER: Final = Peer("transformers", "transformers", "torch", lambda _: _VERSION, _cases)


# --- in the peer's venv


def main() -> None:
    """Write a context's file and the answer to it, or read it and answer again."""
    verb, way = sys.argv[1:3]
    path, tokens = Path(sys.argv[3]), Path(sys.argv[4])
    model = _model()
    if verb == "write":
        cache = _prefill(model)
        pieces = [piece for layer in cache.layers for piece in (layer.keys, layer.values)]
        nbytes = sum(piece.nbytes for piece in pieces)
        tell({"write MiB/s": rate_mib_s(nbytes, lambda: _WRITERS[way](path, pieces))})
        tokens.write_text(repr(_generate(model, cache)))
        return
    found: list[Any] = []
    nbytes = path.stat().st_size
    read = rate_mib_s(nbytes, lambda: found.append(_READERS[way](path)))
    expected = _prefill(model)
    cache = _cache_of(model, found[0])
    for mine, theirs in zip(cache.layers, expected.layers, strict=True):
        same = bool((mine.keys == theirs.keys).all() and (mine.values == theirs.values).all())
        require(same, "the tensors over the file differ from those computed anew")
    answer = _generate(model, cache)
    require(repr(answer) == tokens.read_text(), "the answer differs from the one before")
    tell({"open MiB/s": read, "tokens equal": f"{_ANSWER} of {_ANSWER}"})


def _model() -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(7)
    torch.set_num_threads(1)
    config = LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=_LAYERS,
        num_attention_heads=4, num_key_value_heads=_HEADS, head_dim=_DIM, eos_token_id=None,
        bos_token_id=None, max_position_embeddings=2048,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def _tokens() -> Any:
    import torch

    return torch.randint(0, 512, (1, _PROMPT), generator=torch.Generator().manual_seed(3))


def _prefill(model: Any) -> Any:
    """Return the cache of all tokens of the prompt but the last."""
    import torch
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(_tokens()[:, :-1], past_key_values=cache)
    return cache


def _generate(model: Any, cache: Any) -> list[int]:
    output = model.generate(
        _tokens(), past_key_values=cache, max_new_tokens=_ANSWER, do_sample=False
    )
    return [int(token) for token in output[0, _PROMPT:]]


def _cache_of(model: Any, pieces: list[Any]) -> Any:
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    for layer, keys, values in zip(cache.layers, pieces[::2], pieces[1::2], strict=True):
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
    return cache


def _split(flat: Any) -> list[Any]:
    return list(flat.view(2 * _LAYERS, 1, _HEADS, -1, _DIM).unbind(0))


def _write_raw(path: Path, pieces: list[Any]) -> None:
    with path.open("wb") as file:
        for piece in pieces:
            file.write(piece.contiguous().numpy().data)


def _read_mapped(path: Path, *, is_private: bool) -> list[Any]:
    import torch

    with path.open("rb") as file:
        if is_private:
            mapped = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE)
        else:
            mapped = mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ)
        require(mapped[:] == file.read(), "the mapping shows other bytes than a read")
    return _split(torch.frombuffer(mapped, dtype=torch.float32))


def _write_safetensors(path: Path, pieces: list[Any]) -> None:
    from safetensors.torch import save_file

    save_file({str(i): piece.contiguous() for i, piece in enumerate(pieces)}, path)


def _read_safetensors(path: Path) -> list[Any]:
    from safetensors.torch import load_file

    found = load_file(path)
    return [found[str(i)] for i in range(len(found))]


def _save(path: Path, pieces: list[Any]) -> None:
    import torch

    torch.save(pieces, path)


def _load(path: Path) -> list[Any]:
    import torch

    loaded: list[Any] = torch.load(path, mmap=True, weights_only=True)
    return loaded


def _shared(path: Path, count: int) -> Any:
    import torch

    return torch.from_file(str(path), shared=True, size=count, dtype=torch.float32)


def _write_shared(path: Path, pieces: list[Any]) -> None:
    import torch

    _shared(path, sum(piece.numel() for piece in pieces)).copy_(torch.cat(pieces).flatten())


_WRITERS: Final[dict[str, Callable[[Path, list[Any]], None]]] = {
    "frombuffer": _write_raw, "private": _write_raw, "safetensors": _write_safetensors,
    "torch-save": _save, "from-file": _write_shared,
}  # fmt: skip
_READERS: Final[dict[str, Callable[[Path], list[Any]]]] = {
    "frombuffer": partial(_read_mapped, is_private=False),
    "private": partial(_read_mapped, is_private=True),
    "safetensors": _read_safetensors,
    "torch-save": _load,
    "from-file": lambda path: _split(_shared(path, path.stat().st_size // 4)),
}

if __name__ == "__main__":
    main()
