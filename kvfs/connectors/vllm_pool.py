"""The way to the pool: opened when it can be, and the namespace of one engine's layout.

Layer: L5, without vLLM.

- Whatever keeps the pool from being opened is no reason to stop an engine: until it opens, every
  lookup is a miss. It is tried again, by whoever needs it next, every `retry_s`.
- Two engines share a namespace exactly if the bytes of their rows mean the same: its name ends in a
  digest of what vLLM's own file tier puts into its paths, and of layout and size of a row.
"""

import hashlib
import json
import logging
import re
import struct
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

import kvfs
from kvfs.clock import Clock
from kvfs.connectors.vllm_memory import file_behind
from kvfs.connectors.vllm_metrics import Counts
from kvfs.connectors.vllm_options import Options
from kvfs.errors import BusyError, KvfsError
from kvfs.keys import DIGEST_BYTES, KeyArray
from kvfs.layout import Layout

_log = logging.getLogger("kvfs.vllm")
_DIGEST_CHARS: Final = 12
_MODEL_CHARS: Final = 80
_PERSON: Final = b"kvfs-vllm-key"


def namespace_name(prefix: str, fields: Mapping[str, Any]) -> str:
    """Return the namespace of an engine: prefix, the model's name, digest of all fields."""
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(text.encode()).hexdigest()[:_DIGEST_CHARS]
    model = str(fields["model_name"])
    if model.startswith("/"):  # a directory: its own name says enough
        model = model.rstrip("/").rpartition("/")[2]
    model = re.sub(r"[^A-Za-z0-9._-]+", "_", model).strip("_.")
    return f"{prefix}-{model[-_MODEL_CHARS:]}-{digest}"


def row_layout(fields: Mapping[str, Any], row_bytes: int, chunk_tokens: int) -> Layout:
    """Return the layout of a block that is one row: opaque bytes.

    Args:
        fields: As for `namespace_name`.
        row_bytes: Bytes of a row, padding included.
        chunk_tokens: Tokens of a row; one that does not divide the row counts as one token.
    """
    tokens = chunk_tokens if chunk_tokens > 0 and row_bytes % chunk_tokens == 0 else 1
    return Layout(
        "uint8", (row_bytes // tokens,), tokens, order="vllm-row",
        rank=str(fields.get("rank", 0)), model=str(fields["model_name"]),
    )  # fmt: skip


def block_keys(namespace_id: int, keys: Sequence[bytes]) -> KeyArray:
    """Return kvfs's keys of vLLM's: the namespace's id, then BLAKE2b-192 of the whole OffloadKey.

    An OffloadKey is 36 bytes: the hash of the chain of tokens, and the KV cache group.
    """
    prefix = struct.pack("<Q", namespace_id)
    made = b"".join(
        prefix + hashlib.blake2b(key, digest_size=DIGEST_BYTES, person=_PERSON).digest()
        for key in keys
    )
    return np.frombuffer(made, np.uint8).reshape(len(keys), len(prefix) + DIGEST_BYTES)


class PoolLink:
    """A pool that is opened when it can be. Thread-safe.

    Attributes:
        name: Of the namespace.
    """

    def __init__(
        self, options: Options, name: str, layout: Layout, rows: npt.NDArray[Any], counts: Counts,
        clock: Clock,
    ) -> None:  # fmt: skip
        """Bind to a pool; `rows` is what is put from, and stays where it is until `close`."""
        self.name = name
        self._rows = rows
        self._options, self._layout = options, layout
        self._counts, self._clock = counts, clock
        self._lock = threading.Lock()
        self._pool: kvfs.Pool | kvfs.RemotePool | None = None
        self._space: kvfs.Namespace | None = None
        self._next_ns: int | None = None
        self._is_told = self._is_closed = False

    def namespace(self) -> kvfs.Namespace | None:
        """Return the namespace, opening the pool if it is time to try; None: there is none now.

        Whoever comes while another thread opens the pool gets None, and does not wait.
        """
        space = self._space
        if space is not None or not self._lock.acquire(blocking=False):
            return space
        try:
            now_ns = self._clock.monotonic_ns()
            is_due = self._next_ns is None or now_ns >= self._next_ns
            if self._space is None and not self._is_closed and is_due:
                self._try_open()
                self._next_ns = self._clock.monotonic_ns() + int(self._options.retry_s * 1e9)
            return self._space
        finally:
            self._lock.release()

    def close(self) -> None:
        """Close the pool; idempotent. What could not be persisted is logged."""
        with self._lock:
            self._is_closed = True
            pool, self._pool, self._space = self._pool, None, None
        if pool is not None:
            try:
                pool.close()
            except (KvfsError, OSError) as error:
                self._counts.failed("closing the pool", error)

    def _open(self) -> kvfs.Pool | kvfs.RemotePool:
        """Open the pool, or become a client of its owner, who reads the rows where they are."""
        pool = kvfs.open_pool(self._options.pool)
        if isinstance(pool, kvfs.RemotePool):
            with file_behind(self._rows.ctypes.data, self._rows.nbytes) as fd:
                if fd is not None:
                    pool.share(fd, self._rows)
        return pool

    def _try_open(self) -> None:
        path = self._options.pool
        try:
            if self._pool is None:
                self._pool = self._open()
            self._space = self._pool.namespace(
                self.name, self._layout, retention=self._options.retention
            )
        except Exception as error:  # noqa: BLE001 - an engine goes on without a cache
            self._counts.add("failures")
            if not self._is_told:
                self._is_told = True
                hint = ""
                if isinstance(error, BusyError):
                    hint = "; engines share a pool that 'kvfs serve' or 'kvfs mount' owns"
                _log.warning("no KV cache from kvfs: every lookup is a miss until the pool can be "
                             "opened, which is tried again every %g s: %s%s",
                             self._options.retry_s, error, hint)  # fmt: skip
            return
        if self._is_told:
            self._is_told = False
            _log.warning("the pool is open now: %s", path)
