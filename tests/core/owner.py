"""An owner for the tests of kvfs-core: a small tree in memory that speaks the protocol.

A test sees every request (`seen`), may answer any kind itself (`hooks`), and installs lanes by
control messages (`call`). It serves on a thread of the test's process.
"""

import array
import collections
import contextlib
import errno
import os
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from kvfs import _native
from tests.fuse.mounting import wait_until

LOOKUP, FORGET, GETATTR, SETATTR, UNLINK, OPEN, READ, WRITE = 1, 2, 3, 4, 10, 14, 15, 16
RELEASE, FSYNC, FLUSH, INIT, OPENDIR, READDIR, RELEASEDIR = 18, 20, 25, 26, 27, 28, 29
SETXATTR = 21
VERSION = 2  # of the control protocol
CREATE, INTERRUPT, BATCH_FORGET, FALLOCATE, READDIRPLUS, LSEEK = 35, 36, 42, 43, 44, 46
HELLO, SEGMENT, DROP_SEGMENT, READ_BEGIN, READ_BLOCKS, READ_END = 1, 2, 3, 4, 5, 6
LANE_WRITE, CREDIT, BACKING, CLOSE, NAMES, STATUS, STOP, HANDLES = 7, 8, 9, 10, 11, 12, 13, 14
ALLOW, DIGESTS, HOLD = 15, 16, 17
COUNTERS = (
    "native_reads", "native_read_bytes", "native_writes", "native_write_bytes", "lookups",
    "forwarded", "deadline_hits", "interrupts", "verify_failures", "faults", "respawns",
    "pending", "open_files", "threads", "page_cache_bytes",
)  # fmt: skip
DEFAULT_OPTIONS = "fsname=kvfs,subtype=kvfs,default_permissions,nosuid,nodev"
KEEP_CACHE = 2
DIRECT_IO = 1
FOR_CACHE = 1 << 62  # in the offset of a READ


def core_path() -> str:
    return os.environ.get("KVFS_CORE") or str(Path(_native.__file__).with_name("kvfs-core"))


def make_pair(nbytes: int = 8 << 20) -> tuple[socket.socket, socket.socket]:
    """Make a pair of packet sockets; 0 leaves their size."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in ends if nbytes else ():
        end.setsockopt(socket.SOL_SOCKET, 32, nbytes)
    return ends


@dataclass
class Node:
    inode: int
    mode: int
    content: bytes = b""
    size: int = 0
    children: dict[str, int] = field(default_factory=dict)


@dataclass
class Request:
    opcode: int
    unique: int
    inode: int
    body: bytes

    @property
    def fh(self) -> int:
        return int.from_bytes(self.body[:8], "little")


class AnswerError(Exception):
    """Raised by a hook to fail a request."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class SilentError(Exception):
    """Raised by a hook that answers later, or never."""


class ControlError(Exception):
    def __init__(self, number: int) -> None:
        super().__init__(errno.errorcode.get(number, number))
        self.number = number


class FakeOwner:
    """Starts a core on a mountpoint and answers for it."""

    def __init__(
        self, mountpoint: Path, *, options: str = "", command: Sequence[str] = (),
        socket_bytes: int = 8 << 20, prefix: Sequence[str] = (), flags: Sequence[str] = (),
        has_door: bool = False,
    ) -> None:  # fmt: skip
        self.path = mountpoint
        self.requests, core_requests = make_pair(socket_bytes)
        self.control, core_control = make_pair(socket_bytes)
        self._prepare()
        self.door, core_door = make_pair(0)
        fds = [core_requests.fileno(), core_control.fileno()]
        if has_door:
            fds.append(core_door.fileno())
            flags = [*flags, "--door", str(fds[2])]
        self.log = mountpoint.parent / f"{mountpoint.name}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*prefix, core_path(), "--requests", str(fds[0]), "--control", str(fds[1]), *flags,
                 str(mountpoint), ",".join(filter(None, [DEFAULT_OPTIONS, options])),
                 *(["--", *command] if command else [])],
                pass_fds=fds, stderr=log, start_new_session=True,
            )  # fmt: skip
        self.core_requests = os.dup(core_requests.fileno())
        core_requests.close()
        core_control.close()
        core_door.close()

    def enter(self, command: bytes = b"\0", count: int = 2) -> "FakeOwner":
        """Become, as another owner, the one of the same core by the door."""
        other = FakeOwner.__new__(FakeOwner)
        other.requests, requests = make_pair()
        other.control, control = make_pair()
        other._prepare()
        other.path, other.log, other.process = self.path, self.log, self.process
        other.door, other.core_requests = self.door, os.dup(requests.fileno())
        fds = [requests.fileno(), control.fileno()][:count]
        assert self.door is not None
        socket.send_fds(self.door, [command], fds)
        requests.close()
        control.close()
        return other

    @classmethod
    def inherited(cls) -> "FakeOwner":
        """Be the owner that a core started."""
        self = cls.__new__(cls)
        self.requests = socket.socket(fileno=int(os.environ["KVFS_CORE_REQUESTS"]))
        self.control = socket.socket(fileno=int(os.environ["KVFS_CORE_CONTROL"]))
        self._prepare()
        return self

    def _prepare(self) -> None:
        self.nodes = {1: Node(1, stat.S_IFDIR | 0o755)}
        self.handles: dict[int, int] = {}
        self.hooks: dict[int, Callable[[Request], bytes]] = {}
        self.on_open: Callable[[Node, int], int | None] = lambda node, fh: None
        self.seen: list[Request] = []
        self.sent_flags: dict[int, int] = {}
        self.next_fh = 100
        self.next_inode = 2
        self.timeouts = 0
        self._sequence = 0
        self._control_lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self.door: socket.socket | None = None
        self.is_ended = False
        self.has_read_end = False
        self.max_in = 0

    def start(self) -> "FakeOwner":
        """Say hello and serve."""
        self._thread = threading.Thread(target=self.serve, daemon=True)
        self._thread.start()
        try:
            self.hello = struct.unpack("<IIIIQ", self.call(HELLO, VERSION)[1])
        except (OSError, EOFError) as error:
            self.close()
            raise RuntimeError(f"no core: {error}: {self.log.read_text()}") from error
        wait_until(lambda: any(r.opcode == INIT for r in self.seen), "INIT")
        return self

    # --- control

    def call(
        self, kind: int, argument: int = 0, payload: bytes = b"", fd: int | None = None
    ) -> tuple[int, bytes]:
        """Send a control message; return result and payload, or raise ControlError."""
        with self._control_lock:
            self._sequence += 1
            rights = []
            if fd is not None:
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
            self.control.settimeout(10)
            head = struct.pack("<IIQ", kind, self._sequence, argument)
            self.control.sendmsg([head + payload], rights)
            reply = self.control.recv(1 << 16)
            if not reply:
                raise EOFError("the core has ended")
            answered, sequence, result = struct.unpack_from("<IIq", reply)
            assert (answered, sequence) == (kind | 0x80000000, self._sequence)
        if result < 0:
            raise ControlError(-result)
        return result, reply[16:]

    def status(self) -> dict[str, int]:
        return dict(zip(COUNTERS, struct.unpack("<15Q", self.call(STATUS)[1]), strict=True))

    def add_segment(self, ref: int, path: Path) -> None:
        nbytes = path.stat().st_size
        fd = os.open(path, os.O_RDONLY)
        try:
            self.call(SEGMENT, ref, struct.pack("<QQ", nbytes, nbytes), fd)
        finally:
            os.close(fd)

    def install(
        self, fh: int, inode: int, size: int, stride: int,
        blocks: Sequence[tuple[int, int, int, bytes]], *, verify: bool = False, short: bool = False,
    ) -> None:  # fmt: skip
        """Install a table of (ref, offset, stored, digest)."""
        head = struct.pack("<QQQII", inode, size, stride, len(blocks), int(verify) + 2 * int(short))
        self.call(READ_BEGIN, fh, head)
        for first in range(0, len(blocks), 1000):
            part = blocks[first : first + 1000]
            packed = b"".join(
                struct.pack("<IIQQ16sQ", ref, 0, offset, stored, digest, 0)
                for ref, offset, stored, digest in part
            )
            self.call(READ_BLOCKS, fh, struct.pack("<II", first, len(part)) + packed)
        self.call(READ_END, fh)

    # --- the tree

    def add(self, name: str, content: bytes = b"", size: int | None = None) -> Node:
        """Add a file to the root."""
        inode = self.next_inode
        self.next_inode += 1
        length = len(content) if size is None else size
        node = self.nodes[inode] = Node(inode, stat.S_IFREG | 0o644, content, length)
        self.nodes[1].children[name] = inode
        return node

    def attributes(self, node: Node) -> bytes:
        return struct.pack(
            "<QQQQQQIIIIIIIIII", node.inode, node.size, (node.size + 511) // 512,
            0, 0, 0, 0, 0, 0, node.mode, 1, 0, 0, 0, 4096, 0,
        )  # fmt: skip

    def entry(self, node: Node) -> bytes:
        head = struct.pack("<QQQQII", node.inode, 0, self.timeouts, self.timeouts, 0, 0)
        return head + self.attributes(node)

    # --- serving

    def serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                message = self.requests.recv(2 << 20)
                if not message:
                    self.has_read_end = True
                    break
                self.max_in = max(self.max_in, len(message))
                self._handle(message)
        self.is_ended = True

    def _handle(self, message: bytes) -> None:
        length, opcode, unique, inode = struct.unpack_from("<IIQQ", message)
        assert length == len(message)
        request = Request(opcode, unique, inode, message[40:])
        self.seen.append(request)
        handler = self.hooks.get(opcode) or self._HANDLERS.get(opcode)
        if opcode in (FORGET, BATCH_FORGET):
            return
        try:
            if handler is None:
                raise AnswerError(errno.ENOSYS)
            self.reply(unique, handler(request) if opcode in self.hooks else handler(self, request))
        except AnswerError as answer:
            self.reply(unique, error=answer.number)
        except SilentError:
            pass

    def reply(self, unique: int, body: bytes = b"", error: int = 0) -> None:
        self.requests.send(struct.pack("<IiQ", 16 + len(body), -error, unique) + body)

    def notify(self, code: int, body: bytes) -> None:
        self.requests.send(struct.pack("<IiQ", 16 + len(body), code, 0) + body)

    def _init(self, request: Request) -> bytes:
        major, _minor, ahead, flags = struct.unpack_from("<IIII", request.body)
        assert major == 7
        offered = flags & ((1 << 0) | (1 << 5) | (1 << 18))
        return struct.pack("<IIIIHHIIHH", 7, 31, ahead, offered, 0, 0, 131072, 1, 0, 0) + bytes(32)

    def _lookup(self, request: Request) -> bytes:
        name = request.body[:-1].decode()
        inode = self.nodes[request.inode].children.get(name)
        if inode is None:
            raise AnswerError(errno.ENOENT)
        return self.entry(self.nodes[inode])

    def _getattr(self, request: Request) -> bytes:
        return struct.pack("<QII", 0, 0, 0) + self.attributes(self.nodes[request.inode])

    def _setattr(self, request: Request) -> bytes:
        valid, _, _, size = struct.unpack_from("<IIQQ", request.body)
        node = self.nodes[request.inode]
        if valid & 8:
            node.size = size
        return struct.pack("<QII", 0, 0, 0) + self.attributes(node)

    def open_reply(self, node: Node) -> bytes:
        fh = self.next_fh
        self.next_fh += 1
        self.handles[fh] = node.inode
        flags = self.on_open(node, fh) or 0
        return struct.pack("<QII", fh, flags, 0)

    def _open(self, request: Request) -> bytes:
        return self.open_reply(self.nodes[request.inode])

    def _create(self, request: Request) -> bytes:
        node = self.add(request.body[16:-1].decode())
        return self.entry(node) + self.open_reply(node)

    def _read(self, request: Request) -> bytes:
        _, offset, size = struct.unpack_from("<QQI", request.body)
        offset &= ~FOR_CACHE
        return self.nodes[request.inode].content[offset : offset + size]

    def _write(self, request: Request) -> bytes:
        _, offset, size = struct.unpack_from("<QQI", request.body)
        data, node = request.body[40:], self.nodes[request.inode]
        assert len(data) == size
        node.content = node.content[:offset].ljust(offset, b"\0") + data
        node.size = max(node.size, offset + size)
        return struct.pack("<II", size, 0)

    def _release(self, request: Request) -> bytes:
        self.handles.pop(request.fh, None)
        with contextlib.suppress(ControlError, EOFError, OSError):
            self.closed = self.call(CLOSE, request.fh)[1]
        return b""

    def _readdir(self, request: Request) -> bytes:
        _, offset, size = struct.unpack_from("<QQI", request.body)
        out = b""
        names = list(self.nodes[request.inode].children.items())
        for index, (name, inode) in enumerate(names[offset:], offset + 1):
            raw = name.encode()
            part = struct.pack("<QQII", inode, index, len(raw), 8) + raw
            part += bytes(-len(part) % 8)
            if len(out) + len(part) > size:
                break
            out += part
        return out

    def _opendir(self, request: Request) -> bytes:
        return struct.pack("<QII", 1 << 40, 0, 0)

    def _empty(self, request: Request) -> bytes:
        return b""

    _HANDLERS: ClassVar[dict[int, Any]] = {
        INIT: _init, LOOKUP: _lookup, GETATTR: _getattr, SETATTR: _setattr, OPEN: _open,
        CREATE: _create, READ: _read, WRITE: _write, RELEASE: _release, READDIR: _readdir,
        OPENDIR: _opendir, RELEASEDIR: _empty, FLUSH: _empty, FSYNC: _empty, UNLINK: _empty,
    }  # fmt: skip

    # --- counts and the end

    def count(self, opcode: int) -> int:
        return sum(request.opcode == opcode for request in self.seen)

    def of(self, opcode: int) -> list[Request]:
        return [request for request in self.seen if request.opcode == opcode]

    def wait_for(self, opcode: int, number: int = 1) -> Request:
        wait_until(lambda: self.count(opcode) >= number, f"request {opcode}")
        return self.of(opcode)[number - 1]

    def stop(self) -> int:
        """End the core as its owner does; return its exit code."""
        with contextlib.suppress(EOFError, OSError, ControlError):
            self.call(STOP)
        code = self.process.wait(10)
        self.close()
        return code

    def close(self) -> None:
        """Leave nothing behind."""
        if self.process.poll() is None:
            self.process.kill()
            self._abort()
            self.process.wait(10)
        for end in (self.requests, self.control):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        if self._thread is not None:
            self._thread.join(10)
            assert not self._thread.is_alive()
        self.requests.close()
        self.control.close()
        if self.door is not None:
            self.door.close()
        if self.core_requests >= 0:
            os.close(self.core_requests)
            self.core_requests = -1
        detach(self.path)

    def _abort(self) -> None:
        """Fail what waits in the kernel: a thread in there keeps a killed core alive."""
        minor = self.hello[3] if hasattr(self, "hello") else -1
        path = Path(f"/sys/fs/fuse/connections/{minor}/abort")
        with contextlib.suppress(OSError):
            path.write_text("1")

    def die(self) -> None:
        """Be gone, as a killed process is."""
        os.close(self.core_requests)
        self.core_requests = -1
        for end in (self.requests, self.control):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


def detach(path: Path) -> None:
    """Unmount whatever is there."""
    while is_mounted(path):
        subprocess.run(["umount", "-l", str(path)], check=True)


def is_mounted(path: Path) -> bool:
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    return any(line.split()[4] == str(path) for line in mounts)


def client(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Start Python in a process of its own, which may touch the mount in any way."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def run(code: str, *arguments: object, timeout: float = 30) -> str:
    """Run Python in a process of its own; return what it printed."""
    process = client(code, *arguments)
    try:
        out, _ = process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:
            process.kill()
    assert process.returncode == 0, out
    return out


def state_of(pid: int) -> str:
    """The scheduler's letter for a process; empty if it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return ""
    return text.rsplit(")", 1)[1].split()[0]


def descriptor_count(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def kinds(requests: Iterator[Request] | list[Request]) -> collections.Counter[int]:
    return collections.Counter(request.opcode for request in requests)


def hard_kill(pid: int) -> float:
    """SIGKILL and wait until it is gone; return how long that took."""
    start = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: state_of(pid) in ("", "Z"), f"end of {pid}", 10)
    return time.monotonic() - start
