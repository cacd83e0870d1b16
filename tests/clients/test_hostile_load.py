"""Clients that make the owner's tables long: what they invent costs nobody else anything."""

import os

import numpy as np
import pytest

import kvfs
from kvfs import _native
from kvfs.clients import messages as msg
from kvfs.clients.link import ask
from kvfs.engine.holds import place_of
from kvfs.engine.index import RECORD
from kvfs.engine.reader import EVENT
from tests.clients.support import BLOCK, LAYOUT, client, payloads, served, tokens
from tests.clients.test_hostile import begin


class Counting:
    """A lock that counts who takes it."""

    def __init__(self, lock) -> None:
        self.lock = lock
        self.taken = 0

    def __enter__(self) -> None:
        self.taken += 1
        self.lock.acquire()

    def __exit__(self, *_error: object) -> None:
        self.lock.release()


def test_events_that_name_nothing_take_no_lock(tmp_path, monkeypatch) -> None:
    with served(tmp_path) as (pool, _), client(tmp_path) as remote:
        space = remote.namespace("n", LAYOUT)
        keys, _ = space.keys(tokens(3, 1))
        space.put(keys, payloads(3, 1))
        state = pool.store.state
        segment = next(iter(state.devices[0].segments.values()))
        events = np.zeros(1003, EVENT)
        events["segment"] = 1000 + np.arange(1003) % 500
        events[400:403]["segment"], events[400:403]["entry"] = segment.handle.slot, [0, 2, 99]
        events["device"] = segment.handle.device_index
        lock = Counting(state.lock)
        monkeypatch.setattr(state, "lock", lock)
        for namespaces, taken in ((set(), 0), ({space.info.namespace_id}, 1)):
            pool.store.reader.touch(events, namespaces)
            assert lock.taken == taken
        monkeypatch.undo()
        assert state.counters[space.info.namespace_id].accesses[0] == 2
        assert (segment.accessed_ns[[0, 2]] == segment.last_access_ns).all()


def test_what_a_page_invents_is_not_counted(tmp_path) -> None:
    with served(tmp_path) as (pool, server):
        space = pool.namespace("n", LAYOUT)
        keys, _ = space.keys(tokens(3, 1))
        space.put(keys, payloads(3, 1))
        main, joined = begin(pool)
        ask(joined, msg.Attach(space.info.namespace_id))
        (session,) = server._sessions.values()
        page = session.holder.page
        own = _native.LeasePage.attach(os.dup(page.fd), os.dup(page.notice_fd))
        records = np.zeros(1000, RECORD)
        records["length"], records["segment"], records["generation"] = 1, 5000 + np.arange(1000), 7
        records[500] = space.lookup(keys)[0]
        own.hold(records)
        segment = next(iter(pool.store.state.devices[0].segments.values()))
        assert len(page.places()) == 8 * 1000
        assert pool.store.state.holds.snapshot([segment]) == {place_of(segment)}
        assert pool.client_figures()[:2] == (1, 1)
        main.close()
        joined.close()


def test_a_number_that_is_another_process_by_now(tmp_path) -> None:
    """What has ended is looked at again: its descriptor may have been closed, and opened anew."""
    with served(tmp_path) as (_, server), client(tmp_path) as remote:
        (session,) = server._sessions.values()
        assert session.pidfd >= 0
        server._end_dead({session.pidfd})
        assert list(server._sessions.values()) == [session]
        space = remote.namespace("n", LAYOUT)
        keys, _ = space.keys(tokens(3, 1))
        assert space.put(keys, payloads(3, 1)).bytes_stored == 3 * BLOCK
        assert list(server._sessions.values()) == [session]


def test_staging_that_cannot_grow_is_made_anew(tmp_path, monkeypatch) -> None:
    """A larger put is refused; the next is not told of memory that the owner has forgotten."""
    monkeypatch.setattr("kvfs.clients.link.STAGING_BYTES", 16 * BLOCK)
    monkeypatch.setattr("kvfs.clients.writing.STAGING_BYTES", 16 * BLOCK)
    with served(tmp_path, client_shared_bytes=17 * BLOCK) as (_, _), client(tmp_path) as remote:
        with remote.link().line() as line:
            line.stage(BLOCK)
            with pytest.raises(kvfs.BusyError, match="may share"):
                line.stage(18 * BLOCK)
        space = remote.namespace("n", LAYOUT)
        keys, _ = space.keys(tokens(3, 1))
        assert space.put(keys, payloads(3, 1)).blocks_stored == 3
