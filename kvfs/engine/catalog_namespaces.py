"""What the catalog knows of a pool as a whole: facts, devices, namespaces.

Layer: L2.

- A namespace and its directory below the root are made, and go, together.
- The fingerprint of a layout is stored beside it; `check` compares them.
"""

import sqlite3
import uuid
from typing import Final

import msgspec

from kvfs.engine.catalog_contexts import CatalogContexts
from kvfs.engine.catalog_schema import (
    ROOT_NODE_ID,
    DeviceRow,
    NamespaceInfo,
    NodeKind,
    NodeState,
    Origin,
    Retention,
    Row,
    checked_retention,
)
from kvfs.errors import CorruptionError, ExistsError, NotFoundError, UsageError
from kvfs.layout import Layout

_NEXT_DEVICE: Final = "next_device_index"
_NAMESPACES: Final = (
    "SELECT s.namespace_id, n.name, s.layout, s.fingerprint, s.is_durable, s.root_node_id, "
    "s.created_ns FROM namespaces s JOIN nodes n ON n.node_id = s.root_node_id "
)


class CatalogNamespaces(CatalogContexts):
    """Facts, devices, namespaces."""

    def meta(self, key: str) -> str | None:
        """Return a fact about the pool, such as 'pool_uuid'."""
        rows = self._read("SELECT value FROM meta WHERE key = ?", (key,))
        return str(rows[0][0]) if rows else None

    @property
    def pool_uuid(self) -> uuid.UUID:
        """Identity of the pool.

        Raises:
            CorruptionError: What is recorded is no uuid.
        """
        text = self.meta("pool_uuid") or ""
        try:
            return uuid.UUID(text)
        except ValueError:
            raise CorruptionError(
                f"catalog is damaged: no pool's uuid: {text!r}; run 'kvfs-admin check'"
            ) from None

    def set_meta(self, key: str, value: str) -> None:
        """Record a fact about the pool. Durability: flush."""
        if key == "epoch":
            raise UsageError("meta 'epoch' is the catalog's own; choose another key")
        with self.transaction():
            self._write("INSERT OR REPLACE INTO meta (key, value) VALUES (?, ?)", (key, value))

    def devices(self) -> list[DeviceRow]:
        """Return all devices by index."""
        rows = self._read(
            "SELECT device_index, uuid, name, url, tier, state FROM devices ORDER BY device_index"
        )
        return [DeviceRow(*row) for row in rows]

    def add_device(self, device: DeviceRow) -> None:
        """Remember a device. Durability: flush.

        Raises:
            ExistsError: Index, uuid or name is taken.
        """
        with self.transaction():
            try:
                self._write(
                    "INSERT INTO devices (device_index, uuid, name, url, tier, state) "
                    "VALUES (?, ?, ?, ?, ?, ?)",
                    (device.index, device.uuid, device.name, device.url, device.tier, device.state),
                )
            except sqlite3.IntegrityError as error:
                raise ExistsError(
                    f"device is taken: {device.name!r} index {device.index}: {error}"
                ) from error

    def set_device_state(self, index: int, state: str) -> None:
        """Change a device's state. Durability: flush.

        Raises:
            NotFoundError: There is no such device.
        """
        with self.transaction():
            if not self._write(
                "UPDATE devices SET state = ? WHERE device_index = ?", (state, index)
            ):
                raise NotFoundError(f"no such device: {index}")

    def next_device_index(self) -> int:
        """Return a number that no device of the pool ever had."""
        known = [row.index for row in self.devices()]
        return max([int(self.meta(_NEXT_DEVICE) or 0), *(index + 1 for index in known)])

    def remove_device(self, index: int) -> None:
        """Forget a device; its number is not given again. Durability: flush.

        Raises:
            NotFoundError: There is no such device.
        """
        with self.transaction():
            self._write(
                "INSERT OR REPLACE INTO meta (key, value) VALUES (?, ?)",
                (_NEXT_DEVICE, str(self.next_device_index())),
            )
            if not self._write("DELETE FROM devices WHERE device_index = ?", (index,)):
                raise NotFoundError(f"no such device: {index}")

    def create_namespace(
        self, namespace_id: int, name: str, layout: Layout, retention: Retention, now_ns: int,
        mode: int, uid: int, gid: int,
    ) -> NamespaceInfo:  # fmt: skip
        """Make a namespace and its directory below the root. Durability: flush.

        Raises:
            ExistsError: Name or id is taken.
            UsageError: The name is not valid, or the retention unknown.
        """
        is_durable = checked_retention(retention) == "durable"
        with self.transaction():
            if self._read("SELECT 1 FROM namespaces WHERE namespace_id = ?", (namespace_id,)):
                raise ExistsError(f"namespace id is taken: {namespace_id:#x}")
            node = self._insert(
                self.node(ROOT_NODE_ID), name, NodeKind.DIRECTORY, Origin.API, NodeState.ACTIVE,
                namespace_id=namespace_id, mode=mode, uid=uid, gid=gid, now_ns=now_ns,
            )  # fmt: skip
            self._write(
                "INSERT INTO namespaces (namespace_id, root_node_id, layout, fingerprint, "
                "is_durable, created_ns) VALUES (?, ?, ?, ?, ?, ?)",
                (
                    namespace_id, node.node_id, layout.to_json(), layout.fingerprint(),
                    int(is_durable), now_ns,
                ),
            )  # fmt: skip
            return self.namespace(namespace_id)

    def namespace(self, namespace_id: int) -> NamespaceInfo:
        """Return a namespace.

        Raises:
            NotFoundError: There is none.
        """
        rows = self._read(_NAMESPACES + "WHERE s.namespace_id = ?", (namespace_id,))
        if not rows:
            raise NotFoundError(f"no such namespace: {namespace_id:#x}")
        return _namespace_from_row(rows[0])

    def namespace_by_name(self, name: str) -> NamespaceInfo | None:
        """Return the namespace of this name, or None."""
        with self._lock:
            node = self.lookup(ROOT_NODE_ID, name)
            if node is None or not node.is_directory:
                return None
            return self.namespace(node.namespace_id)

    def namespaces(self) -> list[NamespaceInfo]:
        """Return all namespaces by name."""
        return [_namespace_from_row(row) for row in self._read(_NAMESPACES + "ORDER BY n.name")]

    def set_retention(self, namespace_id: int, retention: Retention) -> None:
        """Say whether what a name reaches may be dropped. Durability: flush.

        Raises:
            UsageError: Neither "cache" nor "durable".
        """
        is_durable = checked_retention(retention) == "durable"
        with self.transaction():
            self.namespace(namespace_id)
            self._write(
                "UPDATE namespaces SET is_durable = ? WHERE namespace_id = ?",
                (int(is_durable), namespace_id),
            )

    def drop_namespace(self, namespace_id: int) -> None:
        """Remove a namespace with all its nodes. Durability: flush.

        Their bytes in the database file are overwritten, tokens too, once the WAL is moved there.

        Raises:
            NotFoundError: There is none.
        """
        with self.transaction():
            self.namespace(namespace_id)
            self._connection.execute("PRAGMA secure_delete=ON").fetchone()
            try:
                self._write(
                    "DELETE FROM context_rows WHERE node_id IN "
                    "(SELECT node_id FROM nodes WHERE namespace_id = ?)",
                    (namespace_id,),
                )
                self._write(
                    "DELETE FROM attributes WHERE node_id IN "
                    "(SELECT node_id FROM nodes WHERE namespace_id = ?)",
                    (namespace_id,),
                )
                self._write_nodes("DELETE FROM nodes WHERE namespace_id = ?", (namespace_id,))
                self._write("DELETE FROM namespaces WHERE namespace_id = ?", (namespace_id,))
            finally:
                self._connection.execute("PRAGMA secure_delete=FAST").fetchone()


def _namespace_from_row(row: Row) -> NamespaceInfo:
    namespace_id, name, text, fingerprint, is_durable, root_node_id, created_ns = row
    try:
        layout = Layout.from_json(text)
    except (UsageError, msgspec.DecodeError) as error:
        raise CorruptionError(
            f"namespace layout not understood: {namespace_id:#x}: {error}; run 'kvfs-admin check'"
        ) from error
    return NamespaceInfo(
        namespace_id, name.decode("utf-8", "surrogateescape"), layout, fingerprint,
        "durable" if is_durable else "cache", root_node_id, created_ns,
    )  # fmt: skip
