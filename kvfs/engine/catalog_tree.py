"""The tree of the catalog: directories, names and attributes.

Layer: L2.

- The root (node 1) holds the namespaces' directories, and files of the namespace 'default'.
- Below a namespace's directory every node belongs to that namespace; a name never leaves it.
- A method that raises has changed nothing: all checks come before the first write.
- `now_ns` is the wall clock of the caller. A changed directory gets it as mtime and ctime.
"""

from typing import Final

from kvfs.engine.catalog_attributes import CatalogAttributes
from kvfs.engine.catalog_nodes import require_directory
from kvfs.engine.catalog_schema import (
    DEFAULT_NAMESPACE,
    ROOT_NODE_ID,
    CrossNamespaceError,
    DirectoryNotEmptyError,
    NameTooLongError,
    Node,
    NodeKind,
    NodeState,
    NotDirectoryError,
    Origin,
    TargetIsDirectoryError,
    encode_name,
    name_bytes,
)
from kvfs.errors import CorruptionError, ExistsError, RefusedError, UsageError

PATH_BYTES_MAX: Final = 4096


class CatalogTree(CatalogAttributes):
    """Directories and names."""

    def resolve(self, start_node_id: int, path: str) -> Node | None:
        """Walk a relative path such as 'a/b/c'; an empty one is the start itself.

        Raises:
            NotFoundError: The start does not exist.
            NotDirectoryError: A component before the last is a context.
            NameTooLongError: The path is longer than 4096 bytes.
        """
        node: Node | None = self.node(start_node_id)
        for name in _components(path):
            assert node is not None
            require_directory(node)
            node = self.lookup(node.node_id, name)
            if node is None:
                return None
        return node

    def path_of(self, node_id: int) -> str:
        """Return the path below the root, without a leading '/'; the root's is empty.

        Raises:
            NotFoundError: There is no such node.
            CorruptionError: Its parents lead to no root.
        """
        names: list[str] = []
        with self._lock:
            while node_id != ROOT_NODE_ID:
                node = self.node(node_id)
                names.append(node.name)
                node_id = node.parent_id
                if len(names) > PATH_BYTES_MAX:
                    raise CorruptionError(
                        f"catalog tree has a cycle: node {node_id}; run 'kvfs-admin check'"
                    )
        return "/".join(reversed(names))

    def make_directory(
        self, parent_id: int, name: str, *, mode: int, uid: int, gid: int, now_ns: int,
        origin: Origin = Origin.FILE,
    ) -> Node:  # fmt: skip
        """Make a directory below a namespace's. Durability: flush.

        Raises:
            ExistsError: The name is taken.
            UsageError: At the root, where `create_namespace` makes directories; or a bad name.
        """
        with self.transaction():
            parent = self._directory(parent_id)
            if parent_id == ROOT_NODE_ID:
                raise UsageError(f"directories at the root are namespaces: {name!r}; create one")
            node = self._insert(
                parent, name, NodeKind.DIRECTORY, origin, NodeState.ACTIVE,
                namespace_id=parent.namespace_id, mode=mode, uid=uid, gid=gid, now_ns=now_ns,
            )  # fmt: skip
            self._inherit_raw(parent_id, node.node_id)
            return node

    def create_context(
        self, parent_id: int, name: str, namespace_id: int, origin: Origin, state: NodeState,
        mode: int, uid: int, gid: int, now_ns: int,
    ) -> Node:  # fmt: skip
        """Make an empty context. Durability: flush.

        Raises:
            ExistsError: The name is taken.
            NotFoundError: The parent does not exist.
            CrossNamespaceError: The parent belongs to another namespace.
            UsageError: The parent is a context, or the name is not valid.
        """
        with self.transaction():
            parent = self._directory(parent_id)
            expected = self._namespace_below(parent)
            if expected != namespace_id:
                raise CrossNamespaceError(
                    f"context would lie outside its namespace: {name!r}: expected {expected:#x}, "
                    f"found {namespace_id:#x}"
                )
            return self._insert(
                parent, name, NodeKind.CONTEXT, origin, state, namespace_id=namespace_id,
                mode=mode, uid=uid, gid=gid, now_ns=now_ns,
            )  # fmt: skip

    def make_parents(
        self, start_node_id: int, path: str, *, mode: int, uid: int, gid: int, now_ns: int,
        origin: Origin = Origin.API,
    ) -> tuple[int, str]:  # fmt: skip
        """Make the missing directories of 'a/b/c' but the last. Durability: flush.

        Returns:
            The node id of the last directory, and the last name.

        Raises:
            NotDirectoryError: A component before the last is a context.
            UsageError: The path is empty or has a name that is not valid.
        """
        names = _components(path)
        if not names:
            raise UsageError("a context needs a name: expected a path such as 'chat/42'")
        for name in names:
            encode_name(name, 0)
        with self.transaction():
            node = self._directory(start_node_id)
            for name in names[:-1]:
                child = self.lookup(node.node_id, name)
                if child is None:
                    child = self.make_directory(
                        node.node_id, name, mode=mode, uid=uid, gid=gid, now_ns=now_ns,
                        origin=origin,
                    )  # fmt: skip
                require_directory(child)
                node = child
            return node.node_id, names[-1]

    def rename(
        self, node_id: int, new_parent_id: int, new_name: str, now_ns: int, replace: bool = True
    ) -> int | None:
        """Give a node another place, as POSIX does. Durability: flush.

        Args:
            node_id: What to move.
            new_parent_id: A directory of the same namespace.
            new_name: The name there.
            now_ns: Wall clock.
            replace: Whether a context, or an empty directory, of that name gives way.

        Returns:
            The id of the context that gave way, if one did.

        Raises:
            ExistsError: The name is taken, without `replace` or by a directory that is not empty
                (DirectoryNotEmptyError).
            CrossNamespaceError: The place belongs to another namespace.
            NotDirectoryError, TargetIsDirectoryError: One is a directory, the other is not.
            UsageError: The root, or a directory into itself; or a bad name.
            RefusedError: A namespace would give way, or leave files at the root behind.
        """
        with self.transaction():
            node = self.node(node_id)
            parent = self._directory(new_parent_id)
            raw = encode_name(new_name, new_parent_id)
            self._check_move(node, parent, new_name)
            victim = self.lookup(new_parent_id, new_name)
            if victim is not None and victim.node_id == node_id:
                return None
            if victim is not None:
                self._check_victim(node, victim, replace)
                self._delete(victim)
            if self.on_name is not None:
                self.on_name(new_parent_id, raw)
            self._write(
                "UPDATE nodes SET parent_id = ?, name = ?, ctime_ns = ? WHERE node_id = ?",
                (new_parent_id, raw, now_ns, node_id),
            )
            self._touch_directory(new_parent_id, now_ns)
            if node.parent_id != new_parent_id:
                self._touch_directory(node.parent_id, now_ns)
            return None if victim is None or victim.is_directory else victim.node_id

    def check_rename(self, node_id: int, new_parent_id: int, new_name: str) -> None:
        """Raise what `rename` would, but for the name being taken; change nothing."""
        with self._lock:
            parent = self._directory(new_parent_id)
            encode_name(new_name, new_parent_id)
            self._check_move(self.node(node_id), parent, new_name)

    def remove(self, node_id: int, now_ns: int = 0) -> Node:
        """Remove a context or an empty directory; return what it was. Durability: flush.

        An empty namespace goes with its directory. With `now_ns` 0 the parent keeps its times.

        Raises:
            DirectoryNotEmptyError: It holds something; a namespace, also by files at the root.
            UsageError: The root.
        """
        with self.transaction():
            node = self.node(node_id)
            if node_id == ROOT_NODE_ID:
                raise UsageError("the root cannot be removed; destroy the pool")
            self._require_empty(node)
            self._delete(node)
            if now_ns:
                self._touch_directory(node.parent_id, now_ns)
            return node

    def _namespace_below(self, directory: Node) -> int:
        """Return the namespace of contexts made in a directory; 0 if it can hold none."""
        if directory.node_id != ROOT_NODE_ID:
            return directory.namespace_id
        default = self.lookup(ROOT_NODE_ID, DEFAULT_NAMESPACE)
        return default.namespace_id if default is not None and default.is_directory else 0

    def _require_empty(self, node: Node) -> None:
        if not node.is_directory:
            return
        if self._read("SELECT 1 FROM nodes WHERE parent_id = ? LIMIT 1", (node.node_id,)):
            raise DirectoryNotEmptyError(
                f"directory not empty: {node.name!r}; remove what it holds"
            )
        if node.parent_id == ROOT_NODE_ID and self._has_root_files(node.namespace_id):
            raise DirectoryNotEmptyError(
                f"namespace not empty: {node.name!r}: files at the root belong to it; remove them"
            )

    def _has_root_files(self, namespace_id: int) -> bool:
        return bool(
            self._read(
                "SELECT 1 FROM nodes WHERE parent_id = ? AND namespace_id = ? AND kind > 1 LIMIT 1",
                (ROOT_NODE_ID, namespace_id),
            )
        )

    def _check_move(self, node: Node, parent: Node, new_name: str) -> None:
        """Raise unless a node may go to a directory, whatever has the name there."""
        if node.node_id == ROOT_NODE_ID:
            raise UsageError("the root cannot be renamed")
        is_namespace = node.is_directory and node.parent_id == ROOT_NODE_ID
        if is_namespace or (node.is_directory and parent.node_id == ROOT_NODE_ID):
            if not (is_namespace and parent.node_id == ROOT_NODE_ID):
                raise CrossNamespaceError(
                    f"a namespace stays at the root, other directories below: {node.name!r}; copy"
                )
            if new_name != node.name and self._has_root_files(node.namespace_id):
                raise RefusedError(
                    f"namespace cannot be renamed: {node.name!r}: files at the root belong to it; "
                    "move them into it first"
                )
            return
        if self._namespace_below(parent) != node.namespace_id:
            raise CrossNamespaceError(
                f"a name stays in its namespace: {node.name!r} to {new_name!r}; copy it"
            )
        if node.is_directory and self._is_below(parent, node.node_id):
            raise UsageError(f"directory cannot go below itself: {node.name!r} to {new_name!r}")

    def _is_below(self, node: Node, ancestor_id: int) -> bool:
        """Say whether a node is another, or lies below it."""
        for _ in range(PATH_BYTES_MAX):
            if node.node_id == ancestor_id:
                return True
            if node.node_id == ROOT_NODE_ID:
                return False
            node = self.node(node.parent_id)
        raise CorruptionError(
            f"catalog tree has a cycle: node {node.node_id}; run 'kvfs-admin check'"
        )

    def _check_victim(self, node: Node, victim: Node, replace: bool) -> None:
        """Raise unless a node may take another's name."""
        if not replace:
            raise ExistsError(f"name is taken: {victim.name!r} in node {victim.parent_id}")
        if node.is_directory and not victim.is_directory:
            raise NotDirectoryError(f"a directory cannot replace a context: {victim.name!r}")
        if victim.is_directory and not node.is_directory:
            raise TargetIsDirectoryError(f"a context cannot replace a directory: {victim.name!r}")
        self._require_empty(victim)
        if victim.is_directory and victim.parent_id == ROOT_NODE_ID:
            raise RefusedError(f"a namespace cannot be replaced: {victim.name!r}; drop it first")


def _components(path: str) -> list[str]:
    """Split a relative path."""
    nbytes = len(name_bytes(path))
    if nbytes > PATH_BYTES_MAX:
        raise NameTooLongError(
            f"path too long: {path[:32]!r}...: expected at most {PATH_BYTES_MAX} bytes, "
            f"found {nbytes}"
        )
    return path.split("/") if path else []
