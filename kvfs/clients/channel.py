"""Messages with descriptors over a UNIX stream socket.

Layer: L4.

    frame: length u32 little-endian | MessagePack; descriptors come with its first byte

- Whatever arrives is bounded in size, in descriptors and, once it has begun, in time.
"""

import array
import contextlib
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from kvfs.errors import UsageError

SOCKET_NAME: Final = "clients.sock"
FDS_MAX: Final = 66
_LENGTH: Final = struct.Struct("<I")
_ANCILLARY: Final = socket.CMSG_SPACE(FDS_MAX * 4)


@contextlib.contextmanager
def socket_address(pool_path: Path, name: str = SOCKET_NAME) -> Iterator[str]:
    """Yield a short path of a socket in the pool's directory, valid inside the block.

    Raises:
        FileNotFoundError: There is no such directory.
    """
    fd = os.open(pool_path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{name}"
    finally:
        os.close(fd)


def send(connection: socket.socket, raw: bytes, bytes_max: int, fds: Sequence[int] = ()) -> None:
    """Send one message.

    Raises:
        UsageError: It is too long.
        OSError: The connection failed; TimeoutError if it took too long.
    """
    if len(raw) > bytes_max:
        raise UsageError(f"message of {len(raw)} bytes, at most {bytes_max}; ask for less at once")
    frame = _LENGTH.pack(len(raw)) + raw
    sent = 0
    if fds:
        sent = socket.send_fds(connection, [frame], list(fds))
    connection.sendall(memoryview(frame)[sent:])


def receive(
    connection: socket.socket, bytes_max: int, *, idle_s: float | None, timeout_s: float
) -> tuple[bytes, list[int]] | None:
    """Receive one message and its descriptors, which the caller closes; None at the end.

    Args:
        connection: Where from.
        bytes_max: A longer one ends the connection.
        idle_s: How long to wait for its first byte; None: for ever.
        timeout_s: How long to wait for each further part.

    Raises:
        OSError: The connection failed, took too long, ended inside a message, or it was too long.
    """
    fds: list[int] = []
    try:
        connection.settimeout(idle_s)
        head = _receive_some(connection, _LENGTH.size, fds)
        if not head:
            return None
        connection.settimeout(timeout_s)
        while len(head) < _LENGTH.size:
            head += _receive_part(connection, _LENGTH.size - len(head), fds)
        (length,) = _LENGTH.unpack(head)
        if length > bytes_max:
            raise ConnectionError(f"message of {length} bytes announced, at most {bytes_max}")
        raw = bytearray()
        while len(raw) < length:
            raw += _receive_part(connection, length - len(raw), fds)
    except BaseException:
        close_all(fds)
        raise
    return bytes(raw), fds


def close_all(fds: list[int]) -> None:
    """Close descriptors, and empty the list."""
    while fds:
        os.close(fds.pop())


def _receive_part(connection: socket.socket, nbytes: int, fds: list[int]) -> bytes:
    part = _receive_some(connection, nbytes, fds)
    if not part:
        raise ConnectionError("connection ended inside a message")
    return part


def _receive_some(connection: socket.socket, nbytes: int, fds: list[int]) -> bytes:
    part, ancillary, flags, _ = connection.recvmsg(
        min(nbytes, 1 << 20), _ANCILLARY, socket.MSG_CMSG_CLOEXEC
    )
    for level, kind, raw in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            more = array.array("i")
            more.frombytes(raw[: len(raw) - len(raw) % more.itemsize])
            fds += more
    if flags & socket.MSG_CTRUNC or len(fds) > FDS_MAX:
        raise ConnectionError("too many descriptors with a message")
    return part
