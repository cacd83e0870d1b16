"""Filesystems of a test's own, in images and in memory: what /tmp is made of should not matter."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

MAKERS = {  # what makes an image, and how large it is at least, in MiB
    "xfs": (["mkfs.xfs", "-q", "-m", "reflink=1"], 320),
    "btrfs": (["mkfs.btrfs", "-q"], 256),
    "ext4": (["mkfs.ext4", "-q", "-F"], 64),
}


@contextmanager
def loop_mount(kind: str, base: Path, mib: int = 1024) -> Iterator[Path]:
    """Mount a fresh filesystem below `base`; skip where that cannot be done, saying why."""
    command, least_mib = MAKERS[kind]
    if os.geteuid() != 0:
        pytest.skip("mounting an image takes root")
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is missing; tools/setup.sh installs it")
    image, path = base / f"{kind}.img", base / kind
    path.mkdir()
    with image.open("wb") as file:
        file.truncate(max(mib, least_mib) << 20)
    _run([*command, str(image)], f"no {kind} image can be made")
    _run(["mount", "-o", "loop", str(image), str(path)], f"no {kind} image can be mounted")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)
        image.unlink()


def _run(command: list[str], what: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        pytest.skip(f"{what}: {result.stderr.strip()}")


@contextmanager
def zram_mount(base: Path, gib: int) -> Iterator[tuple[Path, Path]]:
    """Mount ext4 on compressed memory; give its path, and that of the disk's counters.

    Pages of one repeated word take no memory there: more can be written than the machine has. The
    counters are those of Documentation/block/stat.rst.
    """
    control, command = Path("/sys/class/zram-control"), MAKERS["ext4"][0]
    if os.geteuid() != 0 or not control.exists():
        pytest.skip("a disk of compressed memory takes root and a kernel with zram")
    try:
        number = int((control / "hot_add").read_text())
    except OSError as error:
        pytest.skip(f"no disk of compressed memory can be made: {error}")
    device, state = Path(f"/dev/zram{number}"), Path(f"/sys/block/zram{number}")
    path = base / "zram"
    path.mkdir()
    try:
        (state / "disksize").write_text(f"{gib << 30}")
        _run([*command, str(device)], "no filesystem can be made in compressed memory")
        _run(["mount", str(device), str(path)], "compressed memory cannot be mounted")
        try:
            yield path, state / "stat"
        finally:
            subprocess.run(["umount", str(path)], check=True)
    finally:
        (state / "reset").write_text("1")
        (control / "hot_remove").write_text(str(number))
