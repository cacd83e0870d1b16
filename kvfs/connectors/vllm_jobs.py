"""Copies between vLLM's rows and the pool, in threads.

Layer: L5, without vLLM.

- Bytes go straight from and to vLLM's rows, by address; kvfs verifies what it reads in the pass
  that copies it.
- One thread stores, so that the log holds chains in their order. Loads have threads of their own
  and are cut into pieces for them.
- A store that finds too many chunks waiting fails at once; a load that no thread takes in time is
  given up before it starts. What runs is never abandoned: it writes to vLLM's rows.
"""

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import numpy as np

from kvfs.clock import Clock
from kvfs.connectors.vllm_contexts import DECODE
from kvfs.connectors.vllm_metrics import Counts
from kvfs.connectors.vllm_options import Options
from kvfs.connectors.vllm_pool import PoolLink, block_keys
from kvfs.connectors.vllm_work import Task, Workers
from kvfs.keys import KEY_BYTES
from kvfs.namespace import Namespace
from kvfs.phase import PhaseName

_PIECE_BYTES: Final = 32 << 20
_NOTES_MAX: Final = 4096


@dataclass(slots=True)
class Job:
    """A store or a load of some chunks, and what came of it.

    Attributes:
        number: vLLM's.
        is_load: To vLLM's rows.
        keys: vLLM's keys.
        rows: Where each chunk lies in the primary tier.
        phases: What each chunk is accessed for.
        parents: Of a store: the key before each in its chain, or None.
        is_done: Of each chunk, whether it was copied (or was there already).
        copy_ns: Time spent copying, by all threads.
    """

    number: int
    is_load: bool
    keys: Sequence[bytes]
    rows: Sequence[int]
    phases: Sequence[PhaseName | None]
    parents: Sequence[bytes | None] = ()
    is_done: list[bool] = field(default_factory=list)
    copy_ns: int = 0
    pieces_left: int = 0


@dataclass(slots=True)
class _Piece:
    """A part of a load. Whoever sets `is_taken`, under the lock, settles it."""

    job: Job
    start: int
    end: int
    queued_ns: int
    is_taken: bool = False


class Transfers:
    """The jobs of one tier. Thread-safe."""

    def __init__(
        self, link: PoolLink, counts: Counts, clock: Clock, options: Options,
        address: int, row_bytes: int,
    ) -> None:  # fmt: skip
        """Start the threads; `address` is that of row 0, and stays valid until `end`."""
        self._link, self._counts, self._clock, self._options = link, counts, clock, options
        self._address, self._row_bytes = address, row_bytes
        self._lock = threading.Lock()
        self._queued_chunks = 0
        self._pieces: deque[_Piece] = deque()
        self._finished: list[Job] = []
        self._stores = Workers("store", 1)
        self._loads = Workers("load", options.load_threads)

    def store(self, job: Job) -> None:
        """Queue a store, or refuse it."""
        job.is_done = [False] * len(job.keys)
        with self._lock:
            waiting = self._queued_chunks
            is_refused = bool(waiting) and (
                waiting + len(job.keys) > self._options.store_queue_chunks
            )
            if not is_refused:
                self._queued_chunks += len(job.keys)
        if is_refused or not self._stores.submit(partial(self._store, job)):
            self._counts.add("refused_chunks", len(job.keys))
            self._finish(job)

    def load(self, job: Job) -> None:
        """Queue a load."""
        job.is_done = [False] * len(job.keys)
        step = max(1, _PIECE_BYTES // self._row_bytes)
        now_ns = self._clock.monotonic_ns()
        pieces = [_Piece(job, start, min(start + step, len(job.keys)), now_ns)
                  for start in range(0, len(job.keys), step)]  # fmt: skip
        job.pieces_left = len(pieces)
        with self._lock:
            self._pieces.extend(pieces)
        for piece in pieces:
            if not self._loads.submit(partial(self._load, piece)):
                self._give_up(piece)
        if not pieces:
            self._finish(job)

    def after_stores(self, task: Task) -> None:
        """Run a task in the storing thread, after the stores that were queued before."""
        if not self._stores.submit(task, limit=_NOTES_MAX):
            self._counts.add("dropped_notes")

    def finished(self) -> list[Job]:
        """Return the jobs that finished since the last call."""
        self._expire()
        with self._lock:
            finished, self._finished = self._finished, []
        return finished

    def drain(self) -> None:
        """Wait until every job has finished."""
        self._loads.wait_idle()
        self._stores.wait_idle()

    def end(self) -> None:
        """Do what is queued, then end the threads.

        Raises:
            BusyError: A copy did not end in time; vLLM's rows must stay mapped.
        """
        self._loads.end()
        self._stores.end()

    # --- in the threads

    def _store(self, job: Job) -> None:
        start_ns = self._clock.monotonic_ns()
        try:
            space = self._link.namespace()
            if space is not None:
                self._put(space, job)
        except Exception as error:  # noqa: BLE001 - a store that fails is a miss later
            self._counts.failed("storing", error)
        finally:
            if not all(job.is_done):
                self._counts.add("failed_chunks", len(job.keys))
            job.copy_ns = self._clock.monotonic_ns() - start_ns
            with self._lock:
                self._queued_chunks -= len(job.keys)
            self._finish(job)

    def _put(self, space: Namespace, job: Job) -> None:
        keys = block_keys(space.info.namespace_id, job.keys)
        result = space.put(
            keys,
            [self._row(row) for row in job.rows],
            parents=self._parents(space, job),
            durability=self._options.durability,
        )
        job.is_done = [True] * len(job.keys)
        self._counts.add("stored_chunks", result.blocks_stored)
        self._counts.add("stored_bytes", result.bytes_stored)
        self._counts.add("present_chunks", result.blocks_deduplicated)
        self._counts.add("decode_chunks", job.phases.count(DECODE))

    def _parents(self, space: Namespace, job: Job) -> np.ndarray:
        """Return the parents that are there; a chunk whose parent was never stored has none.

        To eviction a block that names an absent parent is out of reach. That is right for a broken
        chain, and wrong where vLLM keeps only the last chunks of a window.
        """
        namespace_id = space.info.namespace_id
        parents = np.zeros((len(job.keys), KEY_BYTES), np.uint8)
        given = [i for i, parent in enumerate(job.parents) if parent is not None]
        if given:
            names = [parent for parent in job.parents if parent is not None]
            keys, here = block_keys(namespace_id, names), set(job.keys)
            is_there = space.lookup(keys)["length"] > 0
            for at, key, name, is_resident in zip(given, keys, names, is_there, strict=True):
                if is_resident or name in here:
                    parents[at] = key
        return parents

    def _load(self, piece: _Piece) -> None:
        if not self._take(piece):
            return
        deadline_ns = piece.queued_ns + int(self._options.load_deadline_s * 1e9)
        start_ns = self._clock.monotonic_ns()
        done = [False] * (piece.end - piece.start)
        try:
            space = self._link.namespace()
            if space is not None and start_ns <= deadline_ns:
                self._read(space, piece, done)
        except Exception as error:  # noqa: BLE001 - a load that fails is a miss
            self._counts.failed("loading", error)
        finally:
            self._settle(piece, done, self._clock.monotonic_ns() - start_ns)

    def _read(self, space: Namespace, piece: _Piece, done: list[bool]) -> None:
        """Copy the chunks of a piece, those of one phase at a time."""
        job, part = piece.job, slice(piece.start, piece.end)
        keys = block_keys(space.info.namespace_id, job.keys[part])
        phases = job.phases[part]
        for phase in dict.fromkeys(phases):
            chosen = [at for at, one in enumerate(phases) if one == phase]
            rows = [self._row(job.rows[piece.start + at]) for at in chosen]
            read = space.read_into(keys[chosen], rows, phase=phase)
            for at, is_read in zip(chosen, read, strict=True):
                done[at] = bool(is_read)

    def _row(self, row: int) -> tuple[int, int]:
        return self._address + row * self._row_bytes, self._row_bytes

    # --- book-keeping

    def _expire(self) -> None:
        """Give up loads that have waited too long; the oldest are in front."""
        oldest_ns = self._clock.monotonic_ns() - int(self._options.load_deadline_s * 1e9)
        while True:
            with self._lock:
                while self._pieces and self._pieces[0].is_taken:
                    self._pieces.popleft()
                if not self._pieces or self._pieces[0].queued_ns >= oldest_ns:
                    return
                piece = self._pieces[0]
            self._give_up(piece)

    def _give_up(self, piece: _Piece) -> None:
        if self._take(piece):
            self._settle(piece, [False] * (piece.end - piece.start), 0)

    def _take(self, piece: _Piece) -> bool:
        with self._lock:
            is_mine, piece.is_taken = not piece.is_taken, True
        return is_mine

    def _settle(self, piece: _Piece, done: list[bool], copy_ns: int) -> None:
        job, count = piece.job, sum(done)
        self._counts.add("loaded_chunks", count)
        self._counts.add("loaded_bytes", count * self._row_bytes)
        self._counts.add("missed_loads", len(done) - count)
        with self._lock:
            job.is_done[piece.start : piece.end] = done
            job.copy_ns += copy_ns
            job.pieces_left -= 1
            is_last = not job.pieces_left
        if is_last:
            self._finish(job)

    def _finish(self, job: Job) -> None:
        with self._lock:
            self._finished.append(job)
