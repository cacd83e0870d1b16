"""Flushing what a platform buffers beyond its persistence domain.

Layer: L1.

- libpmem2 does it where it is installed; it is opened when it is needed, never linked. Without it,
  or where it says that it cannot, the region's `deep_flush` in sysfs is written, which is what it
  does for DAX devices, too.
- Neither is there on most platforms, and need not be: then there is nothing to flush.
"""

import ctypes
import errno
import os
from pathlib import Path
from typing import Final, Self

_LIBRARY: Final = "libpmem2.so.1"
_GRANULARITY_PAGE: Final = 2  # enum pmem2_granularity: the least strict, so that any is taken
_NOT_SUPPORTED: Final = -100001  # PMEM2_E_NOSUPP
_HARMLESS: Final = (_NOT_SUPPORTED, -errno.EACCES, -errno.EPERM, -errno.ENOENT)
_ERRNO_MAX: Final = 4095


class DeepFlush:
    """Flushes a device's platform buffers; `close` ends it."""

    def __init__(self, path: Path | None, library: "_Mapped | None" = None) -> None:
        """Bind to a device.

        Args:
            path: The region's `deep_flush`, if there is one that can be written.
            library: The device mapped by libpmem2; closed with this.
        """
        self.path = path
        self._library = library

    @property
    def has_library(self) -> bool:
        """Whether libpmem2 is asked first."""
        return self._library is not None

    def __call__(self) -> None:
        """Flush. Durability: persist, as far as the platform has more to flush.

        Raises:
            OSError: It failed.
        """
        if self._library is not None and self._library.flush():
            return
        if self.path is not None:
            self.path.write_text("1")

    def close(self) -> None:
        """Unmap; idempotent."""
        if self._library is not None:
            self._library.close()
            self._library = None


def deep_flush_of(
    fd: int, nbytes: int, path: Path | None, *, library: str = _LIBRARY
) -> DeepFlush | None:
    """Return what flushes a device; None if there is nothing that could.

    Args:
        fd: The device, or a file.
        nbytes: How much of it to map; the platform flushes all of the region.
        path: See DeepFlush.
        library: Name of libpmem2.
    """
    try:
        mapped = _Mapped.open(ctypes.CDLL(library, use_errno=True), fd, nbytes)
    except (OSError, AttributeError):
        mapped = None
    if mapped is None and path is None:
        return None
    return DeepFlush(path, mapped)


class _Mapped:
    """A device as libpmem2 has it mapped."""

    def __init__(self, library: ctypes.CDLL, mapped: ctypes.c_void_p, nbytes: int) -> None:
        self._library = library
        self._map = mapped
        self._nbytes = nbytes
        library.pmem2_map_get_address.restype = ctypes.c_void_p
        self._address = ctypes.c_void_p(library.pmem2_map_get_address(mapped))

    @classmethod
    def open(cls, library: ctypes.CDLL, fd: int, nbytes: int) -> Self:
        """Map a device.

        Raises:
            OSError: The library cannot.
            AttributeError: It is none of libpmem2.
        """
        source, config, mapped = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
        try:
            _check(library.pmem2_source_from_fd(ctypes.byref(source), fd))
            _check(library.pmem2_config_new(ctypes.byref(config)))
            _check(library.pmem2_config_set_length(config, ctypes.c_size_t(nbytes)))
            _check(library.pmem2_config_set_required_store_granularity(config, _GRANULARITY_PAGE))
            _check(library.pmem2_map_new(ctypes.byref(mapped), config, source))
        finally:
            for delete, what in ((library.pmem2_config_delete, config),
                                 (library.pmem2_source_delete, source)):  # fmt: skip
                if what.value is not None:
                    delete(ctypes.byref(what))
        return cls(library, mapped, nbytes)

    def flush(self) -> bool:
        """Flush; False if the library cannot here."""
        status = self._library.pmem2_deep_flush(
            self._map, self._address, ctypes.c_size_t(self._nbytes)
        )
        if status in _HARMLESS:
            return False
        _check(status)
        return True

    def close(self) -> None:
        """Unmap."""
        self._library.pmem2_map_delete(ctypes.byref(self._map))


def _check(status: int) -> None:
    if status < 0:
        code = -status if -status <= _ERRNO_MAX else errno.EIO
        raise OSError(code, f"libpmem2: {os.strerror(code)} ({status})")
