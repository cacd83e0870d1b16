"""A mount of a pool on DAX alone: files go through memory into the log."""

import errno
import mmap
import os
from collections.abc import Callable

import pytest

from tests.fuse.mounting import MIB, MountedPool, sh

pytestmark = pytest.mark.fuse


def test_files_on_dax_survive_a_kill(make_mount: Callable[..., MountedPool]) -> None:
    mounted = make_mount(kind="dax", dram_mib=0)
    space = mounted.path / "n"
    space.mkdir()
    contents = {f"file{i}": os.urandom(nbytes) for i, nbytes in enumerate((1, 5000, 9 * MIB + 3))}
    for name, data in contents.items():
        (space / name).write_bytes(data)
    sh(f"cp file2 copy && sync -f {space}", cwd=space)
    for _ in range(2):
        for name, data in (*contents.items(), ("copy", contents["file2"])):
            assert (space / name).read_bytes() == data
            with (
                (space / name).open("rb") as file,
                mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped,
            ):
                assert mapped[:] == data
        mounted.kill()
        mounted.start()


def test_what_does_not_fit_into_memory_is_no_space(
    make_mount: Callable[..., MountedPool],
) -> None:
    mounted = make_mount(kind="dax", dram_mib=0, pool_options={"staging_memory_bytes": 8 * MIB})
    space = mounted.path / "n"
    space.mkdir()
    with pytest.raises(OSError, match="No space") as caught:
        (space / "large").write_bytes(bytes(16 * MIB))
    assert caught.value.errno == errno.ENOSPC
    (space / "small").write_bytes(b"x" * MIB)
    assert (space / "small").read_bytes() == b"x" * MIB
