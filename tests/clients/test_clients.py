"""A client does what the owner does: blocks, views, contexts, by messages and shared memory."""

import mmap
import os

import numpy as np
import pytest

import kvfs
from kvfs.phase import Phase
from tests.clients.support import BLOCK, LAYOUT, child, client, payloads, served, tokens

DRAM = "dram:?size=128MiB&segment=16MiB"


@pytest.fixture(params=["directory", "memory", "both"])
def urls(request, tmp_path) -> list[str]:
    disk = f"dir:{tmp_path}/device?size=256MiB&segment=16MiB"
    return {"directory": [disk], "memory": [DRAM], "both": [DRAM, disk]}[request.param]


def test_put_and_read(tmp_path, urls) -> None:
    with served(tmp_path, *urls) as (pool, _), client(tmp_path) as remote:
        space = remote.namespace("n", LAYOUT)
        keys, parents = space.keys(tokens(50, 1))
        data = payloads(50, 1)
        result = space.put(keys, data, parents=parents)
        assert result.blocks_stored == 50
        assert space.put(keys, data).blocks_deduplicated == 50
        assert space.match_prefix(keys) == 50
        assert (space.lookup(keys)["length"] == BLOCK).all()
        out = np.zeros_like(data)
        assert space.read_into(keys, out).all()
        assert (out == data).all()
        local = pool.namespace("n")
        mine = np.zeros_like(data)
        assert local.read_into(keys, mine).all()
        assert (mine == data).all()
        with space.view(keys) as view:
            assert view.is_zero_copy
            assert (view.numpy(np.uint8, (50, BLOCK)) == data).all()
            view.check()
        missing, _ = space.keys(tokens(3, 9))
        assert space.match_prefix(missing) == 0
        assert not space.read_into(missing, out[:3]).any()
        with pytest.raises(kvfs.NotFoundError):
            space.view(missing)
        remote.flush()
        remote.sync()
        assert remote.statistics().counters["blocks_put"] == 50


def test_what_the_owner_puts_is_seen_at_once_while_the_index_grows(tmp_path) -> None:
    layout = kvfs.Layout("uint8", (1024,), 4)
    with served(tmp_path, DRAM) as (pool, _), client(tmp_path) as remote:
        local = pool.namespace("small", layout)
        space = remote.namespace("small")
        for step in range(8):
            keys, _ = local.keys(tokens(1000, step))
            data = np.full((1000, 4096), step, np.uint8)
            local.put(keys, data, durability="async")
            assert space.match_prefix(keys) == 1000
            out = np.zeros_like(data)
            assert space.read_into(keys, out).all()
            assert (out == step).all()


def test_contexts(tmp_path) -> None:
    with served(tmp_path) as (pool, _), client(tmp_path) as remote:
        space = remote.namespace("n", LAYOUT)
        ids = tokens(5, 2)
        keys, _ = space.keys(ids)
        context = space.context("a/b")
        assert len(context.keys) == 0
        context.append(keys[:3], payloads(5, 2)[:3], tokens=ids[:12], durability="sync")
        context.append(keys[3:], payloads(5, 2)[3:], tokens=ids[12:])
        assert context.name == "a/b"
        assert context.token_count == 20
        assert context.resident_blocks == 5
        assert (context.keys == keys).all()
        assert (context.tokens == ids).all()
        assert [c.name for c in space.contexts()] == ["a/b"]
        with context.view() as view:
            assert (view.numpy(np.uint8, (5, BLOCK)) == payloads(5, 2)).all()
        context.pin()
        assert pool.namespace("n").context("a/b").node.is_pinned
        context.unpin()
        with pytest.raises(kvfs.NotFoundError, match="no such context"):
            space.context("x", create=False)
        context.drop()
        with pytest.raises(kvfs.NotFoundError, match="dropped"):
            _ = context.keys


def test_replaced_tail(tmp_path) -> None:
    with served(tmp_path) as _, client(tmp_path) as remote:
        space = remote.namespace("n", LAYOUT)
        ids = tokens(2, 3)
        first, _ = space.keys(ids[:6])
        whole, _ = space.keys(ids)
        context = space.context("c")
        context.append(first, [payloads(1, 1)[0], bytes(100)], tokens=ids[:6])
        with pytest.raises(kvfs.UsageError, match="partial"):
            context.append(whole[1:], payloads(1, 2), tokens=ids[4:])
        context.append(whole[1:], payloads(1, 2), tokens=ids[4:], replace_tail=True)
        assert (context.keys == whole).all()


def test_errors_of_the_owner_are_errors_here(tmp_path) -> None:
    with served(tmp_path, DRAM) as _, client(tmp_path) as remote:
        with pytest.raises(kvfs.NotFoundError, match="no such namespace"):
            remote.namespace("nobody")
        space = remote.namespace("n", LAYOUT)
        keys, _ = space.keys(tokens(1, 1))
        with pytest.raises(kvfs.UsageError, match="persistent device"):
            space.put(keys, payloads(1, 1), durability="sync")
        with pytest.raises(kvfs.RefusedError, match="layout mismatch"):
            remote.namespace("n", kvfs.Layout())
        with pytest.raises(kvfs.UsageError, match="out of range"):
            space.put(keys, np.zeros((1, BLOCK + 4096), np.uint8))


def test_puts_from_shared_memory_copy_nothing_here(tmp_path) -> None:
    with served(tmp_path) as _, client(tmp_path) as remote:
        space = remote.namespace("n", LAYOUT)
        fd = os.memfd_create("mine")
        os.ftruncate(fd, 8 * BLOCK)
        memory = mmap.mmap(fd, 8 * BLOCK)
        remote.share(fd, memory)
        os.close(fd)
        data = np.frombuffer(memory, np.uint8).reshape(8, BLOCK)
        data[:] = payloads(8, 4)
        keys, _ = space.keys(tokens(10, 4))
        own = payloads(2, 5)
        assert space.put(keys, [*data, *own]).blocks_stored == 10
        out = np.zeros((10, BLOCK), np.uint8)
        assert space.read_into(keys, out).all()
        assert (out[:8] == data).all()
        assert (out[8:] == own).all()


def test_a_put_larger_than_the_staging_memory(tmp_path) -> None:
    with served(tmp_path, "dram:?size=256MiB&segment=64MiB") as _, client(tmp_path) as remote:
        layout = kvfs.Layout("uint8", (20 << 20,), 1)
        space = remote.namespace("large", layout)
        keys, _ = space.keys([1, 2, 3, 4, 5])
        data = [np.full(20 << 20, i, np.uint8) for i in range(5)]
        assert space.context("c").append(keys, data, tokens=[1, 2, 3, 4, 5]).blocks_stored == 5
        out = np.zeros(20 << 20, np.uint8)
        for i in range(5):
            assert space.read_into(keys[i : i + 1], [out]).all()
            assert (out == i).all()


def test_segments_and_index_cannot_be_written_by_a_client(tmp_path, urls) -> None:
    with served(tmp_path, *urls) as _, client(tmp_path) as remote:
        space = remote.namespace("n", LAYOUT)
        keys, _ = space.keys(tokens(2, 1))
        space.put(keys, payloads(2, 1))
        lease = remote.backend.lease(space.info.namespace_id, keys)
        index = remote.attached().index(space.info.namespace_id)
        fds = {int(fd) for fd in lease.backings().fds} | {index.fd}
        for fd in fds:
            with pytest.raises(PermissionError):
                mmap.mmap(fd, 4096, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.write(fd, b"x")
            if os.readlink(f"/proc/self/fd/{fd}").startswith("/memfd:"):
                again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)  # root may, and yet:
                with pytest.raises(PermissionError):
                    os.pwrite(again, b"x", 0)
                with pytest.raises(PermissionError):
                    mmap.mmap(again, 4096, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
                with pytest.raises(PermissionError):
                    os.ftruncate(again, 0)
                os.close(again)
        remote.backend.release(lease)


def held_by_clients(pool: kvfs.Pool) -> int:
    return sum(len(device.waiting()) for device in pool.store.state.devices)


def test_what_a_client_holds_is_not_recycled_until_it_lets_go(tmp_path) -> None:
    with served(tmp_path, DRAM) as (pool, server), client(tmp_path) as remote:
        space = remote.namespace("n", LAYOUT)
        keys, _ = space.keys(tokens(300, 1))
        data = payloads(300, 1)
        space.put(keys, data)
        remote.flush()
        view = space.view(keys[:100])
        assert server.statistics()[0].held_segments == 1
        pool.store.drop(space.info.namespace_id, keys)
        assert held_by_clients(pool) == 1
        assert space.match_prefix(keys) == 0
        assert (view.numpy(np.uint8, (100, BLOCK)) == data[:100]).all()
        view.check()
        view.close()
        pool.store.state.free_drained()
        assert held_by_clients(pool) == 0


def test_eviction_passes_over_what_a_client_holds(tmp_path) -> None:
    with served(tmp_path, DRAM) as (pool, _), client(tmp_path) as remote:
        space, local = remote.namespace("n", LAYOUT), pool.namespace("n")
        keys, _ = space.keys(tokens(100, 1))
        data = payloads(100, 1)
        space.put(keys, data)
        with space.view(keys) as view:
            for step in range(8):
                more, _ = local.keys(tokens(250, 10 + step))
                local.put(more, payloads(250, step))
            view.check()
            assert (view.numpy(np.uint8, (100, BLOCK)) == data).all()
            assert space.match_prefix(keys) == 100
        assert pool.store.state.counters.snapshot()["segments_evicted"] > 0
        assert pool.store.state.holds.revoked == 0


def test_a_client_that_holds_too_much_loses_it(tmp_path, expected_warnings) -> None:
    expected_warnings.append("leases revoked")
    options = {"client_share": 0.25}
    with served(tmp_path, DRAM, **options) as (pool, server), client(tmp_path) as remote:
        space, local = remote.namespace("n", LAYOUT), pool.namespace("n")
        views = []
        while not pool.store.state.holds.revoked:
            keys, _ = space.keys(tokens(250, len(views)))
            local.put(keys, payloads(250, len(views)))
            if not pool.store.state.holds.revoked:
                views.append(space.view(keys[-1:]))
        assert len(views) > 4
        for view in views:
            with pytest.raises(kvfs.LeaseExpiredError, match="room"):
                view.check()
            view.close()
        out = np.zeros((250, BLOCK), np.uint8)
        assert space.read_into(keys, out).all()  # attached again by itself
        assert (out == payloads(250, len(views))).all()
        assert not server.statistics()[0].is_revoked


def test_dropped_namespace(tmp_path) -> None:
    with served(tmp_path, DRAM) as (pool, _), client(tmp_path) as remote:
        space = remote.namespace("n", LAYOUT)
        keys, _ = space.keys(tokens(10, 1))
        space.put(keys, payloads(10, 1))
        view = space.view(keys)
        pool.drop_namespace("n")
        with pytest.raises(kvfs.NotFoundError):
            space.match_prefix(keys)
        assert (view.numpy(np.uint8, (10, BLOCK)) == payloads(10, 1)).all()
        view.close()
        with pytest.raises(kvfs.NotFoundError):
            space.put(keys, payloads(10, 1))
        pool.store.state.free_drained()
        assert held_by_clients(pool) == 0


def test_rotten_blocks_are_misses_and_leave_the_pool(tmp_path) -> None:
    with served(tmp_path) as (pool, _), client(tmp_path) as remote:
        space = remote.namespace("n", LAYOUT)
        keys, _ = space.keys(tokens(3, 1))
        data = payloads(3, 1)
        space.put(keys, data, durability="sync")
        record = space.lookup(keys)[1]
        segment = pool.store.state.segment_of(0, int(record["segment"]), int(record["generation"]))
        os.pwrite(segment.handle.fd, b"rot", int(record["page"]) * 4096)
        out = np.zeros_like(data)
        assert space.read_into(keys, out).tolist() == [True, False, True]
        assert pool.store.state.counters.snapshot()["checksum_errors"] > 0
        assert space.match_prefix(keys) == 1


def test_unsealed_segments_of_a_former_owner_are_verified_by_the_owner(tmp_path) -> None:
    device = f"dir:{tmp_path}/device?size=256MiB&segment=16MiB"
    with kvfs.create_pool(tmp_path / "pool", [device]) as pool:
        keys, _ = pool.namespace("n", LAYOUT).keys(tokens(5, 1))
        pool.namespace("n").put(keys, payloads(5, 1), durability="sync")
    from kvfs.clients.server import ClientServer
    from kvfs.lifecycle import open_pool

    with open_pool(tmp_path / "pool") as pool, ClientServer(pool), client(tmp_path) as remote:
        space = remote.namespace("n")
        state = next(s for s in pool.store.state.devices[0].segments.values())
        state.needs_verify = True
        out = np.zeros((5, BLOCK), np.uint8)
        assert space.read_into(keys, out).all()
        assert (out == payloads(5, 1)).all()
        assert pool.store.state.counters.snapshot()["blocks_verified"] >= 5
        with space.view(keys) as view:
            assert (view.numpy(np.uint8, (5, BLOCK)) == payloads(5, 1)).all()


def test_reads_of_clients_count_as_accesses(tmp_path) -> None:
    with served(tmp_path, DRAM) as (pool, server), client(tmp_path) as remote:
        space = remote.namespace("n", LAYOUT)
        keys, _ = space.keys(tokens(4, 1))
        space.put(keys, payloads(4, 1))
        record = space.lookup(keys)[2]
        segment = pool.store.state.segment_of(0, int(record["segment"]), int(record["generation"]))
        before = segment.accessed_ns[: segment.entry_count].copy()
        space.read_into(keys[2:3], np.zeros((1, BLOCK), np.uint8))
        while segment.accessed_ns[record["entry"]] == before[record["entry"]]:
            pass  # the server's tick
        assert (segment.accessed_ns[: segment.entry_count] > before).sum() == 1
        assert server.statistics()[0].uid == os.getuid()


def test_phases_of_clients_reach_the_owner(tmp_path) -> None:
    with served(tmp_path, DRAM) as (pool, _):
        with client(tmp_path) as remote:
            space = remote.namespace("n", LAYOUT)
            keys, _ = space.keys(tokens(8, 1))
            space.put(keys, payloads(8, 1))
            record = space.lookup(keys)[0]
            segment = pool.store.state.segment_of(
                0, int(record["segment"]), int(record["generation"])
            )
            accessed = segment.accessed_ns.copy()
            with space.view(keys[:1], phase="background"):
                pass
            space.read_into(keys, np.zeros((8, BLOCK), np.uint8), phase="background")
            ids = space.info.namespace_id
            counts = pool.store.state.counters[ids].accesses
            while counts[Phase.BACKGROUND] < 9:
                pass  # the server's tick
            assert (segment.accessed_ns == accessed).all()
            assert space.read_into(keys, np.zeros((8, BLOCK), np.uint8), phase="prefill").all()
            space.touch(keys[:3], phase="decode")
            space.touch(keys[:2])
        while pool.client_figures()[0]:
            pass  # what a client read last counts after its end
        assert counts == [2, 8, 3, 9]


def test_a_phase_that_is_none_is_unknown(tmp_path) -> None:
    with served(tmp_path, DRAM) as (pool, _), client(tmp_path) as remote:
        space = remote.namespace("n", LAYOUT)
        keys, _ = space.keys(tokens(2, 1))
        space.put(keys, payloads(2, 1))
        remote.link().ring.push(space.lookup(keys), 77)
        counts = pool.store.state.counters[space.info.namespace_id].accesses
        while not any(counts):
            pass  # the server's tick
        assert counts == [2, 0, 0, 0]


def test_second_process_gets_a_client(tmp_path) -> None:
    code = """
import sys, numpy as np, kvfs
with kvfs.open_pool(sys.argv[1]) as pool:
    assert "kvfs.engine.store" not in sys.modules, "a client needs no engine"
    space = pool.namespace("n")
    keys, _ = space.keys(np.arange(40, dtype=np.uint32))
    space.put(keys, np.arange(10, dtype=np.uint8)[:, None].repeat(65536, 1))
    with space.view(keys) as view:
        assert (view.numpy(np.uint8, (10, 65536))[7] == 7).all()
    print(type(pool).__name__, space.match_prefix(keys))
"""
    with served(tmp_path) as (pool, _):
        pool.namespace("n", LAYOUT)
        with child(code, str(pool.path)) as process:
            assert process.communicate()[0] == "RemotePool 10\n"
            assert process.returncode == 0


def test_a_forked_child_is_refused(tmp_path) -> None:
    with served(tmp_path) as _, client(tmp_path) as remote:
        space = remote.namespace("n", LAYOUT)
        keys, _ = space.keys(tokens(1, 1))
        space.put(keys, payloads(1, 1))
        pid = os.fork()
        if pid == 0:
            try:
                space.match_prefix(keys)
            except kvfs.ClosedError:
                os._exit(0)
            os._exit(1)
        assert os.waitpid(pid, 0)[1] == 0
        assert space.match_prefix(keys) == 1


def test_a_forked_child_ends_no_hold_of_its_parent(tmp_path) -> None:
    with served(tmp_path, DRAM) as (pool, server), client(tmp_path) as remote:
        space, local = remote.namespace("n", LAYOUT), pool.namespace("n")
        keys, _ = space.keys(tokens(20, 1))
        data = payloads(20, 1)
        space.put(keys, data, durability="none")
        with space.view(keys) as view:
            pid = os.fork()
            if pid == 0:
                view.close()
                os._exit(0)
            assert os.waitpid(pid, 0)[1] == 0
            assert server.statistics()[0].held_segments == 1
            for step in range(8):
                more, _ = local.keys(tokens(250, 10 + step))
                local.put(more, payloads(250, step), durability="none")
            view.check()
            assert (view.numpy(np.uint8, (20, BLOCK)) == data).all()


def test_closed_client(tmp_path) -> None:
    with served(tmp_path) as (_, server):
        remote = client(tmp_path)
        space = remote.namespace("n", LAYOUT)
        remote.close()
        remote.close()
        with pytest.raises(kvfs.ClosedError):
            space.match_prefix(space.keys(tokens(1, 1))[0])
        while server.statistics():
            pass
