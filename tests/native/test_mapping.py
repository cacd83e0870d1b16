import errno
import fcntl
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvfs import _native
from tests.native.support import PAGE, address, i32, random_bytes, u64

PAGES = 16


@pytest.fixture
def files(tmp_path: Path) -> Any:
    """Two files of PAGES random pages: (descriptor, content)."""
    opened = []
    for seed in (1, 2):
        fd = os.open(tmp_path / str(seed), os.O_RDWR | os.O_CREAT)
        content = random_bytes(seed, PAGES * PAGE).tobytes()
        os.pwrite(fd, content, 0)
        opened.append((fd, content))
    yield opened
    for fd, _ in opened:
        os.close(fd)


def test_fresh_range_reads_as_zeroes() -> None:
    mapping = _native.Mapping(3 * PAGE + 1)
    assert mapping.nbytes == 3 * PAGE + 1
    assert mapping.address % PAGE == 0
    with memoryview(mapping) as view:
        assert view.readonly
        assert view.nbytes == 3 * PAGE + 1
        assert view.c_contiguous
        assert bytes(view) == bytes(3 * PAGE + 1)
    assert not mapping.has_failed
    assert mapping.faults == []


@pytest.mark.parametrize("align", [PAGE, 1 << 16, 2 << 20, 1 << 30])
def test_alignment(align: int) -> None:
    with_align = _native.Mapping(PAGE, align)
    assert with_align.address % align == 0
    with memoryview(with_align) as view:
        assert view[PAGE - 1] == 0
    with_align.close()


extents = st.lists(
    st.tuples(st.integers(0, 1), st.integers(0, PAGES - 1), st.integers(1, 4 * PAGE)), max_size=12
)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(extents)
def test_extents_in_order(files: Any, parts: list[tuple[int, int, int]]) -> None:
    """A context scattered over two files reads as one."""
    expected, rows = b"", []
    for which, page, nbytes in parts:
        length = min(nbytes, (PAGES - page) * PAGE)
        rows.append((len(expected), files[which][0], page * PAGE, length))
        rounded = -(-length // PAGE) * PAGE
        expected += files[which][1][page * PAGE : page * PAGE + rounded]
    mapping = _native.Mapping(len(expected) + PAGE)
    columns = list(zip(*rows, strict=True)) or [()] * 4
    mapping.map(u64(*columns[0]), i32(*columns[1]), u64(*columns[2]), u64(*columns[3]))
    with memoryview(mapping) as view:
        assert bytes(view) == expected + bytes(PAGE)
    mapping.close()


def count_mappings(start: int, nbytes: int) -> int:
    count = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        low, high = (int(text, 16) for text in line.split()[0].split("-"))
        count += low < start + nbytes and high > start
    return count


def test_neighbours_are_one_mapping(files: Any) -> None:
    fd = files[0][0]
    mapping = _native.Mapping(PAGES * PAGE)
    positions = u64(*range(0, PAGES * PAGE, PAGE))
    mapping.map(positions, i32(*[fd] * PAGES), positions, u64(*[PAGE] * PAGES))
    assert count_mappings(mapping.address, PAGES * PAGE) == 1
    assert bytes(memoryview(mapping)) == files[0][1]


def test_truncation_under_a_view(files: Any) -> None:
    fd, content = files[0]
    mapping = _native.Mapping(PAGES * PAGE)
    mapping.map(u64(0), i32(fd), u64(0), u64(PAGES * PAGE))
    view = memoryview(mapping)
    assert bytes(view) == content
    os.ftruncate(fd, 10 * PAGE)
    assert view[12 * PAGE + 5] == 0
    assert mapping.has_failed
    assert mapping.faults == [12 * PAGE]
    assert bytes(view) == content[: 10 * PAGE] + bytes(6 * PAGE)
    assert mapping.faults == [p * PAGE for p in (12, 10, 11, 13, 14, 15)]
    view.release()
    mapping.close()


def test_poison_under_a_view() -> None:
    fd = _native.memfd("view", 4 * PAGE)
    os.pwrite(fd, b"x" * (4 * PAGE), 0)
    mapping = _native.Mapping(4 * PAGE)
    mapping.map(u64(0), i32(fd), u64(0), u64(4 * PAGE))
    try:
        _native.poison(mapping.address + PAGE, PAGE)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM):
            raise
        pytest.skip(f"no UFFDIO_POISON: {error}")
    with memoryview(mapping) as view:
        assert bytes(view) == b"x" * PAGE + bytes(PAGE) + b"x" * (2 * PAGE)
    assert mapping.faults == [PAGE]
    os.close(fd)


def test_only_the_first_faults_are_remembered(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "short", os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, PAGE)
    mapping = _native.Mapping(200 * PAGE)
    mapping.map(u64(0), i32(fd), u64(0), u64(200 * PAGE))
    assert bytes(memoryview(mapping)) == bytes(200 * PAGE)
    assert mapping.faults == [page * PAGE for page in range(1, 65)]
    os.close(fd)


def test_copying_out_of_a_bad_view_is_the_copys_fault(files: Any) -> None:
    fd, _ = files[0]
    mapping = _native.Mapping(2 * PAGE)
    mapping.map(u64(0), i32(fd), u64(0), u64(2 * PAGE))
    os.ftruncate(fd, PAGE)
    target, status = np.zeros(2 * PAGE, np.uint8), i32(9)
    args = u64(address(target)), u64(mapping.address), u64(2 * PAGE), None, status
    assert _native.copy_verify(*args) == 1
    assert status[0] == 3
    assert not mapping.has_failed


def test_failures_leave_the_range_readable(files: Any) -> None:
    fd, content = files[0]
    pipe, other = os.pipe()
    mapping = _native.Mapping(4 * PAGE)
    with pytest.raises(OSError, match="device") as failure:
        mapping.map(u64(0, PAGE, 2 * PAGE), i32(fd, pipe, fd), u64(0, 0, 0), u64(PAGE, PAGE, PAGE))
    assert failure.value.errno == errno.ENODEV
    with memoryview(mapping) as view:
        assert bytes(view) == content[:PAGE] + bytes(3 * PAGE)
    with pytest.raises(OSError, match="Bad file"):
        mapping.map(u64(0), i32(-1), u64(0), u64(PAGE))
    os.close(pipe)
    os.close(other)


def test_out_of_mappings(files: Any) -> None:
    """The kernel's limit is an OSError; what was mapped before stays readable."""
    fd, content = files[0]
    limit = int(Path("/proc/sys/vm/max_map_count").read_text())
    if limit > 100_000:
        pytest.skip(f"vm.max_map_count is {limit}")
    count = limit + 10
    mapping = _native.Mapping(count * PAGE)
    positions = np.arange(count, dtype="<u8") * PAGE
    same = np.zeros(count, "<u8")
    with pytest.raises(OSError, match="memory") as failure:
        mapping.map(positions, np.full(count, fd, "<i4"), same, same + PAGE)
    assert failure.value.errno == errno.ENOMEM
    with memoryview(mapping) as view:
        assert bytes(view[:PAGE]) in (content[:PAGE], bytes(PAGE))
        assert view[(count - 1) * PAGE] == 0
    mapping.close()


def test_anonymous_part(files: Any) -> None:
    fd, content = files[0]
    mapping = _native.Mapping(4 * PAGE)
    mapping.map(u64(0), i32(fd), u64(0), u64(PAGE))
    where = mapping.map_anonymous(PAGE, 2 * PAGE)
    assert where == mapping.address + PAGE
    source, digests, status = random_bytes(1, 2 * PAGE), np.zeros(16, np.uint8), i32(9)
    assert _native.copy_hash(u64(where), u64(address(source)), u64(2 * PAGE), digests, status) == 0
    mapping.protect()
    with memoryview(mapping) as view:
        assert bytes(view) == content[:PAGE] + source.tobytes() + bytes(PAGE)
    for position, nbytes in ((1, PAGE), (0, 0), (4 * PAGE, 1), (PAGE, 3 * PAGE + 1), (-PAGE, 1)):
        with pytest.raises(ValueError, match=r"position|nbytes"):
            mapping.map_anonymous(position, nbytes)


BAD_EXTENTS = [
    (1, 0, PAGE), (0, 1, PAGE), (0, 0, 0), (0, 0, 4 * PAGE + 1), (4 * PAGE, 0, 1),
    (2**64 - PAGE, 0, PAGE), (0, 2**63, PAGE), (0, 2**64 - PAGE, PAGE), (0, 0, 2**64 - 1),
]  # fmt: skip


@pytest.mark.parametrize(("position", "offset", "length"), BAD_EXTENTS)
def test_extents_that_cannot_be(files: Any, position: int, offset: int, length: int) -> None:
    mapping = _native.Mapping(4 * PAGE)
    fd = files[0][0]
    with pytest.raises(ValueError, match=r"multiples|positive|beyond|large"):
        mapping.map(u64(0, position), i32(fd, fd), u64(0, offset), u64(PAGE, length))
    assert bytes(memoryview(mapping)) == bytes(4 * PAGE)  # the good one is not mapped either


def test_close_and_exports() -> None:
    mapping = _native.Mapping(PAGE)
    view = memoryview(mapping)
    array = np.frombuffer(mapping, np.uint8)
    with pytest.raises(BufferError, match="2 exports"):
        mapping.close()
    assert view[0] == array[0] == 0
    view.release()
    del array
    mapping.close()
    mapping.close()
    for call in (
        lambda: mapping.address, lambda: mapping.nbytes, lambda: mapping.has_failed,
        lambda: mapping.faults, lambda: memoryview(mapping), mapping.protect,
        lambda: mapping.map(u64(), i32(), u64(), u64()), lambda: mapping.map_anonymous(0, 1),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="closed"):
            call()


def test_a_view_keeps_the_mapping_alive() -> None:
    view = memoryview(_native.Mapping(PAGE))
    assert bytes(view) == bytes(PAGE)


def test_bad_sizes() -> None:
    for nbytes in (0, -1, 2**46 + 1, 2**64):
        with pytest.raises(ValueError, match="nbytes"):
            _native.Mapping(nbytes)
    for align in (0, 1, 2048, 5000, 2**50):
        with pytest.raises(ValueError, match="align"):
            _native.Mapping(PAGE, align)
    with pytest.raises(ValueError, match="fds"):
        _native.Mapping(PAGE).map(u64(0), u64(0), u64(0), u64(PAGE))


def test_memfd_is_sealed() -> None:
    fd = _native.memfd("slot", 3 * PAGE)
    assert os.fstat(fd).st_size == 3 * PAGE
    assert not os.get_inheritable(fd)
    wanted = fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
    assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) & wanted == wanted
    for size in (0, 4 * PAGE):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size)
    os.close(fd)
    with pytest.raises(ValueError, match="nbytes"):
        _native.memfd("x", -1)
    with pytest.raises(OSError, match="Invalid"):
        _native.memfd("x" * 300, PAGE)


def test_arena_shares_memory() -> None:
    fd = _native.memfd("arena", 4 * PAGE)
    arena = _native.Arena(fd, 3 * PAGE, populate=True)
    assert arena.nbytes == 3 * PAGE
    with memoryview(arena) as view:
        assert not view.readonly
        assert view.nbytes == 3 * PAGE
        view[5] = 9
        assert _native.buffer_address(arena, writable=True) == (arena.address, 3 * PAGE)
        with pytest.raises(BufferError, match="1 exports"):
            arena.close()
    assert os.pread(fd, 6, 0) == b"\0\0\0\0\0\x09"
    with mmap.mmap(fd, PAGE) as other:
        other[6] = 8
        assert memoryview(arena)[6] == 8
    arena.close()
    arena.close()
    for call in (lambda: arena.address, lambda: arena.nbytes, lambda: memoryview(arena)):
        with pytest.raises(ValueError, match="closed"):
            call()
    os.close(fd)


def test_arena_arguments(tmp_path: Path) -> None:
    fd = _native.memfd("arena", PAGE)
    for nbytes in (0, -1, 2**63):
        with pytest.raises(ValueError, match="nbytes"):
            _native.Arena(fd, nbytes)
    with pytest.raises(ValueError, match="size of the file"):
        _native.Arena(fd, PAGE + 1)
    os.close(fd)
    with pytest.raises(OSError, match="Bad file"):
        _native.Arena(-1, PAGE)
    reader = os.open(tmp_path / "file", os.O_RDONLY | os.O_CREAT)
    os.truncate(tmp_path / "file", PAGE)
    with pytest.raises(PermissionError):
        _native.Arena(reader, PAGE)
    os.close(reader)
