"""Completion scripts for shells, made from the parser.

Layer: L5.
"""

import argparse
import textwrap
from collections.abc import Iterator

from kvfs.errors import UsageError

SHELLS = ("bash", "zsh")

_BASH = """\
# kvfs-admin completion for bash; load it with: source <(kvfs-admin completion bash)
_kvfs_admin() {{
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
complete -o default -F _kvfs_admin kvfs-admin
"""
_ZSH = """\
#compdef kvfs-admin
# kvfs-admin completion for zsh; load it with: source <(kvfs-admin completion zsh)
autoload -Uz compinit bashcompinit
(( $+functions[compdef] )) || compinit
bashcompinit
"""


def completion_script(parser: argparse.ArgumentParser, shell: str) -> str:
    """Return the script for a shell.

    Raises:
        UsageError: No such shell.
    """
    if shell not in SHELLS:
        raise UsageError(f"no completion for {shell!r}: expected {' or '.join(SHELLS)}")
    moves, words = [], []
    for path, found in _walk(parser, ""):
        if path:
            moves.append(f"            {path}) path={path} ;;")
        words.append(f'        "{path}") candidates="')
        words += textwrap.wrap(" ".join(_candidates(found)), 80, break_on_hyphens=False)
        words.append('            " ;;')
    script = _BASH.format(moves="\n".join(moves), words="\n".join(words))
    return script if shell == "bash" else _ZSH + script


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
