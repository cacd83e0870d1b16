"""An independent model of a pool: what may be there after a crash, and what must.

It knows nothing of segments, logs or tables. Time is the position in the journal: an operation
that began at `begin` may have had any part of its effect at a crash at `k >= begin`; one that was
acknowledged as durable at `end` must have had all of it at `k >= end`.

- A block is named by its key, and its bytes never change. It must be there if it was acknowledged
  and not released since; whatever is there must have been offered, with these very bytes.
- A name has a history of values. Legal at a crash are the newest value acknowledged as durable
  and every value begun since; and nothing, if the last copy that stays was evicted.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field


class OracleError(AssertionError):
    """The pool holds what it must not, or lacks what it must have."""


@dataclass(frozen=True, slots=True)
class ContextValue:
    """A context made through the API."""

    keys: tuple[bytes, ...]
    tokens: tuple[int, ...] | None = None
    is_pinned: bool = False


@dataclass(frozen=True, slots=True)
class FileValue:
    """A file made through the mount: whole or absent."""

    content: bytes


@dataclass(frozen=True, slots=True)
class NamespaceValue:
    """A namespace, by its id and retention."""

    namespace_id: int
    retention: str


Value = ContextValue | FileValue | NamespaceValue | None
Path = tuple[str, str]  # namespace and path inside it; an empty path is the namespace itself


@dataclass(slots=True)
class _Block:
    payload: bytes
    offered: int
    promises: list[tuple[int, bool]] = field(default_factory=list)  # (when, must be there)


@dataclass(slots=True)
class _Version:
    value: Value
    begin: int
    durable: int | None = None
    evicted: int | None = None


@dataclass(frozen=True, slots=True)
class _Move:
    begin: int
    source: Path
    target: Path
    value: Value


@dataclass(slots=True)
class Oracle:
    """The model of one pool."""

    blocks: dict[bytes, _Block] = field(default_factory=dict)
    names: dict[Path, list[_Version]] = field(default_factory=dict)
    renames: list["_Move"] = field(default_factory=list)

    # --- what happens

    def offer(self, key: bytes, payload: bytes, begin: int) -> None:
        """A put of this block has begun."""
        known = self.blocks.setdefault(key, _Block(payload, begin))
        assert known.payload == payload, "a test must not offer two payloads for one key"

    def promise(self, keys: Iterable[bytes], end: int) -> None:
        """These blocks were acknowledged as durable."""
        for key in keys:
            self.blocks[key].promises.append((end, True))

    def release(self, keys: Iterable[bytes], begin: int) -> None:
        """An operation that may drop these blocks has begun."""
        for key in keys:
            if key in self.blocks:
                self.blocks[key].promises.append((begin, False))

    def assign(self, path: Path, value: Value, begin: int) -> None:
        """A change of a name has begun."""
        self.names.setdefault(path, [_Version(None, -1, -1)]).append(_Version(value, begin))

    def rename(self, source: Path, target: Path, begin: int) -> None:
        """A name moves, at once."""
        value = self.value(source)
        self.assign(source, None, begin)
        self.assign(target, value, begin)
        self.renames.append(_Move(begin, source, target, value))

    def settle_names(self, end: int) -> None:
        """All changes of names so far were acknowledged as durable."""
        for versions in self.names.values():
            for version in versions:
                if version.durable is None:
                    version.durable = end

    def evict(self, path: Path, begin: int) -> None:
        """What the name means may be gone after a crash: it has no copy that stays any more."""
        version = self.names[path][-1]
        if version.evicted is None:
            version.evicted = begin

    def value(self, path: Path) -> Value:
        """Return what the name is now, without a crash."""
        return self.names[path][-1].value if path in self.names else None

    def restart(self, found: Iterable[bytes], names: dict[Path, Value]) -> None:
        """Start again from what a recovery found, at position 0: found is durable."""
        there = set(found)
        for key, block in self.blocks.items():
            block.offered = 0
            block.promises = [(0, key in there)]
        self.names = {path: [_Version(value, 0, 0)] for path, value in names.items()}
        self.renames.clear()

    # --- what must hold after a crash at k

    def required(self, k: int) -> set[bytes]:
        """Return the blocks that must be there."""
        found = set()
        for key, block in self.blocks.items():
            last = [is_there for when, is_there in block.promises if when <= k]
            if last and last[-1]:
                found.add(key)
        return found

    def legal_values(self, path: Path, k: int) -> list[Value]:
        """Return every value the name may have."""
        versions = [v for v in self.names.get(path, []) if v.begin <= k]
        if not versions:
            return [None]
        durable = [i for i, v in enumerate(versions) if v.durable is not None and v.durable <= k]
        legal = versions[durable[-1] :]
        is_gone = any(v.evicted is not None and v.evicted <= k for v in legal)
        return [*(v.value for v in legal), *([None] if is_gone else [])]

    def check_blocks(self, found: dict[bytes, bytes], k: int) -> None:
        """Compare the blocks that could be read with the model."""
        for key, payload in found.items():
            block = self.blocks.get(key)
            if block is None or block.offered > k:
                raise OracleError(f"phantom block: {key.hex()}: it was never written")
            if payload != block.payload:
                raise OracleError(
                    f"wrong bytes: {key.hex()}: {len(payload)} of {len(block.payload)} bytes, "
                    f"first difference at {_difference(payload, block.payload)}"
                )
        missing = self.required(k) - found.keys()
        if missing:
            raise OracleError(
                f"{len(missing)} acknowledged blocks lost: first {min(missing).hex()}"
            )

    def check_names(self, found: dict[Path, Value], k: int) -> None:
        """Compare all names that are there with the model."""
        for path in self.names.keys() | found.keys():
            legal = self.legal_values(path, k)
            value = found.get(path)
            if value not in legal:
                raise OracleError(
                    f"name {path}: found {_show(value)}, legal are {[_show(v) for v in legal]}"
                )
        for move in self.renames:
            if move.begin <= k:
                self._check_rename(found, move, k)

    def _check_rename(self, found: dict[Path, Value], move: "_Move", k: int) -> None:
        """Both names, or none, is wrong, as long as nothing else happened to either since."""
        for path in (move.source, move.target):
            if [v for v in self.names[path] if v.begin <= k][-1].begin != move.begin:
                return
        has_source = found.get(move.source) == move.value
        has_target = found.get(move.target) == move.value
        is_durable = any(
            v.value == move.value and v.durable is not None and v.durable <= k
            for v in self.names[move.source]
        )
        if (has_source and has_target) or (is_durable and not has_source and not has_target):
            raise OracleError(f"renaming is not atomic: {move.source} to {move.target}")


def _difference(a: bytes, b: bytes) -> int:
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


def _show(value: Value) -> str:
    if isinstance(value, ContextValue):
        return f"context of {len(value.keys)} blocks{', pinned' if value.is_pinned else ''}"
    if isinstance(value, FileValue):
        return f"file of {len(value.content)} bytes"
    if isinstance(value, NamespaceValue):
        return f"namespace {value.namespace_id:#x} {value.retention}"
    return "nothing"
