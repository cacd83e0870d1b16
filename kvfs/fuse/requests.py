"""What every request has in common: a deadline, one translation of errors, counts.

Layer: L5.

- Blocking work runs in a worker thread and is waited for until the deadline; then the request fails
  with EIO and the worker finishes on its own. What it made by then is undone by it. A request of
  several steps has one deadline for all.
- A namespace may have a deadline of its own. Whose it is that a request is about is told by the
  inode or handle that it names; what the kernel has not looked up since the owner came has the
  mount's.
- The deadline grows with the bytes a request must move, so that closing a large file is not failed
  for being large.
- A KvfsError becomes its errno. Anything else is a bug: logged with traceback, EIO to the caller.
"""

import contextlib
import errno
import functools
import logging
import threading
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Concatenate, Final, ParamSpec, Protocol, TypeVar, cast

import pyfuse3
import trio

from kvfs.clock import Clock
from kvfs.errors import KvfsError
from kvfs.metrics import Histogram

BYTES_PER_S_MIN: Final = 50_000_000  # the slowest medium that is not taken for a hung one
_LONG_S: Final = 1.0
_log = logging.getLogger("kvfs.fuse")
_T = TypeVar("_T")
_P = ParamSpec("_P")


class RequestCounters:
    """Counts of a mount since it began. Counted by its loop alone."""

    def __init__(self) -> None:
        self.times: dict[str, Histogram] = {}
        self.errors: dict[int, int] = {}
        self.timeouts: dict[int, int] = {}  # by namespace; 0: of none, or not known
        self.bytes_read = 0
        self.bytes_written = 0

    def note(self, name: str, nanoseconds: int) -> None:
        """Count one request that was answered."""
        histogram = self.times.get(name)
        if histogram is None:
            histogram = self.times[name] = Histogram()
        histogram.note(nanoseconds)

    def note_error(self, number: int) -> None:
        """Count one request that failed."""
        self.errors[number] = self.errors.get(number, 0) + 1

    def note_timeout(self, namespace_id: int) -> None:
        """Count one request that missed its deadline."""
        self.timeouts[namespace_id] = self.timeouts.get(namespace_id, 0) + 1

    def snapshot(self) -> dict[str, Any]:
        """Return what was counted, with names for people and machines. Any thread."""
        times = dict(sorted(self.times.copy().items()))
        return {
            "requests": {name: histogram.count for name, histogram in times.items()},
            "busy_ns": {name: histogram.sum_ns for name, histogram in times.items()},
            "times": times,
            "errors": {
                errno.errorcode.get(number, str(number)): count
                for number, count in sorted(self.errors.copy().items())
            },
            "timeouts": sum(self.timeouts.copy().values()),
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
        }


class HasCounters(Protocol):
    """What `handler` needs of the class whose methods it wraps."""

    counters: RequestCounters
    clock: Clock

    def namespace_of(self, name: str, number: int) -> int:
        """Return the namespace that a request is about by its first argument; 0 if not known."""


_S = TypeVar("_S", bound=HasCounters)


@dataclass(slots=True, eq=False)
class _Request:
    """A request at work.

    Attributes:
        namespace_id: The namespace that it is about; 0: none, or not known.
        begin_s: When it came, by trio's clock.
        nbytes: What all its steps so far were to move.
    """

    namespace_id: int
    begin_s: float
    nbytes: int = 0


_at_work: ContextVar[_Request | None] = ContextVar("at_work", default=None)


def translate(name: str, error: Exception) -> pyfuse3.FUSEError:
    """Return what a request fails with; the only such table is `KvfsError.errno`."""
    if isinstance(error, pyfuse3.FUSEError):
        return error
    if isinstance(error, KvfsError):
        _log.debug("%s: %s", name, error)
        return pyfuse3.FUSEError(error.errno)
    _log.error("%s failed unexpectedly", name, exc_info=error)
    return pyfuse3.FUSEError(errno.EIO)


def handler(
    function: Callable[Concatenate[_S, _P], Awaitable[_T]],
) -> Callable[Concatenate[_S, _P], Coroutine[Any, Any, _T]]:
    """Make a coroutine a request handler: it raises FUSEError only, and is counted."""
    name = function.__name__

    @functools.wraps(function)
    async def guarded(self: _S, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        begin = self.clock.monotonic_ns()
        number = args[0] if args else 0
        namespace_id = self.namespace_of(name, number) if isinstance(number, int) else 0
        _at_work.set(_Request(namespace_id, trio.current_time()))
        try:
            return await function(self, *args, **kwargs)
        except Exception as error:
            failure = translate(name, error)
            self.counters.note_error(failure.errno)
            raise failure from error
        finally:
            self.counters.note(name, self.clock.monotonic_ns() - begin)

    return cast(Callable[Concatenate[_S, _P], Coroutine[Any, Any, _T]], guarded)


class Runner:
    """Runs blocking work in worker threads, within a deadline."""

    def __init__(
        self, deadline_s: float, threads: int, counters: RequestCounters,
        deadlines_ms: Callable[[], Mapping[int, int]] = dict,
    ) -> None:  # fmt: skip
        """Run work of a mount. `deadlines_ms`: of namespaces that have one of their own."""
        self._deadline_s = deadline_s
        self._deadlines_ms = deadlines_ms
        self._limiter = trio.CapacityLimiter(threads)
        self._counters = counters
        self._long: list[float] = []
        self._patience_lock = threading.Lock()
        self.on_patience: Callable[[int], None] | None = None
        """Told, in a worker, how many milliseconds more than usual requests may take now."""

    async def run(
        self, function: Callable[..., _T], *args: object, nbytes: int = 0,
        undo: Callable[[_T], None] | None = None, unused: Callable[[], None] | None = None,
        on_timeout: Callable[[], None] | None = None,
    ) -> _T:  # fmt: skip
        """Call a function in a worker thread and return what it returns.

        The deadline is the request's: a second step has what the first has left, and the time for
        its own bytes. What is not part of a request has it for itself.

        Args:
            function: Synchronous work.
            args: Its arguments.
            nbytes: Bytes it moves; the deadline grows with them.
            undo: What to do, in the worker, with a result that came too late.
            unused: What to do, in a worker, if no thread was free in time: it is never called then.
            on_timeout: Called when the deadline passes.

        Raises:
            FUSEError: EIO: the deadline passed.
        """
        request = _at_work.get() or _Request(0, trio.current_time())
        request.nbytes += nbytes
        own_ms = self._deadlines_ms().get(request.namespace_id, 0)
        limit_s = own_ms / 1000 if own_ms else self._deadline_s
        limit_s += request.nbytes / BYTES_PER_S_MIN
        extra_s = limit_s - self._deadline_s
        work = functools.partial(function, *args)
        if extra_s >= _LONG_S and self.on_patience is not None:
            work = functools.partial(self._patiently, extra_s, work)
        call = _Call(work, undo)
        try:
            with trio.move_on_at(request.begin_s + limit_s):
                result: _T = await trio.to_thread.run_sync(
                    call.run, abandon_on_cancel=True, limiter=self._limiter
                )
                call.is_taken = True
                return result
        finally:
            if not call.is_taken and not call.abandon() and unused is not None:
                with trio.CancelScope(shield=True):
                    await trio.to_thread.run_sync(unused)
        self._counters.note_timeout(request.namespace_id)
        if on_timeout is not None:
            on_timeout()
        name = getattr(function, "__qualname__", repr(function))
        _log.error("request timed out: %s: no answer within %.1f s", name, limit_s)
        raise pyfuse3.FUSEError(errno.EIO)

    def _patiently(self, extra_s: float, work: Callable[[], _T]) -> _T:
        """Do what may take long, and say so while it does. Any thread."""
        self._note_long(self._long.append, extra_s)
        try:
            return work()
        finally:
            self._note_long(self._long.remove, extra_s)

    def _note_long(self, change: Callable[[float], None], extra_s: float) -> None:
        assert self.on_patience is not None
        with self._patience_lock, contextlib.suppress(OSError, KvfsError):  # watched by others
            change(extra_s)
            self.on_patience(int(1000 * max(self._long, default=0)))


class _Call:
    """A call whose result may come when nobody waits for it any more."""

    def __init__(self, work: Callable[[], Any], undo: Callable[[Any], None] | None) -> None:
        self.is_taken = False
        self._work = work
        self._undo = undo
        self._lock = threading.Lock()
        self._has_begun = False
        self._is_abandoned = False
        self._results: list[Any] = []

    def run(self) -> Any:
        """Do the work, unless nobody waits for it any more."""
        with self._lock:
            if self._is_abandoned:
                return None
            self._has_begun = True
        result = self._work()
        with self._lock:
            if not self._is_abandoned:
                self._results.append(result)
                return result
        self._take_back(result)
        return result

    def abandon(self) -> bool:
        """Say that nobody will take the result; return whether there is or will be one."""
        with self._lock:
            self._is_abandoned = True
            results = list(self._results)
        for result in results:
            self._take_back(result)
        return self._has_begun

    def _take_back(self, result: Any) -> None:
        if self._undo is None:
            return
        try:
            self._undo(result)
        except KvfsError as error:
            _log.warning("late result could not be undone: %s", error)
