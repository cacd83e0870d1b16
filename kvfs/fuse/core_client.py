"""The control connection to kvfs-core: typed messages over a socket of packets.

Layer: L5.

- A message is one packet: u32 type, u32 sequence, u64 argument, payload; at most one descriptor
  goes with it. The core answers each in order: u32 type | ANSWER, u32 sequence, i64 result,
  payload.
- Any thread may call; one at a time talks. An answer that comes after its deadline, or that nobody
  waits for (`post`), is thrown away when others are read; that to the last of messages sent without
  waiting (`post_at_once`) is handed to whom it concerns then.
- A result below zero is the core's refusal and raises OSError with that number. No answer, or an
  end of the connection, raises UnavailableError.
"""

import contextlib
import errno
import os
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from kvfs.clock import Clock
from kvfs.errors import UnavailableError
from kvfs.file_writer import DIGEST_BYTES
from kvfs.fuse.core_messages import (
    ANSWER_HEADER,
    CLOSE_BRIEFLY,
    COUNTERS,
    DIGESTS_MAX,
    HANDLE,
    HAS_FAILED,
    HEADER,
    HELLO,
    IN_ORDER,
    VERSION,
    WRITTEN,
    Hello,
    Kind,
    Message,
    OpenFile,
    Written,
    table,
)

_IN_FLIGHT: Final = 16
_DEADLINE_S: Final = 5.0
_CLOSE_ATTEMPTS: Final = 3  # the core waits a second each time
_PACKET_BYTES: Final = 1 << 17
OnAnswer = Callable[[int], None]
"""Told a result by whichever thread reads it. It must neither wait nor call the client."""


class CoreClient:
    """The owner's end of the control socket, which it owns. Thread-safe."""

    def __init__(self, connection: socket.socket, clock: Clock) -> None:
        self._socket = connection
        self._clock = clock
        self._lock = threading.Lock()
        self._sequence = 0
        self._awaited: dict[int, OnAnswer] = {}
        self._has_ended = False

    def fileno(self) -> int:
        """Return the descriptor, to wait for the core's end."""
        return self._socket.fileno()

    @property
    def has_ended(self) -> bool:
        """Whether the core has closed its end."""
        return self._has_ended

    def hello(self) -> Hello:
        """Agree on a version; wait until the core has mounted."""
        _, raw = self.call(Message(Kind.HELLO, VERSION))
        _, flags, max_write, minor, _ = HELLO.unpack_from(raw)
        return Hello(bool(flags & 1), max_write, minor)

    def add_segment(self, ref: int, nbytes: int, fd: int) -> None:
        """Give the core a segment to read from."""
        self.call(Message(Kind.SEGMENT, ref, struct.pack("<QQ", nbytes, nbytes), fd))

    def drop_segment(self, ref: int) -> None:
        """Let the core forget a segment."""
        self.call(Message(Kind.DROP_SEGMENT, ref))

    def install_read(
        self, fh: int, inode: int, size_bytes: int, stride: int, blocks: npt.NDArray[np.void],
        flags: int, deadline_ms: int = 0,
    ) -> None:  # fmt: skip
        """Let the core answer reads of a handle from blocks (BLOCK), all of the file, in order.

        Flags: VERIFY_READS, SHORT_READS. `deadline_ms`: 0 for the mount's; below 2**24.
        """
        self._call_all(table(fh, inode, size_bytes, stride, blocks, flags, deadline_ms))

    def install_read_at_once(
        self, fh: int, inode: int, size_bytes: int, stride: int, blocks: npt.NDArray[np.void],
        flags: int, deadline_ms: int, on_answer: OnAnswer,
    ) -> bool:  # fmt: skip
        """Do as `install_read` without waiting; see `post_at_once`."""
        messages = table(fh, inode, size_bytes, stride, blocks, flags, deadline_ms)
        return self.post_at_once(messages, on_answer)

    def close_lane_at_once(self, fh: int, on_answer: OnAnswer) -> bool:
        """Do as `close_lane_briefly` without waiting for the answer; see `post_at_once`."""
        return self.post_at_once([_brief_close(fh)], on_answer)

    def install_backing(self, fh: int, inode: int, fd: int) -> None:
        """Let the kernel read the file of a handle itself, from this descriptor."""
        self.call(Message(Kind.BACKING, fh, struct.pack("<Q", inode), fd))

    def close_lane(self, fh: int) -> None:
        """Take any lane from a handle, when its reads in progress are done.

        Raises:
            OSError: EBUSY: they do not end; it goes on being read.
        """
        self._close(Message(Kind.CLOSE, fh))

    def close_lane_briefly(self, fh: int) -> None:
        """Take any lane from a handle, if its reads are done; others need not wait for that.

        Raises:
            OSError: EBUSY: they are not; it is to be tried again.
        """
        self.call(_brief_close(fh))

    def install_write(
        self, fh: int, inode: int, fd: int, credit_bytes: int, stride: int, start_bytes: int
    ) -> None:
        """Let the core write a handle's file: to this descriptor, up to a credit.

        What is written in order from `start_bytes` on is hashed by strides; stride 0: nothing is.
        Not waited for: should the core refuse, writes go on coming to this side, and `close_writer`
        says so.
        """
        payload = struct.pack("<QQQQ", inode, credit_bytes, stride, start_bytes)
        self.post(Message(Kind.WRITE, fh, payload, fd))

    def raise_credit(self, fh: int, credit_bytes: int) -> None:
        """Let the core write further. Not waited for."""
        self.post(Message(Kind.CREDIT, fh, struct.pack("<Q", credit_bytes)))

    def close_writer(self, fh: int, digest_count: int) -> Written | None:
        """Stop the core writing a handle's file, when its writes in progress are done.

        None: it did not write it. `digest_count`: about how many digests there will be.

        Raises:
            OSError: EBUSY: they do not end.
        """
        ready = b""
        while digest_count - len(ready) // DIGEST_BYTES > DIGESTS_MAX:
            first = len(ready) // DIGEST_BYTES
            _, raw = self.call(Message(Kind.DIGESTS, fh, struct.pack("<I", first)))
            # The last of all may be of a stride that grows still.
            part = raw[WRITTEN.size :][: DIGESTS_MAX // 2 * DIGEST_BYTES]
            if len(part) < DIGESTS_MAX // 2 * DIGEST_BYTES:
                break
            ready += part
        first = len(ready) // DIGEST_BYTES
        raw = self._close(Message(Kind.CLOSE, fh, struct.pack("<I", first)))
        if not raw:
            return None
        high, start, end, flags, count = WRITTEN.unpack_from(raw)
        digests = np.frombuffer(ready + raw[WRITTEN.size :], np.uint8).reshape(-1, DIGEST_BYTES)
        is_in_order = bool(flags & IN_ORDER) and len(digests) == count
        return Written(high, start, end, is_in_order, bool(flags & HAS_FAILED), digests)

    def install_names(self, fd: int, nbytes: int, timeout_ms: int) -> None:
        """Let the core deny names that a filter lacks."""
        self.call(Message(Kind.NAMES, timeout_ms, struct.pack("<Q", nbytes), fd))

    def status(self) -> dict[str, int]:
        """Return the core's counters."""
        _, raw = self.call(Message(Kind.STATUS))
        values = struct.unpack_from(f"<{len(raw) // 8}Q", raw)
        return dict(zip(COUNTERS, values, strict=False))

    def stop(self) -> None:
        """Let the core detach the mount and end."""
        self.call(Message(Kind.STOP))

    def open_files(self) -> list[OpenFile]:
        """Return the files that the kernel has open."""
        found: list[OpenFile] = []
        while True:
            _, raw = self.call(Message(Kind.HANDLES, len(found)))
            part = list(HANDLE.iter_unpack(raw))
            if not part:
                return found
            found += [OpenFile(fh, inode, flags, lane == 3) for fh, inode, flags, lane in part]

    def allow(self, milliseconds: int) -> None:
        """Give forwarded requests this much more time. Not waited for."""
        self.post(Message(Kind.ALLOW, milliseconds))

    def hold(self, patience_ms: int) -> None:
        """Have the core keep what comes from the kernel, for another owner; with 0, send it again.

        So that it starts nobody else should this one go. `patience_ms`: longer that requests may
        take meanwhile.
        """
        self.call(Message(Kind.HOLD, patience_ms))

    def call(self, message: Message) -> tuple[int, bytes]:
        """Send one message; return result and payload of its answer.

        Raises:
            OSError: The core refused.
            UnavailableError: It has ended, or does not answer.
        """
        return self._call_all([message])[0]

    def post(self, message: Message) -> None:
        """Send one message whose answer nobody needs.

        Raises:
            UnavailableError: The core has ended, or takes no messages.
        """
        with self._lock:
            self._require()
            self._send(message, self._deadline_ns())
            self._discard_answers()

    def post_at_once(self, messages: Sequence[Message], on_answer: OnAnswer) -> bool:
        """Send messages if nothing need be waited for; False: none was sent.

        `on_answer` is told the result of the last one, below zero if it was refused or not sent.
        """
        if not self._lock.acquire(blocking=False):
            return False
        try:
            if self._has_ended:
                return False
            self._discard_answers()
            sequence = 0
            try:
                for message in messages:
                    sequence = self._send_now(message)
            except OSError:
                if sequence:
                    on_answer(-errno.EAGAIN)
                return bool(sequence)
            self._awaited[sequence] = on_answer
            return True
        finally:
            self._lock.release()

    def read_answers(self) -> None:
        """Read the answers that are there, so that those who wait for them are told."""
        with self._lock:
            if not self._has_ended:
                self._discard_answers()

    def close(self) -> None:
        """Close the connection; idempotent."""
        with self._lock:
            self._has_ended = True
            self._socket.close()

    def note_end(self) -> None:
        """Refuse calls from now on: the core's end was seen."""
        self._has_ended = True

    # --- internals

    def _close(self, message: Message) -> bytes:
        """Send CLOSE until the lane is not busy any more; return what it says."""
        for _ in range(_CLOSE_ATTEMPTS - 1):
            try:
                return self.call(message)[1]
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
        return self.call(message)[1]

    def _call_all(self, messages: Sequence[Message]) -> list[tuple[int, bytes]]:
        """Send messages and return all answers; the first refusal is raised at the end."""
        answers: list[tuple[int, bytes]] = []
        with self._lock:
            self._require()
            deadline_ns = self._deadline_ns()
            for start in range(0, len(messages), _IN_FLIGHT):
                part = messages[start : start + _IN_FLIGHT]
                expected = [self._send(message, deadline_ns) for message in part]
                answers += [self._receive(number, deadline_ns) for number in expected]
        for result, _ in answers:
            if result < 0:
                raise OSError(-result, os.strerror(-result))
        return answers

    def _require(self) -> None:
        if self._has_ended:
            raise UnavailableError("kvfs-core has ended")

    def _deadline_ns(self) -> int:
        return self._clock.monotonic_ns() + int(_DEADLINE_S * 1e9)

    def _discard_answers(self) -> None:
        """Read what nobody waits for, so that the core never waits for us."""
        self._socket.settimeout(0)
        with contextlib.suppress(OSError):  # there is none now; an end shows at the next message
            while raw := self._socket.recv(_PACKET_BYTES):
                self._tell(raw)

    def _tell(self, raw: bytes) -> int:
        """Hand a result to who awaits it; return the sequence number of its message."""
        number, result = ANSWER_HEADER.unpack_from(raw)[1:]
        on_answer = self._awaited.pop(number, None)
        if on_answer is not None:
            on_answer(result)
        return int(number)

    def _send(self, message: Message, deadline_ns: int) -> int:
        self._limit(deadline_ns)
        try:
            return self._send_now(message)
        except OSError as error:
            raise self._failure(error) from error

    def _send_now(self, message: Message) -> int:
        """Send within the socket's timeout; return the sequence number."""
        self._sequence = (self._sequence + 1) & 0xFFFF_FFFF
        raw = HEADER.pack(message.kind, self._sequence, message.argument) + message.payload
        if message.fd < 0:
            self._socket.send(raw)
        else:
            socket.send_fds(self._socket, [raw], [message.fd])
        return self._sequence

    def _receive(self, expected: int, deadline_ns: int) -> tuple[int, bytes]:
        while True:
            self._limit(deadline_ns)
            try:
                raw = self._socket.recv(_PACKET_BYTES)
            except OSError as error:
                raise self._failure(error) from error
            if not raw:
                self._has_ended = True
                raise UnavailableError("kvfs-core has ended")
            if self._tell(raw) == expected:
                return ANSWER_HEADER.unpack_from(raw)[2], raw[ANSWER_HEADER.size :]

    def _limit(self, deadline_ns: int) -> None:
        left_s = (deadline_ns - self._clock.monotonic_ns()) / 1e9
        if left_s <= 0:
            raise UnavailableError(f"kvfs-core did not answer within {_DEADLINE_S:.0f} s")
        self._socket.settimeout(left_s)

    def _failure(self, error: OSError) -> UnavailableError:
        if isinstance(error, TimeoutError):
            return UnavailableError(f"kvfs-core did not answer within {_DEADLINE_S:.0f} s")
        self._has_ended = True
        return UnavailableError(f"kvfs-core has ended: {error.strerror or error}")


def _brief_close(fh: int) -> Message:
    return Message(Kind.CLOSE, fh, struct.pack("<II", 0, CLOSE_BRIEFLY))
