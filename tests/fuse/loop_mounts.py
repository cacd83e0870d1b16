"""Filesystems of a test's own, in image files: what /tmp is made of should not matter."""

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
