"""What the tier counts, under which names vLLM publishes it, and its warnings.

Layer: L5, without vLLM.

- Counters are taken by vLLM once per step and are zero after that.
- Something that keeps failing is logged once a minute per kind; the counters have the rest.
"""

import logging
import threading
from typing import Final

from kvfs.clock import Clock

_log = logging.getLogger("kvfs.vllm")
_QUIET_NS: Final = 60 * 10**9

COUNTERS: Final = {
    "lookups": "Chunks that were looked up in kvfs.",
    "hits": "Chunks that a lookup found in kvfs.",
    "stored_chunks": "Chunks written to kvfs.",
    "stored_bytes": "Bytes written to kvfs.",
    "present_chunks": "Chunks that vLLM stored and kvfs had already.",
    "decode_chunks": "Chunks written, or there already, that hold tokens which vLLM has decoded.",
    "loaded_chunks": "Chunks loaded from kvfs.",
    "loaded_bytes": "Bytes loaded from kvfs.",
    "missed_loads": "Chunks that a lookup had found and a load did not: evicted, damaged or late.",
    "refused_chunks": "Chunks not stored because the queue of stores was full.",
    "failed_chunks": "Chunks not stored because kvfs failed.",
    "failed_lookups": "Chunks reported as misses because kvfs failed.",
    "failures": "Calls of kvfs that failed, contexts and hints included.",
    "contexts": "Contexts written for requests and sessions.",
    "hints": "Hints of the orchestrator that were followed.",
    "ignored_hints": "Hints that were not understood.",
    "dropped_notes": "Contexts, accesses and hints dropped because too many waited.",
    "unavailable_lookups": "Chunks reported as misses because the pool is not open.",
}


class Counts:
    """Counters of one tier. Thread-safe."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._counts: dict[str, int] = {}
        self._said_ns: dict[str, int] = {}

    def add(self, name: str, count: int = 1) -> None:
        """Count; `name` is one of COUNTERS."""
        assert name in COUNTERS, name
        if count:
            with self._lock:
                self._counts[name] = self._counts.get(name, 0) + count

    def take(self) -> dict[str, int]:
        """Return what was counted since the last call."""
        with self._lock:
            taken, self._counts = self._counts, {}
        return taken

    def failed(self, what: str, error: BaseException) -> None:
        """Count a failed call and say so, once a minute for each `what`."""
        self.add("failures")
        now_ns = self._clock.monotonic_ns()
        with self._lock:
            said_ns = self._said_ns.get(what)
            if said_ns is not None and now_ns - said_ns < _QUIET_NS:
                return
            self._said_ns[what] = now_ns
        _log.warning("%s failed, vLLM goes on without it: %s: %s", what, type(error).__name__,
                     error)  # fmt: skip


def metric_name(counter: str) -> str:
    """Return the name under which vLLM publishes a counter."""
    return f"vllm:kvfs_{counter}"
