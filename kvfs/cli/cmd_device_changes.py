"""`kvfs-admin device`: add, offline, online, evacuate, remove.

Layer: L5.
"""

import argparse
import os
from typing import Final

from kvfs.admin import messages as msg
from kvfs.cli.console import Console, as_fields, confirm, counted
from kvfs.cli.options import AddCommand, add_changing, add_command
from kvfs.cli.progress import Progress
from kvfs.cli.runner import EXIT_WRONG, exit_codes
from kvfs.cli.session import Ask, asking, find_pool

_STEP_BYTES: Final = 64 << 20
_STATES: Final = {
    "offline": "Take a device out of service. It takes no writes, also after a restart, and what "
    "lies there is read as before.",
    "online": "Take a device into service again, and count its failures from zero.",
}
_PATIENCE_S: Final = 600.0  # memory that is added is populated, and a step waits for its disks


def add(verbs: AddCommand) -> None:
    """Define the verbs."""
    adding = add_command(
        verbs, "add", add_device, "device add",
        "Format a device and take it into the pool. Refuses one that holds a pool already.",
        f"online and offline; {exit_codes(2, 10, 11, 12, 13, 14, 16)}",
    )  # fmt: skip
    adding.add_argument("url", metavar="URL", help="as for 'pool create'; 'device scan' lists some")
    add_changing(adding, is_destructive=False)
    for verb, text in _STATES.items():
        parser = add_command(verbs, verb, set_device, f"device {verb}", text,
                             f"online and offline; {exit_codes(10, 11, 13, 14)}")  # fmt: skip
        parser.add_argument("device", metavar="NAME")
        parser.set_defaults(is_online=verb == "online")
    evacuating = add_command(
        verbs, "evacuate", evacuate, "device evacuate",
        "Take a device out of service and copy what lies there alone to the others, which may "
        "evict for it. Goes on where it was if it is run again. Raw files stay.",
        f"online and offline; {exit_codes(3, 10, 11, 12, 13, 14, 16)}",
    )  # fmt: skip
    evacuating.add_argument("device", metavar="NAME")
    add_changing(evacuating, is_destructive=False)
    removing = add_command(
        verbs, "remove", remove, "device remove",
        "Take a device out of the pool for good, and delete what kvfs made there. Refused while it "
        "holds what no other device has; 'device evacuate' comes first.",
        f"online and offline; {exit_codes(2, 10, 11, 13, 14, 16)}",
    )  # fmt: skip
    removing.add_argument("device", metavar="NAME")
    removing.add_argument(
        "--allow-data-loss", action="store_true",
        help="drop blocks that lie there alone, and the names of files that need them",
    )  # fmt: skip
    add_changing(removing, is_destructive=True)


def add_device(arguments: argparse.Namespace, console: Console) -> int:
    """Ask for it and print."""
    question = msg.DeviceAdd(os.fsencode(arguments.url), is_dry=arguments.dry_run)
    with asking(find_pool(arguments), console, timeout_s=_PATIENCE_S) as ask:
        done: msg.DeviceAddAnswer = ask(question)
    if console.is_json:
        console.put_json("device add", as_fields(done))
    else:
        verb = "added" if done.is_added else "would add"
        console.put(f"{verb} {done.name}: {done.kind}, tier {done.tier}, "
                    f"{console.size(done.capacity_bytes)} in segments of "
                    f"{console.size(done.segment_bytes)}: {done.url}")  # fmt: skip
        console.say("nothing was changed" if arguments.dry_run else "it takes writes")
    return 0


def set_device(arguments: argparse.Namespace, console: Console) -> int:
    """Ask for it and print."""
    with asking(find_pool(arguments), console) as ask:
        done: msg.DeviceSetAnswer = ask(msg.DeviceSet(arguments.device, arguments.is_online))
    if console.is_json:
        console.put_json(arguments.command, as_fields(done))
    else:
        console.put(f"{done.name} is {console.paint(done.state)}")
        if done.state == "offline":
            console.say(
                f"it is read as before; to empty it: 'kvfs-admin device evacuate {done.name}'"
            )
    return 0


def evacuate(arguments: argparse.Namespace, console: Console) -> int:
    """Ask for steps until nothing is left, or only what is being read."""
    name = arguments.device
    with asking(find_pool(arguments), console, timeout_s=_PATIENCE_S) as ask:
        before: msg.DeviceEvacuateAnswer = ask(msg.DeviceEvacuate(name, _STEP_BYTES, is_dry=True))
        last, blocks, moved = before, 0, 0
        if not arguments.dry_run:
            last, blocks, moved = _empty(ask, name, before.left_bytes, console)
    fields = {**as_fields(last), "moved_blocks": blocks, "moved_bytes": moved,
              "is_empty": not last.left_segments and not last.raw_files}  # fmt: skip
    if console.is_json:
        console.put_json("device evacuate", fields)
    elif arguments.dry_run:
        console.put(f"would move up to {console.size(before.left_bytes)} in "
                    f"{counted(before.left_segments, 'segment')} away from {name}")  # fmt: skip
        console.say("nothing was changed")
    else:
        console.put(f"moved {counted(blocks, 'block')}, {console.size(moved)} away from {name}")
    if last.raw_files:
        console.say(f"{counted(last.raw_files, 'raw file')} stay there: copy them to other names")
    if arguments.dry_run:
        return 0
    if last.left_segments:
        why = "being read" if last.held_segments else "not given back by the device"
        console.say(f"{counted(last.left_segments, 'segment')} {why}; run it again later")
        return EXIT_WRONG
    console.say(f"evacuated; now 'kvfs-admin device remove {name}'")
    return EXIT_WRONG if last.raw_files else 0


def _empty(
    ask: Ask, name: str, total_bytes: int, console: Console
) -> tuple[msg.DeviceEvacuateAnswer, int, int]:
    """Return the last answer, and blocks and bytes moved in all."""
    blocks = moved = 0
    left = 1 << 32
    with Progress(console, f"evacuate {name}") as progress:
        while True:
            done: msg.DeviceEvacuateAnswer = ask(msg.DeviceEvacuate(name, _STEP_BYTES))
            blocks, moved = blocks + done.moved_blocks, moved + done.moved_bytes
            progress(total_bytes - done.left_bytes, total_bytes)
            is_stuck = not done.moved_blocks and done.left_segments >= left
            if not done.left_segments or is_stuck:
                return done, blocks, moved
            left = done.left_segments


def remove(arguments: argparse.Namespace, console: Console) -> int:
    """Plan, print, ask, remove."""
    name = arguments.device
    with asking(find_pool(arguments), console, timeout_s=_PATIENCE_S) as ask:
        plan: msg.DeviceRemoveAnswer = ask(msg.DeviceRemove(name, is_dry=True))
        if not console.is_json:
            verb = "would remove" if arguments.dry_run else "removing"
            console.put(f"{verb} device {name} ({plan.url}) from pool {plan.pool_name}:")
            console.put(f"  {counted(plan.block_count, 'block')}, {console.size(plan.live_bytes)} "
                        f"lie there, of which {plan.lost_blocks} would be LOST")  # fmt: skip
        done = plan
        if arguments.dry_run:
            console.say("nothing was changed")
        else:
            if plan.lost_blocks and arguments.allow_data_loss:
                confirm(console, plan.pool_name, is_yes=arguments.yes)
            done = ask(msg.DeviceRemove(name, allow_data_loss=arguments.allow_data_loss))
            console.say(f"removed {name}")
    if console.is_json:
        console.put_json("device remove", as_fields(done))
    return 0
