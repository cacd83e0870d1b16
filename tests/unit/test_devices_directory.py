"""DirectoryDevice: the order of what it does to its medium, and what failures leave."""

import errno
import fcntl
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from kvfs.devices.base import SegmentName
from kvfs.devices.directory import DirectoryDevice
from kvfs.devices.filesystem import File, OSFile
from kvfs.devices.osfs import OSFileSystem
from kvfs.errors import BusyError, NoSpaceError
from kvfs.units import KIB, MIB, PAGE

SEGMENT = 256 * KIB


class SpyFileSystem(OSFileSystem):
    """Notes what is done, and fails where told: {(operation, path): errno}."""

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self.events: list[tuple[str, ...]] = []
        self.failures: dict[tuple[str, ...], int] = {}

    def note(self, *event: str) -> None:
        self.events.append(event)
        code = self.failures.get(event)
        if code is not None:
            raise OSError(code, os.strerror(code))

    def create(self, path: str, nbytes: int = 0) -> "SpyFile":
        self.note("create", path)
        return SpyFile(self, path, super().create(path, nbytes))

    def open(self, path: str, *, writable: bool = False) -> "SpyFile":
        return SpyFile(self, path, super().open(path, writable=writable))

    def rename(self, source: str, target: str) -> None:
        self.note("rename", source, target)
        super().rename(source, target)

    def unlink(self, path: str) -> None:
        self.note("unlink", path)
        super().unlink(path)

    def sync_directory(self, path: str) -> None:
        self.note("sync_directory", path)
        super().sync_directory(path)


class SpyFile(OSFile):
    def __init__(self, files: SpyFileSystem, path: str, file: File) -> None:
        super().__init__(file.fd)
        self._files = files
        self._path = path

    def write(self, offset: int, data: bytes | memoryview) -> None:
        try:
            self._files.note("write", self._path)
        except OSError:
            super().write(offset, memoryview(data)[: len(data) // 2])
            raise
        super().write(offset, data)

    def clear(self) -> None:
        self._files.note("clear", self._path)
        super().clear()

    def sync(self) -> None:
        self._files.note("sync", self._path)
        super().sync()


def open_directory(files: OSFileSystem, **changes: Any) -> DirectoryDevice:
    options: dict[str, Any] = {
        "index": 0, "uuid": UUID(int=1), "capacity_bytes": MIB, "segment_bytes": SEGMENT,
        "name": "ssd0",
    }  # fmt: skip
    return DirectoryDevice(files, **{**options, **changes})


@pytest.fixture
def files(tmp_path: Path) -> SpyFileSystem:
    return SpyFileSystem(str(tmp_path))


@pytest.fixture
def device(files: SpyFileSystem) -> Iterator[DirectoryDevice]:
    device = open_directory(files)
    files.events.clear()
    yield device
    device.close()


# --- the superblock


def test_superblock_is_replaced_atomically(device: DirectoryDevice, files: SpyFileSystem) -> None:
    device.write_superblock(b"one")
    assert files.events == [
        ("unlink", "kvfs.superblock.new"),
        ("create", "kvfs.superblock.new"),
        ("write", "kvfs.superblock.new"),
        ("sync", "kvfs.superblock.new"),
        ("rename", "kvfs.superblock.new", "kvfs.superblock"),
        ("sync_directory", "."),
    ]


@pytest.mark.parametrize(
    "event",
    [
        ("create", "kvfs.superblock.new"),
        ("write", "kvfs.superblock.new"),
        ("sync", "kvfs.superblock.new"),
        ("rename", "kvfs.superblock.new", "kvfs.superblock"),
    ],
)
def test_a_failed_superblock_leaves_the_old_one(
    device: DirectoryDevice, files: SpyFileSystem, event: tuple[str, ...]
) -> None:
    device.write_superblock(b"old")
    files.failures[event] = errno.EIO
    with pytest.raises(OSError, match="Input/output"):
        device.write_superblock(b"new")
    assert device.read_superblock() == b"old"
    files.failures.clear()
    device.write_superblock(b"newer")
    assert device.read_superblock() == b"newer"


def test_a_superblock_left_half_written_by_a_crash_is_ignored(
    device: DirectoryDevice, tmp_path: Path
) -> None:
    (tmp_path / "kvfs.superblock.new").write_bytes(b"torn")
    assert device.read_superblock() is None
    device.write_superblock(b"whole")
    assert device.read_superblock() == b"whole"
    assert not (tmp_path / "kvfs.superblock.new").exists()


# --- names


def test_the_tree(device: DirectoryDevice, tmp_path: Path) -> None:
    device.create(0x1F, 0x2A, b"")
    device.create_staging("part")
    staging = device.create_staging("file")
    device.adopt(staging, 3, 4, b"sidecar")
    device.write_superblock(b"x")
    found = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert found == [
        "kvfs.lock", "kvfs.superblock", "segments/00000003-00000004.file",
        "segments/00000003-00000004.sum", "segments/0000001f-0000002a.seg", "staging/part",
    ]  # fmt: skip
    assert (tmp_path / "segments/0000001f-0000002a.seg").stat().st_size == SEGMENT


def test_foreign_names_are_left_alone(files: SpyFileSystem, tmp_path: Path) -> None:
    segments = tmp_path / "segments"
    segments.mkdir()
    for name in ("0000000A-00000001.seg", "00000001-00000001.bak", "1-1.seg", "note", "x.seg"):
        (segments / name).write_bytes(b"foreign" * 1000)
    (segments / "00000001-00000001.seg").mkdir()
    (segments / "00000002-00000001.seg").symlink_to(segments / "note")
    device = open_directory(files)
    assert (device.segments(), device.used_bytes) == ([], 0)
    assert device.reap_staging() == 0
    device.destroy()
    assert len(list(segments.iterdir())) == 7


def test_a_slot_out_of_range_is_not_listed_but_counted(
    files: SpyFileSystem, tmp_path: Path
) -> None:
    (tmp_path / "segments").mkdir()
    (tmp_path / "segments/ffffffff-00000001.seg").write_bytes(b"x" * 5000)
    device = open_directory(files)
    assert (device.segments(), device.used_bytes) == ([], 2 * PAGE)
    device.close()


def test_names_are_persisted_target_first(device: DirectoryDevice, files: SpyFileSystem) -> None:
    device.persist_names()
    assert files.events == [("sync_directory", "segments"), ("sync_directory", "staging")]


def test_opening_persists_the_directories(tmp_path: Path) -> None:
    files = SpyFileSystem(str(tmp_path))
    open_directory(files).close()
    assert files.events == [("sync_directory", ".")]


# --- what a crash may leave


def test_a_payload_without_sidecar_is_listed_and_freed(
    files: SpyFileSystem, tmp_path: Path
) -> None:
    (tmp_path / "segments").mkdir()
    (tmp_path / "segments/00000003-00000007.file").write_bytes(b"x" * 5000)
    device = open_directory(files)
    assert device.reap_staging() == 0
    (name,) = device.segments()
    assert name == SegmentName(3, 7, True, 5000)
    segment = device.attach(name)
    assert device.read_tail(segment, 4096) == b""
    device.free(segment)
    assert (device.segments(), device.used_bytes) == ([], 0)
    device.close()


def test_a_sidecar_without_payload_is_reaped(files: SpyFileSystem, tmp_path: Path) -> None:
    for folder in ("segments", "staging"):
        (tmp_path / folder).mkdir()
    (tmp_path / "segments/00000003-00000007.sum").write_bytes(b"x" * 5000)
    (tmp_path / "staging/left").write_bytes(b"y")
    device = open_directory(files)
    assert (device.segments(), device.used_bytes) == ([], 3 * PAGE)
    assert device.reap_staging() == 2
    assert device.used_bytes == 0
    assert list((tmp_path / "segments").iterdir()) == []
    device.close()


def test_a_segment_cut_short_can_be_looked_at_and_freed(
    files: SpyFileSystem, tmp_path: Path
) -> None:
    (tmp_path / "segments").mkdir()
    for slot, nbytes in ((0, 0), (1, 100)):
        (tmp_path / f"segments/0000000{slot}-00000001.seg").write_bytes(b"x" * nbytes)
    device = open_directory(files)
    assert device.used_bytes == PAGE
    for name in device.segments():
        segment = device.attach(name)
        assert segment.nbytes == name.payload_bytes
        assert device.read_tail(segment, 8192) == b"x" * segment.nbytes
        assert device.next_data(segment, segment.nbytes) == segment.nbytes
        device.free(segment)
    assert (device.segments(), device.used_bytes) == ([], 0)
    device.close()


def test_more_than_the_capacity_can_only_shrink(files: SpyFileSystem) -> None:
    device = open_directory(files)
    handles = [device.create(slot, 1, b"") for slot in range(4)]
    device.close()
    device = open_directory(OSFileSystem(files.root), capacity_bytes=SEGMENT)
    assert device.used_bytes == MIB
    handles = [device.attach(name) for name in device.segments()]
    for handle in handles[:3]:
        device.free(handle)
        with pytest.raises(NoSpaceError):
            device.create(7, 7, b"")
    device.free(handles[3])
    device.create(7, 7, b"")
    device.close()


# --- adoption


def staged(device: DirectoryDevice) -> Any:
    staging = device.create_staging("part")
    device.write_staging(staging, 0, b"payload")
    return staging


PAYLOAD, SIDECAR = "segments/00000001-00000002.file", "segments/00000001-00000002.sum"
ADOPTION = [
    ("sync", "staging/part"),
    ("create", SIDECAR),
    ("write", SIDECAR),
    ("sync", SIDECAR),
    ("rename", "staging/part", PAYLOAD),
]


def test_the_sidecar_is_persisted_before_the_payload_gets_its_name(
    device: DirectoryDevice, files: SpyFileSystem
) -> None:
    staging = staged(device)
    files.events.clear()
    device.adopt(staging, 1, 2, b"sidecar")
    assert files.events == ADOPTION


@pytest.mark.parametrize("event", ADOPTION)
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_failed_adoption_changes_nothing(
    device: DirectoryDevice, files: SpyFileSystem, event: tuple[str, ...], code: int
) -> None:
    staging = staged(device)
    files.failures[event] = code
    with pytest.raises((OSError, NoSpaceError)):
        device.adopt(staging, 1, 2, b"sidecar")
    assert device.used_bytes == PAGE
    assert [name for name, _ in files.list("segments")] == []
    assert files.list("staging") == [("part", 7)]
    files.failures.clear()
    device.adopt(staging, 1, 2, b"sidecar")
    assert device.used_bytes == 2 * PAGE


def test_free_unlinks_the_payload_first(device: DirectoryDevice, files: SpyFileSystem) -> None:
    segment = device.adopt(staged(device), 1, 2, b"sidecar")
    files.events.clear()
    device.free(segment)
    assert files.events == [("unlink", PAYLOAD), ("unlink", SIDECAR)]


def test_a_failed_free_can_be_repeated(device: DirectoryDevice, files: SpyFileSystem) -> None:
    segment = device.adopt(staged(device), 1, 2, b"sidecar")
    files.failures["unlink", SIDECAR] = errno.EIO
    with pytest.raises(OSError, match="Input/output"):
        device.free(segment)
    files.failures.clear()
    device.free(segment)
    assert (device.used_bytes, device.segments()) == (0, [])


# --- a full or failing filesystem


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_filesystem_is_no_space(
    device: DirectoryDevice, files: SpyFileSystem, code: int
) -> None:
    files.failures["create", "segments/00000000-00000001.seg"] = code
    with pytest.raises(NoSpaceError, match=r"full: ssd0: .* use 256\.0 KiB of 1\.0 MiB"):
        device.create(0, 1, b"")
    assert (device.used_bytes, device.segments()) == (0, [])
    files.failures["create", "kvfs.superblock.new"] = code
    with pytest.raises(NoSpaceError):
        device.write_superblock(b"x")


def test_space_that_cannot_be_reserved_leaves_no_file(tmp_path: Path) -> None:
    shm = Path("/dev/shm")
    if not shm.is_dir():
        pytest.skip("no /dev/shm")
    size = os.statvfs(shm)
    root = shm / f"kvfs-test-full-{os.getpid()}"
    too_much = 2 * size.f_blocks * size.f_frsize  # tmpfs refuses it before it takes a page
    files = OSFileSystem(str(root))
    device = open_directory(files, capacity_bytes=too_much, segment_bytes=too_much)
    with pytest.raises(NoSpaceError, match="filesystem is full"):
        device.create(0, 1, b"")
    assert (device.used_bytes, device.segments()) == (0, [])
    device.destroy()
    assert list(root.iterdir()) == []
    root.rmdir()


def test_a_failed_staging_write_is_cut_off(device: DirectoryDevice, files: SpyFileSystem) -> None:
    staging = staged(device)
    files.failures["write", "staging/part"] = errno.ENOSPC
    with pytest.raises(NoSpaceError):
        device.write_staging(staging, 7, bytes(3 * PAGE))
    assert (staging.nbytes, device.used_bytes) == (7, PAGE)
    assert files.list("staging") == [("part", 7)]
    files.failures.clear()
    device.write_staging(staging, 7, b"!")
    assert os.pread(staging.fd, 100, 0) == b"payload!"


def test_a_failed_persist_is_raised_as_it_is(device: DirectoryDevice, files: SpyFileSystem) -> None:
    segment = device.create(0, 1, b"")
    files.failures["sync", "segments/00000000-00000001.seg"] = errno.EIO
    with pytest.raises(OSError, match="Input/output"):
        device.persist(segment)
    files.failures["sync_directory", "segments"] = errno.EIO
    with pytest.raises(OSError, match="Input/output"):
        device.persist_names()


# --- handles


def test_maps_outlive_free_and_close(device: DirectoryDevice) -> None:
    segment = device.create(0, 1, b"")
    device.write_tail(segment, PAGE, b"t" * PAGE)
    with mmap.mmap(segment.fd, SEGMENT, prot=mmap.PROT_READ) as view:
        device.free(segment)
        again = device.create(0, 2, b"")
        device.write_tail(again, PAGE, b"u" * PAGE)
        assert view[-PAGE:] == b"t" * PAGE
        device.close()
        assert view[-PAGE:] == b"t" * PAGE


def test_an_attached_file_cannot_be_written(device: DirectoryDevice) -> None:
    device.release(device.adopt(staged(device), 0, 1, b"sidecar"))
    segment = device.attach(device.segments()[0])
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.pwrite(segment.fd, b"x", 0)


def test_descriptors_are_given_back(device: DirectoryDevice) -> None:
    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = count()
    freed, released = device.create(0, 1, b""), device.create(1, 1, b"")
    adopted = device.adopt(staged(device), 2, 1, b"sidecar")
    device.read_tail(adopted, 3)
    device.drop_staging(staged(device))
    assert count() == before + 3
    device.free(freed)
    device.release(released)
    device.release(adopted)
    assert count() == before


def test_holes_are_skipped_on_tmpfs() -> None:
    shm = Path("/dev/shm")
    if not shm.is_dir():
        pytest.skip("no /dev/shm")
    root = shm / f"kvfs-test-holes-{os.getpid()}"
    device = open_directory(OSFileSystem(str(root)))
    segment = device.create(0, 1, b"")
    device.write_tail(segment, PAGE, b"t")
    assert device.next_data(segment, 0) == SEGMENT - PAGE
    device.destroy()
    root.rmdir()


def test_one_owner_at_a_time(device: DirectoryDevice, files: SpyFileSystem) -> None:
    with pytest.raises(BusyError, match=f"kvfs.lock: held by pid {os.getpid()}"):
        OSFileSystem(files.root)
    device.close()
    OSFileSystem(files.root).close()


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EACCES, errno.EOPNOTSUPP])
def test_where_leases_are_refused_only_what_was_never_shared_is_sealed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    device = open_directory(OSFileSystem(str(tmp_path)))
    ask = fcntl.fcntl

    def refuse(fd: int, operation: int, argument: int = 0) -> int:
        if operation == fcntl.F_SETLEASE:
            raise OSError(code, os.strerror(code))
        return ask(fd, operation, argument)

    for is_shared in (True, False):
        staging = device.create_staging(f"s{is_shared}")
        device.write_staging(staging, 0, b"data")
        with monkeypatch.context() as patch:
            patch.setattr(fcntl, "fcntl", refuse)
            assert device.seal_staging(staging, is_shared=is_shared) is not is_shared
        assert device.read(device.adopt(staging, int(is_shared), 1, b"s"), 0, 9) == b"data"
    device.close()


def test_a_descriptor_that_can_write_keeps_the_seal_off(tmp_path: Path) -> None:
    device = open_directory(OSFileSystem(str(tmp_path)))
    staging = device.create_staging("s")
    foreign = os.dup(staging.fd)
    assert not device.seal_staging(staging, is_shared=False)
    os.close(foreign)
    assert device.seal_staging(staging, is_shared=False)
    device.close()


# --- segments that others have open


def test_bytes_go_after_the_name_is_gone_for_good(
    device: DirectoryDevice, files: SpyFileSystem
) -> None:
    """A crash between must not bring a name back that vouches for zeros."""
    path = "segments/00000001-00000002.seg"
    segment = device.create(1, 2, b"")
    device.write_tail(segment, PAGE, b"x" * PAGE)
    segment.is_shared = True
    other = os.open(f"/proc/self/fd/{segment.fd}", os.O_RDONLY)
    files.events.clear()
    files.failures = {("sync_directory", "segments"): errno.EIO}
    device.free(segment)
    with pytest.raises(OSError, match="Input/output"):
        device.clear_freed()
    assert os.pread(other, PAGE, SEGMENT - PAGE) == b"x" * PAGE
    files.failures = {}
    device.clear_freed()
    assert files.events == [
        ("unlink", path),
        ("sync_directory", "segments"),
        ("sync_directory", "segments"),
        ("sync_directory", "staging"),
        ("clear", path),
    ]
    assert os.fstat(other).st_blocks == 0
    assert os.fstat(other).st_size == SEGMENT
    device.clear_freed()
    assert len(files.events) == 5
    os.close(other)


@pytest.mark.parametrize("how", ["attached", "kept", "not shared"])
def test_bytes_that_somebody_may_need_stay(
    device: DirectoryDevice, files: SpyFileSystem, how: str
) -> None:
    segment = device.create(1, 2, b"")
    if how == "attached":
        device.release(segment)
        segment = device.attach(SegmentName(1, 2, False, SEGMENT))
    segment.is_shared = how != "not shared"
    segment.keeps_bytes |= how == "kept"
    device.free(segment)
    files.events.clear()
    device.clear_freed()
    assert not files.events


def test_a_shared_segment_that_cannot_be_unlinked_keeps_its_bytes(
    device: DirectoryDevice, files: SpyFileSystem
) -> None:
    path = "segments/00000001-00000002.seg"
    segment = device.create(1, 2, b"")
    segment.is_shared = True
    files.failures = {("unlink", path): errno.EIO}
    with pytest.raises(OSError, match="Input/output"):
        device.free(segment)
    device.persist_names()
    assert ("clear", path) not in files.events
    files.failures = {}
    device.free(segment)
    device.persist_names()
    assert files.events[-1] == ("clear", path)


def test_space_that_cannot_be_given_back_is_reported(
    device: DirectoryDevice, files: SpyFileSystem, expected_warnings: list[str]
) -> None:
    expected_warnings.append("end such clients to get it back")
    segment = device.create(1, 2, b"")
    segment.is_shared = True
    files.failures = {("clear", "segments/00000001-00000002.seg"): errno.EOPNOTSUPP}
    device.free(segment)
    device.persist_names()
    assert device.used_bytes == 0
