"""Files opened, read and closed while a pool that is too small evicts, relocates and rewrites.

Every file that is read is whole, one version of it: all its words are the same and say how long it
is. It may be gone (ENOENT), or be replaced between lookup and open (ESTALE).
"""

import json
import os
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from tests.fuse.mounting import MountedPool, end, launch

pytestmark = pytest.mark.fuse
READERS = 3

WRITER = """
import errno, os, random, select, sys
path, rng, version = sys.argv[1], random.Random(1), 0
SIZES = {"tiny": 5000, "small": 1_300_000, "large": 5 << 20}
while not select.select([0], [], [], 0)[0]:
    version += 1
    kind = rng.choices(list(SIZES), (6, 3, 1))[0]
    space = rng.choice(("cache", "durable")) if kind == "tiny" else "cache"
    name = f"{path}/{space}/{kind}-{rng.randrange(20)}"
    words = SIZES[kind] // 8 + rng.randrange(100)
    data = (version << 32 | words).to_bytes(8, "little") * words
    target = name if rng.random() < 0.5 else f"{path}/{space}/new"
    try:
        fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        try:
            assert os.write(fd, data) == len(data)
        finally:
            os.close(fd)
        if target != name:
            os.rename(target, name)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ESTALE):
            raise
print(version)
"""

READER = """
import collections, errno, json, mmap, os, random, sys
buffer = mmap.mmap(-1, 8 << 20)  # aligned, as O_DIRECT wants it where the kernel reads the file
path, seed, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
rng, counts = random.Random(seed), collections.Counter()
KINDS = ("tiny", "small", "large")

def check(data, what):
    words = len(data) // 8
    head = data[:8]
    assert len(data) == 8 * words, f"{what}: {len(data)} bytes"
    if not words:
        counts["empty"] += 1  # made, or cut, and not written yet
        return
    assert int.from_bytes(head, "little") & 0xFFFFFFFF == words, f"{what}: cut: {len(data)} bytes"
    assert data == head * words, f"{what}: a mixture"

def read(fd):
    if rng.random() < 0.3:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    data = b""
    while True:
        with memoryview(buffer)[: rng.choice((4096, 1 << 20, 8 << 20))] as part:
            count = os.readv(fd, [part])
            data += part[:count]
            if count < len(part):
                return data

opened = 0
while opened < count:
    kind = rng.choices(KINDS, (6, 3, 1))[0]
    space = rng.choice(("cache", "durable")) if kind == "tiny" else "cache"
    name = f"{path}/{space}/{kind}-{rng.randrange(20)}"
    flags = os.O_RDONLY | (os.O_DIRECT if rng.random() < 0.1 else 0)
    try:
        fd = os.open(name, flags)
    except OSError as error:
        counts[errno.errorcode[error.errno]] += 1
        # EBUSY: written for the first time.
        assert error.errno in (errno.ENOENT, errno.ESTALE, errno.EBUSY), error
        continue
    opened += 1
    try:
        check(read(fd), name)
        counts["whole"] += 1
        if opened % 4 == 0:
            try:
                counts[os.getxattr(fd, "user.kvfs.lane").decode()] += 1
            except FileNotFoundError:
                counts["no name any more"] += 1
    finally:
        os.close(fd)
print(json.dumps(counts))
"""


def run(mounted: MountedPool, opens: int) -> tuple[Counter[str], dict[str, Any]]:
    """Open, read and close so many files while another process writes; return what was counted."""
    path = mounted.path
    for name in ("cache", "durable"):
        (path / name).mkdir()
    os.setxattr(path / "durable", "user.kvfs.retention", b"durable")
    writer = launch(WRITER, path)
    readers = [launch(READER, path, seed, opens // READERS + 1) for seed in range(READERS)]
    counts: Counter[str] = Counter()
    try:
        for reader in readers:
            out, err = reader.communicate()
            assert reader.returncode == 0, err
            counts.update(json.loads(out))
        out, err = writer.communicate("stop\n", timeout=60)
        assert writer.returncode == 0, err
    finally:
        for process in (writer, *readers):
            end(process)
    return counts, mounted.status()["pool"]["counters"]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "opens", [900, pytest.param(10_000, marks=pytest.mark.slow)], ids=["some", "10000"]
)
def test_what_is_read_is_whole(
    make_mount: Callable[..., MountedPool], opens: int, record_property: Callable[..., None]
) -> None:
    mounted = make_mount(dir_mib=64, dram_mib=64)
    mounted.expected_findings.add("file-not-whole")  # lay in memory alone, and ended with the mount
    counts, counters = run(mounted, opens)
    print(dict(counts), {k: v for k, v in counters.items() if "evict" in k or "reloc" in k})
    record_property("counts", dict(counts))
    assert counts["whole"] + counts["empty"] >= opens
    assert counts["native"] > 0
    assert counts["namespace"] > 0
    assert counters["files_evicted"] > 0
    assert counters["blocks_relocated"] > 0


def test_without_a_core(make_mount: Callable[..., MountedPool]) -> None:
    mounted = make_mount(dir_mib=64, dram_mib=64, mount_options={"core": False})
    mounted.expected_findings.add("file-not-whole")
    counts, counters = run(mounted, 600)
    assert counts["whole"] + counts["empty"] >= 600
    assert counters["files_evicted"] > 0
