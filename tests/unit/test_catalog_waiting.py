"""Who waits for the medium, and who does not: reads of the catalog beside slow syncs."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvfs.engine.catalog_database import CHECKPOINT_CHANGES
from kvfs.engine.catalog_schema import ROOT_NODE_ID
from kvfs.pool import Pool
from tests.unit.small_pools import small_pool

WAIT_S = 20.0


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    with small_pool(tmp_path, async_delay_ms=20) as made:
        yield made


class Gate:
    """Lets syncs of one descriptor begin, and end when told."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.entered = threading.Event()
        self.opened = threading.Event()
        self._real = os.fdatasync

    def __call__(self, fd: int) -> None:
        if fd == self.fd:
            self.entered.set()
            assert self.opened.wait(WAIT_S)
        self._real(fd)


@pytest.fixture
def gate(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    made = Gate(pool.catalog._wal_fd)
    monkeypatch.setattr(os, "fdatasync", made)
    yield made
    made.opened.set()


@contextmanager
def running(work: object) -> Iterator[threading.Thread]:
    thread = threading.Thread(target=work)  # type: ignore[arg-type]
    thread.start()
    try:
        yield thread
    finally:
        thread.join(WAIT_S)
        assert not thread.is_alive()


def change(pool: Pool, count: int) -> None:
    for number in range(1, count + 1):
        pool.catalog.set_attributes(ROOT_NODE_ID, now_ns=number)


def read_at_once(pool: Pool) -> bool:
    with pool.catalog.hold_at_once() as is_held:
        return is_held and pool.catalog.node(ROOT_NODE_ID) is not None


def test_reads_go_on_while_a_checkpoint_syncs(pool: Pool, gate: Gate) -> None:
    with running(lambda: change(pool, 2 * CHECKPOINT_CHANGES)):
        assert gate.entered.wait(WAIT_S)
        assert read_at_once(pool)
        gate.opened.set()


def test_reads_go_on_while_a_new_epoch_is_synced(pool: Pool, gate: Gate) -> None:
    pool.catalog._is_epoch_due = True
    with running(lambda: pool.catalog.set_meta("a", "b")):
        assert gate.entered.wait(WAIT_S)
        assert read_at_once(pool)
        assert pool.catalog.meta("a") is None
        gate.opened.set()
    assert pool.catalog.meta("a") == "b"


def test_a_held_connection_is_not_waited_for(pool: Pool) -> None:
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with pool.catalog.transaction():
            held.set()
            assert done.wait(WAIT_S)

    with running(hold):
        assert held.wait(WAIT_S)
        with pool.catalog.hold_at_once() as is_held:
            assert not is_held
        done.set()
    assert read_at_once(pool)


def test_the_background_takes_checkpoints(pool: Pool, tmp_path: Path) -> None:
    due = pool.catalog._checkpoint_at
    threads = []
    original = pool.catalog._checkpoint

    def noted() -> None:
        threads.append(threading.current_thread())
        original()

    pool.catalog._checkpoint = noted  # type: ignore[method-assign]
    change(pool, CHECKPOINT_CHANGES)
    for _ in range(200):
        if pool.catalog._checkpoint_at > due:
            break
        threading.Event().wait(0.05)
    assert threads
    assert threading.current_thread() not in threads


def test_a_writer_takes_the_checkpoint_that_nobody_else_takes(pool: Pool, tmp_path: Path) -> None:
    pool.catalog.on_checkpoint_due = lambda: None
    change(pool, 10 * CHECKPOINT_CHANGES)
    size = (tmp_path / "pool" / "catalog.sqlite-wal").stat().st_size
    assert size < 6 * CHECKPOINT_CHANGES * 4096
