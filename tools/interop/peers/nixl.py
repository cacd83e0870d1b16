"""NIXL's POSIX plug-in: DRAM to a file and back, by descriptor and by path.

Layer: tool.

One transfer of 32 descriptors of 1 MiB each way; the bytes are compared in memory and as a plain
read of the file sees them.
"""

import ctypes
import mmap
import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

from interop.cases import Case, Peer, Place
from interop.driver import pattern, rate_mib_s, require, tell
from interop.site import Site

_VERSION: Final = "1.5.1"
_CHUNK: Final = 1 << 20
_CHUNKS: Final = 32
_NAME: Final = "interop"
# (what the table says, how the file is given, option of the plug-in)
_WAYS: Final = (
    ("POSIX plug-in, descriptor", "fd", ""),
    ("POSIX plug-in, descriptor opened O_DIRECT", "direct-fd", ""),
    ("POSIX plug-in, path, rw,create", "path", ""),
    ("POSIX plug-in, path, rw,create,direct", "direct-path", ""),
    ("POSIX plug-in, use_uring, O_DIRECT", "direct-fd", "use_uring"),
    ("POSIX plug-in, use_aio, O_DIRECT", "direct-fd", "use_aio"),
    ("POSIX plug-in, use_posix_aio", "fd", "use_posix_aio"),
)


def _cases(site: Site) -> Iterator[Case]:
    for number, (what, way, option) in enumerate(_WAYS):
        for place in Place:
            path = site.directory(place, "nixl") / f"{number}.bin"
            yield Case(what, place, partial(site.drive, "nixl", str(path), way, option))


PEER: Final = Peer("nixl", "NIXL", "torch", lambda _: _VERSION, _cases)


# --- in the peer's venv


def main() -> None:
    """Write a file through NIXL and read it back."""
    from nixl._api import nixl_agent, nixl_agent_config

    path, way, option = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    agent = nixl_agent(_NAME, nixl_agent_config(backends=[]))
    agent.create_backend("POSIX", {option: "true"} if option else {})
    data = pattern(_CHUNK * _CHUNKS, path.name)
    with mmap.mmap(-1, len(data)) as memory:
        memory[:] = data
        move = partial(_move, agent, _address(memory), path, way)
        written = rate_mib_s(len(data), partial(move, "WRITE"))
        found = agent.query_memory([(0, 0, 0, str(path))], "POSIX", "FILE")
        require(bool(found[0]), "query_memory does not find the file that was written")
        require(path.read_bytes() == data, "a plain read of the file gives other bytes")
        memory[:] = bytes(len(data))
        read = rate_mib_s(len(data), partial(move, "READ"))
        require(memory[:] == data, "NIXL reads other bytes than it wrote")
    tell({"write MiB/s": written, "read MiB/s": read})


def _address(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def _move(agent: Any, address: int, path: Path, way: str, verb: str) -> None:
    fd, device, about = -1, 7, ""
    if way.endswith("fd"):
        flags = os.O_RDWR | os.O_CREAT | (os.O_DIRECT if way.startswith("direct") else 0)
        device = fd = os.open(path, flags, 0o644)
    else:
        about = f"rw,create{',direct' if way.startswith('direct') else ''}:{path}"
    nbytes = _CHUNK * _CHUNKS
    memory = agent.register_memory([(address, nbytes, 0, "")], "DRAM")
    file = agent.register_memory([(0, nbytes, device, about)], "FILE")
    starts = range(0, nbytes, _CHUNK)
    handle = agent.initialize_xfer(
        verb,
        agent.get_xfer_descs([(address + start, _CHUNK, 0) for start in starts], "DRAM"),
        agent.get_xfer_descs([(start, _CHUNK, device) for start in starts], "FILE"),
        _NAME,
    )
    state = agent.transfer(handle)
    while state == "PROC":
        state = agent.check_xfer_state(handle)
    require(state == "DONE", f"{verb} ended in state {state}")
    agent.release_xfer_handle(handle)
    agent.deregister_memory(file)
    agent.deregister_memory(memory)
    if fd >= 0:
        os.close(fd)


if __name__ == "__main__":
    main()
