"""A device without files: log segments only.

Layer: L1. Subclasses set `info` with `takes_files` false and say whether they are open.
"""

import errno
import os
from abc import abstractmethod
from typing import NoReturn

from kvfs.devices.base import Device, Segment, Staging


class FilelessDevice(Device):
    """Refuses staging, file segments and raw files with EOPNOTSUPP, and has none."""

    @abstractmethod
    def _check_open(self) -> None:
        """Raise ClosedError after `close`."""

    def _refuse(self) -> NoReturn:
        self._check_open()
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP), self.info.name)

    def create_staging(self, name: str) -> Staging:
        """Refuse."""
        self._refuse()

    def write_staging(self, staging: Staging, offset: int, data: bytes | memoryview) -> None:
        """Refuse."""
        self._refuse()

    def resize_staging(self, staging: Staging, nbytes: int) -> None:
        """Refuse."""
        self._refuse()

    def persist_staging(self, staging: Staging) -> None:
        """Refuse."""
        self._refuse()

    def reserve_staging(self, staging: Staging, nbytes: int) -> None:
        """Refuse."""
        self._refuse()

    def settle_staging(self, staging: Staging, reserved_bytes: int = 0) -> None:
        """Refuse."""
        self._refuse()

    def seal_staging(self, staging: Staging, *, is_shared: bool) -> bool:
        """Refuse."""
        self._refuse()

    def adopt(self, staging: Staging, slot: int, generation: int, sidecar: bytes) -> Segment:
        """Refuse."""
        self._refuse()

    def drop_staging(self, staging: Staging) -> None:
        """Refuse."""
        self._refuse()

    def keep_raw(self, staging: Staging, number: int) -> None:
        """Refuse."""
        self._refuse()

    def open_raw(self, number: int) -> Staging:
        """Refuse."""
        self._refuse()

    def release_raw(self, staging: Staging) -> None:
        """Refuse."""
        self._refuse()

    def reap_staging(self) -> int:
        """Return 0."""
        self._check_open()
        return 0

    def raw_files(self) -> list[tuple[int, int]]:
        """Return none."""
        self._check_open()
        return []
