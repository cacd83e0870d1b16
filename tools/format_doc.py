"""Render FORMAT.md, the on-media format, from kvfs/engine/format.py.

Layer: tool.

    python tools/format_doc.py            write FORMAT.md
    python tools/format_doc.py --check    exit with 1 if FORMAT.md is not what would be written

Offsets and sizes come from the dtypes, meanings from the dictionaries beside them, the example from
the encoders themselves; only the rules of recovery are written here.
"""

import sys
from collections.abc import Mapping
from enum import IntEnum
from pathlib import Path
from typing import Final
from uuid import UUID

import numpy as np

from kvfs import _native
from kvfs.devices import dax_layout as dax
from kvfs.engine import format as fmt
from kvfs.engine.catalog_schema import SCHEMA_VERSION

TARGET: Final = Path(__file__).resolve().parent.parent / "FORMAT.md"
_EXAMPLE_UUID: Final = UUID("00112233-4455-6677-8899-aabbccddeeff")
_EXAMPLE_SLOT: Final = 3
_EXAMPLE_GENERATION: Final = 7
_EXAMPLE_PAYLOAD: Final = b"hello"

_INTRODUCTION: Final = """\
# The on-media format of kvfs, version {version}

Rendered from `kvfs/engine/format.py` by `tools/format_doc.py`; change it there. A reader of
this page should be able to write a program that reads a medium without kvfs.

## Where things lie

A device of the kind `dir` is a directory:

| file | what it is |
| --- | --- |
| `kvfs.superblock` | the superblock; replaced as a whole (new file, fsync, rename, fsync) |
| `kvfs.lock` | locked (flock) by the owner while it runs; holds its process number |
| `segments/SSSSSSSS-GGGGGGGG.seg` | a log segment of slot S, generation G (hexadecimal) |
| `segments/SSSSSSSS-GGGGGGGG.file`, `.sum` | a file segment: payload file and sidecar |
| `staging/NAME` | files being written; deleted when the device is opened |
| `raw/NNNNNNNNNNNNNNNN` | raw files: one file's bytes, written in place; N: node id (hexadecimal) |

A device of the kind `dram` holds the same log segments and sidecars in memory, and forgets
them. One of the kind `dax` is memory that stays, or a file in its place; see
[A DAX device](#a-dax-device).
"""

_NAMESPACES: Final = """\
The namespace table is MessagePack: an array of maps with the keys `namespace_id` (unsigned
64-bit integer), `name` and `layout_json` (strings). It follows the page at once and is padded
with zeros to a multiple of 4096; the file ends there. Page and table together have at most
{limit} bytes.
"""

_DAX: Final = """\
## A DAX device

All of /dev/daxX.Y, or of a file of a multiple of 2 MiB, is divided so:

| offset | bytes | what |
| ---: | ---: | --- |
| 0 | {copies} * {copy_bytes} | copies of the superblock |
| {labels} | {places} * {label_bytes} | labels, one for each place |
| {bad} | {bad_copies} * {bad_bytes} | copies of the table of bad ranges |
| {header} + p * `segment_bytes` | `segment_bytes` | place p: one log segment, as above |

There are at most {places} places. A segment has a place from its creation until it is freed,
which need not be the one of its slot's number. There are no files, sidecars or raw files.

A **copy** is a page that begins with `KVFSDAX1`, then a sequence and the length of the superblock
(u64 each), its XXH3-128, and an XXH3-64 of these 40 bytes; the superblock follows the page. It
is written to all copies, one persisted after the other, each with the same sequence, one above
the last; {write} of {copies} must succeed. To read, at least {read} must hold, and the one of
the highest sequence counts. If fewer hold, and together with those that only begin so, or cannot
be read, there are fewer than {write}, the device was never formatted; otherwise it is refused.

A **label** is one aligned line of {label_bytes} bytes: `KVFSPLC1`, slot and generation (u32 each),
the device's uuid (16 bytes), 24 zero bytes, and an XXH3-64 of these 56 bytes with the place's
number as its seed. A place whose label does not hold, or is another device's, is free. When a
segment is freed its label is overwritten with zeros. A place is filled with zeros after that was
persisted, and gets its next label after the zeros were.

The **table of bad ranges** begins with `KVFSBAD1` and a count (u64); pairs of offset on the device
and length in bytes (u64 each) follow, then an XXH3-64 of all before it. A place that such a range
touches is given to no segment. The copies are written one after the other; what any of them says
counts. The table is a memory of faults met, no more: a copy that does not hold counts as empty.
`dax_layout.py` has these structures in code.

What was stored is persistent after non-temporal stores, or after the lines were written back, and a
store fence on the same thread; in a file after fdatasync. A power cut may tear what was not, to
8 bytes.

"""

_RECOVERY: Final = """\
## Reading a segment

A segment is read from its end; payloads are not looked at.

1. The **open header**, {open} bytes before the end, must hold: magic, checksum, version, kind,
   and slot and generation as in the name. If its page is all zero, or torn with nothing else
   written in the segment, nothing in it was ever acknowledged: it is freed. If it is damaged
   otherwise, the segment is set aside and nothing in it is served.
2. If the pool, device or layout digest is another, the segment is set aside. If its namespace
   is not known, it is freed.
3. If the **seal header**, {seal} bytes before the end, holds for the same slot and generation,
   and exactly its `entry_count` entries are valid, and their XXH3-128 is its `entries_xxh3`,
   then these are the entries, and their payloads were persisted before the seal was written.
4. Otherwise the segment is **unsealed**. Entry i starts {first} + i * {entry} bytes before the
   end. Entries are scanned for i = 0, 1, 2, ... as long as the position of entry i lies above
   the high-water mark: the largest `offset` + `stored_bytes`, rounded up to 4096, of the valid
   entries found so far. The scan never stops at a bad entry: pages of entries reach the medium
   in any order, and an entry that was acknowledged may lie behind one that never was.
5. An entry is valid if its checksum is, under the seed of this device, slot and generation. All
   others are skipped: torn, never written, or of an earlier life of the same space. The owner
   overwrites with zeros what is neither header nor valid entry, so that damage is told from it.
6. The payload of a sealed segment was written and persisted; the payload of an unsealed one is
   verified against `payload_xxh3`, read from the medium itself, before it is served for the
   first time. A payload that does not match is dropped: its block is missing, never wrong.
7. An unsealed log segment may be appended to again, behind its last valid entry.

A page of entries is only ever rewritten with the valid entries it had and new ones added, and
no entry straddles a sector of 512 bytes; so a torn write cannot lose an entry that was persisted
before.

Of two segments on one slot the one of the lower generation was freed before the slot was used
again, and a crash took the change of its name: it is freed again.

A `.file` without `.sum` holds no header and is freed; a `.sum` without `.file` is deleted. A
file segment whose name the catalog does not know is freed. Where a key has several valid
entries, each of them is the block.

A raw file that the catalog does not know is deleted; a raw file of the catalog that no device has
loses its name. It has no checksum: after a crash it holds what the filesystem below kept of it, at
least what was synced.

## Ordering of writes

| before | after |
| --- | --- |
| open header and name of the segment persisted | first payload written |
| payload written | its entry written; one persist covers both |
| payload and entry persisted | the block is acknowledged as durable |
| everything the seal covers persisted | seal header written, and persisted itself |
| sidecar and payload of a file segment persisted | the payload gets its name |
| bytes and name of a raw file persisted | the catalog names it |
| `generation_limit` persisted in the superblock | a generation below it is used |

After a failed write or persist a segment is never written again and never sealed.

## Versions

`format_version` is in every header and superblock. A reader that finds another number than its
own refuses the medium (FormatVersionError) and changes nothing. Fields called `reserved` are
written as zero; what they will mean comes with a new version.

The catalog, an SQLite database, counts versions of its own (`user_version`, now {schema}). A former
one is brought up to date by an owner's first transaction, whole or not at all; a later one is
refused.
"""


def _type_name(dtype: np.dtype[np.void]) -> str:
    if dtype.subdtype is not None:
        return f"{dtype.itemsize} bytes"
    return "text" if dtype.kind == "S" else f"u{8 * dtype.itemsize}"


def field_table(dtype: np.dtype[np.void], meanings: Mapping[str, str]) -> str:
    """Return a Markdown table of a structure's fields."""
    lines = ["| offset | bytes | type | field | meaning |", "| ---: | ---: | --- | --- | --- |"]
    assert dtype.fields is not None
    for name in dtype.names or ():
        kind, offset = dtype.fields[name][:2]
        lines.append(
            f"| {offset} | {kind.itemsize} | {_type_name(kind)} | `{name}` | {meanings[name]} |"
        )
    return "\n".join(lines)


def enum_table(*kinds: type[IntEnum]) -> str:
    """Return a Markdown table of the values of enums."""
    lines = ["| enum | value | name | meaning |", "| --- | ---: | --- | --- |"]
    for kind in kinds:
        lines.extend(
            f"| {kind.__name__} | {member.value} | {member.name} "
            f"| {fmt.VALUES[f'{kind.__name__}.{member.name}']} |"
            for member in kind
        )
    return "\n".join(lines)


def example_entry() -> bytes:
    """Return a signed summary entry."""
    entry = np.zeros(1, fmt.ENTRY)
    entry["key"] = np.arange(32)
    entry["offset"] = 4096
    entry["stored_bytes"] = entry["logical_bytes"] = len(_EXAMPLE_PAYLOAD)
    entry["token_count"] = 2
    entry["flags"] = fmt.EntryFlag.PARTIAL
    entry["payload_xxh3"] = np.frombuffer(_native.xxh3_128(_EXAMPLE_PAYLOAD), np.uint8)
    seed = fmt.entry_seed(_EXAMPLE_UUID, _EXAMPLE_SLOT, _EXAMPLE_GENERATION)
    _native.sign_entries(entry, seed)
    return entry.tobytes()


def _example() -> str:
    raw = example_entry()
    seed = fmt.entry_seed(_EXAMPLE_UUID, _EXAMPLE_SLOT, _EXAMPLE_GENERATION)
    rows = []
    for start in range(0, len(raw), 16):
        fields = [
            name
            for name in fmt.ENTRY.names or ()
            if fmt.ENTRY.fields is not None and start <= fmt.ENTRY.fields[name][1] < start + 16
        ]
        text = raw[start : start + 16].hex(" ", 4)
        rows.append(f"    {start:3d}  {text:<35}  {', '.join(fields)}".rstrip())
    identity = _EXAMPLE_UUID.bytes + bytes([_EXAMPLE_SLOT, 0, 0, 0, _EXAMPLE_GENERATION, 0, 0, 0])
    return "\n".join([
        "## A worked example",
        "",
        f"The second payload of a segment: the {len(_EXAMPLE_PAYLOAD)} bytes",
        f"`{_EXAMPLE_PAYLOAD.decode()}` at offset 4096, two tokens of a block that is not full, on",
        f"device `{_EXAMPLE_UUID}`, slot {_EXAMPLE_SLOT}, generation {_EXAMPLE_GENERATION}:",
        "",
        *rows,
        "",
        "The seed of its checksum is the XXH3-64 (seed 0) of device uuid, slot and generation:",
        "",
        f"    {identity.hex(' ', 4)}",
        "",
        f"which is `{seed:#018x}`. As entry 1 of a segment of 16 MiB (16777216 bytes) it starts at",
        f"offset 16777216 - {fmt.entry_position(1)} = {(16 << 20) - fmt.entry_position(1)}.",
    ])  # fmt: skip


def _module_text() -> str:
    """Return diagram and rules of the module's docstring; both are Markdown as they are."""
    text = (fmt.__doc__ or "").strip()
    start = text.index("    log segment")
    return text[start : text.index("FORMAT.md is rendered")].rstrip()


def render_format_doc() -> str:
    """Return the text of FORMAT.md."""
    parts = [
        _INTRODUCTION.format(version=fmt.FORMAT_VERSION),
        _module_text(),
        "",
        "## Superblock",
        "",
        f"One page of {fmt.SUPERBLOCK.itemsize} bytes.",
        "",
        field_table(fmt.SUPERBLOCK, fmt.SUPERBLOCK_FIELDS),
        "",
        _NAMESPACES.format(limit=fmt.SUPERBLOCK_BYTES_MAX),
        "## Segment header",
        "",
        f"One page of {fmt.HEADER.itemsize} bytes, twice: open, {fmt.OPEN_POSITION} bytes, and",
        f"seal, {fmt.SEAL_POSITION} bytes before the end of the segment or sidecar.",
        "",
        field_table(fmt.HEADER, fmt.HEADER_FIELDS),
        "",
        "In a log segment payloads and entries never overlap: `payload_bytes`, both headers and",
        "all entries together fit into `segment_bytes`.",
        "",
        "## Summary entry",
        "",
        f"{fmt.ENTRY.itemsize} bytes.",
        f"Entry i starts {fmt.entry_position(0)} + i * {fmt.ENTRY_BYTES} bytes before the end of",
        "the segment or sidecar. A sidecar has a whole number of pages.",
        "",
        field_table(fmt.ENTRY, fmt.ENTRY_FIELDS),
        "",
        "## Values",
        "",
        enum_table(fmt.HeaderKind, fmt.SegmentKind, fmt.Codec, fmt.EntryFlag),
        "",
        _example(),
        "",
        _DAX.format(
            copies=dax.COPIES,
            copy_bytes=dax.COPY_BYTES,
            labels=dax.LABELS_OFFSET,
            places=dax.PLACES_MAX,
            label_bytes=dax.LABEL_BYTES,
            bad=dax.BAD_OFFSET,
            bad_bytes=dax.BAD_BYTES,
            bad_copies=dax.BAD_COPIES,
            header=dax.HEADER_BYTES,
            write=dax.WRITE_QUORUM,
            read=dax.READ_QUORUM,
        ),
        _RECOVERY.format(
            open=fmt.OPEN_POSITION,
            seal=fmt.SEAL_POSITION,
            first=fmt.entry_position(0),
            schema=SCHEMA_VERSION,
            entry=fmt.ENTRY_BYTES,
        ),
    ]
    return "\n".join(parts).rstrip() + "\n"


def main(arguments: list[str]) -> int:
    """Write or check FORMAT.md; return the exit code."""
    if arguments not in ([], ["--check"]):
        sys.stderr.write("usage: format_doc.py [--check]\n")
        return 2
    text = render_format_doc()
    if not arguments:
        TARGET.write_text(text, encoding="ascii")
        return 0
    if TARGET.exists() and TARGET.read_text(encoding="ascii") == text:
        return 0
    sys.stderr.write(f"{TARGET.name} differs from its source; run 'python tools/format_doc.py'\n")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
