"""The help texts: golden files, one per command; each says where it runs and how it exits."""

import argparse
import subprocess
import sys
from collections.abc import Iterator

import pytest

from kvfs.cli import admin, kvfs
from tests.cli.helpers import golden

PARSERS = {"kvfs-admin": admin.make_parser, "kvfs": kvfs.make_parser}


def walk(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from walk(child)


def commands() -> list[argparse.ArgumentParser]:
    return [parser for make in PARSERS.values() for parser in walk(make())]


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="argparse formats otherwise from 3.13 on")
@pytest.mark.parametrize("prog", [parser.prog for parser in commands()])
def test_help(prog):
    (parser,) = [parser for parser in commands() if parser.prog == prog]
    golden(f"help/{prog.replace(' ', '-')}.txt", parser.format_help())


def leaves() -> list[argparse.ArgumentParser]:
    return [parser for parser in walk(admin.make_parser()) if parser.get_default("handler")]


@pytest.mark.parametrize("prog", [parser.prog for parser in leaves()])
def test_every_command_says_where_and_how(prog):
    (parser,) = [parser for parser in leaves() if parser.prog == prog]
    assert parser.epilog is not None
    assert "exit codes: 0 done" in parser.epilog
    command = parser.get_default("command")
    assert prog == f"kvfs-admin {command}"
    if command not in ("version", "completion"):
        assert parser.epilog.startswith(("online", "offline")), parser.epilog


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion(shell, capsys):
    assert admin.main(["completion", shell]) == 0
    golden(f"completion.{shell}", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["co"], {"context", "completion"}),
        (["pool", ""], {"create", "status", "list", "destroy"}),
        (["pool", "status", "--js"], {"--json"}),
        (["--json", "inspect", "s"], {"superblock", "segment", "summary"}),
        (["completion", "z"], {"zsh"}),
        (["kvfs", "ser"], {"serve"}),
        (["kvfs", "serve", "--js"], set()),
        (["kvfs", "serve", "--log-format", "j"], {"json"}),
    ],
)
def test_completion_in_bash(words, expected, capsys):
    admin.main(["completion", "bash"])
    script = capsys.readouterr().out
    function = "_kvfs_admin"
    if words[0] == "kvfs":
        function, words = "_kvfs", words[1:]
    line = " ".join(f"'{word}'" for word in ["program", *words])
    script += (
        f"COMP_WORDS=({line}); COMP_CWORD={len(words)}; {function}\n"
        'printf "%s\\n" "${COMPREPLY[@]}"\n'
    )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    found = {word for word in done.stdout.split() if not word.startswith("--") or "--js" in words}
    assert found == expected
