"""How much of an entry a prompt may take: the most that leaves nothing different from a run without a cache."""

from __future__ import annotations

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from ggml_mirror.cache.entry import Coverage, run_start

from .entries import GRID

sizes = st.integers(1, 300)


@st.composite
def coverages(draw: st.DrawFn) -> Coverage:
    n_prompt = draw(sizes)
    logits = draw(st.booleans())
    # The state behind the whole prompt, or one behind one of its batches.
    n = n_prompt if logits else draw(st.sampled_from(GRID.ends(n_prompt).tolist()))
    first_cut = draw(st.sampled_from([0, n, n // 2]))
    return Coverage(n, n_prompt, draw(st.integers(0, n)), first_cut, logits)


def allowed(c: Coverage, shared: int, n_prompt: int, window: int, keep: int) -> bool:
    """May ``keep`` tokens be taken? Said in the terms of what a run from nothing does."""
    if keep == 0:
        return True
    if keep > min(shared, c.n_tokens) or keep < c.first_cut:
        return False
    whole = keep == n_prompt
    if whole and not (c.logits and c.n_tokens == n_prompt):
        return False  # there would be no logits to sample from
    mine = [end for end in GRID.ends(n_prompt).tolist() if end <= keep]
    if mine[-1:] != [keep] or mine != [end for end in GRID.ends(c.n_prompt).tolist() if end <= keep]:
        return False
    needed = range(max(0, n_prompt - window), keep)  # rows that are not evaluated again
    return all(position >= c.first_row for position in needed)


@given(coverages(), sizes, sizes, st.integers(0, 300))
@example(Coverage(200, 200, 0, 200, True), 200, 200, 50)  # a running state, the same prompt
@example(Coverage(128, 200, 0, 128, False), 128, 250, 50)  # a running state, a longer prompt
@example(Coverage(200, 200, 100, 0, True), 200, 200, 150)  # rows that have left the ring
def test_usable_is_the_most_that_is_allowed(c: Coverage, shared: int, n_prompt: int, window: int) -> None:
    shared = min(shared, n_prompt, c.n_tokens)
    keep = c.usable(shared, n_prompt, window, GRID)
    assert allowed(c, shared, n_prompt, window, keep)
    better = [k for k in range(keep + 1, n_prompt + 1) if allowed(c, shared, n_prompt, window, k)]
    assert not better


@given(coverages(), coverages(), sizes, st.integers(0, 300))
def test_what_covers_an_entry_of_the_same_tokens_does_all_that_it_does(
    a: Coverage, b: Coverage, n_prompt: int, window: int
) -> None:
    if a.n_tokens == b.n_tokens and a.covers(b):
        shared = min(a.n_tokens, n_prompt)
        assert a.usable(shared, n_prompt, window, GRID) >= b.usable(shared, n_prompt, window, GRID)


@given(coverages(), coverages(), st.integers(1, 400), st.integers(0, 300), st.integers(0, 300))
def test_what_supersedes_a_beginning_does_all_but_the_very_same_prompt(
    a: Coverage, b: Coverage, n_prompt: int, shared: int, window: int
) -> None:
    """The last batch of the same prompt is then evaluated again."""
    if b.n_tokens >= a.n_tokens or not a.supersedes(b, GRID):
        return
    with_a = a.usable(min(shared, n_prompt, a.n_tokens), n_prompt, window, GRID)
    with_b = b.usable(min(shared, n_prompt, b.n_tokens), n_prompt, window, GRID)
    assert with_a >= (GRID.last_start(n_prompt) if with_b == n_prompt else with_b)
    assert 2 * b.n_tokens >= a.n_tokens


@given(st.sets(st.integers(0, 30)), st.integers(0, 31))
def test_run_start(held: set[int], stop: int) -> None:
    first = run_start(np.array(sorted(held), np.int64), stop)
    assert set(range(first, stop)) <= held and first - 1 not in held and first <= stop
