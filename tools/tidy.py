"""House rules that no ready-made linter knows; run by `make lint`.

Layer: tool.

    source               at most 100 columns, ASCII, no unfinished-work marks
    every text file      no space at the end of lines
    Python               functions of at most 70 lines, files of at most 800 (a warning above 600)
    kvfs/                no print outside cli, demo and bench; a module docstring with its layer;
                         every module is imported by another or is an entry point; messages of
                         errors start in lower case and end without a period
    C                    functions of at most 70 lines
    Markdown             one H1 per document

- It reads; it never changes a file. Exit status 1 when a rule is broken, 0 with warnings alone.
"""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

COLUMNS_MAX: Final = 100
FUNCTION_LINES_MAX: Final = 70
FILE_LINES_MAX: Final = 800
FILE_LINES_WARN: Final = 600

_SOURCE: Final = {".py", ".pyi", ".c", ".h", ".sh", ".toml", ".cmake"}
_SOURCE_NAMES: Final = {"Makefile", "CMakeLists.txt", "run"}
_PRINTERS: Final = ("kvfs/cli/", "kvfs/demo/", "kvfs/bench/")
_SKIPPED: Final = ("native/vendor/", "tests/compat/images/")
# Written apart, so that this file obeys its own rule.
_MARKS: Final = re.compile(r"\b(?:FIX" + r"ME|XX" + r"X)\b|\bTO" + r"DO\b(?!\(#\d+\))")
_ACRONYM: Final = re.compile(r"[A-Z0-9_]{2,}\b|[A-Z]\w*_\w*")


@dataclass(frozen=True, slots=True)
class Finding:
    """One broken rule. Lines count from 1."""

    path: str
    line: int
    message: str
    is_warning: bool = False

    def __str__(self) -> str:
        kind = "warning: " if self.is_warning else ""
        return f"{self.path}:{self.line}: {kind}{self.message}"


def is_source(path: str) -> bool:
    """Say whether a file is code (ASCII only), as opposed to prose."""
    pure = PurePosixPath(path)
    return pure.suffix in _SOURCE or pure.name in _SOURCE_NAMES


def check_text(path: str, text: str) -> Iterator[Finding]:
    """Check the rules for any text: columns, ASCII, marks, length, space at line ends."""
    lines = text.splitlines()
    is_code = is_source(path)
    for number, line in enumerate(lines, 1):
        # Stubs of the native core carry long signatures; ruff does not hold them to it either.
        if is_code and len(line) > COLUMNS_MAX and not path.endswith(".pyi"):
            yield Finding(path, number, f"{len(line)} columns, at most {COLUMNS_MAX}")
        if is_code and not line.isascii():
            yield Finding(path, number, "not ASCII")
        if is_code and _MARKS.search(line):
            yield Finding(path, number, "unfinished: finish it, or name an issue, as in (#12)")
        if line != line.rstrip():
            yield Finding(path, number, "space at the end of the line")
    if is_code and len(lines) > FILE_LINES_WARN:
        is_warning = len(lines) <= FILE_LINES_MAX
        yield Finding(path, 1, f"{len(lines)} lines, at most {FILE_LINES_MAX}", is_warning)


def check_markdown(path: str, text: str) -> Iterator[Finding]:
    """Check that a document has exactly one H1, outside its code blocks."""
    headings, is_fenced = [], False
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            is_fenced = not is_fenced
        elif not is_fenced and line.startswith("# "):
            headings.append(number)
    if len(headings) != 1:
        yield Finding(path, headings[1] if headings else 1, f"{len(headings)} H1, expected one")


def check_c(path: str, text: str) -> Iterator[Finding]:
    """Check the length of functions: from a brace in column 0 after ')' to its end."""
    start, before = 0, ""
    for number, line in enumerate(text.splitlines(), 1):
        if line == "{" and before.rstrip().endswith(")"):
            start = number
        elif line.startswith("}") and start:
            if (count := number - start + 1) > FUNCTION_LINES_MAX:
                message = f"function body of {count} lines, at most {FUNCTION_LINES_MAX}"
                yield Finding(path, start, message)
            start = 0
        before = line


def check_functions(path: str, tree: ast.Module) -> Iterator[Finding]:
    """Check the length of functions, docstring included, decorators not."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            count = (node.end_lineno or node.lineno) - node.lineno + 1
            if count > FUNCTION_LINES_MAX:
                message = f"{node.name}: {count} lines, at most {FUNCTION_LINES_MAX}"
                yield Finding(path, node.lineno, message)


def check_module(path: str, tree: ast.Module) -> Iterator[Finding]:
    """Check what holds for the modules of kvfs: docstring with layer, no print."""
    docstring = ast.get_docstring(tree) or ""
    if not re.search(r"^Layer: \S", docstring, re.MULTILINE):
        yield Finding(path, 1, "module docstring has no line 'Layer: ...'")
    if path.startswith(_PRINTERS):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _called(node) == "print":
            yield Finding(path, node.lineno, "print; use logging")


def check_messages(path: str, tree: ast.Module, errors: set[str]) -> Iterator[Finding]:
    """Check the first argument of every error made: lower case, no final period."""
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and _called(node) in errors and node.args):
            continue
        first, last = _message_ends(node.args[0])
        if first[:1].isupper() and not _ACRONYM.match(first):
            yield Finding(path, node.lineno, f"error message starts in upper case: {first[:30]!r}")
        if last.endswith(".") and not last.endswith(".."):
            yield Finding(path, node.lineno, "error message ends with a period")


def _called(node: ast.Call) -> str:
    if isinstance(node.func, ast.Attribute):
        return node.func.attr
    return node.func.id if isinstance(node.func, ast.Name) else ""


def _message_ends(node: ast.expr) -> tuple[str, str]:
    """Return how a literal or f-string starts and ends; empty where a value stands."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value, node.value
    if isinstance(node, ast.JoinedStr) and node.values:
        return _message_ends(node.values[0])[0], _message_ends(node.values[-1])[1]
    return "", ""


def error_classes(tree: ast.Module) -> set[str]:
    """Return the names of the classes in kvfs/errors.py."""
    return {node.name for node in tree.body if isinstance(node, ast.ClassDef)}


def module_name(path: str) -> str:
    """Return 'a.b' for 'a/b.py' and 'a' for 'a/__init__.py'."""
    return ".".join(PurePosixPath(path).with_suffix("").parts).removesuffix(".__init__")


def check_reachable(
    package: Iterable[str], trees: dict[str, ast.Module], known: set[str]
) -> Iterator[Finding]:
    """Check that every module of the package is imported by another file, or is known.

    Args:
        package: Paths of the modules that must be reached.
        trees: All Python files by path; tools for tests are reached from tests.
        known: Modules that are run or loaded from outside.

    A module named in a string ('kvfs.demo.restore', run with -m) counts as used.
    """
    used = set(known)
    for path, tree in trees.items():
        used |= set(_mentioned(tree)) - {module_name(path)}
    for path in package:
        if not path.endswith(("__init__.py", "__main__.py")) and module_name(path) not in used:
            yield Finding(path, 1, "nothing imports this module")


def _mentioned(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def entry_points(pyproject: str) -> set[str]:
    """Return the modules that pyproject.toml names as scripts or plug-ins."""
    table = tomllib.loads(pyproject).get("project", {})
    groups = [table.get("scripts", {}), *table.get("entry-points", {}).values()]
    return {target.partition(":")[0] for group in groups for target in group.values()}


def tracked_files(root: Path) -> list[str]:
    """List the files that git has or would add, without vendored ones and those gone."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    output = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout
    names = sorted(name for name in output.split("\0") if name and not name.startswith(_SKIPPED))
    return [name for name in names if (root / name).is_file()]


def check_tree(root: Path, names: Iterable[str]) -> Iterator[Finding]:
    """Check files below `root`; `names` are relative to it."""
    trees: dict[str, ast.Module] = {}
    for name in names:
        try:
            text = (root / name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a binary fixture
        yield from check_text(name, text)
        if name.endswith(".md"):
            yield from check_markdown(name, text)
        elif name.endswith((".c", ".h")):
            yield from check_c(name, text)
        elif name.endswith(".py"):
            trees[name] = ast.parse(text, name)
            yield from check_functions(name, trees[name])
    package = {name: tree for name, tree in trees.items() if name.startswith("kvfs/")}
    errors = error_classes(package.get("kvfs/errors.py", ast.parse("")))
    for name, tree in package.items():
        yield from check_module(name, tree)
        yield from check_messages(name, tree, errors)
    project = root / "pyproject.toml"
    known = entry_points(project.read_text()) if project.exists() else set()
    yield from check_reachable(package, trees, known)


def main() -> int:
    """Check the repository this file lies in; print what is wrong."""
    root = Path(__file__).resolve().parents[1]
    findings = list(check_tree(root, tracked_files(root)))
    for finding in findings:
        sys.stdout.write(f"{finding}\n")
    broken = sum(not finding.is_warning for finding in findings)
    if broken:
        sys.stdout.write(f"tidy: {broken} broken rules\n")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
