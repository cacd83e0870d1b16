"""Deadlines of requests, each namespace with its own, and devices that stall."""

import errno
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from kvfs.devices.base import Device
from kvfs.devices.wrappers import WrapperDevice
from kvfs.errors import UsageError
from kvfs.fuse import lane_plans, lanes
from kvfs.fuse.mount import MountOptions, mount_in_background
from kvfs.pool import Pool
from tests.fuse.mounting import (
    DEADLINE_S,
    MIB,
    MountedPool,
    end,
    launch,
    python,
    wait_until,
    write_file,
)

pytestmark = pytest.mark.fuse
T = TypeVar("T")
DEADLINE = "user.kvfs.deadline_ms"
LANE = "user.kvfs.lane"


class StallingDevice(WrapperDevice):
    """Operations of these names do not come back before `may_go`."""

    def __init__(self, inner: Device, operations: set[str]) -> None:
        super().__init__(inner)
        self.may_go = threading.Event()
        self._operations = operations

    def _call(self, operation: str, nbytes: int, action: Callable[[], T]) -> T:
        if operation in self._operations:
            assert self.may_go.wait(DEADLINE_S)
        return action()


@pytest.fixture
def stalling(pool: Pool) -> Iterator[StallingDevice]:
    """The pool's directory device, which persists nothing until it may go on."""
    device = pool.store.state.devices[0]
    stalling = StallingDevice(device.device, {"persist", "persist_staging"})
    device.device = stalling
    yield stalling
    stalling.may_go.set()


FSYNC = """
import os, sys
fd = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)
os.write(fd, b"x" * 100)
try:
    os.fsync(fd)
except OSError as error:
    print(error.errno)
else:
    print(0)
"""


@pytest.mark.parametrize("core", [True, False], ids=["core", "no-core"])
def test_each_namespace_has_its_own(
    pool: Pool, stalling: StallingDevice, tmp_path: Path, expected_warnings: list[str], core: bool
) -> None:
    """Of two that wait for the same device, one fails soon; the other waits for as long as it may.

    The mount's own deadline is between the two.
    """
    expected_warnings.append("request timed out")
    path = tmp_path / "mnt"
    path.mkdir()
    with mount_in_background(pool, path, MountOptions(deadline_s=1, core=core)):
        for name, deadline_ms in (("quick", b"300"), ("patient", b"60000")):
            (path / name).mkdir()
            os.setxattr(path / name, DEADLINE, deadline_ms)
        results: dict[str, str] = {}

        def fsync(name: str) -> None:
            results[name] = python(FSYNC, path / name / "f").strip()

        threads = [threading.Thread(target=fsync, args=(name,)) for name in ("patient", "quick")]
        for thread in threads:
            thread.start()
        wait_until(lambda: "quick" in results, "the quick one fails")
        assert python(FSYNC, path / "mounts-own").strip() == str(errno.EIO)
        assert "patient" not in results
        stalling.may_go.set()
        for thread in threads:
            thread.join(DEADLINE_S)
        assert results == {"quick": str(errno.EIO), "patient": "0"}
        mount = mounted_status(path)["mount"]
        assert mount["timeouts"] == sum(mount["timeouts_by_namespace"].values()) >= 2
        assert mount["timeouts_by_namespace"]["quick"] >= 1
        assert "patient" not in mount["timeouts_by_namespace"]
        samples = (path / ".kvfs/metrics").read_text()
        assert 'kvfs_mount_deadline_hits_total{namespace="quick"}' in samples


def test_deadline_is_an_attribute_that_stays(mounted: MountedPool) -> None:
    mounted.expected_log.append(r"user\.kvfs\.deadline_ms of 'ns' was not set: deadline_ms '")
    path = mounted.path / "ns"
    path.mkdir()
    (path / "d").mkdir()
    write_file(path / "f", b"x")
    assert DEADLINE not in os.listxattr(path)
    with pytest.raises(OSError, match="No data"):
        os.getxattr(path, DEADLINE)
    os.setxattr(path, DEADLINE, b"2500")
    assert DEADLINE in os.listxattr(path)
    for value in (b"0", b"9", b"3600001", b"-5", b"1.5", b"soon", b"\xff"):
        with pytest.raises(OSError, match="Invalid"):
            os.setxattr(path, DEADLINE, value)
    for other in (path / "d", path / "f", mounted.path):
        with pytest.raises(OSError, match=r"not permitted|denied|not supported"):
            os.setxattr(other, DEADLINE, b"2500")
    mounted.stop()
    mounted.start()
    assert os.getxattr(path, DEADLINE) == b"2500"
    os.removexattr(path, DEADLINE)
    with pytest.raises(OSError, match="No data"):
        os.removexattr(path, DEADLINE)
    assert (path / "f").read_bytes() == b"x"


def test_deadline_through_the_api(pool: Pool) -> None:
    pool.make_namespace("space")
    info = pool.namespace("space").info
    pool.set_deadline("space", 700)
    assert pool.deadlines_ms == {info.namespace_id: 700}
    with pytest.raises(UsageError, match="expected a whole number of milliseconds, 10 to 3600000"):
        pool.set_deadline("space", 5)
    pool.rename_namespace("space", "other")
    assert pool.deadlines_ms == {info.namespace_id: 700}
    pool.set_deadline("other", None)
    pool.set_deadline("other", None)
    assert pool.deadlines_ms == {}


def test_stalled_device_is_not_passed_through(
    pool: Pool, tmp_path: Path, expected_warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it holds is read by the handlers, which give up in time, until it is well again."""
    expected_warnings += ["request timed out", "missed a deadline"]
    path = tmp_path / "mnt"
    path.mkdir()
    may_go = threading.Event()
    may_go.set()
    verified = pool.store.verified

    def stall(records):  # type: ignore[no-untyped-def]
        assert may_go.wait(DEADLINE_S)
        return verified(records)

    monkeypatch.setattr(pool.store, "verified", stall)
    with mount_in_background(pool, path, MountOptions(deadline_s=0.5)) as mount:
        names = ("one", "two")
        for name in names:
            write_file(path / name, bytes(9 * MIB))
        wait_until(lambda: os.getxattr(path / "one", LANE) == b"passthrough", "it is published")
        with monkeypatch.context() as patch:
            patch.setattr(lanes.Lanes, "is_vouched", lambda *_: False)
            may_go.clear()
            with pytest.raises(OSError, match="Input/output"):
                os.open(path / "one", os.O_RDONLY)
            may_go.set()
        assert [os.getxattr(path / name, LANE) for name in names] == [b"namespace"] * 2
        assert mounted_status(path)["mount"]["stalled_devices"] == ["dir0"]
        for name in names:
            assert (path / name).read_bytes() == bytes(9 * MIB)
        monkeypatch.setattr(lane_plans, "STALLED_NS", 0)
        assert [os.getxattr(path / name, LANE) for name in names] == [b"passthrough"] * 2
        assert mount.is_alive


def mounted_status(path: Path) -> dict[str, Any]:
    text = python("import sys; print(open(sys.argv[1]).read())", path / ".kvfs/status.json")
    status = json.loads(text)
    assert isinstance(status, dict)
    return status


def test_a_read_that_stalls_is_noted(
    pool: Pool, tmp_path: Path, expected_warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected_warnings += ["request timed out", "missed a deadline"]
    path = tmp_path / "mnt"
    path.mkdir()
    may_go = threading.Event()
    with mount_in_background(pool, path, MountOptions(deadline_s=0.5, passthrough=False)):
        write_file(path / "f", b"x" * 3 * MIB)
        monkeypatch.setattr(lanes.Lanes, "plan", lambda *_, **__: None)
        monkeypatch.setattr(pool.files, "read_nowait", lambda *_: None)
        read_into = pool.files.read_into

        def stall(*arguments):  # type: ignore[no-untyped-def]
            assert may_go.wait(DEADLINE_S)
            return read_into(*arguments)

        monkeypatch.setattr(pool.files, "read_into", stall)
        code = """
import os, sys
try:
    os.pread(os.open(sys.argv[1], os.O_RDONLY), 100, 0)
except OSError as error:
    print(error.errno)
"""
        assert python(code, path / "f").strip() == str(errno.EIO)
        may_go.set()
        assert "dir0" in mounted_status(path)["mount"]["stalled_devices"]
        assert (path / "f").read_bytes() == b"x" * 3 * MIB


WRITER = """
import os, sys
fd = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)
os.write(fd, b"a" * 100)
print("written", flush=True)
sys.stdin.readline()
try:
    os.pwrite(fd, b"b" * 100, 100)
except OSError as error:
    print(error.errno)
try:
    os.close(fd)
except OSError as error:
    print(error.errno)
"""

READER = """
import os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
os.pread(fd, 100, 0)
print("read", flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize("core", [True, False], ids=["core", "no-core"])
def test_what_finds_no_thread_in_time(
    pool: Pool, stalling: StallingDevice, tmp_path: Path, expected_warnings: list[str], core: bool
) -> None:
    """A close is done when a thread is free again; a write that never was keeps its file away."""
    expected_warnings.append("request timed out")
    path = tmp_path / "mnt"
    path.mkdir()
    options = MountOptions(deadline_s=0.5, core=core, threads=1)
    with mount_in_background(pool, path, options):
        stalling.may_go.set()
        write_file(path / "read", b"r" * 3 * MIB)
        reader, writer = launch(READER, path / "read"), launch(WRITER, path / "written")
        for process in (reader, writer):
            assert process.stdout is not None
            assert process.stdout.readline()
        stalling.may_go.clear()
        blocker = launch(FSYNC, path / "blocks")
        try:
            assert blocker.communicate()[0].strip() == str(errno.EIO)
            complaints = writer.communicate("go\n")[0].split()
            # The core writes by itself what it was granted.
            assert complaints == [str(errno.EIO)] * (1 if core else 2)
            with pool.store.state.lock:  # not to be closed at once
                before = mounted_timeouts(pool)
                reader.communicate("go\n")
                wait_until(lambda: mounted_timeouts(pool) > before, "its close is given up")
        finally:
            for process in (reader, writer, blocker):
                end(process)
        assert pool.files._writers
        assert pool.store.state.pins
        stalling.may_go.set()
        wait_until(lambda: not pool.files._writers, "files are closed")
        wait_until(lambda: not pool.store.state.pins, "readers are closed")
        assert python(READ_BACK, path / "written").strip() == ("200" if core else "ENOENT")


READ_BACK = """
import errno, sys
try:
    print(len(open(sys.argv[1], "rb").read()))
except OSError as error:
    print(errno.errorcode[error.errno])
"""


def mounted_timeouts(pool: Pool) -> int:
    """How many requests were given up; asked past the mount, which is busy."""
    snapshot = pool.mount_snapshot
    assert snapshot is not None
    return int(snapshot()["timeouts"])
