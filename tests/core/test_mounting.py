"""Starting and ending: arguments, failures, sizes, users, signals, a killed core."""

import errno
import os
import random
import shutil
import signal
import stat
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.core.owner import (
    BACKING,
    HELLO,
    INIT,
    READ,
    STOP,
    VERSION,
    WRITE,
    ControlError,
    FakeOwner,
    Node,
    Request,
    SilentError,
    client,
    core_path,
    hard_kill,
    is_mounted,
    make_pair,
    run,
)  # fmt: skip
from tests.fuse.mounting import sh, wait_until

pytestmark = pytest.mark.fuse


def refuse(*arguments: object, fds: tuple[int, ...] = ()) -> tuple[int, str]:
    """Run the core, which must fail; return exit code and what it said."""
    result = subprocess.run(
        [core_path(), *map(str, arguments)], pass_fds=fds, capture_output=True, text=True,
        timeout=20, check=False,
    )  # fmt: skip
    assert result.returncode != 0
    assert len(result.stderr.splitlines()) <= 2, result.stderr
    return result.returncode, result.stderr.splitlines()[-1]


def test_bad_arguments(tmp_path: Path) -> None:
    a, b = make_pair()
    good = ("--requests", a.fileno(), "--control", b.fileno())
    fds = (a.fileno(), b.fileno())
    for arguments, message in (
        ((), "usage: "), ((*good, tmp_path), "usage: "), (("--what", "1"), "bad argument: --what"),
        (("--requests",), "bad argument: --requests"),
        ((*good, tmp_path, "threads=0"), "bad option: threads=0"),
        ((*good, tmp_path, "threads=99"), "bad option: threads=99"),
        ((*good, tmp_path, "deadline_ms=x"), "bad option: deadline_ms=x"),
        ((*good, tmp_path, "ro", "x"), "unexpected argument: x"),
        (("--requests", 0, "--control", 1, tmp_path, ""), "no SOCK_SEQPACKET socket"),
    ):  # fmt: skip
        code, said = refuse(*arguments, fds=fds)
        assert code == 2
        assert message in said
        assert said.startswith("kvfs-core: ")
    a.close()
    b.close()


def test_a_mount_that_fails(tmp_path: Path) -> None:
    a, b = make_pair()
    good = ("--requests", a.fileno(), "--control", b.fileno())
    fds = (a.fileno(), b.fileno())
    code, said = refuse(*good, tmp_path / "none", "", fds=fds)
    assert (code, said) == (
        1, f"kvfs-core: mount failed: {tmp_path}/none: No such file or directory",
    )  # fmt: skip
    code, said = refuse(*good, tmp_path, "nonsense=1", fds=fds)
    assert (code, said) == (1, f"kvfs-core: mount failed: {tmp_path}: Invalid argument")
    a.close()
    b.close()


def test_hello(owner: FakeOwner) -> None:
    version, flags, max_write, minor, device = owner.hello
    assert (version, flags, max_write) == (VERSION, 1, 1 << 20)
    assert os.minor(device) == minor
    owner.wait_for(INIT)
    assert os.stat(owner.path).st_dev == device
    with pytest.raises(ControlError, match="EPROTO"):
        owner.call(HELLO, VERSION + 1)


def test_small_sockets(make_owner: Callable[..., FakeOwner], rng: random.Random) -> None:
    """No message is ever larger than a socket of default size carries."""
    owner = make_owner(socket_bytes=0)
    assert owner.hello[2] == 51 * 4096
    content = rng.randbytes(1_000_000)
    owner.add("f", content)
    assert (owner.path / "f").read_bytes() == content
    sh(f"dd if={owner.path}/f of=/dev/null bs=1M iflag=direct")
    reads = [struct.unpack_from("<QQI", request.body)[2] for request in owner.of(READ)]
    assert max(reads) == 51 * 4096
    (owner.path / "f").write_bytes(content[::-1])
    assert owner.nodes[2].content[:1_000_000] == content[::-1]
    assert owner.count(WRITE) >= 5
    assert 51 * 4096 <= owner.max_in <= 212_960


def test_large_messages(owner: FakeOwner, rng: random.Random) -> None:
    content = rng.randbytes(3_000_000)
    owner.add("f", content)
    assert (owner.path / "f").read_bytes() == content
    (owner.path / "f").write_bytes(content[::-1])
    assert owner.nodes[2].content[: len(content)] == content[::-1]
    assert owner.max_in == (1 << 20) + 80


def test_a_killed_core(owner: FakeOwner) -> None:
    owner.add("f", b"abc" * 1000)
    fd = os.open(owner.path / "f", os.O_RDONLY)
    assert hard_kill(owner.process.pid) < 5
    for operation in (
        lambda: os.listdir(owner.path), lambda: os.stat(owner.path / "g"),
        lambda: os.pread(fd, 10, 0),
    ):  # fmt: skip
        with pytest.raises(OSError, match="Errno") as caught:
            operation()
        assert caught.value.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    assert is_mounted(owner.path)
    sh(f"umount -l {owner.path}")
    assert not is_mounted(owner.path)
    with pytest.raises(OSError, match="not connected"):
        os.close(fd)


def test_a_client_that_waits_when_the_core_is_killed(owner: FakeOwner) -> None:
    def kill(request: Request) -> bytes:
        owner.process.kill()
        raise SilentError

    owner.hooks[READ] = kill
    owner.add("f", b"abc" * 1000)
    process = client("open(__import__('sys').argv[1], 'rb').read()", owner.path / "f")
    out, _ = process.communicate(timeout=10)
    assert "not connected" in out or "aborted" in out.lower()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_unmounts(owner: FakeOwner, number: signal.Signals) -> None:
    os.listdir(owner.path)
    owner.process.send_signal(number)
    assert owner.process.wait(10) == 0
    assert not is_mounted(owner.path)
    assert owner.log.read_text() == ""


def test_sigterm_waits_for_open_files(owner: FakeOwner) -> None:
    owner.add("f", b"abc")
    fd = os.open(owner.path / "f", os.O_RDONLY)
    owner.process.send_signal(signal.SIGTERM)
    wait_until(lambda: not is_mounted(owner.path), "it is gone from the tree")
    assert os.pread(fd, 3, 0) == b"abc"
    assert owner.process.poll() is None
    os.close(fd)
    assert owner.process.wait(10) == 0


def test_stop_does_not_wait(owner: FakeOwner) -> None:
    owner.add("f", b"abc")
    fd = os.open(owner.path / "f", os.O_RDONLY)
    assert owner.stop() == 0
    with pytest.raises(OSError, match="not connected"):
        os.close(fd)


@pytest.mark.parametrize("way", ["stop", "umount", "signal"])
def test_the_owner_reads_no_end_of_file(owner: FakeOwner, way: str) -> None:
    """libfuse would take it for an error; the owner keeps the core's end open against that."""
    if way == "stop":
        owner.call(STOP)
    elif way == "umount":
        sh(f"umount {owner.path}")
    else:
        owner.process.terminate()
    assert owner.process.wait(10) == 0
    time.sleep(0.05)
    assert not owner.has_read_end
    owner.reply(12345)  # late answers find no broken pipe either


def test_umount(owner: FakeOwner) -> None:
    os.listdir(owner.path)
    sh(f"umount {owner.path}")
    assert owner.process.wait(10) == 0
    assert owner.log.read_text() == ""


def test_descriptors(owner: FakeOwner) -> None:
    """None but its own, and all of them closed on exec."""
    for name in os.listdir(f"/proc/{owner.process.pid}/fdinfo"):
        text = Path(f"/proc/{owner.process.pid}/fdinfo/{name}").read_text()
        flags = int(next(line.split()[1] for line in text.splitlines() if "flags" in line), 8)
        assert int(name) <= 2 or flags & os.O_CLOEXEC, name


def test_path_with_spaces(make_owner: Callable[..., FakeOwner], tmp_path: Path) -> None:
    path = tmp_path / "a b\\c"
    path.mkdir()
    owner = FakeOwner(path).start()
    try:
        owner.add("f", b"abc")
        assert (path / "f").read_bytes() == b"abc"
    finally:
        assert owner.stop() == 0
    assert not os.path.ismount(path)


@pytest.fixture
def public_device() -> Iterator[None]:
    """Open /dev/fuse to all users for a while, as most systems do for good."""
    mode = stat.S_IMODE(os.stat("/dev/fuse").st_mode)
    if os.getuid() != 0:
        yield
        return
    os.chmod("/dev/fuse", 0o666)
    try:
        yield
    finally:
        os.chmod("/dev/fuse", mode)


@pytest.mark.usefixtures("public_device")
def test_another_user(tmp_path: Path, rng: random.Random) -> None:
    """fusermount3 mounts; reads are native; there is no passthrough."""
    if os.getuid() != 0 or shutil.which("setpriv") is None or shutil.which("fusermount3") is None:
        pytest.skip("needs root, setpriv and fusermount3")
    base = Path("/tmp") / f"kvfs-nobody-{os.getpid()}"
    base.mkdir()
    os.chown(base, 65534, 65534)
    program = base / "kvfs-core"
    shutil.copy(core_path(), program)
    path = base / "mnt"
    path.mkdir()
    os.chown(path, 65534, 65534)
    setpriv = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    before = os.environ.get("KVFS_CORE")
    os.environ["KVFS_CORE"] = str(program)
    try:
        owner = FakeOwner(path, prefix=setpriv).start()
    finally:
        os.environ.pop("KVFS_CORE")
        if before is not None:
            os.environ["KVFS_CORE"] = before
    try:
        content = rng.randbytes(500_000)
        (tmp_path / "s").write_bytes(content)
        owner.add_segment(1, tmp_path / "s")
        owner.add("f", b"O" * len(content))
        assert owner.hello[1] == 0

        def on_open(node: Node, fh: int) -> None:
            with pytest.raises(ControlError, match="EPERM"):
                owner.call(BACKING, fh, node.inode.to_bytes(8, "little"), 0)
            owner.install(fh, node.inode, len(content), 1 << 20, [(1, 0, len(content), bytes(16))])

        owner.on_open = on_open
        code = "import sys; sys.stdout.write(open(sys.argv[1], 'rb').read().hex())"
        result = subprocess.run(
            [*setpriv, "/usr/bin/env", "python3", "-c", code, str(path / "f")],
            capture_output=True, text=True, timeout=30, check=True,
        )  # fmt: skip
        assert result.stdout == content.hex()
        assert owner.count(READ) == 0
        assert owner.stop() == 0
        assert not is_mounted(path)
    finally:
        owner.close()
        shutil.rmtree(base)
    assert run("print(1)").strip() == "1"
