"""Growing files of the store: staging, adoption, raw files.

Layer: L3.

- A file takes the room it needs from the cache, and no more: what can never fit evicts nothing.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from kvfs.buffers import Addresses
from kvfs.devices.base import Staging
from kvfs.engine.device_state import DeviceState, NamespaceSpec
from kvfs.engine.evictor import Evictor
from kvfs.engine.format import ENTRY, EntryFlag
from kvfs.engine.state import EngineState
from kvfs.engine.writer import Writer
from kvfs.errors import DeviceError, NoSpaceError
from kvfs.keys import KeyArray

_ROOM_ATTEMPTS = 16


class StoreFiles:
    """What a store does with files that are not blocks yet, or never."""

    def __init__(self, state: EngineState, evictor: Evictor, writer: Writer) -> None:
        self.state = state
        self._evictor = evictor
        self._writer = writer

    def create_staging(self, name: str, namespace_id: int) -> tuple[int, Staging]:
        """Make a staging file on the tier that will hold it; return (device index, staging)."""
        self._namespace(namespace_id)
        device = self.file_device()
        return device.info.index, device.device.create_staging(name)

    def file_device(self) -> DeviceState:
        """Return the device that files are written to.

        Raises:
            NoSpaceError: None is in service.
        """
        tiers = self.state.tiers(persistent=True) or self.state.tiers(persistent=False)
        if not tiers:
            raise NoSpaceError("no device in service takes files; see 'pool status'")
        return tiers[0]

    def write_staging(
        self, device_index: int, staging: Staging, offset: int, data: bytes | memoryview
    ) -> None:
        """Write to a staging file; evicts when the device is full. Durability: flush."""
        device = self.state.device(device_index)
        end = max(staging.nbytes, offset + memoryview(data).nbytes)
        self._with_room(
            device, staging, end, lambda: device.device.write_staging(staging, offset, data)
        )

    def resize_staging(self, device_index: int, staging: Staging, nbytes: int) -> None:
        """Cut or extend a staging file with zeros; evicts when the device is full."""
        device = self.state.device(device_index)
        self._with_room(
            device, staging, nbytes, lambda: device.device.resize_staging(staging, nbytes)
        )

    def reserve_staging(self, device_index: int, staging: Staging, nbytes: int) -> None:
        """Take the capacity of a size for a foreign writer; evicts when the device is full.

        Raises:
            NoSpaceError: Nothing more can be evicted; nothing was taken.
        """
        device = self.state.device(device_index)
        self._with_room(
            device, staging, nbytes, lambda: device.device.reserve_staging(staging, nbytes)
        )

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
        with self.state.activity.during(namespace_id):
            self._writer.adopt(
                self.state.device(device_index), namespace, staging, entries, is_vouched
            )

    # --- internals

    def _with_room(
        self, device: DeviceState, staging: Staging, end: int, operation: Callable[[], None]
    ) -> None:
        """Give a staging file a new size, evicting until it fits or nothing can go."""
        growth = max(0, end - staging.nbytes)
        with self.state.activity.during():
            # What can never fit fails at once: nothing need go for that.
            attempts = _ROOM_ATTEMPTS if end <= device.info.capacity_bytes else 0
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
