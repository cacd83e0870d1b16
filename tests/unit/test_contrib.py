"""The examples for operators: names they use exist, and what they start can be started so."""

import argparse
import configparser
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from kvfs.cli import kvfs
from kvfs.fuse.core_messages import COUNTERS
from kvfs.metric_list import BY_NAME, CORE_NAMES, DEFINITIONS, series

ROOT = Path(__file__).parents[2]
CONTRIB = ROOT / "contrib"
SERIES = {name: each for each in DEFINITIONS for name in series(each)}
UNITS = sorted((CONTRIB / "systemd").glob("*@.*"))
ADDED_LABELS = {"le", "instance", "job"}  # of histograms, and by Prometheus


def dashboard_queries() -> Iterator[tuple[str, str]]:
    dashboard = json.loads((CONTRIB / "grafana/kvfs.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            yield f"{panel['title']}: {target['legendFormat']}", target["expr"]


def alerts() -> list[dict[str, str]]:
    return yaml.safe_load((CONTRIB / "prometheus/alerts.yml").read_text())["groups"][0]["rules"]


def labels_in(expression: str) -> set[str]:
    """Return the labels that an expression matches or groups by."""
    found = set(re.findall(r"(\w+)\s*(?:=~|!=|!~|=)\s*\"", expression))
    for group in re.findall(r"\bby \(([^)]*)\)", expression):
        found |= {label.strip() for label in group.split(",")}
    return found


def check_expression(expression: str) -> set[str]:
    """Check names and labels; return the metrics."""
    names = set(re.findall(r"\bkvfs_\w+", expression))
    assert names <= SERIES.keys(), names - SERIES.keys()
    known = {label for name in names for label in SERIES[name].labels}
    assert labels_in(expression) <= known | ADDED_LABELS, expression
    return names


def test_definitions_follow_the_rules_of_prometheus():
    assert len(BY_NAME) == len(DEFINITIONS)
    for each in DEFINITIONS:
        assert re.fullmatch(r"kvfs(_[a-z]+)+", each.name)
        assert (each.kind == "counter") == each.name.endswith("_total"), each.name
        assert each.help.endswith("."), each.name
        if each.kind == "histogram":
            assert each.name.endswith("_seconds"), each.name
        assert not ADDED_LABELS & set(each.labels)


def test_every_counter_of_the_core_has_a_name():
    assert CORE_NAMES.keys() == set(COUNTERS)
    assert set(CORE_NAMES.values()) <= BY_NAME.keys()


def test_dashboard():
    queries = list(dashboard_queries())
    assert len(queries) > 20
    used = set()
    for legend, expression in queries:
        names = check_expression(expression)
        assert names, legend
        used |= names
        shown = set(re.findall(r"{{(\w+)}}", legend))
        known = {label for name in names for label in SERIES[name].labels}
        assert shown <= known | ADDED_LABELS, legend
    identities = [
        panel["id"] for panel in json.loads((CONTRIB / "grafana/kvfs.json").read_text())["panels"]
    ]
    assert len(set(identities)) == len(identities)


def test_dashboard_notices_a_name_that_is_not_there():
    with pytest.raises(AssertionError):
        check_expression("rate(kvfs_no_such_thing_total[5m])")
    with pytest.raises(AssertionError):
        check_expression("sum by (nonsense) (kvfs_stored_bytes)")


def test_alerts():
    rules = alerts()
    assert len(rules) >= 5
    for rule in rules:
        check_expression(rule["expr"])
        shown = set(re.findall(r"\$labels\.(\w+)", json.dumps(rule["annotations"])))
        grouped = labels_in(rule["expr"]) | {"instance", "device"}
        assert shown <= grouped, rule["alert"]


def parse(words: list[str]) -> argparse.Namespace:
    """Parse a command line of `kvfs`; one that is wrong raises UsageError."""
    return kvfs.make_parser().parse_args(words)


def section(unit: Path, name: str) -> dict[str, str]:
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(unit)
    return dict(parser[name])


@pytest.mark.parametrize("unit", [unit for unit in UNITS if unit.suffix == ".service"], ids=str)
def test_units_start_what_there_is(unit):
    service = section(unit, "Service")
    text = re.search(r"^Environment=\"?KVFS_OPTIONS=([^\"\n]*)", unit.read_text(), re.MULTILINE)
    assert text is not None
    line = service["ExecStart"].replace("$KVFS_OPTIONS", text[1]).replace("%i", "kv0")
    words = shlex.split(line)
    assert words[0] == "/usr/bin/kvfs"
    arguments = parse(words[1:])
    assert arguments.foreground
    assert arguments.pool == "/var/lib/kvfs/kv0"
    # kvfs-core outlives the owner of a mount, until the next start.
    is_mount = "mount" in unit.name
    assert service["KillMode"] == ("process" if is_mount else "mixed")
    assert is_mount == getattr(arguments, "stay_mounted", False)
    assert service["Type"] == "notify"
    assert int(service["FileDescriptorStoreMax"]) > 1000
    assert service["FileDescriptorStorePreserve"] == "restart"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here")
def test_units_as_systemd_sees_them(tmp_path):
    program = Path(sys.executable).parent / "kvfs"
    names = []
    for unit in UNITS:
        text = unit.read_text().replace("/usr/bin/kvfs", str(program))
        (tmp_path / unit.name).write_text(text)
        instance = tmp_path / unit.name.replace("@.", "@kv0.")
        instance.write_text(text)
        names.append(str(instance))
    done = subprocess.run(
        ["systemd-analyze", "verify", *names], capture_output=True, text=True, check=False
    )
    known_from_254 = "Unknown key 'FileDescriptorStorePreserve' in section [Service], ignoring."
    said = [line for line in done.stderr.splitlines() if not line.endswith(known_from_254)]
    assert (done.returncode, done.stdout, said) == (0, "", [])


def test_daemonset():
    documents = list(yaml.safe_load_all((CONTRIB / "kubernetes/daemonset.yaml").read_text()))
    assert [document["kind"] for document in documents] == ["Namespace", "DaemonSet"]
    pod = documents[1]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    arguments = parse(container["args"])
    (port,) = container["ports"]
    assert arguments.metrics.endswith(f":{port['containerPort']}")
    for probe in ("startupProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["port"] == port["name"]
    volumes = {volume["name"]: volume["hostPath"]["path"] for volume in pod["volumes"]}
    mounted = {each["name"]: each for each in container["volumeMounts"]}
    assert mounted.keys() == volumes.keys()
    assert mounted["mounts"]["mountPropagation"] == "Bidirectional"
    assert container["securityContext"]["privileged"]
    for name, path in (("pools", arguments.pool), ("mounts", arguments.directory)):
        assert path.startswith(volumes[name] + "/")


def test_container():
    text = (CONTRIB / "container/Containerfile").read_text()
    example = re.search(r"kvfs kvfs (serve .*)", text)
    assert example is not None
    assert parse(shlex.split(example[1])).command == "serve"
    assert text.count("\nFROM ") == 2
