"""Pools written by released formats open, and hold what they held; later formats are refused."""

import base64
import contextlib
import io
import json
import sqlite3
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

import kvfs
from kvfs import _native
from kvfs.config import parse_device_url
from kvfs.engine import format as fmt
from kvfs.engine.catalog_schema import SCHEMA_VERSION
from kvfs.engine.checker import check_pool
from kvfs.errors import FormatVersionError, RefusedError
from kvfs.tree import Tree
from kvfs.units import PAGE
from tests.compat.make_image import (
    ATTRIBUTES,
    RAW_FILES,
    content_of,
    write_image,
    write_others,
)

IMAGES = Path(__file__).parent / "images"
ARCHIVE_BYTES_MAX = 200 << 10


class Unpacked:
    """An image on disk."""

    def __init__(self, archive: Path, root: Path) -> None:
        self.root = root
        raw = zstandard.ZstdDecompressor().decompress(archive.read_bytes())
        with tarfile.open(fileobj=io.BytesIO(raw)) as members:
            for member in members:
                self._extract(members, member)
        self.manifest: dict[str, Any] = json.loads((root / "manifest.json").read_text())
        with self.catalog() as connection:
            for index, url in connection.execute("SELECT device_index, url FROM devices"):
                moved = url.replace(parse_device_url(url).location, str(root / "device"))
                connection.execute(
                    "UPDATE devices SET url = ? WHERE device_index = ?", (moved, index)
                )

    def _extract(self, members: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        """Extract one member; pages of zeros become holes."""
        path = self.root / member.name
        if member.isdir():
            path.mkdir()
            return
        source = members.extractfile(member)
        assert source is not None
        with path.open("wb") as file:
            while page := source.read(PAGE):
                if any(page):
                    file.write(page)
                else:
                    file.seek(len(page), 1)
            file.truncate(member.size)

    @contextlib.contextmanager
    def catalog(self):
        connection = sqlite3.connect(self.root / "pool" / "catalog.sqlite")
        try:
            with connection:
                yield connection
        finally:
            connection.close()

    def open(self) -> kvfs.Pool:
        return kvfs.open_pool(self.root / "pool", allow_moved=True)


@pytest.fixture(params=["v1", "v1-catalog2"])
def image(request: pytest.FixtureRequest, tmp_path: Path) -> Unpacked:
    return Unpacked(IMAGES / f"{request.param}.tar.zst", tmp_path)


def decoded(names: list[str]) -> list[bytes]:
    return [base64.b64decode(name) for name in names]


def assert_blocks(space: kvfs.Namespace, blocks: dict[str, int]) -> None:
    keys = decoded(list(blocks))
    buffers = [np.zeros(nbytes, np.uint8) for nbytes in blocks.values()]
    assert space.lookup(keys)["length"].tolist() == list(blocks.values())
    assert space.read_into(keys, buffers).all()
    for name, buffer in zip(blocks, buffers, strict=True):
        assert buffer.tobytes() == content_of(name, len(buffer))


def assert_contexts(space: kvfs.Namespace, expected: dict[str, Any], sizes: dict[str, int]) -> None:
    assert sorted(context.name for context in space.contexts()) == sorted(expected)
    for name, value in expected.items():
        context = space.context(name, create=False)
        assert [key.tobytes() for key in context.keys] == decoded(value["keys"])
        assert context.tokens is not None
        assert context.tokens.tolist() == value["tokens"]
        assert context.token_count == len(value["tokens"])
        assert context.node.is_pinned == value["pinned"]
        with context.view() as view:
            wanted = b"".join(content_of(key, sizes[key]) for key in value["keys"])
            assert bytes(view.memory()) == wanted


def assert_files(pool: kvfs.Pool, space: kvfs.Namespace, files: dict[str, int]) -> None:
    for path, nbytes in files.items():
        node = pool.catalog.resolve(space.info.root_node_id, path)
        assert node is not None
        assert (node.size_bytes, node.mode & 0o777) == (nbytes, 0o640)
        if nbytes:
            reader = pool.files.open_read(node)
            assert bytes(pool.files.read(reader, 0, nbytes)) == content_of(path, nbytes)
            pool.files.close_read(reader)


def assert_others(
    pool: kvfs.Pool, space: kvfs.Namespace, raw_files: dict[str, int], attributes: dict[str, Any]
) -> None:
    assert_files(pool, space, raw_files)
    for path in raw_files:
        node = pool.catalog.resolve(space.info.root_node_id, path)
        assert node is not None
        assert node.is_raw
    for path, expected in attributes.items():
        node = pool.catalog.resolve(space.info.root_node_id, path)
        assert node is not None
        tree = Tree(pool)
        found = {name: tree.attribute(node, name) for name in tree.attribute_names(node)}
        assert found == {name.encode(): value.encode() for name, value in expected.items()}


def assert_image(pool: kvfs.Pool, manifest: dict[str, Any]) -> None:
    assert not pool.recovery.problems
    assert pool.name == "compat"
    assert {info.name for info in pool.namespaces()} == {"default", *manifest}
    total = 0
    for name, expected in manifest.items():
        space = pool.namespace(name, kvfs.Layout.from_json(expected["layout"]))
        assert space.info.retention == expected["retention"]
        assert_blocks(space, expected["blocks"])
        assert_contexts(space, expected["contexts"], expected["blocks"])
        assert_files(pool, space, expected["files"])
        assert_others(pool, space, expected.get("raw_files", {}), expected.get("attributes", {}))
        total += len(expected["blocks"])
    assert pool.recovery.blocks >= total


def test_everything_reads_back(image: Unpacked) -> None:
    report = check_pool(image.root / "pool", data=True)
    found = [str(finding) for finding in report.findings]
    assert [text for text in found if "the device was copied or moved" not in text] == []
    with image.open() as pool:
        assert_image(pool, image.manifest)
    with kvfs.open_pool(image.root / "pool") as pool:  # it has settled in its new place
        assert_image(pool, image.manifest)


def test_it_takes_new_blocks(image: Unpacked) -> None:
    with image.open() as pool:
        space = pool.namespace("compat")
        keys, _ = space.keys(np.arange(5000, 5016))
        content = np.arange(2 * space.layout.block_bytes, dtype=np.uint32).astype(np.uint8)
        space.context("new").append(keys, content.reshape(2, -1), durability="sync")
    with image.open() as pool:
        space = pool.namespace("compat")
        with space.context("new", create=False).view() as view:
            assert bytes(view.memory()) == content.tobytes()
        assert_blocks(space, image.manifest["compat"]["blocks"])


def test_copy_is_refused_unless_told(image: Unpacked) -> None:
    with pytest.raises(RefusedError, match="device was copied or moved: dir0"):
        kvfs.open_pool(image.root / "pool")


def test_images_are_small() -> None:
    for archive in IMAGES.iterdir():
        assert archive.stat().st_size <= ARCHIVE_BYTES_MAX


def test_maker_still_works(tmp_path: Path) -> None:
    """What this kvfs writes today passes as the image of its version."""
    write_image(tmp_path / "new.tar.zst")
    assert (tmp_path / "new.tar.zst").stat().st_size <= ARCHIVE_BYTES_MAX
    (tmp_path / "root").mkdir()
    image = Unpacked(tmp_path / "new.tar.zst", tmp_path / "root")
    with image.open() as pool:
        assert_image(pool, image.manifest)


def test_a_former_catalog_is_brought_up_by_its_owner(image: Unpacked) -> None:
    with image.open() as pool:
        write_others(pool, pool.namespace("compat"))
    with image.catalog() as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)
    with kvfs.open_pool(image.root / "pool") as pool:
        assert_others(pool, pool.namespace("compat"), RAW_FILES, ATTRIBUTES)
    assert check_pool(image.root / "pool", data=True).is_clean


# --- formats to come


def resign(page: bytes, dtype: np.dtype[np.void], version: int) -> bytes:
    """Return a page with another format version and the checksum that goes with it."""
    record = np.frombuffer(bytearray(page), dtype)
    record["format_version"] = version
    record["checksum"] = _native.xxh3_64(record.tobytes()[:-8])
    return record.tobytes()


def assert_refused(image: Unpacked, message: str) -> None:
    before = {path: path.read_bytes() for path in image.root.rglob("*") if path.is_file()}
    with pytest.raises(FormatVersionError, match=message):
        image.open()
    for path, raw in before.items():
        assert path.read_bytes() == raw, f"{path.name} was changed"


def test_superblock_of_a_later_format(image: Unpacked) -> None:
    path = image.root / "device" / "kvfs.superblock"
    raw = path.read_bytes()
    path.write_bytes(resign(raw[:PAGE], fmt.SUPERBLOCK, 2) + raw[PAGE:])
    assert_refused(image, "format version 2: dir0 superblock: this kvfs reads version 1")


def test_catalog_of_a_later_format(image: Unpacked) -> None:
    with image.catalog() as connection:
        connection.execute("PRAGMA user_version = 3")
    assert_refused(image, "catalog has another version: .*: expected 2, found 3")


def test_segment_of_a_later_format(image: Unpacked) -> None:
    path = min((image.root / "device" / "segments").glob("*.seg"))
    with path.open("r+b") as file:
        file.seek(-PAGE, 2)
        page = file.read(PAGE)
        file.seek(-PAGE, 2)
        file.write(resign(page, fmt.HEADER, 2))
    with pytest.raises(FormatVersionError, match="format version 2: dir0 segment 0"):
        image.open()
