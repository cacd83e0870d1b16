"""The table of errors: number for FUSE, exit code, whether to try again."""

import errno
import inspect

import pytest

from kvfs import errors
from kvfs.errors import KvfsError

TABLE = {
    "KvfsError": (Exception, errno.EIO, 1, False),
    "UsageError": (ValueError, errno.EINVAL, 2, False),
    "NotFoundError": (LookupError, errno.ENOENT, 10, False),
    "ExistsError": (KvfsError, errno.EEXIST, 16, False),
    "RefusedError": (KvfsError, errno.EPERM, 16, False),
    "BusyError": (KvfsError, errno.EBUSY, 11, True),
    "LeaseExpiredError": (errors.BusyError, errno.ESTALE, 11, True),
    "NoSpaceError": (KvfsError, errno.ENOSPC, 12, True),
    "UnavailableError": (KvfsError, errno.EIO, 13, True),
    "DeviceError": (errors.UnavailableError, errno.EIO, 13, False),
    "MediaError": (errors.DeviceError, errno.EIO, 14, False),
    "DataError": (KvfsError, errno.EIO, 14, False),
    "CorruptionError": (errors.DataError, errno.EIO, 14, False),
    "FormatVersionError": (errors.DataError, errno.EPROTO, 15, False),
    "PoisonedError": (KvfsError, errno.EROFS, 13, False),
    "ClosedError": (KvfsError, errno.EBADF, 1, False),
}


def classes() -> dict[str, type[KvfsError]]:
    return {
        name: value
        for name, value in inspect.getmembers(errors, inspect.isclass)
        if issubclass(value, KvfsError)
    }


def test_table_names_every_class() -> None:
    assert set(classes()) == set(TABLE)


@pytest.mark.parametrize("name", TABLE)
def test_class(name: str) -> None:
    made = classes()[name]
    base, number, exit_code, retryable = TABLE[name]
    assert issubclass(made, base)
    assert (made.errno, made.exit_code, made.retryable) == (number, exit_code, retryable)
    assert inspect.getdoc(made)


def test_number_is_of_the_class() -> None:
    assert errors.NotFoundError("no such block").errno == errno.ENOENT
