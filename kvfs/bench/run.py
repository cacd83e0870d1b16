"""`kvfs bench`: arguments, the list of benches, one run.

Layer: L5.
"""

import argparse
import contextlib
import json
import signal
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kvfs.errors import UsageError
from kvfs.units import GIB, MIB, parse_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvfs.bench.figure import Figure
    from kvfs.bench.session import Session

REPEATS: Final = 5
SIZE_BYTES: Final = GIB
BLOCKS: Final = 1_000_000
QUICK_REPEATS: Final = 3
QUICK_SIZE_BYTES: Final = 256 * MIB
QUICK_BLOCKS: Final = 20_000
SIZE_BYTES_MIN: Final = 16 * MIB
BLOCKS_MIN: Final = 1000
NAMES: Final = {
    "put": "put into memory against plain copies",
    "put-directory": "put into files against pwrite, on tmpfs and on disk",
    "read": "read_into against plain copies",
    "view": "opening a view, and a sum through it against an ordinary mmap",
    "lookup": "lookup and match_prefix in batches of 1,000 keys",
    "clients": "other processes on the pool: lookup, put, read_into; the owner's share",
    "reopen": "opening a pool of small blocks whose owner was killed",
    "devices-file": "direct I/O of a directory device against fio",
    "devices-memory": "payloads in and out of memory devices against plain copies",
    "devices-reopen": "reopening on tmpfs, and on disk with the page cache dropped",
    "mount-file": "reading one whole file of the mount against the file behind it",
    "mount-context": "reading scattered blocks of the mount against plain pyfuse3",
    "mount-random": "reading 4 KiB at random in every lane against plain pyfuse3",
    "mount-write": "writing files of the mount against the file system behind it",
    "mount-names": "missing names, opens and listings of the mount",
    "mount-cache": "page cache that reading through the mount takes",
}
GROUPS: Final = {
    group: tuple(name for name in NAMES if name.startswith(f"{group}-"))
    for group in ("devices", "mount")
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `kvfs bench`."""
    known = "; ".join(f"{name}: {text}" for name, text in NAMES.items())
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help=f"what to measure (all). {known}; devices, mount: all of them",
    )
    parser.add_argument("--repeats", type=int, metavar="N", help=f"samples per figure ({REPEATS})")
    parser.add_argument("--size", metavar="SIZE", help="bytes that a repeat moves (1GiB)")
    parser.add_argument(
        "--blocks", type=int, metavar="N", help=f"small blocks for lookup and reopen ({BLOCKS})"
    )
    parser.add_argument(
        "--directory", type=Path, metavar="PATH",
        help="where files on disk go (the system's directory for temporary files)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--quick", action="store_true", help="small and short: a smoke test")


def main(arguments: argparse.Namespace) -> int:
    """Run the benches named, all if none is; print the report on stdout, progress on stderr.

    Returns 0, goals met or not: figures of a busy machine are no verdict. KeyboardInterrupt is
    raised again once what was measured until then is printed.

    Raises:
        UsageError: A name or a number is wrong.
    """
    from kvfs.bench.report import Report, this_machine
    from kvfs.bench.session import Progress, Scale, Session, SkipError

    benches = _benches()
    names: list[str] = []
    for name in arguments.names or benches:
        if name not in benches and name not in GROUPS:
            known = ", ".join([*benches, *GROUPS])
            raise UsageError(f"unknown bench {name!r}: expected one of {known}")
        names += GROUPS.get(name, (name,))
    size_bytes, blocks, repeats = _amounts(arguments)
    directory = arguments.directory or Path(tempfile.gettempdir())
    if not directory.is_dir():
        raise UsageError(f"no such directory: {directory}; make it first")
    scale = Scale(size_bytes, blocks, repeats, directory)
    report = Report(this_machine(), scale)
    progress = Progress(sys.stderr, is_json=arguments.json)
    is_interrupted = False
    with _ended_by_sigterm(), Session(scale, progress) as session:
        for name in names:
            try:
                report.figures.extend(benches[name](session))
            except SkipError as reason:
                report.skipped.append((name, str(reason)))
            except KeyboardInterrupt:
                report.skipped.append((name, "interrupted"))
                is_interrupted = True
                break
        report.skipped.extend(session.left_out)
    progress.clear()
    print(json.dumps(report.to_json(), indent=1) if arguments.json else report.to_text())
    if is_interrupted:
        raise KeyboardInterrupt
    return 0


@contextlib.contextmanager
def _ended_by_sigterm() -> "Iterator[None]":
    """Let SIGTERM end the bench as Ctrl-C does: it unmounts and removes what it made."""
    former = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


def _amounts(arguments: argparse.Namespace) -> tuple[int, int, int]:
    """Return bytes, blocks and repeats: as given, or as usual."""
    quick = arguments.quick
    size_bytes = QUICK_SIZE_BYTES if quick else SIZE_BYTES
    if arguments.size is not None:
        size_bytes = parse_bytes(arguments.size)
    blocks = arguments.blocks or (QUICK_BLOCKS if quick else BLOCKS)
    repeats = arguments.repeats or (QUICK_REPEATS if quick else REPEATS)
    if size_bytes < SIZE_BYTES_MIN or blocks < BLOCKS_MIN or repeats < 1:
        raise UsageError("a bench needs at least --size 16MiB, --blocks 1000 and --repeats 1")
    return size_bytes, blocks, repeats


def _benches() -> "dict[str, Callable[[Session], Iterator[Figure]]]":
    """Import what measures; `--help` must not wait for it."""
    from kvfs.bench import (
        clients,
        devices,
        directory,
        lookup,
        mount_names,
        mount_random,
        mount_read,
        mount_write,
        put,
        read,
        reopen,
        view,
    )

    return {
        "put": put.measure,
        "put-directory": directory.measure,
        "read": read.measure,
        "view": view.measure,
        "lookup": lookup.measure,
        "clients": clients.measure,
        "reopen": reopen.measure,
        "devices-file": devices.measure_file,
        "devices-memory": devices.measure_memory,
        "devices-reopen": devices.measure_reopen,
        "mount-file": mount_read.measure_file,
        "mount-context": mount_read.measure_context,
        "mount-random": mount_random.measure,
        "mount-write": mount_write.measure,
        "mount-names": mount_names.measure,
        "mount-cache": mount_read.measure_cache,
    }
