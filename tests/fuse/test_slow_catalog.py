"""A lock that is held for long delays who needs it, up to the deadline, and nobody else."""

import subprocess
import threading
from pathlib import Path

import pytest

from kvfs.fuse.attributes import Timeouts
from kvfs.fuse.mount import MountOptions, mount_in_background
from kvfs.layout import OPAQUE
from kvfs.pool import Pool
from tests.fuse.mounting import DEADLINE_S, python, sh

pytestmark = pytest.mark.fuse

READ_MEANWHILE = """
import errno, os, subprocess, sys
with open(sys.argv[1], "rb", buffering=0) as file:
    print("open", flush=True)
    sys.stdin.readline()
    try:
        os.stat(sys.argv[2])
    except OSError as error:
        assert error.errno == errno.EIO, error
    else:
        raise AssertionError("stat was answered")
    assert os.pread(file.fileno(), 100, 0) == b"content"
    print("read", flush=True)
"""


def test_a_busy_catalog_does_not_stop_the_mount(
    pool: Pool, tmp_path: Path, expected_warnings: list[str]
) -> None:
    expected_warnings.append("request timed out")
    path = tmp_path / "mnt"
    path.mkdir()
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with pool.catalog.transaction():
            held.set()
            assert done.wait(DEADLINE_S)

    with mount_in_background(
        pool, path, MountOptions(deadline_s=0.5, timeouts=Timeouts(file_s=60))
    ):
        for name in ("f", "other"):
            python("import sys; open(sys.argv[1], 'wb').write(b'content')", path / name)
        process = subprocess.Popen(
            ["python3", "-c", READ_MEANWHILE, str(path / "f"), str(path / "other")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        holder = threading.Thread(target=hold)
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "open\n"
            holder.start()
            assert held.wait(DEADLINE_S)
            out, _ = process.communicate("go\n", timeout=DEADLINE_S)
            assert out == "read\n"
            assert process.returncode == 0
        finally:
            done.set()
            holder.join()
            process.kill()
            process.wait()
        assert "f" in sh("ls", path)


WITHOUT_THE_ENGINE = """
import errno, mmap, os, sys
mount, has_core = sys.argv[1], sys.argv[2] == "core"

def fails(function, *args):
    try:
        function(*args)
    except OSError as error:
        assert error.errno == errno.EIO, error
    else:
        raise AssertionError("it was answered")

small, context = f"{mount}/small", f"{mount}/space/context"
with open(f"{mount}/large", "rb", buffering=0) as file:
    assert os.pread(file.fileno(), 10, 0) == b"l" * 10
    tiny = os.open(f"{mount}/tiny", os.O_RDONLY | os.O_DIRECT)
    page = memoryview(mmap.mmap(-1, 4096))
    for _ in range(3):  # with the next one, kvfs-core is to answer further ones
        assert os.preadv(tiny, [page], 0) == 4
    print("open", flush=True)
    sys.stdin.readline()
    assert os.preadv(tiny, [page], 0) == 4
    assert os.stat(context).st_size == 100
    fails(os.open, small, os.O_RDONLY)
    fails(os.open, f"{mount}/other_large", os.O_RDONLY)
    if has_core:
        assert os.pread(file.fileno(), 10, 1 << 20) == b"l" * 10
    else:
        fails(os.pread, file.fileno(), 10, 1 << 20)  # another window
    assert os.stat(small).st_size == 5
    assert os.listdir(f"{mount}/other") == ["name"]
    assert os.pread(file.fileno(), 10, 5) == b"l" * 10
print("done", flush=True)
"""


@pytest.mark.parametrize("core", [True, False], ids=["core", "no-core"])
def test_a_busy_engine_does_not_stop_the_mount(
    pool: Pool, tmp_path: Path, expected_warnings: list[str], monkeypatch: pytest.MonkeyPatch,
    core: bool,
) -> None:  # fmt: skip
    expected_warnings.append("request timed out")
    monkeypatch.setattr("kvfs.file_reading.WINDOW_BLOCKS", 1)
    monkeypatch.setattr("kvfs.file_window.WINDOW_BLOCKS", 1)
    monkeypatch.setattr("kvfs.fuse.file_operations.IDLE_LEASE_NS", 1 << 62)
    path = tmp_path / "mnt"
    path.mkdir()
    space = pool.namespace("space", OPAQUE)
    space.context("context").append(space.keys([1])[0], [b"x" * 100])
    with mount_in_background(pool, path, MountOptions(deadline_s=0.5, core=core)):
        make = "import os, sys; m = sys.argv[1]; os.mkdir(m + '/other')\n"
        for name, content in (("small", "b'small'"), ("large", "b'l' * (2 << 20)"),
                              ("other_large", "b'l' * (2 << 20)"), ("tiny", "b'tiny'"),
                              ("other/name", "b''")):  # fmt: skip
            make += f"open(m + '/{name}', 'wb').write({content})\n"
        python(make, path)
        process = subprocess.Popen(
            ["python3", "-c", WITHOUT_THE_ENGINE, str(path), "core" if core else ""],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "open\n"
            with pool.store.state.lock:
                out, _ = process.communicate("go\n", timeout=DEADLINE_S)
                assert pool.catalog.count_children(1) > 0, "nobody holds it and waits for us"
            assert out == "done\n"
            assert process.returncode == 0
        finally:
            process.kill()
            process.wait()
