"""What of a memory device outlives its owner: names, and what the next owner finds by them.

Layer: L1.

    label              see memory_label
    frame-N            frame N; the label says which segment lies in it, if any
    file-SLOT-GEN      payload of a file segment, sealed against every write
    sums-SLOT-GEN      its sidecar, given before the payload and taken after it
    raw-NUMBER         a raw file

- A frame that is found can be read for ever and written by nobody: only the map that it was made
  with could (F_SEAL_FUTURE_WRITE).
- What is found and has no use is let go: free frames, payloads without a sidecar, what cannot be
  understood. What is of another version is left to whoever knows it.

Concurrency: the device's.
"""

import fcntl
import logging
import os
import re
from collections.abc import Iterator
from typing import Final
from uuid import UUID

from kvfs import _native
from kvfs.devices.filesystem import pread_all
from kvfs.devices.keeper import MEMORY_VERSION, Keeper, is_memory, prefix_of
from kvfs.devices.memory_label import Label, place_of
from kvfs.devices.osfile import OSFile
from kvfs.errors import DataError

_LABEL: Final = "label"
_PAIR: Final = re.compile(r"(file|sums)-([0-9a-f]{8})-([0-9a-f]{8})\Z")
_RAW: Final = re.compile(r"raw-([0-9a-f]{16})\Z")
_FRAME: Final = re.compile(r"frame-([0-9]{1,8})\Z")
_FIXED_SIZE: Final = fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK
_log = logging.getLogger("kvfs.devices")


class KeptMemory:
    """The keeper's part in one device."""

    def __init__(
        self, keeper: Keeper, uuid: UUID, name: str, slot_count: int, segment_bytes: int
    ) -> None:
        """Open the label that is there, or make one; without a label nothing is found."""
        self._keeper = keeper
        self._prefix = prefix_of(uuid)
        self._name = name
        self._slot_count, self._segment_bytes = slot_count, segment_bytes
        self._frames: set[int] = set()
        self._next_frame = 0
        self._warn_of_others(uuid)
        self.label = self._open_label() or self._make_label()

    def _warn_of_others(self, uuid: UUID) -> None:
        for name in self._keeper.names():
            if is_memory(name) and f".{uuid.hex}." in name and not name.startswith(self._prefix):
                _log.warning(
                    "memory of another version is not used, %s starts empty: found %s, this kvfs "
                    "reads version %d", self._name, name.partition(".")[0], MEMORY_VERSION,
                )  # fmt: skip
                self._keeper.drop_all(f"{name.partition('.')[0]}.{uuid.hex}.")
                return

    def _open_label(self) -> Label | None:
        name = self._prefix + _LABEL
        if name not in self._keeper.names(name):
            return None
        try:
            fd = self._keeper.take(name)
            return Label.open(fd, self._slot_count, self._segment_bytes, self._name)
        except DataError as error:
            _log.warning("memory of the last owner is not used, %s starts empty: %s",
                         self._name, error)  # fmt: skip
            return None

    def _make_label(self) -> Label:
        self._keeper.drop_all(self._prefix)
        label = Label.create(f"kvfs-{self._name}-label", self._slot_count, self._segment_bytes)
        self._keeper.keep(self._prefix + _LABEL, label.fd)
        return label

    # --- what is found

    def found_frames(self) -> Iterator[tuple[int, tuple[int, int], OSFile]]:
        """Yield number, slot and generation, and descriptor of each frame that holds a segment.

        The others are let go.
        """
        places = self.label.places()
        for name in self._keeper.names(self._prefix + "frame-"):
            matched = _FRAME.match(name.removeprefix(self._prefix))
            number = int(matched[1]) if matched else -1
            file = OSFile(self._keeper.take(name))
            is_whole = (
                number in places
                and os.fstat(file.fd).st_size == self._segment_bytes
                and fcntl.fcntl(file.fd, fcntl.F_GET_SEALS) & _FIXED_SIZE == _FIXED_SIZE
            )
            if is_whole:
                self._frames.add(number)
                # No number is used again soon: another owner may have this one's frames.
                self._next_frame = (number + 1) % self._slot_count
                yield number, places.pop(number), file
            else:
                file.close()
                self._keeper.drop(name)
        for number in places:
            self.label.set_place(number, 0)

    def found_files(self) -> Iterator[tuple[tuple[int, int], OSFile, bytes]]:
        """Yield slot and generation, payload and sidecar of each file segment."""
        found: dict[tuple[int, int], set[str]] = {}
        for prefix in ("file-", "sums-"):
            for name in self._keeper.names(self._prefix + prefix):
                if matched := _PAIR.match(name.removeprefix(self._prefix)):
                    pair = int(matched[2], 16), int(matched[3], 16)
                    found.setdefault(pair, set()).add(matched[1])
        for pair, kinds in found.items():
            if len(kinds) < 2:
                self.drop_file(*pair)
                continue
            sums = self._keeper.take(self._file_name("sums", *pair))
            sidecar = pread_all(sums, 0, os.fstat(sums).st_size)
            os.close(sums)
            yield pair, OSFile(self._keeper.take(self._file_name("file", *pair))), sidecar

    def found_raw(self) -> Iterator[tuple[int, OSFile]]:
        """Yield number and descriptor of each raw file."""
        for name in self._keeper.names(self._prefix + "raw-"):
            if matched := _RAW.match(name.removeprefix(self._prefix)):
                yield int(matched[1], 16), OSFile(self._keeper.take(name))

    # --- what is kept

    def keep_frame(self, fd: int) -> int:
        """Keep a frame that holds nothing; return its number."""
        while self._next_frame in self._frames:
            self._next_frame = (self._next_frame + 1) % self._slot_count
        number = self._next_frame
        self._next_frame = (number + 1) % self._slot_count
        self._frames.add(number)
        self._keeper.keep(f"{self._prefix}frame-{number}", fd)
        return number

    def note_frame(self, number: int, slot: int, generation: int) -> None:
        """Note which segment lies in a frame, once its header is written."""
        self.label.set_place(number, place_of(slot, generation))

    def clear_frame(self, number: int) -> None:
        """Note that nothing lies in a frame."""
        self.label.set_place(number, 0)
        self.label.set_tail(number, 0)

    def drop_frame(self, number: int) -> None:
        """Let a frame go."""
        self.clear_frame(number)
        self._keeper.drop(f"{self._prefix}frame-{number}")
        self._frames.discard(number)

    def keep_file(self, slot: int, generation: int, fd: int, sidecar: bytes) -> None:
        """Keep a file segment."""
        sums = _native.memfd(f"kvfs-{self._name}-sums", len(sidecar))
        try:
            OSFile(sums).write(0, sidecar)
            self._keeper.keep(self._file_name("sums", slot, generation), sums)
        finally:
            os.close(sums)
        self._keeper.keep(self._file_name("file", slot, generation), fd)

    def drop_file(self, slot: int, generation: int) -> None:
        """Let a file segment go."""
        self._keeper.drop(self._file_name("file", slot, generation))
        self._keeper.drop(self._file_name("sums", slot, generation))

    def keep_raw(self, number: int, fd: int) -> None:
        """Keep a raw file."""
        self._keeper.keep(f"{self._prefix}raw-{number:016x}", fd)

    def drop_raw(self, number: int) -> None:
        """Let a raw file go."""
        self._keeper.drop(f"{self._prefix}raw-{number:016x}")

    def drop_all(self) -> None:
        """Let go of everything."""
        self._keeper.drop_all(self._prefix)

    def _file_name(self, kind: str, slot: int, generation: int) -> str:
        return f"{self._prefix}{kind}-{slot:08x}-{generation:08x}"
