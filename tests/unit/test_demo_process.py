"""kvfs.demo.process: children end, places go, signals become interrupts."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

import pytest

from kvfs.demo.process import (
    Child,
    held_interrupts,
    signals_as_interrupts,
    unmount,
    workplace,
)
from kvfs.errors import UnavailableError

ECHO = """
import json, sys
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    print(json.dumps({"got": line.strip()}), flush=True)
"""


def test_child_answers_and_ends_with_the_block() -> None:
    with Child(["-c", ECHO]) as child:
        assert child.answer() == {"ready": True}
        assert child.ask("hello") == {"got": "hello"}
        pid = child.pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_child_that_ends_without_an_answer() -> None:
    with (
        Child(["-c", "raise SystemExit(3)"]) as child,
        pytest.raises(UnavailableError, match="ended with status 3"),
    ):
        child.answer()


def test_killed_child() -> None:
    with Child(["-c", ECHO]) as child:
        child.answer()
        child.kill()
        with pytest.raises(UnavailableError, match="ended with status -9"):
            child.answer()


def test_workplace_goes_even_after_an_interrupt(tmp_path: Path) -> None:
    def work() -> None:
        with workplace(str(tmp_path)) as root:
            assert (root / "mount").is_dir()
            (root / "blocks" / "file").write_bytes(b"x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert list(tmp_path.iterdir()) == []


def test_unmount_of_what_is_not_mounted(tmp_path: Path) -> None:
    unmount(tmp_path)
    assert tmp_path.is_dir()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signals_clean_up_like_ctrl_c(number: signal.Signals) -> None:
    found = signal.signal(number, _unexpected)  # a job in the background is started without SIGINT
    try:
        with pytest.raises(KeyboardInterrupt), signals_as_interrupts():
            os.kill(os.getpid(), number)
        assert signal.getsignal(number) is _unexpected
    finally:
        signal.signal(number, found)


def test_an_ignored_interrupt_stays_ignored() -> None:
    found = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with signals_as_interrupts():
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, found)


def _unexpected(number: int, frame: FrameType | None) -> None:
    raise AssertionError(f"signal {number} came to who was there before")


def test_children_run_the_same_python() -> None:
    with Child(["-c", "import json, sys; print(json.dumps({'at': sys.executable}))"]) as child:
        assert child.answer()["at"] == sys.executable


def test_an_interrupt_waits_for_the_end_of_the_block() -> None:
    reached = []

    def work() -> None:
        with held_interrupts():
            with held_interrupts():
                os.kill(os.getpid(), signal.SIGTERM)
                reached.append("inner")
            reached.append("outer")
        reached.append("after")

    with signals_as_interrupts(), pytest.raises(KeyboardInterrupt):
        work()
    assert reached == ["inner", "outer"]
    with signals_as_interrupts(), held_interrupts():
        reached.clear()  # the pending one was used up


def test_a_child_interrupted_while_it_starts_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    popen = subprocess.Popen

    def start(*arguments: object, **options: object) -> object:
        started.append(popen(*arguments, **options))  # type: ignore[call-overload]
        os.kill(os.getpid(), signal.SIGTERM)
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", start)

    def work() -> None:
        with Child(["-c", ECHO]):
            pytest.fail("not reached")

    with signals_as_interrupts(), pytest.raises(KeyboardInterrupt):
        work()
    assert started[0].returncode == -signal.SIGTERM
