"""Bad memory: by a machine check for the NVDIMM, by the device's own list for CXL.

Layer: tool.
"""

import re
import time
from pathlib import Path
from typing import Any, Final

import kvfs
from kvfs.devices.dax_layout import HEADER_BYTES
from kvfs.devices.dax_source import open_source
from lab.inside import devices
from lab.inside.tools import CannotError, Port, StepError, call, listed
from tests.crash.victim import LAYOUT, SPACE, expected, perform

_WAIT_S: Final = 30.0
_SIZE: Final = "size=128MiB&segment=16MiB"
_BAD_OFFSET: Final = HEADER_BYTES + (40 << 20) + 8192  # in the third segment
_DEBUG: Final = Path("/sys/kernel/debug/cxl")


def nvdimm(_where: str, port: Port) -> dict[str, Any]:
    """Have the host raise a machine check at an address of the NVDIMM; see what kvfs makes of it.

    The kernel notes the range in the region's badblocks, and kvfs gives the segment to nobody.
    """
    path = devices.nvdimm()
    sysfs = Path(f"/sys/bus/dax/devices/{Path(path).name}").resolve()
    base = int((sysfs / "resource").read_text(), 0)
    badblocks = next(
        parent / "badblocks" for parent in sysfs.parents if (parent / "persistence_domain").exists()
    )
    port.tell(event="machine check", address=base + _BAD_OFFSET)
    deadline = time.monotonic() + _WAIT_S
    while not badblocks.read_text().strip():
        if time.monotonic() > deadline:
            said = [line for line in call("dmesg").splitlines() if "mce" in line or "MCE" in line]
            raise StepError(f"no badblocks after a machine check; the kernel says {said[-3:]}")
        time.sleep(0.2)
    with open_source(path) as source:
        bad = source.bad
    if not any(start <= _BAD_OFFSET < start + nbytes for start, nbytes in bad):
        raise StepError(f"expected the offset {_BAD_OFFSET:#x} to be bad, found {bad}")
    root = devices.nvme() / "pool-poison"
    with kvfs.create_pool(root, [f"dax:{path}?{_SIZE}"]) as pool:
        pool.namespace(SPACE, LAYOUT, retention="durable")
        for number in range(8):
            perform(pool, expected(number))
        counted = [device.bad_bytes for device in pool.store.device_statistics()]
    kvfs.destroy_pool(root)
    if not sum(counted):
        raise StepError("the pool counts no bad bytes")
    return {
        "badblocks": badblocks.read_text().strip().replace("\n", "; "),
        "bad bytes": sum(counted),
    }


def cxl(_where: str, _port: Port) -> dict[str, Any]:
    """Inject poison into the persistent CXL device, and read its list back.

    QEMU keeps the list, but loads from a poisoned line raise no machine check there.
    """
    devices.cxl_persistent()
    memory = next(m["memdev"] for m in listed("cxl list -M") if m.get("serial") == 1)
    inject = _DEBUG / memory / "inject_poison"
    if not inject.exists():
        raise CannotError("the kernel offers no inject_poison for this device")
    inject.write_text("0x4000000")
    found = call(f"cxl list -m {memory} --media-errors")
    count = len(re.findall(r'"(?:dpa|offset|hpa)"', found))
    (_DEBUG / memory / "clear_poison").write_text("0x4000000")
    if not count:
        raise StepError(f"the device's list does not name what was injected: {found[:200]}")
    return {"records": count}
