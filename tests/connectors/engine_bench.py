"""A stand-in for vLLM's scheduler: rows, requests, and the steps it takes with a tier."""

import importlib
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kvfs.lifecycle import create_pool
from tests.connectors import fake_vllm

ROW = 8192
ROWS = 24
CHUNK = 64


class Bench:
    """One version of vLLM, one pool, and the rows of one engine at a time."""

    def __init__(self, patch: pytest.MonkeyPatch, root: Path, version: str) -> None:
        self.vllm = SimpleNamespace(**fake_vllm.install(patch, version))
        self.module = importlib.import_module("kvfs.connectors.vllm")
        self.path = root / "pool"
        self.rows = np.zeros((ROWS, ROW), np.int8)
        self.tiers: list[Any] = []
        self._jobs = 0
        self._url = f"dir:{root}/dev?size=64MiB&segment=16MiB"

    def create(self) -> None:
        create_pool(self.path, [self._url]).close()

    def spec(self, **changes: Any) -> Any:
        """Return what vLLM tells of itself: one group of two blocks of 32 tokens a chunk."""
        vllm = self.vllm
        config = vllm.OffloadingConfig(
            groups=(vllm.OffloadingGroupConfig(32, ("model.0", "model.1"), 0),),
            worker_kv_bytes_per_block=ROW // 2,
            enable_kv_cache_events=True,
            extra_config={},
            engine_id="e",
            model=vllm.OffloadingModelConfig(changes.get("model", "org/tiny"), "bfloat16"),
            cache=vllm.OffloadingCacheConfig(tokens_per_hash=32, blocks_per_chunk=2),
            parallel=vllm.OffloadingParallelConfig(
                0, 1, changes.get("tp_size", 1), 1, 1, 1, 0, 1, None, False
            ),
        )
        events = vllm.OffloadingKVEventsConfig(True, False)
        return SimpleNamespace(config=config, blocks_per_chunk=2, kv_events_config=events)

    def tier(self, spec: Any = None, **options: Any) -> Any:
        made = self.module.KvfsTier(
            offloading_spec=spec or self.spec(),
            primary_kv_view=memoryview(self.rows),
            tier_type="kvfs",
            backpressure_detector=None,
            **{"pool": str(self.path), "retry_s": 0.01, **options},
        )
        self.tiers.append(made)
        return made

    def request(self, name: str, keys: list[bytes], **more: Any) -> Any:
        context = self.vllm.ReqContext(req_id=name, **more)
        for at, key in enumerate(keys):
            context.set_offload_key_position(key, (at + 1) * CHUNK)
        return context

    def keys(self, count: int, seed: int = 0, group: int = 0) -> list[bytes]:
        digests = np.random.default_rng(seed).integers(0, 256, (count, 32), np.uint8)
        return [self.vllm.make_offload_key(digest.tobytes(), group) for digest in digests]

    def fill(self, seed: int) -> np.ndarray:
        self.rows[:] = np.random.default_rng(seed).integers(-128, 128, self.rows.shape, np.int8)
        return self.rows.copy()

    def job(self, keys: list[bytes], rows: list[int], request: Any, *, load: bool) -> Any:
        self._jobs += 1
        return self.vllm.TransferJob(
            job_id=self._jobs, keys=keys, chunk_ids=np.array(rows, np.int32), is_promotion=load,
            req_context=request,
        )  # fmt: skip

    def store(self, tier: Any, keys: list[bytes], rows: list[int], request: Any) -> Any:
        tier.submit_store(self.job(keys, rows, request, load=False))
        return self.result(tier)

    def load(self, tier: Any, keys: list[bytes], rows: list[int], request: Any) -> Any:
        tier.submit_load(self.job(keys, rows, request, load=True))
        return self.result(tier)

    @staticmethod
    def result(tier: Any) -> Any:
        while True:
            if results := list(tier.get_finished_jobs()):
                (result,) = results
                return result
            time.sleep(0.001)

    def found(self, tier: Any, keys: list[bytes], request: Any) -> list[bool]:
        """Look keys up as a scheduler does: ask, end the step, ask again."""
        answers = self.vllm.LookupResult
        while True:
            given = [tier.lookup(key, request) for key in keys]
            if answers.RETRY not in given:
                return [answer is answers.HIT for answer in given]
            self.step(tier)
            time.sleep(0.001)

    def step(self, tier: Any, *new: Any) -> None:
        """End a step, in which these requests were scheduled for the first time."""
        names = [request.req_id for request in new]
        tier.on_schedule_end(self.vllm.ScheduleEndContext(names, ()))

    def extend(self, request: Any, keys: list[bytes]) -> None:
        """Name further chunks of a request, as vLLM does when it has made their tokens."""
        for at, key in enumerate(keys, len(request._offload_key_positions) + 1):
            request.set_offload_key_position(key, at * CHUNK)

    def close(self) -> None:
        while self.tiers:
            self.tiers.pop().shutdown()
