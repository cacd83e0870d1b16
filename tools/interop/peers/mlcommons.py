"""The KV cache benchmark of MLPerf Storage (mlcommons/storage, kv_cache_benchmark).

Layer: tool.

It is in no package, and this repository keeps none of it: KV_CACHE_BENCHMARK names the directory of
a clone that holds kv-cache.py. Without it the peer is reported as not available.
"""

import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

from interop.cases import Case, CaseError, Figures, Peer, Place, UnavailableError
from interop.site import Site

VARIABLE: Final = "KV_CACHE_BENCHMARK"
_SECONDS: Final = 20
_CAPACITY_GB: Final = 2


def _version(_: Site) -> str:
    directory = os.environ.get(VARIABLE)
    if not directory:
        raise UnavailableError(
            f"set {VARIABLE} to kv_cache_benchmark/ in a clone of mlcommons/storage"
        )
    if not (Path(directory) / "kv-cache.py").is_file():
        raise UnavailableError(f"{VARIABLE}={directory} has no kv-cache.py")
    return "given by the user"


def _cases(site: Site) -> Iterator[Case]:
    for place in Place:
        yield Case("kv-cache.py, tiny-1b, 4 users", place, partial(_run, site, place))


def _run(site: Site, place: Place) -> Figures:
    benchmark = Path(os.environ[VARIABLE]).resolve()
    output = site.scratch / f"{place}.json"
    site.run(
        str(site.python), str(benchmark / "kv-cache.py"), "--config",
        str(benchmark / "config.yaml"), "--model", "tiny-1b", "--num-users", "4",
        "--duration", str(_SECONDS), "--gpu-mem-gb", "0", "--cpu-mem-gb", "0",
        "--max-concurrent-allocs", "2", "--generation-mode", "none", "--seed", "42",
        "--storage-capacity-gb", str(_CAPACITY_GB),
        "--cache-dir", str(site.directory(place, "mlcommons")), "--output", str(output),
        timeout_s=600,
    )  # fmt: skip
    return _figures(json.loads(output.read_text()))


def _figures(report: dict[str, Any]) -> Figures:
    stats = report["summary"]["cache_stats"]
    if not stats["tier_storage_kv_bytes_read_gb"]:
        raise CaseError("nothing was read from storage")
    return {
        "hit rate": round(stats["cache_hit_rate"], 2),
        "read GiB": round(stats["tier_storage_kv_bytes_read_gb"], 2),
        "read GiB/s": round(stats["tier_storage_read_bandwidth_gbps"], 2),
        "written GiB": round(stats["tier_storage_kv_bytes_written_gb"], 2),
        "write GiB/s": round(stats["tier_storage_write_bandwidth_gbps"], 2),
    }


PEER: Final = Peer("mlcommons", "MLPerf Storage", "mlcommons", _version, _cases, 6 << 30)
