"""What the model of a power cut wants of each kind of medium."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from kvfs import _native

Files = dict[str, bytes]
Blob = tuple[bytes, bytes]  # contents and their digest
Tear = tuple[int, int]  # unit in bytes, seed of what is done in part
Slot = tuple[str, int, int]  # kind, number of what it concerns, position among its kind
Cache = dict[object, Blob]


class Domain(ABC):
    """One medium after some prefix of the journal: what is persisted, and what is pending."""

    @abstractmethod
    def slots(self) -> list[Slot]:
        """Return everything that may have reached the medium or not, in order."""

    @abstractmethod
    def can_tear(self, slot: Slot) -> bool:
        """Say whether it may have reached the medium in part."""

    @abstractmethod
    def files(self, kept: Sequence[Slot], tears: dict[Slot, Tear], cache: Cache) -> dict[str, Blob]:
        """Return what is found if of all slots just `kept` happened, some of them in part.

        `cache` holds contents and digests between calls at one point of the journal.
        """


def blob_of(raw: bytes) -> Blob:
    """Return contents with their digest."""
    return raw, _native.xxh3_128(raw) + len(raw).to_bytes(8, "little")
