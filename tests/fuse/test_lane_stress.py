"""Readers, mappers and rewriters at once: each sees one whole version of a file, or is told.

ESTALE says that a file was replaced since it was opened. A map of a file that is truncated under it
ends with SIGBUS, as on any filesystem; so what is mapped here is not truncated.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fuse.mounting import MIB, MountedPool, sh, write_file

pytestmark = pytest.mark.fuse
SIZES = {"tiny": 5000, "small": 3 * MIB, "large": 6 * MIB + 4321}

WORKER = """
import errno, mmap, os, random, sys, time
what, path, seed, seconds = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
sizes = eval(sys.argv[5])
MAPPED = "large"
rng, end, done = random.Random(seed), time.monotonic() + seconds, 0
# Being written for the first time; evicted; replaced since it was opened.
BUSY = (errno.EBUSY, errno.ENOENT, errno.ESTALE)

def content(version, nbytes):
    return (version.to_bytes(8, "little") * (nbytes // 8 + 1))[:nbytes]

def write(name, version):
    way = rng.choice(["rename", "in place"] + ["truncate"] * (name != MAPPED))
    data = content(version, sizes[name])
    target = f"{path}/{name}" if way != "rename" else f"{path}/new-{seed}"
    flags = os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if way != "in place" else 0)
    fd = os.open(target, flags, 0o644)
    try:
        assert os.write(fd, data) == len(data)
    finally:
        os.close(fd)
    if way == "rename":
        os.rename(target, f"{path}/{name}")

def check(data, name, offset=0):
    words = {bytes(data[i : i + 8]) for i in range(-offset % 8, len(data) - 7, 8)}
    assert len(words) <= 1, f"{name}: a mixture: {words} of {len(data)} at {offset}"

def read(name):
    fd = os.open(f"{path}/{name}", os.O_RDONLY)
    try:
        if name == MAPPED and rng.random() < 0.6:
            try:
                with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as mapped:
                    check(mapped[:4096], name)
            except OSError as error:
                if error.errno != errno.ENODEV:  # opened past the page cache: another has its own
                    raise
        first = os.pread(fd, 8, 0)
        for _ in range(rng.randrange(6)):
            offset = rng.randrange(sizes[name])
            data = os.pread(fd, rng.randrange(1, 1 << 20), offset)
            check(data, name, offset)
            low = -offset % 8
            if len(first) == 8 and len(data) >= low + 8:
                assert data[low : low + 8] == first, f"{name}: another version"
    finally:
        os.close(fd)

while time.monotonic() < end:
    name = rng.choice(list(sizes))
    try:
        write(name, rng.randrange(1 << 40)) if what == "write" else read(name)
        done += 1
    except OSError as error:
        if error.errno not in BUSY:
            raise
print(done)
"""


def run(path: Path, seconds: float) -> None:
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, what, path, str(seed), str(seconds), repr(SIZES)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for seed, what in enumerate(["write", "read", "read", "read"])
    ]
    results = [worker.communicate(timeout=seconds + 60) for worker in workers]
    for worker, (out, err) in zip(workers, results, strict=True):
        assert worker.returncode == 0, err
        assert int(out) > 0


@pytest.mark.parametrize("options", [{}, {"passthrough": False}], ids=["passthrough", "native"])
def test_readers_and_rewriters(
    make_mount: Callable[..., MountedPool], options: dict[str, bool]
) -> None:
    mounted = make_mount(mount_options=options)
    for name, size in SIZES.items():
        write_file(mounted.path / name, bytes(size))
    run(mounted.path, 4)
    for name, size in SIZES.items():
        assert os.stat(mounted.path / name).st_size == size
    sh("cat tiny small large > /dev/null", mounted.path)
