"""The pure parts of `make lab`: no guest is started."""

from pathlib import Path

import numpy as np
import pytest
from lab import acks, machine
from lab.initramfs import cpio, depends_of, load_order
from lab.inside.verify import examine
from lab.packages import MAIN, mirror_of
from lab.paths import LabError
from lab.rows import Result, Row, to_text

import kvfs
from tests.crash.victim import LAYOUT, SPACE, expected, perform

# --- what leaves the guest


def test_acknowledgements_are_told_from_objects():
    text = '{"event": "writing"}\ncxl begin 0\nnvme begin 0\ncxl done 0\ncxl begin 1\n'
    told, tallies = acks.parse(text)
    assert told == [{"event": "writing"}]
    assert tallies == {"cxl": acks.Tally(2, {0}), "nvme": acks.Tally(1, set())}


@pytest.mark.parametrize("torn", ["cxl done 1", "cxl do", '{"event": "ver', "c"])
def test_a_torn_last_line_acknowledges_nothing(torn):
    told, tallies = acks.parse(f"cxl begin 0\ncxl done 0\ncxl begin 1\n{torn}")
    assert (told, tallies) == ([], {"cxl": acks.Tally(2, {0})})


def test_tallies_of_boots_are_added():
    total = {"cxl": acks.Tally(2, {0})}
    acks.merge(total, {"cxl": acks.Tally(4, {2}), "nvme": acks.Tally(1, {0})})
    assert total == {"cxl": acks.Tally(4, {0, 2}), "nvme": acks.Tally(1, {0})}
    assert total["cxl"].to_json() == {"begun": 4, "done": [0, 2]}


# --- comparing a pool with them


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A pool to which operations 0 to 7 were written."""
    with kvfs.create_pool(tmp_path / "pool", [f"dir:{tmp_path}/d?size=64MiB&segment=16MiB"]) as p:
        p.namespace(SPACE, LAYOUT, retention="durable")
        for number in range(8):
            perform(p, expected(number))
    return tmp_path / "pool"


def test_a_pool_that_holds_what_was_acknowledged(root):
    verdict = examine(root, 9, range(8))  # the ninth was begun, and is not there
    assert (verdict.blocks, verdict.files) == (12, 2)
    assert (verdict.lost, verdict.corrupt, verdict.phantom) == ([], [], [])


def test_lost_operations_of_each_kind(root):
    verdict = examine(root, 12, range(12))
    assert [line.split(":")[0] for line in verdict.lost] == [
        "operation 8", "operation 9", "operation 10", "operation 9", "file11",
    ]  # fmt: skip
    assert (verdict.corrupt, verdict.phantom) == ([], [])


def test_what_was_never_begun_is_a_phantom(root):
    verdict = examine(root, 4, range(4))
    assert len(verdict.phantom) == 6 + 1 + 1  # blocks, keys of a context, a file
    assert (verdict.lost, verdict.corrupt) == ([], [])


def test_a_flipped_bit_is_corruption(root):
    segment = max((root.parent / "d").rglob("*"), key=lambda path: path.stat().st_size)
    block = expected(0).payloads[0]
    with segment.open("r+b") as file:
        raw = np.frombuffer(file.read(), np.uint8)
        at = raw.tobytes().index(block) + 100
        file.seek(at)
        file.write(bytes([raw[at] ^ 1]))
    verdict = examine(root, 8, range(8))
    assert verdict.corrupt or verdict.lost


# --- the machine


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> machine.Machine:
    modules = tmp_path / "trixie/usr/lib/modules/6.12-amd64"
    modules.mkdir(parents=True)
    monkeypatch.setattr("lab.packages.CACHE", tmp_path)
    return machine.Machine(Path("/lab/run"), MAIN, MAIN, Path("/lab/run/job.json"))


def test_every_backing_file_is_in_the_command_line(lab):
    command = " ".join(machine.qemu_command(lab))
    for name, nbytes in machine.BACKING.items():
        if name != "disk":
            assert f"id={name},share=on,mem-path=/lab/run/{name},size={nbytes}" in command
    assert "-accel tcg" in command
    assert "kvm" not in command
    assert "lab.job=/lab/run/job.json" in command
    assert "file=/lab/run/disk" in " ".join(machine.disk_command(lab))


def test_two_guests_may_have_one_memory(lab):
    shared = machine.Machine(lab.directory, MAIN, MAIN, None, Path("/lab/shared"))
    command = " ".join(machine.qemu_command(shared))
    assert "id=cxl-volatile,share=on,mem-path=/lab/shared," in command
    assert "lab.job" not in command


def test_a_directory_too_deep_for_a_socket_is_refused(lab):
    deep = machine.Machine(Path("/lab") / ("x" * 120), MAIN, MAIN)
    with pytest.raises(LabError, match="too long"):
        deep.prepare()


# --- what is booted


def test_modules_load_behind_what_they_need():
    needs = {"xfs": ["libcrc32c"], "9pnet_virtio": ["9pnet"], "9p": ["9pnet", "netfs"]}
    order = load_order(["9p", "9pnet_virtio", "xfs"], lambda name: needs.get(name, []))
    assert order == ["9pnet", "netfs", "9p", "9pnet_virtio", "libcrc32c", "xfs"]


def test_dependencies_are_read_from_a_module():
    assert depends_of(b"\0license=GPL\0depends=netfs,9pnet\0name=9p\0") == ["netfs", "9pnet"]
    assert depends_of(b"\0depends=\0") == []


def test_an_archive_is_what_the_kernel_reads():
    raw = cpio([("init", 0o100755, b"#!/bin/sh\n")])
    assert raw.startswith(b"070701")
    assert len(raw) % 4 == 0
    header = [int(raw[6 + 8 * i : 14 + 8 * i], 16) for i in range(13)]
    assert (header[1], header[6], header[11]) == (0o100755, 10, 5)
    assert raw[110:115] == b"init\0"
    assert raw[116:126] == b"#!/bin/sh\n"
    assert b"TRAILER!!!" in raw


@pytest.mark.parametrize(
    ("text", "mirror"),
    [
        (
            "Types: deb\nURIs: http://m.example/debian/\nSuites: bookworm\n",
            "http://m.example/debian",
        ),
        ("deb [arch=amd64] https://m.example/debian bookworm main\n", "https://m.example/debian"),
        ("deb http://m.example/debian-security bookworm-security main\n", None),
        ("# deb http://m.example/debian bookworm main\n", None),
    ],
)
def test_the_mirror_is_the_hosts(text, mirror):
    assert mirror_of(text) == mirror


def test_the_table():
    rows = [
        Row("power cuts", "cxl", Result.OK, 12.34, {"lost": 0}),
        Row("poison", "nvdimm", Result.FAILED, 3, reason="no badblocks"),
    ]
    text = to_text(rows)
    assert "power cuts    cxl     ok      12.3     lost 0" in text
    assert text.endswith("    no badblocks\n1 ok, 1 failed, 0 cannot\n")
