"""Chains of requests, their contexts in the pool, and what may be asked of them.

Layer: L5, without vLLM.

- A finished request leaves a context: `requests/ID`, or `requests/SESSION` if the request names a
  session. A later request of a session extends its context, or replaces it where it differs.
- Contexts are names only: the blocks are those of the tier, and stay when a name goes.
- The KV cache groups of a hybrid model have a chain each: further ones are called ID.g1, ID.g2.
"""

import re
import threading
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Final

import numpy as np

from kvfs.connectors.vllm_metrics import Counts
from kvfs.connectors.vllm_pool import PoolLink, block_keys
from kvfs.errors import NotFoundError
from kvfs.keys import KeyArray
from kvfs.namespace import Namespace
from kvfs.phase import PhaseName

Chain = tuple[bytes, ...]
PREFILL: Final = "prefill"
DECODE: Final = "decode"
PhaseOf = Callable[[bytes], PhaseName | None]
_GROUP_BYTES: Final = 4
_PART_BYTES: Final = 120
_PARTS_MAX: Final = 8


class Chains:
    """The keys of one request in order of their tokens, for each KV cache group.

    Fed with all of a request's positions again and again, it looks at the new ones alone.

    vLLM names the chunks of a prompt before it runs it, and further ones as their tokens are made:
    what is known when `end_prompt` is called is the prompt's, and all beyond is decoded.
    """

    def __init__(self) -> None:
        self._groups: dict[int, list[tuple[int, bytes]]] = {}
        self._end_of: dict[bytes, int] = {}
        self._prompt_end: int | None = None

    def update(self, positions: Mapping[bytes, int]) -> None:
        """Take keys that came since the last call; `positions` only grows, in order of arrival."""
        for key, end in islice(positions.items(), len(self._end_of), None):
            self._end_of[key] = end
            insort(self._groups.setdefault(_group_of(key), []), (end, key))

    def end_prompt(self) -> None:
        """Take what came so far for the whole prompt; the first call counts."""
        if self._prompt_end is None:
            self._prompt_end = max(self._end_of.values(), default=0)

    def phase_of(self, key: bytes) -> PhaseName | None:
        """Return what a chunk is accessed for: "decode" if it holds tokens beyond the prompt.

        None for a key whose position is not known.
        """
        end = self._end_of.get(key)
        if end is None:
            return None
        return PREFILL if self._prompt_end is None or end <= self._prompt_end else DECODE

    def end_of(self, key: bytes) -> int:
        """Return the position of a key's last token, 0 if it is not known."""
        return self._end_of.get(key, 0)

    def parent(self, key: bytes) -> bytes | None:
        """Return the key before, or None for the first, or one that is not known."""
        if key not in self._end_of:
            return None
        chain = self._groups[_group_of(key)]
        at = bisect_left(chain, (self._end_of[key], key))
        return chain[at - 1][1] if at else None

    def by_group(self) -> dict[int, Chain]:
        """Return all chains."""
        return {
            group: tuple(key for _, key in chain) for group, chain in sorted(self._groups.items())
        }


def by_phase(keys: Sequence[bytes], phase_of: PhaseOf) -> dict[PhaseName | None, list[int]]:
    """Return the positions of keys, by what they are accessed for."""
    positions: dict[PhaseName | None, list[int]] = {}
    for at, key in enumerate(keys):
        positions.setdefault(phase_of(key), []).append(at)
    return positions


def _group_of(key: bytes) -> int:
    return int.from_bytes(key[-_GROUP_BYTES:], "big")


def context_name(directory: str, name: str, group: int = 0) -> str:
    """Return the path of a context; what cannot be in a path becomes an underscore."""
    parts = [
        re.sub(r"[\x00-\x1f\x7f]", "_", part)
        .encode(errors="replace")[:_PART_BYTES]
        .decode(errors="ignore")
        for part in name.split("/")
        if part not in ("", ".", "..")
    ]
    path = "/".join([directory, *(parts[:_PARTS_MAX] or ["_"])])
    return f"{path}.g{group}" if group else path


class Contexts:
    """The contexts that one tier writes. One thread calls `record`; the rest is thread-safe."""

    def __init__(self, link: PoolLink, counts: Counts, directory: str, limit: int) -> None:
        self._link, self._counts = link, counts
        self._directory, self._limit = directory.strip("/"), limit
        self._names: OrderedDict[str, None] | None = None
        self._stopped = threading.Event()

    def record(
        self, name: str, chains: Mapping[int, Chain], phase_of: PhaseOf, *, pin: bool
    ) -> None:
        """Note that a finished request used its leading blocks that are stored, and name them.

        vLLM does not tell a tier of what it found in faster memory: this is when kvfs hears of it.
        """
        space = self._link.namespace()
        if space is None:
            return
        for group, chain in chains.items():
            path = context_name(self._directory, name, group)
            try:
                keys = block_keys(space.info.namespace_id, chain)
                keys = keys[: space.match_prefix(keys)]
                for phase, at in by_phase(chain[: len(keys)], phase_of).items():
                    space.touch(keys[at], phase=phase)
                if self._limit and len(keys):
                    self._write(space, path, keys, pin=pin)
                    self._counts.add("contexts")
                    self._bound(space, path)
            except Exception as error:  # noqa: BLE001 - names are a help, not a need
                self._counts.failed("writing a context", error)

    def pin(self, name: str, *, pinned: bool) -> None:
        """Pin or unpin the context of a session; one that is not there is left alone."""
        space = self._link.namespace()
        if space is not None:
            try:
                context = space.context(context_name(self._directory, name), create=False)
                (context.pin if pinned else context.unpin)()
                self._counts.add("hints")
            except NotFoundError:
                self._counts.add("ignored_hints")
            except Exception as error:  # noqa: BLE001 - hints are hints
                self._counts.failed("pinning a context", error)

    def prefetch(self, name: str) -> None:
        """Note that a session is about to go on, and read its blocks once.

        That keeps them from eviction, and leaves them in the page cache, for what lies on disk.
        """
        space = self._link.namespace()
        if space is not None:
            try:
                keys = space.context(context_name(self._directory, name), create=False).keys
                space.touch(keys, phase=PREFILL)
                room = np.empty((1, space.layout.stride), np.uint8)
                for at in range(len(keys)):
                    part = keys[at : at + 1]
                    if (
                        self._stopped.is_set()
                        or not space.read_into(part, room, phase="background")[0]
                    ):
                        break
                self._counts.add("hints")
            except NotFoundError:
                self._counts.add("ignored_hints")
            except Exception as error:  # noqa: BLE001 - hints are hints
                self._counts.failed("prefetching a context", error)

    def touch(self, keys: Sequence[bytes], phase: PhaseName | None) -> None:
        """Note an access to blocks."""
        space = self._link.namespace()
        if space is not None:
            try:
                space.touch(block_keys(space.info.namespace_id, keys), phase=phase)
            except Exception as error:  # noqa: BLE001 - a note is not worth more
                self._counts.failed("noting an access", error)

    def stop(self) -> None:
        """End a prefetch that is running; from any thread."""
        self._stopped.set()

    def _write(self, space: Namespace, path: str, keys: KeyArray, *, pin: bool) -> None:
        context = space.context(path)
        former = context.keys
        common = min(len(former), len(keys))
        is_same = bool((former[:common] == keys[:common]).all())
        if not is_same:  # another conversation under the same name; a pin was put on the name
            pin = pin or context.node.is_pinned
            context.drop()
            context, common = space.context(path), 0
        if common < len(keys):
            context.link(keys[common:])
        if pin:
            context.pin()

    def _bound(self, space: Namespace, path: str) -> None:
        """Drop the oldest contexts beyond the limit; pinned ones stay and do not count."""
        if self._names is None:
            mine = [c for c in space.contexts() if c.name.startswith(f"{self._directory}/")]
            mine.sort(key=lambda context: context.node.mtime_ns)
            self._names = OrderedDict((context.name, None) for context in mine)
        self._names[path] = None
        self._names.move_to_end(path)
        while len(self._names) > self._limit:
            oldest, _ = self._names.popitem(last=False)
            try:
                context = space.context(oldest, create=False)
                if not context.node.is_pinned:
                    context.drop()
            except NotFoundError:
                continue
