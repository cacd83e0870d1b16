"""Deep flush: libpmem2 where it is there, the region's file otherwise."""

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvfs.devices.deep_flush import deep_flush_of
from kvfs.units import MIB

# What kvfs calls of libpmem2, noting each call in a file. FLUSH is what pmem2_deep_flush returns.
_STUB = r"""
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
static void note(const char *text, long value)
{
    FILE *log = fopen(getenv("KVFS_TEST_PMEM2"), "a");
    fprintf(log, "%s %ld\n", text, value);
    fclose(log);
}
static int object;
int pmem2_source_from_fd(void **source, int fd) { *source = &object; note("source", fd); return 0; }
int pmem2_source_delete(void **source) { *source = NULL; note("source_delete", 0); return 0; }
int pmem2_config_new(void **config) { *config = &object; return 0; }
int pmem2_config_delete(void **config) { *config = NULL; note("config_delete", 0); return 0; }
int pmem2_config_set_length(void *config, size_t n) { note("length", (long)n); return 0; }
int pmem2_config_set_required_store_granularity(void *config, int g) { note("grain", g); return 0; }
int pmem2_map_new(void **map, void *config, void *source)
{
    *map = MAP < 0 ? NULL : &object;
    return MAP;
}
void *pmem2_map_get_address(void *map) { return (void *)0x7000000000; }
int pmem2_deep_flush(void *map, void *address, size_t n)
{
    note("flush", (long)address);
    note("flush_bytes", (long)n);
    return FLUSH;
}
int pmem2_map_delete(void **map) { *map = NULL; note("map_delete", 0); return 0; }
"""

MakeLibrary = Callable[..., str]


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeLibrary:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler to make a libpmem2 of")
    monkeypatch.setenv("KVFS_TEST_PMEM2", str(tmp_path / "calls"))
    (tmp_path / "stub.c").write_text(_STUB)

    def make(flush: int = 0, mapped: int = 0) -> str:
        path = tmp_path / f"libpmem2-{flush}-{mapped}.so"
        subprocess.run(
            [compiler, "-shared", "-fPIC", f"-DFLUSH={flush}", f"-DMAP={mapped}", "-o", path,
             tmp_path / "stub.c"],
            check=True,
        )  # fmt: skip
        return str(path)

    return make


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    with (tmp_path / "device").open("w+b") as file:
        file.truncate(2 * MIB)
        yield file.fileno()


@pytest.fixture
def region(tmp_path: Path) -> Path:
    path = tmp_path / "deep_flush"
    path.write_text("")
    return path


def calls(tmp_path: Path) -> list[str]:
    return (tmp_path / "calls").read_text().splitlines()


def test_the_library_flushes(tmp_path: Path, library: MakeLibrary, fd: int, region: Path) -> None:
    flush = deep_flush_of(fd, 2 * MIB, region, library=library())
    assert flush is not None
    assert flush.has_library
    assert calls(tmp_path) == [
        f"source {fd}", f"length {2 * MIB}", "grain 2", "config_delete 0", "source_delete 0",
    ]  # fmt: skip
    flush()
    assert calls(tmp_path)[5:] == [f"flush {0x7000000000}", f"flush_bytes {2 * MIB}"]
    assert region.read_text() == ""
    flush.close()
    flush.close()
    assert calls(tmp_path)[7:] == ["map_delete 0"]


@pytest.mark.parametrize("status", [-100001, -errno.EACCES, -errno.EPERM, -errno.ENOENT])
def test_where_the_library_cannot_the_region_is_told(
    library: MakeLibrary, fd: int, region: Path, status: int
) -> None:
    flush = deep_flush_of(fd, 2 * MIB, region, library=library(status))
    assert flush is not None
    flush()
    assert region.read_text() == "1"
    alone = deep_flush_of(fd, 2 * MIB, None, library=library(status))
    assert alone is not None
    alone()  # there is nothing more to flush
    flush.close()
    alone.close()


@pytest.mark.parametrize(("status", "code"), [(-errno.EIO, errno.EIO), (-100034, errno.EIO),
                                              (-errno.ENOSPC, errno.ENOSPC)])  # fmt: skip
def test_a_flush_that_fails_is_an_error(
    library: MakeLibrary, fd: int, region: Path, status: int, code: int
) -> None:
    flush = deep_flush_of(fd, 2 * MIB, region, library=library(status))
    assert flush is not None
    with pytest.raises(OSError, match=rf"libpmem2: .*\({status}\)") as caught:
        flush()
    assert caught.value.errno == code
    assert region.read_text() == ""
    flush.close()


def test_a_device_that_the_library_does_not_map(
    tmp_path: Path, library: MakeLibrary, fd: int, region: Path
) -> None:
    name = library(mapped=-100014)
    flush = deep_flush_of(fd, 2 * MIB, region, library=name)
    assert flush is not None
    assert not flush.has_library
    flush()
    assert region.read_text() == "1"
    assert calls(tmp_path)[-2:] == ["config_delete 0", "source_delete 0"]
    assert deep_flush_of(fd, 2 * MIB, None, library=name) is None


def test_without_the_library(fd: int, region: Path) -> None:
    for name in ("libkvfs-is-not-there.so.1", "libc.so.6"):  # the second is none of libpmem2
        flush = deep_flush_of(fd, 2 * MIB, region, library=name)
        assert flush is not None
        assert not flush.has_library
        flush()
        assert region.read_text() == "1"
        region.write_text("")
        flush.close()
    assert deep_flush_of(fd, 2 * MIB, None, library="libkvfs-is-not-there.so.1") is None


def test_a_region_that_refuses_is_an_error(tmp_path: Path, fd: int) -> None:
    flush = deep_flush_of(fd, 2 * MIB, tmp_path / "none/deep_flush", library="none.so")
    assert flush is not None
    with pytest.raises(FileNotFoundError):
        flush()
    os.fstat(fd)
