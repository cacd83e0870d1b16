"""vLLM's tier on kvfs: KV cache chunks go to a pool and come back, also after a restart.

Layer: L5.

In the configuration of vLLM's OffloadingConnector:

    "secondary_tiers": [{"type": "KvfsTier", "module_path": "kvfs.connectors.vllm",
                         "pool": "/var/lib/kvfs/kv0"}]

or `"type": "kvfs"`, where kvfs is installed as a plug-in. The options: vllm_options.Options.

- vLLM calls this in its scheduler. Nothing here waits for the pool: lookups answer a step later,
  copies and names are made by threads (vllm_work, vllm_jobs, vllm_contexts).
- Whatever fails is a miss, counted and logged; nothing is raised but for options that are wrong,
  and by `shutdown` if a copy to vLLM's memory is still under way.
- Of a request, vLLM tells keys and their positions: they make the chain that eviction goes by, and
  the context that the request leaves; see vllm_contexts. What was there when it was first scheduled
  is its prompt: accesses to that are noted as prefill, to what lies beyond as decode.

What a request may say, in `kv_transfer_params`: `"kvfs.session": "chat/42"` names its context,
`"kvfs.pin": true` pins it. An orchestrator may say by KV hints: actions of the types `kvfs.pin`,
`kvfs.unpin` and `kvfs.prefetch`, with `{"session": "chat/42"}` as payload.
"""

from collections.abc import Collection, Iterable, Sequence
from functools import partial
from typing import Any, ClassVar, Final

import numpy as np

from kvfs.clock import SystemClock
from kvfs.connectors.vllm_compat import (
    JobResult,
    Locality,
    LookupResult,
    Medium,
    OffloadingConnectorStats,
    OffloadingCounterMetadata,
    OffloadingEvent,
    RequestOffloadingContext,
    SecondaryTierManager,
    fingerprint_fields,
    positions_of,
)
from kvfs.connectors.vllm_contexts import Chains, Contexts, by_phase
from kvfs.connectors.vllm_jobs import Job, Transfers
from kvfs.connectors.vllm_metrics import COUNTERS, Counts, metric_name
from kvfs.connectors.vllm_options import Options
from kvfs.connectors.vllm_pool import PoolLink, block_keys, namespace_name, row_layout
from kvfs.connectors.vllm_work import Lookups, Task, Workers
from kvfs.errors import KvfsError, UsageError

SESSION: Final = "kvfs.session"
PIN: Final = "kvfs.pin"
UNPIN: Final = "kvfs.unpin"
PREFETCH: Final = "kvfs.prefetch"
_NOTES_MAX: Final = 256


class KvfsTier(SecondaryTierManager):  # type: ignore[misc]
    """A secondary tier whose chunks are blocks of a kvfs pool."""

    medium: ClassVar[Any] = Medium.STORAGE

    def __init__(
        self, offloading_spec: Any, primary_kv_view: memoryview, tier_type: str,
        backpressure_detector: Any = None, **options: Any,
    ) -> None:  # fmt: skip
        """Open the pool, if it can be, and the namespace of this engine's layout.

        Raises:
            UsageError: An option is wrong, or vLLM's rows cannot be blocks.
        """
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        self.options = Options.parse(options)
        locality = self.options.locality
        self.locality = None if locality is None else Locality(locality)
        rows = np.asarray(primary_kv_view)
        row_bytes = int(rows.strides[0])
        if not rows.flags.c_contiguous or not rows.flags.writeable:
            raise UsageError("kvfs tier: vLLM's rows are not contiguous, writable memory")
        fields = fingerprint_fields(offloading_spec, row_bytes)
        clock = SystemClock()
        self._counts = Counts(clock)
        self._link = PoolLink(
            self.options,
            namespace_name(self.options.namespace, fields),
            row_layout(fields, row_bytes, _chunk_tokens(offloading_spec)),
            rows,
            self._counts,
            clock,
        )
        self._transfers = Transfers(
            self._link, self._counts, clock, self.options, rows.ctypes.data, row_bytes
        )
        self._contexts = Contexts(
            self._link, self._counts, self.options.context_directory, self.options.contexts_max
        )
        self._lookups = Lookups(self._find)
        self._notes = Workers("notes", 1)
        self._chains: dict[str, Chains] = {}
        self._waiting: dict[str, Any] = {}  # requests that were not scheduled yet
        publishes = offloading_spec.kv_events_config.enable_kv_cache_events
        self._events: list[Any] | None = [] if self.options.enable_kv_events and publishes else None
        self._link.namespace()

    # --- requests

    def on_new_request(self, req_context: Any) -> Any:
        """Follow the hints that came with a request; chunks go to the tier as they are made."""
        for action in _actions_of(req_context):
            self._follow(action, _name_of(req_context))
        self._waiting[req_context.req_id] = req_context
        return RequestOffloadingContext()

    def on_request_finished(self, req_context: Any) -> None:
        """Leave a context, after the request's stores, and forget the request."""
        self._lookups.forget(req_context.req_id)
        self._waiting.pop(req_context.req_id, None)
        chains = self._chains_of(req_context)
        self._chains.pop(req_context.req_id, None)
        by_group = chains.by_group()
        if by_group:
            pin = (req_context.kv_transfer_params or {}).get(PIN) is True
            pin = pin or any(
                action.action_type == PIN and not _session_in(action)
                for action in _actions_of(req_context)
            )
            name = _name_of(req_context)
            self._transfers.after_stores(
                partial(self._contexts.record, name, by_group, chains.phase_of, pin=pin)
            )

    def touch(self, keys: Collection[bytes], req_context: Any) -> None:
        """Note an access, for eviction. Dropped while too many notes wait."""
        keys = tuple(keys)
        for phase, at in by_phase(keys, self._chains_of(req_context).phase_of).items():
            self._note(partial(self._contexts.touch, [keys[i] for i in at], phase))

    # --- lookups

    def lookup(self, key: bytes, req_context: Any) -> Any:
        """Answer RETRY first, then HIT or MISS until the request has finished."""
        found = self._lookups.ask(key, req_context.req_id)
        if found is None:
            return LookupResult.RETRY
        return LookupResult.HIT if found else LookupResult.MISS

    def on_schedule_end(self, context: Any) -> None:
        """Start looking for what was asked in this step; prompts of new requests are known now."""
        for request in context.new_req_ids:
            req_context = self._waiting.pop(request, None)
            if req_context is not None:
                self._chains_of(req_context).end_prompt()
        self._lookups.flush()

    # --- jobs

    def submit_store(self, job_metadata: Any) -> None:
        """Queue a store; a full queue refuses it at once."""
        chains = self._chains_of(job_metadata.req_context)
        rows = [int(row) for row in job_metadata.chunk_ids]
        chunks = sorted(
            zip(job_metadata.keys, rows, strict=True), key=lambda chunk: chains.end_of(chunk[0])
        )
        self._transfers.store(
            Job(
                job_metadata.job_id,
                is_load=False,
                keys=[key for key, _ in chunks],
                rows=[row for _, row in chunks],
                phases=[chains.phase_of(key) for key, _ in chunks],
                parents=[chains.parent(key) for key, _ in chunks],
            )
        )

    def submit_load(self, job_metadata: Any) -> None:
        """Queue a load."""
        chains, keys = self._chains_of(job_metadata.req_context), list(job_metadata.keys)
        self._transfers.load(
            Job(
                job_metadata.job_id,
                is_load=True,
                keys=keys,
                rows=[int(row) for row in job_metadata.chunk_ids],
                phases=[chains.phase_of(key) for key in keys],
            )
        )

    def get_finished_jobs(self) -> Iterable[Any]:
        """Return what became of jobs; chunks that could not be loaded are misses from now on."""
        return [self._result(job) for job in self._transfers.finished()]

    def drain_jobs(self) -> None:
        """Wait until no copy is under way."""
        self._transfers.drain()

    def take_events(self) -> Iterable[Any]:
        """Return the chunks stored since the last call, if KV events are wanted."""
        if not self._events:
            return ()
        events, self._events = self._events, []
        return events

    def shutdown(self) -> None:
        """Do what is queued, and close the pool.

        Raises:
            BusyError: A copy from or to vLLM's memory is still under way, on a stalled device: vLLM
                keeps that memory then.
        """
        self._contexts.stop()
        failure: KvfsError | None = None
        for end in (self._lookups.end, self._transfers.end, self._notes.end):
            try:
                end()
            except KvfsError as error:
                failure = failure or error
        if failure is not None:
            raise failure
        self._link.close()

    # --- figures

    @classmethod
    def build_metric_definitions(cls, extra_config: dict[str, Any]) -> dict[str, Any]:
        """Return vLLM's descriptions of the counters."""
        del extra_config
        return {
            metric_name(name): OffloadingCounterMetadata(documentation=text)
            for name, text in COUNTERS.items()
        }

    def get_stats(self) -> Any:
        """Return what was counted since the last call, or None."""
        counts = self._counts.take()
        if not counts:
            return None
        stats = OffloadingConnectorStats()
        for name, count in counts.items():
            stats.increase_counter(metric_name(name), count)
        return stats

    @classmethod
    def config_info_keys(cls, tier_config: dict[str, Any]) -> tuple[str, ...]:
        """Return the names of what `config_info` tells."""
        del tier_config
        return ("kvfs_pool", "kvfs_namespace")

    def config_info(self) -> dict[str, str]:
        """Return where the chunks are."""
        return {"kvfs_pool": self.options.pool, "kvfs_namespace": self._link.name}

    # --- internals

    def _find(self, keys: Sequence[bytes]) -> Sequence[bool]:
        """Say which keys are stored; in the lookup thread."""
        self._counts.add("lookups", len(keys))
        space = self._link.namespace()
        if space is None:
            self._counts.add("unavailable_lookups", len(keys))
            return [False] * len(keys)
        try:
            records = space.lookup(block_keys(space.info.namespace_id, keys))
        except Exception as error:  # noqa: BLE001 - a lookup that fails is a miss
            self._counts.add("failed_lookups", len(keys))
            self._counts.failed("looking up", error)
            return [False] * len(keys)
        found = [bool(length) for length in records["length"]]
        self._counts.add("hits", sum(found))
        return found

    def _result(self, job: Job) -> Any:
        is_good = all(job.is_done)
        done = [key for key, is_done in zip(job.keys, job.is_done, strict=True) if is_done]
        if job.is_load and not is_good:
            self._lookups.mark(sorted(set(job.keys).difference(done)), is_found=False)
        elif not job.is_load and is_good:
            self._lookups.mark(job.keys, is_found=True)
        if not job.is_load and is_good and self._events is not None:
            self._events.append(
                OffloadingEvent(keys=list(job.keys), medium=self.medium, removed=False,
                                locality=self.locality)
            )  # fmt: skip
        return JobResult(
            job_id=job.number,
            success=is_good,
            successful_keys=tuple(done) if job.is_load and done and not is_good else None,
            transfer_time=job.copy_ns / 1e9,
            transfer_bytes=len(done) * self.block_size_bytes,
        )

    def _follow(self, action: Any, own_name: str) -> None:
        """Do what an orchestrator's hint says, or count it."""
        name = _session_in(action)
        if action.action_type == PIN:
            if name:  # without a session: of the request itself, once it has finished
                self._note(partial(self._contexts.pin, name, pinned=True))
        elif action.action_type == UNPIN:
            self._note(partial(self._contexts.pin, name or own_name, pinned=False))
        elif action.action_type == PREFETCH:
            self._note(partial(self._contexts.prefetch, name or own_name))
        else:
            self._counts.add("ignored_hints")

    def _note(self, task: Task) -> None:
        """Do something that nobody waits for, unless too much of that is waiting."""
        if not self._notes.submit(task, limit=_NOTES_MAX):
            self._counts.add("dropped_notes")

    def _chains_of(self, req_context: Any) -> Chains:
        chains = self._chains.setdefault(req_context.req_id, Chains())
        chains.update(positions_of(req_context))
        return chains


def _actions_of(req_context: Any) -> Sequence[Any]:
    """Return the hints that came with a request."""
    return getattr(getattr(req_context, "kv_hints", None), "actions", None) or ()


def _name_of(req_context: Any) -> str:
    """Return what the context of a request is called."""
    session = (req_context.kv_transfer_params or {}).get(SESSION)
    return session if isinstance(session, str) and session else str(req_context.req_id)


def _session_in(action: Any) -> str:
    """Return the session that a hint names, or nothing."""
    payload = action.payload if isinstance(action.payload, dict) else {}
    session = payload.get("session")
    return session if isinstance(session, str) else ""


def _chunk_tokens(spec: Any) -> int:
    """Return the tokens of a chunk, or 0 if the groups differ."""
    sizes = {group.tokens_per_block for group in spec.config.groups}
    return int(sizes.pop()) * int(spec.blocks_per_chunk) if len(sizes) == 1 else 0
