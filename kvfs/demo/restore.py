"""A process that knows nothing but a file: map it, go on decoding.

Layer: L5.

    python -m kvfs.demo.restore FILE --tokens 64

FILE is the context of the first prompt on a mount. Its shape stands in its attributes. It is mapped
with mmap, and never read by a call of this process: pages come in as the model touches them. One
line of JSON tells what was decoded and how long it took.
"""

import argparse
import json
import mmap
import os
import sys
import warnings
from typing import Any

from kvfs.demo import prompts
from kvfs.demo.cache import tokens_to_cache
from kvfs.demo.model import load, now_ns
from kvfs.errors import DataError, KvfsError
from kvfs.layout import Layout


def map_context(path: str) -> tuple[Any, Layout]:
    """Map a context's file as one tensor.

    Returns:
        [token, ...] as the layout says, read-only, over the mapping; and the layout.

    Raises:
        DataError: The file's size and attributes do not go together.
    """
    import torch

    layout = Layout.from_json(os.getxattr(path, "user.kvfs.layout").decode())
    token_count = int(os.getxattr(path, "user.kvfs.tokens"))
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(fd).st_size
        if layout.stride != layout.block_bytes or size != token_count * layout.token_bytes:
            raise DataError(f"context is not whole: {path}: {size} bytes for {token_count} tokens")
        mapped = mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ)
    finally:
        os.close(fd)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        flat = torch.frombuffer(mapped, dtype=getattr(torch, layout.dtype))
    return flat.reshape((token_count, *layout.token_shape)), layout


def restore(path: str, *, count: int, threads: int) -> dict[str, Any]:
    """Load the model, then restore and decode; the clock starts after the load."""
    model = load(threads)
    ids = prompts.token_ids(model.tokenizer, prompts.COLD)
    started_ns = now_ns()
    tokens, layout = map_context(path)
    if layout != model.layout or len(tokens) != len(ids) - 1:
        raise DataError(f"context is of another model or prompt: {path}: {layout.to_json()}")
    cache = tokens_to_cache(tokens, model.config)
    mapped_ns = now_ns() - started_ns
    run = model.generate(cache, ids[-1], count, since_ns=started_ns)
    return {
        "tokens": run.tokens,
        "text": model.decode(run.tokens),
        "mapped_ns": mapped_ns,
        "first_ns": run.first_ns,
        "total_ns": run.total_ns,
        "bytes": tokens.numel() * tokens.element_size(),
        "pid": os.getpid(),
    }


def main(argv: list[str] | None = None) -> int:
    """Parse arguments, restore, print one line of JSON."""
    parser = argparse.ArgumentParser(prog="python -m kvfs.demo.restore")
    parser.add_argument("file")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args(argv)
    try:
        result = restore(arguments.file, count=arguments.tokens, threads=arguments.threads)
    except KvfsError as error:
        sys.stderr.write(f"restore: {error}\n")
        return error.exit_code
    sys.stdout.write(json.dumps(result) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
