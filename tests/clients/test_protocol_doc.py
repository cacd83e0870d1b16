"""docs/PROTOCOL.md names every message, and states the bounds that the code has."""

import inspect
import re
from pathlib import Path

import msgspec

from kvfs.clients import channel, regions, server, session
from kvfs.clients import messages as msg
from kvfs.config import PoolOptions
from kvfs.engine.holds import LEASE_SLOTS

TEXT = (Path(__file__).parents[2] / "docs/PROTOCOL.md").read_text()


def test_every_message_is_named() -> None:
    structs = {
        name
        for name, kind in inspect.getmembers(msg, inspect.isclass)
        if issubclass(kind, msgspec.Struct) and kind.__module__ == msg.__name__
    } - {"Request"}
    assert structs - set(re.findall(r"`(\w+)`", TEXT)) == set()


def test_every_request_has_an_answer_and_is_answered() -> None:
    requests = set(msg.AnyRequest.__args__)
    assert requests == set(msg.ANSWERS)
    assert requests - set(session._HANDLERS) == {msg.Hello, msg.Join}


def test_bounds() -> None:
    mine = PoolOptions().client_shared_bytes
    for text in (
        f"Version: {msg.VERSION}.",
        f"| {msg.REQUEST_BYTES_MAX >> 20} MiB each |",
        f"| keys in a message | {msg.KEYS_MAX:,} |",
        f"| segments asked for at once | {msg.PLACES_MAX} |",
        f"| descriptors with a message | {channel.FDS_MAX};",
        f"| {msg.REGIONS_MAX} |",
        f"| places in a lease page | {LEASE_SLOTS:,} |",
        f"| {server.SESSIONS_MAX}, {server.CONNECTIONS_MAX:,} |",
        f"| {server.USER_SESSIONS_MAX}, {server.USER_CONNECTIONS_MAX} |",
        f"| {server.TIMEOUT_S:.0f} s |",
        f"| {regions.USER_FILES_MAX:,}, `PoolOptions.client_shared_bytes` ({mine >> 40} TiB) |",
        f"| {regions.SHARED_BYTES_MAX >> 40} TiB |",
    ):
        assert text in TEXT, text
