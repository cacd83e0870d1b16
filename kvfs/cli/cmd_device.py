"""`kvfs-admin device`: list.

Layer: L5.
"""

import argparse

from kvfs.admin import messages as msg
from kvfs.cli.cmd_pool import print_devices
from kvfs.cli.console import Console, as_fields
from kvfs.cli.options import AddCommand, add_command
from kvfs.cli.runner import exit_codes
from kvfs.cli.session import asking, find_pool


def add(verbs: AddCommand) -> None:
    """Define the verbs."""
    add_command(
        verbs, "list", list_devices, "device list",
        "List the devices of a pool, fastest tier first, and where they are.",
        f"online and offline; {exit_codes(10, 11, 13, 14)}",
    )  # fmt: skip


def list_devices(arguments: argparse.Namespace, console: Console) -> int:
    """Ask and print."""
    with asking(find_pool(arguments), console) as ask:
        answer: msg.DeviceListAnswer = ask(msg.DeviceList())
    if console.is_json:
        console.put_json("device list", as_fields(answer))
    else:
        print_devices(answer.devices, console, with_places=True)
    return 0
