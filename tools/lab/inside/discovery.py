"""`device scan` and `device show` on real devices.

Layer: tool.
"""

import json
from typing import Any

from lab.inside import devices
from lab.inside.tools import StepError, call


def scan(where: str) -> dict[str, Any]:
    """Bring up all devices, and look for each in the list; `where` says what volatile CXL is.

    Raises:
        StepError: One is missing, or has another URL.
    """
    fsdax, nvme = devices.fsdax(), devices.nvme()
    urls = {f"dax:{devices.nvdimm()}", f"dax:{devices.cxl_persistent()}", f"pmem:{fsdax}/kvfs",
            f"dir:{nvme}/kvfs"}  # fmt: skip
    node = None
    if where == "dax":
        urls.add(f"dax:{devices.cxl_volatile()}")
    else:
        node = f"node{devices.online_volatile()}"
    found = json.loads(call("kvfs-admin device scan --json"))["found"]
    kinds = [one["kind"] for one in found]
    counts = {"dax": 3, "cxl-region": 2, "cxl-memdev": 2, "pmem-namespace": 3, "nvme": 1}
    counts |= {} if node is None else {"node": 1}
    wrong = {kind: kinds.count(kind) for kind in counts if kinds.count(kind) != counts[kind]}
    if wrong:
        raise StepError(f"expected {counts}, found {wrong}: {found}")
    if missing := urls - {one["url"] for one in found}:
        raise StepError(f"no {min(missing)} in the list: {[one['url'] for one in found]}")
    if node is not None:
        (one,) = [one for one in found if one["kind"] == "node"]
        if one["name"] != node or not one["url"].startswith(f"cxl:node={node[4:]}?size="):
            raise StepError(f"expected {node} with a URL to paste, found {one}")
    return {"found": len(found), "with a URL": sum(bool(one["url"]) for one in found)}


def show() -> dict[str, Any]:
    """Ask the drive below a directory for its wear.

    Raises:
        StepError: It is not told.
    """
    url = f"dir:{devices.nvme()}/kvfs"
    wear = json.loads(call(f"kvfs-admin device show --json {url}"))["wear"]
    unknown = [name for name in ("percentage_used", "host_bytes_written", "media_errors")
               if wear[name] is None]  # fmt: skip
    if unknown or wear["drive"] != "/dev/nvme0" or not wear["host_bytes_written"]:
        raise StepError(f"not told: {', '.join(unknown) or 'the drive, or its writes'}: {wear}")
    return {
        "percentage used": wear["percentage_used"], "media errors": wear["media_errors"],
        "written by hosts": wear["host_bytes_written"],
    }  # fmt: skip
