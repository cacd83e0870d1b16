"""Memory in which the owner hands a client what it cannot map.

Layer: L5.

- A tray belongs to one connection: the owner writes it, its client reads it, one request at a time.
  What is in it, its client was allowed to read; nobody else sees it.
- When the connection ends its memory is taken from under whoever keeps the descriptor. A client
  that still copies from it meets a fault, which is a miss.
"""

import fcntl
import os
from typing import Final

import numpy as np

from kvfs import _native
from kvfs.backend import Mask
from kvfs.buffers import Addresses
from kvfs.clients.messages import TRAY_BYTES
from kvfs.devices.descriptors import read_only
from kvfs.engine.reader import Lease
from kvfs.engine.store import Store
from kvfs.keys import KeyArray
from kvfs.phase import Phase

_F_SEAL_FUTURE_WRITE: Final = 0x0010
_SEALS: Final = fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL | _F_SEAL_FUTURE_WRITE


class Tray:
    """One connection's tray, made at its first use."""

    def __init__(self) -> None:
        self._fd = _native.memfd("kvfs-tray", TRAY_BYTES, is_final=False)
        try:
            self._arena = _native.Arena(self._fd, TRAY_BYTES)
            fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, _SEALS)  # it will be cut off
        except BaseException:
            os.close(self._fd)
            raise

    def descriptor(self) -> int:
        """Return a descriptor that can only read; the caller closes it."""
        return read_only(self._fd)

    def fill(
        self, store: Store, namespace_id: int, keys: KeyArray, offsets: Addresses,
        lengths: Addresses, places: Addresses, phase: Phase,
    ) -> Mask:  # fmt: skip
        """Copy parts of blocks to their `places`, see `messages.tray_places`; return which were."""
        addresses = places + np.uint64(self._arena.address)
        good = np.zeros(len(keys), np.bool_)
        have = store.state.index(namespace_id).lookup(keys)["length"]
        is_whole = (offsets == 0) & (lengths == have) & (have > 0)
        whole, parts = np.flatnonzero(is_whole), np.flatnonzero(~is_whole)
        if len(whole):  # verified in the same pass
            keys_of = np.ascontiguousarray(keys[whole])
            good[whole] = store.read_into(
                namespace_id, keys_of, addresses[whole], lengths[whole], phase
            )
        if len(parts):
            lease = store.lease(namespace_id, np.ascontiguousarray(keys[parts]), phase=phase)
            try:
                good[parts] = _read_parts(
                    store, lease, offsets[parts], lengths[parts], addresses[parts]
                )
            finally:
                store.release(lease)
        return good

    def close(self) -> None:
        """Give the memory back. To be called once."""
        self._arena.close()
        os.ftruncate(self._fd, 0)
        os.close(self._fd)


def _read_parts(
    store: Store, lease: Lease, offsets: Addresses, lengths: Addresses, addresses: Addresses
) -> Mask:
    """Copy parts of verified blocks, as far as they lie inside; return which were copied."""
    have = lease.records["length"].astype(np.uint64)
    good: Mask = (lengths <= have) & (offsets <= have - np.minimum(lengths, have)) & (have > 0)
    inside = np.flatnonzero(good)
    good[inside] = store.read_ranges(
        lease, inside, offsets[inside], lengths[inside], addresses[inside]
    )
    return good
