"""Growing files of the store: staging, adoption, raw files.

Layer: L3.

- A file takes the room it needs from the cache, and no more: what can never fit evicts nothing, and
  the segment that relocation needs is left.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from kvfs.buffers import Addresses
from kvfs.devices.base import Staging
from kvfs.engine.device_state import DeviceState, NamespaceSpec
from kvfs.engine.evictor import Evictor
from kvfs.engine.format import ENTRY, EntryFlag, sidecar_bytes
from kvfs.engine.state import EngineState
from kvfs.engine.writer import Writer
from kvfs.errors import DeviceError, NoSpaceError, UnavailableError
from kvfs.keys import KeyArray
from kvfs.units import PAGE, align_up, format_bytes

_ROOM_ATTEMPTS = 16


class StoreFiles:
    """What a store does with files that are not blocks yet, or never."""

    def __init__(self, state: EngineState, evictor: Evictor, writer: Writer) -> None:
        self.state = state
        self._evictor = evictor
        self._writer = writer

    def file_devices(self, nbytes: int) -> list[int]:
        """Return the devices in service that could hold a file of this size, best first.

        Those that have room for it, and for a segment, the fastest tier first; then the full ones,
        by how long ago they were used, since there something is evicted for it.

        Volatile ones only in a pool that has no others. None in a pool whose devices take no files:
        there all that fits into staging memory goes into the log.

        Raises:
            UnavailableError: None is in service.
        """
        tiers = self.state.lasting_tiers()
        if not tiers:
            raise UnavailableError("no device in service takes files; see 'pool status'")
        able = [t for t in tiers if t.info.takes_files and nbytes <= _file_bytes_max(t)]
        roomy = [t for t in able if _has_room(t, max(nbytes, t.info.segment_bytes))]
        full = [t for t in able if t not in roomy]
        with self.state.lock:
            full.sort(key=DeviceState.usual_use_ns)
        return [device.info.index for device in (*roomy, *full)]

    def create_staging(self, device_index: int, name: str, namespace_id: int) -> Staging:
        """Make a staging file on one of `file_devices`."""
        self._namespace(namespace_id)
        return self.state.device(device_index).device.create_staging(name)

    def write_staging(
        self, device_index: int, staging: Staging, offset: int, data: bytes | memoryview
    ) -> None:
        """Write to a staging file; evicts when the device is full. Durability: flush."""
        device = self.state.device(device_index)
        end = max(staging.nbytes, offset + memoryview(data).nbytes)

        def write() -> None:
            _take_room(device, staging, end)
            device.device.write_staging(staging, offset, data)

        self._with_room(device, staging, end, write)

    def resize_staging(self, device_index: int, staging: Staging, nbytes: int) -> None:
        """Cut or extend a staging file with zeros; evicts when the device is full."""
        device = self.state.device(device_index)

        def resize() -> None:
            _take_room(device, staging, nbytes)
            device.device.resize_staging(staging, nbytes)

        self._with_room(device, staging, nbytes, resize)

    def reserve_staging(self, device_index: int, staging: Staging, nbytes: int) -> None:
        """Take the capacity of a size for a foreign writer; evicts when the device is full.

        Raises:
            NoSpaceError: Nothing more can be evicted; nothing was taken.
        """
        device = self.state.device(device_index)
        self._with_room(device, staging, nbytes, lambda: _reserve(device, staging, nbytes))

    def keep_raw(self, device_index: int, staging: Staging, number: int) -> None:
        """Turn a staging file into a raw file. Durability: persist, with its name.

        Raises:
            DeviceError: The device failed; the staging file is what it was, or is raw.
        """
        device = self.state.device(device_index)
        with self.state.activity.during():
            try:
                device.device.keep_raw(staging, number)
                device.device.persist_names()
            except OSError as error:
                raise DeviceError(
                    f"raw file could not be made: {device.info.name}: {error}"
                ) from error

    def staging_device(self, device_index: int) -> DeviceState:
        """Return the device of a staging file."""
        return self.state.device(device_index)

    def adopt(
        self,
        device_index: int,
        staging: Staging,
        namespace_id: int,
        keys: KeyArray,
        lengths: Addresses,
        digests: npt.NDArray[np.uint8],
        is_vouched: npt.NDArray[np.bool_] | None = None,
    ) -> None:
        """Turn a persisted staging file into a file segment of consecutive blocks.

        Evicts when there is no room for what is stored beside it. After a NoSpaceError the staging
        file is as it was; after another error it is perhaps gone.

        Durability: persist.

        Args:
            device_index: Where the staging file is.
            staging: The file; it is gone as staging on return.
            namespace_id: Where the blocks go.
            keys: (n, 32) uint8.
            lengths: Bytes of each block; all but the last equal to the namespace's stride.
            digests: (n, 16) uint8, XXH3-128 of each block.
            is_vouched: (n,) whether a digest was made from what lies there now; the other blocks
                are verified when they are first read. None: all were.
        """
        namespace = self._namespace(namespace_id)
        entries = np.zeros(len(keys), ENTRY)
        entries["key"], entries["payload_xxh3"] = keys, digests
        entries["offset"] = np.cumsum(lengths) - lengths
        entries["stored_bytes"] = entries["logical_bytes"] = lengths
        entries["flags"] = np.where(lengths < namespace.block_bytes, EntryFlag.PARTIAL, 0)
        device = self.state.device(device_index)

        def adopt() -> None:
            with device.open_lock:
                _require_room(device, sidecar_bytes(len(entries)))
            self._writer.adopt(device, namespace, staging, entries, is_vouched)

        with self.state.activity.during(namespace_id):
            self._with_room(device, staging, staging.nbytes, adopt)

    # --- internals

    def _with_room(
        self, device: DeviceState, staging: Staging, end: int, operation: Callable[[], None]
    ) -> None:
        """Do what lets a staging file grow to `end`, evicting until it fits or nothing can go."""
        growth = max(0, end - staging.nbytes)
        with self.state.activity.during():
            # What can never fit fails at once: nothing need go for that.
            attempts = _ROOM_ATTEMPTS if end <= _file_bytes_max(device) else 0
            for _ in range(attempts):
                try:
                    return operation()
                except NoSpaceError:
                    # Others may take what a round frees, so one round need not be enough.
                    if not self._evictor.make_room(device, max(growth, device.info.segment_bytes)):
                        raise
            return operation()

    def _namespace(self, namespace_id: int) -> NamespaceSpec:
        self.state.activity.require()
        self.state.index(namespace_id)
        return self.state.namespaces[namespace_id]


def _file_bytes_max(device: DeviceState) -> int:
    """Return how much of a device files may fill: not the segment kept back for relocation."""
    kept_bytes = device.info.segment_bytes if device.has_reserve else 0
    return device.info.capacity_bytes - kept_bytes


def _has_room(device: DeviceState, nbytes: int) -> bool:
    """Say whether a file may take as much."""
    return device.device.used_bytes + nbytes <= _file_bytes_max(device)


def _require_room(device: DeviceState, nbytes: int) -> None:
    """Raise NoSpaceError unless a file may take as much. REQUIRES: `open_lock`."""
    if not _has_room(device, nbytes):
        raise NoSpaceError(
            f"device is full: {device.info.name}: {format_bytes(device.device.used_bytes)} of "
            f"{format_bytes(device.info.capacity_bytes)} used, {format_bytes(nbytes)} more needed "
            "and a segment kept back; remove something, or add a device"
        )


def _reserve(device: DeviceState, staging: Staging, end: int) -> None:
    """Take the capacity of a size that a staging file is to have, if it has not got it."""
    taken = max(staging.nbytes, staging.reserved_bytes)
    if end > taken:
        with device.open_lock:  # nobody opens a segment meanwhile
            _require_room(device, align_up(end, PAGE) - align_up(taken, PAGE))
            device.device.reserve_staging(staging, end)


def _take_room(device: DeviceState, staging: Staging, end: int) -> None:
    """Take the capacity of a size that a staging file is about to get, or fail to get.

    The file is not extended ahead of that: somebody else may be extending it, too.
    """
    before = staging.reserved_bytes
    _reserve(device, staging, end)
    staging.reserved_bytes = before
