"""What this machine has that could be a device, each with a URL for it.

Layer: L1.

Looks at sysfs and at the mounts of this process; nothing is opened but to try what a filesystem
can, with a file without a name. What it finds need not be free: making a pool refuses what belongs
to one, and nobody knows of other uses.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kvfs.devices import numa, reflink
from kvfs.devices.dax_source import ALIGNMENT, domain_of
from kvfs.devices.osfs import MEMORY_FILESYSTEMS, REMOTE_FILESYSTEMS, filesystem_type
from kvfs.devices.pmem import why_not_dax
from kvfs.emulation import UNKNOWN, LinkFigures
from kvfs.units import GIB, MIB

SYSFS: Final = Path("/sys")
MOUNTS: Final = Path("/proc/self/mountinfo")
_SECTOR: Final = 512
_OCTAL: Final = re.compile(r"\\([0-7]{3})")
_NO_HOMES: Final = ("/boot", "/dev", "/proc", "/sys", "/run")
_PASSTHROUGH_SINCE: Final = (6, 9)
_FREE_BYTES_MIN: Final = GIB
_NODE_STEP: Final = 64 * MIB
_REGION_KINDS: Final = {"ram": "volatile", "pmem": "persistent"}


@dataclass(frozen=True, slots=True)
class Found:
    """Something that could be a device.

    Attributes:
        kind: "dax", "cxl-region", "cxl-memdev", "pmem-namespace", "node", "nvme" or "directory".
        name: The kernel's, or a mount's directory.
        url: To be pasted into `pool create`; "" if it is none yet, and `note` says what to do.
        nbytes: Its size, or what is free of it.
        abilities: What it can do.
        figures: As far as the kernel tells.
    """

    kind: str
    name: str
    url: str
    nbytes: int
    abilities: tuple[str, ...] = ()
    note: str = ""
    figures: LinkFigures = UNKNOWN


def scan(*, sysfs: Path = SYSFS, mounts: Path = MOUNTS, release: str = "") -> list[Found]:
    """Return what there is: memory first.

    Args:
        sysfs: Where sysfs is mounted.
        mounts: The table of mounts.
        release: The kernel's; this one's when missing.
    """
    return [
        *_nodes(sysfs),
        *_dax_devices(sysfs),
        *_cxl(sysfs),
        *_namespaces(sysfs),
        *_nvme(sysfs),
        *_directories(mounts, release),
    ]


def _nodes(sysfs: Path) -> Iterator[Found]:
    found = numa.nodes(sysfs)
    for node in found:
        if not node.has_processors and len(found) > 1:
            size = node.available_bytes * 9 // 10
            steps = size // _NODE_STEP * _NODE_STEP
            text = f"{size // GIB}GiB" if size >= GIB else f"{steps // MIB}MiB"
            yield Found(
                "node", f"node{node.number}",
                f"cxl:node={node.number}?size={text}" if steps else "",
                node.available_bytes,
                ("files", "views"),
                "" if steps else "less than 64 MiB is free",
                node.figures,
            )  # fmt: skip


def _dax_devices(sysfs: Path) -> Iterator[Found]:
    for path in _entries(sysfs / "bus/dax/devices"):
        nbytes, driver = _number(path / "size"), _driver(path)
        if not nbytes:
            continue  # a seed: what daxctl makes others from
        domain = domain_of(path.resolve())
        abilities = (domain or "volatile",)
        note = ""
        if driver != "device_dax":
            note = (f"used as memory of node {_text(path / 'target_node') or '?'}"
                    if driver == "kmem" else f"its driver is {driver or 'none'}")  # fmt: skip
            note += f"; 'daxctl reconfigure-device --mode=devdax {path.name}' takes it back"
        elif nbytes % ALIGNMENT:
            note = "its size is no multiple of 2 MiB"
        yield Found("dax", path.name, "" if note else f"dax:/dev/{path.name}", nbytes, abilities,
                    note)  # fmt: skip


def _cxl(sysfs: Path) -> Iterator[Found]:
    for path in _entries(sysfs / "bus/cxl/devices"):
        if re.fullmatch(r"region\d+", path.name):
            kind = _REGION_KINDS.get(_text(path / "mode"), _text(path / "mode"))
            devices = sorted(child.name for child in path.glob("**/dax[0-9]*.[0-9]*")
                             if child.is_dir())  # fmt: skip
            note = f"see {devices[0]}" if devices else "no DAX device in it"
            if not devices and kind == "persistent":
                note = "make a namespace in it: 'ndctl create-namespace --mode=devdax'"
            yield Found("cxl-region", path.name, "", _number(path / "size"), (kind,), note)
        elif re.fullmatch(r"mem\d+", path.name):
            ram, pmem = _number(path / "ram/size"), _number(path / "pmem/size")
            kinds = tuple(name for name, size in (("volatile", ram), ("persistent", pmem)) if size)
            yield Found("cxl-memdev", path.name, "", ram + pmem, kinds,
                        f"'cxl create-region -m -d decoder0.0 {path.name}' uses it")  # fmt: skip


def _namespaces(sysfs: Path) -> Iterator[Found]:
    for path in _entries(sysfs / "bus/nd/devices"):
        if not re.fullmatch(r"namespace\d+\.\d+", path.name):
            continue
        nbytes, mode = _number(path / "size"), _text(path / "mode")
        if not nbytes:
            continue
        domain = domain_of(path.resolve()) or "volatile"
        blocks = sorted(child.name for child in path.glob("block/*"))
        blocks += sorted(child.name for child in path.parent.glob("pfn*/block/*"))
        if mode in ("fsdax", "memory"):
            disk = blocks[0] if blocks else "pmemN"
            note = (f"'mkfs.xfs /dev/{disk}', 'mount -o dax /dev/{disk} /mnt/pmem', then "
                    "pmem:/mnt/pmem/kv; once mounted it is listed as a directory")  # fmt: skip
        elif mode in ("devdax", "dax"):
            note = "see its DAX device"
        else:
            note = f"'ndctl create-namespace -f -e {path.name} -m devdax' makes a DAX device of it"
        yield Found("pmem-namespace", path.name, "", nbytes, (mode, domain), note)


def _nvme(sysfs: Path) -> Iterator[Found]:
    for path in _entries(sysfs / "class/block"):
        if re.fullmatch(r"nvme\d+n\d+", path.name) and _number(path / "size"):
            streams = _number(path / "queue/nr_write_streams") or _number(
                path / "queue/max_write_streams"
            )
            discard = _number(path / "queue/discard_max_bytes")
            abilities = ("write streams",) * bool(streams) + ("discard",) * bool(discard)
            yield Found("nvme", path.name, "", _number(path / "size") * _SECTOR, abilities,
                        "its mounted filesystems are listed as directories")  # fmt: skip


def _directories(mounts: Path, release: str) -> Iterator[Found]:
    seen: set[tuple[int, str]] = set()
    for line in mounts.read_text(errors="replace").splitlines():  # a name may be of any bytes
        fields = line.split()
        tail = fields.index("-")
        point = _OCTAL.sub(lambda match: chr(int(match[1], 8)), fields[4])
        is_readonly = "ro" in fields[5].split(",") or "ro" in fields[-1].split(",")
        if is_readonly or (point.startswith(_NO_HOMES) and point != "/dev/shm"):
            continue
        with contextlib.suppress(OSError):
            key = (os.stat(point).st_dev, fields[3])  # of what lies on top
            found = None if key in seen else describe(point, fields[tail + 1], release)
            if found is not None:
                seen.add(key)
                yield found


def describe(point: str, filesystem: str = "", release: str = "") -> Found | None:
    """Describe a directory that can hold a device; None if it cannot.

    Args:
        point: Where.
        filesystem: What the kernel calls its filesystem; not said when missing.
        release: The kernel's; this one's when missing.
    """
    if not os.path.isdir(point) or not os.access(point, os.W_OK | os.X_OK):
        return None
    fd = os.open(point, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        kind = filesystem_type(fd)
        if kind in REMOTE_FILESYSTEMS:
            return None
        space = os.fstatvfs(fd)
        nbytes = space.f_bavail * space.f_frsize
        if nbytes < _FREE_BYTES_MIN:
            return None
        is_dax = not why_not_dax(point)
        abilities = [filesystem] if filesystem else []
        with contextlib.suppress(OSError):
            if reflink.probe(fd, kind) != reflink.NOTHING:
                abilities.append("reflink")
        abilities += ["DAX"] * is_dax + ["O_DIRECT"] * _takes_direct(point)
        version = tuple(int(part) for part in re.findall(r"\d+", release or os.uname().release)[:2])
        if version >= _PASSTHROUGH_SINCE and os.geteuid() == 0:
            abilities.append("passthrough")
    finally:
        os.close(fd)
    note = "its files are memory: it ends with the machine" if kind in MEMORY_FILESYSTEMS else ""
    scheme = "pmem" if is_dax else "dir"
    return Found("directory", point, f"{scheme}:{point.rstrip('/')}/kvfs", nbytes,
                 tuple(abilities), note)  # fmt: skip


def _takes_direct(point: str) -> bool:
    try:
        os.close(os.open(point, os.O_TMPFILE | os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC, 0o600))
    except OSError:
        return False
    return True


def _entries(folder: Path) -> list[Path]:
    with contextlib.suppress(OSError):
        return sorted(folder.iterdir())
    return []


def _driver(path: Path) -> str:
    link = path / "driver"
    return link.resolve().name if link.exists() else ""


def _text(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text().strip()
    return ""


def _number(path: Path) -> int:
    with contextlib.suppress(ValueError):
        return int(_text(path) or "0", 0)
    return 0
