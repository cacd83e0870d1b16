"""The emulated device: what it adds, and what it counts."""

import re
from pathlib import Path
from uuid import UUID

import numpy as np
import pytest

import kvfs
from kvfs.clock import ManualClock
from kvfs.devices.base import Device
from kvfs.devices.directory import DirectoryDevice
from kvfs.devices.emulated import EmulatedDevice
from kvfs.devices.osfs import OSFileSystem
from kvfs.emulation import PROFILES, Emulation, LinkFigures
from kvfs.units import KIB, MIB, PAGE

_DOC = Path(__file__).parents[2] / "docs/DEVICES.md"
LAYOUT = kvfs.Layout("float16", (4, 2, 8), 64)


class Waiter:
    """A clock that moves as far as was waited for."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.waits: list[float] = []

    def __call__(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.clock.advance(round(seconds * 1e9))


def emulated(root: Path, emulation: Emulation, waiter: Waiter) -> EmulatedDevice:
    inner = DirectoryDevice(
        OSFileSystem(str(root)), index=1, uuid=UUID(int=5), capacity_bytes=8 * MIB,
        segment_bytes=MIB, name="one",
    )  # fmt: skip
    return EmulatedDevice(inner, emulation, clock=waiter.clock, wait=waiter)


def put(device: Device, nbytes: int, slot: int = 0) -> None:
    segment = device.create(slot, 1, b"t")
    data = np.ones(nbytes, np.uint8)
    failed = device.write_payloads(
        segment, np.zeros(1, np.uint64), np.array([data.ctypes.data], np.uint64),
        np.array([nbytes], np.uint64), np.zeros((1, 16), np.uint8), np.zeros(1, np.int32),
    )  # fmt: skip
    assert not failed


def test_a_write_takes_its_latency_and_its_bytes_time(tmp_path: Path) -> None:
    waiter = Waiter()
    device = emulated(tmp_path, Emulation(write_bytes_per_s=10**9, write_latency_ns=10**6), waiter)
    put(device, 512 * KIB)
    assert waiter.waits == [pytest.approx(512 * KIB / 1e9 + 1e-3)]
    device.close()


def test_bytes_share_the_bandwidth_of_their_direction(tmp_path: Path) -> None:
    waiter = Waiter()
    device = emulated(tmp_path, Emulation(read_bytes_per_s=10**9), waiter)
    device._wait = waiter.waits.append  # others read meanwhile: the clock stands still
    for _ in range(3):
        device.note_read(10**6)
    assert waiter.waits == [pytest.approx(n * 1e-3) for n in (1, 2, 3)]
    put(device, 512 * KIB)  # writes have no limit, and do not wait for reads
    assert len(waiter.waits) == 3
    device.close()


def test_short_delays_are_saved_up(tmp_path: Path) -> None:
    waiter = Waiter()
    device = emulated(tmp_path, Emulation(10**9, read_latency_ns=5_000), waiter)
    for _ in range(1000):
        device.note_read(1000)
    assert sum(waiter.waits) == pytest.approx(1000 * (5e-6 + 1e-6), rel=0.05)
    assert len(waiter.waits) < 50
    device.close()


def test_energy_is_counted_by_direction(tmp_path: Path) -> None:
    device = emulated(tmp_path, Emulation(read_pj_per_byte=1000, write_pj_per_byte=3000), Waiter())
    put(device, 512 * KIB)
    assert device.energy_joules == pytest.approx(512 * KIB * 3e-9)
    device.note_read(10**6)
    assert device.energy_joules == pytest.approx(512 * KIB * 3e-9 + 1e-3)
    device.close()


def test_what_it_says_of_itself(tmp_path: Path) -> None:
    device = emulated(tmp_path, PROFILES["rdma"].emulation, Waiter())
    assert device.info.kind == "emulated"
    assert device.info.is_persistent
    assert device.info.figures == LinkFigures(42_900_000_000, 42_900_000_000, 3_500, 3_500)
    device.close()


def test_reads_of_a_pool_are_charged(tmp_path: Path) -> None:
    devices = [f"emulated:cxl:dir:{tmp_path}/dev?size=64MiB&segment=16MiB&write_pj_per_byte=0"]
    with kvfs.create_pool(tmp_path / "pool", devices) as pool:
        space = pool.namespace("m", LAYOUT)
        keys, _ = space.keys(np.arange(64 * 8))
        data = np.ones((8, LAYOUT.block_bytes), np.uint8)
        space.put(keys, data)
        (before,) = pool.statistics().devices
        assert (before.kind, before.energy_joules) == ("emulated", 0.0)
        target = np.zeros_like(data)
        assert space.read_into(keys, target).all()
        (after,) = pool.statistics().devices
        wanted = data.nbytes * PROFILES["cxl"].emulation.read_pj_per_byte / 1e12
        assert after.energy_joules == pytest.approx(wanted)
    with kvfs.open_pool(tmp_path / "pool") as pool:  # its URL is kept
        assert pool.statistics().devices[0].kind == "emulated"
        assert pool.namespace("m").read_into(keys, target).all()


def test_a_pool_counts_what_it_wrote_for_each_byte(tmp_path: Path) -> None:
    devices = [f"dir:{tmp_path}/dev?size=64MiB&segment=16MiB"]
    with kvfs.create_pool(tmp_path / "pool", devices) as pool:
        space = pool.namespace("m", LAYOUT)
        keys, _ = space.keys(np.arange(64 * 8))
        space.put(keys, np.ones((8, LAYOUT.block_bytes), np.uint8), durability="sync")
        (device,) = pool.statistics().devices
        assert device.bytes_stored == 8 * -(-LAYOUT.block_bytes // PAGE) * PAGE
        assert device.bytes_written > device.bytes_stored


@pytest.mark.parametrize("name", PROFILES)
def test_the_document_shows_the_same_figures(name: str) -> None:
    profile = PROFILES[name]
    (row,) = re.findall(rf"^\| `{name}` \|(.*)$", _DOC.read_text(), re.MULTILINE)
    cells = [cell.strip() for cell in row.split("|")]
    added = profile.emulation
    assert cells[:4] == [
        f"{added.read_bytes_per_s / 1e9:.1f} / {added.write_bytes_per_s / 1e9:.1f} GB/s",
        f"{added.read_latency_ns} / {added.write_latency_ns} ns",
        f"{added.read_pj_per_byte} / {added.write_pj_per_byte} pJ",
        str(profile.tier),
    ]
    for source in profile.sources:
        assert source in cells[4]
