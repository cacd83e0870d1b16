"""What vLLM calls in each of its processes: the entry point `vllm.general_plugins`.

Layer: L5.

It makes short names known: the tier "kvfs" and the spec "KvfsSpec". Nothing needs them: dotted
names work without. So it fails never, whatever has become of vLLM's registries.
"""

import logging
from typing import Final

_log = logging.getLogger("kvfs.vllm")
TIER: Final = ("kvfs", "kvfs.connectors.vllm", "KvfsTier")
SPEC: Final = ("KvfsSpec", "kvfs.connectors.vllm_spec", "KvfsSpec")


def register() -> None:
    """Make the names known; more than once is once."""
    try:
        from vllm.v1.kv_offload.factory import OffloadingSpecFactory
        from vllm.v1.kv_offload.tiering.factory import SecondaryTierFactory

        for add, names in (
            (SecondaryTierFactory.register_tier, TIER),
            (OffloadingSpecFactory.register_spec, SPEC),
        ):
            try:
                add(*names)
            except ValueError:  # registered already
                continue
    except Exception as error:  # noqa: BLE001 - a plug-in must not keep vLLM from starting
        _log.info("short names are not known to this vLLM, use module_path: %s", error)
