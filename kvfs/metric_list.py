"""What kvfs measures, by the names that Prometheus sees: the one list of metrics.

Layer: L0.

- `kvfs.exposition` fills them in, for `/.kvfs/metrics` and for `--metrics`; docs/OPERATIONS.md,
  dashboards and alerts are tested against this list.
- Names follow Prometheus: `kvfs_` first, the unit last (`_bytes`, `_seconds`), `_total` for
  counters. Counters start from zero when the pool is opened.
- `tier` is the device's, fastest 0; `namespace` is the directory's name on the mount.
"""

from dataclasses import dataclass
from typing import Final, Literal

Kind = Literal["counter", "gauge", "histogram"]


@dataclass(frozen=True, slots=True)
class Definition:
    """One metric: its name as samples have it, what it is, and its labels."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()


_SPACE: Final = ("namespace",)
_PLACE: Final = ("namespace", "device", "tier")
_DEVICE: Final = ("device", "tier")

DEFINITIONS: Final = (
    # --- the pool
    Definition("kvfs_info", "gauge", "Always 1; which pool and release.",
               ("pool", "uuid", "version")),
    Definition("kvfs_healthy", "gauge",
               "1 while every device is online and nothing was found wrong."),
    Definition("kvfs_namespaces", "gauge", "Namespaces."),
    Definition("kvfs_contexts", "gauge", "Contexts, files included."),
    Definition("kvfs_write_errors_total", "counter", "Writes and persists that failed."),
    Definition("kvfs_segments_poisoned_total", "counter",
               "Segments that take no more writes after a failed one."),
    Definition("kvfs_clients", "gauge", "Other processes that use the pool."),
    Definition("kvfs_client_segments", "gauge", "Segments that they hold for reading."),
    Definition("kvfs_client_revocations_total", "counter",
               "Times that what a client held was taken from it, because room was needed."),
    Definition("kvfs_client_failures_total", "counter",
               "Requests of clients that failed for a reason nobody expected; see the log."),
    # --- devices
    Definition("kvfs_device_online", "gauge", "1 while the device takes writes.", _DEVICE),
    Definition("kvfs_device_capacity_bytes", "gauge", "Bytes that kvfs may use.", _DEVICE),
    Definition("kvfs_device_used_bytes", "gauge", "Bytes taken, dead blocks included.", _DEVICE),
    Definition("kvfs_device_bad_bytes", "gauge",
               "Bytes of the medium known to be bad, and used no more.", _DEVICE),
    Definition("kvfs_device_live_bytes", "gauge", "Bytes of blocks that can be read.", _DEVICE),
    Definition("kvfs_device_blocks", "gauge", "Blocks that can be read.", _DEVICE),
    Definition("kvfs_device_segments", "gauge", "Segments in use.", _DEVICE),
    Definition("kvfs_device_written_bytes_total", "counter",
               "Bytes written to the medium, metadata included.", _DEVICE),
    Definition("kvfs_device_failures_total", "counter",
               "Writes, persists and frees that failed; after some the device leaves service.",
               _DEVICE),
    # --- what was asked for
    Definition("kvfs_prefix_blocks_asked_total", "counter",
               "Blocks asked for by match_prefix.", _SPACE),
    Definition("kvfs_prefix_blocks_matched_total", "counter",
               "Leading blocks of those that were there.", _SPACE),
    Definition("kvfs_hits_total", "counter",
               "Blocks found: lookup; read_into, copied; lease, held for a view.",
               (*_PLACE, "operation")),
    Definition("kvfs_accesses_total", "counter",
               "Blocks read, held or touched, by clients too: prefill, instead of computing a "
               "prompt; decode, of tokens that the engine made; background, nobody waits; unknown, "
               "nobody said.", ("namespace", "phase")),
    Definition("kvfs_misses_total", "counter",
               "Blocks not found: absent; unreadable, no copy was good; room, the caller's memory "
               "is too small.", ("namespace", "reason")),
    Definition("kvfs_read_bytes_total", "counter",
               "Bytes handed out: copied by read_into, held by lease for a view, copied for reads "
               "of files. Reads that the kernel or kvfs-core answer are not in it.",
               (*_PLACE, "operation")),
    # --- what was stored
    Definition("kvfs_put_blocks_total", "counter", "Blocks stored by put or as files.", _SPACE),
    Definition("kvfs_put_bytes_total", "counter", "Their bytes.", _SPACE),
    Definition("kvfs_deduplicated_blocks_total", "counter",
               "Blocks put that were there already.", _SPACE),
    Definition("kvfs_deduplicated_bytes_total", "counter", "Their bytes.", _SPACE),
    Definition("kvfs_puts_refused_total", "counter",
               "Puts that failed: no_space, nothing can be evicted; no_device, none takes writes.",
               ("namespace", "reason")),
    Definition("kvfs_written_bytes_total", "counter",
               "Bytes appended to segments, with padding, extra copies and relocated blocks.",
               _PLACE),
    Definition("kvfs_stored_bytes", "gauge", "Bytes of blocks that can be read.", _PLACE),
    Definition("kvfs_pinned_bytes", "gauge", "Bytes that eviction must keep.", _SPACE),
    # --- what went
    Definition("kvfs_evicted_blocks_total", "counter",
               "Blocks that left the pool to make room.", _SPACE),
    Definition("kvfs_evicted_files_total", "counter",
               "Files that lost their name by that.", _SPACE),
    Definition("kvfs_evicted_segments_total", "counter", "Segments given back.", _PLACE),
    Definition("kvfs_relocated_blocks_total", "counter",
               "Blocks copied out of evicted segments.", _SPACE),
    Definition("kvfs_relocated_bytes_total", "counter", "Their bytes.", _SPACE),
    Definition("kvfs_verified_blocks_total", "counter",
               "Blocks whose checksum was verified for the first time.", _SPACE),
    Definition("kvfs_bad_blocks_total", "counter",
               "Copies dropped because they could not be read back: checksum, other bytes than "
               "were written; media, the read failed (EIO).", (*_PLACE, "reason")),
    Definition("kvfs_lost_blocks_total", "counter",
               "Blocks that a failed persist has lost.", _SPACE),
    Definition("kvfs_broken_pins_total", "counter",
               "Pinned blocks that were lost all the same: no copy was left.", _SPACE),
    Definition("kvfs_operation_seconds", "histogram",
               "Time of one call: put, lookup, match_prefix, read_into, lease, open (of a file).",
               ("namespace", "operation")),
    # --- the mount, where there is one
    Definition("kvfs_mount_request_seconds", "histogram",
               "Time of one request that Python answered.", ("request",)),
    Definition("kvfs_mount_errors_total", "counter", "Requests that failed.", ("errno",)),
    Definition("kvfs_mount_deadline_hits_total", "counter",
               "Requests that failed with EIO because they took too long; without a name: of no "
               "namespace, or of one that is not known any more.", _SPACE),
    Definition("kvfs_mount_read_bytes_total", "counter", "Bytes that Python read for files."),
    Definition("kvfs_mount_written_bytes_total", "counter", "Bytes that were written to files."),
    Definition("kvfs_mount_open_handles", "gauge", "Files that are open."),
    Definition("kvfs_core_native_reads_total", "counter", "Reads that kvfs-core answered."),
    Definition("kvfs_core_native_read_bytes_total", "counter", "Their bytes."),
    Definition("kvfs_core_native_writes_total", "counter", "Writes that kvfs-core answered."),
    Definition("kvfs_core_native_written_bytes_total", "counter", "Their bytes."),
    Definition("kvfs_core_lookups_answered_total", "counter", "Names that kvfs-core denied."),
    Definition("kvfs_core_forwarded_total", "counter", "Requests handed to Python."),
    Definition("kvfs_core_deadline_hits_total", "counter",
               "Requests that kvfs-core failed because Python took too long."),
    Definition("kvfs_core_interrupts_total", "counter", "Requests that were interrupted."),
    Definition("kvfs_core_verify_failures_total", "counter", "Blocks with a wrong checksum."),
    Definition("kvfs_core_faults_total", "counter", "Reads that met a memory fault."),
    Definition("kvfs_core_respawns_total", "counter", "Owners that were replaced after their end."),
    Definition("kvfs_core_pending", "gauge", "Requests that wait for Python."),
    Definition("kvfs_core_open_files", "gauge", "Files that kvfs-core knows as open."),
    Definition("kvfs_core_threads", "gauge", "Threads of kvfs-core."),
    Definition("kvfs_core_page_cache_bytes", "gauge",
               "What kvfs-core put into the kernel's page cache and did not have dropped."),
    Definition("kvfs_mount_views_built_total", "counter", "Files made of shared extents."),
    Definition("kvfs_mount_views_failed_total", "counter", "Views that could not be made."),
    Definition("kvfs_mount_views", "gauge", "Views that exist."),
    Definition("kvfs_mount_views_cached", "gauge", "Views that nobody has open."),
    Definition("kvfs_mount_view_bytes", "gauge", "What they show."),
    Definition("kvfs_mount_stalled_devices", "gauge", "Devices that missed a deadline of late."),
)  # fmt: skip
BY_NAME: Final = {definition.name: definition for definition in DEFINITIONS}
VIEW_NAMES: Final = {
    "views_built": "kvfs_mount_views_built_total",
    "views_failed": "kvfs_mount_views_failed_total",
    "views": "kvfs_mount_views",
    "views_cached": "kvfs_mount_views_cached",
    "view_bytes": "kvfs_mount_view_bytes",
}
CORE_NAMES: Final = {
    "requests_native_read": "kvfs_core_native_reads_total",
    "bytes_native_read": "kvfs_core_native_read_bytes_total",
    "requests_native_write": "kvfs_core_native_writes_total",
    "bytes_native_write": "kvfs_core_native_written_bytes_total",
    "lookups_answered": "kvfs_core_lookups_answered_total",
    "forwarded": "kvfs_core_forwarded_total",
    "deadline_hits": "kvfs_core_deadline_hits_total",
    "interrupts": "kvfs_core_interrupts_total",
    "verify_failures": "kvfs_core_verify_failures_total",
    "faults": "kvfs_core_faults_total",
    "respawns": "kvfs_core_respawns_total",
    "pending": "kvfs_core_pending",
    "open_files": "kvfs_core_open_files",
    "threads": "kvfs_core_threads",
    "page_cache_bytes": "kvfs_core_page_cache_bytes",
}
"""What kvfs-core counts, by its own names."""


def series(definition: Definition) -> tuple[str, ...]:
    """Return the names under which its samples appear."""
    if definition.kind != "histogram":
        return (definition.name,)
    return tuple(f"{definition.name}_{part}" for part in ("bucket", "sum", "count"))
