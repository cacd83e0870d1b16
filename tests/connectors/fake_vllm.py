"""vLLM as far as the plug-in sees it, made from a recording of the real one.

Classes, fields, members and signatures are the recording's (tools/vllm_interface.py); what methods
do, where a test needs it, is written here. A method that nobody wrote raises.
"""

import abc
import ast
import enum
import json
import sys
import types
from collections.abc import Callable
from dataclasses import field, make_dataclass
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
VERSIONS = ("0.32", "0.33")
_STRUCTS = ("msgspec.Struct",)


def recording(version: str) -> dict[str, Any]:
    return json.loads((HERE / f"vllm-{version}.json").read_text())  # type: ignore[no-any-return]


def install(patch: pytest.MonkeyPatch, version: str) -> dict[str, Any]:
    """Put modules of that version in place of vLLM's; return all recorded names."""
    for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
        patch.delitem(sys.modules, name)
    for name in ("vllm", "vllm_compat", "vllm_spec"):
        patch.delitem(sys.modules, f"kvfs.connectors.{name}", raising=False)
    made: dict[str, Any] = {}
    for module, names in recording(version).items():
        _module(patch, module).__dict__.update(
            {name: _make(name, what, made) for name, what in names.items()}
        )
    platform = types.SimpleNamespace(is_cpu=lambda: True)
    _module(patch, "vllm.platforms").__dict__["current_platform"] = platform
    return made


def _module(patch: pytest.MonkeyPatch, name: str) -> types.ModuleType:
    parent = ""
    for part in name.split("."):
        path = f"{parent}.{part}" if parent else part
        if path not in sys.modules:
            module = types.ModuleType(path)
            module.__path__ = []  # type: ignore[attr-defined]
            patch.setitem(sys.modules, path, module)
        parent = path
    return sys.modules[name]


def _make(name: str, what: dict[str, Any], made: dict[str, Any]) -> Any:
    if "parameters" in what:
        made[name] = _function(name, what, BEHAVIOUR.get(name))
        return made[name]
    methods = {method: _method(name, method, how) for method, how in what["methods"].items()}
    if "Enum" in what["bases"]:
        members = [(key, _value(value["default"])) for key, value in what["fields"].items()]
        made[name] = enum.Enum(
            name, [(key, at if value == "auto()" else value)
                   for at, (key, value) in enumerate(members)],
        )  # fmt: skip
    elif _is_data(what):
        bases = tuple(made[base] for base in what["bases"] if base in made)
        fields = [
            _field(key, value["default"])
            for key, value in what["fields"].items()
            if not value["of_class"]
        ]
        namespace = {key: value for key, value in methods.items() if key != "__post_init__"}
        made[name] = make_dataclass(name, fields, bases=bases, namespace=namespace)
    else:
        bases = tuple(made[base] for base in what["bases"] if base in made) or (abc.ABC,)
        methods.pop("__init_subclass__", None)
        constants = {
            key: _value(value["default"])
            for key, value in what["fields"].items()
            if value["default"] is not None
        }
        made[name] = type(abc.ABC)(name, bases, {**constants, **methods})
    return made[name]


def _is_data(what: dict[str, Any]) -> bool:
    decorators = any(one.split("(")[0] == "dataclass" for one in what["decorators"])
    return decorators or "NamedTuple" in what["bases"] or any(b in _STRUCTS for b in what["bases"])


def _field(name: str, default: str | None) -> Any:
    if default is None:
        return (name, Any)
    if default.startswith("field("):
        call = ast.parse(default, mode="eval").body
        assert isinstance(call, ast.Call)
        options = {one.arg: ast.unparse(one.value) for one in call.keywords}
        factory = {"dict": dict, "list": list}.get(options["default_factory"], float)
        return (name, Any, field(default_factory=factory, init=options.get("init") != "False"))
    value = _value(default)
    return (name, Any, value)


def _value(source: str) -> Any:
    try:
        return ast.literal_eval(source)
    except ValueError:
        return source


def _function(name: str, how: dict[str, Any], behaviour: Callable[..., Any] | None) -> Any:
    """Return a function of that signature, which does what `behaviour` does with its arguments."""

    def call(arguments: dict[str, Any]) -> Any:
        if behaviour is None:
            raise NotImplementedError(f"the fake has no behaviour: {name}")
        more = arguments.pop("kwargs", {})
        return behaviour(**arguments, **more)

    scope: dict[str, Any] = {"_call": call}
    exec(f"def {name}({how['parameters']}): return _call(locals())", scope)
    return scope[name]


def _method(owner: str, name: str, how: dict[str, Any]) -> Any:
    made = _function(name, how, BEHAVIOUR.get(f"{owner}.{name}"))
    decorators = how["decorators"]
    if "abstractmethod" in decorators:
        made = abc.abstractmethod(made)
    if "classmethod" in decorators:
        return classmethod(made)
    if "staticmethod" in decorators:
        return staticmethod(made)
    return property(made) if "property" in decorators else made


# --- what methods do


def _tier_init(self: Any, offloading_spec: Any, primary_kv_view: memoryview, tier_type: str,
               backpressure_detector: Any = None) -> None:  # fmt: skip
    assert primary_kv_view.strides is not None
    self._primary_kv_view = primary_kv_view
    self._block_size_bytes = primary_kv_view.strides[0]
    self.tier_type, self.locality = tier_type, None


def _mapper(cls: Any, root_dir: str, offloading_spec: Any, blocks_per_file: int = 1,
            parallel_agnostic: bool = False) -> Any:  # fmt: skip
    config = offloading_spec.config
    agnostic = parallel_agnostic and config.parallel.is_parallelism_agnostic
    fields = {
        "model_name": config.model.name, "dtype": config.model.dtype,
        "tokens_per_hash": config.cache.tokens_per_hash, "blocks_per_file": blocks_per_file,
        "tp_size": 1 if agnostic else config.parallel.tp_size,
        "kv_cache_groups": [
            {"tokens_per_block": g.tokens_per_block, "layer_names": list(g.layer_names)}
            for g in config.groups
        ],
    }  # fmt: skip
    return types.SimpleNamespace(fields=fields, rank=0 if agnostic else config.parallel.rank)


def _set_position(self: Any, key: bytes, end_token: int) -> None:
    self._offload_key_positions[key] = end_token


def _count(self: Any, counter_name: str, counter_increase_value: int = 1,
           labelvalues: tuple[str, ...] = ()) -> None:  # fmt: skip
    counts = self.__dict__.setdefault("counts", {})
    counts[counter_name] = counts.get(counter_name, 0) + counter_increase_value


def _register(cls: Any, **names: str) -> None:
    name, module, class_name = names.values()
    if name in cls._registry:
        raise ValueError(f"{name} is registered")
    cls._registry[name] = (module, class_name)


BEHAVIOUR: dict[str, Callable[..., Any]] = {
    "SecondaryTierManager.__init__": _tier_init,
    "SecondaryTierManager.block_size_bytes": lambda self: self._block_size_bytes,
    "FileMapper.from_offloading_spec": _mapper,
    "ReqContext.set_offload_key_position": _set_position,
    "ReqContext.get_offload_key_position": lambda self, key: self._offload_key_positions.get(key),
    "OffloadingConnectorStats.increase_counter": _count,
    "SecondaryTierFactory.register_tier": _register,
    "OffloadingSpecFactory.register_spec": _register,
    "make_offload_key": lambda block_hash, group_idx: block_hash + group_idx.to_bytes(4, "big"),
}
