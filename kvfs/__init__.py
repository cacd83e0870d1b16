"""A context memory for LLM inference.

Layer: public surface.

    pool = kvfs.create_pool("/var/lib/kvfs/kv0", ["dram:?size=4GiB",
    "dir:/mnt/nvme/kv?size=500GiB"]) space = pool.namespace("llama-8b",
    layout=kvfs.Layout("bfloat16", (32, 2, 8, 128), 64)) keys, parents = space.keys(token_ids)
    space.put(keys, buffers, parents=parents) with space.view(keys[: space.match_prefix(keys)]) as
    view:
        tensor = view.torch(torch.bfloat16, (-1, 32, 2, 8, 128))
"""

from typing import TYPE_CHECKING, Any

from kvfs.errors import (
    BusyError,
    ClosedError,
    CorruptionError,
    DataError,
    DeviceError,
    ExistsError,
    FormatVersionError,
    KvfsError,
    LeaseExpiredError,
    MediaError,
    NoSpaceError,
    NotFoundError,
    PoisonedError,
    RefusedError,
    UnavailableError,
    UsageError,
)
from kvfs.layout import Layout

if TYPE_CHECKING:
    from kvfs.clients.remote import RemotePool
    from kvfs.config import PoolOptions
    from kvfs.lifecycle import create_pool, destroy_pool
    from kvfs.namespace import Context, Namespace
    from kvfs.opening import open_pool
    from kvfs.pool import Pool
    from kvfs.views import View

__version__ = "0.1.0"

_LAZY = {
    "Context": "kvfs.namespace",
    "Namespace": "kvfs.namespace",
    "Pool": "kvfs.pool",
    "PoolOptions": "kvfs.config",
    "RemotePool": "kvfs.clients.remote",
    "View": "kvfs.views",
    "create_pool": "kvfs.lifecycle",
    "destroy_pool": "kvfs.lifecycle",
    "open_pool": "kvfs.opening",
}


def __getattr__(name: str) -> Any:
    """Import the heavy parts on first use, so that command-line tools start quickly."""
    if name not in _LAZY:
        raise AttributeError(f"module 'kvfs' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)


__all__ = [
    "BusyError", "ClosedError", "Context", "CorruptionError", "DataError", "DeviceError",
    "ExistsError", "FormatVersionError", "KvfsError", "Layout", "LeaseExpiredError", "MediaError",
    "Namespace", "NoSpaceError", "NotFoundError", "PoisonedError", "Pool", "PoolOptions",
    "RefusedError", "RemotePool", "UnavailableError", "UsageError", "View", "create_pool",
    "destroy_pool", "open_pool",
]  # fmt: skip
