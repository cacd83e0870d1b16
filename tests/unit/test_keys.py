"""Block keys: chains share prefixes, file keys name their context, wrong shapes are refused."""

import hashlib
import struct

import numpy as np
import pytest

from kvfs.errors import UsageError
from kvfs.keys import (
    KEY_BYTES,
    NO_PARENT,
    as_key_array,
    chain_keys,
    file_contexts,
    file_keys,
    new_namespace_id,
    new_uuid,
)

SPACE = 0x0123456789ABCDEF


def test_chain_by_its_definition() -> None:
    tokens = [5, 6, 7, 8, 9]
    keys, parents = chain_keys(SPACE, tokens, 2)
    assert keys.shape == parents.shape == (3, KEY_BYTES)
    parent = NO_PARENT
    for i, part in enumerate(([5, 6], [7, 8], [9])):
        assert parents[i].tobytes() == parent
        raw = parent + struct.pack(f"<{len(part)}I", *part)
        parent = struct.pack("<Q", SPACE) + hashlib.blake2b(raw, digest_size=24).digest()
        assert keys[i].tobytes() == parent


def test_prefixes_are_shared_up_to_the_first_difference() -> None:
    first = np.arange(64)
    second = first.copy()
    second[40] += 1
    one, _ = chain_keys(SPACE, first, 8)
    other, _ = chain_keys(SPACE, second, 8)
    assert (one[:5] == other[:5]).all()
    assert not (one[5:] == other[5:]).all(axis=1).any()


def test_chain_continues_a_parent() -> None:
    tokens = np.arange(40)
    whole, parents = chain_keys(SPACE, tokens, 8)
    rest, rest_parents = chain_keys(SPACE, tokens[16:], 8, whole[1].tobytes())
    assert (rest == whole[2:]).all()
    assert (rest_parents == parents[2:]).all()


def test_partial_block_changes_its_key_as_it_grows() -> None:
    short, _ = chain_keys(SPACE, range(9), 8)
    longer, _ = chain_keys(SPACE, range(10), 8)
    assert (short[0] == longer[0]).all()
    assert not (short[1] == longer[1]).all()


def test_no_tokens_no_keys() -> None:
    keys, parents = chain_keys(SPACE, [], 8)
    assert keys.shape == parents.shape == (0, KEY_BYTES)


def test_namespaces_share_nothing() -> None:
    one, _ = chain_keys(1, range(8), 8)
    other, _ = chain_keys(2, range(8), 8)
    assert one.tobytes() != other.tobytes()
    as_key_array(one, 1)
    with pytest.raises(UsageError, match="another namespace"):
        as_key_array(one, 2)


def test_file_keys() -> None:
    keys = file_keys(SPACE, 77, 3, 5)
    assert len({key.tobytes() for key in keys}) == 5
    as_key_array(keys, SPACE)
    assert file_contexts(keys) == [77]
    assert not np.isin(file_keys(SPACE, 77, 4, 5).view("V32"), keys.view("V32")).any()
    mixed = np.concatenate([file_keys(SPACE, 9, 1, 2), keys, chain_keys(SPACE, range(8), 4)[0]])
    assert file_contexts(mixed) == [9, 77]


def test_chained_keys_name_no_file() -> None:
    assert file_contexts(chain_keys(SPACE, range(64), 4)[0]) == []
    assert file_contexts(np.zeros((0, KEY_BYTES), np.uint8)) == []


def test_key_arrays_of_every_kind() -> None:
    wanted = np.arange(64, dtype=np.uint8).reshape(2, 32)
    raw = wanted.tobytes()
    for given in (wanted, raw, bytearray(raw), memoryview(raw), [raw[:32], raw[32:]],
                  (raw[:32], memoryview(raw)[32:]), wanted.astype(np.int64)):  # fmt: skip
        found = as_key_array(given)
        assert found.dtype == np.uint8
        assert found.flags.c_contiguous
        assert (found == wanted).all()
    assert as_key_array([]).shape == (0, 32)
    assert as_key_array(np.zeros((4, 64), np.uint8)[:, ::2]).flags.c_contiguous


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (bytes(33), "33 bytes are no whole number"),
        ([bytes(31)], "32 bytes each"),
        (np.zeros((2, 31), np.uint8), r"shape \(n, 32\), found \(2, 31\)"),
        (np.zeros(32, np.uint8), "shape"),
        (np.zeros((1, 2, 32), np.uint8), "shape"),
    ],
)
def test_wrong_shapes(given: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        as_key_array(given)


def test_ids() -> None:
    ids = {new_namespace_id() for _ in range(100)}
    assert len(ids) == 100
    assert all(0 < value < 1 << 63 for value in ids)
    assert new_uuid() != new_uuid()
    assert new_uuid().version == 4
