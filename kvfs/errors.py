"""The errors of kvfs: few, each with an errno for FUSE and an exit code for the command line.

Layer: L0.

    KvfsError                       EIO      1
      UsageError (ValueError)       EINVAL   2   caller's bug, bad option, bad configuration
      NotFoundError (LookupError)   ENOENT  10   pool, device, namespace, context or block
      ExistsError                   EEXIST  16
      RefusedError                  EPERM   16   a safe-guard; the message names the way round
      BusyError                     EBUSY   11   retry later: pool in use, extent pinned or leased
        LeaseExpiredError           ESTALE  11   acquire again, read again
      NoSpaceError                  ENOSPC  12
      UnavailableError              EIO     13   device offline, owner gone; retry may help
        DeviceError                 EIO     13   one operation failed; __cause__ is the OSError
          MediaError                EIO     14   one block could not be read back; it is a miss now
      DataError                     EIO     14
        CorruptionError             EIO     14   expected and found are in the message
        FormatVersionError          EPROTO  15
      PoisonedError                 EROFS   13   an earlier write or persist failed
      ClosedError                   EBADF    1

- A miss is not an error: lookup answers with empty extents.
- FUSE and the command line read `errno` and `exit_code`; there is no other table.
"""

import errno
from typing import ClassVar


class KvfsError(Exception):
    """Base of every error that kvfs raises on purpose."""

    errno: ClassVar[int] = errno.EIO
    exit_code: ClassVar[int] = 1
    retryable: ClassVar[bool] = False


class UsageError(KvfsError, ValueError):
    """Raised if the caller asked for something that can never work as asked."""

    errno = errno.EINVAL
    exit_code = 2


class NotFoundError(KvfsError, LookupError):
    """Raised if a pool, device, namespace, context or block does not exist."""

    errno = errno.ENOENT
    exit_code = 10


class ExistsError(KvfsError):
    """Raised if the thing to be made is there already."""

    errno = errno.EEXIST
    exit_code = 16


class RefusedError(KvfsError):
    """Raised if a safe-guard forbids the operation; the message names the way round."""

    errno = errno.EPERM
    exit_code = 16


class BusyError(KvfsError):
    """Raised if somebody else holds what is needed; retry later."""

    errno = errno.EBUSY
    exit_code = 11
    retryable = True


class LeaseExpiredError(BusyError):
    """Raised if a lease ended before its use; acquire again and read again."""

    errno = errno.ESTALE


class NoSpaceError(KvfsError):
    """Raised if nothing can be evicted to make room."""

    errno = errno.ENOSPC
    exit_code = 12
    retryable = True


class UnavailableError(KvfsError):
    """Raised if a device is offline: others go on; or if a client finds no owner of the pool."""

    errno = errno.EIO
    exit_code = 13
    retryable = True


class DeviceError(UnavailableError):
    """Raised if one operation on a device failed; `__cause__` is the OSError."""

    retryable = False


class MediaError(DeviceError):
    """Raised if one block cannot be read back; the block has become a miss."""

    exit_code = 14


class DataError(KvfsError):
    """Raised if stored bytes are not what they must be."""

    exit_code = 14


class CorruptionError(DataError):
    """Raised if a checksum, magic or bound does not hold; the message says where."""


class FormatVersionError(DataError):
    """Raised if the medium was written by a format this version does not read."""

    errno = errno.EPROTO
    exit_code = 15


class PoisonedError(KvfsError):
    """Raised if an earlier write or persist failed and the target accepts no more writes."""

    errno = errno.EROFS
    exit_code = 13


class ClosedError(KvfsError):
    """Raised if an object is used after close."""

    errno = errno.EBADF
