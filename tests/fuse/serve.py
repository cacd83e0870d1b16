"""A process that mounts a pool, for tests: `python -m tests.fuse.serve JSON`.

Prints `ready` when the mount answers. Warnings and errors go to standard error.
"""

import json
import logging
import sys

import kvfs
from kvfs.config import PoolOptions
from kvfs.fuse.mount import MountOptions, mount


def main() -> int:
    config = json.loads(sys.argv[1])
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s %(message)s")
    options = PoolOptions(**config.get("pool_options", {}))
    if config.get("devices"):
        pool = kvfs.create_pool(config["pool"], config["devices"], options=options)
    else:
        pool = kvfs.open_pool(config["pool"], options=options)
    with pool:
        mount(
            pool,
            config["mountpoint"],
            options=MountOptions(**config.get("mount_options", {})),
            on_ready=lambda: print("ready", flush=True),
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
