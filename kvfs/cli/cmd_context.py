"""`kvfs-admin context`: list, show, drop.

Layer: L5.
"""

import argparse
import os
from collections.abc import Callable
from typing import Any, Final

from kvfs.admin import messages as msg
from kvfs.cli.console import DASH, Column, Console, as_fields, confirm, counted
from kvfs.cli.options import AddCommand, add_changing, add_command
from kvfs.cli.runner import EXIT_WRONG, exit_codes
from kvfs.cli.session import asking, find_pool

_ORDERS: Final[dict[str, Callable[[msg.ContextAnswer], Any]]] = {
    "size": lambda context: (-context.size_bytes, context.name),
    "name": lambda context: context.name,
    "age": lambda context: (context.modified_ns, context.name),
}
_COLUMNS: Final = (
    Column("size", True), Column("blocks", True), Column("tokens", True), Column("made by"),
    Column("modified"), Column("name"),
)  # fmt: skip


def add(verbs: AddCommand) -> None:
    """Define the verbs."""
    listing = add_command(
        verbs, "list", list_contexts, "context list",
        "List contexts: the files of the mount.",
        f"online and offline; {exit_codes(2, 10, 11, 13, 14)}",
    )  # fmt: skip
    listing.add_argument(
        "--sort", choices=sorted(_ORDERS), default="name",
        help="largest first, by name, or oldest first (default: %(default)s)",
    )  # fmt: skip
    listing.add_argument("--namespace", default="", metavar="NAME", help="only of this namespace")
    listing.add_argument(
        "--limit", type=int, default=100_000, metavar="N",
        help="read at most so many, in order of their names (default: %(default)s)",
    )  # fmt: skip
    show = add_command(
        verbs, "show", show_context, "context show",
        "Show one context: its size, layout, and how much of it lies where.",
        f"online and offline; {exit_codes(2, 10, 11, 13, 14)}",
    )  # fmt: skip
    show.add_argument("name", metavar="NAME", help="as 'context list' shows it: namespace/path")
    drop = add_command(
        verbs, "drop", drop_contexts, "context drop",
        "Remove contexts. The blocks of files go at once; those of contexts made through the API "
        "stay as cache until they are evicted, for other contexts may share them.",
        f"online and offline; {exit_codes(2, 3, 10, 11, 13, 14, 16)}",
    )  # fmt: skip
    drop.add_argument("names", nargs="+", metavar="NAME", help="as 'context list' shows it")
    add_changing(drop, is_destructive=True)


def list_contexts(arguments: argparse.Namespace, console: Console) -> int:
    """Ask, sort, print."""
    question = msg.ContextList(os.fsencode(arguments.namespace), max(1, arguments.limit))
    with asking(find_pool(arguments), console) as ask:
        answer: msg.ContextListAnswer = ask(question)
    answer.contexts.sort(key=_ORDERS[arguments.sort])
    if answer.is_truncated:
        console.say(f"there are more than {arguments.limit}; see --limit and --namespace")
    if console.is_json:
        console.put_json("context list", as_fields(answer))
        return 0
    rows = [
        (
            console.size(context.size_bytes), str(context.blocks), str(context.tokens or DASH),
            context.origin + (", pinned" if context.is_pinned else ""),
            console.time(context.modified_ns), context.name,
        )
        for context in answer.contexts
    ]  # fmt: skip
    console.table(_COLUMNS, rows)
    return 0


def show_context(arguments: argparse.Namespace, console: Console) -> int:
    """Ask and print."""
    with asking(find_pool(arguments), console) as ask:
        answer: msg.ContextShowAnswer = ask(msg.ContextShow(os.fsencode(arguments.name)))
    if console.is_json:
        console.put_json("context show", as_fields(answer))
        return 0
    context = answer.context
    lines = [
        ("name", context.name),
        ("namespace", f"{context.namespace} ({answer.retention})"),
        ("made by", context.origin + (", pinned" if context.is_pinned else "")),
        ("size", console.size(context.size_bytes)),
        ("blocks", f"{context.blocks} of {console.size(answer.block_bytes)}"),
        ("resident", f"{answer.resident_blocks} leading blocks"),
        (
            "tokens",
            f"{context.tokens}, {answer.block_tokens} per block" if context.tokens else DASH,
        ),
        ("modified", console.time(context.modified_ns)),
        ("layout", f"{answer.fingerprint[:16]} {answer.layout}"),
        ("first key", answer.first_key or DASH),
        ("last key", answer.last_key or DASH),
    ]
    for title, text in lines:
        console.put(f"{title:>9}   {text}")
    if answer.places:
        console.put("")
        rows = [
            (str(place.tier), place.device, str(place.blocks), console.size(place.stored_bytes))
            for place in answer.places
        ]
        columns = (Column("tier"), Column("device"), Column("blocks", True), Column("stored", True))
        console.table(columns, rows)
    return 0


def drop_contexts(arguments: argparse.Namespace, console: Console) -> int:
    """Plan, print, ask, drop what the plan says."""
    is_dry = arguments.dry_run
    with asking(find_pool(arguments), console) as ask:
        plan: msg.DropPlan = ask(
            msg.ContextDropPlan([os.fsencode(name) for name in arguments.names])
        )
        nbytes = sum(item.size_bytes for item in plan.items)
        if not console.is_json:
            verb = "would drop" if is_dry else "dropping"
            console.put(f"{verb} {counted(len(plan.items), 'context')}, {console.size(nbytes)}:")
            for item in plan.items:
                pinned = ", pinned" if item.is_pinned else ""
                console.put(f"  {item.name}: {counted(item.blocks, 'block')}, "
                            f"{console.size(item.size_bytes)}{pinned}")  # fmt: skip
        done = msg.ContextDropAnswer([], [])
        if is_dry:
            console.say("nothing was changed")
        else:
            confirm(console, ask(msg.Hello()).pool_name, is_yes=arguments.yes)
            done = ask(msg.ContextDrop(plan))
    for name in done.skipped:
        console.say(f"skipped, it has changed since the plan was made: {name}")
    if console.is_json:
        fields = as_fields(done)
        fields["plan"] = as_fields(plan)["items"]
        fields["size_bytes"] = nbytes
        fields["is_dropped"] = not is_dry
        console.put_json("context drop", fields)
    return EXIT_WRONG if done.skipped else 0
