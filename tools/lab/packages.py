"""Debian's packages in a directory of their own: QEMU, kernels, and the tools of the guest.

Layer: tool.

- apt does it, with a state directory of its own: it resolves what belongs together, and checks
  signatures and checksums. Nothing is installed on the host, and root is not needed.
- The programs are newer than the host's libraries: each runs by its own loader, with the libraries
  that came with it, through a script in `bin`.
- A stamp names what was unpacked: a second run needs no network.
"""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lab.paths import CACHE, LabError

DEFAULT_MIRROR: Final = "http://deb.debian.org/debian"
_SOURCES: Final = (Path("/etc/apt/sources.list"), Path("/etc/apt/sources.list.d"))
_KEYRING: Final = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_LIBRARIES: Final = "usr/lib/x86_64-linux-gnu"
_LOADER: Final = "usr/lib64/ld-linux-x86-64.so.2"
# Under usr/; what the host runs, and what the guest does.
_PROGRAMS: Final = (
    "bin/qemu-system-x86_64", "bin/nbdkit", "bin/ndctl", "bin/daxctl", "bin/cxl", "bin/kmod",
    "sbin/mkfs.xfs",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Tree:
    """Packages of one Debian release, unpacked in a directory of their own."""

    suite: str
    packages: tuple[str, ...]

    @property
    def root(self) -> Path:
        """Where they are unpacked."""
        return CACHE / self.suite

    @property
    def modules(self) -> Path:
        """The directory of the kernel's modules, named by its release."""
        return next((self.root / "usr/lib/modules").iterdir())

    @property
    def kernel(self) -> Path:
        """What QEMU boots."""
        return self.root / "boot" / f"vmlinuz-{self.modules.name}"

    def program(self, name: str) -> str:
        """Return the path of a program, which may be started from anywhere."""
        return str(self.root / "bin" / name)


# The type-3 device has volatile memory since QEMU 8.1, and FUSE hands files through since 6.9: both
# are newer than Debian 12, so that all but the old kernel is of Debian 13.
MAIN: Final = Tree(
    "trixie",
    ("qemu-system-x86", "nbdkit", "ndctl", "daxctl", "cxl", "kmod", "xfsprogs", "busybox-static",
     "linux-image-amd64"),
)  # fmt: skip
OLD: Final = Tree("bookworm", ("linux-image-amd64",))


def prepare(tree: Tree) -> None:
    """Fetch and unpack a tree, unless it is there.

    Raises:
        LabError: apt could not; what was unpacked so far is removed.
    """
    stamp = tree.root / ".unpacked"
    wanted = " ".join(tree.packages)
    if stamp.exists() and stamp.read_text() == wanted:
        return
    for program in ("apt-get", "dpkg-deb"):
        if shutil.which(program) is None:
            raise LabError(f"{program} is missing: the lab needs a Debian or Ubuntu as its host")
    if not _KEYRING.exists():
        raise LabError(f"{_KEYRING} is missing: apt-get install debian-archive-keyring")
    if os.uname().machine != "x86_64":
        raise LabError(f"the lab emulates and runs on x86_64 only; this is {os.uname().machine}")
    shutil.rmtree(tree.root, ignore_errors=True)
    tree.root.mkdir(parents=True)
    try:
        _unpack(tree, _download(tree))
        if tree is MAIN:
            _wrap(tree)
        _index_modules(tree)
    except BaseException:
        shutil.rmtree(tree.root, ignore_errors=True)
        raise
    stamp.write_text(wanted)


def mirror_of(text: str) -> str | None:
    """Return the mirror of Debian that a list of apt's sources names; None if it names none."""
    uris = [uri for line in re.findall(r"(?m)^URIs:(.*)$", text) for uri in line.split()]
    uris += re.findall(r"(?m)^deb\s+(?:\[[^]]*\]\s+)?(\S+)", text)
    fitting = [uri for uri in uris if re.search(r"/debian/?$", uri)]
    return fitting[0].rstrip("/") if fitting else None


def _mirror() -> str:
    for path in _SOURCES:
        files = sorted(path.iterdir()) if path.is_dir() else [path] if path.exists() else []
        for file in files:
            if found := mirror_of(file.read_text(errors="replace")):
                return found
    return DEFAULT_MIRROR


def _download(tree: Tree) -> list[Path]:
    """Let apt fetch the packages and all that they need; return the files."""
    state = CACHE / f"apt-{tree.suite}"
    archives = state / "cache" / "archives"
    (archives / "partial").mkdir(parents=True, exist_ok=True)
    (state / "lists" / "partial").mkdir(parents=True, exist_ok=True)
    (state / "status").touch()
    source = f"deb [signed-by={_KEYRING}] {_mirror()} {tree.suite} main\n"
    (state / "sources.list").write_text(source)
    config = {
        "Dir::State": state, "Dir::State::status": state / "status", "Dir::Cache": state / "cache",
        "Dir::Etc::sourcelist": state / "sources.list", "Dir::Etc::sourceparts": "/dev/null",
        "Dir::Etc::preferences": "/dev/null", "Dir::Etc::preferencesparts": "/dev/null",
        "Dir::Etc::trusted": "/dev/null", "Dir::Etc::trustedparts": "/dev/null",
        "APT::Architecture": "amd64", "APT::Sandbox::User": "", "Debug::NoLocking": "true",
        "Acquire::Languages": "none", "DPkg::Pre-Install-Pkgs": "",
    }  # fmt: skip
    command = ["apt-get", "-q", *(f"-o{name}={value}" for name, value in config.items())]
    sys.stderr.write(f"lab: fetching packages of Debian {tree.suite} into {state}\n")
    _run([*command, "update"])
    _run([*command, "install", "-y", "--no-install-recommends", "--download-only", *tree.packages])
    return sorted(archives.glob("*.deb"))


def _unpack(tree: Tree, files: list[Path]) -> None:
    sys.stderr.write(f"lab: unpacking {len(files)} packages into {tree.root}\n")
    for file in files:
        # Of the old release the kernel alone is wanted.
        if tree is MAIN or file.name.startswith("linux-image-"):
            _run(["dpkg-deb", "-x", str(file), str(tree.root)])
    # Since usr was merged the kernel's package of the old release still says lib.
    if (tree.root / "lib" / "modules").exists():
        (tree.root / "usr" / "lib").mkdir(parents=True, exist_ok=True)
        (tree.root / "lib" / "modules").rename(tree.root / "usr/lib/modules")
        shutil.rmtree(tree.root / "lib")


def _wrap(tree: Tree) -> None:
    """Write a script for each program that starts it by its own loader."""
    scripts = tree.root / "bin"
    scripts.mkdir(exist_ok=True)
    libraries = tree.root / _LIBRARIES
    path = f"{libraries}:{libraries}/systemd:{libraries}/ndctl"
    for program in _PROGRAMS:
        script = scripts / Path(program).name
        script.write_text(
            f'#!/bin/sh\nexec {tree.root / _LOADER} --argv0 "${{LAB_NAME:-$0}}" '
            f'--library-path {path} {tree.root / "usr" / program} "$@"\n'
        )
        script.chmod(0o755)


def _index_modules(tree: Tree) -> None:
    """Let depmod write what daxctl looks kernel modules up in."""
    (tree.root / "lib").symlink_to("usr/lib")
    command = [MAIN.program("kmod"), "-b", str(tree.root), tree.modules.name]
    _run(command, LAB_NAME="depmod")


def _run(command: list[str], **environment: str) -> None:
    done = subprocess.run(
        command, check=False, env={**os.environ, **environment}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if done.returncode:
        said = " / ".join(done.stdout.strip().splitlines()[-3:])
        raise LabError(
            f"{Path(command[0]).name} failed: {said[-400:]}; the packages of the lab come from "
            "Debian's mirror once: is the network there?"
        )
