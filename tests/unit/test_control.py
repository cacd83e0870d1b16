"""The control socket: who may ask, what comes back, and that garbage harms nobody."""

import contextlib
import os
import socket
import stat
import struct
import threading
import types
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kvfs
from kvfs import control, control_client
from kvfs.admin import messages as msg
from kvfs.clients.peer import Peer
from kvfs.control import ControlServer
from kvfs.control_client import ControlClient, owners, socket_address
from kvfs.errors import (
    BusyError,
    FormatVersionError,
    KvfsError,
    NotFoundError,
    RefusedError,
    UnavailableError,
    UsageError,
)

LAYOUT = kvfs.Layout("float16", (4, 2, 8), 64)


@pytest.fixture(autouse=True)
def runtime(tmp_path, monkeypatch):
    monkeypatch.setenv(control_client.RUNTIME_VARIABLE, str(tmp_path / "run"))
    return tmp_path / "run"


@pytest.fixture
def pool(tmp_path):
    url = f"dir:{tmp_path}/dev?size=64MiB&segment=16MiB"
    with kvfs.create_pool(tmp_path / "pool", [url]) as pool:
        yield pool


@pytest.fixture
def server(pool):
    with ControlServer(pool, mount="/mnt/kv", timeout_s=5) as server:
        yield server


def ask(pool, question):
    client = ControlClient.connect(pool.path)
    assert client is not None
    with client:
        return client.ask(question)


def put_context(pool, name, blocks=3):
    space = pool.namespace("m", LAYOUT)
    tokens = np.arange(64 * blocks)
    keys, _ = space.keys(tokens)
    data = np.arange(blocks * LAYOUT.block_bytes, dtype=np.uint8).reshape(blocks, -1)
    space.context(name).append(keys, data, tokens=tokens)
    return keys


def connection(pool):
    found = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    found.settimeout(5)
    with socket_address(pool.path) as address:
        found.connect(address)
    return found


# --- questions


def test_hello(pool, server):
    answer = ask(pool, msg.Hello())
    assert answer.pid == os.getpid()
    assert (answer.pool_name, answer.pool_path) == ("pool", str(pool.path))
    assert answer.mount == "/mnt/kv"
    assert answer.kvfs_version == kvfs.__version__


def test_status_and_devices(pool, server):
    put_context(pool, "a/b")
    status = ask(pool, msg.PoolStatus())
    assert (status.state, status.contexts, status.namespaces) == ("online", 1, 2)
    assert status.live_bytes == 3 * LAYOUT.stride
    assert status.problems == []
    devices = ask(pool, msg.DeviceList()).devices
    assert [device.name for device in devices] == ["dir0"]
    assert devices == status.devices


def test_several_questions_on_one_connection(pool, server):
    with ControlClient.connect(pool.path) as client:
        for _ in range(3):
            assert client.ask(msg.Hello()).pool_uuid == str(pool.uuid)


def test_contexts(pool, server):
    keys = put_context(pool, "a/b")
    put_context(pool, "a/c", blocks=2)
    listed = ask(pool, msg.ContextList())
    assert [context.name for context in listed.contexts] == ["m/a/b", "m/a/c"]
    assert listed.contexts[0].size_bytes == 2 * LAYOUT.stride + LAYOUT.block_bytes
    assert ask(pool, msg.ContextList(limit=1)).is_truncated
    assert ask(pool, msg.ContextList(b"m")).contexts == listed.contexts
    shown = ask(pool, msg.ContextShow(b"m/a/b"))
    assert shown.context == listed.contexts[0]
    assert shown.resident_blocks == 3
    assert shown.first_key == keys[0].tobytes().hex()
    assert [(place.device, place.blocks) for place in shown.places] == [("dir0", 3)]
    with pytest.raises(NotFoundError, match="no such namespace"):
        ask(pool, msg.ContextList(b"nope"))
    for name in (b"m/nope", b"m/a", b"", b"\xff\xfe"):
        with pytest.raises(NotFoundError, match="no such context"):
            ask(pool, msg.ContextShow(name))


def test_drop_follows_the_plan(pool, server):
    put_context(pool, "a")
    put_context(pool, "b")
    plan = ask(pool, msg.ContextDropPlan([b"m/a", b"m/b"]))
    assert [item.name for item in plan.items] == ["m/a", "m/b"]
    assert len(ask(pool, msg.ContextList()).contexts) == 2
    pool.namespace("m").context("b").drop()
    put_context(pool, "b")  # another context of the same name
    done = ask(pool, msg.ContextDrop(plan))
    assert (done.dropped, done.skipped) == (["m/a"], ["m/b"])
    assert [context.name for context in ask(pool, msg.ContextList()).contexts] == ["m/b"]


def test_drop_plans_are_refused_as_a_whole(pool, server):
    put_context(pool, "a")
    with pytest.raises(NotFoundError):
        ask(pool, msg.ContextDropPlan([b"m/a", b"m/x"]))
    with pytest.raises(UsageError, match="twice"):
        ask(pool, msg.ContextDropPlan([b"m/a", b"/m/a"]))
    with pytest.raises(UsageError, match="no context"):
        ask(pool, msg.ContextDropPlan([]))


def test_names_that_are_no_utf8(pool, server):
    put_context(pool, os.fsdecode(b"caf\xe9"))
    assert ask(pool, msg.ContextList()).contexts[0].name == "m/caf\\xe9"
    assert ask(pool, msg.ContextShow(b"m/caf\xe9")).context.blocks == 3


# --- the socket


def test_socket_is_private_and_goes_away(pool):
    path = pool.path / "control.sock"
    with ControlServer(pool):
        status = path.stat()
        assert stat.S_ISSOCK(status.st_mode)
        assert stat.S_IMODE(status.st_mode) == 0o600
    assert not path.exists()
    assert ControlClient.connect(pool.path) is None


def test_stop_is_idempotent_and_ends_connections(pool):
    server = ControlServer(pool)
    server.start()
    idle = ControlClient.connect(pool.path)
    server.stop()
    server.stop()
    with pytest.raises(UnavailableError), idle:
        idle.ask(msg.Hello())


def test_stale_socket_is_replaced(pool):
    dead = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with socket_address(pool.path) as address:
        dead.bind(address)
    dead.close()
    assert ControlClient.connect(pool.path) is None
    with ControlServer(pool):
        assert ask(pool, msg.Hello()).pid == os.getpid()


def test_path_longer_than_a_socket_may_have(tmp_path):
    path = tmp_path.joinpath(*["x" * 60] * 3)
    path.parent.mkdir(parents=True)
    with kvfs.create_pool(path, [f"dir:{tmp_path}/dev?size=64MiB&segment=16MiB"]) as pool:
        assert len(str(path / "control.sock")) > 108
        with ControlServer(pool):
            assert ask(pool, msg.Hello()).pool_path == str(path)


def test_other_users_are_refused(pool, server, monkeypatch):
    monkeypatch.setattr(control.os, "geteuid", lambda: 4711)
    stranger = Peer(1, 4712, 4712, frozenset())  # neither root nor the owner
    monkeypatch.setattr(control, "peer_of", lambda _: stranger)
    with pytest.raises(RefusedError, match="user 4712 may not ask"):
        ask(pool, msg.Hello())


def test_too_many_connections(pool, server):
    with contextlib.ExitStack() as stack:
        for _ in range(control.CONNECTIONS_MAX):
            client = stack.enter_context(ControlClient.connect(pool.path))
            client.ask(msg.Hello())
        with pytest.raises(BusyError, match="too many connections"):
            ask(pool, msg.Hello())
    for _ in range(10_000):  # the server notices the ends of connections one by one
        with contextlib.suppress(BusyError):
            assert ask(pool, msg.Hello())
            return
    pytest.fail("no connection was given back")


def test_no_thread_left_for_one_connection(pool, server, monkeypatch):
    def fail(thread):
        monkeypatch.undo()
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fail)
    with pytest.raises(BusyError, match="no thread left"):
        ask(pool, msg.Hello())
    assert ask(pool, msg.Hello())


def test_silent_connection_is_ended(pool):
    with ControlServer(pool, timeout_s=0.05), connection(pool) as silent:
        silent.sendall(b"\x10\x00")
        assert silent.recv(1) == b""
        assert ask(pool, msg.Hello())


def test_unexpected_error_is_an_answer(pool, expected_warnings):
    expected_warnings.append("control question failed")
    with (
        ControlServer(pool, answers=lambda *_: 1 / 0),
        pytest.raises(KvfsError, match="ZeroDivisionError"),
    ):
        ask(pool, msg.Hello())


def test_client_gives_up_on_an_owner_that_hangs(pool):
    release = threading.Event()
    server = ControlServer(pool, answers=lambda *_: release.wait(10))
    with server, ControlClient.connect(pool.path, timeout_s=0.05) as client:
        with pytest.raises(UnavailableError, match="no answer"):
            client.ask(msg.Hello())
        release.set()


# --- versions


def exchange(pool, raw):
    with connection(pool) as found:
        found.sendall(struct.pack("<I", len(raw)) + raw)
        return msgspec.msgpack.decode(control_client.receive_frame(found, 1 << 20), type=msg.Reply)


def test_other_protocol_version_is_refused(pool, server, monkeypatch):
    reply = exchange(pool, msgspec.msgpack.encode(msg.Question(99, msg.Hello())))
    assert reply.failure.error == "FormatVersionError"
    assert reply.failure.code == 15
    newer = types.SimpleNamespace(**{**vars(msg), "PROTOCOL_VERSION": 2})
    monkeypatch.setattr(control, "msg", newer)
    with pytest.raises(FormatVersionError, match="speaks"):
        ask(pool, msg.Hello())


def test_unknown_question_is_a_usage_error(pool, server):
    raw = msgspec.msgpack.encode({"version": 1, "question": {"request": "selfdestruct"}})
    assert exchange(pool, raw).failure.code == 2


def test_every_error_comes_back_as_itself():
    for name in kvfs.errors.__dict__:
        kind = getattr(kvfs.errors, name)
        if isinstance(kind, type) and issubclass(kind, KvfsError):
            found = control_client.as_error(msg.Failure(name, kind.exit_code, "why"))
            assert type(found) is kind
            assert str(found) == "why"
    assert type(control_client.as_error(msg.Failure("InternalError", 1, "bug"))) is KvfsError
    assert type(control_client.as_error(msg.Failure("ClassVar", 1, "bug"))) is KvfsError


# --- garbage


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    garbage=st.one_of(
        st.binary(max_size=200),
        st.binary(max_size=200).map(lambda raw: struct.pack("<I", len(raw)) + raw),
        st.integers(0, 2**32 - 1).map(lambda size: struct.pack("<I", size)),
        st.recursive(
            st.one_of(st.none(), st.integers(-(2**63), 2**64 - 1), st.text(), st.binary()),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
            max_leaves=8,
        )
        .map(lambda value: msgspec.msgpack.encode({"version": 1, "question": value}))
        .map(lambda raw: struct.pack("<I", len(raw)) + raw),
    )
)
def test_garbage_harms_nobody(pool, server, garbage):
    with contextlib.suppress(OSError), connection(pool) as found:
        found.sendall(garbage)
        found.shutdown(socket.SHUT_WR)
        while found.recv(1 << 16):
            pass
    assert ask(pool, msg.Hello()).pid == os.getpid()


# --- registration


def test_owner_is_registered(pool, runtime):
    with ControlServer(pool, mount="/mnt/kv"):
        (entry,) = owners()
        assert (entry.pool, entry.mount, entry.pid) == (str(pool.path), "/mnt/kv", os.getpid())
        assert stat.S_IMODE(runtime.stat().st_mode) == 0o700
    assert owners() == []
    assert list(runtime.iterdir()) == []


def test_stale_registration_is_removed(pool, runtime):
    entry = control_client.Entry(str(pool.path), "gone", "0" * 32, 1)
    path = control_client.register(entry)
    (runtime / "broken.json").write_bytes(b"{")
    assert owners() == []
    assert not path.exists()
    assert not (runtime / "broken.json").exists()


def test_unsafe_runtime_directory_is_refused(pool, runtime):
    runtime.mkdir()
    runtime.chmod(0o777)
    with pytest.raises(RefusedError, match="not safe"):
        control_client.register(control_client.Entry(str(pool.path), "p", "1", 1))
    with ControlServer(pool):  # it works all the same, found by its path
        assert ask(pool, msg.Hello())


def test_runtime_directory_depends_on_the_user(monkeypatch):
    monkeypatch.delenv(control_client.RUNTIME_VARIABLE)
    monkeypatch.setattr(control_client.os, "geteuid", lambda: 0)
    assert control_client.runtime_directory() == Path("/run/kvfs")
    monkeypatch.setattr(control_client.os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1000")
    assert control_client.runtime_directory() == Path("/run/user/1000/kvfs")
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert control_client.runtime_directory() == Path("/tmp/kvfs-1000")
