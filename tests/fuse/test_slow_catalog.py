"""A catalog that waits for its medium delays who needs it, up to the deadline, and nobody else."""

import subprocess
import threading
from pathlib import Path

import pytest

from kvfs.fuse.attributes import Timeouts
from kvfs.fuse.mount import MountOptions, mount_in_background
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
