"""kvfs's own tier in vLLM: a second engine finds prompts and answers of the first one.

Layer: tool.

Stock vLLM for the CPU, with kvfs beside it as if installed: tier and spec are found by the short
names that the entry point registers. The pool is opened by the engine itself, not mounted.
"""

import json
import os
import shutil
import sys
import time
from functools import partial
from importlib.metadata import distribution
from pathlib import Path
from typing import Any, Final

from interop.cases import CaseError, Figures
from interop.driver import require, tell
from interop.site import Site

CHUNK_TOKENS: Final = 64
STEP_S: Final = 0.001  # between steps that compute nothing, as in vLLM's server
_SETTLE_S_MAX: Final = 120.0
_ANSWER: Final = 150
_REPLY: Final = 24
_SESSION: Final = "towns/42"
_FOLLOW_UP: Final = " Now tell me which of these books is the oldest, and why:"


def run(site: Site, model: Path, env: dict[str, str]) -> Figures:
    """Run two engines, one after the other, on one pool; look at what they left in it."""
    from kvfs.lifecycle import open_pool

    pool, told = make_pool(site, "tier"), site.scratch / "tier.json"
    here = {**env, "PYTHONPATH": f"{beside(site)}{os.pathsep}{Path(__file__).parents[2]}"}
    drive = partial(site.drive, "vllm_tier", timeout_s=900, env=here)
    figures = drive("first", str(model), str(pool), str(told))
    figures |= drive("second", str(model), str(pool), str(told))
    with open_pool(pool) as opened:
        (info,) = [one for one in opened.namespaces() if one.name.startswith("vllm-")]
        contexts = {context.name: context for context in opened.namespace(info.name).contexts()}
        session = contexts.get(f"requests/{_SESSION}")
        if session is None or not session.resident_blocks == len(session.keys) > 0:
            raise CaseError(f"the session's context is not whole; there are {sorted(contexts)}")
        tokens = session.token_count
    return {**figures, "contexts": len(contexts), "tokens of the session": tokens}


def make_pool(site: Site, name: str) -> Path:
    """Make a pool of its own for engines that open it themselves."""
    from kvfs.lifecycle import create_pool

    path = site.root / f"{name}-pool"
    create_pool(path, [f"dir:{site.root / f'{name}-device'}?size=1GiB"]).close()
    return path


def beside(site: Site) -> Path:
    """Return a directory that holds kvfs as a wheel would: package, native code, metadata."""
    from kvfs import _native

    target = site.scratch / "kvfs-site"
    if not target.exists():
        source = Path(__file__).parents[3] / "kvfs"
        shutil.copytree(source, target / "kvfs", ignore=shutil.ignore_patterns("__pycache__"))
        assert _native.__file__
        shutil.copy2(_native.__file__, target / "kvfs")
        installed = Path(str(distribution("kvfs").locate_file(".")))
        for folder in installed.glob("kvfs-*.dist-info"):
            shutil.copytree(folder, target / folder.name)
    return target


# --- in the peer's venv


def main() -> None:
    """Generate, and compare with the engine before."""
    verb, model, pool, told = sys.argv[1:5]
    llm = engine(model, pool)
    if verb == "first":
        answers = [ask(llm, encode(llm, text), _ANSWER) for text in prompts()]
        longer = answers[1]["ids"] + answers[1]["tokens"] + encode(llm, _FOLLOW_UP)
        reply = ask(llm, longer, _REPLY, session=_SESSION)
        settle(llm)
        llm.llm_engine.engine_core.shutdown()
        counts = counters(llm)
        Path(told).write_text(json.dumps({"answers": answers, "longer": longer, "reply": reply}))
        tell({"chunks stored": counts.get("stored_chunks", 0),
              "decoded chunks stored": counts.get("decode_chunks", 0)})  # fmt: skip
    else:
        former = json.loads(Path(told).read_text())
        # The conversation first: nothing of it is in this engine's memory yet.
        reply = ask(llm, former["longer"], _REPLY, session=_SESSION)
        answers = [ask(llm, one["ids"], _ANSWER) for one in former["answers"]]
        settle(llm)
        counts = counters(llm)
        llm.llm_engine.engine_core.shutdown()
        prompt, cached = len(former["answers"][1]["ids"]), reply["cached"]
        require(counts.get("hits", 0) > 0, f"nothing was found in kvfs: {counts}")
        require(counts.get("loaded_chunks", 0) > 0, f"nothing was loaded from kvfs: {counts}")
        least = prompt + CHUNK_TOKENS
        require(cached >= least, f"no decoded chunk came back: {cached} of {least} tokens")
        require_same(reply, former["reply"])
        for answer, then in zip(answers, former["answers"], strict=True):
            require_same(answer, then)
        tell({
            "hits": counts["hits"], "chunks loaded": counts["loaded_chunks"],
            "conversation from kvfs": f"{cached} of {len(former['longer'])} tokens, "
            f"{prompt} of them prompt", "answers": "the same",
        })  # fmt: skip
    sys.stdout.flush()
    os._exit(0)  # its threads of the CPU do not always end by themselves


def require_same(answer: dict[str, Any], then: dict[str, Any]) -> None:
    """The second engine must say what the first one said."""
    now, before = answer["tokens"], then["tokens"]
    require(now == before, f"another answer: {now}, the first engine's was {before}")


def engine(model: str, pool: str | None) -> Any:
    """Start vLLM with the tier, decoded chunks offloaded too; without a pool, as it is.

    In float32: what was computed and what was loaded meet in other places than in one engine, which
    in bfloat16 is enough for another token here and there.
    """
    from vllm import LLM
    from vllm.config import KVTransferConfig

    extra = {
        "spec_name": "KvfsSpec", "cpu_bytes_to_use": 256 << 20, "block_size": CHUNK_TOKENS,
        "offload_prompt_only": False, "secondary_tiers": [{"type": "kvfs", "pool": pool}],
    }  # fmt: skip
    return LLM(
        model, dtype="float32", enforce_eager=True, block_size=32, enable_prefix_caching=True,
        max_model_len=1024, max_num_seqs=2, seed=1, disable_log_stats=False,
        kv_transfer_config=KVTransferConfig(
            kv_connector="OffloadingConnector", kv_role="kv_both",
            kv_connector_extra_config=extra,
        ) if pool is not None else None,
    )  # fmt: skip


def prompts() -> list[str]:
    """Return two prompts that share their beginning."""
    towns = ("Arden", "Belmont", "Corley", "Dunmore", "Elstow", "Farley", "Garth", "Hilton")
    lines = [f"In {town}, house number {7 * i + 3} keeps a book of year {1700 + 13 * i}."
             for i, town in enumerate(towns * 3)]  # fmt: skip
    return [" ".join(lines) + " The oldest book is", " ".join(lines[:14]) + " The town of"]


def encode(llm: Any, text: str) -> list[int]:
    """Return the tokens of a text."""
    return list(llm.get_tokenizer().encode(text, add_special_tokens=False))


def ask(llm: Any, ids: list[int], count: int, session: str = "") -> dict[str, Any]:
    """Answer a prompt: `count` tokens, and how many of the prompt's were not computed."""
    from vllm import SamplingParams

    more = {"kv_transfer_params": {"kvfs.session": session}} if session else {}
    (output,) = llm.generate(
        [{"prompt_token_ids": ids}],
        SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, extra_args=more),
    )
    return {"ids": ids, "tokens": list(output.outputs[0].token_ids),
            "cached": int(output.num_cached_tokens or 0)}  # fmt: skip


def settle(llm: Any) -> None:
    """Let what is stored be stored: only then does vLLM tell a tier that a request has finished."""
    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler  # of an engine in this process
    deadline = time.monotonic() + _SETTLE_S_MAX
    while scheduler.has_requests():  # a server goes on, too, while transfers are under way
        require(time.monotonic() < deadline, "vLLM does not end its stores")
        engine.step()
        time.sleep(STEP_S)


def forget(llm: Any) -> None:
    """Let what is stored be stored, then drop vLLM's own copies, in its cache and host memory."""
    settle(llm)
    require(bool(llm.reset_prefix_cache(reset_connector=True)), "vLLM's own copies stay")


def counters(llm: Any) -> dict[str, int]:
    """Return kvfs's counters as vLLM publishes them."""
    prefix = "vllm:kvfs_"
    return {
        metric.name.removeprefix(prefix): int(metric.value)
        for metric in llm.get_metrics()
        if metric.name.startswith(prefix)
    }


if __name__ == "__main__":
    main()
