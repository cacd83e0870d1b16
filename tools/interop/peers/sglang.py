"""SGLang's HiCacheFile: the class its `file` storage backend is made of, driven directly.

Layer: tool.

The engine itself does not start without a GPU, and its `__init__` and `utils.common` pull in what
only a GPU needs. Empty modules in their place let the storage modules be imported, unchanged; the
one function that these take from `utils.common` is compiled from that file.
"""

import argparse
import ast
import re
import sys
import types
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from interop.cases import Case, Figures, Peer, Place
from interop.driver import pattern, rate_mib_s, require, tell
from interop.site import Site

_VERSION: Final = "0.5.23"
_PAGES: Final = 128
_PAGE_BYTES: Final = 256 * 1024
_MODEL: Final = "org/model"
# Room for less than all pages, so that SGLang's own eviction runs.
_SMALL: Final = "16Mi"
_POOL_BYTES: Final = 256 << 20


def _cases(site: Site) -> Iterator[Case]:
    for place in Place:
        yield Case("HiCacheFile set, get after a remount", place, partial(_two, site, place))
    for place in Place:
        yield Case("HiCacheFile with its own eviction and a metadata cache", place,
                   partial(_evicting, site, place))  # fmt: skip
    yield Case("HiCacheFile, twice what the pool holds", Place.MOUNT, partial(_full, site))


def _two(site: Site, place: Place) -> Figures:
    directory = str(site.directory(place, "sglang") / "hicache")
    env = {"SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR": directory}
    written = site.drive("sglang", "set", directory, env=env)
    if place is Place.MOUNT:
        site.remount()
    return written | site.drive("sglang", "get", directory, env=env)


def _evicting(site: Site, place: Place) -> Figures:
    return site.drive("sglang", "evict", str(site.directory(place, "sglang") / "small"))


def _full(site: Site) -> Figures:
    directory = str(site.directory(Place.MOUNT, "sglang") / "full")
    written = site.drive("sglang", "fill", directory, str(2 * site.pool_bytes // _PAGE_BYTES))
    site.remount()
    return written | site.drive("sglang", "found", directory, str(written["pages set"]))


PEER: Final = Peer("sglang", "SGLang", "torch", lambda _: _VERSION, _cases, _POOL_BYTES)


# --- in the peer's venv


def main() -> None:
    """Set, get or evict pages."""
    verb, directory = sys.argv[1:3]
    if verb in ("fill", "found"):
        {"fill": _fill, "found": _found}[verb](directory, int(sys.argv[3]))
    else:
        {"set": _set, "get": _get, "evict": _evict}[verb](directory)


def _storage(directory: str, **options: object) -> Any:
    """Return SGLang's file storage over a directory."""
    _seed_modules()
    from sglang.srt.mem_cache.hicache_storage import HiCacheFile, HiCacheStorageConfig

    config = HiCacheStorageConfig(
        tp_rank=0, tp_size=1, pp_rank=0, pp_size=1, attn_cp_rank=0, attn_cp_size=1,
        is_mla_model=False, enable_storage_metrics=False, is_page_first_layout=True,
        model_name=_MODEL, extra_config={"file_storage_path": directory, **options},
    )  # fmt: skip
    return HiCacheFile(config)


def _seed_modules() -> None:
    """Put light modules where the storage modules would import heavy ones."""
    spec = find_spec("sglang")
    assert spec is not None
    assert spec.submodule_search_locations
    root = Path(spec.submodule_search_locations[0])
    for name, path in (("sglang", root), ("sglang.srt.utils", root / "srt" / "utils")):
        package = types.ModuleType(name)
        package.__path__ = [str(path)]
        sys.modules[name] = package
    common = types.ModuleType("sglang.srt.utils.common")
    tree = ast.parse((root / "srt" / "utils" / "common.py").read_text())
    tree.body = [
        node for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name == "human_readable_int"
    ]  # fmt: skip
    vars(common).update(argparse=argparse, re=re)
    exec(compile(tree, "common.py", "exec"), vars(common))
    sys.modules[common.__name__] = common


def _pages() -> tuple[list[str], Any]:
    import torch

    keys = [f"{number:064x}" for number in range(_PAGES)]
    generator = torch.Generator().manual_seed(5)
    values = torch.randint(0, 256, (_PAGES, _PAGE_BYTES), dtype=torch.uint8, generator=generator)
    return keys, values


def _set(directory: str) -> None:
    storage = _storage(directory)
    keys, values = _pages()
    require(not storage.exists(keys[0]), "a page is there before it was set")
    done: list[bool] = []
    rate = rate_mib_s(values.nbytes, lambda: done.append(storage.batch_set(keys, list(values))))
    require(done == [True], "batch_set answered False")
    require(storage.set(keys[0], values[0]), "setting a page again answered False")
    require(all(map(storage.exists, keys)), "a page that was set is not there")
    tell({"set MiB/s": rate})


def _get(directory: str) -> None:
    import torch

    storage = _storage(directory)
    keys, values = _pages()
    require(all(map(storage.exists, keys)), "a page is missing")
    found = storage.batch_exists_v2(keys)
    require(found.kv_hit_pages == _PAGES, f"batch_exists_v2 answered {found}")
    targets = torch.zeros_like(values)
    rate = rate_mib_s(values.nbytes, lambda: storage.batch_get(keys, list(targets)))
    require(bool((targets == values).all()), "get gives other bytes than were set")
    require(storage.get("f" * 64, targets[0]) is None, "a page that was never set is there")
    require(storage.clear() is not False, "clear answered False")
    require(not list(Path(directory).glob("*.bin")), "clear left pages")
    tell({"get MiB/s": rate, "pages equal": f"{_PAGES} of {_PAGES}"})


def _evict(directory: str) -> None:
    import torch

    options = {"max_size": _SMALL, "min_free_space": "1Mi", "enable_metadata_cache": True}
    storage = _storage(directory, **options)
    keys, values = _pages()
    require(storage.batch_set(keys, list(values)), "batch_set answered False")
    left = [path for path in Path(directory).iterdir() if path.suffix == ".bin"]
    held = sum(path.stat().st_size for path in left)
    require(0 < held <= 16 << 20, f"eviction left {held} bytes")
    target = torch.zeros_like(values[-1])
    require(storage.get(keys[-1], target) is not None, "the newest page is gone")
    require(bool((target == values[-1]).all()), "get gives other bytes than were set")
    tell({"pages set": _PAGES, "pages left": len(left)})


def _page(number: int) -> Any:
    import torch

    return torch.frombuffer(bytearray(pattern(_PAGE_BYTES, str(number))), dtype=torch.uint8)


def _fill(directory: str, count: int) -> None:
    """Set pages until what the pool holds is exceeded; kvfs lets the least valuable go."""
    storage = _storage(directory)
    refused = [n for n in range(count) if not storage.set(f"{n:064x}", _page(n))]
    require(not refused, f"{len(refused)} of {count} pages were refused, first {refused[:3]}")
    tell({"pages set": count})


def _found(directory: str, count: int) -> None:
    import torch

    storage = _storage(directory)
    target = torch.zeros(_PAGE_BYTES, dtype=torch.uint8)
    found = 0
    for number in range(count):
        if storage.exists(f"{number:064x}"):
            page = storage.get(f"{number:064x}", target)
            require(page is not None, "a page vanished between exists and get")
            require(bool((target == _page(number)).all()), f"page {number}: other bytes")
            found += 1
    require(found > count // 4, f"{found} of {count} pages are left")
    tell({"pages left": found})


if __name__ == "__main__":
    main()
