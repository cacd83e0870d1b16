"""Writes that kvfs-core does itself, to the staged bytes of a file.

Layer: L5.

- A file that is opened empty is offered to the core at once: its first write meets no Python. One
  that has content is offered at its first write, which stages it; opening moves no bytes.
- The core writes up to a credit. A write beyond comes to this side, which does it and raises the
  credit.
- kvfs takes the file back whenever it needs the bytes (`Files.grant`): the core ends the writes
  under way and says what was written. The next write comes to this side, and offers it again.
- An offer is never needed: a file that cannot be offered is written by the request handlers.

Locks: none of its own. What is said to the core of a file is said with its writer's lock held.
"""

import logging
from functools import partial

from kvfs.errors import KvfsError, UnavailableError
from kvfs.file_writer import HandedIn
from kvfs.files import Files, WriteHandle
from kvfs.fuse.core_client import CoreClient
from kvfs.fuse.core_messages import Written

_log = logging.getLogger("kvfs.fuse")


class WriteLanes:
    """Which open files the core writes. Thread-safe, synchronous; waits for the core."""

    def __init__(self, files: Files, client: CoreClient) -> None:
        """Let a core write a pool's files."""
        self._files = files
        self._client = client
        self._credits: dict[int, int] = {}

    def is_native(self, fh: int) -> bool:
        """Say whether the core writes a handle's file now."""
        return fh in self._credits

    def offer(self, fh: int, inode: int, file: WriteHandle, upto_bytes: int) -> None:
        """Let the core write a handle's file beyond `upto_bytes`, if that can be had.

        The answer to the open, if it was not given yet, comes after.
        """
        writer = file.writer
        with writer.lock:
            if file not in writer.handles or self._client.has_ended:
                return
            try:
                fd, credit = self._files.grant(file, upto_bytes, partial(self._take_back, fh, file))
            except KvfsError as error:
                _log.debug("file is not written natively: %s", error)
                return
            known = self._credits.get(fh)
            try:
                if known is None:
                    # What stays in memory is hashed when it is copied into the log.
                    assert writer.staged is not None
                    stride = 0 if writer.staged.in_memory else self._files.stride_of(writer)
                    self._credits[fh] = credit
                    self._client.install_write(fh, inode, fd, credit, stride, upto_bytes)
                elif credit > known:
                    self._credits[fh] = credit
                    self._client.raise_credit(fh, credit)
            except (OSError, UnavailableError) as error:
                _log.debug("file is not written natively: %s", error)
                self._files.revoke(file)

    def _take_back(self, fh: int, file: WriteHandle) -> HandedIn | None:
        """Stop the core writing, and return what it says; see `Files.grant`."""
        self._credits.pop(fh, None)
        writer = file.writer
        blocks = writer.size_bytes // self._files.stride_of(writer)
        try:
            written = self._client.close_writer(fh, blocks)
        except UnavailableError:
            if self._client.has_ended:
                return None
            raise
        return HandedIn() if written is None else _handed_in(written)


def _handed_in(written: Written) -> HandedIn:
    if written.is_in_order and written.end_bytes > written.start_bytes:
        return HandedIn(
            written.start_bytes, written.end_bytes, written.digests, written.has_failed
        )  # fmt: skip
    return HandedIn(
        min(written.start_bytes, written.high_water_bytes), written.high_water_bytes, None,
        written.has_failed,
    )  # fmt: skip
