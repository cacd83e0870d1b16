"""fio with verification: its engines, buffered and direct, in order and at random.

Layer: tool.

A case writes with checksums in every block and reads them back in the same run. `after a remount`
cases read in a second process what a first one wrote, with the mount's process replaced in between.
"""

import json
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from interop.cases import Case, CaseError, Figures, Peer, Place, UnavailableError
from interop.site import Site

_SIZE: Final = "64m"
_COMMON: Final = ("--verify=xxhash", "--verify_fatal=1", "--randseed=7", "--output-format=json",
                  "--group_reporting", f"--size={_SIZE}")  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Job:
    """A name, fio's options, and whether a second process verifies it after a remount."""

    name: str
    options: tuple[str, ...]
    is_remounted: bool = False


def _job(name: str, options: str, *, is_remounted: bool = False) -> _Job:
    return _Job(name, tuple(f"--{option}" for option in options.split()), is_remounted)


_JOBS: Final = (
    _job("psync write 1M, buffered", "ioengine=psync rw=write bs=1m"),
    _job("psync write 4k, buffered", "ioengine=psync rw=write bs=4k size=16m"),
    _job("psync randwrite 4k, buffered", "ioengine=psync rw=randwrite bs=4k size=16m"),
    _job("psync randwrite 64k, buffered", "ioengine=psync rw=randwrite bs=64k"),
    _job("psync write 1M, O_DIRECT", "ioengine=psync rw=write bs=1m direct=1"),
    _job("psync randwrite 4k, O_DIRECT", "ioengine=psync rw=randwrite bs=4k direct=1 size=16m"),
    _job("psync randwrite 512, O_DIRECT", "ioengine=psync rw=randwrite bs=512 direct=1 size=1m"),
    _job("psync randrw 16k, buffered", "ioengine=psync rw=randrw bs=16k size=32m"),
    _job("psync write 64k, fsync each 16", "ioengine=psync rw=write bs=64k fsync=16 size=32m"),
    _job("psync write 64k, O_SYNC", "ioengine=psync rw=write bs=64k sync=1 size=16m"),
    _job("pvsync2 write 256k, O_DIRECT", "ioengine=pvsync2 rw=write bs=256k direct=1"),
    _job("io_uring write 1M x8, buffered", "ioengine=io_uring iodepth=8 rw=write bs=1m"),
    _job("io_uring randwrite 16k x16, O_DIRECT",
         "ioengine=io_uring iodepth=16 rw=randwrite bs=16k direct=1 size=32m"),
    _job("io_uring randwrite 16k x16, O_DIRECT, fixed buffers and files",
         "ioengine=io_uring iodepth=16 rw=randwrite bs=16k direct=1 size=32m fixedbufs "
         "registerfiles"),
    _job("libaio write 1M x8, O_DIRECT", "ioengine=libaio iodepth=8 rw=write bs=1m direct=1"),
    _job("mmap write 1M", "ioengine=mmap rw=write bs=1m"),
    _job("mmap randwrite 4k", "ioengine=mmap rw=randwrite bs=4k size=16m"),
    _job("psync, fallocate first", "ioengine=psync rw=write bs=1m fallocate=posix"),
    _job("psync, file extended first", "ioengine=psync rw=randwrite bs=64k overwrite=1"),
    _job("psync, 64 files x 256k, 2 processes",
         "ioengine=psync rw=write bs=64k nrfiles=64 filesize=256k size=16m numjobs=2 "
         "openfiles=16"),
    _job("psync write 1M, verified after a remount", "ioengine=psync rw=write bs=1m",
         is_remounted=True),
    _job("io_uring randwrite 64k O_DIRECT, verified after a remount",
         "ioengine=io_uring iodepth=8 rw=randwrite bs=64k direct=1", is_remounted=True),
)  # fmt: skip


def _version(_: Site) -> str:
    if shutil.which("fio") is None:
        raise UnavailableError("fio is not installed: apt-get install fio")
    done = subprocess.run(["fio", "--version"], check=False, capture_output=True, text=True)
    return done.stdout.strip().removeprefix("fio-")


def _cases(site: Site) -> Iterator[Case]:
    for number, job in enumerate(_JOBS):
        for place in Place:
            yield Case(job.name, place, partial(_run, site, place, job, number))


def _run(site: Site, place: Place, job: _Job, number: int) -> Figures:
    directory = site.directory(place, f"fio-{number}")
    if not job.is_remounted:
        figures = _fio(site, directory, job, "--do_verify=1")
        shutil.rmtree(directory)
        return figures
    _fio(site, directory, job, "--do_verify=0")
    if place is Place.MOUNT:
        site.remount()
    return _fio(site, directory, job, "--verify_only=1")


def _fio(site: Site, directory: Path, job: _Job, *extra: str) -> Figures:
    command = ("fio", "--name=t", f"--directory={directory}", *_COMMON, *job.options, *extra)
    printed = site.run(*command)
    # fio writes notes before the JSON, and an error may come with exit status 0.
    report: dict[str, Any] = json.loads(printed[printed.index("{\n") :])
    (result,) = report["jobs"]
    if result["error"]:
        raise CaseError(f"fio: error {result['error']}")
    return {
        f"{kind} MiB/s": round(result[kind]["bw_bytes"] / 2**20, 1)
        for kind in ("write", "read")
        if result[kind]["bw_bytes"]
    }


PEER: Final = Peer("fio", "fio", "", _version, _cases)
