"""What must hold in a catalog, as queries that find where it does not.

Layer: L2.

- Every finding is one line for people: `what: where: expected X, found Y`.
- Nothing here repairs anything.
"""

import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import msgspec
import zstandard

from kvfs.engine.catalog_schema import (
    ATTRIBUTE_BYTES_MAX,
    ATTRIBUTE_NAME_BYTES_MAX,
    DEFAULT_NAMESPACE,
    EPOCH_NODE_BITS,
    EPOCH_VERSION_BITS,
    ROOT_NODE_ID,
    ROW_KEYS,
    encode_name,
)
from kvfs.errors import UsageError
from kvfs.keys import KEY_BYTES
from kvfs.layout import Layout

FINDINGS_MAX: Final = 100  # of each kind: a damaged file has the same finding a million times
_ROW_BYTES: Final = ROW_KEYS * KEY_BYTES


@dataclass(frozen=True, slots=True)
class _Rule:
    """What is expected, and a query for (where, found) that yields what breaks it.

    `since`: the schema that has what is asked about.
    """

    expectation: str
    query: str
    since: int = 1


_RULES: Final = (
    _Rule(
        "root: expected one directory without parent",
        f"SELECT {ROOT_NODE_ID}, count(*) FROM nodes WHERE node_id = {ROOT_NODE_ID} AND kind = 1 "
        "AND parent_id = 0 AND namespace_id = 0 HAVING count(*) <> 1",
    ),
    _Rule(
        "node parent: expected a directory",
        "SELECT n.node_id, n.parent_id FROM nodes n LEFT JOIN nodes p ON p.node_id = n.parent_id "
        f"WHERE n.node_id <> {ROOT_NODE_ID} AND coalesce(p.kind, 0) <> 1",
    ),
    _Rule(
        "node reach: expected a path to the root",
        "WITH RECURSIVE reached (node_id) AS "
        f"(SELECT {ROOT_NODE_ID} UNION SELECT n.node_id FROM nodes n JOIN reached r "
        "ON n.parent_id = r.node_id) "
        "SELECT node_id, parent_id FROM nodes WHERE node_id NOT IN reached",
    ),
    _Rule(
        "node enums: expected known kind, origin and state",
        "SELECT node_id, kind || '/' || origin || '/' || state FROM nodes "
        "WHERE kind NOT IN (1, 2, 3) OR origin NOT IN (1, 2) OR state NOT IN (1, 2) "
        "OR (kind <> 2 AND state <> 1)",
    ),
    _Rule(
        "node namespace: expected an existing one",
        f"SELECT node_id, namespace_id FROM nodes WHERE node_id <> {ROOT_NODE_ID} "
        "AND namespace_id NOT IN (SELECT namespace_id FROM namespaces)",
    ),
    _Rule(
        "node namespace: expected that of its directory",
        "SELECT n.node_id, n.namespace_id FROM nodes n JOIN nodes p ON p.node_id = n.parent_id "
        f"WHERE p.node_id <> {ROOT_NODE_ID} AND n.namespace_id <> p.namespace_id",
    ),
    _Rule(
        "directory at the root: expected a namespace's",
        f"SELECT node_id, namespace_id FROM nodes WHERE parent_id = {ROOT_NODE_ID} AND kind = 1 "
        "AND node_id NOT IN (SELECT root_node_id FROM namespaces)",
    ),
    _Rule(
        f"file at the root: expected namespace '{DEFAULT_NAMESPACE}'",
        f"SELECT node_id, namespace_id FROM nodes WHERE parent_id = {ROOT_NODE_ID} AND kind > 1 "
        f"AND namespace_id NOT IN (SELECT namespace_id FROM nodes WHERE parent_id = {ROOT_NODE_ID} "
        f"AND kind = 1 AND name = x'{DEFAULT_NAMESPACE.encode().hex()}')",
    ),
    _Rule(
        "namespace directory: expected one below the root",
        "SELECT s.namespace_id, s.root_node_id FROM namespaces s LEFT JOIN nodes n "
        "ON n.node_id = s.root_node_id AND n.namespace_id = s.namespace_id AND n.kind = 1 "
        f"WHERE coalesce(n.parent_id, 0) <> {ROOT_NODE_ID}",
    ),
    _Rule(
        "context size: expected blocks, bytes and tokens that fit together",
        "SELECT node_id, block_count || ' blocks, ' || size_bytes || ' bytes' FROM nodes WHERE "
        "block_count < 0 OR tail_bytes < 0 OR tail_tokens > token_count "
        "OR (block_count = 0 AND (tail_bytes <> 0 OR token_count <> 0)) "
        "OR (block_count = 0 AND size_bytes <> 0 AND kind <> 3) OR size_bytes < 0 "
        "OR (block_count = 1 AND size_bytes <> tail_bytes) "
        "OR (block_count > 0 AND (tail_bytes = 0 OR size_bytes < tail_bytes)) "
        "OR (block_count > 1 AND (size_bytes - tail_bytes) % (block_count - 1) <> 0) "
        "OR (block_count > 0 AND (kind <> 2 OR state <> 1))",
    ),
    _Rule(
        "context row: expected a context of this version",
        "SELECT r.node_id, 'version ' || r.version FROM context_rows r LEFT JOIN nodes n "
        "ON n.node_id = r.node_id AND n.version = r.version AND n.kind = 2 WHERE n.node_id IS NULL",
    ),
    _Rule(
        f"context row: expected {ROW_KEYS} keys in all but the last",
        "SELECT r.node_id, 'row ' || r.row_index || ' with ' || length(r.keys) || ' bytes' "
        "FROM context_rows r JOIN nodes n ON n.node_id = r.node_id AND n.version = r.version "
        f"WHERE length(r.keys) <> min({_ROW_BYTES}, "
        f"n.block_count * {KEY_BYTES} - r.row_index * {_ROW_BYTES})",
    ),
    _Rule(
        "context rows: expected all blocks, in rows without gaps",
        "SELECT n.node_id, count(r.row_index) || ' rows, ' || n.block_count || ' blocks' "
        "FROM nodes n LEFT JOIN context_rows r ON r.node_id = n.node_id AND r.version = n.version "
        "GROUP BY n.node_id HAVING coalesce(sum(length(r.keys)), 0) <> n.block_count * "
        f"{KEY_BYTES} OR count(r.row_index) <> coalesce(max(r.row_index) + 1, 0)",
    ),
    _Rule(
        "context tokens: expected the sum of the rows",
        "SELECT n.node_id, n.token_count FROM nodes n LEFT JOIN context_rows r "
        "ON r.node_id = n.node_id AND r.version = n.version GROUP BY n.node_id "
        "HAVING coalesce(sum(r.token_count), 0) <> n.token_count",
    ),
    _Rule(
        "attribute: expected one of a node, of a name and size that may be",
        "SELECT a.node_id, length(a.name) || ' and ' || length(a.value) || ' bytes' "
        "FROM attributes a LEFT JOIN nodes n ON n.node_id = a.node_id WHERE n.node_id IS NULL "
        f"OR length(a.name) > {ATTRIBUTE_NAME_BYTES_MAX} "
        f"OR length(a.value) > {ATTRIBUTE_BYTES_MAX} OR substr(a.name, 1, 5) <> x'757365722e'",
        since=2,
    ),
    _Rule(
        "ids: expected none above those of the epoch",
        "SELECT node_id, version FROM nodes, meta WHERE key = 'epoch' "
        f"AND (node_id >= (CAST(value AS INTEGER) + 1) << {EPOCH_NODE_BITS} "
        f"OR version >= (CAST(value AS INTEGER) + 1) << {EPOCH_VERSION_BITS})",
    ),
)


def find_problems(connection: sqlite3.Connection) -> list[str]:
    """Return what is wrong; an empty list means nothing is.

    Raises:
        sqlite3.DatabaseError: The file is too damaged to be queried.
    """
    found = [
        f"database: {row[0]}"
        for row in connection.execute(f"PRAGMA quick_check({FINDINGS_MAX})")
        if row[0] != "ok"
    ]
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    for rule in (rule for rule in _RULES if rule.since <= version):
        rows = connection.execute(f"{rule.query} LIMIT {FINDINGS_MAX}")
        found += [f"{rule.expectation}: {where}: found {value}" for where, value in rows]
    for check in (_names, _layouts, _token_frames):
        for _, problem in zip(range(FINDINGS_MAX), check(connection), strict=False):
            found.append(problem)
    return found


def _names(connection: sqlite3.Connection) -> Iterator[str]:
    rows = connection.execute(
        "SELECT node_id, parent_id, name FROM nodes WHERE node_id <> ?", (ROOT_NODE_ID,)
    )
    for node_id, parent_id, raw in rows:
        try:
            encode_name(raw.decode("utf-8", "surrogateescape"), parent_id)
        except (UsageError, AttributeError) as error:
            yield f"node name: {node_id}: {error}"


def _layouts(connection: sqlite3.Connection) -> Iterator[str]:
    rows = connection.execute("SELECT namespace_id, layout, fingerprint FROM namespaces")
    for namespace_id, text, fingerprint in rows:
        try:
            expected = Layout.from_json(text).fingerprint()
        except (UsageError, msgspec.DecodeError) as error:
            yield f"namespace layout: {namespace_id:#x}: {error}"
            continue
        if expected != fingerprint:
            yield (
                f"namespace fingerprint: {namespace_id:#x}: expected {expected.hex()}, "
                f"found {bytes(fingerprint).hex()}"
            )


def _token_frames(connection: sqlite3.Connection) -> Iterator[str]:
    rows = connection.execute(
        "SELECT node_id, row_index, token_count, tokens FROM context_rows WHERE tokens IS NOT NULL"
    )
    for node_id, row_index, token_count, blob in rows:
        try:
            nbytes = zstandard.get_frame_parameters(blob).content_size
            if nbytes == token_count * 4:
                nbytes = len(zstandard.ZstdDecompressor().decompress(blob))
        except zstandard.ZstdError as error:
            yield f"context tokens: node {node_id} row {row_index}: {error}"
            continue
        if nbytes != token_count * 4:
            yield (
                f"context tokens: node {node_id} row {row_index}: expected {token_count * 4} "
                f"bytes, found {nbytes}"
            )
