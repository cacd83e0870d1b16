"""What becomes of a file when its writers are done: blocks in the log, a segment, or a raw file.

Layer: L4.

- A small file is appended to the log, a large one becomes a file segment: in place only if nobody
  can write it any more; else a copy does.
- A file that was made larger than what was written to it, by more than the half, becomes raw: its
  owner means to write it in place. So does one that is marked.

Locks: all of it happens under the writer's lock.
"""

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import numpy as np
import numpy.typing as npt

from kvfs import _native
from kvfs.durability import Durability
from kvfs.engine.catalog_schema import Node
from kvfs.errors import BusyError, DeviceError, NotFoundError
from kvfs.file_contents import Adopted
from kvfs.file_writer import FileWriter
from kvfs.file_writing import FileWriting
from kvfs.keys import file_keys
from kvfs.staging import is_mostly_written
from kvfs.units import MIB

RAW_BYTES_MIN: Final = MIB  # a smaller file never becomes raw by itself
_NO_VERSION: Final = -1


class FileAdoption(FileWriting):
    """Turns staged bytes into what is served."""

    def _adopt(self, writer: FileWriter) -> None:
        """Turn the bytes into blocks, or into a raw file, and serve them under the file's name.

        REQUIRES: the writer's lock, dirty.
        """
        self._revoke_all(writer)
        if writer.failure is not None:
            raise writer.failure
        if writer.is_raw:
            self._note_raw(writer)
            return
        try:
            node = self._catalog.node(writer.node.node_id)
            stride = self._stride(node.namespace_id)
            if self._is_to_be_raw(writer, node):
                self._become_raw(writer, node)
            else:
                self._adopt_blocks(writer, node, stride)
        except NotFoundError:
            writer.is_removed = True

    def _adopt_blocks(self, writer: FileWriter, node: Node, stride: int) -> None:
        """Put the bytes into the store, and serve them from there."""
        nbytes, version = writer.size_bytes, self._catalog.next_version(node.node_id)
        count = -(-nbytes // stride)
        keys = file_keys(node.namespace_id, node.node_id, version, count)
        lengths = np.full(count, stride, np.uint64)
        if count:
            lengths[-1] = nbytes - (count - 1) * stride
        now = self._clock.wall_ns()
        adopted = Adopted(
            node.node_id, node.namespace_id, version, keys, nbytes,
            int(lengths[-1]) if count else 0, writer.mtime_ns, now,
        )  # fmt: skip
        if count and self._catalog.namespace(node.namespace_id).retention == "durable":
            self._pin(adopted)
        try:
            is_persisted = not count or self._store_content(writer, adopted, lengths)
        except BaseException:
            self._unpin(adopted)
            raise
        writer.is_adopting = True
        writer.is_dirty = writer.is_written = False  # from here on it can be lost
        self._note_adopted(adopted)
        writer.is_adopting = False
        if is_persisted:
            self._name([adopted])
        writer.kept_bytes, writer.kept_version = nbytes, version

    def _pin(self, adopted: Adopted) -> None:
        """Pin new content until it is named."""
        try:
            adopted.pinned_bytes = self._store.pin(adopted.namespace_id, adopted.keys)
        except BusyError:
            self.publish()  # names what is pinned for the same reason
            adopted.pinned_bytes = self._store.pin(adopted.namespace_id, adopted.keys)

    def _store_content(
        self, writer: FileWriter, adopted: Adopted, lengths: npt.NDArray[np.uint64]
    ) -> bool:
        """Put the staged bytes into the store; return whether they are persisted already."""
        staged = writer.staged
        assert staged is not None
        if adopted.size_bytes <= self.staging.log_limit(staged):
            with _mapped(staged.file.fd, lengths) as addresses:
                self._store.put(
                    adopted.namespace_id, adopted.keys, addresses, lengths,
                    durability=Durability.ASYNC,
                )  # fmt: skip
            return False
        self._persist_staged(writer)
        if not self.staging.seal(staged):
            # Somebody may write still: what becomes a segment is a copy that nobody has open.
            self.staging.replace(staged)
            writer.digests.clear()
            self._persist_staged(writer)
            if not self.staging.seal(staged):
                raise DeviceError(f"file is written by somebody unknown: {writer.node.name!r}")
        digests, is_known = writer.digests.of(lengths)
        missing = np.flatnonzero(~is_known)
        if len(missing):
            with _mapped(staged.file.fd, lengths) as addresses:
                digests[missing] = _digests(addresses[missing], lengths[missing])
        try:
            self._store.adopt(
                staged.device_index, staged.file, adopted.namespace_id, adopted.keys, lengths,
                digests, ~is_known,
            )  # fmt: skip
        except DeviceError as error:
            # What the medium holds is unknown, and the staging file may be a segment that is gone.
            self._fail(writer, error)
            raise
        finally:
            if staged.file.state is None:
                writer.kept_bytes = adopted.size_bytes
                writer.staged = None
                writer.digests.clear()
        return True

    def _is_to_be_raw(self, writer: FileWriter, node: Node) -> bool:
        """Say whether a file is to be written in place from now on."""
        if not self._store.file_devices(0):
            return False  # there is no place to write to: it goes into the log
        if self._catalog.wants_raw(node):
            return True
        nbytes, staged = writer.size_bytes, writer.staged
        if staged is None or not writer.is_extended or nbytes < RAW_BYTES_MIN:
            return False
        return not is_mostly_written(staged.file.fd, nbytes)

    def _become_raw(self, writer: FileWriter, node: Node) -> None:
        """Keep the staged file as it is. Durability: persist (names: flush).

        Bytes first, name second; and what the name meant before goes when that is sure not to come
        back.
        """
        node_id = node.node_id
        if writer.staged is None and not writer.kept_bytes:
            writer.staged = self.staging.create(
                f"{node_id:x}", node.namespace_id, 0, on_device=True
            )
        staged = self._staged(writer, writer.kept_bytes)
        self._persist_staged(writer)
        self.raws.keep(node_id, staged)
        try:
            with self._catalog.transaction():
                keys = self._catalog.keys(node_id)
                self._catalog.become_raw(
                    node_id, staged.size_bytes, mtime_ns=writer.mtime_ns,
                    now_ns=self._clock.wall_ns(),
                )  # fmt: skip
        except BaseException:
            self.raws.remove(node_id)  # when it is closed
            raise
        with self._lock:
            before = self._adopted.pop(node_id, None)
            if node_id in self._readers:
                self._versions[node_id] = _NO_VERSION
        if before is not None:
            self._give_up(before)
        if len(keys):
            self._catalog.sync()
            self._release(node_id, node.namespace_id, keys)
        writer.is_dirty = writer.is_written = False

    def _note_raw(self, writer: FileWriter) -> None:
        """Tell the catalog size and time of a raw file that was written. Durability: flush."""
        if writer.is_removed or not (writer.is_dirty or writer.is_granted):
            return
        self._settle(writer)
        writer.is_dirty = writer.is_written = False
        try:
            self._catalog.become_raw(
                writer.node.node_id, writer.size_bytes, mtime_ns=writer.mtime_ns,
                now_ns=self._clock.wall_ns(),
            )  # fmt: skip
        except NotFoundError:
            writer.is_removed = True


@contextmanager
def _mapped(fd: int, lengths: npt.NDArray[np.uint64]) -> Iterator[npt.NDArray[np.uint64]]:
    """Map consecutive blocks of a file for reading; give their addresses.

    Private, so that the map is none that could write, which would keep a seal off.
    """
    nbytes = int(lengths.sum())
    with mmap.mmap(fd, nbytes, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ) as mapped:
        address, _ = _native.buffer_address(mapped)
        yield np.uint64(address) + np.cumsum(lengths) - lengths


def _digests(
    addresses: npt.NDArray[np.uint64], lengths: npt.NDArray[np.uint64]
) -> npt.NDArray[np.uint8]:
    """Return the XXH3-128 of memory ranges, (n, 16).

    Through a copy, because the native copy survives a page that cannot be read.
    """
    digests = np.zeros((len(lengths), 16), np.uint8)
    statuses = np.zeros(len(lengths), np.int32)
    scratch = np.empty(int(lengths.max()), np.uint8)
    targets = np.full(len(lengths), scratch.ctypes.data, np.uint64)
    if _native.copy_hash(targets, addresses, lengths, digests, statuses):
        raise DeviceError("staged file could not be read back: close it and write it again")
    return digests
