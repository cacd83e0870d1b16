"""What kvfs's plug-in uses of vLLM, read from vLLM's sources without running them.

Layer: tool.

    python tools/vllm_interface.py DIRECTORY > tests/connectors/vllm-VERSION.json

DIRECTORY has the package `vllm` in it: site-packages, or an unzipped wheel. The recordings in
tests/connectors stand for vLLM in `make test`, which has no room for the real thing: its wheel has
336 MB and needs torch. `make interop PEER=vllm` compares them with the wheels.

Of a class: bases, decorators, fields with their defaults, and each method's parameters and
decorators. Defaults are source text.
"""

import ast
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

# Base classes before those that derive from them.
NAMES: Final[dict[str, tuple[str, ...]]] = {
    "vllm.v1.kv_offload.base": (
        "Locality", "LookupResult", "Medium", "OffloadPolicy", "OffloadingMetricMetadata",
        "OffloadingCounterMetadata", "OffloadingEvent", "OffloadingKVEventsConfig",
        "OffloadingSpec", "OffloadingWorker", "ReqContext", "RequestOffloadingContext",
        "ScheduleEndContext", "TransferResult", "get_offload_group_idx", "make_offload_key",
    ),
    "vllm.v1.kv_offload.config": (
        "OffloadingCacheConfig", "OffloadingConfig", "OffloadingGroupConfig",
        "OffloadingModelConfig", "OffloadingParallelConfig",
    ),
    "vllm.v1.kv_offload.file_mapper": ("FileMapper",),
    "vllm.v1.kv_offload.factory": ("OffloadingSpecFactory",),
    "vllm.v1.kv_offload.cpu.shared_offload_region": ("SharedOffloadRegion",),
    "vllm.v1.kv_offload.tiering.base": ("JobResult", "SecondaryTierManager", "TransferJob"),
    "vllm.v1.kv_offload.tiering.factory": ("SecondaryTierFactory",),
    "vllm.v1.kv_offload.tiering.spec": ("TieringOffloadingSpec",),
    "vllm.v1.kv_hints.protocol": ("KvHintAction", "KvHintsEnvelope"),
    "vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics": (
        "OffloadingConnectorStats",
    ),
}  # fmt: skip


def record(root: Path) -> dict[str, Any]:
    """Return the interface of the vLLM below a directory.

    Raises:
        KeyError: It lacks something that the plug-in uses.
    """
    return {module: dict(_of_module(root, module, names)) for module, names in NAMES.items()}


def _of_module(root: Path, module: str, names: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    path = root.joinpath(*module.split(".")).with_suffix(".py")
    body = {
        node.name: node
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef | ast.FunctionDef)
    }
    for name in names:
        if name not in body:
            raise KeyError(f"{module} has no {name}")
        node = body[name]
        yield name, _of_class(node) if isinstance(node, ast.ClassDef) else _of_function(node)


def _of_class(node: ast.ClassDef) -> dict[str, Any]:
    fields, methods = {}, {}
    for item in node.body:
        if isinstance(item, ast.FunctionDef):
            methods[item.name] = _of_function(item)
        elif isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            if item.value is not None or "ClassVar" not in ast.unparse(item.annotation):
                fields[item.target.id] = {
                    "default": None if item.value is None else ast.unparse(item.value),
                    "of_class": "ClassVar" in ast.unparse(item.annotation),
                }
        elif isinstance(item, ast.Assign) and isinstance(item.targets[0], ast.Name):
            fields[item.targets[0].id] = {"default": ast.unparse(item.value), "of_class": True}
    return {
        "bases": [ast.unparse(base) for base in node.bases],
        "decorators": [ast.unparse(one) for one in node.decorator_list],
        "fields": fields,
        "methods": methods,
    }


def _of_function(node: ast.FunctionDef) -> dict[str, Any]:
    bare = ast.parse(ast.unparse(node)).body[0]
    assert isinstance(bare, ast.FunctionDef)
    arguments = bare.args
    everything = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    for argument in [*everything, arguments.vararg, arguments.kwarg]:
        if argument is not None:
            argument.annotation = None
    return {
        "parameters": ast.unparse(arguments),
        "decorators": [ast.unparse(one) for one in node.decorator_list],
    }


def main() -> int:
    """Print a recording."""
    if len(sys.argv) != 2:
        sys.stderr.write("usage: vllm_interface.py DIRECTORY\n")
        return 2
    sys.stdout.write(json.dumps(record(Path(sys.argv[1])), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
