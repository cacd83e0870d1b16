"""Sharing extents, where no filesystem needs to be able to: probing, refusing, cleaning up."""

import errno
import os
from pathlib import Path
from uuid import UUID

import pytest

from kvfs.devices import reflink
from kvfs.devices.directory import DirectoryDevice
from kvfs.devices.osfs import OSFileSystem
from kvfs.devices.reflink import NOTHING, Cloning, Extent
from kvfs.devices.wrappers import Fault, FaultyDevice, Verb
from kvfs.engine.checker.offline import ReadOnlyFileSystem
from kvfs.units import MIB, PAGE


def device_of(path: Path) -> DirectoryDevice:
    return DirectoryDevice(
        OSFileSystem(str(path)), index=0, uuid=UUID(int=1), capacity_bytes=MIB,
        segment_bytes=256 << 10, name="ssd0",
    )  # fmt: skip


@pytest.mark.parametrize("code", [0, errno.EOPNOTSUPP, errno.EINVAL, errno.EXDEV, errno.EIO])
def test_probing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    asked = []

    def clone(fd: int, extent: Extent) -> None:
        asked.append(extent)
        if code:
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(reflink, "clone", clone)
    before = os.listdir("/proc/self/fd")
    fd = os.open(tmp_path, os.O_RDONLY)
    found = reflink.probe(fd, reflink.XFS)
    os.close(fd)
    assert len(asked) == 1
    assert found == (NOTHING if code else Cloning(asked[0].nbytes, of_written=True))
    assert os.listdir("/proc/self/fd") == before
    assert not os.listdir(tmp_path)


def test_no_unnamed_files_no_cloning(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    assert reflink.probe(fd, reflink.XFS) == NOTHING
    os.close(fd)


def test_only_xfs_shares_what_is_still_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reflink, "clone", lambda *_: None)
    fd = os.open(tmp_path, os.O_RDONLY)
    assert reflink.probe(fd, reflink.XFS).of_written
    assert not reflink.probe(fd, 0x9123683E).of_written  # btrfs
    os.close(fd)


def test_a_failed_assembly_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, extent: Extent) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    device = device_of(tmp_path)
    monkeypatch.setattr(reflink, "clone", refuse)
    before = os.listdir("/proc/self/fd")
    used_bytes = device.used_bytes
    with pytest.raises(OSError, match="No space"):
        device.assemble([Extent(0, 0, PAGE, 0)], PAGE)
    assert os.listdir("/proc/self/fd") == before
    assert device.used_bytes == used_bytes
    device.close()


def test_holes_are_zero_and_the_end_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        reflink, "clone",
        lambda fd, e: os.pwrite(fd, os.pread(e.fd, e.nbytes, e.offset), e.target),
    )  # fmt: skip
    device = device_of(tmp_path)
    source = os.open(tmp_path / "source", os.O_RDWR | os.O_CREAT)
    os.write(source, b"a" * PAGE + b"b" * PAGE)
    extents = [Extent(source, PAGE, PAGE, 0), Extent(source, 0, PAGE, 2 * PAGE)]
    fd = device.assemble(extents, 2 * PAGE + 5)
    assert os.pread(fd, 4 * PAGE, 0) == b"b" * PAGE + bytes(PAGE) + b"a" * 5
    with pytest.raises(OSError, match="Bad file"):
        os.write(fd, b"x")
    os.close(fd)
    os.close(source)
    device.close()


def test_wrappers_forward_and_fail(tmp_path: Path) -> None:
    faulty = FaultyDevice(
        device_of(tmp_path), [Fault(Verb.CREATE, operation="assemble", code=errno.ENOSPC)]
    )
    with pytest.raises(OSError, match="injected into assemble"):
        faulty.assemble([], 0)
    os.close(faulty.assemble([], 0))
    faulty.close()


def test_a_check_probes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device_of(tmp_path).close()
    monkeypatch.setattr(reflink, "clone", lambda *_: pytest.fail("a check makes no files"))
    files = ReadOnlyFileSystem(str(tmp_path))
    assert files.cloning() == NOTHING
    files.close()
