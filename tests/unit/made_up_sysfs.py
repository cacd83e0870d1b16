"""A made-up /sys for tests of what is found there."""

from collections.abc import Mapping
from pathlib import Path

from kvfs.units import GIB, KIB


def write(path: Path, text: object) -> None:
    """Write a file of sysfs, with the directories above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


def add_node(
    sysfs: Path, number: int, *, cpus: str, total: int, free: int, cache: int = GIB,
    figures: Mapping[str, int] | None = None,
) -> None:  # fmt: skip
    """Add a memory node, or change it. Sizes in bytes; `figures` as HMAT has them."""
    nodes = sysfs / "devices/system/node"
    node = nodes / f"node{number}"
    fields = {"MemTotal": total, "MemFree": free, "Inactive(file)": cache}
    lines = [f"Node {number} {name}: {nbytes // KIB} kB" for name, nbytes in fields.items()]
    write(node / "meminfo", "\n".join([*lines, f"Node {number} HugePages_Total: 0"]))
    write(node / "cpulist", cpus)
    for name, value in (figures or {}).items():
        write(node / "access0/initiators" / name, value)
    known = sorted(int(path.name[4:]) for path in nodes.glob("node*"))
    write(nodes / "online", ",".join(map(str, known)) if known != [0, 1] else "0-1")


def link(path: Path, target: Path) -> None:
    """Make a symbolic link, with the directories above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    target.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)
