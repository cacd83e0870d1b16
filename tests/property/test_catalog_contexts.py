"""Rows of contexts against a list of blocks."""

import sqlite3
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvfs.engine.catalog import Catalog
from kvfs.engine.catalog_schema import ROOT_NODE_ID, ROW_KEYS, NodeState, Origin
from kvfs.layout import OPAQUE

NS, BLOCK, STRIDE = 11, 5000, 8192
COUNTS = st.one_of(st.integers(1, 4), st.sampled_from([509, 510, 511, 512, 513, 1024, 1100]))


@dataclass
class Block:
    """A block of the model: its key, and its tokens."""

    key: bytes
    tokens: list[int]


@dataclass
class Model:
    """What the context must hold."""

    blocks: list[Block] = field(default_factory=list)
    known: list[bool] = field(default_factory=list)  # of each row: whether tokens are kept
    tail_bytes: int = 0

    def cut(self, count: int) -> None:
        del self.blocks[count:]
        del self.known[-(-count // ROW_KEYS) :]

    def add(self, blocks: list[Block], known: bool) -> None:
        head = len(self.blocks) % ROW_KEYS
        self.blocks += blocks
        rows = -(-len(self.blocks) // ROW_KEYS)
        if head:
            self.known[-1] = self.known[-1] and known
        self.known += [known] * (rows - len(self.known))


class ContextMachine(RuleBasedStateMachine):
    """One context, changed in every way."""

    @initialize()
    def start(self) -> None:
        self.connection = sqlite3.connect(":memory:")
        self.catalog = Catalog.from_connection(self.connection)
        self.catalog.create_namespace(NS, "default", OPAQUE, "cache", 1, 0o755, 0, 0)
        node = self.catalog.create_context(
            ROOT_NODE_ID, "x", NS, Origin.API, NodeState.ACTIVE, 0o644, 0, 0, 1
        )
        self.node_id, self.now = node.node_id, 1
        self.model = Model()

    def blocks(self, count: int, seed: int, has_tokens: bool) -> tuple[list[Block], dict]:
        """Blocks for the model, and the same as arguments."""
        rng = np.random.default_rng(seed)
        keys = rng.integers(0, 256, (count, 32), np.uint8)
        counts = rng.integers(0, 4, count) if has_tokens else np.zeros(count, np.int64)
        tokens = rng.integers(0, 1 << 32, int(counts.sum()), np.uint32)
        parts = np.split(tokens, np.cumsum(counts)[:-1]) if count else []
        self.now += 1
        made = [Block(key.tobytes(), part.tolist()) for key, part in zip(keys, parts, strict=True)]
        return made, {"keys": keys, "token_counts": counts, "tokens": tokens, "now_ns": self.now}

    @rule(
        count=COUNTS, seed=st.integers(0, 999), tail=st.sampled_from([1, BLOCK]),
        known=st.booleans(), has_tokens=st.booleans(),
    )  # fmt: skip
    def append(self, count: int, seed: int, tail: int, known: bool, has_tokens: bool) -> None:
        blocks, arguments = self.blocks(count, seed, has_tokens)
        if not known:
            del arguments["tokens"]
        is_partial = bool(self.model.blocks) and self.model.tail_bytes < BLOCK
        self.catalog.append_blocks(
            self.node_id, block_bytes=BLOCK, stride=STRIDE, tail_bytes=tail,
            replace_tail=is_partial, **arguments,
        )  # fmt: skip
        if is_partial:
            self.model.cut(len(self.model.blocks) - 1)
        self.model.add(blocks, known)
        self.model.tail_bytes = tail

    @precondition(lambda self: self.model.blocks)
    @rule(share=st.floats(0, 1), nearest=st.booleans())
    def truncate(self, share: float, nearest: bool) -> None:
        count = int(share * len(self.model.blocks))
        if nearest:
            count = count // ROW_KEYS * ROW_KEYS
        if count < len(self.model.blocks):
            self.model.tail_bytes = BLOCK if count else 0
        self.model.cut(count)
        self.now += 1
        self.catalog.truncate_blocks(
            self.node_id, count, stride=STRIDE, tail_bytes=self.model.tail_bytes,
            token_count=sum(len(block.tokens) for block in self.model.blocks),
            tail_tokens=len(self.model.blocks[-1].tokens) if count else 0, now_ns=self.now,
        )  # fmt: skip

    @rule(count=st.one_of(st.just(0), COUNTS), seed=st.integers(0, 999), reserved=st.booleans())
    def replace(self, count: int, seed: int, reserved: bool) -> None:
        blocks, arguments = self.blocks(count, seed, True)
        before = self.catalog.node(self.node_id).version
        version = self.catalog.next_version(self.node_id) if reserved else None
        self.model = Model(tail_bytes=3 if count else 0)
        node = self.catalog.replace_content(
            self.node_id, stride=STRIDE, tail_bytes=self.model.tail_bytes, version=version,
            **arguments,
        )  # fmt: skip
        self.model.add(blocks, True)
        assert node.version > before

    @rule()
    def reopen(self) -> None:
        copy = sqlite3.connect(":memory:")
        copy.deserialize(self.connection.serialize())
        self.connection.close()
        self.connection, self.catalog = copy, Catalog.from_connection(copy)

    @invariant()
    def content_agrees(self) -> None:
        blocks, node = self.model.blocks, self.catalog.node(self.node_id)
        assert self.catalog.keys(self.node_id).tobytes() == b"".join(b.key for b in blocks)
        tokens = [token for block in blocks for token in block.tokens]
        found = self.catalog.tokens(self.node_id)
        assert (found is None) is (not all(self.model.known))
        assert found is None or found.tolist() == tokens
        assert (node.block_count, node.token_count) == (len(blocks), len(tokens))
        assert node.tail_tokens == (len(blocks[-1].tokens) if blocks else 0)
        assert node.tail_bytes == self.model.tail_bytes
        size = (len(blocks) - 1) * STRIDE + self.model.tail_bytes if blocks else 0
        assert (node.size_bytes, node.mtime_ns) == (size, self.now)

    def teardown(self) -> None:
        if hasattr(self, "catalog"):
            assert self.catalog.check() == []
            self.connection.close()


TestContexts = ContextMachine.TestCase
TestContexts.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)
TestContexts.pytestmark = [pytest.mark.timeout(900)]  # shrinking a failure takes minutes
