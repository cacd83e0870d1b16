"""What is run in the guest, one function per row of the table.

Layer: tool.

Each returns figures, raises StepError if something does not hold, or CannotError if this machine
does not have what it takes.
"""

import json
import mmap
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import kvfs
from lab.inside import changes, devices, discovery, memory, poison, views
from lab.inside.tools import Port, StepError, call
from lab.inside.verify import examine
from tests.crash.victim import LAYOUT, SPACE, expected, perform

Figures = dict[str, Any]
_SUITE: Final = "tests/conformance/test_given_devices.py"
_SUITE_S: Final = 540
_STORED_OPERATIONS: Final = 24
_FILE_BYTES: Final = 24 << 20
_SIZE: Final = "size=160MiB&segment=16MiB"


def conformance(where: str, _port: Port) -> Figures:
    """Run the device suite."""
    url = _urls()[where]()
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider",
               "--basetemp=/dev/shm/pytest", "-o", f"timeout={_SUITE_S}", _SUITE]  # fmt: skip
    done = subprocess.run(
        command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "KVFS_TEST_DEVICES": url},
    )  # fmt: skip
    sys.stderr.write(done.stdout)
    found = re.search(r"(\d+) passed", done.stdout)
    if done.returncode or found is None:
        said = " / ".join(line for line in done.stdout.splitlines() if line.startswith("E  "))
        raise StepError(f"{url}: {said[:300] or done.stdout[-300:]}")
    return {"tests": int(found[1])}


def _urls() -> Mapping[str, Callable[[], str]]:
    """Return what makes each device's URL; devices are brought up when first asked for."""
    return {
        "nvdimm": lambda: f"dax:{devices.nvdimm()}",
        "pmem": lambda: f"pmem:{devices.fsdax()}",
        "cxl persistent": lambda: f"dax:{devices.cxl_persistent()}",
        "cxl volatile": lambda: f"dax:{devices.cxl_volatile()}",
        "nvme": lambda: f"dir:{devices.nvme()}",
    }


def restore(where: str, _port: Port) -> Figures:
    """Store blocks, contexts and files in another process, kill it, and find all of it again."""
    base = devices.fsdax() if where == "pmem" else devices.nvme()
    root = base / f"restore-{where.replace(' ', '-')}"
    root.mkdir()
    urls = [f"pmem:{root}/device?{_SIZE}" if where == "pmem" else f"dax:{devices.nvdimm()}?{_SIZE}"]
    if "dir" in where:
        urls.append(f"dir:{root}/device?size=192MiB&segment=16MiB")
    command = [sys.executable, "-m", "lab.inside.steps", str(root / "pool"), *urls]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        line = child.stdout.readline()
        child.send_signal(signal.SIGKILL)
    if line != "stored\n":
        raise StepError("the process that stores did not get so far")
    verdict = examine(root / "pool", _STORED_OPERATIONS, range(_STORED_OPERATIONS))
    kvfs.destroy_pool(root / "pool")
    shutil.rmtree(root)
    if bad := verdict.lost + verdict.corrupt + verdict.phantom:
        raise StepError(f"{len(bad)} things do not hold, first {bad[0]}")
    return {"blocks": verdict.blocks, "files": verdict.files}


def store(root: Path, urls: list[str]) -> None:
    """Be the process that is killed: store, say so, and wait."""
    with kvfs.create_pool(root, urls) as pool:
        if urls[0].startswith("pmem:"):
            devices.require_pmem(pool)
        pool.namespace(SPACE, LAYOUT, retention="durable")
        for number in range(_STORED_OPERATIONS):
            perform(pool, expected(number))
        sys.stdout.write("stored\n")
        sys.stdout.flush()
        signal.pause()


def mount(where: str, _port: Port) -> Figures:
    """Mount a pool, write a file, and read it through a map; `where` names device and lane."""
    place, lane = where.split(", ")
    scheme, base = ("pmem", devices.fsdax()) if place == "pmem" else ("dir", devices.nvme())
    base /= "mounted"
    point = Path("/mnt/kvfs")
    point.mkdir(exist_ok=True)
    base.mkdir()
    device = f"{scheme}:{base}/device?size=256MiB&segment=32MiB"
    call(f"kvfs-admin --pool {base}/pool pool create {device}")
    call(f"kvfs mount {base}/pool {point} --log {base}/log")
    try:
        names = [path for path in point.iterdir() if path.is_dir() and path.name[0] != "."]
        path = (names[0] if names else point) / "tensor"
        content = b"".join(_pages(_FILE_BYTES))
        path.write_bytes(content)
        call(f"sync -f {point}")
        call(f"kvfs umount {point}")
        call(f"kvfs mount {base}/pool {point} --log {base}/log")
        with path.open("rb") as file:
            found = os.getxattr(path, "user.kvfs.lane").decode()
            listed = json.loads(call(f"kvfs-admin --pool {base}/pool device list --json"))
            with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as view:
                same = bytes(view) == content
        if not same:
            raise StepError("the map shows other bytes than were written")
        if scheme == "pmem" and not listed["devices"][0]["persistence"]:
            raise StepError("the device is served like a directory on disk")
        if found != lane:
            raise StepError(f"expected the {lane} lane, found {found}")
    finally:
        call(f"kvfs umount {point}", check=False)
    report = json.loads(call(f"kvfs-admin --pool {base}/pool check --data --json"))
    if report.get("findings"):
        raise StepError(f"{len(report['findings'])} findings, first {report['findings'][0]}")
    shutil.rmtree(base)
    return {"lane": found, "mapped MiB": _FILE_BYTES >> 20, "kernel": os.uname().release}


def _pages(nbytes: int) -> list[bytes]:
    return [number.to_bytes(8, "little") * 512 for number in range(nbytes // 4096)]


def numa(_where: str, _port: Port) -> Figures:
    """Make a NUMA node of the volatile CXL memory, and use pages of it."""
    node = devices.online_volatile()
    return {"node": node, **memory.probe(node)}


def node_pool(_where: str, _port: Port) -> Figures:
    """Have a pool take its memory from that node."""
    return memory.pool(devices.online_volatile(), devices.nvme() / "pool-node")


def write_cache(_where: str, port: Port) -> Figures:
    """Write one page and flush it, then another one and do not; the host cuts the power.

    The disk has no file system: the host looks at the file behind it.
    """
    fd = os.open(devices.disk(), os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
    page = mmap.mmap(-1, 4096)
    for number, fill in enumerate((b"flushed ", b"too late")):
        page[:] = fill * 512
        os.pwrite(fd, page, number * (1 << 20))
        if number == 0:
            os.fdatasync(fd)
    port.tell(event="written")
    signal.pause()
    return {}


STEPS: Final[Mapping[str, Callable[[str, Port], Figures]]] = {
    "conformance": conformance,
    "restore after kill -9": restore,
    "mount, mapped file": mount,
    "memory of a NUMA node": numa,
    "pool on a NUMA node": node_pool,
    "device scan": lambda where, _port: discovery.scan(where),
    "device show": lambda _where, _port: discovery.show(),
    "devices of a running pool": lambda where, _port: changes.change(where),
    "view without a copy": lambda _where, _port: dict(views.view()),
    "poison": poison.nvdimm,
    "poison list": poison.cxl,
    "write cache": write_cache,
}


if __name__ == "__main__":
    store(Path(sys.argv[1]), sys.argv[2:])
