"""Going into the background, with the outcome told to whoever waits in the foreground.

Layer: L5.

- Forks before anything is opened and before any thread exists; pool, sockets and threads are made
  in the child.
- The parent waits on a pipe: for READY, for the child's error, or for its end without a word. It
  exits with the child's code, so that `kvfs mount ... && cp ...` does what it says.
- The child closes what its caller had open beyond stdio: a pipe whose reader waits for its end, a
  file of the mount itself, which could not be unmounted.
"""

import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from types import FrameType
from typing import Final

import msgspec

import kvfs.errors
from kvfs.errors import KvfsError

Ready = Callable[[], None]
_READY: Final = b"READY\n"
_STDIO: Final = (0, 1, 2)


class Outcome(msgspec.Struct, frozen=True):
    """Why the child did not become ready. `error`: name of a class of kvfs.errors."""

    error: str
    code: int
    message: str


def run_in_background(work: Callable[[Ready], int]) -> int:
    """Fork; run `work(ready)` in a child without a terminal; return when it is ready, or fails.

    Returns:
        0 in the parent once the child is ready. The child never returns.

    Raises:
        KvfsError: What the child raised before it was ready.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    middle = os.fork()
    if middle == 0:
        os.close(read_end)
        os.setsid()
        if os.fork():
            os._exit(0)  # the grandchild is no session leader and can never get a terminal
        _child(work, write_end)
    os.close(write_end)
    os.waitpid(middle, 0)
    said = b""
    with os.fdopen(read_end, "rb") as pipe:
        said = pipe.read()
    if said == _READY:
        return 0
    try:
        outcome = msgspec.json.decode(said, type=Outcome)
    except msgspec.MsgspecError:
        raise KvfsError("the daemon ended before it was ready; run with --foreground") from None
    kind = getattr(kvfs.errors, outcome.error, KvfsError)
    raise kind(outcome.message)


def _child(work: Callable[[Ready], int], write_end: int) -> None:
    """Run `work` and end the process."""
    os.chdir("/")
    os.closerange(_STDIO[-1] + 1, write_end)
    os.closerange(write_end + 1, os.sysconf("SC_OPEN_MAX"))
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    is_ready = False

    def ready() -> None:
        nonlocal is_ready
        is_ready = True
        for fd in _STDIO:
            os.dup2(null, fd)
        os.write(write_end, _READY)
        os.close(write_end)

    code = 1
    try:
        code = work(ready)
    except KvfsError as error:
        code = error.exit_code
        _tell(write_end, error, str(error), is_ready=is_ready)
    except KeyboardInterrupt:
        code = 0 if is_ready else 130
    except BaseException as error:
        if is_ready:
            logging.getLogger("kvfs").critical("daemon failed", exc_info=error)
        else:
            traceback.print_exc()
        _tell(write_end, error, f"{type(error).__name__}: {error}", is_ready=is_ready)
    finally:
        logging.shutdown()
        os._exit(code)


def _tell(write_end: int, error: BaseException, message: str, *, is_ready: bool) -> None:
    if is_ready:
        logging.getLogger("kvfs").error("%s", message)
        return
    kinds = (kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "kvfs.errors")
    text = message.encode("utf-8", "backslashreplace").decode()
    outcome = Outcome(next(kinds, "KvfsError"), getattr(error, "exit_code", 1), text)
    os.write(write_end, msgspec.json.encode(outcome))
    os.close(write_end)


def end_on_sigterm(*, is_daemon: bool) -> None:
    """Let SIGTERM, and SIGHUP of a terminal, end the process as Ctrl-C does: cleanly.

    They are turned into SIGINT, because trio delivers only that one where it is safe.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        del number, frame
        os.kill(os.getpid(), signal.SIGINT)

    signal.signal(signal.SIGTERM, interrupt)
    signal.signal(signal.SIGHUP, signal.SIG_IGN if is_daemon else interrupt)


class EndSignal:
    """Waits for a signal that ends a service: SIGTERM or SIGINT. Main thread; one per process.

    From its making on they interrupt nothing: what is being written when one comes is written to
    its end, and a second one changes nothing. SIGHUP, which a terminal sends when it goes away,
    ends what runs in one, and is ignored otherwise.
    """

    def __init__(self, *, has_terminal: bool) -> None:
        """Install it, in place of `end_on_sigterm`."""
        self._numbers = {signal.SIGTERM, signal.SIGINT}
        if has_terminal:
            self._numbers.add(signal.SIGHUP)
        else:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        read_fd, write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        os.set_blocking(read_fd, True)
        self._pipe = read_fd
        self._write_fd = write_fd
        signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
        for number in self._numbers:
            signal.signal(number, _note)

    def fileno(self) -> int:
        """Return what is readable when there is something to wait for."""
        return self._pipe

    def wake(self) -> None:
        """Let `wait` return None. Any thread."""
        os.write(self._write_fd, b"\0")

    def wait(self) -> signal.Signals | None:
        """Return the signal when it has come; None for `wake`."""
        while True:
            number = os.read(self._pipe, 1)[0]
            if number in self._numbers:
                return signal.Signals(number)
            if not number:
                return None


def _note(number: int, frame: FrameType | None) -> None:
    """Do nothing: that there was a signal lies in the wake-up pipe."""
    del number, frame
