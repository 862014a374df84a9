"""The index finds what a comparison with every entry finds, in the order of what is shared."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ggml_mirror.cache.prefix_index import PrefixIndex, key_length, key_tokens, shared_length, token_key

# Few tokens, so that beginnings are shared; among them ids whose bytes sort otherwise than they do in little endian.
tokens = st.lists(st.sampled_from([0, 1, 255, 256, 65536, 2**31 - 1]), max_size=8)


def common(a: list[int], b: list[int]) -> int:
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


@given(tokens, tokens)
def test_keys(a: list[int], b: list[int]) -> None:
    assert key_tokens(token_key(a)).tolist() == a and key_length(token_key(a)) == len(a)
    assert shared_length(token_key(a), token_key(b)) == common(a, b)
    assert (token_key(a) < token_key(b)) == (a < b)


@given(st.lists(tokens.filter(bool), max_size=30), st.lists(tokens, max_size=10), tokens)
def test_nearest_and_prefixes(added: list[list[int]], removed: list[list[int]], prompt: list[int]) -> None:
    index, model = PrefixIndex[tuple[int, ...]](), set()
    for t in added:
        index.add(token_key(t), tuple(t))
        model.add(tuple(t))
    for t in removed:
        index.remove(token_key(t))
        model.discard(tuple(t))
    assert len(index) == len(model) and set(index.values()) == model
    found = list(index.nearest(token_key(prompt)))
    assert [shared for shared, _ in found] == sorted((shared for shared, _ in found), reverse=True)
    assert set(found) == {(common(list(t), prompt), t) for t in model if common(list(t), prompt)}
    assert len(found) == len(set(found))
    assert set(index.prefixes(token_key(prompt))) == {t for t in model if list(t) == prompt[: len(t)] != prompt}


def test_a_value_is_replaced() -> None:
    index = PrefixIndex[str]()
    index.add(token_key([1, 2]), "old")
    index.add(token_key([1, 2]), "new")
    assert list(index.nearest(token_key([1]))) == [(1, "new")] and index.get(token_key([1, 2])) == "new"


def test_a_thousand_long_entries_are_not_compared_with_one_by_one() -> None:
    """What shares most is among the first two keys that are looked at."""
    rng = np.random.default_rng(0)
    base = rng.integers(0, 40000, 4096)
    index, looked = PrefixIndex[int](), []
    for i in range(1000):
        own = base.copy()
        own[4 * i + 1 :] = rng.integers(0, 40000, 4096 - 4 * i - 1)
        index.add(token_key(own), i)
    shared = index._shared
    index._shared = lambda at, key: looked.append(at) or shared(at, key)  # type: ignore[method-assign, func-returns-value]
    prompt = base.copy()
    prompt[2001] += 1
    assert next(index.nearest(token_key(prompt)))[0] == 2001
    assert len(looked) == 2
