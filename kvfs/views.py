"""Views: one contiguous, read-only range over blocks that lie scattered on several devices.

Layer: L4.

- A view reserves address space of n x stride bytes and maps each extent into it in order. Nothing
  is copied where the kernel can map all of it (`is_zero_copy`, `kvfs.engine.stitching`); else it
  is copied into private pages.
- It holds leases on its segments until closed: bytes do not change or move under it. Arrays and
  memoryviews of a view that was dropped, not closed, hold them until the last one is gone.
- Blocks are verified before they are mapped, once per process and generation.
- A page that fails under a reader (poison, truncation) reads as zeros and marks the view failed:
  `check` raises, as does leaving the `with` block.
"""

import errno
import weakref
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np
import numpy.typing as npt

from kvfs import _native
from kvfs.backend import Backend
from kvfs.engine.stitching import Offsets, stitch
from kvfs.errors import ClosedError, KvfsError, MediaError, NotFoundError, UsageError
from kvfs.keys import KeyArray
from kvfs.phase import Phase
from kvfs.units import MIB

if TYPE_CHECKING:
    import torch

# A fault maps the pages around it, in aligned groups of 64 KiB: an unaligned view of 64 KiB blocks
# takes two per block, and half as long again for its first read. 2 MiB is what huge pages need.
_ALIGNMENT: Final = 2 * MIB


class _Hold:
    """Stands for the lease of a view: the lease ends when nothing refers to this any more."""

    __slots__ = ("__weakref__",)


class _Exported(np.ndarray[Any, np.dtype[np.uint8]]):
    """The bytes of a view, as buffers of it refer to them; keeps the lease."""

    hold: _Hold


class View:
    """Blocks as one tensor. Use as a context manager, or call `close`.

    Where the layout's `block_bytes` is no multiple of 4 KiB, each block but the last is followed by
    padding up to the layout's `stride`. Its bytes are unspecified; they were zeros when written.

    Attributes:
        nbytes: Bytes from the first block's start to the last block's end (padding between blocks
            included).
        is_zero_copy: Every block is mapped; nothing was copied.
    """

    def __init__(
        self, backend: Backend, namespace_id: int, keys: KeyArray, *, block_bytes: int, stride: int,
        phase: Phase = Phase.UNKNOWN,
    ) -> None:  # fmt: skip
        """Map blocks in order; see Namespace.view."""
        if not len(keys):
            raise UsageError("a view needs at least one block")
        self._backend = backend
        self._stride = stride
        self._mapping: _native.Mapping | None = None
        self._lease = backend.lease(namespace_id, keys, phase)
        self._hold = _Hold()
        self._release = weakref.finalize(self._hold, backend.release, self._lease)
        self._release.atexit = False
        try:
            missing = np.flatnonzero(self._lease.records["length"] == 0)
            if len(missing):
                raise NotFoundError(
                    f"block is not resident: number {int(missing[0])} of {len(keys)}; "
                    "ask match_prefix first"
                )
            lengths = self._lease.records["length"].astype(np.uint64)
            partial = np.flatnonzero(lengths[:-1] < block_bytes)
            if len(partial):
                raise UsageError(
                    f"only the last block of a view may be partial: number {int(partial[0])} of "
                    f"{len(keys)} has {int(lengths[partial[0]])} bytes; read blocks one by one"
                )
            self.nbytes = int((len(keys) - 1) * stride + lengths[-1])
            self._skew = 0
            self.is_zero_copy = self._stitch(lengths) or self._copy(lengths)
        except BaseException:
            self.close()
            raise

    def _stitch(self, lengths: Offsets) -> bool:
        """Map every extent; False where one cannot be, or the process is out of maps."""
        backings = self._lease.backings()
        stitches = stitch(backings, lengths, self._stride)
        if stitches is None:
            return False
        mapping = _native.Mapping(stitches.nbytes, max(_ALIGNMENT, backings.granularity))
        try:
            mapping.map(stitches.positions, stitches.fds, stitches.offsets, stitches.lengths)
        except OSError as error:
            mapping.close()
            if error.errno not in (errno.ENOMEM, errno.ENODEV, errno.EACCES):
                raise
            return False
        self._mapping, self._skew = mapping, stitches.skew
        return True

    def _copy(self, lengths: Offsets) -> bool:
        """Copy all into private pages; return False, as nothing is mapped."""
        lease, count = self._lease, len(lengths)
        mapping = self._mapping = _native.Mapping(count * self._stride, _ALIGNMENT)
        base = mapping.map_anonymous(0, mapping.nbytes)
        positions = np.arange(count, dtype=np.uint64) * np.uint64(self._stride)
        read = self._backend.read_ranges(
            lease, np.arange(count), np.zeros(count, np.uint64), lengths,
            np.uint64(base) + positions,
        )  # fmt: skip
        if not read.all():
            raise MediaError(f"block could not be read: number {int(np.argmin(read))}")
        mapping.protect()
        return False

    def __len__(self) -> int:
        return self.nbytes

    @property
    def address(self) -> int:
        """Where the first byte is mapped in this process."""
        return self._open_mapping().address + self._skew

    def memory(self) -> memoryview:
        """Return the bytes, read-only. The view cannot be closed while the memoryview lives."""
        exported = np.frombuffer(memoryview(self._open_mapping()), np.uint8).view(_Exported)
        exported.hold = self._hold
        return exported.data[self._skew : self._skew + self.nbytes]

    def numpy(self, dtype: npt.DTypeLike = np.uint8, shape: tuple[int, ...] | None = None) -> Any:
        """Return the bytes as one array, without a copy.

        Args:
            dtype: Element type; bfloat16 has no numpy type, use `torch` or uint16.
            shape: Must hold exactly `nbytes`; one dimension when missing. One axis may be -1.

        Raises:
            UsageError: The shape does not fit, or there is no such type.
        """
        try:
            array = np.frombuffer(self.memory(), np.dtype(dtype))
            return array if shape is None else array.reshape(shape)
        except (TypeError, ValueError) as error:
            raise UsageError(f"view of {self.nbytes} bytes: {error}") from error

    def torch(self, dtype: "torch.dtype", shape: tuple[int, ...]) -> "torch.Tensor":
        """Return the bytes as one CPU tensor, without a copy.

        Writing to it is a crash: the pages are read-only.
        """
        import warnings

        import torch

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            memory = self.memory()
            try:
                return torch.frombuffer(memory, dtype=dtype).reshape(shape)
            except (RuntimeError, TypeError, ValueError) as error:
                raise UsageError(f"view of {self.nbytes} bytes: {error}") from error

    @property
    def has_failed(self) -> bool:
        """Whether a page could not be read since the view was made."""
        return self._mapping is not None and self._mapping.has_failed

    def check(self) -> None:
        """Raise if any byte seen so far may be another than it was.

        Raises:
            MediaError: A page failed, and a zero page was put in; compute the context again.
            LeaseExpiredError: In a client: the owner has taken the blocks back meanwhile.
        """
        if self.has_failed:
            raise MediaError(
                f"a page of the view could not be read: {len(self._open_mapping().faults)} faults; "
                "what was computed is void"
            )
        if self._mapping is not None:
            self._lease.check()

    def close(self) -> None:
        """Unmap and give the leases back; idempotent.

        Raises:
            BufferError: Arrays or memoryviews of it are alive; the view stays open.
        """
        if self._mapping is not None:
            self._mapping.close()
            self._mapping = None
        self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        failure: KvfsError | None = None
        try:
            self.check()
        except KvfsError as found:
            failure = found
        try:
            self.close()
        except BufferError:
            if kind is None:
                raise
        if failure is not None and kind is None:
            raise failure

    def __del__(self) -> None:
        if getattr(self, "_mapping", None) is not None:
            try:
                self.close()
            except BufferError:
                return  # arrays outlive the view: they keep the mapping and the lease

    def _open_mapping(self) -> _native.Mapping:
        if self._mapping is None:
            raise ClosedError("the view is closed")
        return self._mapping
