"""All that is used of vLLM, and how its versions differ: 0.32 and 0.33.

Layer: L5.

What differs, and what is done about it:

- `SecondaryTierManager.config_info`, `config_info_keys` are new in 0.33: the tier has them, 0.32
  does not ask.
- `tolerates_off_thread_polling` is new in 0.33: the tier needs no polling and leaves it False. With
  it came a lock that is held over every call, from whatever thread.
- `OffloadingWorker.submit_load` has `expedited` in 0.33: the worker for CPUs takes it and copies at
  once anyway.
- `SharedOffloadRegion`, `TieringOffloadingSpec.get_manager`: used as they are.
- `OffloadingConfig` has more fields in 0.33 (`max_model_len`, `sliding_window_size_in_chunks`):
  not used, and no part of a namespace's fingerprint.
"""

from collections.abc import Mapping
from typing import Any

try:
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import (
        OffloadingConnectorStats,
    )
    from vllm.v1.kv_offload.base import (
        Locality,
        LookupResult,
        Medium,
        OffloadingCounterMetadata,
        OffloadingEvent,
        RequestOffloadingContext,
    )
    from vllm.v1.kv_offload.file_mapper import FileMapper
    from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager
except ImportError as error:
    raise ImportError(
        f"kvfs's tier does not fit this vLLM: {error}; it was made for vLLM 0.32 and 0.33. vLLM's "
        "own tier 'fs' on a directory of a kvfs mount needs no plug-in"
    ) from error

__all__ = [
    "FileMapper", "JobResult", "Locality", "LookupResult", "Medium", "OffloadingConnectorStats",
    "OffloadingCounterMetadata", "OffloadingEvent", "RequestOffloadingContext",
    "SecondaryTierManager", "fingerprint_fields", "positions_of",
]  # fmt: skip


def fingerprint_fields(spec: Any, row_bytes: int) -> dict[str, Any]:
    """Return what tells the rows of one kind of engine from those of another.

    What vLLM's own file tier puts into its paths, with its rules on parallelism, and the order of
    bytes in a row as far as vLLM names it.
    """
    mapper = FileMapper.from_offloading_spec(
        root_dir="",
        offloading_spec=spec,
        blocks_per_file=spec.blocks_per_chunk,
        parallel_agnostic=True,
    )
    return {
        **mapper.fields,
        "rank": mapper.rank,
        "kv_cache_layout": spec.config.kv_cache_layout,
        "row_bytes": row_bytes,
    }


def positions_of(req_context: Any) -> Mapping[bytes, int]:
    """Return where each key of a request ends, in tokens.

    vLLM's public way asks for one key; the whole chain is only in the field behind it. Without it
    there are no chains, which costs contexts and hints, not hits.
    """
    return getattr(req_context, "_offload_key_positions", None) or {}
