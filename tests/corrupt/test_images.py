"""Hostile images: bits flipped and tails cut off in every structure of a real pool.

Opening gives a named error, or a pool that serves right bytes only; the check reports what is
damaged, with place and remedy; repair makes it a pool again. Nothing else happens.
"""

import contextlib
import os
import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

import kvfs
from kvfs.engine import format as fmt
from kvfs.engine.catalog_schema import ROOT_NODE_ID
from kvfs.engine.checker import check_pool
from kvfs.errors import CorruptionError, DataError, KvfsError
from kvfs.tree import Tree
from kvfs.units import MIB, PAGE

LAYOUT = kvfs.Layout("uint8", (1024,), 64, model="hostile")  # blocks of 64 KiB
BLOCKS = 300  # 18.75 MiB: one sealed segment and one open
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


@dataclass
class Image:
    """A closed pool, and all its bytes as they should be."""

    root: Path
    keys: np.ndarray
    blocks: np.ndarray
    contents: dict[str, bytes]
    saved: dict[Path, bytes] = field(default_factory=dict)

    @property
    def pool(self) -> Path:
        return self.root / "pool"

    def save(self) -> None:
        paths = [path for path in self.root.rglob("*") if path.is_file()]
        self.saved = {path: path.read_bytes() for path in paths}

    def restore(self) -> None:
        """Put back every byte, in the same directories, because their inodes are remembered."""
        for path in self.root.rglob("*"):
            if path.is_file() and path not in self.saved:
                path.unlink()
        for path, raw in self.saved.items():
            if not path.exists() or path.read_bytes() != raw:
                path.write_bytes(raw)

    def find(self, kind: str) -> Path:
        """Return the file of a structure."""
        device = self.root / "dev"
        if kind == "superblock":
            return device / "kvfs.superblock"
        if kind == "catalog":
            return self.pool / "catalog.sqlite"
        if kind in ("sidecar", "file"):
            (path,) = (device / "segments").glob("*.sum" if kind == "sidecar" else "*.file")
            return path
        for path in sorted((device / "segments").glob("*.seg")):
            raw = self.saved[path]
            header = fmt.decode_header(raw[-PAGE:], fmt.HeaderKind.OPEN, "here")
            is_sealed = any(raw[-2 * PAGE : -PAGE])
            is_mine = header.namespace_id == int.from_bytes(self.keys[0][:8].tobytes(), "little")
            if is_mine and is_sealed == (kind == "sealed"):
                return path
        raise AssertionError(f"no {kind} segment")


def build(root: Path) -> Image:
    rng = np.random.default_rng(3)
    url = f"dir:{root}/dev?size=128MiB&segment=16MiB"
    contents = {"small": rng.bytes(300_000), "large": rng.bytes(5 * MIB + 17)}
    with kvfs.create_pool(root / "pool", [url]) as pool:
        space = pool.namespace("m", LAYOUT)
        keys, parents = space.keys(np.arange(BLOCKS * 64))
        blocks = rng.integers(0, 256, (BLOCKS, LAYOUT.block_bytes), np.uint8)
        space.put(keys, blocks, parents=parents)
        space.context("chat").append(keys[:3], blocks[:3], tokens=np.arange(3 * 64))
        for name, content in contents.items():
            node = Tree(pool).create_file(ROOT_NODE_ID, name, 0o644, 0, 0)
            handle = pool.files.open_write(node, truncate=True)
            pool.files.write(handle, 0, content)
            pool.files.close_write(handle)
    image = Image(root, keys, blocks, contents)
    image.save()
    return image


@pytest.fixture(scope="module")
def built() -> Iterator[Image]:
    with tempfile.TemporaryDirectory(prefix="kvfs-images-", dir=MEMORY) as folder:
        yield build(Path(folder))


@pytest.fixture
def image(built: Image, expected_warnings: list[str]) -> Iterator[Image]:
    expected_warnings.append("set aside|segment of another|layout mismatch")
    built.restore()
    yield built
    built.restore()


def read(pool: kvfs.Pool, name: str) -> bytes | None:
    node = pool.catalog.resolve(ROOT_NODE_ID, name)
    if node is None:
        return None
    try:
        reader = pool.files.open_read(node)
    except KvfsError:
        return None
    try:
        return bytes(pool.files.read(reader, 0, node.size_bytes))
    except KvfsError:
        return None
    finally:
        pool.files.close_read(reader)


def serve(image: Image, *, trust_names: bool = True) -> int:
    """Open the pool and read all of it: whatever it serves is right. Returns the blocks served."""
    with kvfs.open_pool(image.pool, background=False) as pool:
        space = pool.namespace("m")
        out = np.zeros_like(image.blocks)
        hits = space.read_into(image.keys, out)
        assert (out[hits] == image.blocks[hits]).all(), "wrong bytes of a block"
        for name, content in image.contents.items():
            if trust_names:
                assert read(pool, name) in (content, None), f"wrong bytes of file {name}"
        return int(hits.sum())


def try_to_serve(image: Image, *, trust_names: bool = True) -> str:
    """Serve, or name the error that opening gives; any other exception fails the test."""
    try:
        serve(image, trust_names=trust_names)
    except KvfsError as error:
        return type(error).__name__
    return ""


def flip(path: Path, position: int, bit: int) -> None:
    """Flip one bit; positions below zero count from the end."""
    with path.open("r+b") as file:
        file.seek(position, os.SEEK_SET if position >= 0 else os.SEEK_END)
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1 << bit]))


def damage_and_repair(image: Image, damage, *, is_found: bool = True, blocks_min: int = 0) -> None:
    """Damage, open; damage again, check, repair, check, open."""
    damage()
    try_to_serve(image)
    image.restore()
    damage()
    report = check_pool(image.pool, data=True)
    if is_found:
        assert report.exit_code in (3, 14)
        assert all(f.where and f.message and f.remedy for f in report.findings)
    repaired = check_pool(image.pool, data=True, repair=True)
    assert repaired.remaining == []
    assert check_pool(image.pool, data=True).is_clean
    assert serve(image) >= blocks_min


# What is flipped: file, first and last position, and whether every bit of it is covered.
PLACES = {
    "superblock header": ("superblock", 0, PAGE - 1),
    "superblock table": ("superblock", PAGE, PAGE + 40),
    "sealed: open header": ("sealed", -PAGE, -1),
    "sealed: seal header": ("sealed", -2 * PAGE, -PAGE - 1),
    "sealed: entry": ("sealed", -fmt.entry_position(9), -fmt.entry_position(0) + 127),
    "sealed: payload": ("sealed", 0, 100 * 65536),
    "open: open header": ("open", -PAGE, -1),
    "open: entry": ("open", -fmt.entry_position(9), -fmt.entry_position(0) + 127),
    "open: payload": ("open", 0, 30 * 65536),
    "sidecar: open header": ("sidecar", -PAGE, -1),
    "sidecar: seal header": ("sidecar", -2 * PAGE, -PAGE - 1),
    "sidecar: entry": ("sidecar", -fmt.entry_position(5), -fmt.entry_position(0) + 127),
    "file: payload": ("file", 0, 5 * MIB),
}


def test_sound(image):
    assert check_pool(image.pool, data=True).is_clean
    assert serve(image) == BLOCKS


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("place", PLACES)
def test_flipped_bit(image, place, seed):
    kind, first, last = PLACES[place]
    rng = random.Random(f"{place} {seed}")
    position, bit = rng.randint(first, last), rng.randrange(8)
    path = image.find(kind)
    damage_and_repair(image, lambda: flip(path, position, bit))


@pytest.mark.parametrize("place", ["sealed: entry", "open: entry", "sealed: payload"])
def test_one_bit_costs_one_block(image, place):
    kind, first, _ = PLACES[place]
    path = image.find(kind)
    damage_and_repair(image, lambda: flip(path, first + 5, 1), blocks_min=BLOCKS - 1)


def test_seal_bit_costs_nothing(image):
    path = image.find("sealed")
    damage_and_repair(image, lambda: flip(path, -2 * PAGE + 5, 1), blocks_min=BLOCKS)


@pytest.mark.parametrize("nbytes", [0, 1, PAGE - 1, PAGE])
def test_truncated_superblock(image, nbytes):
    path = image.find("superblock")
    damage_and_repair(image, lambda: os.truncate(path, nbytes))


@pytest.mark.parametrize("kind", ["sealed", "open", "sidecar", "file"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.9999])
def test_truncated_segment(image, kind, share):
    path = image.find(kind)
    size = int(len(image.saved[path]) * share)
    # A segment, or sidecar, of no bytes is what a crash may leave; its file's name is missed.
    is_found = size > 0 or kind in ("sidecar", "file")
    damage_and_repair(image, lambda: os.truncate(path, size), is_found=is_found)


@pytest.mark.parametrize("kind", ["sealed", "open", "sidecar", "file"])
def test_missing_segment(image, kind):
    path = image.find(kind)
    damage_and_repair(image, path.unlink, is_found=kind in ("sidecar", "file"))


@pytest.mark.parametrize("kind", ["sealed", "open", "sidecar", "file", "superblock"])
def test_random_bytes(image, kind):
    path = image.find(kind)
    raw = random.Random(kind).randbytes(min(len(image.saved[path]), 4 * MIB))
    damage_and_repair(image, lambda: path.write_bytes(raw))


@pytest.mark.parametrize(("one", "other"), [("sealed", "open"), ("sidecar", "superblock")])
def test_exchanged_files(image, one, other):
    first, second = image.find(one), image.find(other)

    def exchange() -> None:
        first.write_bytes(image.saved[second])
        second.write_bytes(image.saved[first])

    damage_and_repair(image, exchange)


def test_structure_replaced_by_a_directory(image):
    path = image.find("sealed")

    def replace() -> None:
        path.unlink()
        path.mkdir()

    replace()
    try:
        try_to_serve(image)
        assert check_pool(image.pool).exit_code in (0, 3, 14)
    finally:
        path.rmdir()


# --- names of errors


@pytest.mark.parametrize("position", [5, 100, PAGE + 5])
def test_superblock_error_is_named(image, position):
    flip(image.find("superblock"), position, 0)
    with pytest.raises(CorruptionError, match="superblock"):
        serve(image)


def test_catalog_error_is_named(image):
    image.find("catalog").write_bytes(random.Random(1).randbytes(20_000))
    with pytest.raises(CorruptionError, match="catalog"):
        serve(image)
    report = check_pool(image.pool)
    assert [finding.code for finding in report.findings] == ["catalog-damaged"]
    assert report.exit_code == 14


# --- the catalog: SQLite knows no checksums, so only that nothing else happens


@pytest.mark.parametrize("seed", range(24))
def test_flipped_bits_of_the_catalog(image, seed):
    rng = random.Random(seed)
    path = image.find("catalog")
    size = len(image.saved[path])
    flips = [(rng.randrange(size), rng.randrange(8)) for _ in range(1 + seed % 8 * 8)]

    def damage() -> None:
        for position, bit in flips:
            flip(path, position, bit)

    damage()
    try_to_serve(image, trust_names=False)
    image.restore()
    damage()
    with contextlib.suppress(DataError):
        report = check_pool(image.pool, data=True)
        assert report.exit_code in (0, 3, 14)
        check_pool(image.pool, repair=True)


@pytest.mark.parametrize("nbytes", [0, 1, 100, PAGE, 3 * PAGE + 7])
def test_truncated_catalog(image, nbytes):
    path = image.find("catalog")
    os.truncate(path, nbytes)
    assert try_to_serve(image) == "CorruptionError"
    assert check_pool(image.pool).exit_code == 14


def test_missing_catalog(image):
    image.find("catalog").unlink()
    assert try_to_serve(image) == "NotFoundError"


def test_garbage_in_the_log_of_the_catalog(image):
    (image.pool / "catalog.sqlite-wal").write_bytes(random.Random(2).randbytes(50_000))
    assert serve(image) == BLOCKS
    (image.pool / "catalog.sqlite-wal").write_bytes(random.Random(2).randbytes(50_000))
    assert check_pool(image.pool).is_clean


# --- what lies beside


@pytest.mark.parametrize("name", ["pool/lock", "dev/kvfs.lock", "pool/control.sock"])
def test_garbage_beside(image, name):
    (image.root / name).write_bytes(random.Random(3).randbytes(5000))
    assert check_pool(image.pool, data=True).is_clean
    assert serve(image) == BLOCKS
    (image.root / name).write_bytes(b"")
    assert serve(image) == BLOCKS


def test_half_written_superblock_of_a_crash(image):
    (image.root / "dev" / "kvfs.superblock.new").write_bytes(b"half")
    assert serve(image) == BLOCKS
