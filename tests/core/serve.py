"""An owner that a core started again: `python -m tests.core.serve JSON`.

JSON: files {name: content} with their inodes in order, `handles_path` to report the open handles
to, `die` to end at once.
"""

import json
import os
import sys
import time
from pathlib import Path

from tests.core.owner import HANDLES, HELLO, VERSION, FakeOwner


def main() -> None:
    config = json.loads(sys.argv[1])
    if config.get("die"):
        os._exit(3)
    owner = FakeOwner.inherited()
    owner.next_fh = 10_000
    for name, content in config["files"].items():
        owner.add(name, content.encode())
    if config.get("serve_after"):
        time.sleep(config["serve_after"])
    owner.call(HELLO, VERSION)
    number, payload = owner.call(HANDLES, 0)
    Path(config["handles_path"]).write_text(json.dumps([number, payload.hex(), os.getpid()]))
    owner.serve()
    print("served", sorted({request.opcode for request in owner.seen}), file=sys.stderr)


if __name__ == "__main__":
    main()
