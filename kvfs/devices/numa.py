"""Memory nodes of this machine: which there are, how much they have, how fast they are.

Layer: L1.

A CXL memory that the kernel uses as memory ('system-ram') is a node without processors. What the
firmware says of its speed (HMAT, CDAT) is in sysfs, as seen from the processors nearest to it.
"""

import contextlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kvfs import _native
from kvfs.emulation import LinkFigures
from kvfs.errors import RefusedError, UsageError
from kvfs.units import KIB, MIB, format_bytes

SYSFS: Final = Path("/sys")
_NODES: Final = "devices/system/node"
_ACCESS: Final = "access0/initiators"
_HUGE: Final = "kernel/mm/transparent_hugepage/shmem_enabled"
_log = logging.getLogger("kvfs.devices")


@dataclass(frozen=True, slots=True)
class Node:
    """A memory node. `available_bytes`: free, or page cache that nothing has used of late."""

    number: int
    has_processors: bool
    total_bytes: int
    available_bytes: int
    figures: LinkFigures


def nodes(sysfs: Path = SYSFS) -> list[Node]:
    """Return the nodes that have memory, by number; none where the kernel knows of no nodes."""
    return [node for number in _listed(sysfs / _NODES / "online")
            if (node := _read(sysfs / _NODES / f"node{number}", number)).total_bytes]  # fmt: skip


def require_node(number: int, url: str, sysfs: Path = SYSFS) -> Node:
    """Return a node that memory can be taken from.

    Raises:
        UsageError: There is none of this number, or none to choose from; the message lists them.
    """
    found = nodes(sysfs)
    listed = ", ".join(
        f"{node.number} ({format_bytes(node.total_bytes)}"
        f"{'' if node.has_processors else ', without processors'})"
        for node in found
    )
    if len(found) < 2:
        raise UsageError(
            f"this machine has one memory node, so none to choose: {url}: found "
            f"{listed or 'none that the kernel tells of'}; use dram:, or make a node of CXL memory "
            "with 'daxctl reconfigure-device --mode=system-ram'"
        )
    for node in found:
        if node.number == number:
            return node
    raise UsageError(f"no memory node {number}: {url}: expected one of {listed}")


def bind(fd: int, nbytes: int, node: Node, name: str) -> None:
    """Take the pages of a device's memfd from a node, whoever touches them first.

    Raises:
        RefusedError: This process may not ask for that, or not use the node.
    """
    try:
        _native.bind_memfd(fd, nbytes, node.number)
    except PermissionError as error:
        raise RefusedError(
            f"memory cannot be taken from node {node.number}: {name}: mbind is forbidden to this "
            "process; a container needs CAP_SYS_NICE for it"
        ) from error
    except OSError as error:
        raise RefusedError(
            f"memory cannot be taken from node {node.number}: {name}: {error.strerror}; this "
            "process may be kept from it, see Mems_allowed in /proc/self/status"
        ) from error


def warn_of_small_pages(name: str, sysfs: Path = SYSFS) -> None:
    """Log a warning if the kernel gives no huge pages to memory that asks for them."""
    text = _text(sysfs / _HUGE)
    chosen = text.partition("[")[2].partition("]")[0]
    if chosen not in ("always", "within_size", "advise", "force"):
        _log.warning(
            "no huge pages for %s: the kernel is told to give none to shared memory; write 'advise'"
            " to /sys/%s", name, _HUGE,
        )  # fmt: skip


def _read(path: Path, number: int) -> Node:
    fields: dict[str, int] = {}
    for line in _text(path / "meminfo").splitlines():
        words = line.split()  # Node 0 MemTotal: 24684084 kB
        if len(words) >= 4 and words[3].isdecimal():
            fields[words[2].rstrip(":")] = int(words[3]) * KIB
    access = path / _ACCESS
    return Node(
        number=number,
        has_processors=bool(_listed(path / "cpulist")),
        total_bytes=fields.get("MemTotal", 0),
        available_bytes=fields.get("MemFree", 0) + fields.get("Inactive(file)", 0),
        figures=LinkFigures(
            _number(access / "read_bandwidth") * MIB,
            _number(access / "write_bandwidth") * MIB,
            _number(access / "read_latency"),
            _number(access / "write_latency"),
        ),
    )


def _listed(path: Path) -> list[int]:
    """Read a list such as '0-1,3'."""
    found: list[int] = []
    for part in _text(path).split(","):
        first, _, last = part.partition("-")
        if first.isdecimal():
            found.extend(range(int(first), int(last or first) + 1))
    return found


def _text(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text().strip()
    return ""


def _number(path: Path) -> int:
    text = _text(path)
    return int(text) if text.isdecimal() else 0
