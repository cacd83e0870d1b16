import hashlib

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from kvfs import _native
from tests.native.support import random_bytes, run_python

# Lengths around every switch of algorithm, stripe, block and internal buffer.
LENGTHS = sorted({
    near + delta
    for near in (0, 3, 8, 16, 64, 128, 240, 256, 512, 1024, 2048, 4096, 65536)
    for delta in (-1, 0, 1)
    if near + delta >= 0
})  # fmt: skip


def canonical_128(data: bytes) -> bytes:
    return xxhash.xxh3_128_digest(data)[::-1]


def test_known_vectors() -> None:
    assert _native.xxh3_64(b"") == 0x2D06800538D394C2
    assert _native.xxh3_128(b"")[::-1].hex() == "99aa06d3014798d86001c324468d497f"


@pytest.mark.parametrize("length", LENGTHS)
def test_equals_canonical(length: int) -> None:
    data = random_bytes(length, length).tobytes()
    assert _native.xxh3_128(data) == canonical_128(data)
    assert _native.xxh3_64(data) == xxhash.xxh3_64_intdigest(data)
    assert _native.xxh3_64(data, 2**64 - 1) == xxhash.xxh3_64_intdigest(data, 2**64 - 1)


@given(st.binary(max_size=4000), st.integers(0, 2**64 - 1))
def test_equals_canonical_for_any_data(data: bytes, seed: int) -> None:
    assert _native.xxh3_64(data, seed=seed) == xxhash.xxh3_64_intdigest(data, seed)
    assert _native.xxh3_128(data) == canonical_128(data)


def test_large_input() -> None:
    data = random_bytes(1, (3 << 20) + 17)
    assert _native.xxh3_128(data) == canonical_128(data.tobytes())


# Hash, copy and streaming of every length, with one digest over all results.
SWEEP = """
import hashlib, numpy as np
from kvfs import _native as n
total = hashlib.sha256()
source = np.random.default_rng(3).integers(0, 256, 1 << 17, np.uint8)
target = np.zeros(1 << 17, np.uint8)
base_s, base_t = n.buffer_address(source)[0], n.buffer_address(target)[0]
for length in [*range(0, 300), *range(1000, 1100), 2047, 2048, 5000, 65537]:
    for skew in (0, 1, 63):
        total.update(n.xxh3_128(source[skew:skew + length]))
        target[:] = 0
        args = [np.array([v], "<u8") for v in (base_t + 64 - skew, base_s + skew, length)]
        digests, statuses = np.zeros(16, np.uint8), np.zeros(1, "<i4")
        assert n.copy_hash(*args, digests, statuses, 512) == 0
        assert n.copy_verify(*args, digests, statuses) == 0
        total.update(digests)
        total.update(target[:length + 200])
print(n.cpu_features()[0], total.hexdigest())
"""


def test_instruction_sets_agree() -> None:
    results = {}
    for isa in ("base", "avx2", "avx512"):
        done = run_python(SWEEP, KVFS_ISA=isa)
        assert done.returncode == 0, done.stderr
        chosen, digest = done.stdout.split()
        results[chosen] = digest
    assert "base" in results
    assert len(set(results.values())) == 1


def test_buffer_address() -> None:
    array = np.arange(10, dtype="<u8")
    assert _native.buffer_address(array) == (array.ctypes.data, 80)
    assert _native.buffer_address(array, writable=True) == (array.ctypes.data, 80)
    with pytest.raises(BufferError):
        _native.buffer_address(b"abc", writable=True)
    with pytest.raises(ValueError, match="contiguous"):
        _native.buffer_address(array[::2])
    with pytest.raises(TypeError):
        _native.buffer_address(3)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seed_out_of_range(seed: int) -> None:
    with pytest.raises(ValueError, match="seed"):
        _native.xxh3_64(b"", seed)


def test_constants() -> None:
    assert (_native.RECORD_BYTES, _native.ENTRY_BYTES) == (64, 128)
    assert _native.ABI_VERSION >= 1
    assert _native.cpu_features()
    assert hashlib.sha256().name == "sha256"
