"""Which keys eviction must not drop: pinned ones, and those that names reach in durable namespaces.

Layer: L3.

- Pins are looked up as they are. What names reach is read from the catalog once per round, never
  under the engine's lock: whoever holds the catalog may wait for that lock.
- What is named after that was pinned until then (`Store.being_named`). So a round is told what was
  unpinned since it began, and keeps that too.
- On a volatile device only keys without a copy on a persistent one are held: the others stay.
"""

import numpy as np
import numpy.typing as npt

from kvfs import _native
from kvfs.devices.base import DeviceInfo
from kvfs.engine.state import EngineState
from kvfs.keys import KEY_BYTES, KeyArray

Mask = npt.NDArray[np.bool_]


def among(keys: KeyArray, others: KeyArray) -> Mask:
    """Return which keys are among the others."""
    positions = np.empty(len(keys), np.int64)
    _native.find_keys(np.ascontiguousarray(keys), np.ascontiguousarray(others), positions)
    return positions >= 0


class HeldKeys:
    """The keys held during one round of eviction; `close` ends it. One at a time."""

    def __init__(self, state: EngineState) -> None:
        self._state = state
        self._named: dict[int, KeyArray] = {}
        self._unpinned: list[KeyArray] = []
        with state.lock:
            state.unpinned = self._unpinned

    def close(self) -> None:
        """Take note of no more."""
        with self._state.lock:
            self._state.unpinned = None

    def prepare(self, namespace_ids: set[int]) -> None:
        """Read what names reach in these namespaces. Without the engine's lock."""
        for namespace_id in namespace_ids - self._named.keys():
            namespace = self._state.namespaces.get(namespace_id)
            if namespace is not None and namespace.is_durable:
                parts = [np.zeros((0, KEY_BYTES), np.uint8)]
                parts.extend(self._state.names.reachable_keys(namespace_id))
                self._named[namespace_id] = np.concatenate(parts)

    def mask(self, namespace_id: int, keys: KeyArray, device: DeviceInfo | None = None) -> Mask:
        """Return which keys must not be dropped: on this device, or on all. REQUIRES: the lock."""
        state = self._state
        held = np.zeros(len(keys), np.bool_)
        if not len(keys):
            return held
        if state.pinned_bytes.get(namespace_id):
            held |= np.fromiter((key.tobytes() in state.pins for key in keys), np.bool_, len(keys))
        namespace = state.namespaces.get(namespace_id)
        if namespace is not None and namespace.is_durable:
            named = self._named.get(namespace_id)
            if named is None:
                held[:] = True  # it had nothing here when the round began: it is no victim
            else:
                held |= among(keys, np.concatenate([named, *self._unpinned]))
        if device is not None and not device.is_persistent and held.any():
            held &= ~self._has_persistent_copy(namespace_id, keys)
        return held

    def _has_persistent_copy(self, namespace_id: int, keys: KeyArray) -> Mask:
        found = np.zeros(len(keys), np.bool_)
        index, keys = self._state.index(namespace_id), np.ascontiguousarray(keys)
        for device in self._state.devices:
            if device.info.is_persistent:
                found |= index.lookup(keys, device.info.index)["length"] > 0
        return found
