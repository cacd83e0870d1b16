"""Extended attributes and `/.kvfs`."""

import json
import os
import random
import re
from pathlib import Path

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

import kvfs
from kvfs.engine.index import RECORD
from kvfs.fuse.mount import Mount
from kvfs.fuse.xattrs import VALUE_BYTES_MAX, extents_json
from kvfs.pool import Pool
from tests.fuse.mounting import MIB, MountedPool, sh, write_file

pytestmark = pytest.mark.fuse


def xattr(path: Path, name: str) -> str:
    return os.getxattr(path, f"user.kvfs.{name}").decode()


def test_getfattr_shows_a_file(area: Path) -> None:
    data = random.Random(1).randbytes(2 * MIB + 5)
    write_file(area / "f", data)
    shown = sh("getfattr -d f", area)
    names = set(re.findall(r"user\.kvfs\.(\w+)=", shown))
    assert names == {
        "tokens", "blocks", "resident_blocks", "layout", "fingerprint", "namespace", "origin",
        "lane", "tiers", "extents",
    }  # fmt: skip
    assert xattr(area / "f", "blocks") == xattr(area / "f", "resident_blocks") == "3"
    assert xattr(area / "f", "tokens") == "0"
    assert xattr(area / "f", "origin") == "file"
    assert xattr(area / "f", "lane") in ("native", "namespace")
    assert xattr(area / "f", "namespace") == area.name
    tiers = json.loads(xattr(area / "f", "tiers"))
    assert tiers.pop("dir0") == tiers.pop("dram0", len(data)) == len(data)
    assert not tiers
    assert kvfs.Layout.from_json(xattr(area / "f", "layout")) == kvfs.Layout()
    assert xattr(area / "f", "fingerprint") == kvfs.Layout().fingerprint().hex()


def test_extents_lead_to_the_bytes(area: Path) -> None:
    data = random.Random(2).randbytes(5 * MIB + 5)
    for name, size in (("small", 2 * MIB + 5), ("large", len(data))):
        write_file(area / name, data[:size])
        with (area / name).open("rb"):
            found = b""
            for extent in json.loads(xattr(area / name, "extents")):
                with open(extent["path"], "rb") as file:
                    file.seek(extent["offset"])
                    found += file.read(extent["length"])
            assert found == data[:size]
    [extent] = json.loads(xattr(area / "large", "extents"))
    assert extent["path"].endswith(".file")


def test_long_lists_of_extents_go_on_in_further_attributes(pool: Pool, mount: Mount) -> None:
    space = pool.namespace("small", kvfs.Layout("uint8", (4096,), 1))
    keys, _ = space.keys(range(4000))
    rows = np.random.default_rng(1).integers(0, 256, (4000, 4096), np.uint8)
    order = np.random.default_rng(2).permutation(4000)
    space.put(keys[order], rows[order])
    space.context("c").append(keys, rows)
    path = mount.mountpoint / "small/c"
    found, name, parts = b"", "extents", 0
    with path.open("rb") as held:
        while name:
            *extents, last = json.loads(xattr(path, name))
            if "path" in last:
                extents.append(last)
            for extent in extents:
                fd = os.open(extent["path"], os.O_RDONLY)
                found += os.pread(fd, extent["length"], extent["offset"])
                os.close(fd)
            name = last.get("next", "").removeprefix("user.kvfs.")
            parts += 1
            if name:
                assert last["length"] == rows.nbytes - len(found)
        assert held.read() == found
    assert found == rows.tobytes()
    assert parts > 3
    assert json.loads(xattr(path, f"extents.{rows.nbytes}")) == []
    with pytest.raises(OSError, match="No data"):
        xattr(path, "extents.x")


def test_extents_start_anywhere_and_fit() -> None:
    records = np.zeros(3000, RECORD)
    records["page"] = np.arange(3000) * 2
    records["length"] = 5000
    records["page"][1] = 0  # where the first one ends, but in another file
    paths = ["a" * 100] + ["\udcff\n" * 40] * 2999
    first = json.loads(extents_json(paths, records))
    assert first[0] == {"path": paths[0], "offset": 0, "length": 5000}
    assert len(extents_json(paths, records)) <= VALUE_BYTES_MAX
    assert first[-1]["next"] == f"user.kvfs.extents.{(len(first) - 1) * 5000}"
    assert first[-1]["length"] == (3000 - len(first) + 1) * 5000
    [middle, *_] = json.loads(extents_json(paths, records, 10_001))
    assert middle == {"path": paths[2], "offset": 4 * 4096 + 1, "length": 4999}


def test_namespace_attributes(area: Path) -> None:
    shown = sh("getfattr -d .", area)
    assert set(re.findall(r"user\.kvfs\.(\w+)=", shown)) == {
        "id", "layout", "fingerprint", "retention",
    }  # fmt: skip
    assert int(xattr(area, "id"), 16) > 0
    (area / "d").mkdir()
    assert os.listxattr(area / "d") == []
    assert os.listxattr(area.parent) == []


def test_retention_can_be_set(mounted: MountedPool) -> None:
    refused = "user.kvfs.{0} of 'ns' was not set: {0} {1}: expected {2}"
    reasons = [
        refused.format("retention", "'forever'", "'cache' or 'durable'"),
        refused.format("deadline_ms", "'5'", "a whole number of milliseconds, 10 to 3600000"),
    ]
    mounted.expected_log += [re.escape(reason) for reason in reasons]
    path = mounted.path / "ns"
    path.mkdir()
    assert xattr(path, "retention") == "cache"
    sh("setfattr -n user.kvfs.retention -v durable ns", mounted.path)
    assert xattr(path, "retention") == "durable"
    with pytest.raises(OSError, match=r"[Ii]nvalid"):
        os.setxattr(path, "user.kvfs.retention", b"forever")
    with pytest.raises(OSError, match=r"[Ii]nvalid"):
        os.setxattr(path, "user.kvfs.deadline_ms", b"5")
    assert [reason for reason in reasons if reason not in mounted.log] == []
    with pytest.raises(FileExistsError):
        os.setxattr(path, "user.kvfs.retention", b"cache", os.XATTR_CREATE)
    with pytest.raises(OSError, match="not supported"):
        os.setxattr(path, "user.kvfs.id", b"1")
    mounted.stop()
    mounted.start()
    assert xattr(path, "retention") == "durable"


def test_attributes_of_users_are_kept(mounted: MountedPool) -> None:
    """They follow the file, and outlive its owner."""
    path = mounted.path / "ns"
    path.mkdir()
    write_file(path / "f", b"x")
    for target in (path, path / "f"):
        os.setxattr(target, "user.engine", b"one")
        os.setxattr(target, "user.engine", b"two", os.XATTR_REPLACE)
        os.setxattr(target, "user.none", b"")
        assert {"user.engine", "user.none"} < set(os.listxattr(target))
        with pytest.raises(FileExistsError):
            os.setxattr(target, "user.engine", b"three", os.XATTR_CREATE)
        with pytest.raises(OSError, match=r"[Nn]o data"):
            os.setxattr(target, "user.missing", b"", os.XATTR_REPLACE)
        os.removexattr(target, "user.none")
    (path / "f").rename(path / "g")
    os.sync()
    mounted.stop()
    mounted.start()
    for target in (path, path / "g"):
        assert os.getxattr(target, "user.engine") == b"two"
        assert "user.none" not in os.listxattr(target)


def test_status_is_json_and_metrics_are_text(shared: MountedPool) -> None:
    assert sorted(os.listdir(shared.path / ".kvfs")) == ["blocks", "metrics", "status.json"]
    assert os.listdir(shared.path / ".kvfs/blocks") == []
    status = shared.status()
    assert status["schema"] == {"command": "status", "version": 1}
    assert status["pool"]["state"] == "online"
    assert status["mount"]["requests"]["lookup"] > 0
    assert status["mount"]["timeouts"] == 0
    assert {device["name"] for device in status["pool"]["devices"]} == {"dir0", "dram0"}
    assert os.stat(shared.path / ".kvfs/status.json").st_size > 100
    families = text_string_to_metric_families((shared.path / ".kvfs/metrics").read_text())
    samples = {sample.name: sample.value for family in families for sample in family.samples}
    assert samples["kvfs_mount_request_seconds_count"] > 0
    assert samples["kvfs_mount_deadline_hits_total"] == 0
    sh("cat .kvfs/status.json .kvfs/metrics && cp .kvfs/status.json /dev/null", shared.path)


def test_blocks_by_key(pool: Pool, mount: Mount) -> None:
    space = pool.namespace("m", kvfs.Layout("uint8", (1000,), 16))
    keys, _ = space.keys(range(40))
    rows = np.random.default_rng(3).integers(0, 256, (3, 16000), np.uint8)
    space.put(keys, rows)
    blocks = mount.mountpoint / ".kvfs/blocks"
    for key, row in zip(keys, rows, strict=True):
        path = blocks / key.tobytes().hex()
        assert path.read_bytes() == row.tobytes()
        assert os.stat(path).st_size == 16000
        assert os.stat(path).st_mode & 0o777 == 0o400
    for name in ("", "00", keys[0].tobytes().hex().upper(), "0" * 64, "x" * 64):
        assert not (blocks / (name or "none")).exists()
    pool.store.drop(space.info.namespace_id, keys[:1])
    assert not (blocks / keys[0].tobytes().hex()).exists()
