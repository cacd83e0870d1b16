import fcntl
import os
import struct
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvfs import _native
from tests.native.support import RECORD, make_keys, make_records, run_python

HEADER = 4096


def lookup(index: Any, keys: Any, device: int | None = None) -> Any:
    out = np.full(len(keys), 7, RECORD)
    hits = index.lookup(keys, out) if device is None else index.lookup_device(keys, device, out)
    assert hits == np.count_nonzero(out["length"])
    assert not out[out["length"] == 0].view("u1").any()
    return out


def test_insert_lookup_remove() -> None:
    keys = make_keys(1000)
    index = _native.Index(1000, seed=5)
    assert index.capacity >= 1000
    records = make_records(keys)
    records["flags"] = 3
    records["sequence"] = 77
    assert index.insert(records) == 1000
    assert index.count == 1000
    records["sequence"] = 0
    assert (lookup(index, keys) == records).all()
    assert not lookup(index, make_keys(1000, 1)).view("u1").any()
    assert index.remove(records[::2].copy()) == 500
    assert index.remove(records[::2].copy()) == 0
    assert index.count == 500
    found = lookup(index, keys)
    assert not found[::2].tobytes().strip(b"\0")
    assert (found[1::2] == records[1::2]).all()
    assert sorted(index.snapshot()[i : i + 32] for i in range(0, 500 * 64, 64)) == sorted(
        key.tobytes() for key in keys[1::2]
    )


def test_replace_returns_what_was_there() -> None:
    keys = make_keys(3)
    index = _native.Index(10)
    first, second = make_records(keys[:2], segment=1), make_records(keys, segment=2)
    replaced = np.full(2, 9, RECORD)
    assert index.insert(first, replaced) == 2
    assert not replaced.view("u1").any()
    replaced = np.full(3, 9, RECORD)
    assert index.insert(second, replaced=replaced) == 3
    assert (replaced[:2] == first).all()
    assert not replaced[2:].view("u1").any()
    assert index.count == 3


def test_one_copy_per_device_best_rank_wins() -> None:
    keys = make_keys(50)
    index = _native.Index(200)
    for device in (3, 300, 1):
        assert index.insert(make_records(keys, device)) == 50
    assert index.count == 150
    # Equal ranks: the lowest device.
    assert (lookup(index, keys)["device"] == 1).all()
    index.set_ranks(bytes([9, 5, 9, 2]))
    assert (lookup(index, keys)["device"] == 3).all()
    index.set_ranks(bytes([0, 255]))
    assert (lookup(index, keys)["device"] == 1).all()
    index.set_ranks(b"\xff" * 256)
    assert (lookup(index, keys, 300)["device"] == 300).all()
    assert not lookup(index, keys, 2)["length"].any()
    assert index.remove(make_records(keys, 1)) == 50
    assert (lookup(index, keys)["device"] == 3).all()
    assert index.remove(make_records(keys, 3)) == 50
    assert (lookup(index, keys)["device"] == 300).all()
    assert index.match_prefix(keys) == 50


def test_match_prefix() -> None:
    keys = make_keys(200)
    index = _native.Index(200)
    index.insert(make_records(keys[:150]))
    for count in (0, 1, 15, 16, 17, 150):
        assert index.match_prefix(keys[:count]) == count
    assert index.match_prefix(keys) == 150
    index.remove(make_records(keys[70:71]))
    assert index.match_prefix(keys) == 70
    assert index.match_prefix(keys[71:]) == 79


def test_remove_and_flags_need_segment_and_generation() -> None:
    keys = make_keys(1)
    index = _native.Index(4)
    index.insert(make_records(keys, device=1, segment=2, generation=3))
    for device, segment, generation in ((0, 2, 3), (1, 1, 3), (1, 2, 4)):
        other = make_records(keys, device, segment, generation)
        assert index.remove(other) == 0
        assert index.set_flags(other, 1) == 0
    same = make_records(keys, 1, 2, 3)
    assert index.set_flags(same, 0x8001) == 1
    assert index.set_flags(same, 2) == 1
    assert lookup(index, keys)["flags"][0] == 0x8003
    assert index.remove(same) == 1


def test_zero_key_is_a_key() -> None:
    keys = np.zeros((1, 32), np.uint8)
    index = _native.Index(4)
    assert index.match_prefix(keys) == 0
    index.insert(make_records(keys, device=0xFFFF, segment=2**32 - 1))
    index.set_flags(make_records(keys, 0xFFFF, 2**32 - 1), 0xFFFF)
    assert index.match_prefix(keys) == 1
    assert lookup(index, keys, 0xFFFF)["segment"][0] == 2**32 - 1


def test_full_table_and_growth() -> None:
    index = _native.Index(8)
    capacity = index.capacity
    keys = make_keys(capacity + 5)
    records, replaced = make_records(keys), np.full(capacity + 5, 9, RECORD)
    index.set_ranks(bytes([7, 3]))
    assert index.insert(records, replaced) == capacity
    assert not replaced.view("u1").any()
    # Replacing needs no room.
    assert index.insert(records[:3]) == 3
    larger = index.grow(2 * capacity)
    assert index.is_superseded
    assert not larger.is_superseded
    assert larger.capacity >= 2 * capacity
    assert larger.insert(records[capacity:]) == 5
    assert (lookup(larger, keys) == records).all()
    larger.insert(make_records(keys[:1], device=1))
    assert lookup(larger, keys[:1])["device"][0] == 1
    with pytest.raises(ValueError, match="superseded"):
        index.insert(records[:1])
    with pytest.raises(ValueError, match="superseded"):
        index.remove(records[:1])
    with pytest.raises(ValueError, match="superseded"):
        index.grow(100)
    assert index.match_prefix(keys) == capacity
    with pytest.raises(ValueError, match="less than"):
        larger.grow(larger.count - 1)
    assert not larger.is_superseded


def test_churn_at_capacity_ends_full_and_growth_cleans_up() -> None:
    """Tombstones count towards full; a table of the same capacity has none."""
    index = _native.Index(500)
    keys = make_keys(index.capacity * 4)
    alive = list(range(index.capacity))
    index.insert(make_records(keys[alive]))
    done = len(alive)
    while done < len(keys):
        assert index.remove(make_records(keys[alive.pop(0)][None])) == 1
        if index.insert(make_records(keys[done : done + 1])) == 0:
            index = index.grow(index.capacity)
            continue
        alive.append(done)
        done += 1
    assert index.count == len(alive)
    assert lookup(index, keys[alive])["length"].all()


def test_many_copies_of_one_key() -> None:
    key = make_keys(1)
    index = _native.Index(4000)
    records = make_records(np.repeat(key, 2000, axis=0))
    records["device"] = np.arange(2000)
    done = index.insert(records)
    assert 1000 <= done < 2000  # chains are bounded
    index.set_ranks(bytes(range(255, -1, -1)))
    assert lookup(index, key)["device"][0] == 255
    assert lookup(index, key, done - 1)["length"][0]


class TableMachine(RuleBasedStateMachine):
    """The table against a dict, over few keys so that chains, copies and tombstones happen."""

    keys = make_keys(40, 9)

    def __init__(self) -> None:
        super().__init__()
        self.index = _native.Index(16)
        self.model: dict[tuple[int, int], tuple[int, int]] = {}

    @rule(key=st.integers(0, 39), device=st.integers(0, 2), segment=st.integers(0, 3))
    def insert(self, key: int, device: int, segment: int) -> None:
        record = make_records(self.keys[key][None], device, segment)
        replaced = np.zeros(1, RECORD)
        if self.index.insert(record, replaced) == 0:
            self.index = self.index.grow(self.index.capacity * 2)
            assert self.index.insert(record, replaced) == 1
        before = self.model.get((key, device))
        assert bool(replaced["length"][0]) == (before is not None)
        if before is not None:
            assert replaced["segment"][0] == before[0]
        self.model[key, device] = (segment, 0)

    @rule(key=st.integers(0, 39), device=st.integers(0, 2), segment=st.integers(0, 3))
    def remove(self, key: int, device: int, segment: int) -> None:
        record = make_records(self.keys[key][None], device, segment)
        is_there = self.model.get((key, device), (None,))[0] == segment
        assert self.index.remove(record) == is_there
        if is_there:
            del self.model[key, device]

    @rule(key=st.integers(0, 39), device=st.integers(0, 2), flags=st.integers(0, 15))
    def set_flags(self, key: int, device: int, flags: int) -> None:
        segment, before = self.model.get((key, device), (0, 0))
        record = make_records(self.keys[key][None], device, segment)
        is_there = (key, device) in self.model
        assert self.index.set_flags(record, flags) == is_there
        if is_there:
            self.model[key, device] = (segment, before | flags)

    @rule()
    def rehash(self) -> None:
        self.index = self.index.grow(max(1, self.index.count))

    @invariant()
    def same_content(self) -> None:
        assert self.index.count == len(self.model)
        for device in range(3):
            found = lookup(self.index, self.keys, device)
            content = {
                (key, device): (int(found[key]["segment"]), int(found[key]["flags"]))
                for key in np.flatnonzero(found["length"])
            }
            assert content == {at: v for at, v in self.model.items() if at[1] == device}
        best = lookup(self.index, self.keys)
        for key in range(40):
            devices = [d for d in range(3) if (key, d) in self.model]
            assert bool(best[key]["length"]) == bool(devices)
            if devices:
                assert best[key]["device"] == min(devices)
        assert len(self.index.snapshot()) == 64 * len(self.model)


TestTable = TableMachine.TestCase
TestTable.settings = settings(deadline=None, max_examples=50, stateful_step_count=40)


def test_attach_reads_but_does_not_write() -> None:
    keys = make_keys(100)
    index = _native.Index(300, seed=99)
    index.insert(make_records(keys, 1))
    index.insert(make_records(keys, 2))
    reader = _native.Index.attach(index.fd)
    assert (index.is_writable, reader.is_writable) == (True, False)
    assert reader.fd != index.fd
    assert not os.get_inheritable(reader.fd)
    assert not os.get_inheritable(index.fd)
    assert (reader.count, reader.capacity) == (200, index.capacity)
    assert (lookup(reader, keys) == lookup(index, keys)).all()
    assert sorted(reader.snapshot()) == sorted(index.snapshot())
    # The owner's ranks hold for all readers, until a reader sets its own.
    index.set_ranks(bytes([0, 9, 1]))
    assert lookup(reader, keys)["device"][0] == 2
    reader.set_ranks(bytes([0, 1, 9]))
    assert lookup(reader, keys)["device"][0] == 1
    assert lookup(index, keys)["device"][0] == 2
    for change in (
        lambda: reader.insert(make_records(keys)), lambda: reader.remove(make_records(keys)),
        lambda: reader.set_flags(make_records(keys), 1), lambda: reader.grow(1000),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="read-only"):
            change()
    index.insert(make_records(make_keys(1, 5)))
    assert reader.match_prefix(make_keys(1, 5)) == 1
    larger = index.grow(1000)
    assert reader.is_superseded
    index.close()
    larger.close()
    assert reader.match_prefix(keys) == 100


def test_the_descriptor_gives_no_way_to_write() -> None:
    index = _native.Index(10)
    with pytest.raises(PermissionError):
        os.pwrite(index.fd, b"x", 0)
    with pytest.raises(PermissionError):
        os.ftruncate(index.fd, 0)
    with pytest.raises(PermissionError):
        _native.Arena(index.fd, 4096)


READER = """
import sys
import numpy as np
from kvfs import _native
from tests.native.support import RECORD, make_keys
index = _native.Index.attach(int(sys.argv[1]))
out = np.zeros(1000, RECORD)
print(index.lookup(make_keys(1000), out), index.match_prefix(make_keys(1000)), out["entry"].sum())
"""


def test_another_process_attaches_by_descriptor() -> None:
    index = _native.Index(1000)
    index.insert(make_records(make_keys(1000)))
    path = f"/proc/{os.getpid()}/fd/{index.fd}"
    code = READER.replace("int(sys.argv[1])", f"__import__('os').open({path!r}, 0)")
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1000", "1000", str(sum(range(1000)))]


def test_a_forked_child_may_read_but_not_write() -> None:
    code = """
import os
from kvfs import _native
from tests.native.support import make_keys, make_records
index = _native.Index(10)
index.insert(make_records(make_keys(2)))
pid = os.fork()
if pid == 0:
    try:
        index.insert(make_records(make_keys(3)))
    except ValueError:
        os._exit(index.match_prefix(make_keys(2)))
    os._exit(99)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), index.count)
"""
    done = run_python(code)
    assert done.stdout.split() == ["2", "2"], done.stderr


# --- hostile tables ---------------------------------------------------------------------------


def forge(image: bytes, seals: int = fcntl.F_SEAL_SHRINK) -> int:
    fd = os.memfd_create("forged", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.write(fd, image)
    if seals:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def image_of(count: int = 20) -> bytearray:
    index = _native.Index(count)
    index.insert(make_records(make_keys(count)))
    return bytearray(os.pread(index.fd, 1 << 24, 0))


def patched(at: int, format_: str, value: int) -> bytearray:
    image = image_of()
    struct.pack_into(format_, image, at, value)
    return image


HOSTILE = {
    "empty": b"",
    "short": bytes(4095),
    "zeroes": bytes(8192),
    "magic": patched(0, "<Q", 1),
    "version": patched(8, "<I", 2),
    "record size": patched(12, "<I", 128),
    "no slots": patched(16, "<Q", 0),
    "slots no power of two": patched(16, "<Q", 48),
    "slots too many": patched(16, "<Q", 1 << 63),
    "slots overflow": patched(16, "<Q", 1 << 58),
    "twice the slots": patched(16, "<Q", 128),
    "capacity": patched(24, "<Q", 1 << 40),
    "truncated": image_of()[:-64],
    "too long": image_of() + bytes(64),
}


@pytest.mark.parametrize("image", HOSTILE.values(), ids=HOSTILE.keys())
def test_attach_refuses(image: bytes) -> None:
    fd = forge(image)
    with pytest.raises(ValueError, match="not an index"):
        _native.Index.attach(fd)
    os.close(fd)


def test_attach_refuses_what_can_shrink() -> None:
    fd = forge(image_of(), seals=0)
    with pytest.raises(ValueError, match="sealed"):
        _native.Index.attach(fd)
    os.close(fd)
    with open("/dev/zero", "rb") as device, pytest.raises(ValueError, match="sealed"):
        _native.Index.attach(device.fileno())
    with pytest.raises(OSError, match="Bad file"):
        _native.Index.attach(-1)


@pytest.mark.parametrize("pattern", ["ones", "odd sequences", "tombstones", "full", "noise"])
def test_lookups_in_a_hostile_table_end(pattern: str) -> None:
    slots = 4096
    image = bytearray(HEADER + slots * 64)
    image[:HEADER] = image_of()[:HEADER]
    struct.pack_into("<QQ", image, 16, slots, slots // 2)
    table = np.frombuffer(image, RECORD, offset=HEADER)
    if pattern == "ones":
        image[HEADER:] = b"\xff" * (slots * 64)
    if pattern == "odd sequences":
        table["sequence"] = 1
    if pattern == "tombstones":
        table["device"] = table["flags"] = 0xFFFF
        table["segment"] = 2**32 - 1
    if pattern == "full":
        table["length"] = 1
    if pattern == "noise":
        image[HEADER:] = np.random.default_rng(1).bytes(slots * 64)
    fd = forge(bytes(image))
    index = _native.Index.attach(fd)
    keys = make_keys(300)
    assert not lookup(index, keys)["length"].any()
    assert index.match_prefix(keys) == 0
    assert len(index.snapshot()) <= slots * 64
    index.close()
    os.close(fd)


def test_a_writer_that_died_within_a_change_costs_that_slot_only() -> None:
    image = image_of(20)
    table = np.frombuffer(image, RECORD, offset=HEADER)
    stuck = int(np.flatnonzero(table["length"])[3])
    table["sequence"][stuck] |= 1
    key = table["key"][stuck].copy()
    fd = forge(bytes(image))
    index = _native.Index.attach(fd)
    for _ in range(3):
        assert index.lookup(make_keys(20), np.zeros(20, RECORD)) == 19
    assert index.match_prefix(key[None]) == 0
    assert len(index.snapshot()) == 19 * 64
    os.close(fd)


def test_readers_survive_scribbling() -> None:
    """Whatever is written under a reader, it ends and stays in bounds."""
    image = image_of(20)
    fd = forge(bytes(image))
    scribbler = _native.Arena(fd, len(image))
    index = _native.Index.attach(fd)
    keys, rng = make_keys(20), np.random.default_rng(1)
    view = np.frombuffer(scribbler, np.uint8)
    for _ in range(30):
        view[:] = rng.integers(0, 256, len(image), np.uint8)
        index.lookup(keys, np.zeros(20, RECORD))
        index.match_prefix(keys)
        assert len(index.snapshot()) <= len(image)
        _ = index.count, index.is_superseded
    del view
    scribbler.close()
    os.close(fd)


# --- threads ----------------------------------------------------------------------------------


def read_while(index: Any, keys: Any, stop: threading.Event, wrong: list[str]) -> None:
    out = np.zeros(len(keys), RECORD)
    while not stop.is_set():
        index.lookup(keys, out)
        hit = out[out["length"] > 0]
        if (hit["entry"] != hit["segment"]).any() or (hit["page"] != hit["segment"]).any():
            wrong.append("torn")
        if not out["length"][:50].all():
            wrong.append("a resident key was missed")
        if index.match_prefix(keys) < 50:
            wrong.append("a resident prefix was missed")


def test_readers_see_whole_records_while_one_writes() -> None:
    index = _native.Index(300)
    keys = make_keys(200)
    records = make_records(keys)

    def set_version(version: int) -> None:
        for name in ("segment", "entry", "page"):
            records[name] = version

    set_version(0)
    index.insert(records)
    stop, wrong = threading.Event(), []
    readers = [
        threading.Thread(target=read_while, args=(i, keys, stop, wrong))
        for i in (index, _native.Index.attach(index.fd))
    ]
    for thread in readers:
        thread.start()
    for version in range(1, 1500):
        index.remove(records[50:])
        set_version(version)
        index.insert(records)
    stop.set()
    for thread in readers:
        thread.join()
    assert not wrong


def test_close_waits_for_running_calls() -> None:
    keys = make_keys(100_000)
    index = _native.Index(100_000)
    index.insert(make_records(keys))
    outcomes: list[Any] = []

    def look_up() -> None:
        try:
            while True:
                outcomes.append(index.match_prefix(keys))
        except ValueError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=look_up) for _ in range(3)]
    for thread in threads:
        thread.start()
    while not outcomes:
        index.match_prefix(keys)
    index.close()
    for thread in threads:
        thread.join()
    assert set(outcomes) == {100_000, "index is closed"}


# --- arguments --------------------------------------------------------------------------------


def test_closed() -> None:
    index = _native.Index(1)
    index.close()
    index.close()
    keys, out = make_keys(1), bytearray(64)
    for call in (
        lambda: index.fd, lambda: index.capacity, lambda: index.count,
        lambda: index.is_superseded, lambda: index.is_writable, lambda: index.lookup(keys, out),
        lambda: index.lookup_device(keys, 0, out), lambda: index.match_prefix(keys),
        lambda: index.insert(make_records(keys)), lambda: index.remove(make_records(keys)),
        lambda: index.set_flags(make_records(keys), 0), index.snapshot, lambda: index.grow(1),
        lambda: index.set_ranks(b""),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="closed"):
            call()


@pytest.mark.parametrize("capacity", [0, -1, 2**33 + 1, 2**64])
def test_capacity_out_of_range(capacity: int) -> None:
    with pytest.raises(ValueError, match="capacity"):
        _native.Index(capacity)
    with pytest.raises(ValueError, match="capacity"):
        _native.Index(1).grow(capacity)


def test_wrong_arguments() -> None:
    index = _native.Index(10)
    keys = make_keys(2)
    records = make_records(keys)
    with pytest.raises(ValueError, match="out"):
        index.lookup(keys, bytearray(64))
    with pytest.raises(ValueError, match="keys"):
        index.lookup(bytes(33), bytearray(64))
    with pytest.raises(BufferError):
        index.lookup(keys, bytes(128))
    with pytest.raises(ValueError, match="records"):
        index.insert(bytes(63))
    with pytest.raises(ValueError, match="replaced"):
        index.insert(records, bytearray(64))
    with pytest.raises(ValueError, match="ranks"):
        index.set_ranks(bytes(257))
    with pytest.raises(ValueError, match="flags"):
        index.set_flags(records, 0x10000)
    with pytest.raises(ValueError, match="device"):
        index.lookup_device(keys, 0x10000, bytearray(128))
    records["length"][1] = 0
    with pytest.raises(ValueError, match="record 1 has length 0"):
        index.insert(records)
    assert index.count == 0
    with pytest.raises(TypeError):
        type("Sub", (_native.Index,), {})
