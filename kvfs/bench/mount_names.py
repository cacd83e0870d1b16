"""Names of a mount: those that are missing, opens of those that are there, a large directory.

Layer: L5.

Against a mount of the same content that is served by plain pyfuse3 handlers, and against a file of
the backing file system. All on tmpfs, one thread, names relative to an open directory. Missing
names are denied by kvfs-core itself, by its filter of names; no denial stays in the kernel's cache.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from itertools import islice
from pathlib import Path
from threading import Event
from typing import Final

from kvfs.bench.figure import Figure, Unit
from kvfs.bench.mounted import (
    CONTEXT,
    FILE,
    NAMESPACE,
    PLAIN,
    SMALL,
    Mounted,
    file_bytes,
    lane_of,
    opened,
    pair,
)
from kvfs.bench.race import Race
from kvfs.bench.session import Session

_NAMES: Final = 100_000
_LOOKUPS: Final = 10_000
_STAT_SHARE: Final = 10
_OPENS: Final = 300
_PROBE_S: Final = 0.05
_PROBES: Final = 200
_BACKING: Final = "backing file"
_MANY: Final = f"{NAMESPACE}/many"


def measure(session: Session) -> Iterator[Figure]:
    """Measure missing names, opens and listings."""
    count = session.scale.share_of(_NAMES)
    with (
        session.tmpfs(5 * file_bytes(session)) as root,
        pair(session, root, count) as (usual, plain),
    ):
        if _has_filter(usual):
            yield from _missing(session, usual, plain)
        else:
            session.leave_out("mount missing names", "kvfs-core answers no lookups here")
        for name in (FILE, CONTEXT, SMALL):
            yield from _opens(session, usual, plain, name)
        yield from _listing(session, usual, plain, count)


def _has_filter(mount: Mounted) -> bool:
    """Wait until the core denies names by itself, which it does soon after the mount."""
    for _ in range(_PROBES):
        os.access(mount.path / "absent", os.F_OK)
        if mount.status()["mount"]["core"].get("lookups_answered", 0):
            return True
        Event().wait(_PROBE_S)
    return False


def _missing(session: Session, usual: Mounted, plain: Mounted) -> Iterator[Figure]:
    count = session.scale.share_of(_LOOKUPS)
    for case in ("first", "repeated"):
        is_new = case == "first"
        race = Race(session, f"mount-names missing {case}", Unit.OPS_PER_S, count,
                    {"core": usual.processes, PLAIN: plain.processes})  # fmt: skip
        with ExitStack() as stack:
            ways = {}
            for way, mount in (("core", usual), (PLAIN, plain)):
                fd = stack.enter_context(opened(mount.path, os.O_DIRECTORY))
                ways[way] = _prober(fd, count, is_new=is_new)
            race.run(ways)
        yield from race.figures("mount missing name", case, "core", {PLAIN: None})


def _prober(directory: int, count: int, *, is_new: bool) -> Callable[[int], None]:
    def probe(turn: int) -> None:
        for number in range(count):
            name = f"none-{turn}-{number}" if is_new else "none"
            assert not os.access(name, os.F_OK, dir_fd=directory), "a name that nobody made"

    return probe


def _opens(session: Session, usual: Mounted, plain: Mounted, name: str) -> Iterator[Figure]:
    """Measure opening and closing one file in the lane that it has."""
    with opened(usual.path / name) as fd:
        lane = lane_of(fd) if name != SMALL else "namespace"
    if name == FILE and lane != "passthrough":
        reason = f"the file is in the {lane} lane; passthrough needs root and Linux 6.9"
        session.leave_out("mount open, passthrough lane", reason)
        return
    paths = {lane: usual.path / name, PLAIN: plain.path / name,
             _BACKING: usual.extents(name)[0][0]}  # fmt: skip
    count = session.scale.share_of(_OPENS)
    race = Race(session, f"mount-names open, {lane}", Unit.OPS_PER_S, count,
                {lane: usual.processes, PLAIN: plain.processes, _BACKING: {}})  # fmt: skip
    with ExitStack() as stack:
        ways = {}
        for way, path in paths.items():
            directory = stack.enter_context(opened(path.parent, os.O_DIRECTORY))
            ways[way] = _opener(directory, path.name, count)
        race.run(ways)
    yield from race.figures("mount open, close", f"{lane} lane", lane,
                            {PLAIN: None, _BACKING: None})  # fmt: skip


def _opener(directory: int, name: str, count: int) -> Callable[[int], None]:
    def open_and_close(_: int) -> None:
        for _ in range(count):
            os.close(os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory))

    return open_and_close


def _listing(session: Session, usual: Mounted, plain: Mounted, count: int) -> Iterator[Figure]:
    few = max(1, count // _STAT_SHARE)
    for what, case, done, list_all in (
        ("scandir", f"{count} names", count, _scan),
        ("scandir and stat", f"the first {few} of {count} names", few, partial(_stat, few)),
    ):
        race = Race(session, f"mount-names {what}", Unit.OPS_PER_S, done,
                    {"core": usual.processes, PLAIN: plain.processes}, passes=1)  # fmt: skip
        race.run({
            way: _lister(list_all, mount.path / _MANY, done)
            for way, mount in (("core", usual), (PLAIN, plain))
        })  # fmt: skip
        yield from race.figures(f"mount {what}", case, "core", {PLAIN: None})


def _lister(function: Callable[[Path], int], path: Path, count: int) -> Callable[[int], None]:
    def list_all(_: int) -> None:
        found = function(path)
        assert found == count, f"{found} names of {count}"

    return list_all


def _scan(path: Path) -> int:
    with os.scandir(path) as entries:
        return sum(1 for _ in entries)


def _stat(count: int, path: Path) -> int:
    with os.scandir(path) as entries:
        found = (entry.stat(follow_symlinks=False) for entry in islice(entries, count))
        return sum(status.st_nlink > 0 for status in found)
