"""The SIGBUS handler and its neighbours. Each program runs in a process of its own."""

import signal

import pytest

from tests.native.support import run_python

PRELUDE = """
import ctypes, faulthandler, mmap, os, signal, sys, tempfile, threading
import numpy as np
from kvfs import _native
from tests.native.support import i32, random_bytes, statuses, u64, address
PAGE = 4096

def truncated():
    file = tempfile.TemporaryFile()
    file.truncate(2 * PAGE)
    arena = _native.Arena(file.fileno(), 2 * PAGE)
    file.truncate(PAGE)
    return arena

def copy_bad():
    target, status = np.zeros(PAGE, np.uint8), statuses(1)
    bad = truncated()
    _native.copy_verify(u64(address(target)), u64(bad.address + PAGE), u64(PAGE), None, status)
    return int(status[0])

def bad_view():
    file = tempfile.TemporaryFile()
    mapping = _native.Mapping(PAGE)
    mapping.map(u64(0), i32(file.fileno()), u64(0), u64(PAGE))
    return mapping
"""


def run(program: str) -> tuple[int, str, str]:
    done = run_python(PRELUDE + program)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("setup", ["", "faulthandler.enable()"])
def test_foreign_faults_still_kill(setup: str) -> None:
    status, out, err = run(f"""
{setup}
assert copy_bad() == 3
print("before", flush=True)
bad = truncated()
ctypes.string_at(bad.address + PAGE, 1)
print("after", flush=True)
""")
    assert status == -signal.SIGBUS
    assert out == "before\n"
    assert ("Fatal Python error: Bus error" in err) == bool(setup)


def test_handler_enabled_later_is_replaced_and_handed_to() -> None:
    """faulthandler.enable() after our installation must not break the guard, nor loop."""
    status, out, err = run("""
assert copy_bad() == 3
faulthandler.enable()
assert copy_bad() == 3
assert bad_view().has_failed is False
view = bad_view()
assert bytes(memoryview(view)) == bytes(PAGE)
assert view.has_failed
print("good", flush=True)
bad = truncated()
ctypes.string_at(bad.address + PAGE, 1)
""")
    assert status == -signal.SIGBUS
    assert out == "good\n"
    assert "Fatal Python error: Bus error" in err


def test_python_handler_gets_signals_that_were_sent() -> None:
    status, _out, err = run("""
seen = []
signal.signal(signal.SIGBUS, lambda number, frame: seen.append(number))
assert copy_bad() == 3
os.kill(os.getpid(), signal.SIGBUS)
assert seen == [signal.SIGBUS], seen
assert copy_bad() == 3
assert seen == [signal.SIGBUS], seen
""")
    assert status == 0, err


def test_sent_signal_without_a_handler_kills() -> None:
    status, _, _ = run("assert copy_bad() == 3\nos.kill(os.getpid(), signal.SIGBUS)")
    assert status == -signal.SIGBUS


def test_ignored_signal_stays_ignored() -> None:
    status, out, err = run("""
signal.signal(signal.SIGBUS, signal.SIG_IGN)
assert copy_bad() == 3
os.kill(os.getpid(), signal.SIGBUS)
print("alive")
""")
    assert (status, out) == (0, "alive\n"), err


def test_threads_fault_independently() -> None:
    status, out, err = run("""
wrong = []
def work():
    for _ in range(200):
        if copy_bad() != 3:
            wrong.append("copy")
        view = bad_view()
        if bytes(memoryview(view)) != bytes(PAGE) or view.faults != [0]:
            wrong.append("view")
        view.close()
threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(wrong)
""")
    assert (status, out) == (0, "[]\n"), err


def test_one_view_faults_on_many_threads() -> None:
    status, out, err = run("""
file = tempfile.TemporaryFile()
mapping = _native.Mapping(64 * PAGE)
mapping.map(u64(0), i32(file.fileno()), u64(0), u64(64 * PAGE))
wrong = []
def work():
    if bytes(memoryview(mapping)) != bytes(64 * PAGE):
        wrong.append(1)
threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert set(mapping.faults) <= set(range(0, 64 * PAGE, PAGE)), mapping.faults
assert mapping.has_failed
print(wrong)
""")
    assert (status, out) == (0, "[]\n"), err


def test_many_views_and_their_reuse() -> None:
    status, out, err = run("""
views = [bad_view() for _ in range(200)]
for view in views[::2]:
    view.close()
views = views[1::2] + [bad_view() for _ in range(200)]
assert not any(view.has_failed or view.faults for view in views)
for view in views:
    assert bytes(memoryview(view)) == bytes(PAGE)
    assert view.faults == [0]
assert all(view.has_failed for view in views)
print("good")
""")
    assert (status, out) == (0, "good\n"), err


def test_fault_in_a_forked_child() -> None:
    status, out, err = run("""
assert copy_bad() == 3
view = bad_view()
pid = os.fork()
if pid == 0:
    ok = copy_bad() == 3 and bytes(memoryview(view)) == bytes(PAGE) and view.has_failed
    os._exit(0 if ok else 1)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), view.has_failed)
""")
    assert (status, out) == (0, "0 False\n"), err
