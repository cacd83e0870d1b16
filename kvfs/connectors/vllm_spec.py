"""vLLM's tiering, on machines without a GPU too.

Layer: L5.

In the configuration of the OffloadingConnector: `"spec_name": "KvfsSpec", "spec_module_path":
"kvfs.connectors.vllm_spec"`; the first is enough where kvfs is installed as a plug-in.

Stock vLLM refuses to make an offloading worker without a GPU. Here the CPU itself copies between
the model's cache and vLLM's host memory; manager, tiers and all else are stock, and so is the
worker where there is a GPU.
"""

from pathlib import Path
from typing import Any

from vllm.platforms import current_platform
from vllm.v1.kv_offload.base import OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec


class KvfsSpec(TieringOffloadingSpec):  # type: ignore[misc]
    """TieringOffloadingSpec that has a worker for CPUs."""

    def get_manager(self) -> Any:
        """Return the stock manager; on a CPU, worker and manager have the memory open by now."""
        manager = super().get_manager()
        if current_platform.is_cpu() and self._scheduler_mmap is not None:
            # A killed engine leaves no name behind.
            Path(self._scheduler_mmap.mmap_path).unlink(missing_ok=True)
        return manager

    def get_worker(self, kv_caches: Any) -> Any:
        """Return the worker, over the host memory that the scheduler's tiers see."""
        if not current_platform.is_cpu():
            return super().get_worker(kv_caches)
        region = SharedOffloadRegion(
            engine_id=self.config.engine_id,
            num_chunks=self.num_chunks,
            rank=0 if self.replicated_layout else self.config.parallel.rank,
            kv_bytes_per_chunk=self.kv_bytes_per_chunk,
            cpu_page_size=self.cpu_page_size_per_worker,
        )
        return CopyingWorker(kv_caches, region, self.blocks_per_chunk)


class CopyingWorker(OffloadingWorker):  # type: ignore[misc]
    """Copies at once, in the call that submits."""

    def __init__(self, kv_caches: Any, region: Any, blocks_per_chunk: int) -> None:
        """Take the model's tensors, and views of the region for each.

        As arrays: a copy of one page through torch costs several times what its bytes do.
        """
        import torch

        self._region = region
        self._blocks_per_chunk = blocks_per_chunk
        self._refs = kv_caches.group_data_refs
        self._model, self._host = [], []
        for cache in kv_caches.tensors:
            page = cache.page_size_bytes
            self._model.append(cache.tensor.view(torch.int8).view(-1, page).numpy())
            self._host.append(region.create_next_worker_view(page * blocks_per_chunk).numpy())
        self._done: list[Any] = []

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        """Copy the model's blocks to chunks."""
        return self._copy(job_id, src_spec, dst_spec, is_store=True)

    def submit_load(
        self, job_id: int, src_spec: Any, dst_spec: Any, expedited: bool = False
    ) -> bool:
        """Copy chunks to the model's blocks."""
        del expedited
        return self._copy(job_id, dst_spec, src_spec, is_store=False)

    def get_finished(self) -> list[Any]:
        """Return what was copied since the last call."""
        done, self._done = self._done, []
        return done

    def wait(self, job_ids: set[int]) -> None:
        """Nothing to wait for."""

    def shutdown(self) -> None:
        """Let go of the memory."""
        self._host.clear()
        self._region.cleanup()

    def _copy(self, job_id: int, model: Any, host: Any, *, is_store: bool) -> bool:
        per_chunk, block_at, chunk_at = self._blocks_per_chunk, 0, 0
        for refs, size, first in zip(
            self._refs, model.group_sizes, model.block_indices, strict=True
        ):
            skipped = first % per_chunk
            for i in range(size):
                chunk, sub = divmod(skipped + i, per_chunk)
                block = int(model.block_ids[block_at + i])
                for ref in refs:
                    mine = self._model[ref.tensor_idx][block]
                    page = mine.size
                    row = self._host[ref.tensor_idx][int(host.block_ids[chunk_at + chunk])]
                    theirs = row[sub * page : (sub + 1) * page]
                    (theirs if is_store else mine)[:] = mine if is_store else theirs
            block_at += size
            chunk_at += -(-(size + skipped) // per_chunk) if size else 0
        self._done.append(TransferResult(job_id, success=True))
        return True
