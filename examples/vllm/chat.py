"""A conversation that goes on after its engine has ended: vLLM with kvfs's tier, offline.

    kvfs-admin --pool /tmp/kv0 pool create 'dir:/tmp/kv0-data?size=4GiB'
    python chat.py --model MODEL --pool /tmp/kv0 "In the year 1700 ..."
    python chat.py --model MODEL --pool /tmp/kv0 "And then?"      # another process, no prefill

The text so far is kept in a file beside the pool; the KV cache of it is in the pool. What came from
there is printed after each answer. Runs on a GPU and, with a build of vLLM for CPUs, without one.
"""

import argparse
import os
import sys
from pathlib import Path

from vllm import LLM, SamplingParams
from vllm.config import KVTransferConfig

COUNTERS = "vllm:kvfs_"


def main() -> int:
    """Answer one message of a session."""
    arguments = parse()
    transcript = Path(f"{arguments.pool}.{arguments.session.replace('/', '-')}.txt")
    before = transcript.read_text() if transcript.exists() else ""
    prompt = f"{before}{arguments.message}\n"
    llm = LLM(
        arguments.model,
        dtype=arguments.dtype,
        enable_prefix_caching=True,
        enforce_eager=True,
        block_size=32,
        max_model_len=arguments.max_model_len,
        disable_log_stats=False,  # or there are no counters to print
        kv_transfer_config=KVTransferConfig(
            kv_connector="OffloadingConnector",
            kv_role="kv_both",
            kv_connector_extra_config={
                "spec_name": "KvfsSpec",
                "spec_module_path": "kvfs.connectors.vllm_spec",
                "cpu_bytes_to_use": 256 << 20,
                "block_size": 64,
                "offload_prompt_only": False,  # answers are part of the next prompt
                "secondary_tiers": [
                    {
                        "type": "KvfsTier",
                        "module_path": "kvfs.connectors.vllm",
                        "pool": arguments.pool,
                    }
                ],
            },
        ),
    )
    sampling = SamplingParams(
        temperature=0.0,
        max_tokens=arguments.tokens,
        extra_args={"kv_transfer_params": {"kvfs.session": arguments.session}},
    )
    (output,) = llm.generate([prompt], sampling)
    answer = output.outputs[0].text
    transcript.write_text(f"{prompt}{answer}\n")
    counts = {
        metric.name.removeprefix(COUNTERS): int(metric.value)
        for metric in llm.get_metrics()
        if metric.name.startswith(COUNTERS)
    }
    llm.llm_engine.engine_core.shutdown()  # closes the pool
    print(answer.strip())
    print(
        f"-- of {len(output.prompt_token_ids)} prompt tokens {output.num_cached_tokens or 0} "
        f"were computed before; chunks found in the pool: {counts.get('hits', 0)}, loaded: "
        f"{counts.get('loaded_chunks', 0)}, stored: {counts.get('stored_chunks', 0)}"
    )
    sys.stdout.flush()
    os._exit(0)  # vLLM's threads on CPUs do not always end by themselves


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("message")
    parser.add_argument("--model", required=True, help="a directory or a name that vLLM knows")
    parser.add_argument("--pool", required=True, help="directory of a kvfs pool")
    parser.add_argument("--session", default="chat/1")
    parser.add_argument("--tokens", type=int, default=80, help="length of the answer")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--max-model-len", type=int, default=2048)
    return parser.parse_args()


if __name__ == "__main__":
    main()
