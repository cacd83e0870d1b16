"""Contexts pinned by name: their blocks are kept from eviction, across restarts.

Layer: L4.

- The catalog remembers which contexts are pinned, this which keys that means now: what was pinned
  is what is unpinned, also if the context has grown since.
"""

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from kvfs.engine.catalog import Catalog
from kvfs.engine.catalog_schema import Node
from kvfs.engine.store import Store

if TYPE_CHECKING:
    from kvfs.keys import KeyArray


class Pins:
    """The pinned contexts of a pool. Thread-safe."""

    def __init__(self, store: Store, catalog: Catalog, stride_of: Callable[[int], int]) -> None:
        """Bind to a pool; `stride_of` gives a namespace's stride in bytes."""
        self._store = store
        self._catalog = catalog
        self._stride_of = stride_of
        self._lock = threading.Lock()
        self._held: dict[int, tuple[int, KeyArray, int]] = {}

    def load(self) -> None:
        """Pin what the catalog says, whatever the limit: it was accepted before."""
        for node in self._catalog.pinned_contexts():
            keys = self._catalog.keys(node.node_id)
            nbytes = len(keys) * self._stride_of(node.namespace_id)
            with self._store.state.lock:
                self._store.state.pin(node.namespace_id, keys, nbytes)
            self._held[node.node_id] = (node.namespace_id, keys, nbytes)

    def pin(self, node: Node) -> None:
        """Pin a context's blocks; a pinned one is left alone.

        Raises:
            NotFoundError: The context is gone.
            BusyError: The namespace would pin more than its share.
        """
        with self._lock:
            if node.node_id not in self._held:
                self._hold(node)
                try:
                    self._catalog.set_pinned(node.node_id, True)
                except BaseException:  # its name may have gone meanwhile
                    self._let_go(node.node_id)
                    raise

    def unpin(self, node: Node) -> None:
        """Undo `pin`; a context that is not pinned is left alone."""
        with self._lock:
            self._let_go(node.node_id)
            self._catalog.set_pinned(node.node_id, False)

    def follow(self, node: Node) -> None:
        """Pin what a pinned context holds after it has changed.

        Raises:
            BusyError: It has outgrown its namespace's share; what was pinned before stays pinned.
        """
        with self._lock:
            former = self._held.get(node.node_id)
            if former is not None:
                self._hold(node)
                self._store.unpin(*former)

    def release(self, node_id: int) -> None:
        """Forget a context whose name is gone."""
        with self._lock:
            self._let_go(node_id)

    def release_namespace(self, namespace_id: int) -> None:
        """Forget the contexts of a namespace that is gone."""
        with self._lock:
            for node_id, held in list(self._held.items()):
                if held[0] == namespace_id:
                    self._let_go(node_id)

    def _hold(self, node: Node) -> None:
        keys = self._catalog.keys(node.node_id)
        nbytes = self._store.pin(node.namespace_id, keys)
        self._held[node.node_id] = (node.namespace_id, keys, nbytes)

    def _let_go(self, node_id: int) -> None:
        held = self._held.pop(node_id, None)
        if held is not None:
            self._store.unpin(*held)
