"""Segments that are freed while clients have them open: who keeps what, and for how long."""

import contextlib
import os
import weakref
from collections.abc import Iterator

import numpy as np
import pytest

import kvfs
from kvfs.clients import channel
from kvfs.clients import messages as msg
from kvfs.clients.link import ask
from kvfs.clients.server import ClientServer
from kvfs.lifecycle import open_pool
from tests.clients.support import BLOCK, LAYOUT, client, payloads, served, tokens
from tests.clients.test_hostile import connect
from tests.fuse.mounting import wait_until

DRAM = "dram:?size=128MiB&segment=16MiB"
SEGMENT = 16 << 20


def allocated(fds: list[int]) -> int:
    return sum(512 * os.fstat(fd).st_blocks for fd in fds)


def places_of(pool, namespace_id: int) -> set[int]:
    """Return where the blocks of a namespace lie, as numbers of the protocol."""
    rows = pool.store.state.indexes[namespace_id].snapshot()
    columns = (rows[name].tolist() for name in ("device", "segment", "generation"))
    return {d << 56 | s << 32 | g for d, s, g in zip(*columns, strict=True)}


def in_use(pool) -> int:
    return sum(device.device.used_bytes for device in pool.store.state.devices)


class Hoarder:
    """A client that asks for every segment, gives no descriptor back, and holds nothing."""

    def __init__(self, pool, namespace_id: int) -> None:
        self.pool, self.namespace_id = pool, namespace_id
        self.main = connect(pool)
        self.seen: set[int] = set()
        self.fds: list[int] = []
        for request in (msg.Hello(1, 1, "hoarder"), msg.Attach(namespace_id)):
            channel.close_all(ask(self.main, request)[1])

    def take(self) -> None:
        """Open whatever there is and was not before."""
        fresh = places_of(self.pool, self.namespace_id) - self.seen
        wanted = np.array(sorted(fresh), np.uint64).tobytes()
        self.fds += ask(self.main, msg.Segments(self.namespace_id, wanted))[1]
        self.seen |= fresh

    def close(self) -> None:
        channel.close_all(self.fds)
        self.main.close()


@contextlib.contextmanager
def hoarding(pool, namespace_id: int) -> Iterator[Hoarder]:
    with contextlib.closing(Hoarder(pool, namespace_id)) as hoarder:
        yield hoarder


def test_a_client_that_closes_nothing_keeps_no_space(tmp_path) -> None:
    """Three times what the device has goes through the client's hands."""
    with served(tmp_path) as (pool, _):
        space = pool.namespace("n", LAYOUT)
        with hoarding(pool, space.info.namespace_id) as hoarder:
            for step in range(48):
                keys, _ = space.keys(tokens(256, step))
                space.put(keys, payloads(256, step), durability="sync")
                hoarder.take()
                own = len(hoarder.fds) * 16 << 10  # extents of the filesystem's own
                assert allocated(hoarder.fds) <= in_use(pool) + own
                assert in_use(pool) <= 256 << 20
            assert len(hoarder.fds) * SEGMENT > 2 * (256 << 20)


def test_dropping_a_namespace_takes_the_space_of_its_segments(tmp_path) -> None:
    with served(tmp_path) as (pool, _):
        space = pool.namespace("n", LAYOUT)
        keys, _ = space.keys(tokens(600, 1))
        space.put(keys, payloads(600, 1), durability="sync")
        with hoarding(pool, space.info.namespace_id) as hoarder:
            hoarder.take()
            assert allocated(hoarder.fds) >= 600 * BLOCK
            pool.drop_namespace("n")
            wait_until(lambda: not allocated(hoarder.fds), "space of freed segments")
            assert all(os.pread(fd, 4096, 0) == bytes(4096) for fd in hoarder.fds)


def test_what_a_view_shows_stays_until_it_is_closed(tmp_path) -> None:
    with served(tmp_path) as (pool, _), client(tmp_path) as remote:
        space = remote.namespace("n", LAYOUT)
        keys, _ = space.keys(tokens(300, 1))
        data = payloads(300, 1)
        space.put(keys, data, durability="sync")
        with hoarding(pool, space.info.namespace_id) as hoarder, space.view(keys) as view:
            hoarder.take()
            pool.store.drop(space.info.namespace_id, keys)
            pool.drop_namespace("n")
            pool.store.state.free_drained()
            assert (view.numpy(np.uint8, (300, BLOCK)) == data).all()
            view.check()
            view.close()
            wait_until(lambda: not allocated(hoarder.fds), "space of what the view held")


def test_views_of_the_owner_keep_what_clients_have_open(tmp_path) -> None:
    with served(tmp_path) as (pool, _):
        space = pool.namespace("n", LAYOUT)
        keys, _ = space.keys(tokens(300, 1))
        data = payloads(300, 1)
        space.put(keys, data, durability="sync")
        with hoarding(pool, space.info.namespace_id) as hoarder, space.view(keys) as view:
            hoarder.take()
            for step in range(20):  # everything else is evicted
                more, _ = space.keys(tokens(256, 10 + step))
                space.put(more, payloads(256, step), durability="sync")
            assert (view.numpy(np.uint8, (300, BLOCK)) == data).all()


@pytest.mark.parametrize("kind", ["memory", "directory"])
def test_an_idle_client_unmaps_what_is_gone(tmp_path, kind) -> None:
    urls = [DRAM] if kind == "memory" else []
    with served(tmp_path, *urls) as (pool, _), client(tmp_path) as remote:
        space = remote.namespace("n", LAYOUT)
        keys, _ = space.keys(tokens(600, 1))
        space.put(keys, payloads(600, 1), durability="none" if kind == "memory" else "sync")
        out = np.zeros((600, BLOCK), np.uint8)
        assert space.read_into(keys, out).all()
        attached = remote.attached()
        segments = [weakref.ref(one) for one in attached.segments.values()]
        assert len(segments) >= 2
        pool.drop_namespace("n")
        wait_until(lambda: not any(one() for one in segments), "a client that does nothing")
        assert not attached.segments
        assert remote.attached() is attached


def test_a_client_that_has_no_part_in_what_is_gone_is_not_told(tmp_path) -> None:
    with served(tmp_path) as (pool, _), client(tmp_path) as remote:
        mine = remote.namespace("mine", LAYOUT)
        keys, _ = mine.keys(tokens(10, 1))
        mine.put(keys, payloads(10, 1), durability="sync")
        assert mine.match_prefix(keys) == 10
        other = pool.namespace("other", LAYOUT)
        more, _ = other.keys(tokens(600, 2))
        other.put(more, payloads(600, 2), durability="sync")
        with hoarding(pool, other.info.namespace_id) as hoarder:
            hoarder.take()
            pool.drop_namespace("other")
            wait_until(lambda: not allocated(hoarder.fds), "space of freed segments")
        assert remote.attached().link.page.segments_freed == 0


def test_places_of_others_are_gone_to_a_client(tmp_path) -> None:
    with served(tmp_path) as (pool, _):
        mine, other = pool.namespace("mine", LAYOUT), pool.namespace("other", LAYOUT)
        for space in (mine, other):
            keys, _ = space.keys(tokens(10, 1))
            space.put(keys, payloads(10, 1), durability="sync")
        with hoarding(pool, mine.info.namespace_id) as hoarder:
            own = places_of(pool, mine.info.namespace_id)
            foreign = places_of(pool, other.info.namespace_id)
            known = np.array(sorted(own | foreign), np.uint64).tobytes()
            answer, _ = ask(hoarder.main, msg.Segments(0, b"", known))
            assert set(np.frombuffer(answer.gone, np.uint64).tolist()) == foreign


@pytest.mark.parametrize("ending", ["stopped", "reopened"])
def test_views_outlive_an_owner(tmp_path, ending) -> None:
    """Nobody asks for their leases any more: what an earlier owner served is unlinked alone."""
    with served(tmp_path) as (pool, server):
        remote = client(tmp_path)
        space = remote.namespace("n", LAYOUT)
        keys, _ = space.keys(tokens(300, 1))
        data = payloads(300, 1)
        space.put(keys, data, durability="sync")
        view = space.view(keys)
        server.stop()
        if ending == "reopened":
            pool.close()
            pool = open_pool(tmp_path / "pool")
        with pool, ClientServer(pool):
            wait_until(lambda: remote.attached().link.is_lost is False, "the next owner")
            assert remote.namespace("n").match_prefix(keys) == 300
            out = np.zeros_like(data)
            assert remote.namespace("n").read_into(keys, out).all()  # has them open anew
            pool.drop_namespace("n")
            pool.flush()
            assert (view.numpy(np.uint8, (300, BLOCK)) == data).all()
            view.check()
            view.close()
            remote.close()


def test_views_of_a_closed_client_say_that_nothing_holds_them(tmp_path) -> None:
    with served(tmp_path) as (_, server):
        remote = client(tmp_path)
        space = remote.namespace("n", LAYOUT)
        keys, _ = space.keys(tokens(3, 1))
        space.put(keys, payloads(3, 1), durability="sync")
        view = space.view(keys)
        remote.close()
        wait_until(lambda: not server.statistics(), "the end of the session")
        with pytest.raises(kvfs.LeaseExpiredError):
            view.check()
        view.close()
