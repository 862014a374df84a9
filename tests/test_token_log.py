"""A TokenLog against a list."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ggml_mirror.token_log import UNKNOWN, TokenLog

TOKENS = st.lists(st.integers(0, 3), max_size=12)


def _ids(tokens: list[int]) -> np.ndarray:
    return np.array(tokens, np.int32)


@given(TOKENS, st.lists(st.tuples(st.integers(0, 30), TOKENS), max_size=8), TOKENS)
def test_it_knows_what_a_list_knows(first: list[int], puts: list[tuple[int, list[int]]], asked: list[int]) -> None:
    log, known = TokenLog(_ids(first)), list(first)
    for start, tokens in puts:
        log.put(start, tokens)
        known = [*known[:start], *[UNKNOWN] * (start - len(known)), *tokens]
    for other in (asked, [max(t, 0) for t in known], [*known, 1]):
        same = 0
        while same < min(len(known), len(other)) and known[same] == other[same]:
            same += 1
        assert log.first_difference(_ids(other)) == same
