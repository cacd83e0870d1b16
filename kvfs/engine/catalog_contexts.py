"""The content of contexts: which blocks, in which order, and of which tokens.

Layer: L2.

- Keys lie in rows of 512, so that appending rewrites one row and not the context.
- Row i holds keys [512 * i, 512 * (i + 1)); only the last row is shorter, none is empty.
- A node and its rows change in one transaction; rows of a version that the node does not name are
  never committed.
- A row's tokens are known for all of its blocks or for none (NULL).
- The version of a file is part of its block keys, so it is reserved before blocks are written, and
  a reserved version is not given again, whether it was published, abandoned or lost in a crash.
"""

from collections.abc import Sequence
from dataclasses import replace as with_changes
from functools import cached_property
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from kvfs.engine.catalog_rows import (
    EMPTY_ROW,
    NO_KEYS,
    NO_TOKENS,
    Blocks,
    RowHead,
    TokenArray,
    TokenCodec,
    check_size,
    checked_blocks,
    damaged,
    decode_keys,
)
from kvfs.engine.catalog_schema import (
    EPOCH_VERSION_BITS,
    ROW_KEYS,
    Node,
    NodeKind,
    NodeState,
    Origin,
)
from kvfs.engine.catalog_tree import CatalogTree
from kvfs.errors import UsageError
from kvfs.keys import KeyArray

_EPOCH_WORN: Final = 1 << (EPOCH_VERSION_BITS - 1)


class CatalogContexts(CatalogTree):
    """Keys and tokens of contexts."""

    @cached_property
    def _codec(self) -> TokenCodec:
        return TokenCodec()

    def keys(self, node_id: int, start: int = 0, stop: int | None = None) -> KeyArray:
        """Return block keys [start, stop) as (n, 32) uint8, read-only.

        Cost: reads the rows that hold them, 16 KiB each.

        Raises:
            NotFoundError: There is no such node.
            CorruptionError: The rows do not hold what the node says.
        """
        with self._lock:
            node = self._context(node_id)
            stop = node.block_count if stop is None else min(stop, node.block_count)
            if start < 0 or start >= stop:
                return NO_KEYS
            first_row = start // ROW_KEYS
            rows = self._read(
                "SELECT keys FROM context_rows WHERE node_id = ? AND version = ? "
                "AND row_index BETWEEN ? AND ? ORDER BY row_index",
                (node_id, node.version, first_row, (stop - 1) // ROW_KEYS),
            )
        begin = first_row * ROW_KEYS
        found = decode_keys(node.node_id, rows)
        if len(found) < stop - begin:
            raise damaged(node.node_id, f"{stop - begin} keys from block {begin}", str(len(found)))
        return found[start - begin : stop - begin]

    def tokens(self, node_id: int) -> TokenArray | None:
        """Return all token ids of a context, or None if those of some block are not known.

        Raises:
            CorruptionError: The rows do not hold what the node says.
        """
        with self._lock:
            node = self._context(node_id)
            rows = self._read(
                "SELECT tokens, token_count FROM context_rows WHERE node_id = ? AND version = ? "
                "ORDER BY row_index",
                (node_id, node.version),
            )
            if any(blob is None for blob, _ in rows):
                return None
            parts = [self._codec.decompress(node.node_id, blob, count) for blob, count in rows]
        tokens = np.concatenate(parts) if parts else NO_TOKENS
        if len(tokens) != node.token_count:
            raise damaged(node.node_id, f"{node.token_count} tokens", str(len(tokens)))
        return tokens

    def next_version(self, node_id: int) -> int:
        """Reserve the version of new content, for `file_keys` and `replace_content`.

        Each call gives another one, so that a failed attempt leaves no block under a key that the
        next attempt would use. The first call of a session may wait for the medium.
        """
        with self._write_lock:
            if self._is_epoch_due and self._depth == 0:
                with self.transaction():
                    pass  # its begin persists the epoch
            with self._lock:
                return self._reserve_version(self._context(node_id))

    def append_blocks(
        self, node_id: int, keys: Any, *, block_bytes: int, stride: int, tail_bytes: int,
        token_counts: Sequence[int] | npt.NDArray[Any] | None = None,
        tokens: Sequence[int] | npt.NDArray[Any] | None = None, replace_tail: bool = False,
        now_ns: int,
    ) -> Node:  # fmt: skip
        """Add blocks at the end of a context. Durability: flush.

        Args:
            node_id: An ACTIVE context.
            keys: (n, 32) uint8, n >= 1.
            block_bytes: Logical bytes of a full block.
            stride: Distance of two blocks in the file.
            tail_bytes: Logical bytes of the last of these blocks; the others are full.
            token_counts: (n,) tokens of each block; None: no tokens.
            tokens: Ids of all their tokens; None: not known.
            replace_tail: The first of these blocks takes the place of the last one there.
            now_ns: Wall clock; becomes mtime and ctime.

        Returns:
            The node as it is now.

        Raises:
            UsageError: The last block is partial and `replace_tail` is not given; or the arguments
                do not fit together.

        Cost: rewrites the last row, adds one row per 512 keys.
        """
        blocks = checked_blocks(keys, token_counts, tokens)
        if not 0 < tail_bytes <= block_bytes <= stride or not len(blocks.keys):
            raise UsageError(
                "append needs blocks: expected n >= 1 and 0 < tail_bytes <= block_bytes <= stride, "
                f"found {len(blocks.keys)}, {tail_bytes}, {block_bytes}, {stride}"
            )
        with self.transaction():
            node = self._active(node_id)
            if replace_tail and node.block_count == 0:
                raise UsageError(f"no tail to replace: context {node_id} is empty")
            if not replace_tail and node.block_count and node.tail_bytes < block_bytes:
                raise UsageError(
                    f"context ends in a partial block: node {node_id}: expected {block_bytes} "
                    f"bytes, found {node.tail_bytes}; replace the tail"
                )
            kept = node.block_count - int(replace_tail)
            kept_tokens = node.token_count - (node.tail_tokens if replace_tail else 0)
            self._write_rows(node, node.version, kept, kept_tokens, blocks)
            count = kept + len(blocks.keys)
            return self._publish(
                with_changes(
                    node,
                    size_bytes=(count - 1) * stride + tail_bytes,
                    block_count=count,
                    token_count=kept_tokens + blocks.token_count,
                    tail_bytes=tail_bytes,
                    tail_tokens=blocks.tail_tokens,
                    mtime_ns=now_ns,
                    ctime_ns=now_ns,
                )
            )

    def truncate_blocks(
        self, node_id: int, block_count: int, *, stride: int, tail_bytes: int, token_count: int = 0,
        tail_tokens: int = 0, now_ns: int,
    ) -> Node:  # fmt: skip
        """Keep the first blocks of a context and forget the others. Durability: flush.

        Args:
            node_id: An ACTIVE context.
            block_count: How many to keep, at most as many as there are.
            stride: Distance of two blocks in the file.
            tail_bytes: Logical bytes of the last block kept; 0 if none is.
            token_count: Tokens of the blocks kept.
            tail_tokens: Tokens of the last of them.
            now_ns: Wall clock; becomes mtime and ctime.

        Raises:
            UsageError: The arguments do not fit together or the context.
        """
        check_size(block_count, stride, tail_bytes)
        with self.transaction():
            node = self._active(node_id)
            if block_count > node.block_count or not tail_tokens <= token_count <= node.token_count:
                raise UsageError(
                    f"nothing to cut: node {node_id} has {node.block_count} blocks and "
                    f"{node.token_count} tokens, found {block_count} and {token_count}"
                )
            self._cut_rows(node, block_count, token_count)
            return self._publish(
                with_changes(
                    node,
                    size_bytes=(block_count - 1) * stride + tail_bytes if block_count else 0,
                    block_count=block_count,
                    token_count=token_count,
                    tail_bytes=tail_bytes,
                    tail_tokens=tail_tokens,
                    mtime_ns=now_ns,
                    ctime_ns=now_ns,
                )
            )

    def replace_content(
        self, node_id: int, keys: Any, *, stride: int, tail_bytes: int,
        token_counts: Sequence[int] | npt.NDArray[Any] | None = None,
        tokens: Sequence[int] | npt.NDArray[Any] | None = None, version: int | None = None,
        now_ns: int,
    ) -> Node:  # fmt: skip
        """Publish new content as a whole; the context is ACTIVE from then on. Durability: flush.

        Args:
            node_id: A context in any state.
            keys: (n, 32) uint8; n may be 0.
            stride: Distance of two blocks in the file.
            tail_bytes: Logical bytes of the last block, up to `stride`; 0 if n is 0.
            token_counts: (n,) tokens of each block; None: no tokens.
            tokens: Ids of all their tokens; None: not known.
            version: From `next_version`; None takes the next one.
            now_ns: Wall clock; becomes mtime and ctime.

        Raises:
            UsageError: The version is not newer, or the arguments do not fit together.
        """
        blocks = checked_blocks(keys, token_counts, tokens)
        count = len(blocks.keys)
        check_size(count, stride, tail_bytes)
        with self.transaction():
            node = self._context(node_id)
            if version is None:
                version = self._reserve_version(node)
            if version <= node.version or version >= 1 << 32:
                raise UsageError(
                    f"content is out of date: node {node_id}: expected a version above "
                    f"{node.version}, found {version}; reserve one with next_version"
                )
            if node.block_count:
                self._write("DELETE FROM context_rows WHERE node_id = ?", (node_id,))
            self._write_rows(node, version, 0, 0, blocks)
            self._published.append((node_id, version))
            return self._publish(
                with_changes(
                    node,
                    state=NodeState.ACTIVE,
                    size_bytes=(count - 1) * stride + tail_bytes if count else 0,
                    block_count=count,
                    token_count=blocks.token_count,
                    tail_bytes=tail_bytes,
                    tail_tokens=blocks.tail_tokens,
                    version=version,
                    mtime_ns=now_ns,
                    ctime_ns=now_ns,
                )
            )

    def _reserve_version(self, node: Node) -> int:
        """Give out a version. REQUIRES: the lock, an epoch of this session."""
        epoch_start = self._epoch << EPOCH_VERSION_BITS
        latest = max(node.version, self._reserved.get(node.node_id, 0))
        version = max(latest + 1, epoch_start)
        self._reserved[node.node_id] = version
        if version - epoch_start >= _EPOCH_WORN:
            self._is_epoch_due = True  # the next transaction begins with a new one
        return version

    def clear_content(self, node_id: int, now_ns: int) -> Node:
        """Forget what a file holds; it is PENDING until `replace_content`. Durability: flush.

        For a file that loses its blocks while new content is being written to it.
        """
        with self.transaction():
            node = self._context(node_id)
            self._write("DELETE FROM context_rows WHERE node_id = ?", (node_id,))
            return self._publish(
                with_changes(
                    node, state=NodeState.PENDING, size_bytes=0, block_count=0, token_count=0,
                    tail_bytes=0, tail_tokens=0, ctime_ns=now_ns,
                )
            )  # fmt: skip

    def become_raw(self, node_id: int, nbytes: int, *, mtime_ns: int, now_ns: int) -> Node:
        """Forget what a file holds in blocks: its bytes lie in a raw file now. Durability: flush.

        Of a file that is raw already this notes the size and the time alone.

        Raises:
            UsageError: It was made through the API.
        """
        with self.transaction():
            node = self._context(node_id)
            if node.origin is not Origin.FILE:
                raise UsageError(f"not a file: node {node_id} was made through the API")
            if node.block_count:
                self._write("DELETE FROM context_rows WHERE node_id = ?", (node_id,))
            self._write("UPDATE nodes SET kind = ? WHERE node_id = ?", (int(NodeKind.RAW), node_id))
            return self._publish(
                with_changes(
                    node, kind=NodeKind.RAW, state=NodeState.ACTIVE, size_bytes=nbytes,
                    block_count=0, token_count=0, tail_bytes=0, tail_tokens=0, mtime_ns=mtime_ns,
                    ctime_ns=now_ns,
                )
            )  # fmt: skip

    def _active(self, node_id: int) -> Node:
        node = self._context(node_id)
        if node.state is not NodeState.ACTIVE:
            raise UsageError(f"content is not adopted yet: node {node_id}; publish it first")
        return node

    def _publish(self, node: Node) -> Node:
        """Write what content changes of a node. REQUIRES: a transaction, the rows are written."""
        self._write(
            "UPDATE nodes SET state = ?, size_bytes = ?, block_count = ?, token_count = ?, "
            "tail_bytes = ?, tail_tokens = ?, version = ?, mtime_ns = ?, ctime_ns = ? "
            "WHERE node_id = ?",
            (
                int(node.state), node.size_bytes, node.block_count, node.token_count,
                node.tail_bytes, node.tail_tokens, node.version, node.mtime_ns, node.ctime_ns,
                node.node_id,
            ),
        )  # fmt: skip
        return node

    def _write_rows(
        self, node: Node, version: int, kept: int, kept_tokens: int, blocks: Blocks
    ) -> None:
        """Write blocks behind the first `kept`; what follows those in their row is overwritten."""
        row_index, in_row = divmod(kept, ROW_KEYS)
        cut_tokens = node.token_count - kept_tokens
        head = self._row_head(node, row_index, in_row, cut_tokens) if in_row else EMPTY_ROW
        start = token_start = 0
        while start < len(blocks.keys):
            stop = start + ROW_KEYS - len(head.keys)
            counts = blocks.token_counts[start:stop]
            token_stop = token_start + int(counts.sum())
            tokens = None
            if head.tokens is not None and blocks.tokens is not None:
                tokens = np.concatenate([head.tokens, blocks.tokens[token_start:token_stop]])
            self._write_row(
                node.node_id, version, row_index,
                head.token_count + token_stop - token_start,
                head.keys.tobytes() + blocks.keys[start:stop].tobytes(), tokens,
                is_new=head is EMPTY_ROW,
            )  # fmt: skip
            start, token_start, row_index, head = stop, token_stop, row_index + 1, EMPTY_ROW

    def _cut_rows(self, node: Node, block_count: int, token_count: int) -> None:
        """Delete what lies behind the first blocks."""
        row_index, in_row = divmod(block_count, ROW_KEYS)
        before = self._read(
            "SELECT coalesce(sum(token_count), 0) FROM context_rows "
            "WHERE node_id = ? AND version = ? AND row_index < ?",
            (node.node_id, node.version, row_index),
        )[0][0]
        head = EMPTY_ROW
        if in_row:
            through = self._row_head(node, row_index, in_row, 0)
            tokens = through.tokens
            head = RowHead(
                through.keys,
                token_count - before,
                None if tokens is None else tokens[: max(token_count - before, 0)],
            )
            is_fitting = 0 <= head.token_count <= through.token_count
        else:
            is_fitting = before == token_count
        if not is_fitting:
            raise UsageError(
                f"token count does not fit: node {node.node_id}: {block_count} blocks cannot have "
                f"{token_count} tokens"
            )
        self._write(
            "DELETE FROM context_rows WHERE node_id = ? AND row_index >= ?",
            (node.node_id, row_index + int(in_row > 0)),
        )
        if in_row:
            self._write_row(
                node.node_id, node.version, row_index, head.token_count, head.keys.tobytes(),
                head.tokens, is_new=False,
            )  # fmt: skip

    def _row_head(self, node: Node, row_index: int, in_row: int, cut_tokens: int) -> RowHead:
        """Return the first keys of a row, and its tokens but the last `cut_tokens`."""
        rows = self._read(
            "SELECT keys, token_count, tokens FROM context_rows "
            "WHERE node_id = ? AND version = ? AND row_index = ?",
            (node.node_id, node.version, row_index),
        )
        keys = decode_keys(node.node_id, rows)
        if len(keys) < in_row or rows[0][1] < cut_tokens:
            raise damaged(node.node_id, f"{in_row} keys in row {row_index}", str(len(keys)))
        _, count, blob = rows[0]
        tokens = (
            None
            if blob is None
            else self._codec.decompress(node.node_id, blob, count)[: count - cut_tokens]
        )
        return RowHead(keys[:in_row], count - cut_tokens, tokens)

    def _write_row(
        self, node_id: int, version: int, row_index: int, token_count: int, keys: bytes,
        tokens: TokenArray | None, *, is_new: bool,
    ) -> None:  # fmt: skip
        blob = None if tokens is None else self._codec.compress(tokens)
        # OR REPLACE: a replaced tail may have been alone in its row.
        self._write(
            "INSERT OR REPLACE INTO context_rows "
            "(token_count, keys, tokens, node_id, version, row_index) VALUES (?, ?, ?, ?, ?, ?)"
            if is_new
            else "UPDATE context_rows SET token_count = ?, keys = ?, tokens = ? "
            "WHERE node_id = ? AND version = ? AND row_index = ?",
            (token_count, keys, blob, node_id, version, row_index),
        )
