"""Run the peers and print the matrix.

Layer: tool.

    make interop                 every peer; sets up what is missing
    make interop PEER=fio        one of them; several with commas
    python -m interop --help     with PYTHONPATH=tools: more to choose
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

from interop import report, venvs
from interop.cases import Case, CaseError, Figures, Peer, Place, Result, Row, UnavailableError
from interop.peers import (
    fio,
    llamacpp,
    lmcache,
    manners,
    mlcommons,
    nixl,
    sglang,
    transformers,
    vllm,
)
from interop.site import Site
from kvfs import __version__

# In the order they run: cheapest first.
PEERS: Final[tuple[Peer, ...]] = (
    manners.PEER, fio.PEER, nixl.PEER, transformers.PEER, lmcache.PEER, sglang.PEER, llamacpp.PEER,
    vllm.PEER, mlcommons.PEER,
)  # fmt: skip


def main() -> int:
    """Run; exit status 1 when a case on the mount failed."""
    arguments = _arguments()
    rows: list[Row] = []
    for peer in PEERS:
        if not arguments.peer or peer.name in arguments.peer:
            for row in _run_peer(peer, arguments):
                rows.append(row)
                sys.stderr.write(f"interop: {row.what}, {row.place}: {row.result}"
                                 f"{row.reason and ': '}{row.reason}\n")  # fmt: skip
    if arguments.json:
        text = json.dumps(report.to_json(rows, __version__), indent=1) + "\n"
        if arguments.json == "-":
            sys.stdout.write(text)
        else:
            Path(arguments.json).write_text(text)
    if arguments.json != "-":
        sys.stdout.write(report.to_text(rows))
    failed = [row for row in rows if row.result is Result.FAILED and row.place != Place.PLAIN]
    return 1 if failed else 0


def _arguments() -> argparse.Namespace:
    names = [peer.name for peer in PEERS]
    parser = argparse.ArgumentParser(prog="interop", description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "--peer", type=lambda text: text.split(",") if text else [], default=[],
        help=f"peers to run, with commas, of {', '.join(names)} (default: all)",
    )  # fmt: skip
    parser.add_argument("--size", type=int, metavar="MIB", help="size of each peer's pool")
    parser.add_argument(
        "--directory", type=Path, help="for pools and plain files (default: TMPDIR)"
    )
    parser.add_argument("--json", metavar="FILE", help="write the matrix as JSON; - for stdout")
    parser.add_argument("--strace", type=Path, metavar="DIR", help="trace the peers' system calls")
    parser.add_argument("--keep", action="store_true", help="leave the temporary directories")
    arguments = parser.parse_args()
    if unknown := set(arguments.peer) - set(names):
        parser.error(f"unknown peer {min(unknown)!r}: expected one of {', '.join(names)}")
    return arguments


def _run_peer(peer: Peer, arguments: argparse.Namespace) -> Iterator[Row]:
    """Run all cases of a peer on a pool of its own, then check the pool."""
    blank = Row(peer.engine, "", "set-up", "", Result.UNAVAILABLE)
    root = Path(tempfile.mkdtemp(prefix=f"kvfs-{peer.name}-", dir=arguments.directory))
    size = arguments.size << 20 if arguments.size else peer.pool_bytes
    site = Site(root, peer.venv, size, strace=arguments.strace)
    try:
        if peer.venv:
            venvs.prepare(peer.venv)
        version = peer.version(site)
    except UnavailableError as error:
        yield replace(blank, reason=str(error))
        return
    blank = replace(blank, version=version)
    try:
        site.create()
        site.mount()
        for case in peer.cases(site):
            yield run_case(case, blank)
        site.unmount()
    except CaseError as error:
        yield replace(blank, what="mount", result=Result.FAILED, reason=str(error))
    else:
        yield run_case(Case("kvfs-admin check --data, after all", Place.MOUNT, site.check), blank)
    finally:
        site.abandon()
        if arguments.keep:
            sys.stderr.write(f"interop: left {root}\n")
        else:
            shutil.rmtree(root, ignore_errors=True)


def run_case(case: Case, blank: Row) -> Row:
    """Run a case; whatever comes of it is a row."""
    row = replace(blank, what=case.what, place=case.place)
    start = time.monotonic()
    try:
        figures: Figures = case.run()
    except CaseError as error:
        return replace(row, result=Result.FAILED, reason=str(error))
    except UnavailableError as error:
        return replace(row, reason=str(error))
    if "seconds" not in figures:
        figures = {**figures, "seconds": round(time.monotonic() - start, 1)}
    return replace(row, result=Result.OK, figures=figures)


if __name__ == "__main__":
    sys.exit(main())
