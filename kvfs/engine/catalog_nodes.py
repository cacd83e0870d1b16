"""Single nodes of the catalog: read, written, listed.

Layer: L2.

- The rules of the tree are in `catalog_tree`; what is here takes them as kept.
- `now_ns` is the wall clock of the caller. A changed directory gets it as mtime and ctime.
"""

import sqlite3
from collections.abc import Iterator
from dataclasses import replace as with_changes
from typing import Final

from kvfs.engine.catalog_database import CatalogDatabase
from kvfs.engine.catalog_schema import (
    INSERT_NODE,
    NODE_COLUMNS,
    ROOT_NODE_ID,
    Node,
    NodeKind,
    NodeState,
    NotDirectoryError,
    Origin,
    TargetIsDirectoryError,
    encode_name,
    name_bytes,
    node_from_row,
    node_to_row,
)
from kvfs.errors import ExistsError, NotFoundError

CHILDREN_LIMIT: Final = 1000
NAMES_BATCH: Final = 4096
_SELECT: Final = f"SELECT {NODE_COLUMNS} FROM nodes "


class CatalogNodes(CatalogDatabase):
    """Rows of the table of nodes."""

    def node(self, node_id: int) -> Node:
        """Return a node.

        Raises:
            NotFoundError: There is none; it may have been removed.
        """
        rows = self._read(_SELECT + "WHERE node_id = ?", (node_id,))
        if not rows:
            raise NotFoundError(f"no such node: {node_id}")
        return node_from_row(rows[0])

    def lookup(self, parent_id: int, name: str) -> Node | None:
        """Return the child of this name, or None."""
        raw = name_bytes(name)
        rows = self._read(_SELECT + "WHERE parent_id = ? AND name = ?", (parent_id, raw))
        return node_from_row(rows[0]) if rows else None

    def children(
        self, parent_id: int, after_name: str = "", limit: int = CHILDREN_LIMIT
    ) -> list[Node]:
        """Return children in the order of their names' bytes, from the first after `after_name`.

        Cost: O(limit), wherever the page starts.
        """
        raw = name_bytes(after_name)
        rows = self._read(
            _SELECT + "WHERE parent_id = ? AND name > ? ORDER BY name LIMIT ?",
            (parent_id, raw, limit),
        )
        return [node_from_row(row) for row in rows]

    def iter_names(self, batch: int = NAMES_BATCH) -> Iterator[list[tuple[int, bytes]]]:
        """Yield every name with its directory's node id, many in each list.

        Holds no lock in between: a name that is made, given or removed meanwhile may be missing.
        """
        last = 0
        while True:
            rows = self._read(
                "SELECT parent_id, name, node_id FROM nodes WHERE node_id > ? "
                "ORDER BY node_id LIMIT ?",
                (last, batch),
            )
            if not rows:
                return
            last = rows[-1][2]
            yield [(parent_id, name) for parent_id, name, _ in rows]

    def count_children(self, node_id: int) -> int:
        """Return how many names a directory holds."""
        rows = self._read("SELECT count(*) FROM nodes WHERE parent_id = ?", (node_id,))
        return int(rows[0][0])

    def set_attributes(
        self, node_id: int, *, mode: int | None = None, uid: int | None = None,
        gid: int | None = None, mtime_ns: int | None = None, now_ns: int,
    ) -> Node:  # fmt: skip
        """Change what is given; ctime becomes `now_ns`. Durability: flush.

        Args:
            node_id: A context or directory.
            mode: Permission bits; others are dropped.
            uid: Owner.
            gid: Group.
            mtime_ns: Wall clock.
            now_ns: Wall clock.
        """
        with self.transaction():
            node = self.node(node_id)
            changed = with_changes(
                node,
                mode=node.mode if mode is None else mode & 0o7777,
                uid=node.uid if uid is None else uid,
                gid=node.gid if gid is None else gid,
                mtime_ns=node.mtime_ns if mtime_ns is None else mtime_ns,
                ctime_ns=now_ns,
            )
            self._write(
                "UPDATE nodes SET mode = ?, uid = ?, gid = ?, mtime_ns = ?, ctime_ns = ? "
                "WHERE node_id = ?",
                (changed.mode, changed.uid, changed.gid, changed.mtime_ns, now_ns, node_id),
            )
            return changed

    def set_pinned(self, node_id: int, is_pinned: bool) -> None:
        """Forbid or allow dropping a context's blocks. Durability: flush."""
        with self.transaction():
            self._context(node_id)
            self._write(
                "UPDATE nodes SET is_pinned = ? WHERE node_id = ?", (int(is_pinned), node_id)
            )

    def reap_pending(self) -> int:
        """Remove the files whose bytes were never adopted; return how many. For open only."""
        with self.transaction():
            self._write(
                "DELETE FROM attributes WHERE node_id IN "
                "(SELECT node_id FROM nodes WHERE state = 2)"
            )
            return self._write_nodes("DELETE FROM nodes WHERE state = 2")

    def _directory(self, node_id: int) -> Node:
        """Return a directory, or raise."""
        node = self.node(node_id)
        require_directory(node)
        return node

    def _context(self, node_id: int) -> Node:
        """Return a context, or raise."""
        node = self.node(node_id)
        if node.is_directory:
            raise TargetIsDirectoryError(f"not a context: node {node_id} is a directory")
        return node

    def _insert(
        self, parent: Node, name: str, kind: NodeKind, origin: Origin, state: NodeState, *,
        namespace_id: int, mode: int, uid: int, gid: int, now_ns: int,
    ) -> Node:  # fmt: skip
        """Write a new, empty node. REQUIRES: a transaction."""
        raw = encode_name(name, parent.node_id)
        if self.on_name is not None:
            self.on_name(parent.node_id, raw)
        node = Node(
            node_id=self._new_node_id(), parent_id=parent.node_id, namespace_id=namespace_id,
            name=name, kind=kind, origin=origin, state=state, mode=mode & 0o7777, uid=uid, gid=gid,
            size_bytes=0, block_count=0, token_count=0, tail_bytes=0, tail_tokens=0, version=0,
            is_pinned=False, mtime_ns=now_ns, ctime_ns=now_ns,
        )  # fmt: skip
        try:
            self._write_nodes(INSERT_NODE, node_to_row(node))
        except sqlite3.IntegrityError as error:
            raise ExistsError(f"name is taken: {name!r} in node {parent.node_id}") from error
        self._touch_directory(parent.node_id, now_ns)
        return node

    def _delete(self, node: Node) -> None:
        """Delete one node with what hangs on it. REQUIRES: a transaction, an empty directory."""
        self._write_nodes("DELETE FROM nodes WHERE node_id = ?", (node.node_id,))
        self._write("DELETE FROM attributes WHERE node_id = ?", (node.node_id,))
        if not node.is_directory:
            self._write("DELETE FROM context_rows WHERE node_id = ?", (node.node_id,))
        elif node.parent_id == ROOT_NODE_ID:
            self._write("DELETE FROM namespaces WHERE namespace_id = ?", (node.namespace_id,))

    def _touch_directory(self, node_id: int, now_ns: int) -> None:
        self._write(
            "UPDATE nodes SET mtime_ns = ?, ctime_ns = ? WHERE node_id = ?",
            (now_ns, now_ns, node_id),
        )


def require_directory(node: Node) -> None:
    """Raise unless a node is a directory."""
    if not node.is_directory:
        raise NotDirectoryError(f"not a directory: {node.name!r} (node {node.node_id})")
