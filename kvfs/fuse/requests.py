"""What every request has in common: a deadline, one translation of errors, counts.

Layer: L5.

- Blocking work runs in a worker thread and is waited for until the deadline; then the request fails
  with EIO and the worker finishes on its own. What it made by then is undone by it.
- The deadline grows with the bytes a request must move, so that closing a large file is not failed
  for being large.
- A KvfsError becomes its errno. Anything else is a bug: logged with traceback, EIO to the caller.
"""

import contextlib
import errno
import functools
import logging
import threading
from collections.abc import Awaitable, Callable, Coroutine
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
        self.timeouts = 0
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
            "timeouts": self.timeouts,
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
        }


class HasCounters(Protocol):
    """What `handler` needs of the class whose methods it wraps."""

    counters: RequestCounters
    clock: Clock


_S = TypeVar("_S", bound=HasCounters)


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

    def __init__(self, deadline_s: float, threads: int, counters: RequestCounters) -> None:
        self._deadline_s = deadline_s
        self._limiter = trio.CapacityLimiter(threads)
        self._counters = counters
        self._long: list[float] = []
        self.on_patience: Callable[[int], None] | None = None
        """Told how many milliseconds more than usual requests may take now."""

    async def run(
        self, function: Callable[..., _T], *args: object, nbytes: int = 0,
        undo: Callable[[_T], None] | None = None,
    ) -> _T:  # fmt: skip
        """Call a function in a worker thread and return what it returns.

        Args:
            function: Synchronous work.
            args: Its arguments.
            nbytes: Bytes it moves; the deadline grows with them.
            undo: What to do, in the worker, with a result that came too late.

        Raises:
            FUSEError: EIO: the deadline passed.
        """
        call = _Call(function, args, undo)
        limit_s = self._deadline_s + nbytes / BYTES_PER_S_MIN
        extra_s = limit_s - self._deadline_s
        try:
            self._begin_long(extra_s)
            with trio.move_on_after(limit_s):
                result: _T = await trio.to_thread.run_sync(
                    call.run, abandon_on_cancel=True, limiter=self._limiter
                )
                call.is_taken = True
                return result
        finally:
            self._end_long(extra_s)
            if not call.is_taken:
                call.abandon()
        self._counters.timeouts += 1
        name = getattr(function, "__qualname__", repr(function))
        _log.error("request timed out: %s: no answer within %.1f s", name, limit_s)
        raise pyfuse3.FUSEError(errno.EIO)

    def _begin_long(self, extra_s: float) -> None:
        if extra_s >= _LONG_S and self.on_patience is not None:
            self._long.append(extra_s)
            self._tell()

    def _end_long(self, extra_s: float) -> None:
        if extra_s in self._long:
            self._long.remove(extra_s)
            self._tell()

    def _tell(self) -> None:
        assert self.on_patience is not None
        with contextlib.suppress(OSError, KvfsError):  # it is watched by others
            self.on_patience(int(1000 * max(self._long, default=0)))


class _Call:
    """A call whose result may come when nobody waits for it any more."""

    def __init__(
        self, function: Callable[..., Any], args: tuple[object, ...],
        undo: Callable[[Any], None] | None,
    ) -> None:  # fmt: skip
        self.is_taken = False
        self._function = function
        self._args = args
        self._undo = undo
        self._lock = threading.Lock()
        self._is_abandoned = False
        self._results: list[Any] = []

    def run(self) -> Any:
        """Do the work."""
        result = self._function(*self._args)
        with self._lock:
            if not self._is_abandoned:
                self._results.append(result)
                return result
        self._take_back(result)
        return result

    def abandon(self) -> None:
        """Say that nobody will take the result."""
        with self._lock:
            self._is_abandoned = True
            results = list(self._results)
        for result in results:
            self._take_back(result)

    def _take_back(self, result: Any) -> None:
        if self._undo is None:
            return
        try:
            self._undo(result)
        except KvfsError as error:
            _log.warning("late result could not be undone: %s", error)
