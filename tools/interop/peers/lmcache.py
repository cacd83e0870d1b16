"""LMCache's L2 adapters over a directory or a file, by its own `lmcache bench l2`.

Layer: tool.

`fs` and `fs_native` are given a directory and run in LMCache's own bench, with its verification.
`dax` is given a file that it maps; that bench cannot drive it (its objects lack what the adapter
asserts, on any file), so the adapter is driven here through the same factory.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

from interop.cases import Case, CaseError, Figures, Peer, Place, UnavailableError
from interop.driver import rate_mib_s, require, tell
from interop.ratios import compare
from interop.site import Site

_VERSION: Final = "0.5.6"
_KEYS: Final = 16
_KEY_BYTES: Final = 4 << 20
_ARENA_BYTES: Final = 256 << 20
_ENV: Final = {"LMCACHE_DISABLE_BANNER": "1", "LMCACHE_TRACK_USAGE": "false",
               "NO_COLOR": "1"}  # fmt: skip
_GOALS: Final = {"store MB/s": 0.6, "load MB/s": 0.9}
_DROP_CACHES: Final = Path("/proc/sys/vm/drop_caches")
_VERIFIED: Final = "data verified OK"
# (what the table says, adapter, its options)
_ADAPTERS: Final[tuple[tuple[str, str, dict[str, object]], ...]] = (
    ("bench l2, fs", "fs", {}),
    ("bench l2, fs, use_odirect", "fs", {"use_odirect": True}),
    ("bench l2, fs_native", "fs_native", {}),
    ("bench l2, fs_native, use_odirect", "fs_native", {"use_odirect": True}),
)


def _cases(site: Site) -> Iterator[Case]:
    for number, (what, adapter, options) in enumerate(_ADAPTERS):
        for place in Place:
            path = site.directory(place, "lmcache") / f"l2-{number}"
            config = {"type": adapter, "base_path": str(path), **options}
            yield Case(what, place, partial(_bench, site, config))
    for number, (what, adapter, options) in enumerate(_ADAPTERS):
        yield Case(f"{what}, against the plain directory", Place.MOUNT,
                   partial(_compared, site, number, adapter, options))  # fmt: skip
    for adapter in ("fs", "fs_native"):
        for place in Place:
            yield Case(f"bench l2, {adapter}, loaded by a second process after a remount", place,
                       partial(_second, site, place, adapter))  # fmt: skip
    for adapter in ("fs", "fs_native"):
        yield Case(f"bench l2, {adapter}, loaded from a cold disk, against the plain directory",
                   Place.MOUNT, partial(_cold, site, adapter))  # fmt: skip
    for place in Place:
        yield Case("dax adapter, mapped file, store and load", place, partial(_dax, site, place))


def _bench(site: Site, config: dict[str, object], *extra: str) -> Figures:
    is_direct = bool(config.get("use_odirect"))
    printed = site.run(
        str(site.python.with_name("lmcache")), "bench", "l2", "--l2-adapter", json.dumps(config),
        "--num-keys", str(_KEYS), "--in-flight", "2", "--rounds", "3",
        "--data-size-kb", str(_KEY_BYTES >> 10), "--lookup-max-hit-rate", "0.5",
        "--l1-align-bytes", "4096" if is_direct else "1", "--no-skip-verify", "--format", "json",
        *extra, env=_ENV,
    )  # fmt: skip
    if not extra and _VERIFIED not in printed:
        raise CaseError("the bench did not say that the data were verified")
    report = json.loads(printed[printed.index("\n{\n") : printed.rindex("\n}\n") + 2])
    figures: Figures = {}
    for name, values in report["metrics"].items():
        if not name.startswith("op_"):
            continue
        operation = values["operation"].lower()
        wanted = values.get("expected_hit_count", values["total_keys"])
        if operation != "lookup" and values["total_success"] != wanted:
            raise CaseError(f"{operation}: {values['total_success']} of {wanted} keys")
        if operation == "lookup":
            figures["lookups/s"] = round(values["ops_per_sec_avg"])
        else:
            figures[f"{operation} MB/s"] = round(values["throughput_avg_mbps"])
    return figures


def _compared(site: Site, number: int, adapter: str, options: dict[str, object]) -> Figures:
    """Let the bench store and load on both places in turns, in a new directory each time."""

    def run(place: Place, turn: int) -> Figures:
        path = site.directory(place, "lmcache") / f"turn-{number}-{turn}"
        return _bench(site, {"type": adapter, "base_path": str(path), **options})

    return compare(run, _GOALS)


def _second(site: Site, place: Place, adapter: str) -> Figures:
    path = site.directory(place, "lmcache") / f"second-{adapter}"
    config: dict[str, object] = {"type": adapter, "base_path": str(path)}
    _bench(site, config, "--only", "store")
    if place is Place.MOUNT:
        site.remount()
    return _bench(site, config, "--only", "load")


def _cold(site: Site, adapter: str) -> Figures:
    """Load on both places in turns what neither has in memory: once, by a second process."""

    def run(place: Place, turn: int) -> Figures:
        path = site.directory(place, "lmcache") / f"cold-{adapter}-{turn}"
        config: dict[str, object] = {"type": adapter, "base_path": str(path)}
        _bench(site, config, "--only", "store")
        if place is Place.MOUNT:
            site.remount()
        os.sync()
        try:
            _DROP_CACHES.write_text("3")
        except PermissionError as error:
            raise UnavailableError(f"only root can drop the page cache: {error}") from error
        return _bench(site, config, "--only", "load", "--rounds", "1")

    return compare(run, {"load MB/s": _GOALS["load MB/s"]})


def _dax(site: Site, place: Place) -> Figures:
    path = site.directory(place, "lmcache") / "arena"
    return site.drive("lmcache", str(path), env=_ENV)


PEER: Final = Peer("lmcache", "LMCache", "lmcache", lambda _: _VERSION, _cases, 4 << 30)


# --- in the peer's venv


def main() -> None:
    """Store objects through the dax adapter into a file and load them again."""
    import torch
    from lmcache.cli.commands.bench.l2_adapter_bench import data
    from lmcache.v1.distributed.l2_adapters import create_l2_adapter
    from lmcache.v1.distributed.l2_adapters.config import parse_args_to_l2_adapters_config

    path = Path(sys.argv[1])
    with path.open("xb") as file:
        file.truncate(_ARENA_BYTES)
    spec = {"type": "dax", "device_path": str(path), "max_dax_size_gb": _ARENA_BYTES / 2**30,
            "slot_bytes": _KEY_BYTES}  # fmt: skip
    parsed = parse_args_to_l2_adapters_config(argparse.Namespace(l2_adapter=[json.dumps(spec)]))
    buffer = data.make_aligned_tensor(2 * _KEYS * _KEY_BYTES, 4096)
    desc = data.create_l1_memory_desc(buffer, align_bytes=4096)
    adapter = create_l2_adapter(parsed.adapters[0], l1_memory_desc=desc)
    keys = data.make_object_keys(_KEYS)
    half = _KEYS * _KEY_BYTES
    stored = data.make_memory_objects(buffer, _KEYS, _KEY_BYTES, 0, 1)
    loaded = data.make_memory_objects(buffer, _KEYS, _KEY_BYTES, half, 101)
    for memory in (*stored, *loaded):
        memory.meta.shapes, memory.meta.dtypes = [memory.meta.shape], [torch.uint8]
    buffer[:half] = torch.randint(
        0, 256, (half,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    store = rate_mib_s(half, lambda: _store(adapter, data, keys, stored))
    load = rate_mib_s(half, lambda: _load(adapter, data, keys, loaded))
    require(bool((buffer[:half] == buffer[half:]).all()), "the adapter gives other bytes")
    adapter.close()
    piece = bytes(buffer[:64].tolist())
    require(piece in path.read_bytes(), "a plain read of the file does not show what was stored")
    tell({"store MiB/s": store, "load MiB/s": load})


def _store(adapter: Any, data: Any, keys: list[Any], objects: list[Any]) -> None:
    task = adapter.submit_store_task(keys, objects)
    require(data.wait_eventfd(adapter.get_store_event_fd()), "no end of the store")
    result = adapter.pop_completed_store_tasks()[task]
    require(result.is_successful(), f"store: {result}")


def _load(adapter: Any, data: Any, keys: list[Any], objects: list[Any]) -> None:
    task = adapter.submit_load_task(keys, objects)
    require(data.wait_eventfd(adapter.get_load_event_fd()), "no end of the load")
    bitmap = adapter.query_load_result(task)
    require(bitmap is not None and bitmap.popcount() == len(keys), f"load: {bitmap}")


if __name__ == "__main__":
    main()
