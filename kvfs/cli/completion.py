"""Completion scripts for shells, made from the parser.

Layer: L5.
"""

import argparse
import textwrap
from collections.abc import Iterator, Sequence

from kvfs.errors import UsageError

SHELLS = ("bash", "zsh")

_BASH = """\
_{function}() {{
    local word path= candidates=
    for word in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
        case "$path/$word" in
{moves}
        esac
    done
    case "$path" in
{words}
    esac
    COMPREPLY=($(compgen -W "$candidates" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -o default -F _{function} {program}
"""
_HEAD = """\
# completion of kvfs-admin and kvfs for bash; load it with: source <(kvfs-admin completion bash)
"""
_ZSH = """\
#compdef kvfs-admin kvfs
# completion of kvfs-admin and kvfs for zsh; load it with: source <(kvfs-admin completion zsh)
autoload -Uz compinit bashcompinit
(( $+functions[compdef] )) || compinit
bashcompinit
"""


def completion_script(parsers: Sequence[argparse.ArgumentParser], shell: str) -> str:
    """Return the script for a shell that completes these programs.

    Raises:
        UsageError: No such shell.
    """
    if shell not in SHELLS:
        raise UsageError(f"no completion for {shell!r}: expected {' or '.join(SHELLS)}")
    head = _HEAD if shell == "bash" else _ZSH
    return head + "".join(_function(parser) for parser in parsers)


def _function(parser: argparse.ArgumentParser) -> str:
    """Return the bash function that completes one program."""
    moves, words = [], []
    for path, found in _walk(parser, ""):
        if path:
            moves.append(f"            {path}) path={path} ;;")
        words.append(f'        "{path}") candidates="')
        words += textwrap.wrap(" ".join(_candidates(found)), 80, break_on_hyphens=False)
        words.append('            " ;;')
    return _BASH.format(
        moves="\n".join(moves), words="\n".join(words),
        program=parser.prog, function=parser.prog.replace("-", "_"),
    )  # fmt: skip


def _walk(
    parser: argparse.ArgumentParser, path: str
) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Yield every parser with its words joined by '/'."""
    yield path, parser
    for name, child in _children(parser).items():
        yield from _walk(child, f"{path}/{name}")


def _children(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def _candidates(parser: argparse.ArgumentParser) -> list[str]:
    words = list(_children(parser))
    for action in parser._actions:
        words += [option for option in action.option_strings if option.startswith("--")]
        if action.choices and not isinstance(action, argparse._SubParsersAction):
            words += [str(choice) for choice in action.choices]
    return words
