"""One vLLM engine that is asked from outside, and says how long its first token took.

Layer: tool.

It reads orders as lines of JSON, and tells one answer each:

- {"prompt": N}: answer prompt N, of `TOKENS` tokens;
- {"forget": true}: let what is stored be stored, and drop vLLM's own copies of it in host memory.
  The engine's prefix cache is off.

What came from the tier is told by vLLM: bytes read from tiers below host memory, and how many
tokens of the prompt were not computed.
"""

import json
import os
import sys
import time
from typing import Any, Final

from interop.driver import require, tell
from interop.peers.vllm_tier import CHUNK_TOKENS, STEP_S, forget

TOKENS: Final = 1500
ANSWER: Final = 8
_HOST_BYTES: Final = 256 << 20
_BLOCKS: Final = 128  # of 32 tokens: what the engine gets, so that several fit into memory
_READ_BYTES: Final = "vllm:kv_offload_tiering_read_bytes"


def main() -> None:
    """Start the engine, say so, and obey until there are no more orders."""
    model, tier = sys.argv[1], json.loads(sys.argv[2])
    llm = _engine(model, tier)
    tell({"is_ready": 1})
    for line in sys.stdin:
        order = json.loads(line)
        if "prompt" in order:
            tell(_answer(llm, order["prompt"]))
        else:
            forget(llm)
            tell({"is_forgotten": 1})
    llm.llm_engine.engine_core.shutdown()
    sys.stdout.flush()
    os._exit(0)  # its threads of the CPU do not always end by themselves


def _engine(model: str, tier: dict[str, Any]) -> Any:
    from vllm import LLM
    from vllm.config import KVTransferConfig

    extra = {
        "spec_name": "KvfsSpec", "cpu_bytes_to_use": _HOST_BYTES, "block_size": CHUNK_TOKENS,
        "secondary_tiers": [tier],
    }  # fmt: skip
    return LLM(
        model, dtype="float32", enforce_eager=True, block_size=32, enable_prefix_caching=False,
        max_model_len=2048, max_num_batched_tokens=2048, max_num_seqs=2, seed=1,
        disable_log_stats=False, num_gpu_blocks_override=_BLOCKS,
        kv_transfer_config=KVTransferConfig(
            kv_connector="OffloadingConnector", kv_role="kv_both",
            kv_connector_extra_config=extra,
        ) if tier else None,
    )  # fmt: skip


def _answer(llm: Any, number: int) -> dict[str, Any]:
    """Answer, step by step, so that the first token is seen when it is there."""
    from vllm import SamplingParams

    ids, before = _prompt(llm, number), _read_bytes(llm)
    sampling = SamplingParams(temperature=0.0, max_tokens=ANSWER, ignore_eos=True)
    engine, first_ns, output = llm.llm_engine, 0, None
    start_ns = time.perf_counter_ns()
    engine.add_request(f"{number}-{start_ns}", {"prompt_token_ids": ids}, sampling)
    while engine.has_unfinished_requests():
        outputs = engine.step()
        for output in outputs:
            if not first_ns and output.outputs[0].token_ids:
                first_ns = time.perf_counter_ns() - start_ns
        if not outputs:
            time.sleep(STEP_S)
    assert output is not None
    return {
        "first_ns": first_ns, "tokens": list(output.outputs[0].token_ids),
        "cached": int(output.num_cached_tokens or 0),
        "read_bytes": _read_bytes(llm) - before,
    }  # fmt: skip


def _prompt(llm: Any, number: int) -> list[int]:
    """Return a prompt that differs from the others from its first word on."""
    towns = ("Arden", "Belmont", "Corley", "Dunmore", "Elstow", "Farley", "Garth", "Hilton")
    lines = [f"In {towns[i % 8]}, house number {7 * i + number} keeps a book of {1500 + 13 * i}."
             for i in range(90)]  # fmt: skip
    text = f"{number + 2} rivers. {' '.join(lines)}"
    ids = list(llm.get_tokenizer().encode(text, add_special_tokens=False))[:TOKENS]
    require(len(ids) == TOKENS, f"the text has {len(ids)} tokens only")
    return ids


def _read_bytes(llm: Any) -> int:
    """Return what vLLM has read from its tiers below host memory so far."""
    return sum(int(metric.value) for metric in llm.get_metrics() if metric.name == _READ_BYTES)


if __name__ == "__main__":
    main()
