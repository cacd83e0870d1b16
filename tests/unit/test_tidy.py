"""tools/tidy.py: each rule finds what it is for, and nothing else."""

import ast
import subprocess
from pathlib import Path

import pytest

from tools import tidy

MARK = "FIX" + "ME"
LATER = "TO" + "DO"


def messages(findings: object) -> list[str]:
    return [finding.message for finding in findings]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        ("a.py", "x = 1\n" + "#" * 101, ["101 columns, at most 100"]),
        ("a.py", "#" * 100, []),
        ("a.py", "x = 'caf\u00e9'", ["not ASCII"]),
        ("a.md", "caf\u00e9", []),
        ("a.md", "x" * 101, []),
        ("a.md", "text \n", ["space at the end of the line"]),
        ("a.pyi", "#" * 101, []),
        ("a.c", f"/* {MARK} */", ["unfinished: finish it, or name an issue, as in (#12)"]),
        ("a.c", f"/* {LATER} later */", ["unfinished: finish it, or name an issue, as in (#12)"]),
        ("a.c", f"/* {LATER}(#12) later */", []),
        ("Makefile", "all: \n", ["space at the end of the line"]),
        ("a.py", "\n" * 601, ["601 lines, at most 800"]),
    ],
)
def test_text(path: str, text: str, expected: list[str]) -> None:
    assert messages(tidy.check_text(path, text)) == expected


def test_long_file_warns_then_fails() -> None:
    warning = list(tidy.check_text("a.py", "\n" * 800))
    assert [finding.is_warning for finding in warning] == [True]
    assert "warning" in str(warning[0])
    failure = list(tidy.check_text("a.py", "\n" * 801))
    assert [finding.is_warning for finding in failure] == [False]


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("# One\n\n## Two\n", 0),
        ("# One\n```sh\n# a comment\n```\n", 0),
        ("# One\n# Two\n", 1),
        ("## Two\n", 1),
    ],
)
def test_markdown_has_one_h1(text: str, count: int) -> None:
    assert len(list(tidy.check_markdown("a.md", text))) == count


def test_python_function_length() -> None:
    def function(lines: int) -> ast.Module:
        return ast.parse("@decorated\ndef f():\n" + "    pass\n" * (lines - 1))

    assert not list(tidy.check_functions("a.py", function(70)))
    assert messages(tidy.check_functions("a.py", function(71))) == ["f: 71 lines, at most 70"]


def test_c_function_length() -> None:
    def function(lines: int) -> str:
        return "int f(void)\n{\n" + "    x++;\n" * (lines - 2) + "}\n"

    table = "static const int table[] =\n{\n" + "    1,\n" * 90 + "};\n"
    assert not list(tidy.check_c("a.c", table + function(70)))
    assert messages(tidy.check_c("a.c", function(71))) == ["function body of 71 lines, at most 70"]


def test_module_rules() -> None:
    good = ast.parse('"""Does it.\n\nLayer: L1.\n"""\n')
    bad = ast.parse('"""Does it."""\nprint(1)\n')
    assert not list(tidy.check_module("kvfs/a.py", good))
    assert messages(tidy.check_module("kvfs/a.py", bad)) == [
        "module docstring has no line 'Layer: ...'",
        "print; use logging",
    ]
    assert len(list(tidy.check_module("kvfs/cli/a.py", bad))) == 1


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ("UsageError('no such thing')", []),
        ("UsageError(f'{n} bytes are too many')", []),
        ("errors.UsageError(\"'x' is no name\")", []),
        ("UsageError('`x` is no name')", []),
        ("UsageError('4 KiB are too few')", []),
        ("UsageError('O_DIRECT is refused')", []),
        ("UsageError('KV cache of another model')", []),
        ("ValueError('Not ours.')", []),
        ("UsageError('No such thing')", ["error message starts in upper case: 'No such thing'"]),
        ("UsageError(f'No {n}')", ["error message starts in upper case: 'No '"]),
        ("UsageError('no such thing.')", ["error message ends with a period"]),
        ("UsageError(f'no such {n}.')", ["error message ends with a period"]),
        ("UsageError('and so on...')", []),
    ],
)
def test_error_messages(call: str, expected: list[str]) -> None:
    errors = tidy.error_classes(ast.parse("class KvfsError: ...\nclass UsageError: ...\n"))
    assert messages(tidy.check_messages("a.py", ast.parse(call), errors)) == expected


def test_unreached_modules() -> None:
    trees = {
        "kvfs/__init__.py": ast.parse(""),
        "kvfs/a.py": ast.parse("from kvfs import b"),
        "kvfs/b.py": ast.parse("import kvfs.c\nimport kvfs.b"),
        "kvfs/c.py": ast.parse("RUN = 'kvfs.d'"),
        "kvfs/d.py": ast.parse(""),
        "kvfs/e.py": ast.parse("import kvfs.e"),
        "kvfs/f.py": ast.parse(""),
        "tests/t.py": ast.parse("from kvfs.f import g"),
    }
    package = [path for path in trees if path.startswith("kvfs/")]
    unreached = list(tidy.check_reachable(package, trees, {"kvfs.a"}))
    assert [finding.path for finding in unreached] == ["kvfs/e.py"]


def test_entry_points() -> None:
    text = """
[project]
name = "x"
[project.scripts]
x = "x.cli:main"
[project.entry-points."some.plugins"]
y = "x.plug:load"
"""
    assert tidy.entry_points(text) == {"x.cli", "x.plug"}


def test_tree(tmp_path: Path) -> None:
    (tmp_path / "kvfs").mkdir()
    (tmp_path / "native" / "vendor").mkdir(parents=True)
    (tmp_path / "kvfs" / "errors.py").write_text('"""E.\n\nLayer: L0.\n"""\nclass KvfsError: ...\n')
    (tmp_path / "kvfs" / "a.py").write_text(
        '"""A.\n\nLayer: L1.\n"""\nfrom kvfs.errors import KvfsError\nKvfsError("Bad")\n'
    )
    (tmp_path / "native" / "vendor" / "x.h").write_text("x" * 200)
    (tmp_path / "image.bin").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "gone.py").write_text("")
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "x"\nscripts = {x = "kvfs.a:m"}\n')
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    subprocess.run(["git", "add", "."], cwd=tmp_path, check=True)
    (tmp_path / "gone.py").unlink()
    names = tidy.tracked_files(tmp_path)
    assert names == ["image.bin", "kvfs/a.py", "kvfs/errors.py", "pyproject.toml"]
    findings = list(tidy.check_tree(tmp_path, names))
    assert [str(finding) for finding in findings] == [
        "kvfs/a.py:6: error message starts in upper case: 'Bad'"
    ]
