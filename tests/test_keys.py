from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierkv.core.keys import KEY_BYTES, KeyChain, pack_tokens

PRINT = bytes(range(32))
TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=100)


@given(TOKENS, st.integers(1, 20))
def test_one_key_for_each_whole_block(tokens: list[int], block_tokens: int) -> None:
    keys = KeyChain(PRINT, block_tokens=block_tokens).of_tokens(tokens)
    assert len(keys) == len(tokens) // block_tokens
    assert all(len(key) == KEY_BYTES for key in keys)
    assert len(set(keys)) == len(keys)


@given(TOKENS, st.integers(1, 8), st.data())
def test_a_chain_may_be_continued_anywhere(
    tokens: list[int], block_tokens: int, data: st.DataObject
) -> None:
    chain = KeyChain(PRINT, block_tokens=block_tokens)
    keys = chain.of_tokens(tokens)
    cut = data.draw(st.integers(0, len(keys)))
    parent = keys[cut - 1] if cut else None
    assert keys[:cut] + chain.of_tokens(tokens[cut * block_tokens :], parent=parent) == keys


@given(TOKENS, st.data())
def test_a_changed_token_changes_its_block_and_all_after_it(
    tokens: list[int], data: st.DataObject
) -> None:
    chain = KeyChain(PRINT, block_tokens=4)
    keys = chain.of_tokens(tokens)
    if not keys:
        return
    at = data.draw(st.integers(0, 4 * len(keys) - 1))
    changed = [*tokens[:at], tokens[at] ^ 1, *tokens[at + 1 :]]
    others = chain.of_tokens(changed)
    assert others[: at // 4] == keys[: at // 4]
    assert not set(others[at // 4 :]) & set(keys)


def test_salt_and_layout_keep_tenants_and_models_apart() -> None:
    tokens = list(range(16))
    chains = [
        KeyChain(PRINT),
        KeyChain(PRINT, salt=b"a"),
        KeyChain(PRINT, salt=b"b"),
        KeyChain(PRINT[::-1]),
        KeyChain(b"a" + PRINT),
    ]
    assert len({chain.of_tokens(tokens)[0] for chain in chains}) == len(chains)


@pytest.mark.parametrize("dtype", ["u1", "<u2", "<i4", ">i4", "<i8", ">u8", "<u4"])
def test_the_kind_of_integers_does_not_matter(dtype: str) -> None:
    values = list(range(64))
    array = np.array(values, dtype=dtype)
    assert pack_tokens(array) == pack_tokens(values)
    assert pack_tokens(np.repeat(array, 2)[::2]) == pack_tokens(values)
    assert pack_tokens(tuple(values)) == pack_tokens(values)


def test_no_tokens_are_no_bytes() -> None:
    assert pack_tokens([]) == b""
    assert KeyChain(PRINT).of_tokens([]) == []


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([-1], "token id -1 is outside"),
        ([1, 2**32], "token id 4294967296 is outside"),
        ([1.5], "must be integers"),
        ([True, False], "must be integers"),
        (["1"], "must be integers"),
        ([2**70], "must be integers"),
        ([[1, 2]], "must be one row"),
        (5, "must be one row"),
    ],
)
def test_what_are_no_token_ids_is_a_value_error(tokens: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack_tokens(tokens)


@given(st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=6))
def test_an_engines_hashes_chain_and_stay_apart_from_tokens(hashes: list[bytes]) -> None:
    chain = KeyChain(PRINT, block_tokens=4)
    keys = chain.of_hashes(hashes)
    assert len(keys) == len(hashes)
    assert keys[1:] == chain.of_hashes(hashes[1:], parent=keys[0])
    packed = pack_tokens([1, 2, 3, 4])
    assert chain.of_hashes([packed]) != chain.of_tokens([1, 2, 3, 4])


def test_keys_are_what_the_docstring_says() -> None:
    """Stored data is found again by them: they may never change."""
    root = hashlib.sha256(b"tierkv/root/1" + (4).to_bytes(4, "little") + b"salt" + PRINT).digest()
    first = hashlib.sha256(root + np.arange(4, dtype="<u4").tobytes()).digest()
    chain = KeyChain(PRINT, salt=b"salt", block_tokens=4)
    assert chain.root == root
    assert chain.of_tokens([0, 1, 2, 3, 4]) == [first]
