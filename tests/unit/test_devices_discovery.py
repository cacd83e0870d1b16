"""What a machine has that could be a device, over a made-up /sys."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvfs import _native
from kvfs.clock import ManualClock
from kvfs.config import parse_device_url
from kvfs.devices import discovery, numa, quick_bench
from kvfs.devices.discovery import Found, scan
from kvfs.devices.place import look
from kvfs.emulation import LinkFigures
from kvfs.errors import NotFoundError, UsageError
from kvfs.units import GIB, MIB
from tests.unit.made_up_sysfs import add_node, link, write


@pytest.fixture
def sysfs(tmp_path: Path) -> Path:
    return tmp_path / "sys"


def found(sysfs: Path, tmp_path: Path, mounts: str = "", release: str = "6.12.1") -> list[Found]:
    table = tmp_path / "mountinfo"
    table.write_text(mounts)
    return scan(sysfs=sysfs, mounts=table, release=release)


def add_dax(sysfs: Path, name: str, nbytes: int, *, driver: str = "device_dax",
            domain: str = "") -> None:  # fmt: skip
    region = sysfs / "devices/region0"
    write(region / name / "size", nbytes)
    if domain:
        write(region / "persistence_domain", domain)
    link(sysfs / "bus/dax/devices" / name, region / name)
    if driver:
        link(region / name / "driver", sysfs / "bus/dax/drivers" / driver)


def test_a_machine_with_nothing(sysfs: Path, tmp_path: Path) -> None:
    assert found(sysfs, tmp_path) == []


def test_a_node_without_processors(sysfs: Path, tmp_path: Path) -> None:
    add_node(sysfs, 0, cpus="0-7", total=16 * GIB, free=GIB)
    assert found(sysfs, tmp_path) == []
    add_node(sysfs, 1, cpus="", total=64 * GIB, free=63 * GIB,
             figures={"read_bandwidth": 1000, "read_latency": 300})  # fmt: skip
    (node,) = found(sysfs, tmp_path)
    assert (node.kind, node.name, node.url) == ("node", "node1", "cxl:node=1?size=57GiB")
    assert node.figures == LinkFigures(1000 * MIB, 0, 300, 0)
    assert parse_device_url(node.url).node == 1
    add_node(sysfs, 1, cpus="", total=256 * MIB, free=240 * MIB, cache=0)
    assert found(sysfs, tmp_path)[0].url == "cxl:node=1?size=192MiB"
    add_node(sysfs, 1, cpus="", total=64 * GIB, free=MIB, cache=0)
    assert (found(sysfs, tmp_path)[0].url, found(sysfs, tmp_path)[0].note) == (
        "", "less than 64 MiB is free",
    )  # fmt: skip


def test_dax_devices(sysfs: Path, tmp_path: Path) -> None:
    add_dax(sysfs, "dax0.0", 64 * MIB, domain="memory_controller")
    (device,) = found(sysfs, tmp_path)
    assert device == Found("dax", "dax0.0", "dax:/dev/dax0.0", 64 * MIB, ("memory_controller",))
    parse_device_url(device.url)


@pytest.mark.parametrize(
    ("nbytes", "driver", "note"),
    [
        (64 * MIB, "kmem", "used as memory of node 2; 'daxctl reconfigure-device --mode=devdax"),
        (64 * MIB, "", "its driver is none"),
        (64 * MIB + 4096, "device_dax", "no multiple of 2 MiB"),
    ],
)
def test_dax_devices_that_are_none_yet(
    sysfs: Path, tmp_path: Path, nbytes: int, driver: str, note: str
) -> None:
    add_dax(sysfs, "dax0.0", nbytes, driver=driver)
    write(sysfs / "devices/region0/dax0.0/target_node", 2)
    (device,) = found(sysfs, tmp_path)
    assert device.url == ""
    assert note in device.note
    assert device.abilities == ("volatile",)


def test_a_seed_is_no_device(sysfs: Path, tmp_path: Path) -> None:
    add_dax(sysfs, "dax0.0", 0)
    assert found(sysfs, tmp_path) == []


def test_cxl_regions_and_memory(sysfs: Path, tmp_path: Path) -> None:
    devices = sysfs / "bus/cxl/devices"
    write(devices / "mem0/ram/size", "0x10000000")
    write(devices / "mem0/pmem/size", "0x20000000")
    write(devices / "region0/size", "0x10000000")
    write(devices / "region0/mode", "ram")
    (devices / "region0/dax_region0/dax1.0").mkdir(parents=True)
    write(devices / "region1/size", "0x20000000")
    write(devices / "region1/mode", "pmem")
    write(devices / "decoder0.0/size", "0")
    memory, first, second = found(sysfs, tmp_path)
    assert (memory.kind, memory.nbytes) == ("cxl-memdev", 768 * MIB)
    assert memory.abilities == ("volatile", "persistent")
    assert "cxl create-region" in memory.note
    assert (first.kind, first.abilities, first.note) == (
        "cxl-region", ("volatile",), "see dax1.0",
    )  # fmt: skip
    assert "ndctl create-namespace" in second.note


@pytest.mark.parametrize(
    ("mode", "note"),
    [
        ("fsdax", "'mount -o dax /dev/pmem0 /mnt/pmem'"),
        ("devdax", "see its DAX device"),
        ("raw", "ndctl create-namespace -f -e namespace0.0 -m devdax"),
    ],
)
def test_namespaces_of_persistent_memory(sysfs: Path, tmp_path: Path, mode: str, note: str) -> None:
    region = sysfs / "devices/ndbus0/region0"
    write(region / "persistence_domain", "cpu_cache")
    write(region / "namespace0.0/size", 64 * MIB)
    write(region / "namespace0.0/mode", mode)
    (region / "namespace0.0/block/pmem0").mkdir(parents=True)
    link(sysfs / "bus/nd/devices/namespace0.0", region / "namespace0.0")
    write(region / "namespace0.1/size", 0)
    link(sysfs / "bus/nd/devices/namespace0.1", region / "namespace0.1")
    (space,) = found(sysfs, tmp_path)
    assert (space.kind, space.nbytes, space.url) == ("pmem-namespace", 64 * MIB, "")
    assert space.abilities == (mode, "cpu_cache")
    assert note in space.note


def test_nvme_disks(sysfs: Path, tmp_path: Path) -> None:
    for name, size in (("nvme0n1", 2048), ("nvme0n1p1", 1024), ("sda", 4096)):
        write(sysfs / "class/block" / name / "size", size)
    write(sysfs / "class/block/nvme0n1/queue/max_write_streams", 8)
    (disk,) = found(sysfs, tmp_path)
    assert (disk.kind, disk.name, disk.nbytes) == ("nvme", "nvme0n1", MIB)
    assert disk.abilities == ("write streams",)


# --- directories


def mount(point: Path | str, *, options: str = "rw", filesystem: str = "ext4") -> str:
    text = str(point).replace(" ", r"\040")
    return f"36 27 8:1 / {text} {options} shared:1 - {filesystem} /dev/sda1 rw\n"


@pytest.fixture
def roomy() -> Iterator[Path]:
    """A directory with a gigabyte below it."""
    root = Path(tempfile.mkdtemp(prefix="kvfs scan-", dir=Path.home()))
    yield root
    shutil.rmtree(root)


def test_a_directory_is_tried(sysfs: Path, tmp_path: Path, roomy: Path) -> None:
    (directory,) = found(sysfs, tmp_path, mount(roomy))
    assert (directory.kind, directory.name) == ("directory", str(roomy))
    assert directory.url == f"dir:{roomy}/kvfs"
    assert "ext4" in directory.abilities
    assert ("passthrough" in directory.abilities) == (os.geteuid() == 0)
    assert list(roomy.iterdir()) == []
    (older,) = found(sysfs, tmp_path, mount(roomy), release="6.1.0-18-amd64")
    assert "passthrough" not in older.abilities


def test_what_is_mounted_twice_is_one(sysfs: Path, tmp_path: Path, roomy: Path) -> None:
    (roomy / "again").mkdir()
    assert len(found(sysfs, tmp_path, mount(roomy) + mount(roomy / "again"))) == 1


def test_a_table_of_mounts_with_odd_names(sysfs: Path, tmp_path: Path, roomy: Path) -> None:
    """A mount's source may be empty, and names are bytes."""
    table = tmp_path / "odd"
    table.write_bytes(
        b"46 27 0:43 / /nowhere rw,relatime - tmpfs  rw\n"
        b"47 27 0:44 / /no\xff\xfewhere rw,relatime - tmpfs a\xff rw\n" + mount(roomy).encode()
    )
    (directory,) = scan(sysfs=sysfs, mounts=table)
    assert directory.name == str(roomy)


def test_directories_that_cannot_hold_a_device(
    sysfs: Path, tmp_path: Path, roomy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert found(sysfs, tmp_path, mount(roomy, options="ro,relatime")) == []
    assert found(sysfs, tmp_path, mount("/proc") + mount("/sys") + mount("/nowhere")) == []
    monkeypatch.setattr(discovery, "filesystem_type", lambda fd: 0x6969)  # NFS
    assert found(sysfs, tmp_path, mount(roomy)) == []


def test_a_directory_on_persistent_memory(
    sysfs: Path, tmp_path: Path, roomy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(discovery, "why_not_dax", lambda root: "")
    (directory,) = found(sysfs, tmp_path, mount(roomy))
    assert directory.url == f"pmem:{roomy}/kvfs"
    assert "DAX" in directory.abilities


# --- a place by its URL


def test_a_place_is_looked_at(tmp_path: Path, sysfs: Path) -> None:
    add_node(sysfs, 0, cpus="0", total=GIB, free=GIB)
    add_node(sysfs, 1, cpus="", total=GIB, free=GIB, figures={"read_latency": 300})
    place = look(parse_device_url("cxl:node=1?size=1GiB"), sysfs=sysfs)
    assert (place.is_persistent, place.figures.read_latency_ns) == (False, 300)
    with pytest.raises(UsageError, match="no memory node 2"):
        look(parse_device_url("cxl:node=2?size=1GiB"), sysfs=sysfs)
    place = look(parse_device_url(f"pmem:{tmp_path}/kv"), sysfs=sysfs)
    assert (place.persistence, place.is_persistent, place.is_formatted) == ("", True, False)
    assert "-o dax" in place.note
    assert not (tmp_path / "kv").exists()
    with pytest.raises(NotFoundError, match="no DAX device"):
        look(parse_device_url(f"dax:{tmp_path}/none"))


def test_a_file_in_place_of_a_dax_device_is_only_looked_at(tmp_path: Path) -> None:
    path = tmp_path / "memory"
    with path.open("wb") as file:
        file.truncate(64 * MIB)
    place = look(parse_device_url(f"dax:{path}"))
    assert (place.persistence, place.is_persistent, place.is_formatted) == ("page", True, False)
    assert path.stat().st_blocks == 0
    assert not look(parse_device_url(f"dax:{path}?persistence=none")).is_persistent


# --- quick figures


class Steps(ManualClock):
    """A clock on which every look takes a second."""

    def monotonic_ns(self) -> int:
        self.advance(10**9)
        return super().monotonic_ns()


def test_a_directory_is_measured_and_left_as_it_was(tmp_path: Path) -> None:
    rates = quick_bench.bench_directory(str(tmp_path), nbytes=8 * MIB, clock=Steps())
    assert rates == (8 * MIB, 8 * MIB)
    assert list(tmp_path.iterdir()) == []


def test_a_node_is_measured() -> None:
    found = numa.nodes()
    if not found:
        pytest.skip("this kernel tells of no memory nodes")
    assert quick_bench.bench_node(found[0], nbytes=8 * MIB, clock=Steps()) == (8 * MIB, 8 * MIB)


def test_the_map_of_a_bench_is_real_memory() -> None:
    fd = _native.memfd("kvfs-test", MIB)
    arena = _native.Arena(fd, MIB, huge=True, populate=True)
    assert arena.nbytes == MIB
    arena.close()
    os.close(fd)
