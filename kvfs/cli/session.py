"""Finding the pool a command means, and asking it: its owner if there is one, else by opening it.

Layer: L5. An online question imports neither numpy nor the engine.
"""

import argparse
import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from kvfs.admin import messages as msg
from kvfs.cli.console import Console
from kvfs.cli.runner import set_up_logging
from kvfs.control_client import TIMEOUT_S, ControlClient, owners
from kvfs.errors import NotFoundError, UsageError

POOL_VARIABLE: Final = "KVFS_POOL"
CATALOG_NAME: Final = "catalog.sqlite"
Ask = Callable[[msg.AnyRequest], Any]


def find_pool(arguments: argparse.Namespace) -> Path:
    """Return the directory of the pool that is meant.

    By `--pool`, else by `$KVFS_POOL`, each a path or the name of a pool that is open; else the
    only one that is open.

    Raises:
        NotFoundError: No pool of that name is open.
        UsageError: Nothing says which pool, or the name fits several.
    """
    given = arguments.pool or os.environ.get(POOL_VARIABLE, "")
    if given and ("/" in given or (Path(given) / CATALOG_NAME).exists()):
        return Path(given).absolute()
    entries = owners()
    if given:
        entries = [entry for entry in entries if entry.name == given or entry.uuid == given]
        if not entries:
            raise NotFoundError(f"no pool called {given!r} is open; give its path")
    elif not entries:
        raise UsageError(f"no pool given: use --pool or ${POOL_VARIABLE}; none is open")
    if len(entries) > 1:
        listed = ", ".join(sorted(entry.pool for entry in entries))
        raise UsageError(f"which pool: {len(entries)} are open ({listed}); use --pool")
    return Path(entries[0].pool)


@contextlib.contextmanager
def asking(pool_path: Path, console: Console, *, timeout_s: float | None = None) -> Iterator[Ask]:
    """Yield a function that asks the pool, which is opened for it if nobody owns it.

    `timeout_s`: how long an owner may take for an answer; some seconds when missing.

    Raises:
        NotFoundError: There is no pool.
        BusyError: Its owner has no control socket.
    """
    client = ControlClient.connect(pool_path, timeout_s or TIMEOUT_S)
    if client is not None:
        console.detail(f"asking the owner of {pool_path}")
        with client:
            yield client.ask
        return
    if not (pool_path / CATALOG_NAME).exists():
        raise NotFoundError(
            f"no pool: {pool_path}: make one with 'kvfs-admin --pool {pool_path} pool create'"
        )
    console.detail(f"nobody owns {pool_path}: opening it")
    set_up_logging(is_verbose=console.is_verbose)
    from kvfs.admin.operations import Owner, answer
    from kvfs.lifecycle import open_pool

    with open_pool(pool_path, background=False) as pool:
        yield lambda question: answer(pool, Owner(), question)
