"""Bringing up the guest's devices, as an operator would with ndctl, daxctl and cxl.

Layer: tool.

On a fresh machine namespaces and file systems are made; after a power cut the labels of the
namespaces are there, and the region of persistent CXL memory is made again over them: the kernel
keeps its identity in the labels, but does not assemble it by itself.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import kvfs
from lab.inside.tools import StepError, call, listed

# Sizes of machine.BACKING tell the NVDIMMs apart, serial numbers the CXL devices.
_SMALL_BYTES: Final = 300 << 20
_PERSISTENT_SERIAL, _VOLATILE_SERIAL = 1, 2
_REGION_UUID: Final = "6b766673-0000-4000-8000-000000000001"
_REGION_BYTES: Final = 256 << 20
FSDAX: Final = Path("/mnt/fsdax")
NVME: Final = Path("/mnt/nvme")


def nvdimm() -> str:
    """Return the path of the first NVDIMM's DAX device."""
    return _dax("-b ACPI.NFIT", lambda region: region["size"] <= _SMALL_BYTES)


def cxl_persistent() -> str:
    """Return the path of the DAX device in the region of persistent CXL memory."""
    region = _cxl_region("pmem", _PERSISTENT_SERIAL)
    return _dax("", lambda found: found["dev"] == region)


def cxl_volatile() -> str:
    """Return the path of the DAX device over volatile CXL memory, as devdax."""
    region = _cxl_region("ram", _VOLATILE_SERIAL)
    device = _volatile_device(region)
    if device["mode"] != "devdax":
        call(f"daxctl reconfigure-device -f --mode=devdax {device['chardev']}")
    return f"/dev/{device['chardev']}"


def online_volatile() -> int:
    """Make the kernel's memory of the volatile CXL memory; return its NUMA node."""
    region = _cxl_region("ram", _VOLATILE_SERIAL)
    device = _volatile_device(region)
    if device["mode"] != "system-ram":
        # daxctl refuses while the kernel would put it online by itself, movable or not.
        Path("/sys/devices/system/memory/auto_online_blocks").write_text("offline")
        call(f"daxctl reconfigure-device --mode=system-ram {device['chardev']}")
    return int(_volatile_device(region)["target_node"])


def fsdax() -> Path:
    """Return where the second NVDIMM's XFS is mounted, with DAX."""
    if not FSDAX.is_mount():
        space = _namespace("fsdax", "-b ACPI.NFIT", lambda region: region["size"] > _SMALL_BYTES)
        _mount(f"/dev/{space['blockdev']}", FSDAX, "-o dax=always")
    return FSDAX


def require_pmem(pool: kvfs.Pool | kvfs.RemotePool) -> None:
    """See that the `pmem:` devices of an open pool are memory, and not served like directories.

    Raises:
        StepError: One is not, or there is none.
    """
    assert isinstance(pool, kvfs.Pool)
    found = [one for one in pool.store.device_statistics() if one.kind == "pmem"]
    if not found or not all(one.persistence for one in found):
        raise StepError(f"not served as persistent memory: {[one.url for one in found]}")


def disk() -> str:
    """Return the path of the disk, which is an NVMe or a virtio one."""
    paths = [path for path in ("/dev/nvme0n1", "/dev/vda") if Path(path).exists()]
    if not paths:
        raise StepError("there is no disk")
    return paths[0]


def nvme() -> Path:
    """Return where the disk's XFS is mounted."""
    if not NVME.is_mount():
        _mount(disk(), NVME, "")
    return NVME


def _mount(device: str, where: Path, options: str) -> None:
    where.mkdir(parents=True, exist_ok=True)
    with open(device, "rb") as file:
        is_made = file.read(4) == b"XFSB"
    if not is_made:
        call(f"mkfs.xfs -q -f {device}")
    call(f"mount {options} {device} {where}")


def _dax(bus: str, is_wanted: Callable[[dict[str, Any]], bool]) -> str:
    """Return the path of the devdax namespace of a region."""
    space = _namespace("devdax", bus, is_wanted)
    return f"/dev/{space['daxregion']['devices'][0]['chardev']}"


def _namespace(mode: str, bus: str, is_wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Return the namespace of a region, and make it if there is none but the raw one."""
    region = next((r for r in listed(f"ndctl list -R {bus}") if is_wanted(r)), None)
    if region is None:
        raise StepError("ndctl lists no such region")
    name = region["dev"]
    for space in listed(f"ndctl list -N -X -r {name}"):
        if space["mode"] == mode:
            return space
    dimms = [found["dev"] for found in listed(f"ndctl list -D -r {name}")]
    # Without labels a region is one raw namespace; they are written while it is off.
    call(f"ndctl disable-region {name}")
    call(f"ndctl init-labels {' '.join(dimms)}", check=False)
    call(f"ndctl enable-region {name}")
    made = json.loads(call(f"ndctl create-namespace -r {name} -m {mode} -a 2M"))
    found: dict[str, Any] = made[0] if isinstance(made, list) else made
    return found


def _cxl_region(kind: str, serial: int) -> str:
    """Return the name of the CXL region over one device, and make it if it is missing."""
    memory = next((m for m in listed("cxl list -M") if m.get("serial") == serial), None)
    if memory is None:
        raise StepError(f"cxl lists no memory device with serial number {serial}")
    for region in listed("cxl list -R"):
        if region["type"] == kind:
            return str(region["region"])
    option = f"-U {_REGION_UUID}" if kind == "pmem" else ""
    made = json.loads(
        call(f"cxl create-region -m -d decoder0.0 -t {kind} -s {_REGION_BYTES} {option} "
             f"{memory['memdev']}")
    )  # fmt: skip
    return str((made[0] if isinstance(made, list) else made)["region"])


def _volatile_device(region: str) -> dict[str, Any]:
    """Return what daxctl says of the DAX device over a CXL region."""
    for path in Path("/sys/bus/dax/devices").iterdir():
        if f"/{region}/" in str(path.resolve()):
            return listed(f"daxctl list -d {path.name}")[0]
    raise StepError(f"no DAX device over {region}")
