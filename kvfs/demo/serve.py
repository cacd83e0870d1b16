"""The server of the demo: owns a pool, mounts it, runs the model, stores what it computed.

Layer: L5.

    python -m kvfs.demo.serve POOL MOUNTPOINT

Commands come as lines on standard input ("cold", "shared"); each is answered by one line of JSON on
standard output. It ends, and unmounts, when standard input ends. The demo also kills it.
"""

import argparse
import json
import os
import signal
import sys
from typing import Any, Final

from kvfs.demo import prompts
from kvfs.demo.cache import blocks_of, cache_to_tokens, tokens_to_cache
from kvfs.demo.model import MODEL_NAME, Generation, Model, load, now_ns
from kvfs.errors import KvfsError
from kvfs.fuse.mount import mount_in_background
from kvfs.lifecycle import open_pool
from kvfs.namespace import Namespace

NAMESPACE: Final = "smollm2-135m"
CONTEXT_NAMES: Final = {
    prompts.COLD: "constitution/article1",
    prompts.SHARED: "constitution/article2",
}


class Server:
    """Answers the two prompts and stores their contexts."""

    def __init__(self, space: Namespace, model: Model, count: int) -> None:
        """Serve.

        Args:
            space: Where contexts go; its layout is the model's.
            model: Loaded model.
            count: Tokens to decode per prompt.
        """
        self._space = space
        self._model = model
        self._count = count

    def cold(self) -> dict[str, Any]:
        """Compute the first prompt from nothing and store its context."""
        ids = prompts.token_ids(self._model.tokenizer, prompts.COLD)
        run, cache = self._run_cold(ids, "prefill, cold")
        return {**self._describe(ids, run), **self._store(prompts.COLD, ids, cache)}

    def shared(self) -> dict[str, Any]:
        """Compute of the second prompt only what the first did not; compare with a cold run."""
        ids = prompts.token_ids(self._model.tokenizer, prompts.SHARED)
        started_ns = now_ns()
        keys, _ = self._space.keys(ids[:-1])
        blocks = self._space.match_prefix(keys)
        held = blocks * self._space.layout.block_tokens
        with self._space.view(keys[:blocks]) as view:
            import torch

            shape = (held, *self._space.layout.token_shape)
            tokens = view.torch(getattr(torch, self._space.layout.dtype), shape)
            cache = tokens_to_cache(tokens, self._model.config)
            self._model.prefill(cache, ids[held:-1], label="prefill, tail only")
            run = self._model.generate(cache, ids[-1], self._count, since_ns=started_ns)
            del tokens  # the first step of the model copied what it showed
        stored = self._store(prompts.SHARED, ids, cache)
        cold, _ = self._run_cold(ids, "prefill, cold, to compare")
        same = sum(a == b for a, b in zip(run.tokens, cold.tokens, strict=True))
        return {
            **self._describe(ids, run),
            **stored,
            "shared_blocks": blocks,
            "shared_tokens": held,
            "computed_tokens": len(ids) - held,
            "cold_first_ns": cold.first_ns,
            "same_tokens": same,
        }

    def _run_cold(self, ids: list[int], label: str) -> tuple[Generation, Any]:
        import transformers

        started_ns = now_ns()
        cache = transformers.DynamicCache(config=self._model.config)
        self._model.prefill(cache, ids[:-1], label=label)
        return self._model.generate(cache, ids[-1], self._count, since_ns=started_ns), cache

    def _store(self, name: str, ids: list[int], cache: Any) -> dict[str, Any]:
        """Store the KV of all but the prompt's last token as a context."""
        started_ns = now_ns()
        prompt = ids[:-1]
        tokens = cache_to_tokens(cache, len(prompt))
        keys, _ = self._space.keys(prompt)
        context = self._space.context(CONTEXT_NAMES[name])
        blocks = blocks_of(tokens, self._space.layout.block_tokens)
        result = context.append(keys, blocks, tokens=prompt, durability="sync")
        statistics = self._space.pool.statistics()
        return {
            "store_ns": now_ns() - started_ns,
            "blocks": len(keys),
            "blocks_stored": result.blocks_stored,
            "blocks_deduplicated": result.blocks_deduplicated,
            "bytes_stored": result.bytes_stored,
            "bytes_deduplicated": result.bytes_deduplicated,
            "devices": [
                {"name": d.name, "tier": d.tier, "kind": d.kind, "live_bytes": d.live_bytes}
                for d in statistics.devices
            ],
        }

    def _describe(self, ids: list[int], run: Generation) -> dict[str, Any]:
        return {
            "prompt_tokens": len(ids),
            "tokens": run.tokens,
            "text": self._model.decode(run.tokens),
            "first_ns": run.first_ns,
            "total_ns": run.total_ns,
        }


def answer(**fields: Any) -> None:
    """Write one line of JSON to whoever started this process."""
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


def serve(arguments: argparse.Namespace) -> None:
    """Open, mount, load, then answer commands until standard input ends."""
    with (
        open_pool(arguments.pool) as pool,
        mount_in_background(pool, arguments.mountpoint),
    ):
        started_ns = now_ns()
        model = load(arguments.threads)
        space = pool.namespace(NAMESPACE, model.layout)
        server = Server(space, model, arguments.tokens)
        answer(pid=os.getpid(), model=MODEL_NAME, load_ns=now_ns() - started_ns)
        for line in sys.stdin:
            command = {prompts.COLD: server.cold, prompts.SHARED: server.shared}[line.strip()]
            answer(**command())


def main(argv: list[str] | None = None) -> int:
    """Parse arguments and serve; a failure is one line on standard error."""
    parser = argparse.ArgumentParser(prog="python -m kvfs.demo.serve")
    parser.add_argument("pool")
    parser.add_argument("mountpoint")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        serve(arguments)
    except KvfsError as error:
        sys.stderr.write(f"serve: {error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
