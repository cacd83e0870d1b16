"""kvfs-admin: what it answers, how it exits, and what it leaves alone."""

import json
import os
import pty
import re
import subprocess
import sys

import pytest

import kvfs
from kvfs.cli import admin as command
from kvfs.control import ControlServer
from tests.cli.helpers import Admin, golden, shape


@pytest.fixture
def owned(pool_path):
    """The pool, owned by this process, which answers on its control socket."""
    with kvfs.open_pool(pool_path) as pool, ControlServer(pool, mount="/mnt/kv"):
        yield pool


# --- pool create


def url(root, size="128MiB"):
    return f"dir:{root}/dev?size={size}&segment=16MiB"


def test_create(root, capsys):
    run = Admin(capsys, root / "new")
    done = run("pool", "create", url(root), "dram:?size=64MiB&segment=16MiB", "--name", "mine")
    assert done.code == 0
    assert "making pool mine" in done.out
    assert re.search(r"2 +dir0 +dir +128.0 MiB +16.0 MiB +8 ", done.out)
    assert "now 'kvfs mount" in done.err
    with kvfs.open_pool(root / "new") as pool:
        assert pool.name == "mine"


def test_create_dry_run_changes_nothing(root, capsys):
    done = Admin(capsys, root / "new")("pool", "create", url(root), "--dry-run")
    assert done.code == 0
    assert "would make pool new" in done.out
    assert list(root.iterdir()) == []


def test_create_refusals(root, empty_pool, capsys):
    for dry in ((), ("--dry-run",)):
        again = Admin(capsys, empty_pool)("pool", "create", url(root), *dry)
        assert (again.code, again.out) == (16, "")
        taken = Admin(capsys, root / "other")("pool", "create", url(root), *dry)
        assert taken.code == 16
        assert "belongs to a pool" in taken.err
    small = Admin(capsys, root / "other")("pool", "create", f"dir:{root}/x?size=32MiB")
    assert small.code == 2
    assert "device too small" in small.err
    wrong = Admin(capsys, root / "other")("pool", "create", "tape:/dev/st0")
    assert wrong.code == 2
    assert "unknown device" in wrong.err


def test_create_tells_what_does_not_fit(root, capsys):
    large = f"dir:{root}/dev?size=900TiB&segment=1GiB"
    done = Admin(capsys, root / "new")("pool", "create", large, "--dry-run")
    assert done.code == 0
    assert "warning: dir0 may grow to 900.0 TiB, but" in done.err
    assert "free; it will be full before" in done.err


def test_create_refuses_memory_that_is_not_there(root, capsys):
    for dry in ((), ("--dry-run",)):
        done = Admin(capsys, root / "new")("pool", "create", "dram:?size=900TiB", *dry)
        assert (done.code, done.out) == (12, "")
        assert "not enough memory: dram0: 900.0 TiB asked for" in done.err
        two = ("dram:?size=64MiB&segment=16MiB", "dram:?size=900TiB&name=large")
        done = Admin(capsys, root / "new")("pool", "create", *two, *dry)
        assert done.code == 12
        assert "not enough memory: large: 900.0 TiB" in done.err
    assert not (root / "new").exists()


def test_create_needs_a_place(root, capsys):
    assert command.main(["pool", "create", url(root)]) == 2
    assert "no pool given" in capsys.readouterr().err


# --- pool status, list


def test_status_offline(admin):
    done = admin("pool", "status")
    assert done.code == 0
    assert "state  ONLINE" in done.out
    assert "nobody; opened for this question only" in done.out
    assert "4 contexts in 2 namespaces" in done.out


def test_status_online(admin, owned):
    done = admin("pool", "status")
    assert f"pid {os.getpid()}" in done.out
    assert "/mnt/kv" in done.out
    assert done.err == ""


def test_status_of_a_sound_pool_is_quiet(admin):
    done = admin("pool", "status", "-x")
    assert (done.code, done.out, done.err) == (0, "", "")


def test_status_of_a_sick_pool(admin, owned):
    owned.store.state.devices[0].failures = 2
    done = admin("pool", "status", "-x")
    assert done.code == 3
    assert done.out == "kv0: online: device dir0 failed 2 writes or persists\n"
    assert "action" in admin("pool", "status").out


def test_devices_are_listed_with_their_places(admin, root):
    head, line = admin("device", "list").out.splitlines()[:2]
    assert head.split()[-1] == "where"
    assert line.split()[-1] == str(root / "dev")
    assert "where" not in admin("pool", "status").out


def test_status_exact_and_without_header(admin):
    line = admin("device", "list", "-p", "-H").out.splitlines()[0].split("\t")
    assert line[:5] == ["2", "dir0", "dir", "online", str(128 << 20)]


def test_pool_is_found(admin, owned, monkeypatch, capsys):
    by_default = command.main(["pool", "status"])
    assert (by_default, "kv0" in capsys.readouterr().out) == (0, True)
    assert command.main(["--pool", "kv0", "pool", "status"]) == 0
    assert command.main(["--pool", str(owned.uuid), "pool", "status"]) == 0
    assert command.main(["pool", "status", "--pool", str(admin.pool)]) == 0
    monkeypatch.setenv("KVFS_POOL", "kv0")
    assert command.main(["pool", "status"]) == 0
    capsys.readouterr()
    assert command.main(["--pool", "nope", "pool", "status"]) == 10
    assert "no pool called 'nope' is open" in capsys.readouterr().err


def test_pool_is_not_found(root, capsys):
    assert command.main(["pool", "status"]) == 2
    assert "none is open" in capsys.readouterr().err
    assert Admin(capsys, root / "nope")("pool", "status").code == 10


def test_several_pools_are_open(admin, owned, root, capsys):
    with (
        kvfs.create_pool(root / "two", [f"dir:{root}/dev2?size=64MiB"]) as other,
        ControlServer(other),
    ):
        assert command.main(["pool", "status"]) == 2
        assert "2 are open" in capsys.readouterr().err
        listed = admin("pool", "list", "--json").json
        assert {pool["name"] for pool in listed["pools"]} == {"kv0", "two"}


def test_owner_without_a_socket(admin, pool_path):
    with kvfs.open_pool(pool_path):
        done = admin("pool", "status")
    assert done.code == 11
    assert f"held by pid {os.getpid()}" in done.err


# --- contexts


@pytest.mark.parametrize("is_online", [True, False])
def test_contexts(admin, is_online, request):
    if is_online:
        request.getfixturevalue("owned")
    names = [line.split()[-1] for line in admin("context", "list").out.splitlines()[1:]]
    assert names == ["large", "m/chat/1", "m/chat/2", "small"]
    by_size = admin("context", "list", "--sort", "size", "-H", "-p").out.splitlines()
    assert [line.split("\t")[0] for line in by_size] == ["5242880", "327680", "16384", "10000"]
    only = admin("context", "list", "--namespace", "m", "-H").out.splitlines()
    assert len(only) == 2
    shown = admin("context", "show", "m/chat/1").out
    assert "40 of 8.0 KiB" in shown
    assert "2560, 64 per block" in shown
    assert re.search(r"2 +dir0 +40 +320.0 KiB", shown)
    assert admin("context", "show", "m/nope").code == 10
    assert admin("context", "list", "--namespace", "nope").code == 10


def test_context_list_is_limited(admin):
    done = admin("context", "list", "--limit", "2", "-H")
    assert len(done.out.splitlines()) == 2
    assert "more than 2" in done.err


@pytest.mark.parametrize("is_online", [True, False])
def test_context_drop(admin, is_online, request):
    if is_online:
        request.getfixturevalue("owned")
    dry = admin("context", "drop", "m/chat/2", "large", "-n")
    assert (dry.code, len(admin("context", "list", "-H").out.splitlines())) == (0, 4)
    assert "would drop 2 contexts, 5.0 MiB" in dry.out
    refused = admin("context", "drop", "m/chat/2", "large")
    assert refused.code == 16
    assert "KVFS_ASSUME_YES=kv0" in refused.err
    assert len(admin("context", "list", "-H").out.splitlines()) == 4
    done = admin("context", "drop", "m/chat/2", "large", "--yes")
    assert (done.code, len(admin("context", "list", "-H").out.splitlines())) == (0, 2)
    assert admin("context", "drop", "m/chat/2", "--yes").code == 10


def test_names_are_bytes(admin, pool_path):
    with kvfs.open_pool(pool_path, background=False) as pool:
        pool.namespace("m").context(os.fsdecode(b"caf\xe9"))
    assert "m/caf\\xe9" in admin("context", "list").out
    assert admin("context", "drop", os.fsdecode(b"m/caf\xe9"), "--yes").code == 0


# --- destroy, and how consent is given


def test_destroy_dry_run_changes_nothing(admin, pool_path):
    done = admin("pool", "destroy", "--dry-run")
    assert done.code == 0
    assert "4 contexts in 2 namespaces LOST" in done.out
    with kvfs.open_pool(pool_path) as pool:
        assert pool.statistics().contexts == 4


def test_destroy_refuses_without_consent(admin, pool_path, monkeypatch):
    monkeypatch.setenv("KVFS_ASSUME_YES", "another")
    assert admin("pool", "destroy").code == 16
    assert pool_path.exists()


@pytest.mark.parametrize("way", ["option", "environment"])
def test_destroy(admin, pool_path, root, way, monkeypatch):
    if way == "environment":
        monkeypatch.setenv("KVFS_ASSUME_YES", "kv0")
    done = admin("pool", "destroy", *(["-y"] if way == "option" else []))
    assert done.code == 0
    assert not pool_path.exists()
    assert list((root / "dev").iterdir()) == []


def test_destroy_refuses_a_pool_in_use(admin, owned):
    assert admin("pool", "destroy", "--yes").code == 11


@pytest.mark.parametrize(("typed", "code"), [("kv0", 0), ("kv1", 16), ("y", 16)])
def test_name_is_typed_on_a_terminal(pool_path, typed, code):
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "kvfs.cli.admin", "--pool", pool_path, "pool", "destroy"],
        stdin=theirs, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    os.close(theirs)
    os.write(ours, f"{typed}\n".encode())
    _, err = process.communicate(timeout=60)
    os.close(ours)
    assert process.returncode == code
    assert b"type 'kv0' to go on" in err
    assert pool_path.exists() == (code != 0)


# --- check


def test_check(admin):
    done = admin("check", "--data")
    assert (done.code, done.out) == (0, "")
    assert "nothing is wrong" in done.err
    assert "4 files" not in done.err
    assert "2 files" in done.err


def test_check_finds_and_repairs(admin, root):
    (root / "dev" / "staging" / "left").write_bytes(b"x")
    (path,) = (root / "dev" / "segments").glob("*.file")
    with path.open("r+b") as file:
        file.write(b"X")
    assert admin("check").code == 0
    found = admin("check", "--data")
    assert found.code == 14
    assert "error: dir0 segment" in found.out
    assert "now 'kvfs-admin check --repair'" in found.err
    dry = admin("check", "--data", "--repair", "--dry-run")
    assert dry.code == 14
    assert "would repair" in dry.out
    assert path.exists()
    refused = admin("check", "--data", "--repair")
    assert refused.code == 16
    assert path.exists()
    done = admin("check", "--data", "--repair", "--yes")
    assert done.code == 0
    assert "remove names: file large" in done.out
    assert "nothing is wrong any more" in done.out
    assert not path.exists()
    assert admin("check", "--data").out == ""


def test_check_refuses_a_pool_in_use(admin, owned):
    assert admin("check").code == 11


def test_check_exits_with_3_for_what_is_only_wrong(admin, root):
    (root / "dev" / "stranger").write_bytes(b"x")
    done = admin("check")
    assert done.code == 3
    assert "unknown" not in done.out
    assert "kvfs did not make this file" in done.out


# --- inspect


@pytest.mark.parametrize("is_online", [True, False])
def test_inspect(admin, root, is_online, request):
    if is_online:
        request.getfixturevalue("owned")
    shown = admin("inspect", "superblock", "dir0", "--hex")
    assert shown.code == 0
    assert "dir0 superblock: checksum holds" in shown.out
    assert "4b 56 46 53 53 55 50 31" in shown.out
    assert "namespace" in shown.out
    by_path = admin("inspect", "superblock", f"{root}/dev").out
    assert (
        by_path.partition("\n")[2] == admin("inspect", "superblock", "dir0").out.partition("\n")[2]
    )
    listed = admin("inspect", "segment", "dir0", "-H").out.splitlines()
    assert len(listed) == 3
    log = next(line.split("\t") for line in listed if "\tlog\t" in line and "\t40\t" in line)
    headers = admin("inspect", "segment", "dir0", log[0], "-v")
    assert headers.code == 0
    assert "open header: checksum holds" in headers.out
    assert "seal header: not written" in headers.out
    assert "Protects against" in headers.out
    entries = admin("inspect", "summary", "dir0", f"{log[0]}:{log[1]}", "-H").out.splitlines()
    assert len(entries) == 40
    key = entries[7].split("\t")[-1]
    block = admin("inspect", "block", key, "--hex", "--bytes", "16")
    assert block.code == 0
    assert "entry 7: checksum holds" in block.out
    assert "payload           checksum holds" in block.out
    assert block.out == admin("inspect", "block", "dir0", log[0], "7", "--hex", "--bytes", "16").out


def test_inspect_what_is_not_there(admin):
    assert admin("inspect", "superblock", "dir9").code == 10
    assert admin("inspect", "superblock", "/nowhere").code == 10
    assert admin("inspect", "segment", "dir0", "999").code == 10
    assert admin("inspect", "segment", "dir0", "x").code == 2
    assert admin("inspect", "block", "dir0").code == 2
    assert admin("inspect", "block", "0" * 64).code == 10
    assert admin("inspect", "block", "dir0", "0", "99999999").code == 10


def test_inspect_damage(admin, root):
    path = root / "dev" / "kvfs.superblock"
    raw = bytearray(path.read_bytes())
    raw[100] ^= 1
    path.write_bytes(raw)
    shown = admin("inspect", "superblock", "dir0")
    assert shown.code == 14
    assert "checksum mismatch" in shown.out
    assert "owner_boot" in shown.out
    segment = min((root / "dev" / "segments").glob("*.seg"))
    with segment.open("r+b") as file:
        file.seek(-4096 - 4096 - 100, os.SEEK_END)
        file.write(b"\xff")
    slot = str(int(segment.stem.partition("-")[0], 16))
    assert admin("inspect", "block", "dir0", slot, "0").code == 14


def test_inspect_changes_nothing(admin, root):
    def snapshot():
        return {path: path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}

    before = snapshot()
    admin("inspect", "superblock", "dir0")
    admin("inspect", "segment", "dir0")
    assert snapshot() == before


# --- JSON


COMMANDS = {
    "pool-status": ["pool", "status"],
    "pool-list": ["pool", "list"],
    "device-list": ["device", "list"],
    "context-list": ["context", "list"],
    "context-show": ["context", "show", "m/chat/1"],
    "context-drop": ["context", "drop", "m/chat/1", "-n"],
    "inspect-superblock": ["inspect", "superblock", "dir0"],
    "inspect-segment-list": ["inspect", "segment", "dir0"],
    "inspect-segment": ["inspect", "segment", "dir0", "0"],
    "inspect-summary": ["inspect", "summary", "dir0", "0"],
    "inspect-block": ["inspect", "block", "dir0", "0", "0"],
    "version": ["version"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_json(admin, owned, name):
    done = admin(*COMMANDS[name], "--json")
    assert done.code == 0
    assert done.err == ""
    assert done.json["schema"] == {"command": " ".join(COMMANDS[name][:2]) if name != "version"
                                   else "version", "version": 1}  # fmt: skip
    assert next(iter(done.json)) == "schema"
    golden(f"json/{name}.json", json.dumps(shape(done.json), indent=1) + "\n")


def test_json_of_offline_commands(admin, root):
    (root / "dev" / "stranger").write_bytes(b"x")
    checked = admin("check", "--json")
    assert checked.code == 3
    golden("json/check.json", json.dumps(shape(checked.json), indent=1) + "\n")
    gone = admin("pool", "destroy", "--json", "--yes")
    golden("json/pool-destroy.json", json.dumps(shape(gone.json), indent=1) + "\n")
    (root / "dev" / "stranger").unlink()
    made = admin("pool", "create", url(root), "--json")
    golden("json/pool-create.json", json.dumps(shape(made.json), indent=1) + "\n")


def test_json_times_and_sizes(admin, owned):
    status = admin("pool", "status", "--json").json
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z", status["opened"])
    assert status["capacity_bytes"] == 128 << 20


def test_json_errors(admin):
    missing = admin("context", "show", "m/nope", "--json")
    assert missing.out == ""
    assert missing.error == {
        "message_type": "exit_error",
        "code": 10,
        "error": "NotFoundError",
        "message": missing.error["message"],
    }
    assert admin("--json", "bogus").error["code"] == 2


# --- all the rest


@pytest.mark.parametrize(
    "words", [[], ["pool"], ["pool", "bogus"], ["pool", "status", "extra"], ["--bogus"]]
)
def test_usage(words, capsys):
    assert command.main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "--help" in captured.err


def test_internal_error(admin, monkeypatch, capsys):
    monkeypatch.setattr("kvfs.cli.cmd_pool.find_pool", lambda arguments: 1 / 0)
    done = admin("pool", "status")
    assert done.code == 1
    assert "Traceback" in done.err
    assert "internal error" in done.err


def test_interrupt(admin, monkeypatch):
    def interrupt(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("kvfs.cli.cmd_pool.find_pool", interrupt)
    assert admin("pool", "status").code == 130


def test_permission(admin, monkeypatch):
    def refuse(arguments):
        raise PermissionError(13, "Permission denied", "/pool")

    monkeypatch.setattr("kvfs.cli.cmd_pool.find_pool", refuse)
    assert admin("pool", "status").code == 16


def test_reader_of_a_pipe_goes_away(pool_path):
    script = f"{sys.executable} -m kvfs.cli.admin --pool {pool_path} context list | true"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert done.stderr == ""


def test_version(capsys):
    assert command.main(["version"]) == 0
    assert capsys.readouterr().out == f"kvfs {kvfs.__version__}\n"


def test_online_commands_import_nothing_heavy(owned, pool_path):
    code = (
        "import sys; from kvfs.cli.admin import main\n"
        f"assert main(['--pool', {str(pool_path)!r}, 'pool', 'status', '-x']) == 0\n"
        "heavy = {'numpy', 'trio', 'pyfuse3', 'sqlite3', 'kvfs.pool', 'kvfs._native'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
