"""Contexts made through the API, seen through the mount."""

import os
from collections.abc import Callable

import numpy as np
import pytest

import kvfs
from kvfs.fuse.attributes import API_ATTRIBUTE_TIMEOUT_S
from kvfs.fuse.mount import Mount
from kvfs.namespace import Context, Namespace
from kvfs.pool import Pool
from tests.fuse.mounting import sh, wait_until

pytestmark = pytest.mark.fuse
LAYOUT = kvfs.Layout("float16", (2, 3, 50), 16)  # 9600 bytes in a stride of 12288
Make = Callable[..., tuple[Context, np.ndarray]]


@pytest.fixture
def space(pool: Pool) -> Namespace:
    return pool.namespace("model", LAYOUT)


def append(context: Context, space: Namespace, first: int, count: int) -> np.ndarray:
    """Append full blocks of tokens; return their bytes, (count, 9600)."""
    keys, _ = space.keys(range((first + count) * 16))
    rows = np.random.default_rng(first).integers(0, 256, (count, 9600), np.uint8)
    context.append(keys[first:], rows, tokens=range(first * 16, (first + count) * 16))
    return rows


def as_file(rows: np.ndarray) -> bytes:
    """Lay blocks out as the file does: at strides, the last one without padding."""
    whole = np.zeros((len(rows), 12288), np.uint8)
    whole[:, :9600] = rows
    return whole.tobytes()[: (len(rows) - 1) * 12288 + 9600]


def test_context_is_a_file(space: Namespace, mount: Mount) -> None:
    rows = append(space.context("chat/42"), space, 0, 20)
    path = mount.mountpoint / "model/chat/42"
    assert path.read_bytes() == as_file(rows)
    assert os.stat(path).st_size == 19 * 12288 + 9600
    assert os.getxattr(path, "user.kvfs.tokens") == b"320"
    assert os.getxattr(path, "user.kvfs.origin") == b"api"
    sh(f"dd if={path} of=/dev/null bs=4k iflag=direct status=none")


def test_appended_blocks_appear(space: Namespace, mount: Mount) -> None:
    context = space.context("c")
    rows = append(context, space, 0, 3)
    path = mount.mountpoint / "model/c"
    assert path.read_bytes() == as_file(rows)
    with path.open("rb", buffering=0) as early:
        rows = np.concatenate([rows, append(context, space, 3, 4)])
        assert os.stat(path).st_size == len(as_file(rows))
        assert path.read_bytes() == as_file(rows)
        # What was opened before grows with it: the kernel knows one size for all.
        assert os.pread(early.fileno(), 1 << 20, 0) == as_file(rows)
    wait_until(lambda: path.read_bytes() == as_file(rows), "all blocks", API_ATTRIBUTE_TIMEOUT_S)


def test_stat_of_a_whole_context_reads_no_keys(
    pool: Pool, space: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes as long for a million blocks as for one, until one is removed."""
    context = space.context("c")
    rows = append(context, space, 0, 5)
    node_id = context.node.node_id
    reads: list[int] = []
    keys = pool.catalog.keys

    def read(*arguments: int) -> np.ndarray:
        reads.append(1)
        return keys(*arguments)

    monkeypatch.setattr(pool.catalog, "keys", read)

    def shown() -> tuple[int, int]:
        reads.clear()
        size = pool.files.current(pool.catalog.node(node_id)).size_bytes
        return size, len(reads)

    assert shown() == (len(as_file(rows)), 1)
    assert shown() == (len(as_file(rows)), 0)
    rows = np.concatenate([rows, append(context, space, 5, 2)])
    assert shown() == (len(as_file(rows)), 1)
    assert shown() == (len(as_file(rows)), 0)
    namespace_id = space.info.namespace_id
    dropped = keys(node_id)[3:4]
    pool.store.drop(namespace_id, dropped)
    assert shown() == (3 * 12288, 1)
    assert shown() == (3 * 12288, 1), "what is not whole is looked at each time"
    space.put(dropped, rows[3:4])
    assert shown()[0] == len(as_file(rows))
    assert shown() == (len(as_file(rows)), 0)


def test_replaced_tail_is_never_mixed(space: Namespace, mount: Mount) -> None:
    context = space.context("c")
    keys, _ = space.keys(range(40))
    rows = np.random.default_rng(1).integers(0, 256, (3, 9600), np.uint8)
    context.append(keys, [rows[0], rows[1], rows[2][:4800]], tokens=range(40))
    path = mount.mountpoint / "model/c"
    before = as_file(rows)[: 2 * 12288 + 4800]
    assert path.read_bytes() == before
    with path.open("rb", buffering=0) as early:
        other = np.random.default_rng(2).integers(0, 256, (1, 9600), np.uint8)
        full, _ = space.keys(range(48))
        context.append(full[2:], other, tokens=range(32, 48), replace_tail=True)
        after = as_file(np.concatenate([rows[:2], other]))
        with path.open("rb", buffering=0) as late:
            assert late.read() == after
            assert os.pread(early.fileno(), 1 << 20, 0) == before
            assert os.pread(late.fileno(), 1 << 20, 0) == after


def test_context_shortens_while_closed_and_not_while_open(
    pool: Pool, space: Namespace, mount: Mount
) -> None:
    context = space.context("c")
    rows = append(context, space, 0, 10)
    path = mount.mountpoint / "model/c"
    namespace_id = space.info.namespace_id
    with path.open("rb", buffering=0) as file:
        assert pool.store.state.pins
        assert file.read() == as_file(rows)
    wait_until(lambda: not pool.store.state.pins, "the last close unpins")
    pool.store.drop(namespace_id, context.keys[6:7])
    assert os.stat(path).st_size == 6 * 12288
    assert path.read_bytes() == as_file(rows)[: 6 * 12288]
    assert os.getxattr(path, "user.kvfs.blocks") == b"10"
    assert os.getxattr(path, "user.kvfs.resident_blocks") == b"6"
    pool.store.drop(namespace_id, context.keys[:1])
    assert path.read_bytes() == b""
    space.put(context.keys, rows)
    assert path.read_bytes() == as_file(rows)


def test_block_lost_under_an_open_context_is_an_error(
    pool: Pool, space: Namespace, mount: Mount
) -> None:
    context = space.context("c")
    rows = append(context, space, 0, 10)
    path = mount.mountpoint / "model/c"
    with path.open("rb", buffering=0) as file:
        pool.store.drop(space.info.namespace_id, context.keys[6:7])
        assert os.pread(file.fileno(), 5 * 12288, 0) == as_file(rows)[: 5 * 12288]
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with pytest.raises(OSError, match="Input/output"):
            os.pread(file.fileno(), 100, 6 * 12288)


def test_contexts_are_changed_by_the_api_alone(space: Namespace, mount: Mount) -> None:
    rows = append(space.context("d/c"), space, 0, 2)
    path = mount.mountpoint / "model/d/c"
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_TRUNC):
        with pytest.raises(PermissionError):
            os.open(path, flags)
    with pytest.raises(PermissionError):
        os.truncate(path, 0)
    os.chmod(path, 0o600)
    os.rename(path, path.with_name("e"))
    assert path.with_name("e").read_bytes() == as_file(rows)
    assert space.context("d/e", create=False).token_count == 32
    os.unlink(path.with_name("e"))
    with pytest.raises(kvfs.NotFoundError):
        space.context("d/e", create=False)


def test_dropped_context_is_gone_at_once(space: Namespace, mount: Mount) -> None:
    path = mount.mountpoint / "model/c"
    for i in range(3):
        assert not path.exists()
        context = space.context("c")
        append(context, space, 10 * i, 1) if i == 0 else None
        assert path.exists()
        context.drop()


def test_plain_files_may_lie_beside_contexts(space: Namespace, mount: Mount) -> None:
    path = mount.mountpoint / "model/plain"
    data = np.random.default_rng(4).integers(0, 256, 100_001, np.uint8).tobytes()
    path.write_bytes(data)
    assert path.read_bytes() == data
    with pytest.raises(kvfs.ExistsError):
        space.context("plain")
    assert [context.name for context in space.contexts()] == []
