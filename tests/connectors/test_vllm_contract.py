"""The plug-in against vLLM's interface as recorded; options; the entry point."""

import importlib
import inspect
import sys
from pathlib import Path
from typing import Any

import pytest
from vllm_interface import NAMES, record

from kvfs.connectors import vllm_plugin
from kvfs.connectors.vllm_metrics import COUNTERS
from kvfs.connectors.vllm_options import Options
from kvfs.errors import UsageError
from tests.connectors import fake_vllm
from tests.connectors.engine_bench import Bench


def overrides(made: type, base: type) -> list[str]:
    """Names that a class has from itself and its base class has, too."""
    return [name for name in vars(made) if not name.startswith("__") and hasattr(base, name)]


def require_fits(made: type, base: type, name: str) -> None:
    """Whoever calls the method as the base class has it can call this one."""
    theirs, mine = getattr(base, name), getattr(made, name)
    if callable(theirs):
        wanted = inspect.signature(theirs).parameters
        given = inspect.signature(mine).parameters
        assert list(given)[: len(wanted)] == list(wanted), f"{name}: {list(given)}"
        for extra in list(given)[len(wanted) :]:
            assert given[extra].default is not inspect.Parameter.empty, f"{name}: {extra}"


def test_tier_overrides_what_it_must(bench: Bench) -> None:
    base, made = bench.vllm.SecondaryTierManager, bench.module.KvfsTier
    assert base.__abstractmethods__
    assert made.__abstractmethods__ == frozenset()
    names = overrides(made, base)
    assert base.__abstractmethods__ <= set(names)
    for name in names:
        require_fits(made, base, name)
    # Public names that vLLM does not know are a spelling mistake, but for what 0.33 added.
    unknown = {name for name in vars(made) if not name.startswith("_")} - set(names)
    assert unknown <= {"config_info", "config_info_keys"}


def test_spec_and_worker_override_what_they_must(bench: Bench) -> None:
    spec = importlib.import_module("kvfs.connectors.vllm_spec")
    for made, base in (
        (spec.KvfsSpec, bench.vllm.OffloadingSpec),
        (spec.CopyingWorker, bench.vllm.OffloadingWorker),
    ):
        assert base.__abstractmethods__ <= set(vars(made))
        for name in overrides(made, base):
            require_fits(made, base, name)


def test_every_counter_is_described(bench: Bench) -> None:
    described = bench.module.KvfsTier.build_metric_definitions({})
    assert set(described) == {f"vllm:kvfs_{name}" for name in COUNTERS}
    assert all(isinstance(one, bench.vllm.OffloadingCounterMetadata) for one in described.values())


def test_another_vllm_is_refused_with_a_reason(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = importlib.import_module("vllm.v1.kv_offload.base")
    monkeypatch.delattr(base, "Medium")
    for name in ("vllm", "vllm_compat"):
        monkeypatch.delitem(sys.modules, f"kvfs.connectors.{name}")
    with pytest.raises(ImportError, match=r"does not fit this vLLM: .*Medium.*0\.32 and 0\.33"):
        importlib.import_module("kvfs.connectors.vllm")


def test_plugin_registers_short_names(bench: Bench) -> None:
    vllm_plugin.register()
    vllm_plugin.register()
    for factory, (name, module, class_name) in (
        (bench.vllm.SecondaryTierFactory, vllm_plugin.TIER),
        (bench.vllm.OffloadingSpecFactory, vllm_plugin.SPEC),
    ):
        assert factory._registry == {name: (module, class_name)}
        assert hasattr(importlib.import_module(module), class_name)


def test_plugin_never_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = fake_vllm.install(monkeypatch, "0.33")
    monkeypatch.delattr(modules["SecondaryTierFactory"], "register_tier")
    vllm_plugin.register()
    for name in [name for name in sys.modules if name.startswith("vllm.")]:
        monkeypatch.delitem(sys.modules, name)
    vllm_plugin.register()


def test_options_and_their_defaults() -> None:
    options = Options.parse({"pool": "/p", "load_deadline_s": 2, "locality": "REMOTE"})
    assert (options.pool, options.durability, options.load_deadline_s) == ("/p", "async", 2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "'pool' is missing: .*pool create"),
        ({"pool": ""}, "pool is empty"),
        ({"pool": 3}, "pool must be str, found 3"),
        ({"pool": "p", "root_dir": "x"}, "unknown option 'root_dir'; known: pool, namespace, dur"),
        ({"pool": "p", "durability": "fsync"}, "durability must be one of 'none', 'async', 'sync'"),
        ({"pool": "p", "retention": "x"}, "retention must be one of 'cache', 'durable'; found 'x'"),
        ({"pool": "p", "locality": "here"}, "locality must be one of 'LOCAL', 'REMOTE'"),
        ({"pool": "p", "load_threads": 0}, "load_threads must be positive: 0"),
        ({"pool": "p", "load_threads": 1.5}, "load_threads must be int, found 1.5"),
        ({"pool": "p", "load_threads": True}, "load_threads must be int, found True"),
        ({"pool": "p", "contexts_max": -1}, "contexts_max must not be negative"),
        ({"pool": "p", "namespace": "a/b"}, "namespace must be up to 64 letters"),
        ({"pool": "p", "context_directory": "/"}, "context_directory is empty"),
        ({"pool": "p", "enable_kv_events": 1}, "enable_kv_events must be bool, found 1"),
    ],
)
def test_wrong_options_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Options.parse(given)


def test_wrong_options_leave_nothing_behind(bench: Bench) -> None:
    with pytest.raises(UsageError, match="unknown option 'socket'"):
        bench.tier(socket="/run/kvfs.sock")


def test_recordings_are_read_from_source(tmp_path: Path) -> None:
    for module, names in NAMES.items():
        path = tmp_path.joinpath(*module.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(f"class {name}(Base):\n    x: int = 1" for name in names))
    (tmp_path / "vllm/v1/kv_offload/factory.py").write_text(
        "@final\nclass OffloadingSpecFactory:\n    _registry: ClassVar[dict] = {}\n    y: str\n"
        "    @classmethod\n    def register_spec(cls, name: str, *, module: str = 'm'): ...\n"
    )
    found = record(tmp_path)["vllm.v1.kv_offload.factory"]["OffloadingSpecFactory"]
    assert found == {
        "bases": [], "decorators": ["final"],
        "fields": {"_registry": {"default": "{}", "of_class": True},
                   "y": {"default": None, "of_class": False}},
        "methods": {"register_spec": {"parameters": "cls, name, *, module='m'",
                                      "decorators": ["classmethod"]}},
    }  # fmt: skip
    (tmp_path / "vllm/v1/kv_offload/factory.py").write_text("")
    with pytest.raises(KeyError, match=r"kv_offload\.factory has no OffloadingSpecFactory"):
        record(tmp_path)
