"""What the owner of a pool hears of vLLM's phases: prompts are prefill, answers are decode.

Layer: tool.

The two engines of vllm_tier, one after the other, as clients of `kvfs serve`: they report what they
access in their rings, and the owner's metrics say by which phases. Decoded blocks must be stored,
be noted as decode by the engine that made them, and be found by the next one, to which they are
prompt.
"""

import json
import os
import re
import signal
import socket
import urllib.request
from functools import partial
from pathlib import Path
from typing import Any, Final

from interop.cases import CaseError, Figures
from interop.peers.vllm_shared import served, wait_no_clients
from interop.peers.vllm_tier import CHUNK_TOKENS, beside, make_pool
from interop.site import Site

_END_S: Final = 300.0


def run(site: Site, model: Path, env: dict[str, str]) -> Figures:
    """Run both engines on a served pool; ask its owner for the phases after each."""
    pool, told = make_pool(site, "phases"), site.scratch / "phases.json"
    here = {**env, "PYTHONPATH": f"{beside(site)}{os.pathsep}{Path(__file__).parents[2]}"}
    drive = partial(site.drive, "vllm_tier", timeout_s=900, env=here)
    address = _free_address()
    with served(site, pool, "--metrics", address) as owner:
        stored = drive("first", str(model), str(pool), str(told))
        wait_no_clients(site, pool, owner)
        first = _accesses(address)
        loaded = drive("second", str(model), str(pool), str(told))
        wait_no_clients(site, pool, owner)
        second = _accesses(address)
        owner.popen.send_signal(signal.SIGTERM)
        owner.wait(_END_S)
    site.verify(pool)
    decoded = _decoded_chunks(json.loads(told.read_text()))
    if not decoded == stored["decoded chunks stored"] == first["decode"]:
        raise CaseError(f"{decoded} chunks were decoded, {stored} stored, noted: {first}")
    # The second engine decodes the same again, to blocks that are there.
    if second["decode"] != 2 * first["decode"]:
        raise CaseError(f"decode after the second engine: {second}, after the first: {first}")
    chunks = int(loaded["chunks loaded"])
    if second["prefill"] - first["prefill"] < chunks:
        raise CaseError(f"{chunks} chunks loaded, and prefill from {first} to {second}")
    if second["unknown"] or second["background"]:
        raise CaseError(f"accesses of no phase: {second}")
    return {
        "decoded chunks": decoded, "decode, 1st engine": first["decode"],
        "prefill, 1st": first["prefill"], "decode, both": second["decode"],
        "prefill, both": second["prefill"], "loaded by the 2nd": chunks,
    }  # fmt: skip


def _decoded_chunks(told: dict[str, Any]) -> int:
    """Return how many whole chunks hold a token that the first engine has made.

    The last token of an answer is made and never computed: it has no KV.
    """
    answers = [*told["answers"], {"ids": told["longer"], "tokens": told["reply"]["tokens"]}]
    count = 0
    for one in answers:
        prompt, end = len(one["ids"]), len(one["ids"]) + len(one["tokens"]) - 1
        count += end // CHUNK_TOKENS - prompt // CHUNK_TOKENS
    return count


def _accesses(address: str) -> dict[str, int]:
    """Return the owner's accesses by phase, of all namespaces."""
    with urllib.request.urlopen(f"http://{address}/metrics") as answer:
        text = answer.read().decode()
    found: dict[str, int] = {}
    for phase, count in re.findall(r'kvfs_accesses_total{.*phase="(\w+)"} (\d+)', text):
        found[phase] = found.get(phase, 0) + int(count)
    return found


def _free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"
