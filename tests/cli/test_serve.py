"""kvfs serve: its life from start to end, who it tells what, and metrics over HTTP."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path
from typing import Self

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

import kvfs
from kvfs.cli import notify
from kvfs.control_client import owners
from kvfs.metric_list import DEFINITIONS, series
from tests.cli.helpers import LAYOUT, Admin, write_file
from tests.cli.test_mount import DEADLINE_S, run, wait_for


class Serving:
    """`kvfs serve -f` in a process, until the block ends."""

    def __init__(
        self, pool: Path, *words: str, prefix: tuple[str, ...] = (), pass_fds: tuple[int, ...] = (),
        **environment: str,
    ) -> None:  # fmt: skip
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "kvfs.cli.kvfs", "serve", "-f", *words, str(pool)],
            stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL, pass_fds=pass_fds,
            env={**os.environ, **environment},
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()

    def line_with(self, text: str) -> str:
        """Return the next line of its log that has a text in it."""
        assert self.process.stderr is not None
        while text not in (line := self.process.stderr.readline()):
            assert line, f"it ended before it said {text!r}"
        return line

    def end(self, number: int = signal.SIGTERM) -> str:
        """Send a signal, wait for its end, return what it had still to say."""
        self.process.send_signal(number)
        _, said = self.process.communicate(timeout=DEADLINE_S)
        return said


def scrape(line: str) -> dict[str, float]:
    """Return name and sum over all labels of what a service exports, as its log says where."""
    url = next(word for word in line.split() if word.startswith("http"))
    with urllib.request.urlopen(url, timeout=DEADLINE_S) as answer:
        text = answer.read().decode()
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation, family.name
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0) + sample.value
    return found


def end_if_there(pid: int) -> None:
    """End a daemon that a test which failed has left."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def test_daemon_from_start_to_end(pool_path, capsys, root, request):
    log = root / "log"
    served = run("serve", "--log", log, pool_path)
    assert (served.returncode, served.stdout) == (0, "")
    assert served.stderr == f"serving {pool_path}\n"
    (entry,) = owners()
    request.addfinalizer(lambda: end_if_there(entry.pid))
    assert (entry.pool, entry.mount) == (str(pool_path), "")
    assert os.getsid(entry.pid) != os.getsid(0)
    status = Admin(capsys, pool_path)("pool", "status", "--json")
    assert status.code == 0
    assert status.json["owner_pid"] == entry.pid
    assert status.json["contexts"] == 4
    os.kill(entry.pid, signal.SIGHUP)  # a daemon has no terminal: nothing happens
    again = run("serve", pool_path)
    assert again.returncode == 11
    assert f"held by pid {entry.pid}" in again.stderr
    assert Admin(capsys, pool_path)("context", "drop", "small", "--yes").code == 0
    os.kill(entry.pid, signal.SIGTERM)
    wait_for(entry.pid)
    assert owners() == []
    assert not (pool_path / "control.sock").exists()
    said = log.read_text()
    assert "SIGTERM received" in said
    with kvfs.open_pool(pool_path) as pool:
        assert pool.recovery.problems == []
        assert pool.statistics().contexts == 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_foreground_ends_cleanly(pool_path, number):
    with Serving(pool_path) as service:
        service.line_with("serving")
        service.process.send_signal(signal.SIGHUP)  # not from a terminal: ignored
        said = service.end(number)
        assert service.process.returncode == 0
        assert f"{signal.Signals(number).name} received" in said
    with kvfs.open_pool(pool_path) as pool:
        assert pool.statistics().contexts == 4


def test_killed_and_started_again(pool_path, capsys):
    with Serving(pool_path) as service:
        service.line_with("serving")
        service.end(signal.SIGKILL)
    with Serving(pool_path) as service:
        service.line_with("serving")
        status = Admin(capsys, pool_path)("pool", "status", "--json")
        assert status.json["owner_pid"] == service.process.pid
        assert status.json["contexts"] == 4
        service.end()
        assert service.process.returncode == 0


def test_scrape(pool_path):
    with Serving(pool_path, "--metrics", "127.0.0.1:0") as service:
        found = scrape(service.line_with("http://"))
        known = {name for each in DEFINITIONS for name in series(each)}
        others = {name for name in found if not name.startswith(("process_", "python_"))}
        assert others <= known
        assert found["kvfs_contexts"] == 4
        assert found["kvfs_healthy"] == 1
        assert found["process_open_fds"] > 0
        service.end()


def test_what_was_done_is_counted(empty_pool):
    """Every number is looked at once, where what it must be is known."""
    from kvfs.exposition import PoolCollector

    with kvfs.open_pool(empty_pool) as pool:
        space = pool.namespace("m", LAYOUT)
        keys, parents = space.keys(np.arange(64 * 10))
        data = np.random.default_rng(1).integers(0, 256, (10, LAYOUT.block_bytes), np.uint8)
        space.put(keys[:8], data[:8], parents=parents[:8], durability="sync")
        space.put(keys[:8], data[:8], parents=parents[:8])
        assert space.match_prefix(keys) == 8
        space.lookup(keys)
        room = np.zeros_like(data)
        assert space.read_into(keys, room).sum() == 8
        short = np.zeros((1, LAYOUT.block_bytes // 2), np.uint8)
        assert not space.read_into(keys[:1], short).any()
        with space.view(keys[:4]):
            write_file(pool, "f", b"f" * 10_000)
        node = pool.catalog.resolve(1, "f")
        reader = pool.files.open_read(node)
        assert len(pool.files.read(reader, 0, 10_000)) == 10_000
        pool.files.close_read(reader)
        found: dict[tuple[str, ...], float] = {}
        for family in PoolCollector(pool).collect():
            for sample in family.samples:
                labels = {**sample.labels}
                namespace = labels.pop("namespace", "")
                if namespace and "le" not in labels:
                    found[namespace, sample.name, *sorted(labels.values())] = sample.value
        place, block = ("2", "dir0"), LAYOUT.block_bytes
        expected = {
            ("kvfs_put_blocks_total",): 8,
            ("kvfs_put_bytes_total",): 8 * block,
            ("kvfs_deduplicated_blocks_total",): 8,
            ("kvfs_prefix_blocks_asked_total",): 10,
            ("kvfs_prefix_blocks_matched_total",): 8,
            ("kvfs_hits_total", *place, "lookup"): 8,
            ("kvfs_hits_total", *place, "read_into"): 8,
            ("kvfs_hits_total", *place, "lease"): 4,
            ("kvfs_misses_total", "absent"): 4,
            ("kvfs_misses_total", "room"): 1,
            ("kvfs_misses_total", "unreadable"): 0,
            ("kvfs_read_bytes_total", *place, "read_into"): 8 * block,
            ("kvfs_written_bytes_total", *place): 8 * block,
            ("kvfs_stored_bytes", *place): 8 * block,
            ("kvfs_operation_seconds_count", "put"): 2,
            ("kvfs_operation_seconds_count", "read_into"): 2,
            ("kvfs_operation_seconds_count", "lease"): 1,
        }
        for names, value in expected.items():
            assert found["m", names[0], *sorted(names[1:])] == value, names
        at = sorted([*place, "file"])
        assert found["default", "kvfs_read_bytes_total", *at] == 10_000
        assert found["default", "kvfs_operation_seconds_count", "open"] == 1


def test_log_is_one_object_per_line(pool_path):
    with Serving(pool_path, "--log-format", "json", "--metrics", "0") as service:
        ready = json.loads(service.line_with("serving"))
        assert ready["level"] == "info"
        assert ready["logger"] == "kvfs.service"
        assert ready["time"].endswith("+00:00")
        assert ready["fields"] == {"pool": str(pool_path), "pid": service.process.pid}
        with Serving(pool_path, "--log-format", "json") as second:
            _, said = second.process.communicate(timeout=DEADLINE_S)
            failure = json.loads(said.splitlines()[-1])
            assert failure["fields"] == {"error": "BusyError", "exit_code": 11}
            assert second.process.returncode == 11
        for line in service.end().splitlines():
            json.loads(line)


def receive(listener: socket.socket) -> dict[str, str]:
    """Return what the manager is told next; what it is to store, see tests/cli/test_store.py."""
    listener.settimeout(DEADLINE_S)
    while True:
        lines = listener.recv(1 << 16).decode().splitlines()
        if "FDSTORE=1" not in lines and "FDSTOREREMOVE=1" not in lines:
            return dict(line.split("=", 1) for line in lines)


def test_service_manager_is_told(pool_path, root):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(root / "notify"))
        watched = {"NOTIFY_SOCKET": str(root / "notify"), "WATCHDOG_USEC": "20000"}
        with Serving(pool_path, **watched) as service:
            ready = receive(manager)
            assert ready["READY"] == "1"
            assert ready["MAINPID"] == str(service.process.pid)
            assert ready["STATUS"] == f"serving {pool_path}"
            assert receive(manager) == {"WATCHDOG": "1"}
            service.end()
            told = [receive(manager)]
            while "STOPPING" not in told[-1]:
                told.append(receive(manager))
            assert told[-1]["STATUS"] == f"closing {pool_path}"


@pytest.mark.fuse
def test_mount_tells_the_service_manager_and_exports(pool_path, root):
    (root / "mnt").mkdir()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(root / "notify"))
        process = subprocess.Popen(
            [sys.executable, "-m", "kvfs.cli.kvfs", "mount", "-f", "--metrics", "0",
             str(pool_path), str(root / "mnt")],
            stderr=subprocess.PIPE, text=True,
            env={**os.environ, "NOTIFY_SOCKET": str(root / "notify")},
        )  # fmt: skip
        assert receive(manager)["READY"] == "1"
        assert (root / "mnt/small").read_bytes() == b"s" * 10_000
        assert process.stderr is not None
        found = scrape(next(line for line in process.stderr if "http://" in line))
        assert found["kvfs_mount_request_seconds_count"] > 0
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=DEADLINE_S)
        assert process.returncode == 0
        assert receive(manager)["STOPPING"] == "1"


def test_nobody_to_tell(monkeypatch, root):
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert not notify.tell("READY=1")
    monkeypatch.setenv("NOTIFY_SOCKET", str(root / "nobody"))
    assert not notify.tell("READY=1")
    monkeypatch.setenv("WATCHDOG_USEC", "2000000")
    assert notify.watchdog_interval_s() == 2.0
    monkeypatch.setenv("WATCHDOG_PID", "1")
    assert notify.watchdog_interval_s() == 0.0
    monkeypatch.setenv("WATCHDOG_USEC", "soon")
    assert notify.watchdog_interval_s() == 0.0


def test_watchdog_falls_silent_when_the_service_hangs(monkeypatch, root):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(root / "notify"))
        manager.settimeout(DEADLINE_S)
        monkeypatch.setenv("NOTIFY_SOCKET", str(root / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "2000")
        goes_on = [True, True]
        reached, released = threading.Event(), threading.Event()

        def attempt() -> None:
            if goes_on:
                goes_on.pop()
                return
            reached.set()
            released.wait()

        with notify.Watchdog(attempt):
            assert reached.wait(DEADLINE_S)
            assert [manager.recv(64), manager.recv(64)] == [b"WATCHDOG=1"] * 2
            manager.setblocking(False)
            with pytest.raises(BlockingIOError):
                manager.recv(64)
            released.set()


def test_descriptors_of_the_service_manager():
    """It passes them from 3 on; in a process of its own, for 3 is taken here."""
    code = (
        "import os; from kvfs.cli.notify import inherited\n"
        "os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='2', LISTEN_FDNAMES='a')\n"
        "held = inherited()\n"
        "print({name: (fd, os.get_inheritable(fd)) for name, fd in held.items()})\n"
        "print(inherited())\n"
    )
    with socket.socket(socket.AF_UNIX) as one, socket.socket(socket.AF_UNIX) as two:
        command = f'exec {sys.executable} -c "$0" 3<&{one.fileno()} 4<&{two.fileno()}'
        done = subprocess.run(
            ["bash", "-c", command, code], capture_output=True, text=True, check=True,
            pass_fds=[one.fileno(), two.fileno()],
        )  # fmt: skip
    assert done.stdout == "{'a': (3, False), '4': (4, False)}\n{}\n"


def fill(pool: kvfs.Pool | kvfs.RemotePool, count: int) -> kvfs.Context:
    space = pool.namespace("shared", LAYOUT)
    keys, _ = space.keys(np.arange(64 * count))
    data = np.arange(count, dtype=np.uint8).repeat(LAYOUT.block_bytes).reshape(count, -1)
    context = space.context("chat")
    context.append(keys, data, durability="sync")
    return context


def test_second_process_is_a_client(pool_path, capsys):
    with Serving(pool_path, "--metrics", "127.0.0.1:0") as service:
        line = service.line_with("http://")
        with kvfs.open_pool(pool_path) as pool, kvfs.open_pool(pool_path) as other:
            assert isinstance(pool, kvfs.RemotePool)
            assert pool.statistics().contexts == 4
            context = fill(pool, 3)
            with other.namespace("shared").context("chat", create=False).view() as view:
                assert view.numpy(np.uint8, (3, LAYOUT.block_bytes))[:, 0].tolist() == [0, 1, 2]
                found = scrape(line)
            assert (found["kvfs_clients"], found["kvfs_client_segments"]) == (2, 1)
            assert found["kvfs_client_revocations_total"] == 0
            status = Admin(capsys, pool_path)("pool", "status")
            assert "clients   2, they hold 0 segments\n" in status.out
            service.end()
            assert not (pool_path / "clients.sock").exists()
            with pytest.raises(kvfs.UnavailableError):
                pool.sync()
            with Serving(pool_path) as second:
                second.line_with("serving")
                assert context.resident_blocks == 3  # attached to the next owner
                pool.sync()
                second.end()


def test_socket_of_the_service_manager_outlives_its_owner(pool_path):
    """As with systemd: the socket is the manager's, listens before and after, and comes as 3."""
    command = 'exec env LISTEN_PID=$$ LISTEN_FDS=1 LISTEN_FDNAMES=clients $0 3<&{} "$@"'
    with socket.socket(socket.AF_UNIX) as manager:
        manager.bind(str(pool_path / "clients.sock"))
        manager.listen()
        prefix = ("bash", "-c", command.format(manager.fileno()))
        for count in (1, 2):
            with Serving(pool_path, prefix=prefix, pass_fds=(manager.fileno(),)) as service:
                with kvfs.open_pool(pool_path) as pool:  # waits for the owner
                    assert isinstance(pool, kvfs.RemotePool)
                    assert pool.statistics().contexts == 3 + count
                    if count == 1:
                        fill(pool, 1)
                service.line_with("serving")
                refused = run("serve", "--takeover", pool_path)
                assert refused.returncode == 16
                assert "systemctl restart" in refused.stderr
                service.end()
                assert service.process.returncode == 0
            assert (pool_path / "clients.sock").exists()


def test_an_owner_that_is_restarted_is_waited_for(pool_path, request):
    """By an engine, which would become an owner that serves nobody."""
    with Serving(pool_path) as service:
        service.line_with("serving")
        service.end(signal.SIGKILL)
    later = threading.Timer(0.5, lambda: run("serve", pool_path))
    later.start()
    with kvfs.open_pool(pool_path, restart_s=DEADLINE_S) as pool:
        assert isinstance(pool, kvfs.RemotePool)
    later.join()
    (entry,) = owners()
    request.addfinalizer(lambda: end_if_there(entry.pid))
    os.kill(entry.pid, signal.SIGKILL)
    wait_for(entry.pid)
    with kvfs.open_pool(pool_path, restart_s=0.1) as pool:  # nobody comes
        assert isinstance(pool, kvfs.Pool)
        assert not (pool_path / "clients.sock").exists()


@pytest.mark.parametrize("text", ["x", ":9105", "70000", "1.2.3.4:", "-1", "127.0.0.1:x"])
def test_metrics_address_refused(pool_path, text):
    done = run("serve", f"--metrics={text}", pool_path)
    assert done.returncode == 2
    assert "expected PORT or ADDRESS:PORT" in done.stderr


def test_errors_of_the_service_are_the_commands(root, pool_path):
    assert run("serve", root / "nope").returncode == 10
    assert run("serve", "--async-delay", "0", pool_path).returncode == 2
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run("serve", "--metrics", port, pool_path)
    assert done.returncode == 11
    assert "metrics cannot be served" in done.stderr
    with kvfs.open_pool(pool_path):  # none of them has kept the pool
        pass
