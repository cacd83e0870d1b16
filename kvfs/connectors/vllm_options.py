"""What the JSON of the tier may say.

Layer: L5, without vLLM.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

from kvfs.engine.catalog_schema import Retention
from kvfs.errors import UsageError

_DURABILITIES: Final = ("none", "async", "sync")
_RETENTIONS: Final = ("cache", "durable")
_LOCALITIES: Final = (None, "LOCAL", "REMOTE")
_POSITIVE: Final = ("load_threads", "load_deadline_s", "store_queue_chunks", "retry_s")


@dataclass(frozen=True, slots=True)
class Options:
    """Options of the tier; all but `pool` have defaults.

    Attributes:
        pool: Directory of the pool.
        namespace: What names of namespaces begin with; model and fingerprint follow.
        durability: Of blocks: "none", "async" or "sync"; see Namespace.put.
        retention: Of namespaces made: "cache" or "durable"; see Pool.namespace.
        context_directory: Where the contexts of requests and sessions are, below the namespace.
        contexts_max: How many of them are kept; the oldest are dropped. 0: none are made.
        load_threads: Threads that copy to vLLM.
        load_deadline_s: A load that waited that long for a thread is given up: a miss.
        store_queue_chunks: Chunks that may wait to be stored; what comes beyond is refused.
        retry_s: How long to wait before a pool that could not be opened is tried again.
        enable_kv_events: Tell vLLM of the chunks stored, if it publishes KV events.
        locality: "LOCAL" or "REMOTE", for vLLM's tier filters.
    """

    pool: str
    namespace: str = "vllm"
    durability: str = "async"
    retention: Retention = "cache"
    context_directory: str = "requests"
    contexts_max: int = 256
    load_threads: int = 4
    load_deadline_s: float = 5.0
    store_queue_chunks: int = 256
    retry_s: float = 5.0
    enable_kv_events: bool = False
    locality: str | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            _require_type(field.name, field.type, getattr(self, field.name))
        for name in _POSITIVE:
            if getattr(self, name) <= 0:
                raise UsageError(f"kvfs tier: {name} must be positive: {getattr(self, name)}")
        if self.contexts_max < 0:
            raise UsageError(f"kvfs tier: contexts_max must not be negative: {self.contexts_max}")
        if not self.pool:
            raise UsageError("kvfs tier: pool is empty; give the directory of a pool")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", self.namespace):
            raise UsageError(
                "kvfs tier: namespace must be up to 64 letters, digits, '.', '_' or "
                f"'-', and begin with a letter or digit; found {self.namespace!r:.80}"
            )
        if not self.context_directory.strip("/"):
            raise UsageError("kvfs tier: context_directory is empty; name a directory")
        _require_one("durability", self.durability, _DURABILITIES)
        _require_one("retention", self.retention, _RETENTIONS)
        _require_one("locality", self.locality, _LOCALITIES)

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> "Options":
        """Take the tier's JSON, without what vLLM keeps for itself.

        Raises:
            UsageError: An option is unknown, missing, or of the wrong type or value; the message
                lists the known ones.
        """
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(given) - set(known)):
            raise UsageError(f"kvfs tier: unknown option {unknown[0]!r}; known: {', '.join(known)}")
        if "pool" not in given:
            raise UsageError("kvfs tier: 'pool' is missing: the directory of a pool; make one with "
                             "'kvfs-admin --pool PATH pool create DEVICE...'")  # fmt: skip
        return cls(**given)


def _require_type(name: str, expected: Any, value: Any) -> None:
    if expected in (int, float):
        is_good = isinstance(value, (int, float) if expected is float else int)
        is_good = is_good and not isinstance(value, bool)
    elif expected is bool:
        is_good = isinstance(value, bool)
    else:
        is_good = isinstance(value, str) or (name == "locality" and value is None)
    if not is_good:
        wanted = expected.__name__ if isinstance(expected, type) else "str"
        raise UsageError(f"kvfs tier: {name} must be {wanted}, found {value!r:.80}")


def _require_one(name: str, value: object, known: tuple[object, ...]) -> None:
    if value not in known:
        names = ", ".join(repr(one) for one in known if one is not None)
        raise UsageError(f"kvfs tier: {name} must be one of {names}; found {value!r:.80}")
