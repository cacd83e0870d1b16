"""The background thread: a step after each wake, never after stop, and on after failures."""

import threading
from collections.abc import Callable, Iterator

import pytest

from kvfs.background import Background
from kvfs.errors import DeviceError

DEADLINE_S = 30.0
Start = Callable[[Callable[[], None]], Background]


@pytest.fixture
def start() -> Iterator[Start]:
    made: list[Background] = []

    def build(step: Callable[[], None], delay_ms: int = 2) -> Background:
        background = Background(step, delay_ms)
        background.start()
        made.append(background)
        return background

    yield build
    for background in made:
        background.stop()


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "kvfs-background"]


def test_step_follows_each_wake(start: Start) -> None:
    done = threading.Semaphore(0)
    background = start(done.release)
    for _ in range(5):
        background.wake()
        assert done.acquire(timeout=DEADLINE_S)


def test_no_step_without_a_wake(start: Start) -> None:
    steps: list[int] = []
    background = start(lambda: steps.append(1))
    background.stop()
    assert steps == []
    assert threads() == []


def test_wakes_are_gathered(start: Start) -> None:
    running, go_on, done = threading.Event(), threading.Event(), threading.Semaphore(0)
    count = 0

    def step() -> None:
        nonlocal count
        count += 1
        running.set()
        assert go_on.wait(DEADLINE_S)
        done.release()

    background = start(step)
    background.wake()
    assert running.wait(DEADLINE_S)
    for _ in range(100):
        background.wake()  # while a step runs: one more step for all of them
    go_on.set()
    for _ in range(2):
        assert done.acquire(timeout=DEADLINE_S)
    background.stop()
    assert count == 2


def test_steps_run_off_the_callers_thread(start: Start) -> None:
    seen: list[int] = []
    done = threading.Event()
    background = start(lambda: (seen.append(threading.get_ident()), done.set()))
    background.wake()
    assert done.wait(DEADLINE_S)
    assert seen != [threading.get_ident()]


def test_stop_waits_for_the_step_under_way(start: Start) -> None:
    running, go_on = threading.Event(), threading.Event()
    finished: list[int] = []

    def step() -> None:
        running.set()
        assert go_on.wait(DEADLINE_S)
        finished.append(1)

    background = start(step)
    background.wake()
    assert running.wait(DEADLINE_S)
    stopper = threading.Thread(target=background.stop)
    stopper.start()
    assert finished == []
    go_on.set()
    stopper.join(DEADLINE_S)
    assert not stopper.is_alive()
    assert finished == [1]


def test_stop_does_not_wait_for_the_delay(start: Start) -> None:
    steps: list[int] = []
    background = start(lambda: steps.append(1), 60_000)  # type: ignore[call-arg]
    background.wake()
    stopper = threading.Thread(target=background.stop)
    stopper.start()
    stopper.join(DEADLINE_S / 2)
    assert not stopper.is_alive()
    assert steps == []


def test_after_stop_nothing_happens(start: Start) -> None:
    steps: list[int] = []
    background = start(lambda: steps.append(1))
    background.stop()
    background.wake()
    background.stop()
    assert steps == []


def test_failing_step_is_logged_and_tried_again(start: Start, expected_warnings: list[str]) -> None:
    expected_warnings.append("kvfs.background: background persist failed: no luck")
    done = threading.Semaphore(0)
    fails = [True, False]

    def step() -> None:
        done.release()
        if fails.pop(0):
            raise DeviceError("no luck")

    background = start(step)
    for _ in range(2):
        background.wake()
        assert done.acquire(timeout=DEADLINE_S)
    background.stop()
    assert fails == []
