"""The guest's half of a power cut: compare each pool with the acknowledgements, then write.

Layer: tool.

There is one pool per kind of device, and one thread per pool. An acknowledgement leaves through the
port before the next operation begins; the host cuts the power when it likes.
"""

import itertools
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import kvfs
from lab.inside import devices
from lab.inside.tools import Port
from lab.inside.verify import examine
from tests.crash.victim import LAYOUT, SPACE, expected, perform

_SIZE: Final = "size=192MiB&segment=16MiB"
# So many per boot and pool: what a boot writes is verified at all later ones.
_OPERATIONS_PER_BOOT: Final = 100


def pools() -> dict[str, tuple[Path, str]]:
    """Return root and device of each kind's pool. DAX pools have their catalogs on the disk."""
    disk, fsdax = devices.nvme(), devices.fsdax()
    return {
        "nvdimm": (disk / "pool-nvdimm", f"dax:{devices.nvdimm()}?{_SIZE}"),
        "cxl": (disk / "pool-cxl", f"dax:{devices.cxl_persistent()}?{_SIZE}"),
        "pmem": (fsdax / "pool", f"pmem:{fsdax}/device?{_SIZE}"),
        "disk": (disk / "pool", f"dir:{disk}/device?{_SIZE}"),
    }


def run(port: Port, tallies: Mapping[str, Mapping[str, Any]], *, is_last: bool) -> None:
    """Verify, tell what was found, and write until the power goes; with `is_last`, verify only.

    Args:
        port: Where acknowledgements go.
        tallies: Of each kind: how many operations were begun, and which were acknowledged. Empty
            on a fresh machine.
        is_last: There is no further cut.
    """
    found = pools()
    for kind, tally in tallies.items():
        verdict = examine(found[kind][0], tally["begun"], set(tally["done"]))
        port.tell(
            event="verified", kind=kind, blocks=verdict.blocks, files=verdict.files,
            lost=verdict.lost[:9], corrupt=verdict.corrupt[:9], phantom=verdict.phantom[:9],
        )  # fmt: skip
    if is_last:
        return
    options = kvfs.PoolOptions(async_delay_ms=1)
    opened = {}
    for kind, (root, url) in found.items():
        if kind not in tallies:
            with kvfs.create_pool(root, [url]) as pool:
                pool.namespace(SPACE, LAYOUT, retention="durable")
        opened[kind] = kvfs.open_pool(root, options=options)
    devices.require_pmem(opened["pmem"])
    lock = threading.Lock()

    def write(kind: str, first: int) -> None:
        for number in itertools.count(first):
            if number == first + _OPERATIONS_PER_BOOT:
                return
            with lock:
                port.line(f"{kind} begin {number}")
            perform(opened[kind], expected(number))
            with lock:
                port.line(f"{kind} done {number}")

    threads = [
        threading.Thread(target=write, args=(kind, tallies.get(kind, {"begun": 0})["begun"]))
        for kind in opened
    ]
    port.tell(event="writing")
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    threading.Event().wait()  # the end comes from outside
