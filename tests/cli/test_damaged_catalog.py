"""Commands on a pool whose catalog is damaged: say so, give a way back, or delete it."""

import sqlite3
from pathlib import Path

import pytest

import kvfs


@pytest.fixture
def damaged(pool_path):
    with (pool_path / "catalog.sqlite").open("r+b") as file:
        file.write(b"?" * 4096)
    return pool_path


def test_check_names_the_way_back(admin, damaged):
    before = (damaged / "catalog.sqlite").read_bytes()
    for words in (("check",), ("check", "--repair", "--yes")):
        done = admin(*words)
        assert done.code == 14
        assert "catalog.sqlite" in done.out
        assert "'kvfs-admin check --repair --allow-name-loss'" in done.out
        assert "LOST" in done.out
    assert (damaged / "catalog.sqlite").read_bytes() == before


def test_replace(admin, damaged):
    words = ("check", "--repair", "--allow-name-loss")
    dry = admin(*words, "--dry-run")
    assert dry.code == 14
    assert "would repair:\n  replace catalog: " in dry.out
    assert admin(*words).code == 16
    assert not (damaged / "catalog.sqlite.damaged").exists()
    done = admin(*words, "--yes")
    assert done.code == 3
    assert "all names of files and contexts" in done.out
    assert f"{damaged}/catalog.sqlite.damaged" in done.out
    assert (damaged / "catalog.sqlite.damaged").exists()
    assert admin("check", "--data").code == 0
    with kvfs.open_pool(damaged) as pool:
        assert sum(device.block_count for device in pool.statistics().devices) > 0
    assert admin("context", "list").code == 0


def test_loss_is_allowed_for_a_repair_only(admin, damaged):
    assert admin("check", "--allow-name-loss").code == 2


def test_replace_in_json(admin, damaged):
    done = admin("check", "--repair", "--allow-name-loss", "--yes", "--json")
    assert done.code == 3
    assert done.json["is_repaired"]
    assert done.json["findings"][0]["code"] == "catalog-damaged"
    assert done.json["plan"][0]["kind"] == "replace catalog"
    assert done.json["remaining"][0]["code"] == "names-lost"


def test_destroy(admin, damaged, root):
    dry = admin("pool", "destroy", "--dry-run")
    assert dry.code == 0
    assert "would destroy pool kv0" in dry.out
    assert "the catalog is damaged" in dry.out
    assert f"dir:{root}/dev" in dry.out
    assert admin("pool", "destroy").code == 16
    assert (damaged / "catalog.sqlite").exists()
    done = admin("pool", "destroy", "--yes", "--json")
    assert done.code == 0
    assert (done.json["contexts"], done.json["is_catalog_damaged"]) == (None, True)
    assert not damaged.exists()
    assert [path for path in (root / "dev").rglob("*") if path.is_file()] == []


def test_destroy_says_which_device_it_does_not_find(admin, damaged, root):
    (root / "dev").rename(root / "away")
    done = admin("pool", "destroy", "--yes")
    assert done.code == 0
    assert f"no device of this pool is found in dir:{root}/dev" in done.out
    assert (root / "away" / "kvfs.superblock").exists()


def test_destroy_refuses_what_is_no_pool(admin, pool_path, tmp_path):
    del pool_path
    path = Path(tmp_path / "mine")
    path.mkdir()
    with sqlite3.connect(path / "catalog.sqlite") as connection:
        connection.execute("CREATE TABLE mine (x)")
    connection.close()
    done = admin("--pool", str(path), "pool", "destroy", "--yes")
    assert done.code == 16
    assert "not known for a pool" in done.err
    assert [entry.name for entry in path.iterdir()] == ["catalog.sqlite"]
