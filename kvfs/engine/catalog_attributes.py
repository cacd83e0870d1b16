"""Extended attributes of nodes.

Layer: L2.

- A node's attributes go with it, and follow it wherever it is renamed to.
- What an attribute means is decided above. One mark is known here, because it is inherited: files
  made in a directory that has `user.kvfs.raw` become raw, also those in directories made in it.
"""

from kvfs.engine.catalog_nodes import CatalogNodes
from kvfs.engine.catalog_schema import (
    ATTRIBUTE_BYTES_MAX,
    ATTRIBUTE_NAME_BYTES_MAX,
    RAW_ATTRIBUTE,
    AttributesFullError,
    AttributeTooLargeError,
    NameTooLongError,
    NoAttributeError,
    Node,
)
from kvfs.errors import ExistsError, UsageError


class CatalogAttributes(CatalogNodes):
    """The table of attributes."""

    def attribute(self, node_id: int, name: bytes) -> bytes:
        """Return the value of an attribute.

        Raises:
            NoAttributeError: There is none of this name.
        """
        rows = self._read(
            "SELECT value FROM attributes WHERE node_id = ? AND name = ?", (node_id, name)
        )
        if not rows:
            raise NoAttributeError(f"no such attribute: {name!r} of node {node_id}")
        return bytes(rows[0][0])

    def attribute_names(self, node_id: int) -> list[bytes]:
        """Return the names of a node's attributes, in the order of their bytes."""
        rows = self._read("SELECT name FROM attributes WHERE node_id = ? ORDER BY name", (node_id,))
        return [bytes(row[0]) for row in rows]

    def set_attribute(
        self, node_id: int, name: bytes, value: bytes, *, now_ns: int,
        must_exist: bool | None = None,
    ) -> None:  # fmt: skip
        """Give a node an attribute; ctime becomes `now_ns`. Durability: flush.

        Args:
            node_id: A context or directory.
            name: With its prefix 'user.'.
            value: At most 64 KiB.
            now_ns: Wall clock.
            must_exist: Whether it must be there before (True), or must not (False).

        Raises:
            NotFoundError: There is no such node.
            ExistsError: It is there, and must not be.
            NoAttributeError: It is not there, and must be.
            NameTooLongError: The name has more than 255 bytes.
            AttributeTooLargeError: The value is too large.
            AttributesFullError: The node has too many bytes of attributes.
            UsageError: The name does not begin with 'user.', or with nothing behind it.
        """
        _check_attribute(name, value)
        with self.transaction():
            self.node(node_id)
            rows = self._read(
                "SELECT name = ?, length(name) + length(value) FROM attributes WHERE node_id = ?",
                (name, node_id),
            )
            is_there = any(row[0] for row in rows)
            if must_exist is True and not is_there:
                raise NoAttributeError(f"no such attribute: {name!r} of node {node_id}")
            if must_exist is False and is_there:
                raise ExistsError(f"attribute is there already: {name!r} of node {node_id}")
            others = sum(row[1] for row in rows if not row[0])
            if others and others + len(name) + len(value) > ATTRIBUTE_BYTES_MAX:
                raise AttributesFullError(
                    f"no room for attribute {name!r} of node {node_id}: its others have {others} "
                    f"bytes, at most {ATTRIBUTE_BYTES_MAX} in all; remove some"
                )
            self._write(
                "INSERT OR REPLACE INTO attributes (node_id, name, value) VALUES (?, ?, ?)",
                (node_id, name, value),
            )
            self._touch_attributes(node_id, now_ns)

    def remove_attribute(self, node_id: int, name: bytes, *, now_ns: int) -> None:
        """Take an attribute from a node. Durability: flush.

        Raises:
            NoAttributeError: There is none of this name.
        """
        with self.transaction():
            count = self._write(
                "DELETE FROM attributes WHERE node_id = ? AND name = ?", (node_id, name)
            )
            if not count:
                raise NoAttributeError(f"no such attribute: {name!r} of node {node_id}")
            self._touch_attributes(node_id, now_ns)

    def wants_raw(self, node: Node) -> bool:
        """Say whether a file is marked to be raw, itself or by the directory it is in."""
        rows = self._read(
            "SELECT 1 FROM attributes WHERE name = ? AND node_id IN (?, ?) LIMIT 1",
            (RAW_ATTRIBUTE, node.node_id, node.parent_id),
        )
        return bool(rows)

    def attributes_named(self, name: bytes) -> dict[int, bytes]:
        """Return the values of an attribute by the node that has it."""
        rows = self._read("SELECT node_id, value FROM attributes WHERE name = ?", (name,))
        return {row[0]: bytes(row[1]) for row in rows}

    def _inherit_raw(self, parent_id: int, node_id: int) -> None:
        """Mark a new directory as its parent is marked. REQUIRES: a transaction."""
        self._write(
            "INSERT INTO attributes SELECT ?, name, value FROM attributes "
            "WHERE node_id = ? AND name = ?",
            (node_id, parent_id, RAW_ATTRIBUTE),
        )

    def _touch_attributes(self, node_id: int, now_ns: int) -> None:
        self._write("UPDATE nodes SET ctime_ns = ? WHERE node_id = ?", (now_ns, node_id))


def _check_attribute(name: bytes, value: bytes) -> None:
    if not name.startswith(b"user.") or name == b"user.":
        raise UsageError(f"no valid attribute: {name[:64]!r}: expected a name such as b'user.x'")
    if len(name) > ATTRIBUTE_NAME_BYTES_MAX:
        raise NameTooLongError(
            f"attribute name too long: {name[:32]!r}...: expected at most "
            f"{ATTRIBUTE_NAME_BYTES_MAX} bytes, found {len(name)}"
        )
    if len(value) > ATTRIBUTE_BYTES_MAX:
        raise AttributeTooLargeError(
            f"attribute too large: {name!r}: expected at most {ATTRIBUTE_BYTES_MAX} bytes, "
            f"found {len(value)}"
        )
