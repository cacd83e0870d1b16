"""The machine: which devices QEMU emulates, as its command line.

Layer: tool.

- Two NVDIMMs with labels, one CXL type-3 device with persistent and one with volatile memory, and
  an NVMe disk. Each is backed by a file of the run's directory, which outlives QEMU.
- The disk is reached through nbdkit's cache, which holds in memory what the guest did not flush,
  and dies with QEMU: a disk with a volatile write cache.
- No KVM: the processor is emulated, too.
"""

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lab.initramfs import build
from lab.packages import Tree
from lab.paths import PYTHON, REPOSITORY, LabError

MIB: Final = 1 << 20
LABEL_BYTES: Final = 128 << 10
# Files of a run's directory. CXL memory comes in multiples of 256 MiB; `device scan`
# lists directories with 1 GiB free.
BACKING: Final = {
    "nvdimm0": 256 * MIB + LABEL_BYTES, "nvdimm1": 1536 * MIB + LABEL_BYTES,
    "cxl-persistent": 256 * MIB, "cxl-labels": MIB, "cxl-volatile": 256 * MIB,
    "disk": 2048 * MIB,
}  # fmt: skip
MEMORY_MIB: Final = 3072
_CXL_WINDOW: Final = "cxl-fmw.0.targets.0=cxl.0,cxl-fmw.0.size=4G"
_DISKS: Final = {
    "nvme": "nvme,drive=disk,serial=lab0",
    "virtio": "virtio-blk-pci,drive=disk,write-cache=on",
}
_KERNEL_OPTIONS: Final = "console=ttyS0 loglevel=4 panic=-1 mitigations=off tsc=reliable"
_SOCKET_NAME_MAX: Final = 107
# Root port and type-3 device of each kind, behind one host bridge.
_CXL: Final = ("persistent", "volatile")


@dataclass(frozen=True, slots=True)
class Machine:
    """One guest.

    Attributes:
        directory: Of its run: backing files, sockets, logs.
        tree: Whose kernel it boots.
        programs: The tree with QEMU, nbdkit and busybox.
        job: A file that says what is to be run; None for a shell.
        shared: Backs the volatile CXL memory in place of a file of the run, so that two guests
            have the same memory.
        disk: The disk's kind, `nvme` or `virtio`. QEMU's NVMe device drops force unit access, so
            that XFS loses its journal with the power; of a virtio disk Linux asks flushes alone.
    """

    directory: Path
    tree: Tree
    programs: Tree
    job: Path | None = None
    shared: Path | None = None
    disk: str = "nvme"

    @property
    def console(self) -> Path:
        """What the kernel and the command printed."""
        return self.directory / "console.log"

    @property
    def port(self) -> Path:
        """What left through the virtio-serial port, byte by byte in a file of the host."""
        return self.directory / "port.log"

    @property
    def disk_socket(self) -> Path:
        """The socket of nbdkit."""
        return self.directory / "disk.sock"

    @property
    def monitor(self) -> Path:
        """The socket of QEMU's monitor."""
        return self.directory / "monitor.sock"

    @property
    def errors(self) -> Path:
        """What QEMU and nbdkit printed."""
        return self.directory / "errors.log"

    def backing(self, name: str) -> Path:
        """Return the file behind a device."""
        if name == "cxl-volatile" and self.shared is not None:
            return self.shared
        return self.directory / name

    def prepare(self) -> None:
        """Make what is missing: backing files, sparse, and the initramfs.

        Raises:
            LabError: The directory's name is too long.
        """
        if len(str(self.monitor)) > _SOCKET_NAME_MAX:
            raise LabError(f"{self.monitor} is too long a name for a socket; move the checkout")
        self.directory.mkdir(parents=True, exist_ok=True)
        self.errors.touch()
        for name, nbytes in BACKING.items():
            path = self.backing(name)
            with path.open("ab"):
                os.truncate(path, nbytes)
        initramfs = self.directory / "initramfs"
        if not initramfs.exists():
            busybox = self.programs.root / "usr" / "bin" / "busybox"
            initramfs.write_bytes(build(self.tree.modules, busybox))


def disk_command(machine: Machine) -> list[str]:
    """Return nbdkit's command line: a disk whose unflushed writes are in its memory alone."""
    root = machine.programs.root / "usr/lib/x86_64-linux-gnu/nbdkit"
    return [
        machine.programs.program("nbdkit"), "--foreground", "--exit-with-parent",
        "--unix", str(machine.disk_socket),
        f"--filter={root}/filters/nbdkit-cache-filter.so", f"{root}/plugins/nbdkit-file-plugin.so",
        f"file={machine.backing('disk')}", "cache=writeback",
    ]  # fmt: skip


def qemu_command(machine: Machine, *, is_interactive: bool = False) -> list[str]:
    """Return QEMU's command line."""
    programs = machine.programs
    command = [
        programs.program("qemu-system-x86_64"),
        "-L", str(programs.root / "usr/share/qemu"), "-L", str(programs.root / "usr/share/seabios"),
        "-nodefaults", "-no-reboot", "-display", "none", "-accel", "tcg,thread=multi",
        # A guest that knows that it is one does not flush caches for CXL regions, and makes none.
        # Without fast string operations memory is not cleared byte by byte, each a call of the
        # device model if it is CXL's.
        "-cpu", "max,-hypervisor,-erms,-fsrm,vendor=GenuineIntel",
        # On two emulated processors Linux now and then dies while it patches its own code.
        "-smp", "1", "-m", f"{MEMORY_MIB}M,slots=4,maxmem=16G",
        "-machine", f"q35,cxl=on,nvdimm=on,nvdimm-persistence=mem-ctrl,hmat=on,{_CXL_WINDOW}",
        "-object", "rng-builtin,id=rng", "-device", "virtio-rng-pci,rng=rng",
        "-kernel", str(machine.tree.kernel), "-initrd", str(machine.directory / "initramfs"),
        "-append", _kernel_line(machine),
        "-virtfs", "local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap",
        "-device", "virtio-serial-pci",
        "-chardev", f"file,id=port,path={machine.port}",
        "-device", "virtserialport,chardev=port,name=lab",
        # Of a terminal, ctrl-c is for the guest.
        "-chardev", "stdio,id=console,signal=off" if is_interactive
        else f"file,id=console,path={machine.console}",
        "-serial", "chardev:console",
        "-monitor", f"unix:{machine.monitor},server=on,wait=off",
        "-drive", f"if=none,id=disk,format=raw,file=nbd+unix:///?socket={machine.disk_socket}",
        "-device", _DISKS[machine.disk],
    ]  # fmt: skip
    return command + _nodes() + _nvdimms(machine) + _cxl(machine)


def shown(command: Sequence[str]) -> str:
    """Return a command line to paste."""
    return shlex.join(command)


def _kernel_line(machine: Machine) -> str:
    words = {
        "lab.python": PYTHON, "lab.repository": REPOSITORY, "lab.tools": machine.programs.root,
        "lab.modules": machine.tree.modules, "lab.job": machine.job,
    }  # fmt: skip
    said = [f"{name}={value}" for name, value in words.items() if value is not None]
    return " ".join([_KERNEL_OPTIONS, *said])


def _memory(name: str, path: Path) -> list[str]:
    size = BACKING[name]
    value = f"memory-backend-file,id={name},share=on,mem-path={path},size={size}"
    return ["-object", value]


def _nodes() -> list[str]:
    """Return the node of processor and memory, and that of the CXL host bridge, with their speed.

    From the bridge's and from what each CXL device says of itself Linux knows how fast that is.
    """
    words = ["-object", f"memory-backend-ram,id=memory,size={MEMORY_MIB}M",
             "-numa", "node,nodeid=0,cpus=0,memdev=memory", "-numa", "node,nodeid=1",
             "-object", "acpi-generic-port,id=bridge,pci-bus=cxl.0,node=1"]  # fmt: skip
    for target in range(2):
        path = f"hmat-lb,initiator=0,target={target},hierarchy=memory,data-type=access"
        words += ["-numa", f"{path}-latency,latency=10", "-numa", f"{path}-bandwidth,bandwidth=10G"]
    return words


def _nvdimms(machine: Machine) -> list[str]:
    words: list[str] = []
    for name in ("nvdimm0", "nvdimm1"):
        words += _memory(name, machine.backing(name))
        words += ["-device", f"nvdimm,id=dimm-{name},memdev={name},label-size={LABEL_BYTES}"]
    return words


def _cxl(machine: Machine) -> list[str]:
    words = ["-device", "pxb-cxl,bus_nr=12,bus=pcie.0,id=cxl.0"]
    for name in ("cxl-persistent", "cxl-labels", "cxl-volatile"):
        words += _memory(name, machine.backing(name))
    memory = {
        "persistent": "persistent-memdev=cxl-persistent,lsa=cxl-labels,sn=1",
        "volatile": "volatile-memdev=cxl-volatile,sn=2",
    }
    for slot, kind in enumerate(_CXL):
        port = f"root-{kind}"
        words += ["-device", f"cxl-rp,port={slot},bus=cxl.0,id={port},chassis=0,slot={slot + 2}"]
        words += ["-device", f"cxl-type3,bus={port},id={kind},{memory[kind]}"]
    return words
