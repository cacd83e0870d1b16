"""Views of what lies on a DAX device: maps of the character device itself.

Layer: tool.
"""

from typing import Final

import numpy as np

import kvfs
from lab.inside import devices
from lab.inside.tools import StepError
from tests.crash.victim import SPACE

_BLOCK: Final = 64 << 10
_COUNT: Final = 40  # 2.5 MiB: more than a map's granularity
_SIZE: Final = "size=64MiB&segment=16MiB"


def view() -> dict[str, int]:
    """Put neighbouring blocks, view them without a copy, and compare.

    Raises:
        StepError: The view copied, or shows other bytes.
    """
    root = devices.nvme() / "pool-view"
    data = np.random.default_rng(1).integers(0, 256, (_COUNT, _BLOCK), np.uint8)
    with kvfs.create_pool(root, [f"dax:{devices.nvdimm()}?{_SIZE}"]) as pool:
        space = pool.namespace(SPACE, kvfs.Layout("uint8", (_BLOCK // 4,), 4, model="view"))
        keys, _ = space.keys(np.arange(4 * _COUNT, dtype=np.uint32))
        space.put(keys, data)
        with space.view(keys[3:]) as found:
            if not found.is_zero_copy:
                raise StepError("a view of neighbouring blocks on DAX is a copy")
            if not (found.numpy(shape=(_COUNT - 3, _BLOCK)) == data[3:]).all():
                raise StepError("a view shows other bytes than were put")
    kvfs.destroy_pool(root)
    return {"blocks": _COUNT - 3, "KiB each": _BLOCK >> 10}
