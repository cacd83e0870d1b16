"""What a power cut may leave of mapped memory that stays.

The model is weaker than any persistent memory, so that what survives here survives there:

- The processor writes a cache line of 64 bytes to the medium whenever it likes, asked to or not:
  each line that was stored to is found as it was after any of its stores, whatever other lines are
  found like. Of the next store any of its aligned 8 bytes may be there, too, the others not.
- A fence persists lines as they were when they were last written back, and what was streamed past
  the caches. Nothing else does.
- Of a file in place of such memory a fence persists nothing, and fdatasync all. One that fails has
  written some lines, and takes the others for written until somebody stores to their page again.

The pages that are not zero are the "files", by their offset.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from kvfs.units import PAGE
from tests.crash.domain import Blob, Cache, Domain, Files, Slot, Tear, blob_of
from tests.crash.events import (
    FailedSync,
    Fence,
    FileEvent,
    MemoryEvent,
    Store,
    Sync,
    WriteBack,
)

LINE = 64
_WORD = 8
_WORDS = LINE // _WORD
_ZEROS = bytes(LINE)
_EMPTY_PAGE = bytes(PAGE)


@dataclass(slots=True)
class Pending:
    """A line that was stored to since it was last persisted.

    Attributes:
        versions: What it was after each store.
        leaving: So many of them the next fence persists.
    """

    versions: list[bytes] = field(default_factory=list)
    leaving: int = 0


@dataclass(slots=True)
class MemoryState(Domain):
    """One mapped device.

    Attributes:
        pages: What is persisted, by number.
        named: The same, by name.
        pending: Lines that are not, by number.
        stale: What lines are in memory that a failed sync took for written, by number.
        is_file: It is a file in place of such memory.
    """

    pages: dict[int, Blob] = field(default_factory=dict)
    named: dict[str, Blob] = field(default_factory=dict)
    pending: dict[int, Pending] = field(default_factory=dict)
    stale: dict[int, bytes] = field(default_factory=dict)
    is_file: bool = False

    @classmethod
    def of(cls, files: Files, *, is_file: bool = False) -> "MemoryState":
        """Start from pages that are all persisted."""
        named = {path: blob_of(raw) for path, raw in files.items()}
        return cls({page_of(path): blob for path, blob in named.items()}, named, is_file=is_file)

    def apply(self, event: MemoryEvent | FileEvent) -> None:
        """Advance by one event."""
        if isinstance(event, Store):
            self._store(event)
        elif isinstance(event, WriteBack):
            for number in _lines(event.offset, event.nbytes):
                line = self.pending.get(number)
                if line is not None:
                    line.leaving = len(line.versions)
        elif isinstance(event, Fence):
            if not self.is_file:
                self._settle()
        else:
            assert isinstance(event, (Sync, FailedSync)), "memory has no files"
            kept = event.kept if isinstance(event, FailedSync) else self.pending
            for number in list(self.pending):
                line = self.pending[number]
                if number in kept:
                    line.leaving = len(line.versions)
                else:
                    self.stale[number] = line.versions[-1]
                    del self.pending[number]
            self._settle()

    def _store(self, event: Store) -> None:
        if self.stale:
            self._dirty(range(event.offset // PAGE, -(-(event.offset + len(event.data)) // PAGE)))
        for number in _lines(event.offset, len(event.data)):
            line = self.pending.get(number)
            before = self._persisted(number) if line is None else line.versions[-1]
            start = number * LINE - event.offset
            part = event.data[max(0, start) : start + LINE]
            after = before[: max(0, -start)] + part
            after += before[len(after) :]
            if after != before:
                line = self.pending.setdefault(number, Pending())
                line.versions.append(after)
                if event.is_streamed:
                    line.leaving = len(line.versions)

    def _dirty(self, pages: range) -> None:
        """What a failed sync left of these pages is to be written again."""
        for number in [n for n in self.stale if n * LINE // PAGE in pages]:
            self.pending.setdefault(number, Pending()).versions.append(self.stale.pop(number))

    def _settle(self) -> None:
        done = {n: line for n, line in self.pending.items() if line.leaving}
        pages: dict[int, bytearray] = {}
        for number, line in done.items():
            self._put(pages, number, line.versions[line.leaving - 1])
            del line.versions[: line.leaving]
            line.leaving = 0
            if not line.versions:
                del self.pending[number]
        for page, raw in pages.items():
            if raw == _EMPTY_PAGE:
                self.pages.pop(page, None)
                self.named.pop(path_of(page), None)
            else:
                self.pages[page] = self.named[path_of(page)] = blob_of(bytes(raw))

    def _persisted(self, number: int) -> bytes:
        found = self.pages.get(number * LINE // PAGE)
        start = number * LINE % PAGE
        return _ZEROS if found is None else found[0][start : start + LINE]

    def _put(self, pages: dict[int, bytearray], number: int, content: bytes) -> None:
        """Put a line into copies of the pages."""
        page, start = number * LINE // PAGE, number * LINE % PAGE
        if page not in pages:
            found = self.pages.get(page)
            pages[page] = bytearray(_EMPTY_PAGE if found is None else found[0])
        pages[page][start : start + LINE] = content

    # --- Domain

    def slots(self) -> list[Slot]:
        """Return every line that may be found newer than it was persisted."""
        return [("line", number, 0) for number in sorted(self.pending)]

    def can_tear(self, slot: Slot) -> bool:
        """Every line may be found as it was between two stores, or within one."""
        return bool(slot)

    def files(self, kept: Sequence[Slot], tears: dict[Slot, Tear], cache: Cache) -> dict[str, Blob]:
        """Return the pages that are not zero."""
        del cache
        files = dict(self.named)
        pages: dict[int, bytearray] = {}
        for slot in kept:
            versions = self.pending[slot[1]].versions
            content = versions[-1]
            if slot in tears:
                content = _torn(self._persisted(slot[1]), versions, tears[slot][1])
            self._put(pages, slot[1], content)
        for page, raw in pages.items():
            if raw == _EMPTY_PAGE:
                files.pop(path_of(page), None)
            else:
                files[path_of(page)] = blob_of(bytes(raw))
        return files


def path_of(page: int) -> str:
    """Return the name of a page in an image."""
    return f"{page:08x}"


def page_of(path: str) -> int:
    """Return the number of a page of an image."""
    return int(path, 16)


def _lines(offset: int, nbytes: int) -> range:
    return range(offset // LINE, -(-(offset + nbytes) // LINE))


def _torn(persisted: bytes, versions: Sequence[bytes], seed: int) -> bytes:
    """Return what a line was between two of its stores, or with some words of the second."""
    seed, words = divmod(seed, 1 << _WORDS)
    seed, is_between = divmod(seed, 2)
    done = seed % len(versions)
    if is_between:
        words = 0
    line = bytearray(versions[done - 1] if done else persisted)
    for word in range(_WORDS):
        if words >> word & 1:
            part = slice(word * _WORD, (word + 1) * _WORD)
            line[part] = versions[done][part]
    return bytes(line)
