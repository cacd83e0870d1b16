"""Full pools: eviction under readers, and errors that say so."""

import errno
import functools
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.fuse.mounting import MIB, MountedPool, sh_fails, wait_until, write_file

pytestmark = pytest.mark.fuse
FILE_BYTES = 3 * MIB + 123


def content(number: int) -> bytes:
    return np.random.default_rng(number).bytes(FILE_BYTES)


def present(path: Path) -> list[str]:
    return sorted(name for name in os.listdir(path) if name.startswith("f"))


@pytest.mark.parametrize("file_bytes", [FILE_BYTES, 6 * MIB + 123])
def test_eviction_takes_closed_files_whole(
    make_mount: Callable[..., MountedPool], file_bytes: int
) -> None:
    """Small files share segments, large ones have their own; both go whole, least recent first."""
    mounted = make_mount(dir_mib=64, dram_mib=64)
    # A file that lies in memory alone by then ends with the process, its name at the next open.
    mounted.expected_findings.add("file-not-whole")
    path = mounted.path

    def data(number: int) -> bytes:
        return np.random.default_rng(number).bytes(file_bytes)

    write_file(path / "f000", data(0))
    with (path / "f000").open("rb", buffering=0) as kept:
        count = 2 * 64 * MIB // file_bytes
        for number in range(1, count):
            write_file(path / f"f{number:03}", data(number))
        names = present(path)
        assert len(names) < count, "nothing was evicted"
        assert len(names) > 2
        os.posix_fadvise(kept.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert kept.read(file_bytes) == data(0), "an open file was evicted"
        assert "f000" in names
        assert f"f{count - 1:03}" in names, "the newest file was evicted"
        for name in names:
            try:
                found = (path / name).read_bytes()
            except FileNotFoundError:
                continue  # evicted since the listing: absent
            assert found == data(int(name[1:]))
        for number in range(1, count):
            if f"f{number:03}" not in names:
                assert not (path / f"f{number:03}").exists()
    status = mounted.status()["pool"]
    assert status["counters"]["files_evicted"] > 0
    assert status["used_bytes"] <= status["capacity_bytes"]


def test_rewriting_a_full_pool_keeps_names(make_mount: Callable[..., MountedPool]) -> None:
    """New content makes room by evicting, perhaps the former content of the very file."""
    mounted = make_mount(dir_mib=64, dram_mib=0)
    path = mounted.path
    for round_number in range(3):
        for number in range(10):
            write_file(path / f"f{number:03}", content(100 * round_number + number), os.O_TRUNC)
            assert (path / f"f{number:03}").read_bytes() == content(100 * round_number + number)
    for name in present(path):
        assert (path / name).read_bytes() == content(200 + int(name[1:]))


def test_file_larger_than_the_pool(make_mount: Callable[..., MountedPool]) -> None:
    mounted = make_mount(dir_mib=64, dram_mib=0)
    write_file(mounted.path / "f001", content(1))
    message = sh_fails("head -c 100M /dev/zero > big", mounted.path)
    assert "No space left" in message
    wait_until(lambda: not (mounted.path / "big").exists(), "a file that is not whole goes")
    with pytest.raises(OSError) as caught:  # noqa: PT011 - the number is compared below
        write_file(mounted.path / "big", bytes(100 * MIB))
    assert caught.value.errno == errno.ENOSPC == 28
    fd = os.open(mounted.path / "big", os.O_RDWR | os.O_CREAT)
    with pytest.raises(OSError, match="No space"):
        os.ftruncate(fd, 1 << 40)
    os.ftruncate(fd, 0)
    os.write(fd, b"small after all")
    os.close(fd)
    assert (mounted.path / "big").read_bytes() == b"small after all"
    write_file(mounted.path / "f002", content(2))
    assert (mounted.path / "f002").read_bytes() == content(2)


def test_durable_namespace_refuses_rather_than_forgets(
    make_mount: Callable[..., MountedPool],
) -> None:
    mounted = make_mount(dir_mib=128, dram_mib=0)
    path = mounted.path / "kept"
    path.mkdir()
    os.setxattr(path, "user.kvfs.retention", b"durable")

    def write(number: int) -> None:
        write_file(path / f"f{number:03}", content(number))

    count = 0
    while not _is_refused(functools.partial(write, count), errno.ENOSPC):
        count += 1
        assert count < 100
    assert count > 20
    for number in range(count):
        assert (path / f"f{number:03}").read_bytes() == content(number)
    for number in range(5):
        os.unlink(path / f"f{number:03}")
    write_file(path / "f999", content(999))
    assert (path / "f999").read_bytes() == content(999)


def test_too_much_held_open_is_refused(make_mount: Callable[..., MountedPool]) -> None:
    mounted = make_mount(dir_mib=128, dram_mib=0, pool_options={"pinned_share": 0.1})
    path = mounted.path
    for number in range(6):
        write_file(path / f"f{number:03}", content(number))
    handles = [os.open(path / f"f{number:03}", os.O_RDONLY) for number in range(3)]
    assert _is_refused(lambda: os.open(path / "f003", os.O_RDONLY), errno.EBUSY)
    handles.append(os.open(path / "f000", os.O_RDONLY))  # the same bytes count once
    for handle in handles:
        os.close(handle)
    wait_until(
        lambda: not _is_refused(lambda: os.close(os.open(path / "f005", os.O_RDONLY)), errno.EBUSY),
        "closed files unpin",
    )


def _is_refused(call: Callable[[], object], number: int) -> bool:
    """Say whether a call fails with this number; other failures are failures."""
    try:
        call()
    except OSError as error:
        if error.errno == number:
            return True
        raise
    return False
