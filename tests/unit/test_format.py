"""The on-media format: layouts that never change, round trips, and the document."""

import re
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfs import _native
from kvfs.devices.filesystem import READ_BYTES_MAX
from kvfs.engine import format as fmt
from kvfs.engine.format import (
    ENTRY,
    HEADER,
    SUPERBLOCK,
    HeaderKind,
    NamespaceRecord,
    SegmentHeader,
    SegmentKind,
    Superblock,
)
from kvfs.errors import CorruptionError, FormatVersionError, UsageError
from tools.format_doc import example_entry, main, render_format_doc

ROOT = Path(__file__).resolve().parent.parent.parent
U32, U64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
UUIDS = st.binary(min_size=16, max_size=16).map(lambda raw: uuid.UUID(bytes=raw))
BYTES16 = st.binary(min_size=16, max_size=16)
NAMESPACES = st.lists(
    st.builds(NamespaceRecord, namespace_id=U64, name=st.text(), layout_json=st.text()), max_size=5
).map(tuple)


@st.composite
def headers(draw: Any) -> SegmentHeader:
    kind = draw(st.sampled_from(SegmentKind))
    count, payload = draw(st.integers(0, 2**20)), draw(st.integers(0, 2**40))
    room = payload + fmt.HEADERS_BYTES + count * fmt.ENTRY_BYTES
    return SegmentHeader(
        kind=draw(st.sampled_from(HeaderKind)),
        pool_uuid=draw(UUIDS),
        device_uuid=draw(UUIDS),
        slot=draw(U32),
        generation=draw(U32),
        namespace_id=draw(U64),
        layout_digest=draw(BYTES16),
        segment_kind=kind,
        segment_bytes=draw(st.integers(room if kind == SegmentKind.LOG else payload, 2**63)),
        created_ns=draw(U64),
        entry_count=count,
        payload_bytes=payload,
        entries_xxh3=draw(BYTES16),
    )


SUPERBLOCKS = st.builds(
    Superblock, pool_uuid=UUIDS, device_uuid=UUIDS, device_index=U32, tier=U32, segment_bytes=U64,
    capacity_bytes=U64, sequence=U64, generation_limit=U32, owner_epoch=U64, owner_host=BYTES16,
    owner_boot=BYTES16, owner_pid=U64, heartbeat_ns=U64, location=U64, namespaces=NAMESPACES,
)  # fmt: skip


# --- what must never change without a new version


def test_structures_are_packed_and_aligned() -> None:
    for dtype in (ENTRY, HEADER, SUPERBLOCK):
        end = 0
        assert dtype.fields is not None
        for name in dtype.names or ():
            kind, offset = dtype.fields[name][:2]
            assert offset == end, f"hole before {name}"
            if kind.kind == "u" and kind.subdtype is None:
                assert offset % kind.itemsize == 0, f"{name} is not aligned"
            end = offset + kind.itemsize
        assert end == dtype.itemsize
        assert dtype.names is not None
        assert dtype.names[-1] == "checksum"


def test_sizes_and_offsets_of_version_1() -> None:
    assert (fmt.FORMAT_VERSION, ENTRY.itemsize, HEADER.itemsize, SUPERBLOCK.itemsize) == (
        1, 128, 4096, 4096,
    )  # fmt: skip
    offsets = {name: ENTRY.fields[name][1] for name in ENTRY.names or ()}  # type: ignore[index]
    assert offsets == {
        "key": 0, "parent": 32, "offset": 64, "stored_bytes": 72, "logical_bytes": 80,
        "token_count": 88, "codec": 92, "flags": 93, "reserved": 94, "payload_xxh3": 96,
        "reserved2": 112, "checksum": 120,
    }  # fmt: skip
    assert HEADER.fields["entries_xxh3"][1] == 112  # type: ignore[index]
    assert SUPERBLOCK.fields["table_xxh3"][1] == 152  # type: ignore[index]


def test_bytes_of_version_1() -> None:
    """Encoders of this version give these bytes for ever."""
    header = SegmentHeader(
        kind=HeaderKind.SEAL, pool_uuid=uuid.UUID(int=1), device_uuid=uuid.UUID(int=2), slot=3,
        generation=4, namespace_id=5, layout_digest=b"L" * 16, segment_kind=SegmentKind.LOG,
        segment_bytes=1 << 24, created_ns=6, entry_count=7, payload_bytes=8192,
        entries_xxh3=b"E" * 16,
    )  # fmt: skip
    assert _native.xxh3_128(fmt.encode_header(header)).hex() == "3aed5bacb26319745affaa1a586c7572"
    superblock = Superblock(
        pool_uuid=uuid.UUID(int=1), device_uuid=uuid.UUID(int=2), device_index=3, tier=2,
        segment_bytes=1 << 24, capacity_bytes=1 << 30, location=9,
        namespaces=(NamespaceRecord(5, "default", "{}"),),
    )  # fmt: skip
    assert (
        _native.xxh3_128(fmt.encode_superblock(superblock)).hex()
        == "0fb722e5175fd25052e343065e564199"
    )
    assert _native.xxh3_128(example_entry()).hex() == "89c4e0c8728ed86c5e9356d7f6d79b36"


def test_positions() -> None:
    assert (fmt.OPEN_POSITION, fmt.SEAL_POSITION) == (4096, 8192)
    assert [fmt.entry_position(i) for i in (0, 1, 31)] == [8320, 8448, 12288]
    assert [fmt.sidecar_bytes(n) for n in (0, 1, 32, 33)] == [8192, 12288, 12288, 16384]


def test_seeds_differ_by_device_slot_and_generation() -> None:
    one, two = uuid.UUID(int=1), uuid.UUID(int=2)
    seeds = {fmt.entry_seed(d, s, g) for d in (one, two) for s in (0, 1) for g in (0, 1, 256)}
    assert len(seeds) == 12


def test_a_superblock_never_outgrows_what_a_device_reads() -> None:
    assert fmt.SUPERBLOCK_BYTES_MAX == READ_BYTES_MAX


# --- round trips


@given(headers())
def test_headers_round_trip(header: SegmentHeader) -> None:
    raw = fmt.encode_header(header)
    assert len(raw) == 4096
    assert fmt.decode_header(raw, header.kind, "here") == header
    assert fmt.decode_header(raw + b"more", header.kind, "here") == header
    other = HeaderKind.SEAL if header.kind == HeaderKind.OPEN else HeaderKind.OPEN
    with pytest.raises(CorruptionError, match="wrong header kind: here"):
        fmt.decode_header(raw, other, "here")


@given(SUPERBLOCKS)
def test_superblocks_round_trip(superblock: Superblock) -> None:
    raw = fmt.encode_superblock(superblock)
    assert len(raw) % 4096 == 0
    assert fmt.decode_superblock(raw, "here") == superblock


@given(st.lists(st.tuples(U64, U64, U32), min_size=1, max_size=40), U64)
def test_entries_round_trip(rows: list[tuple[int, int, int]], seed: int) -> None:
    entries = np.zeros(len(rows), ENTRY)
    for entry, (key, offset, tokens) in zip(entries, rows, strict=True):
        entry["key"][:8] = np.frombuffer(key.to_bytes(8, "little"), np.uint8)
        entry["offset"] = offset % (1 << 40) // 4096 * 4096
        entry["stored_bytes"] = entry["logical_bytes"] = 4096
        entry["token_count"] = tokens
    _native.sign_entries(entries, seed)
    summary = entries[::-1].tobytes()
    found, indices, end = _native.scan_entries(summary, seed, len(rows), 0)
    assert found == entries.tobytes()
    assert np.frombuffer(indices, np.uint32).tolist() == list(range(len(rows)))
    assert end == len(rows)
    assert _native.scan_entries(summary, seed ^ 1, len(rows), 0)[0] == b""


# --- versions and limits


def test_another_version_is_named() -> None:
    for dtype, magic, decode in (
        (HEADER, fmt.SEGMENT_MAGIC, lambda raw: fmt.decode_header(raw, HeaderKind.OPEN, "here")),
        (SUPERBLOCK, fmt.SUPERBLOCK_MAGIC, lambda raw: fmt.decode_superblock(raw, "here")),
    ):
        record = np.zeros(1, dtype)
        record["magic"], record["format_version"] = magic, 2
        raw = record.tobytes()[:-8]
        raw += _native.xxh3_64(raw).to_bytes(8, "little")
        with pytest.raises(FormatVersionError, match=r"version 2: here: .* reads version 1"):
            decode(raw)


def test_too_many_namespaces_are_refused() -> None:
    superblock = Superblock(
        pool_uuid=uuid.UUID(int=1), device_uuid=uuid.UUID(int=2), device_index=3, tier=2,
        segment_bytes=1 << 24, capacity_bytes=1 << 30,
        namespaces=(NamespaceRecord(5, "default", "x" * fmt.SUPERBLOCK_BYTES_MAX),),
    )  # fmt: skip
    with pytest.raises(UsageError, match="too many namespaces"):
        fmt.encode_superblock(superblock)


# --- the document


def test_every_field_and_value_has_a_meaning() -> None:
    for dtype, meanings in (
        (ENTRY, fmt.ENTRY_FIELDS),
        (HEADER, fmt.HEADER_FIELDS),
        (SUPERBLOCK, fmt.SUPERBLOCK_FIELDS),
    ):
        assert dtype.names == tuple(meanings)
    kinds = (fmt.HeaderKind, fmt.SegmentKind, fmt.Codec, fmt.EntryFlag)
    assert list(fmt.VALUES) == [f"{kind.__name__}.{m.name}" for kind in kinds for m in kind]


def test_the_document_is_up_to_date() -> None:
    assert (ROOT / "FORMAT.md").read_text() == render_format_doc(), (
        "run 'python tools/format_doc.py'"
    )
    assert main(["--check"]) == 0


def test_the_document_is_fit_to_read() -> None:
    text = render_format_doc()
    assert text.isascii()
    assert not re.search(r"\{\w*\}", text), "a placeholder was left"
    for line in text.splitlines():
        assert len(line) <= 100 or line.startswith("|"), line
        assert line == line.rstrip()
    assert [line for line in text.splitlines() if line.startswith("# ")] == [
        "# The on-media format of kvfs, version 1"
    ]
    for name in (*fmt.ENTRY_FIELDS, *fmt.HEADER_FIELDS, *fmt.SUPERBLOCK_FIELDS):
        assert f"`{name}`" in text


def test_the_example_can_be_followed_by_hand() -> None:
    """Read the hex of the document, not the code, and check it as the text says."""
    text = render_format_doc()
    rows = re.findall(r"^ +(\d+)  ((?:[0-9a-f]{8} ?){4})", text, re.MULTILINE)
    assert [int(start) for start, _ in rows] == list(range(0, 128, 16))
    raw = bytes.fromhex("".join(row for _, row in rows))
    identity = re.search(r"^ +(00112233 .*)$", text, re.MULTILINE)
    assert identity is not None
    seed = _native.xxh3_64(bytes.fromhex(identity[1]))
    assert f"which is `{seed:#018x}`" in text
    assert _native.xxh3_64(raw[:120], seed) == int.from_bytes(raw[120:], "little")
    assert _native.xxh3_128(b"hello") == raw[96:112]


def test_drift_fails_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "FORMAT.md"
    monkeypatch.setattr("tools.format_doc.TARGET", target)
    assert main(["--check"]) == 1
    assert main([]) == 0
    assert main(["--check"]) == 0
    target.write_text(target.read_text().replace("4088", "4089"))
    assert main(["--check"]) == 1
    assert main(["--what"]) == 2


def test_the_tool_runs_as_the_makefile_runs_it() -> None:
    command = [sys.executable, "tools/format_doc.py", "--check"]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 0
