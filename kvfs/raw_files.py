"""Raw files: contents that are written in place, and are no blocks.

Layer: L4.

- A raw file lies as one file on the device that files are written to, outside the log; the device's
  number for it is its node's id, so the catalog need not say where it is.
- Eviction never takes one: making it, and growing it, needs room that is free or can be made from
  the cache.
- After a crash it holds what the filesystem below kept: what was synced, and of the rest anything.
  It is there if its name is: the name comes after the bytes, and when it goes, goes before them.

Concurrency: `_lock` guards the table, for book-keeping only; a file's bytes and size belong to its
writer. Opening and dropping happen outside the lock.
"""

import contextlib
import threading
from collections.abc import Collection
from dataclasses import dataclass

from kvfs.engine.store import Store
from kvfs.errors import ClosedError, DeviceError, NotFoundError
from kvfs.staging import Staged


@dataclass(slots=True, eq=False)
class _Raw:
    """One raw file. `nbytes`: its size when it was last closed; `staged`: while it is open."""

    device_index: int
    nbytes: int
    staged: Staged | None = None
    users: int = 0
    is_removed: bool = False


class RawFiles:
    """The raw files of a pool by node id."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._files: dict[int, _Raw] = {}

    def load(self, node_ids: Collection[int]) -> tuple[list[int], int]:
        """Find the raw files of these nodes; delete those of no node.

        Returns:
            The nodes that have none, and how many were deleted.
        """
        wanted, freed = set(node_ids), 0
        for state in self._store.state.devices:
            device = state.device
            for number, nbytes in device.raw_files():
                if number in wanted:
                    self._files[number] = _Raw(state.info.index, nbytes)
                else:
                    device.drop_staging(device.open_raw(number))
                    freed += 1
        return sorted(wanted - self._files.keys()), freed

    def __contains__(self, node_id: object) -> bool:
        return node_id in self._files

    def size_of(self, node_id: int) -> int | None:
        """Return the size of a raw file, None if the node has none."""
        raw = self._files.get(node_id)
        if raw is None:
            return None
        staged = raw.staged
        return raw.nbytes if staged is None else staged.size_bytes

    def open(self, node_id: int) -> Staged:
        """Open a raw file; all who do share one handle. Give back with `close`.

        Raises:
            NotFoundError: The node has none any more.
            DeviceError: It cannot be opened.
        """
        with self._lock:
            raw = self._files.get(node_id)
            if raw is None:
                raise NotFoundError(f"raw file is gone: node {node_id}; make it again")
            if raw.staged is None:
                device = self._store.staging_device(raw.device_index)
                try:
                    file = device.device.open_raw(node_id)
                except OSError as error:
                    raise DeviceError(
                        f"raw file cannot be opened: {device.info.name}: {error}"
                    ) from error
                raw.staged = Staged(
                    0, file, raw.device_index, is_shared=True, is_raw=True, is_growing=True
                )
            raw.users += 1
            return raw.staged

    def close(self, node_id: int, staged: Staged) -> None:
        """Give back what `open` or `keep` gave; the last close of a removed file deletes it."""
        with self._lock:
            raw = self._files.get(node_id)
            if raw is None or raw.staged is not staged:
                return  # its namespace was dropped
            raw.users -= 1
            if raw.users:
                return
            device = self._store.staging_device(raw.device_index).device
            with contextlib.suppress(ClosedError):  # the pool was closed first
                device.settle_staging(staged.file)
            staged.stop_growing()
            raw.nbytes, raw.staged = staged.file.nbytes, None
            is_removed = raw.is_removed
            if is_removed:
                del self._files[node_id]
            if not is_removed:
                device.release_raw(staged.file)
        if is_removed:
            device.drop_staging(staged.file)

    def keep(self, node_id: int, staged: Staged) -> None:
        """Turn a staged file into the raw file of a node, open once. Durability: persist.

        The node must be told to the catalog next; without that the next owner deletes the file.

        Raises:
            DeviceError: The device failed.
        """
        assert not staged.in_memory
        self._store.keep_raw(staged.device_index, staged.file, node_id)
        staged.is_raw = True
        staged.start_growing()
        raw = _Raw(staged.device_index, staged.file.nbytes, staged, users=1)
        with self._lock:
            self._files[node_id] = raw

    def remove(self, node_id: int) -> None:
        """Delete a raw file whose name is gone, once nobody has it open."""
        with self._lock:
            raw = self._files.get(node_id)
            if raw is None:
                return
            if raw.users:
                raw.is_removed = True
                return
            del self._files[node_id]
        device = self._store.staging_device(raw.device_index).device
        try:
            device.drop_staging(device.open_raw(node_id))
        except OSError:
            return  # the next owner finds it without a name
