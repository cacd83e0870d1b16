"""The first file system of the guest: busybox, the kernel's modules, and a script.

Layer: tool.

The script loads the modules, mounts the host's root by 9p, read-only below a tmpfs, and runs a
command there. So the guest is the host's userland, checkout and venv on another kernel.
"""

import io
import lzma
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final

# What is loaded, with all that it depends on; modules that a kernel has built in are left out.
MODULES: Final = (
    "crc32c_generic", "virtio_pci", "virtio_console", "9p", "9pnet_virtio", "overlay", "fuse",
    "nvme", "virtio_blk", "xfs",
    "nfit", "nd_pmem", "nd_btt", "dax_pmem", "device_dax", "kmem", "dax_cxl", "cxl_acpi", "cxl_pci",
    "cxl_mem", "cxl_port", "cxl_pmem",
)  # fmt: skip
_INIT: Final = Path(__file__).with_name("init.sh")
_S_IFREG, _S_IFDIR = 0o100000, 0o040000


def load_order(wanted: Iterable[str], depends: Callable[[str], Sequence[str]]) -> list[str]:
    """Return modules and what they depend on, each behind what it needs."""
    order: list[str] = []

    def visit(name: str) -> None:
        for other in depends(name):
            if other not in order:
                visit(other)
        if name not in order:
            order.append(name)

    for name in wanted:
        visit(name)
    return order


def depends_of(module: bytes) -> list[str]:
    """Return what a module says it depends on."""
    found = re.search(rb"\0depends=([^\0]*)\0", module)
    return [name for name in found[1].decode().split(",") if name] if found else []


def cpio(files: Iterable[tuple[str, int, bytes]]) -> bytes:
    """Return an archive, as the kernel takes it, of (path, mode, content)."""
    out = io.BytesIO()
    for inode, (path, mode, content) in enumerate([*files, ("TRAILER!!!", 0, b"")], 1):
        name = path.encode() + b"\0"
        fields = (inode, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name), 0)
        out.write(b"070701" + b"".join(b"%08X" % field for field in fields) + name)
        out.write(b"\0" * (-out.tell() % 4) + content)
        out.write(b"\0" * (-out.tell() % 4))
    return out.getvalue()


def build(modules: Path, busybox: Path) -> bytes:
    """Return the archive for a kernel.

    Args:
        modules: The kernel's directory of modules.
        busybox: A static one.
    """
    paths = {path.name.split(".")[0].replace("-", "_"): path for path in modules.rglob("*.ko*")}
    contents: dict[str, bytes] = {}

    def depends(name: str) -> Sequence[str]:
        name = name.replace("-", "_")
        if name not in contents:
            path = paths[name]
            raw = path.read_bytes()
            contents[name] = lzma.decompress(raw) if path.suffix == ".xz" else raw
        return [other.replace("-", "_") for other in depends_of(contents[name])]

    order = load_order([name for name in MODULES if name in paths], depends)
    files = [(name, _S_IFDIR | 0o755, b"") for name in _directories()]
    files.append(("bin/busybox", _S_IFREG | 0o755, busybox.read_bytes()))
    files.append(("init", _S_IFREG | 0o755, _INIT.read_bytes()))
    files.append(("modules/order", _S_IFREG | 0o644, "\n".join(order).encode() + b"\n"))
    files += [(f"modules/{name}.ko", _S_IFREG | 0o644, contents[name]) for name in order]
    return cpio(files)


def _directories() -> tuple[str, ...]:
    return ("bin", "modules", "proc", "sys", "dev", "host", "top", "root")
