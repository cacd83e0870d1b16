"""The lock tables of ARCHITECTURE.md: every lock of the package has a row, every row a lock."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
LOCKS = ("Lock", "RLock")
NOT_PYTHON = ("_native.Index", "_native.AccessRing", "_native.LeasePage")


def locks_in(source: str) -> Iterator[str]:
    """Yield `Class.attribute` of every lock made, or the name alone outside of classes."""
    tree = ast.parse(source)
    owners = {
        child: node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
            continue
        made = {
            child.attr
            for child in ast.walk(node.value)
            if isinstance(child, ast.Attribute) and ast.unparse(child.value) == "threading"
        }
        if made.intersection(LOCKS):
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            name = ast.unparse(target).removeprefix("self.")
            yield f"{owners[node]}.{name}" if node in owners else name


def test_every_lock_is_in_a_table() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    section = text.partition("\n## Locks")[2].partition("\n## ")[0]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| ")]
    listed = {name for cell in cells for name in re.findall(r"`([\w.]+[.][\w]+)`", cell)}
    made = {
        lock
        for path in (ROOT / "kvfs").rglob("*.py")
        for lock in locks_in(path.read_text(encoding="ascii"))
    }
    assert len(made) >= 18
    known = {name.removeprefix("fuse.mount.") for name in listed} - {"kvfs.lock", *NOT_PYTHON}
    assert made - known == set()
    assert known - made == set()
