"""The owner's door for clients: accepts connections and answers them; docs/PROTOCOL.md.

Layer: L5.

    with ClientServer(pool):
        ...  # other processes can kvfs.open_pool(pool.path)

- `<pool>/clients.sock`, mode 0666: whoever reaches the pool's directory may connect. What he may do
  is for each namespace's mode to say (`peer`).
- A thread accepts, one thread per connection answers, one request at a time. Connections are
  bounded in number, all and each user's, messages in size and time. Who sends something else is
  told so, if he can be.
- A thread looks several times a second at what clients read, and frees what they hold no more.
- A session ends with the process that began it, whoever else has its socket: the accepting thread
  watches both.
- The caller holds the pool's lock, so a socket found at start was left by an owner that died.

Concurrency: `_lock` guards the tables of sessions and connections. `stop` ends all connections, so
that no answer is given once the pool begins to close.
"""

import contextlib
import logging
import os
import select
import socket
import threading
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Final, Self

import msgspec

from kvfs.clients import channel
from kvfs.clients import messages as msg
from kvfs.clients.peer import begin, peer_of, pidfd_of
from kvfs.clients.regions import Regions, SharedFiles
from kvfs.clients.session import Connection, Session
from kvfs.errors import (
    BusyError,
    ClosedError,
    FormatVersionError,
    KvfsError,
    RefusedError,
    UnavailableError,
    UsageError,
)
from kvfs.pool import Pool

SESSIONS_MAX: Final = 256
CONNECTIONS_MAX: Final = 1024
USER_SESSIONS_MAX: Final = 64
"""Of one user, but root and the owner's: they could end the owner anyway."""
USER_CONNECTIONS_MAX: Final = 256
TIMEOUT_S: Final = 10.0
_TICK_S: Final = 0.2
_RETRY_S: Final = 0.1
_ENVELOPE_BYTES: Final = 64  # of a reply around its answer
_log = logging.getLogger("kvfs.clients")


@dataclass(frozen=True, slots=True)
class ClientStatistics:
    """One client in figures. `held_segments`: what its lease page says."""

    name: str
    pid: int
    uid: int
    held_segments: int
    heartbeat_ns: int
    is_revoked: bool


class ClientServer:
    """Serves a pool to other processes until stopped. Use as a context manager."""

    def __init__(
        self, pool: Pool, *, listener: socket.socket | None = None, timeout_s: float = TIMEOUT_S
    ) -> None:
        """Bind to a pool that this process owns.

        Args:
            pool: Open; stays open until `stop` has returned.
            listener: A socket that listens already, as systemd hands it over; `stop` closes the
                descriptor, and leaves file and socket as they are for the next owner. Made in the
                pool's directory when missing.
            timeout_s: How long a message may take once it has begun.
        """
        self._pool = pool
        self._given = listener
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._sessions: dict[bytes, Session] = {}
        self._connections: dict[socket.socket, Session | None] = {}
        self._uids: dict[socket.socket, int] = {}  # who each of them is
        self._processes: dict[int, Session] = {}  # by pidfd
        self._threads: list[threading.Thread] = []
        self._files = SharedFiles(pool.store.state.options.client_shared_bytes)
        self._listener: socket.socket | None = None
        self._watched: select.epoll | None = None  # what the accepting thread waits for
        self._wake_fd = -1  # readable once the accepting thread is to end
        self._is_stopping = threading.Event()
        self._decoder = msgspec.msgpack.Decoder(msg.AnyRequest)

    def start(self) -> None:
        """Listen.

        Raises:
            OSError: The socket cannot be made in the pool's directory.
        """
        assert self._listener is None, "started twice"
        listener = self._given
        if listener is None:
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
            try:
                self._bind(listener)
            except BaseException:
                listener.close()
                raise
        self._listener = listener
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC)
        self._watched = select.epoll()
        for fd in (listener.fileno(), self._wake_fd):
            self._watched.register(fd, select.EPOLLIN)
        self._is_stopping.clear()
        accept = partial(self._accept, listener, self._watched)
        for target, name in ((accept, "kvfs-clients"), (self._tick, "kvfs-clients-tick")):
            thread = threading.Thread(target=target, name=name, daemon=True)
            self._threads.append(thread)
            thread.start()

    def stop(self) -> None:
        """Stop listening, end all sessions, remove the socket; idempotent."""
        listener, self._listener = self._listener, None
        if listener is None:
            if self._given is not None:  # never started
                self._given.close()
            return
        if self._given is None:
            with contextlib.suppress(OSError), channel.socket_address(self._pool.path) as address:
                os.unlink(address)
        self._is_stopping.set()
        os.eventfd_write(self._wake_fd, 1)
        with self._lock:
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            threads = list(self._threads)
        for thread in threads:
            thread.join()
        self._pool.store.state.keep_bytes()
        with self._lock:
            sessions = list(self._sessions.values())
        for session in sessions:
            self._end(session, is_told=False)
        os.close(self._wake_fd)
        if self._watched is not None:
            self._watched.close()
        listener.close()

    def statistics(self) -> list[ClientStatistics]:
        """Return a snapshot of the clients."""
        with self._lock:
            sessions = list(self._sessions.values())
        found = []
        for session in sessions:
            page = session.holder.page
            with contextlib.suppress(ValueError):  # it has ended meanwhile
                held, heartbeat_ns = len(page.places()) // 8, page.heartbeat_ns
                found.append(
                    ClientStatistics(session.name, session.peer.pid, session.peer.uid, held,
                                     heartbeat_ns, page.is_revoked)
                )  # fmt: skip
        return found

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
        with channel.socket_address(self._pool.path) as address:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(address)
            os.fchmod(listener.fileno(), 0o666)  # bind gives the file the mode of the descriptor
            listener.bind(address)
            os.chmod(address, 0o666)  # whatever the umask
        listener.listen(CONNECTIONS_MAX)

    def _tick(self) -> None:
        while not self._is_stopping.wait(_TICK_S):
            with self._lock:
                sessions = list(self._sessions.values())
            try:
                for session in sessions:
                    with contextlib.suppress(ValueError):  # it has ended meanwhile
                        session.drain()
                self._pool.store.state.free_drained()
            except Exception:  # noqa: BLE001 - an edge: the thread must outlive whatever happens
                _log.exception("clients could not be looked after")

    def _accept(self, listener: socket.socket, watched: select.epoll) -> None:
        """Accept until `stop`. Shutting the listener down would end one that is not ours alone."""
        while True:
            ready = {fd for fd, _ in watched.poll()}
            if self._is_stopping.is_set():
                return
            self._end_dead(ready)
            if listener.fileno() not in ready:
                continue
            try:
                connection, _ = listener.accept()
            except OSError as error:  # out of descriptors or memory: try again
                _log.warning("client not accepted: %s", error)
                self._is_stopping.wait(_RETRY_S)
                continue
            connection.settimeout(self._timeout_s)
            thread = threading.Thread(
                target=self._serve, args=(connection,), name="kvfs-client", daemon=True
            )
            uid = peer_of(connection).uid
            with self._lock:
                refusal = self._refusal(uid) or begin(thread)
                if refusal is None:
                    self._connections[connection], self._uids[connection] = None, uid
                    self._threads = [old for old in self._threads if old.is_alive()]
                    self._threads.append(thread)
            if refusal is not None:
                self._tell(connection, refusal)
                connection.close()

    def _end_dead(self, pidfds: set[int]) -> None:
        """End the sessions whose processes have ended: of those among the descriptors.

        A number may be another process's by now.
        """
        with self._lock:
            ended = [fd for fd in pidfds if fd in self._processes and _has_ended(fd)]
            for session in [self._processes[fd] for fd in ended]:
                _log.info("client has ended: %s", session.name)
                self._forget_process(session)
                self._shut(session)

    def _forget_process(self, session: Session) -> None:
        """Watch a session's process no more; idempotent. REQUIRES: the lock."""
        pidfd, session.pidfd = session.pidfd, -1
        if pidfd >= 0:
            del self._processes[pidfd]
            os.close(pidfd)  # which takes it out of what is watched, too

    def _shut(self, session: Session) -> None:
        """Shut down a session's connections, whose threads do the rest. REQUIRES: the lock."""
        for connection, owner in self._connections.items():
            if owner is session:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def _refusal(self, uid: int) -> BusyError | None:
        """Return why a user gets no connection more, if so. REQUIRES: the lock."""
        if self._is_stopping.is_set() or len(self._connections) >= CONNECTIONS_MAX:
            return BusyError("too many connections; try again")
        mine = sum(other == uid for other in self._uids.values())
        if _is_bounded(uid) and mine >= USER_CONNECTIONS_MAX:
            return BusyError(
                f"user {uid} has {mine} connections to this pool, the most that one may have; "
                "close pools that are not used, or end idle clients"
            )
        return None

    def _serve(self, connection: socket.socket) -> None:
        with self._lock:  # it has the connection by then
            regions = Regions(self._files, self._uids[connection])
        state, session, is_first = Connection(regions), None, False
        try:
            session, is_first = self._begin(connection, state)
            while session is not None and self._exchange(connection, state, session):
                pass
        except OSError as error:
            _log.debug("client's connection ended: %s", error)
        except KvfsError as error:
            self._tell(connection, error)
        except Exception as error:  # noqa: BLE001 - an edge: logged, and answered
            _log.exception("client could not be served")
            self._tell(connection, error)
        finally:
            state.close()
            with self._lock:
                del self._connections[connection], self._uids[connection]
            if is_first and session is not None and not self._is_stopping.is_set():
                self._end(session)
            connection.close()

    def _begin(self, connection: socket.socket, state: Connection) -> tuple[Session | None, bool]:
        """Take the first message; return the session, and whether this connection carries it."""
        request = self._receive(connection, state, self._timeout_s)
        if request is None:
            return None, False
        peer = peer_of(connection)
        if isinstance(request, msg.Join):
            with self._lock:
                session = self._sessions.get(request.token)
                if session is None or session.peer.uid != peer.uid or session.peer.pid != peer.pid:
                    raise RefusedError("no such session; say Hello first")
                self._connections[connection] = session
            self._send(connection, msgspec.Raw(msgspec.msgpack.encode(msg.Done())), state)
            return session, False
        if not isinstance(request, msg.Hello):
            raise UsageError("say Hello or Join first")
        if request.version < msg.VERSION_MIN or request.version_min > msg.VERSION:
            raise FormatVersionError(
                f"this client speaks versions {request.version_min} to {request.version} of the "
                f"protocol, the pool's owner {msg.VERSION_MIN} to {msg.VERSION}; update the "
                + ("client" if request.version < msg.VERSION_MIN else "owner")
            )
        session = Session(self._pool, peer, request.command)
        try:
            with self._lock:
                if len(self._sessions) >= SESSIONS_MAX:
                    raise BusyError(f"more than {SESSIONS_MAX} clients; try again")
                mine = sum(other.peer.uid == peer.uid for other in self._sessions.values())
                if _is_bounded(peer.uid) and mine >= USER_SESSIONS_MAX:
                    raise BusyError(
                        f"user {peer.uid} has {mine} clients of this pool, the most that one may "
                        "have; close pools that are not used, or end idle clients"
                    )
                self._sessions[session.token] = session
                self._connections[connection] = session
                self._watch_process(connection, session)
            welcome = msgspec.msgpack.encode(session.welcome(state))
            self._send(connection, msgspec.Raw(welcome), state)
        except BaseException:
            self._end(session)
            raise
        return session, True

    def _watch_process(self, connection: socket.socket, session: Session) -> None:
        """End a session with its process. REQUIRES: the lock."""
        pidfd = pidfd_of(connection)
        if pidfd is not None and self._watched is not None:
            session.pidfd = pidfd
            self._processes[pidfd] = session
            self._watched.register(pidfd, select.EPOLLIN)

    def _exchange(self, connection: socket.socket, state: Connection, session: Session) -> bool:
        """Answer one request; False at the end of the connection."""
        try:
            try:
                request = self._receive(connection, state, None)
                if request is None:
                    return False
                raw = self._answer(request, state, session)
            except KvfsError as error:
                channel.close_all(state.outgoing)
                self._reply(connection, msg.Reply(failure=msg.failure_of(error)), ())
            else:
                self._send(connection, raw, state)
        finally:
            channel.close_all(state.received)
        return True

    def _answer(self, request: msg.Request, state: Connection, session: Session) -> msgspec.Raw:
        """Return an answer, encoded.

        Raises:
            KvfsError: It cannot be answered. Whatever else happens, be it of the kind that
                connections raise, is logged, counted, and becomes one.
        """
        try:
            raw = msgspec.msgpack.encode(session.answer(request, state))
        except KvfsError:
            raise
        except Exception as error:
            engine = self._pool.store.state
            with engine.lock:
                engine.holds.failures += 1
            _log.exception(
                "request of a client failed: %s: %s", session.name, type(request).__name__
            )
            raise msg.error_of(msg.failure_of(error)) from error
        if len(raw) > msg.REPLY_BYTES_MAX - _ENVELOPE_BYTES:
            raise UsageError(f"answer of {len(raw)} bytes; ask for less at once")
        return msgspec.Raw(raw)

    def _receive(
        self, connection: socket.socket, state: Connection, idle_s: float | None
    ) -> msg.Request | None:
        received = channel.receive(
            connection, msg.REQUEST_BYTES_MAX, idle_s=idle_s, timeout_s=self._timeout_s
        )
        if received is None:
            return None
        raw, state.received = received
        try:
            request: msg.Request = self._decoder.decode(raw)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise UsageError(f"message not understood: {error}") from error
        if state.received and not isinstance(request, msg.Share):
            raise UsageError("a descriptor came with a message that takes none")
        return request

    def _send(self, connection: socket.socket, raw: msgspec.Raw, state: Connection) -> None:
        try:
            reply = msg.Reply(answer=raw, fd_count=len(state.outgoing))
            self._reply(connection, reply, tuple(state.outgoing))
        finally:
            channel.close_all(state.outgoing)

    def _reply(self, connection: socket.socket, reply: msg.Reply, fds: tuple[int, ...]) -> None:
        connection.settimeout(self._timeout_s)
        channel.send(connection, msgspec.msgpack.encode(reply), msg.REPLY_BYTES_MAX, fds)

    def _tell(self, connection: socket.socket, error: Exception) -> None:
        if self._is_stopping.is_set():
            error = UnavailableError("the pool is being closed")
        with contextlib.suppress(OSError, KvfsError):
            self._reply(connection, msg.Reply(failure=msg.failure_of(error)), ())

    def _end(self, session: Session, *, is_told: bool = True) -> None:
        """End a session and its other connections."""
        with self._lock:
            self._sessions.pop(session.token, None)
            self._forget_process(session)
            self._shut(session)
        with contextlib.suppress(ClosedError):
            session.end(is_told=is_told)


def _has_ended(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def _is_bounded(uid: int) -> bool:
    return uid not in (0, os.geteuid())
