"""docs/OPERATIONS.md: its table of metrics is the list, its messages are those of the code."""

import ast
import os
import re
from pathlib import Path

import yaml

from kvfs.metric_list import DEFINITIONS

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/OPERATIONS.md"
BEGIN, END = "<!-- metrics: ", "<!-- end of metrics -->"


def table() -> str:
    lines = ["| metric | kind | labels | |", "|---|---|---|---|"]
    for each in DEFINITIONS:
        labels = ", ".join(f"`{label}`" for label in each.labels)
        lines.append(f"| `{each.name}` | {each.kind} | {labels} | {each.help} |")
    return "\n".join(lines) + "\n"


def literals() -> str:
    """Return every string of the package, the parts of f-strings included."""
    found = []
    for path in (ROOT / "kvfs").rglob("*.py"):
        nodes = ast.walk(ast.parse(path.read_text(encoding="ascii")))
        constants = [node.value for node in nodes if isinstance(node, ast.Constant)]
        found += [value for value in constants if isinstance(value, str)]
    return "\n".join(found)


def section(title: str) -> str:
    return PAGE.read_text().partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def test_metrics():
    text = PAGE.read_text()
    head, _, rest = text.partition(BEGIN)
    comment, _, rest = rest.partition("\n")
    shown, _, tail = rest.partition(END)
    if os.environ.get("KVFS_UPDATE_GOLDEN") == "1":
        PAGE.write_text(f"{head}{BEGIN}{comment}\n{table()}{END}{tail}")
        shown = table()
    assert shown == table(), "run with KVFS_UPDATE_GOLDEN=1"


def test_messages_are_those_of_the_code():
    messages = re.findall(r"^\| `([^`]+)` \| ", section("Troubleshooting"), re.MULTILINE)
    assert len(messages) > 20
    known = literals()
    assert [message for message in messages if message not in known] == []


def test_alerts_are_those_of_the_rules():
    rules = yaml.safe_load((ROOT / "contrib/prometheus/alerts.yml").read_text())
    names = {rule["alert"] for rule in rules["groups"][0]["rules"]}
    assert set(re.findall(r"`(Kvfs\w+)`", section("Alerts"))) == names
