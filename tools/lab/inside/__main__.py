"""The command that the guest starts with: run the steps of a job, and tell what came of each.

Layer: tool.

    python -m lab.inside JOB
"""

import json
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from lab.inside import cut
from lab.inside.steps import STEPS
from lab.inside.tools import CannotError, Port, StepError


def main() -> int:
    """Run the job; the exit status is the number of steps that failed."""
    job = json.loads(Path(sys.argv[1]).read_text())
    port = Port()
    if "command" in job:
        return subprocess.run(job["command"], check=False).returncode
    if "tallies" in job:
        cut.run(port, job["tallies"], is_last=job["is_last"])
        return 0
    failed = 0
    for what, where in job["steps"]:
        sys.stderr.write(f"lab: {what}, {where}\n")
        start = time.monotonic()
        told = _step(what, where, port)
        failed += told["result"] == "failed"
        port.tell(event="row", what=what, where=where, **told,
                  seconds=round(time.monotonic() - start, 1))  # fmt: skip
    return failed


def _step(what: str, where: str, port: Port) -> dict[str, Any]:
    try:
        return {"result": "ok", "figures": STEPS[what](where, port), "reason": ""}
    except CannotError as error:
        return {"result": "cannot", "figures": {}, "reason": str(error)}
    except StepError as error:
        return {"result": "failed", "figures": {}, "reason": str(error)}
    except Exception as error:  # noqa: BLE001  whatever it is, it is a row, and the rest goes on
        traceback.print_exc()
        return {"result": "failed", "figures": {}, "reason": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    sys.exit(main())
