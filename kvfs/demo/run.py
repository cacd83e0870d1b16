"""`kvfs demo`: a context computed once, then used by processes that never computed it.

Layer: L5.

1. A server process opens a pool, mounts it, computes a long prompt and stores its KV as a context.
2. Tools of the system look at the file.
3. A new process maps the file and goes on decoding: the same tokens, or the demo fails.
4. The server answers a second prompt that begins alike: only its tail is computed and stored.
5. The server is killed (SIGKILL), the pool mounted again, and step 3 done again.

Whatever happens, Ctrl-C included, children end, the mount goes and the temporary directory goes.
"""

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

import kvfs
from kvfs.demo import prompts, report
from kvfs.demo.model import MODEL_NAME, now_ns, require
from kvfs.demo.process import (
    Child,
    held_interrupts,
    signals_as_interrupts,
    unmount,
    workplace,
)
from kvfs.demo.serve import CONTEXT_NAMES, NAMESPACE
from kvfs.errors import DataError, KvfsError, UnavailableError, UsageError
from kvfs.units import GIB, format_bytes, format_duration

DRAM_BYTES: Final = "1GiB"
DIRECTORY_BYTES: Final = "2GiB"
_FREE_BYTES_MIN: Final = 3 * GIB
_COMMAND_SECONDS: Final = 60.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `kvfs demo`."""
    parser.add_argument(
        "--tokens", type=int, default=64, metavar="N", help="tokens to decode (default 64)"
    )
    parser.add_argument(
        "--threads", type=int, default=min(2, os.cpu_count() or 1), metavar="N",
        help="threads of torch in each process (default 2)",
    )  # fmt: skip
    parser.add_argument(
        "--directory", default=None, metavar="DIR",
        help="where the temporary pool goes (default: the system's directory for such)",
    )  # fmt: skip


def main(arguments: argparse.Namespace) -> int:
    """Run the demo; returns the exit status."""
    try:
        _check_machine(arguments)
        with signals_as_interrupts(), workplace(arguments.directory) as root:
            _run(root, arguments)
    except KeyboardInterrupt:
        sys.stderr.write("\ndemo: interrupted; everything was cleaned up\n")
        return 130
    except KvfsError as error:
        sys.stderr.write(f"demo: {error}\n")
        return error.exit_code
    return 0


def _check_machine(arguments: argparse.Namespace) -> None:
    require()
    if arguments.tokens < 1 or arguments.threads < 1:
        raise UsageError("--tokens and --threads must be at least 1")
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        raise UnavailableError(
            "no access to /dev/fuse; load the fuse module, or give the container "
            "--device /dev/fuse --cap-add SYS_ADMIN"
        )
    folder = arguments.directory or tempfile.gettempdir()
    if not os.path.isdir(folder):
        raise UsageError(f"no such directory: {folder}")
    free = shutil.disk_usage(folder).free
    if free < _FREE_BYTES_MIN:
        raise UsageError(
            f"not enough space in {folder}: {format_bytes(free)} free, the demo needs "
            f"{format_bytes(_FREE_BYTES_MIN)}; name another place with --directory"
        )


def _run(root: Path, arguments: argparse.Namespace) -> None:
    options = [f"--tokens={arguments.tokens}", f"--threads={arguments.threads}"]
    pool, mountpoint = root / "pool", root / "mount"
    devices = [f"dram:?size={DRAM_BYTES}", f"dir:{root}/blocks?size={DIRECTORY_BYTES}"]
    report.heading(1, f"a pool of two tiers: {devices[0]}, {devices[1]}")
    kvfs.create_pool(pool, devices).close()
    report.say("    and a server process that mounts it and loads the model")
    with Child(["-m", "kvfs.demo.serve", str(pool), str(mountpoint), *options]) as server:
        loaded = server.answer()
        report.say(f"    {MODEL_NAME} loaded in {format_duration(loaded['load_ns'])}")
        cold = _compute(server)
        _look(mountpoint)
        restored = _restore(mountpoint, options, cold, 4)
        shared = _share(server)
        report.heading(6, f"kill -9 {server.pid}: the server, owner of pool and mount")
        server.kill()
    with contextlib.ExitStack() as stack:
        recovered = _mount_again(stack, pool, mountpoint)
        again = _restore(mountpoint, options, cold, 7)
    report.say()
    report.say(report.table(report.rows(cold, restored, shared, again, recovered)))


def _compute(server: Child) -> dict[str, Any]:
    report.heading(2, "the server computes a long prompt from nothing and stores its KV")
    cold = server.ask(prompts.COLD)
    report.say(
        f"    {cold['prompt_tokens']} tokens, first answer token after "
        f"{format_duration(cold['first_ns'])}; stored {format_bytes(cold['bytes_stored'])} "
        f"in {cold['blocks_stored']} blocks, {format_duration(cold['store_ns'])}"
    )
    report.quote(cold["text"])
    return cold


def _look(mountpoint: Path) -> None:
    report.heading(3, "what the system sees of it")
    name = f"{NAMESPACE}/{CONTEXT_NAMES[prompts.COLD]}"
    report.show(["ls", "-l", os.path.dirname(name)], str(mountpoint))
    report.show(["getfattr", "-d", name], str(mountpoint))
    report.show(["df", "-h", "."], str(mountpoint))


def _restore(
    mountpoint: Path, options: list[str], cold: dict[str, Any], number: int
) -> dict[str, Any]:
    """Run the restoring process and insist on the cold run's tokens.

    Raises:
        DataError: The tokens differ.
    """
    report.heading(
        number, "a new process maps the file and goes on; it computes one token, not all"
    )
    file = mountpoint / NAMESPACE / CONTEXT_NAMES[prompts.COLD]
    with Child(["-m", "kvfs.demo.restore", str(file), *options]) as child:
        restored = child.answer()
    if restored["tokens"] != cold["tokens"]:
        pairs = zip(cold["tokens"], restored["tokens"], strict=False)
        first = next((i for i, (a, b) in enumerate(pairs) if a != b), len(restored["tokens"]))
        raise DataError(f"restored run differs from the cold run from token {first} on")
    report.say(
        f"    pid {restored['pid']}: mapped {format_bytes(restored['bytes'])} in "
        f"{format_duration(restored['mapped_ns'])}, first token after "
        f"{format_duration(restored['first_ns'])}"
    )
    report.say(f"    {len(restored['tokens'])} tokens, identical to the cold run")
    return restored


def _share(server: Child) -> dict[str, Any]:
    report.heading(5, "a second prompt that begins alike: only its tail is computed and stored")
    shared = server.ask(prompts.SHARED)
    report.say(
        f"    {shared['shared_tokens']} of {shared['prompt_tokens']} tokens were there "
        f"({shared['shared_blocks']} of {shared['blocks']} blocks), "
        f"{shared['computed_tokens']} computed, first token after "
        f"{format_duration(shared['first_ns'])} "
        f"(cold: {format_duration(shared['cold_first_ns'])})"
    )
    report.say(
        f"    stored {shared['blocks_stored']} blocks, {format_bytes(shared['bytes_stored'])}; "
        f"shared {shared['blocks_deduplicated']} blocks, "
        f"{format_bytes(shared['bytes_deduplicated'])}"
    )
    report.quote(shared["text"])
    return shared


def _mount_again(stack: contextlib.ExitStack, pool: Path, mountpoint: Path) -> dict[str, int]:
    """Mount the pool by the command line, and count what came back.

    Returns:
        recovery_ns, from the start of the command until the first context is there; the blocks of
        both contexts, and how many of them were lost.

    Raises:
        UnavailableError: The command failed, or the context is not there.
    """
    started_ns = now_ns()
    unmount(mountpoint)  # what the dead process left
    stack.callback(_kvfs, "umount", str(mountpoint))
    if _kvfs("mount", str(pool), str(mountpoint)):
        raise UnavailableError("the pool could not be mounted again; see above")
    files = [mountpoint / NAMESPACE / CONTEXT_NAMES[name] for name in CONTEXT_NAMES]
    try:
        size = files[0].stat().st_size
        recovery_ns = now_ns() - started_ns
        blocks = sum(int(os.getxattr(file, "user.kvfs.blocks")) for file in files)
        held = sum(int(os.getxattr(file, "user.kvfs.resident_blocks")) for file in files)
    except OSError as error:
        raise UnavailableError(f"a context did not come back: {error}") from error
    report.say(
        f"    kvfs mount: {files[0].relative_to(mountpoint)} is there again, "
        f"{format_bytes(size)}, after {format_duration(recovery_ns)}"
    )
    report.say(f"    {blocks - held} of {blocks} blocks of both contexts lost")
    return {"recovery_ns": recovery_ns, "blocks": blocks, "lost_blocks": blocks - held}


def _kvfs(*words: str) -> int:
    """Run the command `kvfs` to its end, whatever signal comes; return its exit status."""
    command = [sys.executable, "-m", "kvfs.cli.kvfs", *words]
    with held_interrupts():
        try:
            return subprocess.run(
                command,
                stdout=subprocess.DEVNULL,
                check=False,
                start_new_session=True,
                timeout=_COMMAND_SECONDS,
            ).returncode
        except subprocess.TimeoutExpired:
            raise UnavailableError(
                f"no end after {_COMMAND_SECONDS:.0f} s: kvfs {' '.join(words)}"
            ) from None
