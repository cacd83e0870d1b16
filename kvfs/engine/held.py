"""Which keys eviction must not drop: pinned ones, and those that names reach in durable namespaces.

Layer: L3.

- Pins are looked up as they are. What names reach is read from the catalog once per round,
  outside the engine's lock, and again only if more was named since (`EngineState.naming_epoch`).
"""

import numpy as np
import numpy.typing as npt

from kvfs.engine.state import EngineState
from kvfs.keys import KEY_BYTES, KeyArray

Items = npt.NDArray[np.void]


def as_items(keys: KeyArray) -> Items:
    """Return keys (n, 32) as n items that compare as a whole."""
    return np.ascontiguousarray(keys).view("V32").ravel()


class HeldKeys:
    """The keys held during one round of eviction."""

    def __init__(self, state: EngineState) -> None:
        self._state = state
        self._named: dict[int, tuple[int, Items]] = {}

    def prepare(self, namespace_ids: set[int]) -> None:
        """Read what names reach in these namespaces."""
        for namespace_id in namespace_ids:
            namespace = self._state.namespaces.get(namespace_id)
            if namespace is not None and namespace.is_durable:
                self._read(namespace_id)

    def mask(self, namespace_id: int, keys: KeyArray) -> npt.NDArray[np.bool_]:
        """Return which keys must not be dropped. REQUIRES: the engine's lock."""
        state = self._state
        held = np.zeros(len(keys), np.bool_)
        if not len(keys):
            return held
        if state.pinned_bytes.get(namespace_id):
            held |= np.fromiter((key.tobytes() in state.pins for key in keys), np.bool_, len(keys))
        namespace = state.namespaces.get(namespace_id)
        if namespace is not None and namespace.is_durable:
            known = self._named.get(namespace_id)
            if known is None or known[0] != state.naming_epoch:
                known = self._read(namespace_id)
            held |= np.isin(as_items(keys), known[1])
        return held

    def _read(self, namespace_id: int) -> tuple[int, Items]:
        epoch = self._state.naming_epoch
        parts = [np.zeros((0, KEY_BYTES), np.uint8)]
        parts.extend(self._state.names.reachable_keys(namespace_id))
        known = (epoch, np.sort(as_items(np.concatenate(parts))))
        self._named[namespace_id] = known
        return known
