"""Talking to the owner of a pool over its control socket.

Layer: L5. Imports neither numpy nor the engine, so that online commands start quickly.

    frame: length u32 little-endian | MessagePack of `messages.Question` or `messages.Reply`

- One question at a time per connection; the owner answers each before it reads the next.
- A socket's path may have 107 bytes at most. Both sides go through `/proc/self/fd/N/control.sock`,
  where N is the pool's directory, so that the pool's own path may be of any length.
- Owners also register themselves in a small directory of the user's (`runtime_directory`), so that
  a pool can be found by its name or mount point. An entry whose owner does not answer is stale and
  removed by whoever meets it.
"""

import contextlib
import os
import socket
import stat
import struct
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import msgspec

import kvfs.errors
from kvfs.admin import messages as msg
from kvfs.clients import channel
from kvfs.errors import (
    BusyError,
    FormatVersionError,
    KvfsError,
    RefusedError,
    UnavailableError,
)

SOCKET_NAME: Final = "control.sock"
QUESTION_BYTES_MAX: Final = 1 << 20
REPLY_BYTES_MAX: Final = 64 << 20
TIMEOUT_S: Final = 30.0
RUNTIME_VARIABLE: Final = "KVFS_RUNTIME_DIR"
_LENGTH: Final = struct.Struct("<I")
_SYSTEM_RUNTIME: Final = "/run/kvfs"
_ENTRY_SUFFIX: Final = ".json"


class Entry(msgspec.Struct, frozen=True):
    """An owner as registered. `pool`: the pool's directory; `mount`: empty if it is not mounted."""

    pool: str
    name: str
    uuid: str
    pid: int
    mount: str = ""


def socket_address(pool_path: Path) -> AbstractContextManager[str]:
    """Give a short path of the pool's control socket; see kvfs.clients.channel."""
    return channel.socket_address(pool_path, SOCKET_NAME)


class ControlClient:
    """A connection to an owner. Use as a context manager. One thread."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(msg.Reply)

    @classmethod
    def connect(
        cls, pool_path: str | os.PathLike[str], timeout_s: float = TIMEOUT_S
    ) -> "ControlClient | None":
        """Connect to the owner of a pool; None if nobody answers there.

        Raises:
            RefusedError: The socket belongs to another user.
        """
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        connection.settimeout(timeout_s)
        try:
            with socket_address(Path(pool_path)) as address:
                connection.connect(address)
        except PermissionError as error:
            connection.close()
            raise RefusedError(
                f"control socket belongs to another user: {pool_path}/{SOCKET_NAME}; "
                "run as the owner's user or as root"
            ) from error
        except OSError:
            connection.close()
            return None
        return cls(connection)

    def ask(self, question: msg.AnyRequest) -> Any:
        """Ask, and return an answer of the type `messages.ANSWERS` names.

        Raises:
            KvfsError: What the owner raised, as the same class.
            UnavailableError: The owner went away or gives no answer in time.
            FormatVersionError: The owner speaks another version of the protocol.
        """
        raw = self._encoder.encode(msg.Question(msg.PROTOCOL_VERSION, question))
        try:
            # An owner that refuses says so and closes at once: its answer may be there already.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                send_frame(self._connection, raw, QUESTION_BYTES_MAX)
            received = receive_frame(self._connection, REPLY_BYTES_MAX)
        except TimeoutError as error:
            raise UnavailableError("the pool's owner gives no answer; see its log") from error
        except OSError as error:
            raise UnavailableError(f"connection to the pool's owner broke: {error}") from error
        if received is None:
            raise UnavailableError("the pool's owner closed the connection; try again")
        try:
            reply = self._decoder.decode(received)
            if reply.version != msg.PROTOCOL_VERSION:
                raise FormatVersionError(
                    f"the pool's owner speaks control protocol {reply.version}, this command "
                    f"{msg.PROTOCOL_VERSION}; use the kvfs-admin of the owner's release"
                )
            if reply.failure is not None:
                raise as_error(reply.failure)
            return msgspec.msgpack.decode(reply.answer, type=msg.ANSWERS[type(question)])
        except msgspec.MsgspecError as error:
            raise UnavailableError(f"answer of the pool's owner not understood: {error}") from error

    def detach(self) -> socket.socket:
        """Return the connection, for whatever follows an answer; the caller closes it."""
        return self._connection

    def close(self) -> None:
        """Close; idempotent."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def as_error(failure: msg.Failure) -> KvfsError:
    """Return the exception that the owner raised."""
    kind = getattr(kvfs.errors, failure.error, None)
    if isinstance(kind, type) and issubclass(kind, KvfsError):
        return kind(failure.message)
    return KvfsError(failure.message)


def send_frame(connection: socket.socket, raw: bytes, bytes_max: int) -> None:
    """Send one message.

    Raises:
        BusyError: It is too long.
        OSError: The connection failed; TimeoutError if it took too long.
    """
    if len(raw) > bytes_max:
        raise BusyError(
            f"message too long: expected at most {bytes_max} bytes, found {len(raw)}; "
            "ask for less at once"
        )
    connection.sendall(_LENGTH.pack(len(raw)) + raw)


def receive_frame(connection: socket.socket, bytes_max: int) -> bytes | None:
    """Receive one message, or None at the end of the connection.

    Raises:
        OSError: The connection failed, took too long, ended inside a message, or the other side
            announced more than `bytes_max`.
    """
    head = _receive(connection, _LENGTH.size)
    if not head:
        return None
    if len(head) < _LENGTH.size:
        raise ConnectionError("connection ended inside a message")
    (length,) = _LENGTH.unpack(head)
    if length > bytes_max:
        raise ConnectionError(f"message of {length} bytes announced, at most {bytes_max} allowed")
    raw = _receive(connection, length)
    if len(raw) < length:
        raise ConnectionError("connection ended inside a message")
    return raw


def _receive(connection: socket.socket, nbytes: int) -> bytes:
    """Receive `nbytes`; fewer only at the end of the connection."""
    parts: list[bytes] = []
    missing = nbytes
    while missing:
        part = connection.recv(min(missing, 1 << 20))
        if not part:
            break
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


# --- who owns what


def runtime_directory() -> Path:
    """Return where this user's owners register themselves."""
    given = os.environ.get(RUNTIME_VARIABLE)
    if given:
        return Path(given)
    if os.geteuid() == 0:
        return Path(_SYSTEM_RUNTIME)
    base = os.environ.get("XDG_RUNTIME_DIR")
    return Path(base) / "kvfs" if base else Path(f"/tmp/kvfs-{os.geteuid()}")


def register(entry: Entry) -> Path:
    """Note an owner; return the entry's file, which the owner removes in the end.

    Raises:
        RefusedError: The directory belongs to somebody else, or others may write to it.
        OSError: It cannot be made.
    """
    folder = runtime_directory()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.lstat()
    is_safe = stat.S_ISDIR(status.st_mode) and status.st_uid in (0, os.geteuid())
    if not is_safe or status.st_mode & 0o022:
        raise RefusedError(
            f"runtime directory is not safe: {folder}: expected a directory of this user that "
            f"nobody else may write to; remove it, or set {RUNTIME_VARIABLE}"
        )
    path = folder / f"{entry.uuid}{_ENTRY_SUFFIX}"
    fresh = folder / f".{entry.uuid}.{os.getpid()}"
    fresh.write_bytes(msgspec.json.encode(entry))
    fresh.rename(path)
    return path


def owners() -> list[Entry]:
    """Return the registered owners that answer; remove the entries of those that do not."""
    found: list[Entry] = []
    folders = {runtime_directory()}
    if RUNTIME_VARIABLE not in os.environ:
        folders.add(Path(_SYSTEM_RUNTIME))
    for folder in sorted(folders):
        try:
            paths = sorted(folder.glob(f"*{_ENTRY_SUFFIX}"))
        except OSError:
            continue
        for path in paths:
            entry = _read_entry(path)
            if entry is not None and _answers(entry):
                found.append(entry)
            else:
                with contextlib.suppress(OSError):
                    path.unlink()
    return found


def _read_entry(path: Path) -> Entry | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=Entry)
    except (OSError, msgspec.MsgspecError):
        return None


def _answers(entry: Entry) -> bool:
    """Say whether somebody listens; a socket of another user counts as alive."""
    try:
        client = ControlClient.connect(entry.pool)
    except RefusedError:
        return True
    if client is None:
        return False
    client.close()
    return True
