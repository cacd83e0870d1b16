"""Numbers of handles and inodes, and requests that take long."""

import dataclasses
import functools
import threading
from typing import Any

import pytest
import trio
import trio.testing
from pyfuse3 import FUSEError

from kvfs.clock import SystemClock
from kvfs.engine.catalog_schema import ROOT_NODE
from kvfs.errors import BusyError, UnavailableError
from kvfs.fuse.handles import (
    FormerHandle,
    Handles,
    Inodes,
    ReadHandle,
    StaticHandle,
    WritingHandle,
    is_version,
    node_of,
)
from kvfs.fuse.places import Places
from kvfs.fuse.requests import BYTES_PER_S_MIN, RequestCounters, Runner, handler
from tests.fuse.mounting import DEADLINE_S

NODE = dataclasses.replace(ROOT_NODE, node_id=(77 << 32) | 5)


class Reader:
    def __init__(self, version: int) -> None:
        self.version = version
        self.raw = None
        self.size_bytes = 5 << 20


def reading(inode: int, version: int, *, is_passthrough: bool = False) -> ReadHandle:
    reader: Any = Reader(version)
    return ReadHandle(inode, NODE, reader, (version, 0, 0), is_passthrough=is_passthrough)


def test_aliases_lead_back_to_their_node() -> None:
    inodes = Inodes()
    node_id = NODE.node_id
    assert inodes.current(node_id) == node_id
    numbers = {node_id}
    for _ in range(31):
        inodes.renumber(node_id)
        inode = inodes.current(node_id)
        assert node_of(inode) == node_id
        assert inode < 1 << 62
        numbers.add(inode)
    assert len(numbers) == 32
    with pytest.raises(BusyError, match="close it"):
        inodes.renumber(node_id)
    # Those that the kernel knows are passed over, and what it forgets can come again.
    inodes.add((1 << 56) | node_id)
    inodes.renumber(node_id)
    assert inodes.current(node_id) == (2 << 56) | node_id
    assert inodes.forget((1 << 56) | node_id, 1)
    assert inodes.forget((9 << 56) | node_id, 1), "never looked up here: a former owner's"
    assert inodes.current(node_id) == (2 << 56) | node_id


def test_numbers_for_contents() -> None:
    handles, inodes = Handles(), Inodes()
    node_id = NODE.node_id
    first = handles.add(reading(node_id, 1))
    assert handles.where(node_id, (1, 0, 0)) == node_id
    assert handles.where(node_id, (2, 0, 0)) is None
    assert not handles.must_bypass_cache(node_id, (1, 0, 0))
    assert handles.must_bypass_cache(node_id, (2, 0, 0))
    inodes.add((1 << 56) | node_id)
    inode = inodes.fresh(node_id, lambda inode: not handles.of_inode(inode))
    assert inode == (2 << 56) | node_id
    inodes.point(node_id, inode)
    assert inodes.current(node_id) == inode
    handles.pop(first)
    assert inodes.fresh(node_id, lambda inode: not handles.of_inode(inode)) == node_id
    inodes.point(node_id, node_id)
    assert inodes.current(node_id) == node_id
    with pytest.raises(BusyError, match="close it"):
        inodes.fresh(node_id, lambda _: False)


def test_handles_of_a_former_owner() -> None:
    handles = Handles(first_number=1 << 24)
    number = handles.add(reading(NODE.node_id, 0x12345))
    assert is_version(number, 0x12345)
    assert not is_version(number, 0x12346)
    assert number & 0xFFFFFFFF == (1 << 24) + 1
    handles.put(3, FormerHandle(NODE.node_id, is_writing=False, is_passthrough=True))
    assert handles.is_passthrough(NODE.node_id)
    assert not handles.may_pass_through(NODE.node_id, (0x12345, 0, 0))
    assert [type(h) for h in handles.opened(NODE.node_id)] == [ReadHandle]
    handles.put(3, reading(NODE.node_id, 7))
    assert not handles.is_passthrough(NODE.node_id)
    assert handles.pop(3) is not None
    assert handles.pop(4) is None
    with pytest.raises(UnavailableError, match="former owner"):
        handles[4]


def test_what_goes_together() -> None:
    handles = Handles()
    assert handles.may_pass_through(7, (1, 0, 0))
    handles.add(reading(7, 1, is_passthrough=True))
    assert handles.may_pass_through(7, (1, 0, 0))
    assert not handles.may_pass_through(7, (2, 0, 0))
    handles.add(WritingHandle(8, NODE, None))  # type: ignore[arg-type]
    assert not handles.may_pass_through(8, (1, 0, 0))
    assert not handles.is_passthrough(8)
    handles.add(StaticHandle(9, b""))
    assert handles.may_pass_through(9, (1, 0, 0))
    assert len(handles.drain()) == 3
    assert not handles.of_inode(7)


async def test_long_requests_ask_for_patience() -> None:
    told: list[int] = []
    runner = Runner(1.0, 4, RequestCounters())
    runner.on_patience = told.append
    await runner.run(lambda: None, nbytes=40_000_000)
    assert told == []
    await runner.run(lambda: None, nbytes=500_000_000)
    assert told == [10_000, 0]


async def test_the_loop_does_not_wait_for_patience() -> None:
    """A core that does not answer keeps a worker waiting, and nobody else."""
    is_asked, may_go = trio.Event(), threading.Event()
    token = trio.lowlevel.current_trio_token()

    def ask(_: int) -> None:
        token.run_sync_soon(is_asked.set)
        may_go.wait(DEADLINE_S)

    runner = Runner(DEADLINE_S, 4, RequestCounters())
    runner.on_patience = ask
    async with trio.open_nursery() as nursery:
        nursery.start_soon(functools.partial(runner.run, int, nbytes=500_000_000))
        await is_asked.wait()
        assert await runner.run(lambda: 7) == 7
        may_go.set()


async def test_what_no_thread_was_free_for_is_given_back(expected_warnings: list[str]) -> None:
    expected_warnings.append("request timed out")
    runner = Runner(0.02, 1, RequestCounters())
    may_go, done = threading.Event(), list[str]()
    async with trio.open_nursery() as nursery:

        async def occupy() -> None:
            with pytest.raises(FUSEError):
                await runner.run(lambda: may_go.wait(DEADLINE_S))

        nursery.start_soon(occupy)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(FUSEError):
            await runner.run(lambda: done.append("called"), unused=lambda: done.append("unused"))
        assert done == ["unused"]
        may_go.set()
    runner = Runner(DEADLINE_S, 1, RequestCounters())
    await runner.run(lambda: done.append("called"), unused=lambda: done.append("unused"))
    assert done == ["unused", "called"]


class TwoSteps:
    """A mount with one request, whose second step comes when the time is over."""

    def __init__(self) -> None:
        self.clock, self.counters = SystemClock(), RequestCounters()
        self.runner = Runner(0.05, 4, self.counters)
        self.done: list[str] = []

    def namespace_of(self, name: str, number: int) -> int:
        return 0

    @handler
    async def both(self, may_go: threading.Event) -> None:
        with pytest.raises(FUSEError):
            await self.runner.run(lambda: may_go.wait(DEADLINE_S))
        await self.runner.run(lambda: self.done.append("second"))

    @handler
    async def moving(self, nbytes: int) -> None:
        for _ in range(2):
            await self.runner.run(lambda: self.done.append("moved"), nbytes=nbytes)


async def test_a_request_has_one_deadline(expected_warnings: list[str]) -> None:
    expected_warnings.append("request timed out")
    mount, may_go = TwoSteps(), threading.Event()
    with pytest.raises(FUSEError):
        await mount.both(may_go)
    may_go.set()
    assert mount.done == []
    assert mount.counters.timeouts == {0: 2}
    await mount.moving(int(DEADLINE_S) * BYTES_PER_S_MIN)  # the time of each step's bytes is added
    assert mount.done == ["moved"] * 2


def test_a_writer_is_told_to_come_back_once() -> None:
    """The kernel comes back once: a second ESTALE would be what open(2) returns."""
    handles, inodes, node_id = Handles(), Inodes(), NODE.node_id
    places = Places(handles, inodes, SystemClock())
    handles.add(reading(node_id, 1, is_passthrough=True))

    def open_to_write(inode: int) -> None:
        with places.writing(inode, NODE, caller=7):
            pass

    with pytest.raises(FUSEError):
        open_to_write(node_id)
    number = inodes.current(node_id)
    assert number != node_id
    # Who opens for reading meanwhile finds the same number, and has the former content.
    assert places.must_yield(number)
    handles.add(reading(number, 1))
    open_to_write(number)
