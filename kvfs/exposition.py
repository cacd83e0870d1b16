"""A pool's metrics as Prometheus reads them, made at the moment they are asked for.

Layer: L4.

- Every name is one of kvfs.metric_list; nothing is counted here. What is read is a snapshot; the
  engine's lock is held for the tables of segments alone.
- A mount that shows the pool says how it is through `Pool.mount_snapshot`.
"""

from collections.abc import Iterable, Iterator
from typing import Any, Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from kvfs.metric_list import BY_NAME, CORE_NAMES, DEFINITIONS, VIEW_NAMES, Definition
from kvfs.metrics import PHASES, Histogram, Rows, Tally
from kvfs.pool import Pool

_FIRST_BUCKET: Final = 10  # 2**10 ns: a microsecond
_LAST_BUCKET: Final = 34  # 2**34 ns: 17 seconds
_BOUNDS: Final = tuple(
    (bits, repr((1 << bits) / 1e9)) for bits in range(_FIRST_BUCKET, _LAST_BUCKET + 1)
)


class PoolCollector:
    """What prometheus_client asks for metrics. Any thread."""

    def __init__(self, pool: Pool) -> None:
        """Show a pool, which stays open while anybody asks."""
        self._pool = pool

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics, also those without a sample."""
        families = _Families()
        _add_pool(families, self._pool)
        _add_namespaces(families, self._pool)
        snapshot = self._pool.mount_snapshot
        if snapshot is not None:
            _add_mount(families, snapshot())
        yield from families.metrics()

    def describe(self) -> Iterable[Metric]:
        """Yield nothing: names need no check against other collectors."""
        return ()


def registry_of(pool: Pool) -> CollectorRegistry:
    """Return a registry with the pool's metrics and no others."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(PoolCollector(pool))
    return registry


def render(pool: Pool) -> bytes:
    """Return the metrics in Prometheus' text format."""
    return bytes(generate_latest(registry_of(pool)))


class _Families:
    """The metrics of one answer, each declared once."""

    def __init__(self) -> None:
        self._made = {each.name: _family(each) for each in DEFINITIONS}

    def add(self, name: str, value: float, *labels: object) -> None:
        """Add a sample, with its labels in the order of the definition."""
        assert len(labels) == len(BY_NAME[name].labels), name
        self._made[name].add_metric([printable(str(label)) for label in labels], value)

    def add_histogram(self, name: str, histogram: Histogram, *labels: object) -> None:
        """Add a histogram, unless it is empty."""
        counts = list(histogram.counts)
        if not any(counts):
            return
        total, buckets = 0, []
        done = 0
        for bits, bound in _BOUNDS:
            total += sum(counts[done : bits + 1])
            done = bits + 1
            buckets.append((bound, total))
        buckets.append(("+Inf", sum(counts)))
        self._made[name].add_metric(
            [printable(str(label)) for label in labels], buckets, histogram.sum_ns / 1e9
        )

    def metrics(self) -> Iterable[Metric]:
        """Return them in the order of the list."""
        return self._made.values()


def _family(definition: Definition) -> Any:
    kinds = {
        "counter": CounterMetricFamily,
        "gauge": GaugeMetricFamily,
        "histogram": HistogramMetricFamily,
    }
    return kinds[definition.kind](definition.name, definition.help, labels=definition.labels)


def printable(text: str) -> str:
    """Return text that can be encoded; bytes of a name that were no UTF-8 appear as escapes."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _add_pool(families: _Families, pool: Pool) -> None:
    import kvfs  # its version; the package imports this layer

    figures = pool.statistics()
    families.add("kvfs_info", 1, figures.name, figures.uuid, kvfs.__version__)
    families.add("kvfs_healthy", figures.state == "online")
    families.add("kvfs_namespaces", figures.namespaces)
    families.add("kvfs_contexts", figures.contexts)
    counters = pool.store.state.counters
    families.add("kvfs_write_errors_total", counters.write_errors)
    families.add("kvfs_segments_poisoned_total", counters.segments_poisoned)
    clients, segments, revocations, failures = pool.client_figures()
    families.add("kvfs_clients", clients)
    families.add("kvfs_client_segments", segments)
    families.add("kvfs_client_revocations_total", revocations)
    families.add("kvfs_client_failures_total", failures)
    for device in figures.devices:
        for name, value in (
            ("kvfs_device_online", device.state != "offline"),
            ("kvfs_device_capacity_bytes", device.capacity_bytes),
            ("kvfs_device_used_bytes", device.used_bytes),
            ("kvfs_device_bad_bytes", device.bad_bytes),
            ("kvfs_device_live_bytes", device.live_bytes),
            ("kvfs_device_blocks", device.block_count),
            ("kvfs_device_segments", device.segment_count),
            ("kvfs_device_written_bytes_total", device.bytes_written),
            ("kvfs_device_failures_total", device.failures),
        ):
            families.add(name, value, device.name, device.tier)


def _add_namespaces(families: _Families, pool: Pool) -> None:
    state = pool.store.state
    stored: dict[tuple[int, int], int] = {}
    with state.lock:
        names = {space.namespace_id: space.name for space in state.namespaces.values()}
        pinned = dict(state.pinned_bytes)
        for device in state.devices:
            for segment in device.segments.values():
                place = segment.namespace_id, device.info.index
                stored[place] = stored.get(place, 0) + segment.live_bytes
    places = [(device.info.index, device.info.name, device.info.tier) for device in state.devices]
    for namespace_id, name in names.items():
        tally = state.counters[namespace_id]
        _add_numbers(families, name, tally)
        families.add("kvfs_pinned_bytes", pinned.get(namespace_id, 0), name)
        for index, device_name, tier in places:
            place_labels = name, device_name, tier
            families.add("kvfs_stored_bytes", stored.get((namespace_id, index), 0), *place_labels)
            _add_place(families, place_labels, tally, index)
        for operation, histogram in tally.times.items():
            families.add_histogram("kvfs_operation_seconds", histogram, name, operation)


def _add_numbers(families: _Families, name: str, tally: Tally) -> None:
    for metric, value in (
        ("kvfs_prefix_blocks_asked_total", int(tally.prefix[0])),
        ("kvfs_prefix_blocks_matched_total", int(tally.prefix[1])),
        ("kvfs_put_blocks_total", tally.blocks_put),
        ("kvfs_put_bytes_total", tally.bytes_put),
        ("kvfs_deduplicated_blocks_total", tally.blocks_deduplicated),
        ("kvfs_deduplicated_bytes_total", tally.bytes_deduplicated),
        ("kvfs_evicted_blocks_total", tally.blocks_evicted),
        ("kvfs_evicted_files_total", tally.files_evicted),
        ("kvfs_relocated_blocks_total", tally.blocks_relocated),
        ("kvfs_relocated_bytes_total", tally.bytes_relocated),
        ("kvfs_verified_blocks_total", tally.blocks_verified),
        ("kvfs_lost_blocks_total", tally.blocks_lost),
        ("kvfs_broken_pins_total", tally.pins_broken),
    ):
        families.add(metric, value, name)
    for phase, count in zip(PHASES, tally.accesses, strict=True):
        families.add("kvfs_accesses_total", count, name, phase)
    for metric, reason, value in (
        ("kvfs_misses_total", "absent", tally.misses_absent + tally.lookups_missed),
        ("kvfs_misses_total", "unreadable", tally.misses_unreadable),
        ("kvfs_misses_total", "room", tally.misses_room),
        ("kvfs_puts_refused_total", "no_space", tally.refused_no_space),
        ("kvfs_puts_refused_total", "no_device", tally.refused_no_device),
    ):
        families.add(metric, value, name, reason)


def _add_place(
    families: _Families, labels: tuple[str, str, int], tally: Tally, device: int
) -> None:
    rows: tuple[tuple[str, Rows], ...] = (
        ("lookup", tally.looked_up), ("read_into", tally.read), ("lease", tally.leased),
    )  # fmt: skip
    for operation, row in rows:
        families.add("kvfs_hits_total", int(row[device, 0]), *labels, operation)
        if operation != "lookup":
            families.add("kvfs_read_bytes_total", int(row[device, 1]), *labels, operation)
    families.add("kvfs_read_bytes_total", tally.file_bytes[device], *labels, "file")
    families.add("kvfs_written_bytes_total", tally.written[device], *labels)
    families.add("kvfs_evicted_segments_total", tally.evicted[device], *labels)
    families.add("kvfs_bad_blocks_total", tally.bad_checksums[device], *labels, "checksum")
    families.add("kvfs_bad_blocks_total", tally.bad_reads[device], *labels, "media")


def _add_mount(families: _Families, mount: dict[str, Any]) -> None:
    for request, histogram in mount["times"].items():
        families.add_histogram("kvfs_mount_request_seconds", histogram, request)
    for name, count in mount["errors"].items():
        families.add("kvfs_mount_errors_total", count, name)
    for name, count in mount["timeouts_by_namespace"].items():
        families.add("kvfs_mount_deadline_hits_total", count, name)
    families.add("kvfs_mount_read_bytes_total", mount["bytes_read"])
    families.add("kvfs_mount_written_bytes_total", mount["bytes_written"])
    families.add("kvfs_mount_open_handles", mount["open_handles"])
    families.add("kvfs_mount_stalled_devices", len(mount["stalled_devices"]))
    for name, value in mount["views"].items():
        families.add(VIEW_NAMES[name], value)
    for name, value in mount["core"].items():
        if name in CORE_NAMES:
            families.add(CORE_NAMES[name], value)
