"""Clients that lie: wrong messages, floods, foreign descriptors, other users, changing memory."""

import contextlib
import mmap
import os
import random
import socket
import stat
import struct
import threading
from pathlib import Path

import msgspec
import numpy as np
import pytest

import kvfs
from kvfs import _native
from kvfs.clients import channel
from kvfs.clients import messages as msg
from kvfs.clients.link import ask
from tests.clients.support import BLOCK, LAYOUT, ROOT, child, client, payloads, served, tokens
from tests.fuse.mounting import wait_until

DRAM = "dram:?size=128MiB&segment=16MiB"


@pytest.fixture
def place(tmp_path):
    with served(tmp_path, DRAM) as (pool, server):
        pool.namespace("n", LAYOUT)
        yield pool, server
        # Whatever was tried, an honest client is served.
        with client(tmp_path) as remote:
            space = remote.namespace("n")
            keys, _ = space.keys(tokens(3, 77))
            space.put(keys, payloads(3, 77))
            out = np.zeros((3, BLOCK), np.uint8)
            assert space.read_into(keys, out).all()
            assert (out == payloads(3, 77)).all()


def connect(pool) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(20)
    connection.connect(str(pool.path / channel.SOCKET_NAME))
    return connection


def begin(pool) -> tuple[socket.socket, socket.socket]:
    """Return a session's first connection, and one that has joined it."""
    main = connect(pool)
    welcome, fds = ask(main, msg.Hello(1, 1, "liar"))
    channel.close_all(fds)
    joined = connect(pool)
    ask(joined, msg.Join(welcome.token))
    return main, joined


def send_raw(connection: socket.socket, raw: bytes) -> None:
    connection.sendall(struct.pack("<I", len(raw)) + raw)


def reply(connection: socket.socket) -> msg.Reply | None:
    received = channel.receive(connection, msg.REPLY_BYTES_MAX, idle_s=20, timeout_s=20)
    if received is None:
        return None
    channel.close_all(received[1])
    return msgspec.msgpack.decode(received[0], type=msg.Reply)


def open_to_all(folder: Path) -> None:
    """Let every user reach a directory: pytest's own are closed to others."""
    while folder != folder.parent:
        with contextlib.suppress(PermissionError):
            folder.chmod(folder.stat().st_mode | 0o055)
        folder = folder.parent


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize(
    "raw",
    [b"", b"\xc1", b"\x00", b"\xff" * 100, b"\x91" * 5000, msgspec.msgpack.encode({"request": "x"}),
     msgspec.msgpack.encode({"request": "hello"}), msgspec.msgpack.encode({"request": "flush"})],
)  # fmt: skip
def test_first_messages_that_are_none(place, raw) -> None:
    pool, _ = place
    with connect(pool) as connection:
        send_raw(connection, raw)
        answer = reply(connection)
        assert answer is not None
        assert answer.failure is not None
        assert answer.failure.error == "UsageError"
        assert reply(connection) is None


def test_messages_too_long_or_cut_short_end_the_connection(place) -> None:
    pool, server = place
    with connect(pool) as connection:
        connection.sendall(struct.pack("<I", msg.REQUEST_BYTES_MAX + 1))
        assert reply(connection) is None
    with connect(pool) as connection:
        connection.sendall(struct.pack("<I", 100) + b"abc")
    while server._connections:
        pass


def test_versions(place) -> None:
    pool, _ = place
    for hello, whom in ((msg.Hello(2, 3), "update the owner"), (msg.Hello(0, 0), "the client")):
        with connect(pool) as connection, pytest.raises(kvfs.FormatVersionError, match=whom):
            ask(connection, hello)
    with connect(pool) as connection:  # a later client that still speaks ours, with more to say
        hello = {"request": "hello", "version_min": 1, "version": 9, "colour": "blue"}
        send_raw(connection, msgspec.msgpack.encode(hello))
        answer = reply(connection)
        assert answer is not None
        assert msgspec.msgpack.decode(answer.answer, type=msg.Welcome).version == 1


def test_join_needs_the_token_of_this_process(place) -> None:
    pool, _ = place
    main, joined = begin(pool)
    with connect(pool) as other, pytest.raises(kvfs.RefusedError, match="no such session"):
        ask(other, msg.Join(bytes(16)))
    joined.close()
    main.close()


def wrong_requests(pool) -> list[msg.Request]:
    space = pool.namespace("n")
    number = space.info.namespace_id
    keys = space.keys(tokens(2, 1))[0].tobytes()
    foreign = bytes(64)
    put = {
        "namespace_id": number, "keys": keys, "parents": b"", "regions": bytes(8),
        "offsets": bytes(16), "lengths": struct.pack("<2Q", BLOCK, BLOCK),
        "counts": struct.pack("<2I", 4, 4), "durability": "none",
    }  # fmt: skip
    node = space.context("victim").node
    return [
        msg.Attach(0), msg.Attach(number + 1), msg.Attach(-5),
        msg.Segments(number, b"abc"), msg.Segments(number, bytes(8 * 65)),
        msg.Verify(number, foreign), msg.Verify(number, b"x"),
        msg.Share(4096), msg.Put(**put), msg.Put(**{**put, "keys": foreign}),
        msg.Put(**{**put, "regions": b""}), msg.Put(**{**put, "durability": "for ever"}),
        msg.Put(**{**put, "parents": bytes(32)}), msg.Put(**{**put, "counts": bytes(7)}),
        msg.ContextOpen(number, b"", create=True), msg.ContextOpen(number, b"../../x", create=True),
        msg.ContextOpen(number, b"a\0b", create=True), msg.ContextNode(1), msg.ContextNode(10**15),
        msg.ContextNode(2**64 - 1), msg.ContextList(number, -5),
        msg.Hello(1, 1), msg.Join(bytes(16)),
        msg.ContextDrop(1), msg.ContextDrop(space.info.root_node_id),
        msg.ContextPin(space.info.root_node_id, is_pinned=True),
        msg.ContextAppend(node_id=node.node_id, put=msg.Put(**put), tokens=None,
                          replace_tail=True),
        msg.ContextAppend(node_id=node.node_id, put=msg.Put(**put), tokens=bytes(4),
                          replace_tail=False),
        msg.NamespaceOpen(b"x/y", LAYOUT.to_json()), msg.NamespaceOpen(b"z", "{}x"),
        msg.NamespaceOpen(b"z", LAYOUT.to_json(), "sometimes"),
    ]  # fmt: skip


def test_wrong_requests_are_refused_one_by_one(place) -> None:
    pool, _ = place
    main, joined = begin(pool)
    for request in wrong_requests(pool):
        with pytest.raises(kvfs.KvfsError) as caught:
            ask(joined, request)
        assert "failed:" not in str(caught.value), (request, caught.value)
    answer, fds = ask(joined, msg.Segments(pool.namespace("n").info.namespace_id,
                                           np.random.default_rng(1).bytes(8 * 64)))  # fmt: skip
    assert not answer.segments
    assert not fds
    ask(joined, msg.Unshare(99))
    joined.close()
    main.close()


def test_ranges_outside_of_shared_memory(place) -> None:
    pool, _ = place
    main, joined = begin(pool)
    space = pool.namespace("n")
    fd = os.memfd_create("m")
    os.ftruncate(fd, 2 * BLOCK)
    region = ask(joined, msg.Share(2 * BLOCK), fd)[0].region
    keys = space.keys(tokens(1, 1))[0].tobytes()
    for offset, length in ((BLOCK + 1, BLOCK), (2 * BLOCK, 1), (2**64 - 1, 2), (2**63, BLOCK),
                           (0, 2**64 - 1), (2**64 - BLOCK, BLOCK)):  # fmt: skip
        put = msg.Put(namespace_id=space.info.namespace_id, keys=keys, parents=b"",
                      regions=struct.pack("<I", region), offsets=struct.pack("<Q", offset),
                      lengths=struct.pack("<Q", length), counts=struct.pack("<I", 4),
                      durability="none")  # fmt: skip
        with pytest.raises(kvfs.UsageError):
            ask(joined, put)
    os.close(fd)
    joined.close()
    main.close()


def test_foreign_descriptors(place, tmp_path) -> None:
    pool, _ = place
    main, joined = begin(pool)
    pipe = os.pipe()
    (tmp_path / "disk").write_bytes(bytes(8192))
    opened = [
        pipe[0], os.open(tmp_path, os.O_RDONLY), os.open("/dev/zero", os.O_RDWR),
        os.open(tmp_path / "disk", os.O_RDWR), os.open("/proc/self/maps", os.O_RDONLY),
        os.open("/", os.O_PATH), joined.fileno(),
    ]  # fmt: skip
    for fd in opened:
        with pytest.raises(kvfs.RefusedError, match="memory files"):
            ask(joined, msg.Share(4096), fd)
    memory = os.memfd_create("m")
    os.ftruncate(memory, 4096)
    for nbytes in (0, -1, 4097, 2**62):
        with pytest.raises(kvfs.UsageError):
            ask(joined, msg.Share(nbytes), memory)
    unreadable = os.open("/dev/shm", os.O_TMPFILE | os.O_WRONLY)
    os.ftruncate(unreadable, 4096)
    with pytest.raises(kvfs.RefusedError, match="mapped"):
        ask(joined, msg.Share(4096), unreadable)
    for _ in range(msg.REGIONS_MAX):
        ask(joined, msg.Share(4096), memory)
    with pytest.raises(kvfs.BusyError, match="shared"):
        ask(joined, msg.Share(4096), memory)
    with pytest.raises(kvfs.UsageError, match="takes none"):
        ask(joined, msg.Ping(), memory)
    for fd in (*opened[:-1], pipe[1], memory, unreadable):
        os.close(fd)
    joined.close()
    main.close()


def test_many_descriptors_are_not_kept(place) -> None:
    pool, server = place
    for connection in begin(pool):  # whatever the first client makes the owner open for good
        connection.close()
    wait_until(lambda: not server._connections, "the first client has gone")
    before = descriptors()
    main, joined = begin(pool)
    raw = msgspec.msgpack.encode(msg.Ping())
    for _ in range(20):
        with contextlib.suppress(OSError):
            socket.send_fds(joined, [struct.pack("<I", len(raw)) + raw], [0] * 60)
            reply(joined)
    joined.close()
    main.close()
    wait_until(lambda: not server._connections, "all have gone")
    wait_until(lambda: descriptors() <= before, "descriptors are closed")


def test_truncated_memory_costs_its_own_put(place) -> None:
    pool, _ = place
    with client(pool.path.parent) as remote:
        space = remote.namespace("n")
        fd = os.memfd_create("mine")
        os.ftruncate(fd, 4 * BLOCK)
        memory = mmap.mmap(fd, 4 * BLOCK)
        remote.share(fd, memory)
        data = np.frombuffer(memory, np.uint8).reshape(4, BLOCK)
        data[:] = 1
        keys, _ = space.keys(tokens(4, 1))
        space.put(keys[:1], data[:1])
        os.ftruncate(fd, BLOCK)
        with pytest.raises(kvfs.UsageError, match="cannot be read"):
            space.put(keys[1:], data[1:])
        assert space.match_prefix(keys) == 1
        os.close(fd)


@pytest.mark.parametrize("kind", ["memory", "directory"])
def test_memory_that_changes_while_it_is_put_is_stored_as_hashed(tmp_path, kind) -> None:
    """What is hashed must be what is stored: no block may fail its checksum afterwards."""
    url = DRAM if kind == "memory" else f"dir:{tmp_path}/device?size=256MiB&segment=16MiB"
    flip = """
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
memory = mmap.mmap(fd, 1 << 20)
print("flips", flush=True)
a, b = bytes(4096), b"\\xff" * 4096
while True:
    for i in range(0, 1 << 20, 4096):
        memory[i:i + 4096] = a
    for i in range(0, 1 << 20, 4096):
        memory[i:i + 4096] = b
"""
    with served(tmp_path, url) as (pool, _), client(tmp_path) as remote:
        space = remote.namespace("n", LAYOUT)
        fd = os.memfd_create("mine")
        os.ftruncate(fd, 1 << 20)
        memory = mmap.mmap(fd, 1 << 20)
        remote.share(fd, memory)
        with child(flip, f"/proc/{os.getpid()}/fd/{fd}") as flipper:
            assert flipper.stdout.readline() == "flips\n"
            data = np.frombuffer(memory, np.uint8).reshape(16, BLOCK)
            mixed = 0
            for step in range(40):
                keys, _ = space.keys(tokens(16, step))
                space.put(keys, data, durability="async")
                out = np.zeros((16, BLOCK), np.uint8)
                assert space.read_into(keys, out).all()
                mixed += int((out.min(axis=1) != out.max(axis=1)).sum())
            flipper.kill()
            flipper.communicate()
        assert pool.store.state.counters.snapshot()["checksum_errors"] == 0
        assert mixed, "nothing changed under the copies: the test tests nothing"
        os.close(fd)


def test_garbage_in_lease_page_and_ring(place) -> None:
    pool, server = place
    space = pool.namespace("n")
    keys, _ = space.keys(tokens(20, 1))
    space.put(keys, payloads(20, 1))
    main = connect(pool)
    welcome, (page, notice, ring) = ask(main, msg.Hello(1, 1, "liar"))
    rng = random.Random(1)
    with contextlib.closing(mmap.mmap(page, 4096 + 4096 * 8)) as memory:
        for _ in range(20):
            memory[:] = rng.randbytes(len(memory))
            session = server._sessions[welcome.token]
            assert len(session.holder.places()) <= 4096
            pool.store.drop(space.info.namespace_id, keys)
            space.put(keys, payloads(20, 1))
            server.statistics()
    size = os.fstat(ring).st_size
    with contextlib.closing(mmap.mmap(ring, size)) as memory:
        for _ in range(20):
            memory[:] = rng.randbytes(size)
            session.drain()
        memory[:] = b"\0" * size
        memory[64:72] = struct.pack("<Q", 65536)
        memory[4096:] = rng.randbytes(size - 4096)
        session.drain()
    channel.close_all([page, notice, ring])
    main.close()


def test_a_client_holds_no_segment_of_a_namespace_it_has_not_attached(place) -> None:
    pool, server = place
    space = pool.namespace("n")
    keys, _ = space.keys(tokens(250, 1))
    space.put(keys, payloads(250, 1))
    record = space.lookup(keys)[:1]
    main = connect(pool)
    _, (page, notice, ring) = ask(main, msg.Hello(1, 1, "liar"))
    liar = _native.LeasePage.attach(page, notice)
    liar.hold(record)
    assert server.statistics()[0].held_segments == 1
    state = pool.store.state
    segment = state.segment_of(0, int(record[0]["segment"]), int(record[0]["generation"]))
    with state.lock:
        assert not state.holds.is_held(segment)
    channel.close_all([page, notice, ring])
    main.close()


def test_floods_of_connections(place) -> None:
    pool, server = place
    connections = [connect(pool) for _ in range(200)]
    for connection in connections:
        connection.close()
    wait_until(lambda: not server._connections, "all have gone")
    assert threading.active_count() < 60


def test_no_thread_left_for_one_connection(place, monkeypatch) -> None:
    pool, server = place

    def fail(thread: threading.Thread) -> None:
        monkeypatch.undo()
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fail)
    with connect(pool) as connection, pytest.raises(kvfs.BusyError, match="no thread left"):
        ask(connection, msg.Hello(1, 1, "one too many"))
    main, joined = begin(pool)
    main.close()
    joined.close()
    wait_until(lambda: not server._connections, "all have gone")
    assert not server._uids


FLOOD = """
import os, socket, struct, sys
sys.path.insert(0, sys.argv[2])
import msgspec
from kvfs.clients import channel, messages as msg
from kvfs.clients.link import ask
import kvfs
os.setgroups([]); os.setgid(65534); os.setuid(65534)
kept, refused = [], []
for _ in range(10):
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(20)
    connection.connect(sys.argv[1])
    kept.append(connection)
    try:
        ask(connection, msg.Hello(1, 1, "flood"))
    except kvfs.BusyError as error:
        refused.append(str(error))
print(len(refused), set(refused), flush=True)
sys.stdin.readline()
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("what", ["CONNECTIONS", "SESSIONS"])
def test_one_user_leaves_room_for_others(place, monkeypatch, what) -> None:
    pool, server = place
    monkeypatch.setattr(f"kvfs.clients.server.USER_{what}_MAX", 4)
    open_to_all(pool.path)
    with child(FLOOD, str(pool.path / channel.SOCKET_NAME), str(ROOT)) as process:
        count, _, text = process.stdout.readline().partition(" ")
        assert int(count) == 6
        assert "user 65534 has 4" in text
        assert "end idle clients" in text
        main, joined = begin(pool)  # another user
        for _ in range(5):
            more = connect(pool)
            ask(more, msg.Hello(1, 1, "honest"))
            more.close()
        main.close()
        joined.close()
        process.communicate("end\n")
    wait_until(lambda: not server._connections, "all have gone")
    assert not server._uids


def test_mutated_messages(place) -> None:
    """A seeded mutator over real messages against a live session."""
    pool, _ = place
    rng = random.Random(7)
    requests = [*wrong_requests(pool), msg.Ping(), msg.Status(), msg.NamespaceList(),
                msg.Attach(pool.namespace("n").info.namespace_id), msg.Hello(1, 1)]  # fmt: skip
    encoded = [msgspec.msgpack.encode(request) for request in requests]
    main, joined = begin(pool)
    for _ in range(1500):
        raw = bytearray(rng.choice(encoded))
        for _ in range(rng.randint(1, 6)):
            kind = rng.randrange(3)
            at = rng.randrange(len(raw)) if raw else 0
            if kind == 0 and raw:
                raw[at] = rng.randrange(256)
            elif kind == 1:
                raw[at:at] = rng.randbytes(rng.randrange(8))
            else:
                del raw[at : at + rng.randrange(8)]
        try:
            send_raw(joined, bytes(raw))
            if reply(joined) is None:
                raise ConnectionError
        except OSError:
            main.close()
            joined.close()
            main, joined = begin(pool)
    joined.close()
    main.close()


def test_nobody_else_can_lock_the_pool(tmp_path) -> None:
    with served(tmp_path, DRAM) as (pool, _):
        lock = pool.path / "lock"
        assert stat.S_IMODE(lock.stat().st_mode) == 0o600
    lock.chmod(0o644)  # as earlier releases made it
    with kvfs.open_pool(pool.path):
        assert stat.S_IMODE(lock.stat().st_mode) == 0o600


OTHER_USER = """
import os, sys
sys.path.insert(0, sys.argv[3])
import numpy as np, kvfs, kvfs.clients.remote, kvfs.views
os.setgroups([]); os.setgid(65534); os.setuid(65534)
what = sys.argv[2]
with kvfs.open_pool(sys.argv[1]) as pool:
    print(sorted(i.name for i in pool.namespaces()))
    def attempt(step):
        try:
            return step()
        except kvfs.KvfsError as error:
            return type(error).__name__
    space = attempt(lambda: pool.namespace("n"))
    if not isinstance(space, str):
        keys, _ = space.keys(list(range(12)))
        out = np.zeros((3, 65536), np.uint8)
        print(int(space.read_into(keys, out).sum()))
        print(attempt(lambda: space.put(keys, out).blocks_deduplicated))
        print(attempt(lambda: space.context("mine").name))
        lease = pool.backend.lease(space.info.namespace_id, keys)
        for fd in [int(lease.backings().fds[0]), pool.attached().index(space.info.namespace_id).fd]:
            try:
                os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
                print("opened for writing")
            except PermissionError:
                print("denied")
    else:
        print(space)
    print(attempt(lambda: pool.namespace("fresh", kvfs.Layout()) and "made"))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        (0o700, ["['default']", "RefusedError", "RefusedError"]),
        (0o755, ["['default', 'n']", "3", "RefusedError", "RefusedError", "denied", "denied",
                 "RefusedError"]),
        (0o777, ["['default', 'n']", "3", "0", "mine", "denied", "denied", "RefusedError"]),
    ],
)  # fmt: skip
def test_other_users_may_what_the_mode_says(place, mode, expected) -> None:
    pool, _ = place
    space = pool.namespace("n")
    keys, _ = space.keys(list(range(12)))
    space.put(keys, payloads(3, 1))
    pool.catalog.set_attributes(space.info.root_node_id, mode=mode, now_ns=1)
    open_to_all(pool.path)
    if mode == 0o777:
        expected[2] = "3"
    with child(OTHER_USER, str(pool.path), oct(mode), str(ROOT)) as process:
        assert process.communicate()[0].split("\n")[:-1] == expected


@pytest.mark.parametrize(
    ("error", "kind"),
    [(OSError(5, "Input/output error"), kvfs.DeviceError), (TimeoutError("slow"), kvfs.DeviceError),
     (ConnectionResetError(), kvfs.DeviceError), (MemoryError(), kvfs.KvfsError),
     (ZeroDivisionError("bug"), kvfs.KvfsError)],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)  # fmt: skip
def test_whatever_fails_in_the_owner_is_answered(
    place, monkeypatch, caplog, error, kind, expected_warnings
) -> None:
    expected_warnings.append("request of a client failed")
    pool, _ = place
    main, joined = begin(pool)

    def fail(*_arguments, **_options) -> None:
        raise error

    monkeypatch.setattr(pool, "flush", fail)
    for count in (1, 2):
        with pytest.raises(kind, match=f"owner failed: {type(error).__name__}.*see its log"):
            ask(joined, msg.Flush())
        assert pool.client_figures()[3] == count
    assert "Flush" in caplog.text
    monkeypatch.undo()
    for connection in (joined, main):  # both go on
        ask(connection, msg.Flush())
    joined.close()
    main.close()


def test_an_answer_that_is_too_long_is_one_failure(place, monkeypatch) -> None:
    pool, _ = place
    main, joined = begin(pool)
    monkeypatch.setattr(msg, "REPLY_BYTES_MAX", 600)
    with pytest.raises(kvfs.UsageError, match="ask for less at once"):
        ask(joined, msg.Status())
    monkeypatch.undo()
    ask(joined, msg.Status())
    joined.close()
    main.close()
