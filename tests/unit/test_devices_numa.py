"""Memory nodes: what sysfs says of them, and memory that is taken from one."""

import ctypes
import logging
import mmap
import os
from pathlib import Path
from uuid import UUID

import pytest

from kvfs import _native
from kvfs.config import parse_device_url
from kvfs.devices import numa
from kvfs.devices import open as opening
from kvfs.devices.memory import MemoryDevice
from kvfs.emulation import UNKNOWN, LinkFigures
from kvfs.errors import NoSpaceError, RefusedError, UsageError
from kvfs.units import GIB, MIB
from tests.unit.made_up_sysfs import add_node

_GET_MEMPOLICY = {"x86_64": 239, "aarch64": 236}
_OF_ADDRESS = 2  # MPOL_F_ADDR
_BIND = 2  # MPOL_BIND


def policy_of(address: int) -> tuple[int, int]:
    """Return the memory policy at an address, and its nodes as bits."""
    libc = ctypes.CDLL(None, use_errno=True)
    mode, nodes = ctypes.c_int(-1), (ctypes.c_ulong * 16)()
    number = _GET_MEMPOLICY[os.uname().machine]
    status = libc.syscall(
        ctypes.c_long(number), ctypes.byref(mode), ctypes.byref(nodes), ctypes.c_ulong(16 * 64),
        ctypes.c_void_p(address), ctypes.c_ulong(_OF_ADDRESS),
    )  # fmt: skip
    assert status == 0, os.strerror(ctypes.get_errno())
    return mode.value, nodes[0]


@pytest.fixture
def sysfs(tmp_path: Path) -> Path:
    add_node(tmp_path, 0, cpus="0-3", total=16 * GIB, free=8 * GIB)
    add_node(
        tmp_path, 1, cpus="", total=64 * GIB, free=60 * GIB,
        figures={"read_bandwidth": 28000, "write_bandwidth": 26000, "read_latency": 250,
                 "write_latency": 260},
    )  # fmt: skip
    return tmp_path


@pytest.fixture
def binding() -> None:
    """Skip where a container's rules forbid mbind."""
    fd = _native.memfd("kvfs-test", MIB)
    try:
        _native.bind_memfd(fd, MIB, 0)
    except OSError as error:
        pytest.skip(f"mbind is not to be had here: {error.strerror}")
    finally:
        os.close(fd)


def test_nodes_are_read(sysfs: Path) -> None:
    first, second = numa.nodes(sysfs)
    assert (first.number, first.has_processors, first.total_bytes) == (0, True, 16 * GIB)
    assert first.available_bytes == 8 * GIB + GIB  # and page cache that nobody used of late
    assert first.figures == UNKNOWN
    assert (second.number, second.has_processors) == (1, False)
    assert second.figures == LinkFigures(28000 * MIB, 26000 * MIB, 250, 260)


def test_a_list_of_nodes_may_have_gaps(sysfs: Path) -> None:
    add_node(sysfs, 4, cpus="", total=GIB, free=GIB)
    assert [node.number for node in numa.nodes(sysfs)] == [0, 1, 4]


def test_a_kernel_without_nodes(tmp_path: Path) -> None:
    assert numa.nodes(tmp_path) == []
    with pytest.raises(UsageError, match="none that the kernel tells of"):
        numa.require_node(0, "dram:?numa=0&size=1GiB", tmp_path)


def test_what_is_no_node_is_refused_with_those_there_are(sysfs: Path) -> None:
    assert numa.require_node(1, "cxl:node=1", sysfs).number == 1
    with pytest.raises(
        UsageError, match=r"expected one of 0 \(16.0 GiB\), 1 \(64.0 GiB, without processors\)"
    ):
        numa.require_node(2, "cxl:node=2?size=1GiB", sysfs)


def test_a_machine_with_one_node_refuses_to_choose(tmp_path: Path) -> None:
    add_node(tmp_path, 0, cpus="0", total=GIB, free=GIB)
    with pytest.raises(UsageError, match=r"one memory node, .*found 0 \(1.0 GiB\); use dram:"):
        numa.require_node(0, "dram:?numa=0&size=1GiB", tmp_path)


def test_a_kernel_that_gives_no_huge_pages_is_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, expected_warnings: list[str]
) -> None:
    expected_warnings.append("no huge pages")
    setting = tmp_path / "kernel/mm/transparent_hugepage/shmem_enabled"
    setting.parent.mkdir(parents=True)
    setting.write_text("always within_size [advise] never deny force\n")
    with caplog.at_level(logging.WARNING, logger="kvfs.devices"):
        numa.warn_of_small_pages("dram0", tmp_path)
        assert not caplog.records
        setting.write_text("always within_size advise [never] deny force\n")
        numa.warn_of_small_pages("dram0", tmp_path)
    assert "no huge pages for dram0" in caplog.text


@pytest.mark.usefixtures("binding")
def test_a_memfd_is_bound_whoever_touches_it() -> None:
    fd = _native.memfd("kvfs-test", 4 * MIB)
    _native.bind_memfd(fd, 4 * MIB, 0)
    with mmap.mmap(fd, 4 * MIB) as mapped:
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        assert policy_of(address) == (_BIND, 1)
        assert policy_of(address + 4 * MIB - 4096) == (_BIND, 1)
        mapped[0] = 1
    os.close(fd)


@pytest.mark.usefixtures("binding")
def test_a_node_that_is_not_there_cannot_be_bound_to() -> None:
    fd = _native.memfd("kvfs-test", MIB)
    for node in (1023, 9999, 10_000, 4_000_000_000):
        with pytest.raises(OSError, match="Invalid argument"):
            _native.bind_memfd(fd, MIB, node)
    with pytest.raises(RefusedError, match="from node 1023: cxl0: Invalid argument"):
        numa.bind(fd, MIB, numa.Node(1023, True, 16 * GIB, 16 * GIB, UNKNOWN), "cxl0")
    os.close(fd)


@pytest.mark.usefixtures("binding")
def test_a_device_is_bound_with_its_files(sysfs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The made-up machine calls this one's only node its first of two."""
    monkeypatch.setattr(opening, "require_node", lambda number, url: numa.require_node(
        number, url, sysfs))  # fmt: skip
    url = parse_device_url("dram:?numa=0&size=64MiB&segment=16MiB")
    device = opening.open_device(
        url, index=0, uuid=UUID(int=1), capacity_bytes=64 * MIB,
        segment_bytes=16 * MIB, name="dram0",
    )  # fmt: skip
    assert isinstance(device, MemoryDevice)
    segment = device.create(0, 1, b"t")
    assert policy_of(segment.address) == (_BIND, 1)
    staging = device.create_staging("file")
    device.write_staging(staging, 0, b"x" * 8192)
    with mmap.mmap(staging.fd, 8192) as mapped:
        held = ctypes.c_char.from_buffer(mapped)
        assert policy_of(ctypes.addressof(held)) == (_BIND, 1)
        del held
    device.close()


def test_more_than_a_node_has_is_refused(sysfs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "require_node", lambda number, url: numa.require_node(
        number, url, sysfs))  # fmt: skip
    add_node(sysfs, 1, cpus="", total=GIB, free=32 * MIB, cache=0)
    with pytest.raises(NoSpaceError, match=r"64.0 MiB asked for, 32.0 MiB available"):
        opening.open_device(
            parse_device_url("cxl:node=1?size=64MiB"), index=0,
            uuid=UUID(int=1), capacity_bytes=64 * MIB,
            segment_bytes=16 * MIB, name="cxl0",
        )  # fmt: skip


def test_where_mbind_is_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbid(fd: int, nbytes: int, node: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(numa._native, "bind_memfd", forbid)
    node = numa.Node(0, True, 16 * GIB, 16 * GIB, UNKNOWN)
    with pytest.raises(RefusedError, match="container needs CAP_SYS_NICE"):
        MemoryDevice(index=0, uuid=UUID(int=1), capacity_bytes=16 * MIB, segment_bytes=MIB,
                     name="cxl0", node=node)  # fmt: skip
