"""A stand-in for kvfs-core: the other end of the control connection, and reads as the core does."""

import array
import os
import socket
import struct
import threading
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from kvfs.clock import SystemClock
from kvfs.fuse.core_client import CoreClient
from kvfs.fuse.core_messages import ANSWER, BLOCK, Kind

if TYPE_CHECKING:
    from collections.abc import Callable

HEADER = struct.Struct("<IIQ")
Answer = tuple[int, bytes]


class FakeCore:
    """Answers control messages from a thread. `said`: what came, as (kind, argument)."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.client = CoreClient(ours, SystemClock())
        self.said: list[tuple[Kind, int]] = []
        self.answers: dict[Kind, Callable[[int, bytes], Answer | None]] = {}
        self.segments: dict[int, int] = {}
        self.tables: dict[int, tuple[int, int, np.ndarray]] = {}
        self.backings: dict[int, int] = {}
        self._pending: dict[int, tuple[int, int, np.ndarray]] = {}
        self._socket = theirs
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def count(self, kind: Kind) -> int:
        return sum(found is kind for found, _ in self.said)

    def read(self, fh: int, offset: int, nbytes: int) -> bytes:
        """Read as the core would: from the segments, verifying whole blocks."""
        size, stride, blocks = self.tables[fh]
        out = b""
        for block in blocks:
            raw = os.pread(self.segments[int(block["ref"])], int(block["stored"]), block["offset"])
            assert xxhash.xxh3_128_digest(raw)[::-1] == block["digest"].tobytes()
            out += raw.ljust(stride, b"\0")
        return out[: min(size, offset + nbytes)][offset:]

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._socket.close()
        self.client.close()
        for fd in (*self.segments.values(), *self.backings.values()):
            os.close(fd)

    def _serve(self) -> None:
        while True:
            raw, ancillary, _, _ = self._socket.recvmsg(1 << 17, socket.CMSG_SPACE(4))
            if not raw:
                return
            fds = array.array("i")
            for _, _, data in ancillary:
                fds.frombytes(data)
            number, sequence, argument = HEADER.unpack_from(raw)
            kind = Kind(number)
            self.said.append((kind, argument))
            fd = fds[0] if fds else -1
            result = self._answer(kind, argument, raw[HEADER.size :], fd)
            if result is not None:
                head = struct.pack("<IIq", number | ANSWER, sequence, result[0])
                self._socket.send(head + result[1])

    def _answer(self, kind: Kind, argument: int, payload: bytes, fd: int) -> Answer | None:
        if kind in self.answers:
            answer = self.answers[kind](argument, payload)
            if answer is None or answer[0] < 0:
                if fd >= 0:
                    os.close(fd)
                return answer
        if kind is Kind.SEGMENT:
            self.segments[argument] = fd
        elif kind is Kind.DROP_SEGMENT:
            os.close(self.segments.pop(argument))
        elif kind is Kind.BACKING:
            self.backings[argument] = fd
        elif kind is Kind.READ_BEGIN:
            _, size, stride, count, _ = struct.unpack("<QQQII", payload)
            self._pending[argument] = (size, stride, np.zeros(count, BLOCK))
        elif kind is Kind.READ_BLOCKS:
            first, count = struct.unpack_from("<II", payload)
            blocks = np.frombuffer(payload, BLOCK, count, 8)
            self._pending[argument][2][first : first + count] = blocks
        elif kind is Kind.READ_END:
            self.tables[argument] = self._pending.pop(argument)
        elif kind is Kind.CLOSE:
            self.tables.pop(argument, None)
            if argument in self.backings:
                os.close(self.backings.pop(argument))
        elif fd >= 0:
            os.close(fd)
        return (0, b"") if kind not in self.answers else answer
