"""Payloads past the page cache: what is refused, what fails, what stalls."""

import errno
import fcntl
import os
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from kvfs import _native
from kvfs.config import PoolOptions, parse_device_url
from kvfs.devices.abilities import NOTHING, Abilities
from kvfs.devices.directory import DirectoryDevice
from kvfs.devices.osfs import OSFileSystem
from kvfs.devices.transfers import QUEUES, IOOptions, Transfers
from kvfs.devices.wrappers import Effect, Fault, FaultyDevice, Verb
from kvfs.errors import DeviceError, KvfsError, NoSpaceError, UsageError
from kvfs.layout import Layout
from kvfs.lifecycle import create_pool, open_pool
from kvfs.units import KIB, MIB, PAGE
from tests.conformance.helpers import DEVICE_UUID, TAG, put, random_bytes

_FIFREEZE, _FITHAW = 0xC0045877, 0xC0045878
_EXT4_IOC_SHUTDOWN = 0x8004587D
WAYS = pytest.mark.parametrize("way", ["io_uring", "threads"])

# Forbids io_uring_setup as a container's seccomp filter does (x86-64 and arm64: call 425).
_FORBID = """
import ctypes, struct
code = b"".join(struct.pack("<HBBI", *line) for line in (
    (0x20, 0, 0, 0), (0x15, 0, 1, 425), (0x06, 0, 0, 0x00050001), (0x06, 0, 0, 0x7FFF0000)))
lines = ctypes.create_string_buffer(code)
program = struct.pack("<HxxxxxxQ", 4, ctypes.addressof(lines))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, program, 0, 0) == 0
"""


def open_directory(root: Path, way: str, **options: object) -> DirectoryDevice:
    how = IOOptions(cache="direct", io=way, **options)  # type: ignore[arg-type]
    try:
        files = OSFileSystem(str(root), options=how)
    except UsageError as error:
        pytest.skip(str(error))
    return DirectoryDevice(
        files, index=0, uuid=DEVICE_UUID, capacity_bytes=64 * MIB, segment_bytes=16 * MIB,
        name="ssd0",
    )  # fmt: skip


@contextmanager
def loop_ext4(root: Path, nbytes: int = 128 * MIB) -> Iterator[Path]:
    """A filesystem of its own, to be stopped, taken away and filled."""
    if os.geteuid() != 0 or shutil.which("mkfs.ext4") is None:
        pytest.skip("needs root and mkfs.ext4 for a filesystem over a loop device")
    image, mount_point = root / "image", root / "ext4"
    mount_point.mkdir()
    with image.open("xb") as file:
        file.truncate(nbytes)
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True, capture_output=True)
    command = ["mount", "-o", "loop", str(image), str(mount_point)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no loop device: {done.stderr.strip()}")
    try:
        yield mount_point
    finally:
        for _ in range(600):  # what was under way at close holds it until it is done
            done = subprocess.run(["umount", str(mount_point)], check=False, capture_output=True)
            if done.returncode == 0:
                break
            threading.Event().wait(0.1)
        else:
            pytest.fail(f"still mounted: {mount_point}: {done.stderr!r}")


# --- what is asked for


def test_options_of_the_url() -> None:
    url = parse_device_url("dir:/x?cache=direct&depth=8&io=threads&deadline_ms=500")
    assert url.options["depth"] == "8"
    for wrong in ("cache=none", "depth=0", "depth=257", "depth=x", "io=aio", "deadline_ms=-1"):
        with pytest.raises(UsageError, match=wrong.partition("=")[0]):
            parse_device_url(f"dir:/x?{wrong}")
    with pytest.raises(UsageError, match="unknown device option 'cache'"):
        parse_device_url("dram:?size=1GiB&cache=direct")


def test_what_the_filesystem_lacks_is_refused() -> None:
    for cache in ("direct", "dontcache"):
        with pytest.raises(UsageError, match=rf"cache={cache} cannot be used: /x: .*cache=page"):
            Transfers(IOOptions(cache=cache), NOTHING, "/x")


@WAYS
def test_the_device_says_how_it_moves_bytes(tmp_path: Path, way: str) -> None:
    device = open_directory(tmp_path, way)
    assert (device.info.cache, device.info.io) == ("direct", way)
    assert device.info.filesystem
    device.close()
    plain = OSFileSystem(str(tmp_path))
    assert plain.way()[0] == "page"
    plain.close()


def test_where_io_uring_is_forbidden_threads_do(tmp_path: Path) -> None:
    """As in a container: seccomp answers EPERM."""
    script = (
        _FORBID
        + f"""
from kvfs import _native
from kvfs.devices.osfs import OSFileSystem
from kvfs.devices.transfers import IOOptions
from kvfs.errors import UsageError
print(OSFileSystem({str(tmp_path)!r}).way()[1], _native.IOQueue(2).kind)
try:
    OSFileSystem({str(tmp_path / "other")!r}, options=IOOptions(io="io_uring"))
except UsageError as error:
    print(error)
"""
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True,
                          text=True)  # fmt: skip
    first, second = done.stdout.splitlines()
    assert first == "threads threads"
    assert second.startswith("io=io_uring cannot be used")
    assert "io_uring_disabled" in second


# --- what fails


@WAYS
@pytest.mark.parametrize("effect", [Effect.FAIL, Effect.SHORT, Effect.LIE])
def test_faulty_writes_are_met(tmp_path: Path, way: str, effect: Effect) -> None:
    """A block that was not written, or not whole, is a failed status or a checksum that fails."""
    device = FaultyDevice(open_directory(tmp_path, way), [Fault(Verb.WRITE, effect=effect)])
    segment = device.create(0, 1, TAG)
    data = [random_bytes(3 * PAGE, seed) for seed in (1, 2)]
    offsets = np.array([0, 16 * PAGE], np.uint64)
    failed, statuses = put(device, segment, (0, data[0]), (16 * PAGE, data[1]))
    assert (failed > 0) == (effect is not Effect.LIE)
    assert statuses.count(-errno.EIO) == failed
    digests, lengths = np.zeros((2, 16), np.uint8), np.full(2, 3 * PAGE, np.uint64)
    target = np.zeros(6 * PAGE, np.uint8)
    targets = np.array([0, 3 * PAGE], np.uint64) + np.uint64(target.ctypes.data)
    found = np.zeros(2, np.int32)
    for i, part in enumerate(data):
        digests[i] = np.frombuffer(_native.xxh3_128(part), np.uint8)
    device.read_payloads([segment], np.zeros(2, np.intp), offsets, lengths, targets, digests, found)
    bad = {i for i in range(2) if statuses[i] or effect is Effect.LIE}
    assert {i for i in range(2) if found[i]} == bad
    device.close()


@WAYS
def test_the_filesystem_is_full(tmp_path: Path, way: str) -> None:
    """Space is reserved when a segment is made: that fails, and leaves nothing."""
    with loop_ext4(tmp_path, 48 * MIB) as root:
        device = open_directory(root, way)
        segments = [device.create(0, 1, TAG)]
        with pytest.raises(NoSpaceError, match="filesystem is full"):
            segments += [device.create(slot, 1, TAG) for slot in range(1, 4)]
        used = device.used_bytes
        assert used == len(device.segments()) * 16 * MIB
        data = random_bytes(MIB)  # what was reserved can be written
        assert put(device, segments[0], *[(i * MIB, data) for i in range(16)])[0] == 0
        device.close()


@WAYS
def test_a_file_cut_short_is_a_short_read(tmp_path: Path, way: str) -> None:
    device = open_directory(tmp_path, way)
    segment = device.create(0, 1, TAG)
    put(device, segment, (0, random_bytes(8 * PAGE)))
    os.truncate(segment.fd, 4 * PAGE)
    statuses, target = np.zeros(2, np.int32), np.zeros(2 * PAGE, np.uint8)
    failed = device.read_payloads(
        [segment], np.zeros(2, np.intp), np.array([2, 3], np.uint64) * np.uint64(PAGE),
        np.full(2, 2 * PAGE, np.uint64), np.full(2, target.ctypes.data, np.uint64), None, statuses,
    )  # fmt: skip
    assert (failed, list(statuses)) == (1, [0, 2])
    device.close()


@WAYS
def test_a_device_that_is_gone(tmp_path: Path, way: str) -> None:
    """Its filesystem is shut down, as when its disk is pulled: misses and errors, no hang."""
    with loop_ext4(tmp_path) as root:
        open_directory(root / "probe", way).close()
        url = f"dir:{root / 'kv'}?size=64MiB&segment=16MiB&cache=direct&io={way}"
        options = PoolOptions(device_failures_max=2)
        pool = create_pool(tmp_path / "pool", [url], options=options)
        space = pool.namespace("test", Layout(token_shape=(64 * KIB,), block_tokens=1))
        keys = space.keys(np.arange(8, dtype=np.uint32))[0]
        blocks = np.random.default_rng(1).integers(0, 256, (len(keys), 64 * KIB), np.uint8)
        space.put(keys, blocks, durability="sync")
        target = np.zeros_like(blocks)
        assert space.read_into(keys, target).all()
        assert (target == blocks).all()
        fd = os.open(root, os.O_RDONLY)
        fcntl.ioctl(fd, _EXT4_IOC_SHUTDOWN, struct.pack("<I", 2))
        os.close(fd)
        assert not space.read_into(keys, target).any()
        for _ in range(3):
            with pytest.raises(KvfsError):
                space.put(keys, blocks, durability="sync")
        assert pool.statistics().devices[0].state == "offline"
        try:
            pool.close()
        except (KvfsError, OSError) as error:
            assert isinstance(error, DeviceError) or "Input/output" in str(error)  # noqa: PT017


# --- what stalls


@contextmanager
def frozen(root: Path) -> Iterator[Callable[[], None]]:
    """No write to the filesystem goes on until the function is called, or the block ends."""
    fd = os.open(root, os.O_RDONLY)
    fcntl.ioctl(fd, _FIFREEZE, 0)
    is_frozen = True

    def thaw() -> None:
        nonlocal is_frozen
        if is_frozen:
            is_frozen = False
            fcntl.ioctl(fd, _FITHAW, 0)

    try:
        yield thaw
    finally:
        thaw()
        os.close(fd)


@WAYS
def test_a_device_that_stalls(tmp_path: Path, way: str) -> None:
    """Past the deadline a write fails, others at once; once it goes on the device is usable."""
    with loop_ext4(tmp_path) as root:
        device = open_directory(root, way, depth=2, deadline_ms=100)
        segment = device.create(0, 1, TAG)
        data = random_bytes(4 * PAGE)
        with frozen(root) as thaw:
            for _ in range(QUEUES):
                assert put(device, segment, *[(i * MIB, data) for i in range(3)]) == (
                    3, [-errno.ETIMEDOUT] * 3,
                )  # fmt: skip
            with pytest.raises(TimeoutError):
                put(device, segment, (0, data))
            thaw()
        while True:
            try:
                if put(device, segment, (MIB, data)) == (0, [0]):
                    break
            except TimeoutError:
                continue
        assert device.read(segment, MIB, len(data), uncached=True) == data
        device.close()


_CROWDED = """
import fcntl, os, resource, sys
import numpy as np
from kvfs import _native
queue, data = _native.IOQueue(2, "threads"), np.full(4096, 7, np.uint8)
fd = os.open(sys.argv[1] + "/file", os.O_RDWR | os.O_CREAT | os.O_DIRECT)

def write(count):
    return queue.write_hash(
        fd, np.arange(count, dtype=np.uint64) * np.uint64(4096),
        np.full(count, data.ctypes.data, np.uint64), np.full(count, 4096, np.uint64),
        np.zeros((count, 16), np.uint8), np.zeros(count, np.int32), 4096, timeout_ms=200)

assert write(1) == 0  # one thread is there, and no room for a second
used = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 20), -1))
root = os.open(sys.argv[1], os.O_RDONLY)
fcntl.ioctl(root, 0xC0045877, 0)
try:
    assert write(2) == 2
    os.close(fd)
    assert os.open(sys.argv[2], os.O_RDWR) == fd
finally:
    fcntl.ioctl(root, 0xC0045878, 0)
while queue.stalled():
    pass
assert os.pread(fd, 8192, 0) == b"v" * 8192
"""


def test_what_has_not_begun_is_not_done_after_the_deadline(tmp_path: Path) -> None:
    """By then its descriptor may be another file's."""
    (tmp_path / "victim").write_bytes(b"v" * 2 * PAGE)
    with loop_ext4(tmp_path) as root:
        command = [sys.executable, "-c", _CROWDED, str(root), str(tmp_path / "victim")]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@WAYS
def test_closing_a_device_that_stalls(tmp_path: Path, way: str) -> None:
    with loop_ext4(tmp_path) as root:
        device = open_directory(root, way, depth=2, deadline_ms=100)
        segment = device.create(0, 1, TAG)
        with frozen(root):
            assert put(device, segment, (0, random_bytes(PAGE)))[0] == 1
            device.close()


@pytest.mark.parametrize("code", [errno.ETIMEDOUT, errno.EMFILE, errno.ENOMEM])
def test_a_read_that_could_not_be_made_keeps_the_blocks(tmp_path: Path, code: int) -> None:
    """It is a miss, after three tries; the device has them still."""
    faults = [Fault(Verb.READ, operation="read_payloads", code=code, times=3)]
    pool = create_pool(tmp_path / "pool", [f"dir:{tmp_path / 'kv'}?size=64MiB&segment=16MiB"],
                       options=PoolOptions(copy_to_dram=False))  # fmt: skip
    space = pool.namespace("test", Layout(token_shape=(4 * KIB,), block_tokens=1))
    keys = space.keys(np.arange(8, dtype=np.uint32))[0]
    blocks = np.random.default_rng(1).integers(0, 256, (len(keys), 4 * KIB), np.uint8)
    space.put(keys, blocks)
    state = pool.store.state.devices[0]
    state.device = FaultyDevice(state.device, faults)
    target = np.zeros_like(blocks)
    assert np.count_nonzero(space.read_into(keys, target)) == len(keys) - 1
    assert space.read_into(keys, target).all()
    assert (target == blocks).all()
    pool.close()


def test_batches_of_several_threads_wait_for_a_queue(tmp_path: Path) -> None:
    device = open_directory(tmp_path, "", depth=1)
    segment = device.create(0, 1, TAG)
    data = random_bytes(MIB + 5)
    failures: list[object] = []

    def work(number: int) -> None:
        results = [put(device, segment, (number * 2 * MIB, data)) for _ in range(5)]
        failures.extend(result for result in results if result != (0, [0]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(QUEUES + 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    for number in range(QUEUES + 3):
        assert device.read(segment, number * 2 * MIB, len(data), uncached=True) == data
    device.close()


# --- a pool


@WAYS
def test_a_pool_that_is_opened_again(tmp_path: Path, way: str) -> None:
    """Unsealed segments are verified from the medium, the others read, all of it directly."""
    open_directory(tmp_path / "probe", way).close()
    url = f"dir:{tmp_path / 'kv'}?size=256MiB&segment=16MiB&cache=direct&io={way}&depth=4"
    pool = create_pool(tmp_path / "pool", [url], options=PoolOptions(copy_to_dram=False))
    layout = Layout(token_shape=(300 * KIB,), block_tokens=1)
    space = pool.namespace("test", layout)
    keys = space.keys(np.arange(100, dtype=np.uint32))[0]
    blocks = np.random.default_rng(1).integers(0, 256, (len(keys), 300 * KIB), np.uint8)
    space.put(keys, blocks)
    pool.close()
    pool = open_pool(tmp_path / "pool")
    space = pool.namespace("test", layout)
    target = np.zeros_like(blocks)
    assert space.read_into(keys, target).all()
    assert (target == blocks).all()
    with space.view(keys) as view:  # maps the same files
        assert view.numpy().tobytes() == blocks.tobytes()
    pool.close()


def test_abilities_are_found_by_trying(tmp_path: Path) -> None:
    files = OSFileSystem(str(tmp_path))
    found = files.abilities()
    files.close()
    assert isinstance(found, Abilities)
    assert found.filesystem
    for align in (found.address_align, found.offset_align):
        assert 0 < align <= PAGE
    assert not list(tmp_path.glob("[!k]*")), "nothing is left of the file it tried"
