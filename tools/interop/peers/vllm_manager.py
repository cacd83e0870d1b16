"""vLLM 0.33's own tiering manager, over kvfs's tier: its Python alone, without model or GPU.

Layer: tool.

The wheel of vLLM 0.33 needs CUDA. Its scheduler side is Python, which is unzipped and put in front
of the CPU build of 0.32: lookups, stores, promotions and metrics are the real manager's.
"""

import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any, Final

from interop.cases import UnavailableError
from interop.driver import require, tell
from interop.site import BUILD

VERSION: Final = "0.33.0"
_CHUNKS: Final = 6
_ROW: Final = 8192
_STEPS_MAX: Final = 20_000


def unzipped() -> Path:
    """Return a directory with the Python of vLLM 0.33; its wheel of 336 MB is downloaded once.

    Raises:
        UnavailableError: It could not be downloaded.
    """
    target = BUILD / f"vllm-{VERSION}"
    if target.exists():
        return target
    wheels = BUILD / "wheels"
    command = [
        sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check",
        "--no-deps", "--only-binary=:all:", "-d", str(wheels), f"vllm=={VERSION}",
    ]  # fmt: skip
    if not list(wheels.glob(f"vllm-{VERSION}-*.whl")):
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            said = " / ".join(done.stderr.strip().splitlines()[-2:])
            raise UnavailableError(f"pip download vllm=={VERSION}: {said[-300:]}")
    (wheel,) = wheels.glob(f"vllm-{VERSION}-*.whl")
    temporary = target.with_suffix(".part")
    shutil.rmtree(temporary, ignore_errors=True)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(temporary, [n for n in archive.namelist() if n.endswith(".py")])
    temporary.rename(target)
    return target


# --- in the peer's venv


def main() -> None:
    """Store through one manager, and find it through another one."""
    import vllm

    require(VERSION in str(Path(vllm.__file__).parent), f"another vLLM: {vllm.__file__}")
    pool, keys = sys.argv[1], [_key(number) for number in range(_CHUNKS)]
    first = _Engine(pool)
    require(first.find(keys) == ["MISS"] * _CHUNKS, "a new pool is not empty")
    content = first.store(keys)
    first.end()
    second = _Engine(pool)
    found = second.find([*keys, _key(99)])
    require(found == ["HIT"] * _CHUNKS + ["MISS"], f"the second manager found {found}")
    require(second.read(keys) == content, "it read other bytes")
    counts = second.manager.get_stats().reduce()
    hits = int(counts["vllm:kvfs_hits"])
    require(hits == _CHUNKS, f"counted {hits} hits of {_CHUNKS}")
    info = second.manager.config_info()
    require(any("kvfs_namespace" in one for one in info), f"no info of the tier: {info}")
    second.end()
    tell({"chunks found": hits, "bytes loaded": int(counts["vllm:kvfs_loaded_bytes"])})


def _key(number: int) -> Any:
    from vllm.v1.kv_offload.base import make_offload_key

    return make_offload_key(number.to_bytes(32, "big"), 0)


class _Engine:
    """A manager, and the steps that a scheduler takes with it."""

    def __init__(self, pool: str) -> None:
        from vllm.v1.kv_offload import config
        from vllm.v1.kv_offload.base import ReqContext
        from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

        self.spec = TieringOffloadingSpec(
            config.OffloadingConfig(
                groups=(config.OffloadingGroupConfig(32, ("model.0",), 0),),
                worker_kv_bytes_per_block=_ROW // 2,
                enable_kv_cache_events=False,
                extra_config={
                    "cpu_bytes_to_use": 32 * _ROW,
                    "secondary_tiers": [
                        {"type": "KvfsTier", "module_path": "kvfs.connectors.vllm", "pool": pool}
                    ],
                },
                engine_id=f"kvfs-interop-{time.monotonic_ns()}",
                model=config.OffloadingModelConfig("org/tiny", "bfloat16"),
                cache=config.OffloadingCacheConfig(tokens_per_hash=32, blocks_per_chunk=2),
                parallel=config.OffloadingParallelConfig(0, 1, 1, 1, 1, 1, 0, 1, None, True),
            )
        )
        self.manager: Any = self.spec.get_manager()
        self.request = ReqContext(req_id="r")
        with self.manager.lock:
            self.manager.on_new_request(self.request)

    def step(self) -> None:
        from vllm.v1.kv_offload.base import ScheduleEndContext

        with self.manager.lock:
            self.manager.on_schedule_end(ScheduleEndContext((), ()))
        time.sleep(0.001)

    def find(self, keys: list[Any]) -> list[str]:
        """Look up until nothing is pending."""
        found: list[str] = []
        for _ in range(_STEPS_MAX):
            with self.manager.lock:
                found = [self.manager.lookup(key, self.request).name for key in keys]
            if {"RETRY", "HIT_PENDING"}.isdisjoint(found):
                return found
            self.step()
        sys.exit(f"no end of lookups: {found}")

    def store(self, keys: list[Any]) -> list[bytes]:
        """Store chunks; return their bytes."""
        with self.manager.lock:
            output = self.manager.prepare_store(keys, self.request)
        view = self.manager.primary_tier.get_kv_memoryview().cast("B")
        content = []
        for number, chunk in enumerate(output.store_spec.chunk_ids):
            content.append(bytes([number + 1]) * _ROW)
            view[int(chunk) * _ROW : (int(chunk) + 1) * _ROW] = content[-1]
        view.release()
        with self.manager.lock:
            self.manager.complete_store(keys, self.request)
        for _ in range(_STEPS_MAX):
            if not self.manager.has_pending_work():
                return content
            self.step()
        sys.exit("no end of stores")

    def read(self, keys: list[Any]) -> list[bytes]:
        """Return what the primary tier has."""
        with self.manager.lock:
            spec = self.manager.prepare_load(keys, self.request)
        view = self.manager.primary_tier.get_kv_memoryview().cast("B")
        content = [bytes(view[int(c) * _ROW : (int(c) + 1) * _ROW]) for c in spec.chunk_ids]
        view.release()
        with self.manager.lock:
            self.manager.complete_load(keys, self.request)
        return content

    def end(self) -> None:
        with self.manager.lock:
            self.manager.on_request_finished(self.request)
        self.step()
        self.manager.shutdown()


if __name__ == "__main__":
    main()
