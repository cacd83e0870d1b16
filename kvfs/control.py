"""The control socket of an open pool: its owner answers administrators' questions.

Layer: L5.

- `<pool>/control.sock`, mode 0600; whoever connects must be root or the owner's user (SO_PEERCRED).
- A thread accepts, one thread per connection answers, at most `CONNECTIONS_MAX` at a time. Whatever
  arrives is bounded in size and time; a connection that sends something else than a question is
  told so, if it can be, and closed.
- Answers come from `kvfs.admin.operations`. This is one of the four edges where an unexpected
  exception is logged and becomes an answer ('InternalError') instead of ending the process.
- The caller holds the pool's lock, so a socket found at start was left by an owner that died.

Concurrency: `_lock` guards the set of connections. `stop` closes them, so that no answer is given
once the pool begins to close.
"""

import contextlib
import logging
import os
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Protocol, Self
from uuid import UUID

import msgspec

from kvfs.admin import messages as msg
from kvfs.admin.operations import Owner, answer
from kvfs.clients.peer import begin, peer_of
from kvfs.clock import Clock
from kvfs.control_client import (
    QUESTION_BYTES_MAX,
    REPLY_BYTES_MAX,
    Entry,
    receive_frame,
    register,
    send_frame,
    socket_address,
)
from kvfs.errors import (
    BusyError,
    FormatVersionError,
    KvfsError,
    RefusedError,
    UnavailableError,
    UsageError,
)

CONNECTIONS_MAX: Final = 16
IDLE_TIMEOUT_S: Final = 60.0
_RETRY_S: Final = 0.1
_log = logging.getLogger("kvfs.control")


class Heirs(Protocol):
    """Decides about processes that want to take the pool over."""

    def check(self, question: msg.TakeOver) -> msg.TakeOverAnswer:
        """Accept, which is then bound to `begin` or `decline`; or raise a KvfsError."""

    def begin(self, connection: socket.socket) -> None:
        """Take the connection on which the answer was sent."""

    def decline(self) -> None:
        """Forget what was accepted: the answer could not be sent."""


class Owned(Protocol):
    """What must be known of the pool: an open one is one, and one that its owner has closed."""

    path: Path
    name: str
    uuid: UUID
    clock: Clock


Answer = Callable[[Any, Owner, msg.Request], Any]
"""Answers a question about the pool, or raises a KvfsError; see kvfs.admin.operations."""


class ControlServer:
    """Answers questions about a pool until stopped. Use as a context manager."""

    def __init__(
        self, pool: Owned, *, mount: str = "", heirs: Heirs | None = None,
        timeout_s: float = IDLE_TIMEOUT_S, answers: Answer = answer,
    ) -> None:  # fmt: skip
        """Bind to a pool that this process owns.

        Args:
            pool: Open; stays open until `stop` has returned.
            mount: Where it is mounted, for `kvfs umount` and `pool status`.
            heirs: Who may take the pool over; nobody when missing.
            timeout_s: How long a connection may say nothing, or take for one message.
            answers: Everything but who takes the pool over.
        """
        command = Path(sys.argv[0]).name if sys.argv and sys.argv[0] else "python"
        self._pool = pool
        self._owner = Owner(command, mount, pool.clock.wall_ns())
        self._heirs = heirs
        self._timeout_s = timeout_s
        self._answers = answers
        self._lock = threading.Lock()
        self._connections: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._listener: socket.socket | None = None
        self._acceptor: threading.Thread | None = None
        self._is_stopping = threading.Event()
        self._entry: Path | None = None

    def start(self) -> None:
        """Listen, and register the owner.

        Raises:
            OSError: The socket cannot be made in the pool's directory.
        """
        assert self._listener is None, "started twice"
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            self._bind(listener)
        except BaseException:
            listener.close()
            raise
        self._listener = listener
        self._acceptor = threading.Thread(
            target=self._accept, args=(listener,), name="kvfs-control", daemon=True
        )
        self._acceptor.start()
        self._register()

    def stop(self) -> None:
        """Stop listening, end all connections, remove socket and registration; idempotent."""
        listener, self._listener = self._listener, None
        if listener is None:
            return
        if self._entry is not None:
            self._entry.unlink(missing_ok=True)
            self._entry = None
        with contextlib.suppress(OSError), socket_address(self._pool.path) as address:
            os.unlink(address)
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)  # wakes the accepting thread
        with self._lock:
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        self._is_stopping.set()
        if self._acceptor is not None:
            self._acceptor.join()
        with self._lock:
            threads = list(self._threads)
        for thread in threads:
            thread.join()
        listener.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    # --- internals

    def _bind(self, listener: socket.socket) -> None:
        with socket_address(self._pool.path) as address:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(address)
            os.fchmod(listener.fileno(), 0o600)  # bind gives the file the mode of the descriptor
            listener.bind(address)
        listener.listen(CONNECTIONS_MAX)

    def _register(self) -> None:
        """Make the owner findable by name and mount; without it only by the pool's path."""
        entry = Entry(
            pool=msg.printable(str(self._pool.path)),
            name=self._pool.name,
            uuid=str(self._pool.uuid),
            pid=os.getpid(),
            mount=msg.printable(self._owner.mount),
        )
        try:
            self._entry = register(entry)
        except (OSError, RefusedError) as error:
            _log.info("owner not registered: %s", error)

    def _accept(self, listener: socket.socket) -> None:
        while not self._is_stopping.is_set():
            try:
                connection, _ = listener.accept()
            except OSError as error:
                if self._listener is not None:  # out of descriptors or memory: try again
                    _log.warning("control connection not accepted: %s", error)
                    self._is_stopping.wait(_RETRY_S)
                continue
            connection.settimeout(self._timeout_s)
            thread = threading.Thread(
                target=self._serve, args=(connection,), name="kvfs-control-client", daemon=True
            )
            with self._lock:
                refusal = self._refusal() or begin(thread)
                if refusal is None:
                    self._connections.add(connection)
                    self._threads = [old for old in self._threads if old.is_alive()]
                    self._threads.append(thread)
            if refusal is not None:
                self._refuse(connection, refusal)
                connection.close()

    def _refusal(self) -> KvfsError | None:
        """Return why there can be no connection more, if so. REQUIRES: the lock."""
        if self._listener is None:
            return UnavailableError("the pool is being closed")
        if len(self._connections) >= CONNECTIONS_MAX:
            return BusyError("too many connections; try again")
        return None

    def _serve(self, connection: socket.socket) -> None:
        try:
            uid = peer_of(connection).uid
            if uid not in (0, os.geteuid()):
                error = RefusedError(
                    f"user {uid} may not ask: the pool belongs to user {os.geteuid()}; "
                    "run as that user or as root"
                )
                self._refuse(connection, error)
                return
            while (question := receive_frame(connection, QUESTION_BYTES_MAX)) is not None:
                reply, is_heir = self._reply(question)
                if is_heir:
                    self._hand_over(connection, reply)
                    return
                send_frame(connection, reply, REPLY_BYTES_MAX)
        except BusyError as error:
            self._refuse(connection, error)
        except OSError as error:
            _log.debug("control connection ended: %s", error)
        finally:
            with self._lock:
                self._connections.discard(connection)
            connection.close()

    def _hand_over(self, connection: socket.socket, reply: bytes) -> None:
        """Give the connection to whom the pool will be given by; `stop` leaves it alone."""
        assert self._heirs is not None
        try:
            send_frame(connection, reply, REPLY_BYTES_MAX)
            with self._lock:
                self._connections.discard(connection)
            given = connection.dup()
        except OSError:
            self._heirs.decline()
            raise
        self._heirs.begin(given)

    def _take_over(self, question: msg.TakeOver) -> msg.TakeOverAnswer:
        if self._heirs is None:
            raise RefusedError("this owner gives the pool to nobody; end it instead")
        return self._heirs.check(question)

    def _reply(self, raw: bytes) -> tuple[bytes, bool]:
        """Answer one question, whatever it is; say whether the asker takes the pool over."""
        try:
            question = msgspec.msgpack.decode(raw, type=msg.Question)
            if question.version != msg.PROTOCOL_VERSION:
                return _failure(_version_error(question.version)), False
            asked = question.question
            is_heir = isinstance(asked, msg.TakeOver)
            if isinstance(asked, msg.TakeOver):
                found = self._take_over(asked)
            else:
                found = self._answers(self._pool, self._owner, asked)
            reply = msg.Reply(msg.PROTOCOL_VERSION, answer=msgspec.Raw(_encode(found)))
            return _encode(reply), is_heir
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            return _failure(UsageError(f"question not understood: {error}")), False
        except KvfsError as error:
            return _failure(error), False
        except Exception as error:  # noqa: BLE001 - an edge: logged, and answered
            _log.exception("control question failed")
            return _failure(error), False

    def _refuse(self, connection: socket.socket, error: KvfsError) -> None:
        with contextlib.suppress(OSError):
            send_frame(connection, _failure(error), REPLY_BYTES_MAX)


def _encode(value: object) -> bytes:
    return msgspec.msgpack.encode(value)


def _failure(error: Exception) -> bytes:
    """Encode an error; one that is not kvfs's own is a bug of the owner."""
    if isinstance(error, KvfsError):
        name = next(
            kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "kvfs.errors"
        )
        failure = msg.Failure(name, error.exit_code, msg.printable(str(error)))
    else:
        text = f"the pool's owner failed: {type(error).__name__}: {error}; see its log"
        failure = msg.Failure("InternalError", 1, msg.printable(text))
    return _encode(msg.Reply(msg.PROTOCOL_VERSION, failure=failure))


def _version_error(version: int) -> FormatVersionError:
    return FormatVersionError(
        f"control protocol {version} asked for, this owner speaks {msg.PROTOCOL_VERSION}; "
        "use the kvfs-admin of the owner's release"
    )
