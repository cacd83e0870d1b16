"""A pool whose catalog is damaged: what is left to be known of it, and a new catalog made of that.

Layer: L3.

- The bytes of the damaged file name the devices: a device's URL is text in one piece, found without
  the database. A directory or DAX device counts as the pool's only if the file holds the uuid of
  its superblock.
- Superblocks give the pool's uuid and the namespaces that ever had a segment there. Blocks stay and
  are found by their keys. Names, contexts, pins, retention and the pool's own name are lost.
- Ids of nodes are never given twice: the new catalog begins at an epoch above every one that a
  block speaks of. Otherwise a block of a lost file could be taken for one of a new file.
- The damaged catalog is kept beside the new one.
"""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np

from kvfs.config import VOLATILE_SCHEMES, DeviceURL, parse_device_url
from kvfs.devices.base import Device
from kvfs.devices.dax_copies import peek_superblock
from kvfs.devices.filesystem import SUPERBLOCK
from kvfs.engine import format as fmt
from kvfs.engine.catalog import Catalog
from kvfs.engine.catalog_schema import (
    DEFAULT_NAMESPACE,
    EPOCH_NODE_BITS,
    EPOCH_VERSION_BITS,
    ROOT_NODE_ID,
    DeviceRow,
)
from kvfs.engine.format import NamespaceRecord, Superblock
from kvfs.engine.log import load_segment
from kvfs.errors import CorruptionError, DataError, ExistsError, NotFoundError, UsageError
from kvfs.keys import is_file_key, new_namespace_id, new_uuid
from kvfs.layout import OPAQUE, Layout

_URL: Final = re.compile(
    rb"(?:emulated:[a-z]+:)?"
    rb"(?:(?:dir|pmem|dax):/[^\x00-\x1f?]{0,4096}|dram:|cxl:node=\d+)\?"
    rb"(?:[a-z_]+=[a-z0-9_.-]+&)*size=\d+(?:&(?:tier|write_[a-z_]+)=\d+)*"
)
_EPOCHS_SKIPPED: Final = 1024  # that may have been used and left no trace
_MODE: Final = 0o755


@dataclass(slots=True)
class Salvage:
    """What is left of a pool.

    Attributes:
        rows: Devices that are there.
        missing: URLs of persistent devices that are not, or whose superblock is not the pool's.
        superblocks: Of the persistent devices among `rows`.
    """

    rows: list[DeviceRow] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    superblocks: list[Superblock] = field(default_factory=list)

    @property
    def namespaces(self) -> list[NamespaceRecord]:
        """Namespaces that a device remembers, one for each id."""
        return list({n.namespace_id: n for s in self.superblocks for n in s.namespaces}.values())

    def require_whole(self) -> None:
        """Raise CorruptionError, with the reason, if no catalog can be made of it."""
        if self.missing:
            raise CorruptionError(f"no superblock of this pool in {', '.join(self.missing)}")
        if not self.superblocks:
            raise CorruptionError("it names no directory or DAX device, so no block is left")
        if len({superblock.pool_uuid for superblock in self.superblocks}) > 1:
            raise CorruptionError("the devices that it names belong to several pools")


def salvage(catalog: Path) -> Salvage:
    """Find the devices of a pool by the bytes of its damaged catalog. Changes nothing."""
    raw = b"".join(path.read_bytes() for path in (catalog, Path(f"{catalog}-wal")) if path.exists())
    found = Salvage()
    directories: list[tuple[Superblock, DeviceURL]] = []
    others: list[DeviceURL] = []
    for url in _urls(raw):
        if url.scheme in VOLATILE_SCHEMES:
            others.append(url)
            continue
        superblock = _superblock(url)
        if superblock is None or superblock.device_uuid.bytes not in raw:
            found.missing.append(str(url))
        else:
            directories.append((superblock, url))
    directories.sort(key=lambda pair: pair[0].device_index)
    found.superblocks = [superblock for superblock, _ in directories]
    urls = {superblock.device_index: url for superblock, url in directories}
    uuids = {superblock.device_index: superblock.device_uuid for superblock, _ in directories}
    for url in others:
        urls[next(i for i in range(len(urls) + 1) if i not in urls)] = url
    counts: dict[str, int] = {}
    for index, url in sorted(urls.items()):
        number = counts[url.kind] = counts.get(url.kind, -1) + 1
        name, identity = url.name or f"{url.kind}{number}", uuids.get(index) or new_uuid()
        found.rows.append(DeviceRow(index, identity.bytes, name, str(url), url.tier, "online"))
    return found


def _urls(raw: bytes) -> Iterable[DeviceURL]:
    for text in dict.fromkeys(match[0] for match in _URL.finditer(raw)):
        try:
            yield parse_device_url(text.decode())
        except (UsageError, UnicodeDecodeError):
            continue


def _superblock(url: DeviceURL) -> Superblock | None:
    try:
        if url.scheme == "dax":
            raw = peek_superblock(url.location) or b""
        else:
            raw = (Path(url.location) / SUPERBLOCK).read_bytes()
        return fmt.decode_superblock(raw, url.location)
    except (OSError, DataError, NotFoundError, UsageError):
        return None


def replace_catalog(catalog: Path, found: Salvage, devices: Iterable[Device], now_ns: int) -> Path:
    """Set the damaged catalog aside and put an empty one in its place. Durability: persist.

    REQUIRES: the pool's lock; `found` is whole; the damaged catalog is not open.

    Returns:
        Where the damaged one is kept, its `-wal` file beside it.
    """
    new = Path(f"{catalog}.new")
    for path in (new, Path(f"{new}-wal")):
        path.unlink(missing_ok=True)
    _make_catalog(new, found, _free_epoch(devices, found), now_ns)
    aside = next(
        path
        for path in (Path(f"{catalog}.damaged{suffix}") for suffix in ("", *_numbers()))
        if not path.exists() and not Path(f"{path}-wal").exists()
    )
    os.link(catalog, aside)
    wal = Path(f"{catalog}-wal")
    if wal.exists():
        os.rename(wal, f"{aside}-wal")  # first: SQLite would replay it into the new file
    os.rename(new, catalog)
    folder = os.open(catalog.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return aside


def _numbers() -> Iterable[str]:
    return (f".{number}" for number in range(2, 1000))


def _make_catalog(path: Path, found: Salvage, epoch: int, now_ns: int) -> None:
    """Make a catalog of devices and namespaces, and move all of it into the file."""
    owner = path.parent.stat()
    catalog = Catalog.create(path, found.superblocks[0].pool_uuid, epoch=epoch)
    try:
        catalog.set_meta("name", path.parent.name)
        for row in found.rows:
            catalog.add_device(row)
        spaces = [(n.namespace_id, n.name, Layout.from_json(n.layout_json))
                  for n in found.namespaces]  # fmt: skip
        if DEFAULT_NAMESPACE not in [name for _, name, _ in spaces]:
            spaces.append((new_namespace_id(), DEFAULT_NAMESPACE, OPAQUE))
        for namespace_id, name, layout in spaces:
            for title in (name, f"{name}.{namespace_id:016x}"):
                try:
                    catalog.create_namespace(namespace_id, title, layout, "cache", now_ns, _MODE,
                                             owner.st_uid, owner.st_gid)  # fmt: skip
                    break
                except ExistsError:  # a device remembers one that is gone
                    continue
        catalog.set_attributes(ROOT_NODE_ID, uid=owner.st_uid, gid=owner.st_gid, now_ns=now_ns)
        catalog.sync()
    finally:
        catalog.close()
    if Path(f"{path}-wal").exists():
        raise CorruptionError(f"catalog is not whole: {path}: its log is still there; try again")


def _free_epoch(devices: Iterable[Device], found: Salvage) -> int:
    """Return an epoch of which, and of later ones, no block of a file can be left."""
    highest = max(superblock.owner_epoch for superblock in found.superblocks)
    for device in devices:
        for name in device.segments():
            handle = device.attach(name)
            try:
                keys = np.ascontiguousarray(load_segment(device, handle).entries["key"])
            except (OSError, DataError):
                continue  # nothing in it is ever served
            finally:
                device.release(handle)
            keys = keys[is_file_key(keys)]
            if len(keys):
                node_epochs = keys.view("<u8")[:, 1] >> np.uint64(EPOCH_NODE_BITS)
                version_epochs = keys.view("<u4")[:, 5] >> np.uint32(EPOCH_VERSION_BITS)
                highest = max(highest, int(node_epochs.max()), int(version_epochs.max()))
    return highest + _EPOCHS_SKIPPED
