"""Memory that clients share with the owner: how much of it is mapped, and what becomes of holes."""

import contextlib
import mmap
import os
import struct
from pathlib import Path

import msgspec
import numpy as np
import pytest

import kvfs
from kvfs import _native
from kvfs.clients import messages as msg
from kvfs.clients.link import ask
from kvfs.clients.regions import Regions, SharedFiles
from tests.clients.support import BLOCK, ROOT, child, client, payloads, served, tokens
from tests.clients.test_hostile import begin, connect, open_to_all
from tests.clients.test_hostile import place as place
from tests.fuse.mounting import wait_until

GIB = 1 << 30
TIB = 1 << 40
NOBODY = 65534


def mapped(fd: int) -> int:
    """Return how many bytes of a file this process has mapped."""
    found = os.fstat(fd)
    device = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}"
    total = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, _, where, inode = line.split()[:5]
        if where == device and int(inode) == found.st_ino:
            start, end = (int(part, 16) for part in span.split("-"))
            total += end - start
    return total


def sparse(nbytes: int) -> int:
    fd = os.memfd_create("sparse")
    os.ftruncate(fd, nbytes)
    return fd


def put_of(space, region: int, offsets: list[int], seed: int = 1) -> msg.Put:
    count = len(offsets)
    return msg.Put(
        namespace_id=space.info.namespace_id, keys=space.keys(tokens(count, seed))[0].tobytes(),
        parents=b"", regions=struct.pack("<I", region) * count,
        offsets=struct.pack(f"<{count}Q", *offsets), lengths=struct.pack("<Q", BLOCK) * count,
        counts=struct.pack("<I", 4) * count, durability="none",
    )  # fmt: skip


def test_a_file_is_mapped_once(place) -> None:
    pool, server = place
    main, joined = begin(pool)
    other_main, other = begin(pool)
    with contextlib.closing(os.fdopen(sparse(TIB), "rb")) as file:
        fd = file.fileno()
        regions = [ask(joined, msg.Share(TIB), fd)[0].region for _ in range(msg.REGIONS_MAX)]
        assert mapped(fd) == TIB
        for _ in range(10):
            ask(other, msg.Share(GIB), fd)
        assert mapped(fd) == TIB
        assert server._files.mapped_bytes() == TIB
        for region in regions:
            ask(joined, msg.Unshare(region))
        assert mapped(fd) == TIB  # the other one's
        other.close()
        other_main.close()
        wait_until(lambda: not mapped(fd), "unmapped with the last connection")
        assert os.fstat(fd).st_blocks == 0
    joined.close()
    main.close()


def test_sparse_files_leave_the_owner_room(place) -> None:
    pool, server = place
    main, joined = begin(pool)
    fds = [sparse(TIB) for _ in range(8)]
    limit = pool.store.state.options.client_shared_bytes
    for fd in fds[: limit // TIB]:
        ask(joined, msg.Share(TIB), fd)
    for fd in fds[limit // TIB :]:
        with pytest.raises(kvfs.BusyError, match=r"raise PoolOptions\.client_shared_bytes"):
            ask(joined, msg.Share(TIB), fd)
    assert sum(map(mapped, fds)) == server._files.mapped_bytes() == limit
    joined.close()
    main.close()
    wait_until(lambda: not server._files.mapped_bytes(), "all is given back")
    for fd in fds:
        os.close(fd)


def test_the_bound_is_an_option(tmp_path) -> None:
    with served(tmp_path, client_shared_bytes=8 << 20) as (pool, _):
        main, joined = begin(pool)
        small, large = sparse(5 << 20), sparse(5 << 20)
        region = ask(joined, msg.Share(5 << 20), small)[0].region
        with pytest.raises(kvfs.BusyError, match=r"may share 8\.0 MiB"):
            ask(joined, msg.Share(5 << 20), large)
        ask(joined, msg.Share(3 << 20), large)
        ask(joined, msg.Unshare(region))
        ask(joined, msg.Share(5 << 20), large)
        for fd in (small, large):
            os.close(fd)
        joined.close()
        main.close()
    with pytest.raises(kvfs.UsageError, match="client_shared_bytes must be positive"):
        kvfs.PoolOptions(client_shared_bytes=0)


def test_number_of_files_and_total_are_bounded(monkeypatch) -> None:
    monkeypatch.setattr("kvfs.clients.regions.USER_FILES_MAX", 3)
    monkeypatch.setattr("kvfs.clients.regions.SHARED_BYTES_MAX", 5 * TIB)
    files = SharedFiles(4 * TIB)
    mine, other = Regions(files, 1), Regions(files, 2)
    fds = [sparse(TIB) for _ in range(4)]
    for fd in fds[:3]:
        mine.share(fd, TIB)
    with pytest.raises(kvfs.BusyError, match="shares 3 memory files"):
        mine.share(fds[3], TIB)
    other.share(fds[0], TIB)
    other.share(fds[1], TIB)
    with pytest.raises(kvfs.BusyError, match="clients share"):
        other.share(fds[2], TIB)
    mine.close()
    other.close()
    assert not files.mapped_bytes()
    assert not any(map(mapped, fds))
    for fd in fds:
        os.close(fd)


def test_holes_are_neither_read_nor_filled(place) -> None:
    pool, _ = place
    space = pool.namespace("n")
    main, joined = begin(pool)
    fd = sparse(GIB)
    region = ask(joined, msg.Share(GIB), fd)[0].region
    with pytest.raises(kvfs.UsageError, match="write blocks before they are put"):
        ask(joined, put_of(space, region, [step << 20 for step in range(1000)]))
    assert os.fstat(fd).st_blocks == 0
    data = payloads(2, 5)
    os.pwrite(fd, data.tobytes(), BLOCK)
    before = os.fstat(fd).st_blocks
    for offsets in ([BLOCK, 4 * BLOCK], [BLOCK - 4096], [2 * BLOCK + 1], [GIB - BLOCK]):
        with pytest.raises(kvfs.UsageError, match="cannot be read"):
            ask(joined, put_of(space, region, offsets))
    assert os.fstat(fd).st_blocks == before
    assert ask(joined, put_of(space, region, [BLOCK, 2 * BLOCK], 6))[0].result.blocks_stored == 2
    out = np.zeros((2, BLOCK), np.uint8)
    assert space.read_into(space.keys(tokens(2, 6))[0], out).all()
    assert (out == data).all()
    assert os.fstat(fd).st_blocks == before
    os.close(fd)
    joined.close()
    main.close()


def test_a_block_too_long_is_refused_before_it_is_looked_at(place) -> None:
    pool, _ = place
    main, joined = begin(pool)
    fd = sparse(TIB)
    region = ask(joined, msg.Share(TIB), fd)[0].region
    put = put_of(pool.namespace("n"), region, [0])
    put = msgspec.structs.replace(put, lengths=struct.pack("<Q", TIB))
    with pytest.raises(kvfs.UsageError, match="out of range"):
        ask(joined, put)
    os.close(fd)
    joined.close()
    main.close()


def test_what_is_not_in_memory(tmp_path) -> None:
    fd = sparse(16 * 4096)
    os.pwrite(fd, bytes(4096), 4 * 4096)
    with contextlib.closing(_native.Arena(fd, 16 * 4096)) as arena:
        starts = np.array([4, 3, 4, 5], np.uint64) * np.uint64(4096)
        lengths = np.array([4096, 4097, 4097, 0], np.uint64)
        statuses = np.full(4, 7, np.int32)
        assert _native.absent(starts + np.uint64(arena.address), lengths, statuses) == 2
        assert statuses.tolist() == [0, 1, 1, 0]
    with pytest.raises(ValueError, match="statuses"):
        _native.absent(starts, lengths, np.zeros(3, np.int32))
    statuses[:] = 0
    assert _native.absent(np.array([1 << 46], np.uint64), np.array([1], np.uint64),
                          statuses[:1]) == 1  # fmt: skip
    assert statuses[0] < 0
    assert os.fstat(fd).st_blocks == 8
    os.close(fd)


def test_a_client_whose_owner_maps_more_than_before(place) -> None:
    """A file that grows is mapped anew; pieces of before stay where they were."""
    pool, server = place
    space = pool.namespace("n")
    main, joined = begin(pool)
    fd = sparse(BLOCK)
    first = ask(joined, msg.Share(BLOCK), fd)[0].region
    os.pwrite(fd, payloads(4, 1).tobytes(), 0)
    second = ask(joined, msg.Share(4 * BLOCK), fd)[0].region
    with pytest.raises(kvfs.UsageError, match="outside"):
        ask(joined, put_of(space, first, [BLOCK]))
    ask(joined, put_of(space, first, [0], 1))
    ask(joined, put_of(space, second, [0, BLOCK, 2 * BLOCK], 2))
    ask(joined, msg.Unshare(first))
    assert server._files.mapped_bytes() == 4 * BLOCK
    ask(joined, msg.Unshare(second))
    assert not mapped(fd)
    os.close(fd)
    joined.close()
    main.close()


SHARER = """
import os, socket, sys
sys.path.insert(0, sys.argv[2])
from kvfs.clients import messages as msg
from kvfs.clients.link import ask
import kvfs
os.setgroups([]); os.setgid(65534); os.setuid(65534)
def connect():
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(20)
    connection.connect(sys.argv[1])
    return connection
kept, texts = [], set()
for _ in range(3):
    main, line = connect(), connect()
    welcome, _ = ask(main, msg.Hello(1, 1, "sharer"))
    ask(line, msg.Join(welcome.token))
    kept += [main, line]
    for _ in range(4):
        fd = os.memfd_create("sparse")
        os.ftruncate(fd, 1 << 40)
        try:
            ask(line, msg.Share(1 << 40), fd)
        except kvfs.BusyError as error:
            texts.add(str(error))
        os.close(fd)
print(len(texts), *texts, flush=True)
sys.stdin.readline()
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_one_user_leaves_address_space_for_others(place) -> None:
    pool, server = place
    open_to_all(pool.path)
    with child(SHARER, str(pool.path / "clients.sock"), str(ROOT)) as process:
        line = process.stdout.readline()
        assert line.startswith(f"1 user {NOBODY} shares 4.0 TiB"), line
        assert server._files.mapped_bytes() == 4 * TIB
        with client(pool.path.parent) as remote:  # another user
            memory = sparse(4 * BLOCK)
            with contextlib.closing(mmap.mmap(memory, 4 * BLOCK)) as buffer:
                buffer[:] = payloads(4, 3).tobytes()
                remote.share(memory, buffer)
                space = remote.namespace("n")
                keys, _ = space.keys(tokens(4, 3))
                data = np.frombuffer(buffer, np.uint8).reshape(4, BLOCK)
                space.put(keys, data)
                assert space.match_prefix(keys) == 4
                del data
            os.close(memory)
        process.communicate("end\n")
    wait_until(lambda: not server._files.mapped_bytes(), "all is given back")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_memory_that_the_owner_may_not_look_at_is_refused() -> None:
    fd = sparse(BLOCK)
    os.fchmod(fd, 0o400)
    os.seteuid(NOBODY)
    try:
        with pytest.raises(kvfs.RefusedError, match="may not write cannot be shared"):
            Regions(SharedFiles(TIB), 0).share(fd, BLOCK)
    finally:
        os.seteuid(0)
        os.close(fd)


PUTTER = """
import mmap, os, sys
import numpy as np
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from tests.clients.support import BLOCK, client, payloads, tokens
fd = os.memfd_create("own")
os.ftruncate(fd, 3 * BLOCK)
os.fchmod(fd, 0o600)
memory = mmap.mmap(fd, 3 * BLOCK)
memory[:] = payloads(3, 2).tobytes()
with client(Path(sys.argv[1])) as remote:
    space = remote.namespace("n")
    remote.share(fd, memory)
    print("ready", flush=True)
    sys.stdin.readline()
    for seed, data in ((1, payloads(3, 1)), (2, np.frombuffer(memory, np.uint8).reshape(3, BLOCK))):
        print(space.put(space.keys(tokens(3, seed))[0], data).blocks_stored, flush=True)
    sys.stdin.readline()
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_an_owner_of_another_user_takes_what_is_put(place) -> None:
    """The owner is no superuser: it may write what a client has staged, not what it shares."""
    pool, _ = place
    space = pool.namespace("n")
    with child(PUTTER, str(pool.path.parent), str(ROOT)) as process:
        assert process.stdout.readline() == "ready\n"
        os.seteuid(NOBODY)
        try:
            print(file=process.stdin, flush=True)
            found = [process.stdout.readline(), process.stdout.readline()]
        finally:
            os.seteuid(0)
        process.communicate("end\n")
    assert found == ["3\n", "3\n"]
    for seed in (1, 2):
        out = np.zeros((3, BLOCK), np.uint8)
        assert space.read_into(space.keys(tokens(3, seed))[0], out).all()
        assert (out == payloads(3, seed)).all()


def test_no_connection_is_left(place) -> None:
    pool, server = place
    with connect(pool) as connection:
        ask(connection, msg.Hello(1, 1, "short"))
    wait_until(lambda: not server._connections, "it has gone")
    assert not server._files.mapped_bytes()


def test_what_was_never_written_is_put_as_zeros(place) -> None:
    """By a client of ours: it copies what the owner would not read."""
    pool, _ = place
    fd = sparse(4 * BLOCK)
    with client(pool.path.parent) as remote, contextlib.closing(mmap.mmap(fd, 4 * BLOCK)) as memory:
        remote.share(fd, memory)
        memory[BLOCK : 2 * BLOCK] = payloads(1, 8).tobytes()
        space = remote.namespace("n")
        keys, _ = space.keys(tokens(4, 8))
        data = np.frombuffer(memory, np.uint8).reshape(4, BLOCK)
        space.put(keys, data)
        out = np.full((4, BLOCK), 9, np.uint8)
        assert space.read_into(keys, out).all()
        assert (out == data).all()
        assert not out[0].any()
        del data
    os.close(fd)
