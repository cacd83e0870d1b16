"""The tree that the mount shows: names, attributes and times of directories and files.

Layer: L4.

- What rename(2), unlink(2), mkdir(2) and their like mean for a pool, without FUSE: every method is
  synchronous, thread-safe, and raises the KvfsError whose errno the system call returns.
- A directory at the root is a namespace. A file at the root belongs to the namespace 'default', so
  that namespace keeps its place and its name.
- Nodes are returned as stat shows them: sizes are those of bytes written or resident.
"""

from typing import Final

from kvfs.engine.catalog_schema import (
    DEADLINE_ATTRIBUTE,
    DEFAULT_NAMESPACE,
    RAW_ATTRIBUTE,
    ROOT_NODE_ID,
    DirectoryNotEmptyError,
    NamespaceInfo,
    Node,
    NodeState,
    NotDirectoryError,
    Origin,
    TargetIsDirectoryError,
    checked_deadline_ms,
    checked_retention,
)
from kvfs.errors import BusyError, NotFoundError, RefusedError, UsageError
from kvfs.layout import OPAQUE
from kvfs.pool import Pool

_OWN: Final = b"user.kvfs."
_IS_RAW: Final = b"1"
PAGE_NODES = 128  # fills a readdir request of 32 KiB in one or two steps
TIME_NS_MAX = (1 << 63) - 1  # SQLite's integers: the year 2262


class Tree:
    """Directories and files of an open pool."""

    def __init__(self, pool: Pool) -> None:
        """Show a pool."""
        self._pool = pool
        self._catalog = pool.catalog
        self._files = pool.files

    # --- looking

    def node(self, node_id: int) -> Node:
        """Return a node.

        Raises:
            NotFoundError: It is gone.
        """
        return self._files.current(self._catalog.node(node_id))

    def lookup(self, parent_id: int, name: str) -> Node | None:
        """Return the child of this name."""
        node = self._catalog.lookup(parent_id, name)
        return None if node is None else self._files.current(node)

    def children(self, parent_id: int, after_name: str) -> list[Node]:
        """Return up to PAGE_NODES children by name, from the first after `after_name`."""
        return [
            self._files.current(node)
            for node in self._catalog.children(parent_id, after_name, PAGE_NODES)
        ]

    def namespace_of(self, node: Node) -> NamespaceInfo | None:
        """Return the namespace whose directory this node is."""
        if node.parent_id != ROOT_NODE_ID or not node.is_directory:
            return None
        return self._catalog.namespace(node.namespace_id)

    # --- changing names

    def make_directory(self, parent_id: int, name: str, mode: int, uid: int, gid: int) -> Node:
        """Make a directory, or at the root a namespace for plain bytes.

        Raises:
            ExistsError: The name is taken.
        """
        parent = self._catalog.node(parent_id)
        mode, gid = _inherited(parent, mode, gid, is_directory=True)
        if parent_id != ROOT_NODE_ID:
            return self._catalog.make_directory(
                parent_id, name, mode=mode, uid=uid, gid=gid, now_ns=self._now()
            )
        info = self._pool.make_namespace(name, OPAQUE, mode=mode, uid=uid, gid=gid)
        return self._catalog.node(info.root_node_id)

    def create_file(self, parent_id: int, name: str, mode: int, uid: int, gid: int) -> Node:
        """Make a file whose content is to come; a crash before that takes it away.

        Raises:
            ExistsError: The name is taken.
        """
        parent = self._catalog.node(parent_id)
        mode, gid = _inherited(parent, mode, gid, is_directory=False)
        namespace_id = parent.namespace_id
        if parent_id == ROOT_NODE_ID:
            info = self._catalog.namespace_by_name(DEFAULT_NAMESPACE)
            if info is None:
                raise NotFoundError(f"no such namespace: {DEFAULT_NAMESPACE!r}; make it again")
            namespace_id = info.namespace_id
        return self._catalog.create_context(
            parent_id, name, namespace_id, Origin.FILE, NodeState.PENDING,
            mode=mode, uid=uid, gid=gid, now_ns=self._now(),
        )  # fmt: skip

    def remove_file(self, parent_id: int, name: str) -> None:
        """Remove a context's name.

        Raises:
            NotFoundError: There is none.
            TargetIsDirectoryError: It is a directory's.
        """
        node = self._require(parent_id, name)
        if node.is_directory:
            raise TargetIsDirectoryError(f"is a directory: {name!r}; use rmdir")
        self._files.remove(node)

    def remove_directory(self, parent_id: int, name: str) -> None:
        """Remove an empty directory; at the root, a namespace with the blocks that have no name.

        Raises:
            NotFoundError: There is none.
            DirectoryNotEmptyError: It holds something.
            BusyError: The namespace 'default'.
        """
        node = self._require(parent_id, name)
        if not node.is_directory:
            raise NotDirectoryError(f"not a directory: {name!r}")
        if parent_id != ROOT_NODE_ID:
            self._catalog.remove(node.node_id, self._now())
            return
        _require_not_default(node)
        if self._catalog.count_children(node.node_id):
            raise DirectoryNotEmptyError(f"directory not empty: {name!r}; remove what it holds")
        self._pool.drop_namespace(name, only_empty=True)

    def rename(
        self, parent_id: int, name: str, new_parent_id: int, new_name: str, *, replace: bool
    ) -> Node:
        """Give a node another place; return what it was.

        What gives way is removed only when what comes is there to stay: a file that has not been
        published yet is published first.

        Raises:
            NotFoundError: There is no such name.
            CrossNamespaceError: Another namespace; nothing was changed, nor adopted.
            ExistsError: The new name is taken, without `replace`.
            DirectoryNotEmptyError: By a directory that is not empty.
        """
        node = self._require(parent_id, name)
        if node.is_directory and parent_id == ROOT_NODE_ID:
            if new_parent_id == ROOT_NODE_ID and new_name != name:
                _require_not_default(node)
                self._pool.rename_namespace(name, new_name)
                return node
        elif replace and not node.is_directory:
            self._catalog.check_rename(node.node_id, new_parent_id, new_name)
            victim = self._catalog.lookup(new_parent_id, new_name)
            if victim is not None and victim.state is NodeState.ACTIVE:
                self._files.settle(node)
            if victim is not None:
                self._files.hold_for_writers(victim)
        keys = None
        with self._catalog.transaction():
            victim = self._catalog.lookup(new_parent_id, new_name)
            if victim is not None and victim.origin is Origin.FILE and not victim.is_directory:
                keys = self._catalog.keys(victim.node_id)
            replaced = self._catalog.rename(
                node.node_id, new_parent_id, new_name, self._now(), replace
            )
        if replaced is not None and victim is not None:
            if victim.is_raw or (keys is not None and len(keys)):
                # A crash that takes the rename back must find the former bytes still there.
                self._catalog.sync()
            self._files.forget(victim, keys)
        return node

    # --- changing attributes

    def set_attributes(
        self, node_id: int, *, mode: int | None = None, uid: int | None = None,
        gid: int | None = None, mtime_ns: int | None = None,
    ) -> Node:  # fmt: skip
        """Change what is given; times beyond what the catalog can keep become the last it can."""
        if mtime_ns is not None:
            mtime_ns = max(-TIME_NS_MAX, min(mtime_ns, TIME_NS_MAX))
        node = self._catalog.set_attributes(
            node_id, mode=mode, uid=uid, gid=gid, mtime_ns=mtime_ns, now_ns=self._now()
        )
        if mtime_ns is not None and not node.is_directory:
            self._files.set_mtime(node, mtime_ns)
        return self._files.current(node)

    def set_retention(self, node: Node, retention: str) -> None:
        """Change what a full pool may do to the namespace whose directory this is.

        Raises:
            UsageError: Not "cache" or "durable".
        """
        self._pool.set_retention(node.name, checked_retention(retention))

    # --- extended attributes: those that are kept; the mount computes others of `user.kvfs.*`

    def attribute_names(self, node: Node) -> list[bytes]:
        """Return the names of the attributes that a node has."""
        names = self._catalog.attribute_names(node.node_id)
        return [*names, RAW_ATTRIBUTE] if node.is_raw and RAW_ATTRIBUTE not in names else names

    def attribute(self, node: Node, name: bytes) -> bytes:
        """Return the value of an attribute; b"1" of `user.kvfs.raw` if a file is raw.

        Raises:
            NoAttributeError: There is none of this name.
        """
        if node.is_raw and name == RAW_ATTRIBUTE:
            return _IS_RAW
        return self._catalog.attribute(node.node_id, name)

    def set_attribute(
        self, node: Node, name: bytes, value: bytes, *, must_exist: bool | None = None
    ) -> None:
        """Give a node an attribute, `user.*` but not `user.kvfs.*`; or b"1" to `user.kvfs.raw`.

        `user.kvfs.deadline_ms` of a namespace's directory: see `Pool.set_deadline`.

        That makes a file raw: now, or if it is being written, when it is closed. Of a directory it
        makes all files raw that are made in it from now on.

        Raises:
            UsageError: The name or value can be none.
            RefusedError: Another attribute of kvfs's own; a context of the API as a raw file.
            ExistsError, NoAttributeError: Against `must_exist`.
            NameTooLongError, AttributeTooLargeError, AttributesFullError: Beyond the limits.
            NoSpaceError: There is no room for the raw file.
        """
        if name == DEADLINE_ATTRIBUTE:
            if self.namespace_of(node) is None:
                raise RefusedError(
                    f"no namespace's directory: {node.name!r}; a deadline is for all"
                )
            self._pool.set_deadline(node.name, checked_deadline_ms(value))
            return
        is_raw = name == RAW_ATTRIBUTE
        if is_raw and value != _IS_RAW:
            raise UsageError(f"attribute {name!r}: expected {_IS_RAW!r}; or remove it")
        if name.startswith(_OWN) and not is_raw:
            raise RefusedError(f"attribute is kvfs's own: {name!r}; names of others: 'user.NAME'")
        if is_raw and not node.is_directory and node.origin is Origin.API:
            raise RefusedError(f"context was made through the API: {node.name!r}; it has blocks")
        self._catalog.set_attribute(
            node.node_id, name, value, now_ns=self._now(), must_exist=must_exist
        )
        if is_raw and not node.is_directory:
            self._files.make_raw(node)

    def remove_attribute(self, node: Node, name: bytes) -> None:
        """Take an attribute from a node.

        Raises:
            NoAttributeError: There is none of this name.
            RefusedError: `user.kvfs.raw` of a raw file: it stays one.
        """
        if name == DEADLINE_ATTRIBUTE and name in self.attribute_names(node):
            self._pool.set_deadline(node.name, None)
            return
        if node.is_raw and name == RAW_ATTRIBUTE:
            raise RefusedError(f"a raw file stays raw: {node.name!r}; copy it, and remove it")
        self._catalog.remove_attribute(node.node_id, name, now_ns=self._now())

    # --- internals

    def _require(self, parent_id: int, name: str) -> Node:
        node = self._catalog.lookup(parent_id, name)
        if node is None:
            raise NotFoundError(f"no such name: {name!r}")
        return node

    def _now(self) -> int:
        return self._pool.clock.wall_ns()


def _inherited(parent: Node, mode: int, gid: int, *, is_directory: bool) -> tuple[int, int]:
    """Return mode and group of a new child; a set-group-id directory hands on its group."""
    if not parent.mode & 0o2000:
        return mode & 0o7777, gid
    return (mode & 0o7777) | (0o2000 if is_directory else 0), parent.gid


def _require_not_default(node: Node) -> None:
    if node.name == DEFAULT_NAMESPACE:
        raise BusyError(
            f"namespace {DEFAULT_NAMESPACE!r} keeps its place: files at the root belong to it"
        )
