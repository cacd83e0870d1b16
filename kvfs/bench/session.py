"""What benches share: how much to do, where, memory to copy from and to, progress.

Layer: L5.
"""

import contextlib
import ctypes
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self, TextIO

import numpy as np
import numpy.typing as npt

from kvfs import _native
from kvfs.config import SEGMENT_BYTES_MIN, PoolOptions
from kvfs.keys import KEY_BYTES, KeyArray
from kvfs.layout import Layout
from kvfs.lifecycle import create_pool, destroy_pool
from kvfs.namespace import Namespace
from kvfs.pool import Pool
from kvfs.units import KIB, MIB, PAGE

BLOCKS: Final = 1_000_000
BLOCK_SIZES: Final = (64 * KIB, MIB, 16 * MIB)
_BATCH_BYTES_MAX: Final = 64 * MIB
_WINDOWS: Final = 4
_SEGMENT_BYTES_MAX: Final = 256 * MIB
_SUMMARY_SHARE: Final = 28  # of a segment of 4 KiB blocks, 1/33 is summary; leave some more
_SPARE_SEGMENTS: Final = 4  # open, being sealed, and what eviction keeps back
_XFS_BYTES_MIN: Final = 512 * MIB
_SHM: Final = Path("/dev/shm")


class SkipError(Exception):
    """Raised by a bench that cannot run here; the message says what is missing."""


@dataclass(frozen=True, slots=True)
class Scale:
    """How much to measure.

    Attributes:
        size_bytes: Bytes that a repeat moves.
        block_count: Blocks in the index for lookups and reopening.
        repeats: Samples per figure.
        directory: Where files on disk go.
    """

    size_bytes: int
    block_count: int
    repeats: int
    directory: Path

    @property
    def segment_bytes(self) -> int:
        """A power of two near a quarter of the size."""
        quarter = 1 << (max(1, self.size_bytes // 4).bit_length() - 1)
        return min(_SEGMENT_BYTES_MAX, max(SEGMENT_BYTES_MIN, quarter))

    @property
    def batch_bytes(self) -> int:
        """Bytes that one call moves, at least one block of 1 MiB."""
        return max(MIB, min(_BATCH_BYTES_MAX, self.size_bytes // _WINDOWS))

    def share_of(self, count: int) -> int:
        """Return how many operations to do where 1,000,000 small blocks would mean `count`."""
        return max(1, min(count, count * self.block_count // BLOCKS))

    def block_sizes(self) -> list[int]:
        """Return the block sizes that fit segments and batches."""
        limit = min(self.segment_bytes // 4, self.batch_bytes)
        return [size for size in BLOCK_SIZES if size <= limit]

    def capacity_for(self, nbytes: int, block_bytes: int) -> int:
        """Return the capacity of a device that takes `nbytes` without evicting."""
        room = self.segment_bytes - self.segment_bytes // _SUMMARY_SHARE
        if block_bytes >= MIB:
            room = self.segment_bytes - MIB // 4
        per_segment = room // block_bytes
        segments = -(-nbytes // (per_segment * block_bytes)) + _SPARE_SEGMENTS
        return segments * self.segment_bytes


class Progress:
    """Says on stderr what is being measured: a line that changes, a line each, or JSON lines."""

    def __init__(self, stream: TextIO, *, is_json: bool = False) -> None:
        self._stream = stream
        self._is_json = is_json
        self._is_terminal = stream.isatty()
        self._width = 0

    def note(self, name: str, done: int, total: int) -> None:
        """Tell that `done` of `total` steps of a measurement are done."""
        if self._is_json:
            status = {"message_type": "status", "name": name, "done": done, "total": total}
            self._stream.write(json.dumps(status) + "\n")
        elif self._is_terminal:
            text = f"bench: {name} {done}/{total}"
            self._stream.write("\r" + text.ljust(self._width))
            self._width = len(text)
        elif done == 0:
            self._stream.write(f"bench: {name}\n")
        self._stream.flush()

    def clear(self) -> None:
        """Remove the line."""
        if self._is_terminal and not self._is_json:
            self._stream.write("\r" + " " * self._width + "\r")
            self._stream.flush()


class Memory:
    """Memory of the two kinds between which kvfs copies, warm: private pages and a memfd."""

    def __init__(self, scale: Scale) -> None:
        self.batch_bytes = scale.batch_bytes
        generator = np.random.default_rng(1)
        private_bytes = min(scale.size_bytes, _WINDOWS * scale.batch_bytes)
        private_bytes = max(self.batch_bytes, private_bytes // self.batch_bytes * self.batch_bytes)
        self.private = generator.integers(0, 256, private_bytes, np.uint8)
        arena_bytes = max(private_bytes, min(scale.size_bytes, 2 * private_bytes))
        self._fd = _native.memfd("kvfs-bench", arena_bytes)
        self._arena = _native.Arena(self._fd, arena_bytes, populate=True)
        self.arena = np.frombuffer(memoryview(self._arena), np.uint8)

    def windows(self, memory: npt.NDArray[np.uint8]) -> list[npt.NDArray[np.uint8]]:
        """Cut memory into batches; walking through them outruns the processor's caches."""
        size = self.batch_bytes
        return [memory[start : start + size] for start in range(0, len(memory) - size + 1, size)]

    def close(self) -> None:
        """Give it back; after a failure, parts may still be referred to and keep their pages."""
        del self.arena
        with contextlib.suppress(BufferError):
            self._arena.close()
        os.close(self._fd)


class Session:
    """One run of the bench. Use as a context manager: it removes what it made."""

    def __init__(self, scale: Scale, progress: Progress) -> None:
        self.scale = scale
        self.progress = progress
        self.left_out: list[tuple[str, str]] = []
        self._memory: Memory | None = None
        self._generator = np.random.default_rng(2)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        if self._memory is not None:
            self._memory.close()

    def leave_out(self, name: str, reason: str) -> None:
        """Note a figure that cannot be measured here, where the others of its bench can."""
        self.left_out.append((name, reason))

    @property
    def memory(self) -> Memory:
        """Memory to copy from and to, made at first use."""
        if self._memory is None:
            self._memory = Memory(self.scale)
        return self._memory

    def new_keys(self, namespace: Namespace, count: int) -> KeyArray:
        """Return keys that nobody had before."""
        keys = self._generator.integers(0, 256, (count, KEY_BYTES), np.uint8)
        keys.view("<u8")[:, 0] = namespace.info.namespace_id
        return keys

    def shuffled(self, keys: KeyArray) -> KeyArray:
        """Return the keys in an order that has nothing to do with where they lie."""
        return np.ascontiguousarray(keys[self._generator.permutation(len(keys))])

    @contextlib.contextmanager
    def memory_pool(self, block_bytes: int, nbytes: int) -> Iterator[tuple[Pool, Namespace]]:
        """Open a pool of memory alone, with room for `nbytes` of blocks of one size."""
        scale = self.scale
        capacity = scale.capacity_for(nbytes, block_bytes)
        url = f"dram:?size={capacity}&segment={scale.segment_bytes}"
        with self.directory() as root, self.pool(root / "pool", url, block_bytes) as made:
            yield made

    @contextlib.contextmanager
    def pool(self, path: Path, url: str, block_bytes: int) -> Iterator[tuple[Pool, Namespace]]:
        """Open a pool of one device that keeps every block once; destroy it in the end."""
        pool = create_pool(path, [url], options=PoolOptions(copy_to_dram=False))
        try:
            yield pool, pool.namespace("bench", Layout(token_shape=(block_bytes,)))
        finally:
            pool.close()
            destroy_pool(path)

    @contextlib.contextmanager
    def directory(self) -> Iterator[Path]:
        """Make a directory on disk; remove it in the end."""
        with tempfile.TemporaryDirectory(prefix="kvfs-bench-", dir=self.scale.directory) as root:
            yield Path(root)

    @contextlib.contextmanager
    def tmpfs(self, nbytes: int) -> Iterator[Path]:
        """Make a directory on a tmpfs with room for `nbytes`; remove it in the end.

        Raises:
            SkipError: /dev/shm has not that much room, and this process may not mount another.
        """
        if _SHM.is_dir() and shutil.disk_usage(_SHM).free >= nbytes:
            with tempfile.TemporaryDirectory(prefix="kvfs-bench-", dir=_SHM) as root:
                yield Path(root)
            return
        if os.geteuid() != 0:
            raise SkipError(f"needs a tmpfs with {nbytes >> 20} MiB of room: {_SHM} has less")
        with self.directory() as root:
            size = f"size={nbytes + PAGE * PAGE}"
            subprocess.run(["mount", "-t", "tmpfs", "-o", size, "kvfs-bench", root], check=True)
            try:
                yield root
            finally:
                subprocess.run(["umount", root], check=True)

    @contextlib.contextmanager
    def loop_xfs(self, nbytes: int) -> Iterator[Path]:
        """Make an XFS with reflinks over a loop device, with room for `nbytes`; remove it.

        Raises:
            SkipError: This process may not mount one, or there is no mkfs.xfs.
        """
        if os.geteuid() != 0 or shutil.which("mkfs.xfs") is None:
            raise SkipError("XFS over a loop device needs root and mkfs.xfs")
        with self.directory() as root:
            image, mount_point = root / "image", root / "xfs"
            mount_point.mkdir()
            with image.open("xb") as file:
                file.truncate(max(_XFS_BYTES_MIN, nbytes + nbytes // 8))
            try:
                _run("mkfs.xfs", "-q", "-m", "reflink=1", str(image))
                _run("mount", "-o", "loop", str(image), str(mount_point))
            except subprocess.CalledProcessError as error:
                raise SkipError(f"no XFS over a loop device: {error.stderr.strip()}") from error
            try:
                yield mount_point
            finally:
                _run("umount", str(mount_point))

    def run_child(self, module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a module of kvfs in a fresh process of the same interpreter."""
        command = [sys.executable, "-m", module, *arguments]
        return subprocess.run(command, check=False, capture_output=True, text=True)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def stream_copy(target: npt.NDArray[np.uint8], source: npt.NDArray[np.uint8]) -> None:
    """Copy with non-temporal stores, without a checksum: the plain form of what `put` does."""
    addresses = np.array([target.ctypes.data, source.ctypes.data, source.nbytes], np.uint64)
    status = np.zeros(1, np.int32)
    failed = _native.copy_verify(addresses[:1], addresses[1:2], addresses[2:], None, status)
    assert not failed


def library_copy(target: npt.NDArray[np.uint8], source: npt.NDArray[np.uint8]) -> None:
    """Copy with the C library's memmove, in one call."""
    ctypes.memmove(target.ctypes.data, source.ctypes.data, source.nbytes)


def fill(session: Session, namespace: Namespace, nbytes: int) -> KeyArray:
    """Put `nbytes` of blocks, a batch at a time; return their keys."""
    block_bytes = namespace.layout.stride
    memory = session.memory
    per_batch = memory.batch_bytes // block_bytes
    keys = session.new_keys(namespace, nbytes // block_bytes)
    payload = memory.private[: per_batch * block_bytes].reshape(per_batch, block_bytes)
    for start in range(0, len(keys), per_batch):
        part = keys[start : start + per_batch]
        namespace.put(part, payload[: len(part)], durability="none")
    return keys


def drop_all(pool: Pool, namespace: Namespace, keys: KeyArray) -> None:
    """Drop blocks, so that their segments can be written again."""
    pool.flush()
    pool.store.drop(namespace.info.namespace_id, keys)
