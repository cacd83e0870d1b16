"""Nodes as stat(2) shows them, and how long the kernel may believe it.

Layer: L5.

- Names of contexts are not cached by the kernel (entry timeout 0): eviction takes names away, and
  the API makes and removes them, behind the kernel's back. An engine that tests for existence must
  not be lied to; a notification could be late, or wait behind the very request that needs it.
- Attributes of files change through the mount alone, so the kernel may keep them. Contexts of the
  API grow in this process and shrink by eviction: theirs last a tenth of a second, which keeps a
  sequence of reads from asking for the size each time.
- Directories only lose or change names through the mount or by an operator: a second.
"""

import stat
from dataclasses import dataclass

import pyfuse3

from kvfs.engine.catalog_schema import Node, Origin
from kvfs.units import MIB

API_ATTRIBUTE_TIMEOUT_S = 0.1
_SECTOR = 512


@dataclass(frozen=True, slots=True)
class Timeouts:
    """How long the kernel may keep what it was told, in seconds."""

    directory_s: float = 1.0
    file_s: float = 1.0
    context_s: float = API_ATTRIBUTE_TIMEOUT_S


def entry_of(node: Node, timeouts: Timeouts, *, link_count: int = 1) -> pyfuse3.EntryAttributes:
    """Return what lookup and getattr answer for a node.

    A directory has one link, as on btrfs: tools then do not count on the number of its directories.
    """
    entry = pyfuse3.EntryAttributes()
    entry.st_ino = pyfuse3.InodeT(node.node_id)
    entry.st_nlink = link_count
    entry.st_uid = node.uid
    entry.st_gid = node.gid
    entry.st_size = node.size_bytes
    entry.st_blocks = -(-node.size_bytes // _SECTOR)
    entry.st_blksize = MIB
    entry.st_atime_ns = entry.st_mtime_ns = node.mtime_ns
    entry.st_ctime_ns = node.ctime_ns
    if node.is_directory:
        entry.st_mode = pyfuse3.ModeT(stat.S_IFDIR | node.mode)
        entry.entry_timeout = entry.attr_timeout = timeouts.directory_s
        return entry
    entry.st_mode = pyfuse3.ModeT(stat.S_IFREG | node.mode)
    entry.entry_timeout = 0
    entry.attr_timeout = timeouts.file_s if node.origin is Origin.FILE else timeouts.context_s
    return entry
