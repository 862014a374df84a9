"""Where prompts are cut: the same places for all that share them, llama.cpp's own batches kept, and no batch that rounds otherwise."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ggml_mirror.prompt_grid import CPU_STEPS, GPU_STEPS, PromptGrid

grids = st.builds(
    PromptGrid,
    n_batch=st.sampled_from([1, 16, 100, 512, 2048]),
    n_ubatch=st.sampled_from([1, 8, 64, 100, 512]),
    steps=st.sampled_from([CPU_STEPS, GPU_STEPS]),
)
lengths = st.integers(1, 1500)


def batches_of(grid: PromptGrid, n: int) -> list[tuple[int, int]]:
    return list(itertools.pairwise([0, *grid.ends(n).tolist()]))


@given(grids, lengths)
def test_batches_fill_the_prompt_and_lie_within_llama_cpp_s_own(grid: PromptGrid, n: int) -> None:
    batches = batches_of(grid, n)
    assert batches[-1][1] == n and all(start < stop for start, stop in batches)
    for start, stop in batches:
        assert start // grid.n_batch == (stop - 1) // grid.n_batch
        within = start % grid.n_batch, (stop - 1) % grid.n_batch
        assert within[0] // grid.n_ubatch == within[1] // grid.n_ubatch


@given(lengths)
def test_on_a_cpu_no_batch_takes_another_path_than_the_whole_would(n: int) -> None:
    """64 tokens and more take one path through flash attention, fewer another, and a single one a third."""
    for start, stop in batches_of(PromptGrid(512, 512, CPU_STEPS), n):
        own = min(512, n - start // 512 * 512)  # llama.cpp's own batch
        assert (stop - start >= 64) == (own >= 64)
        assert (stop - start == 1) == (own == 1)


@given(grids, lengths, lengths, lengths)
@example(PromptGrid(512, 512, CPU_STEPS), 128, 300, 1500)
@example(PromptGrid(512, 512, CPU_STEPS), 40, 400, 40)  # short prompts have batches of their own
def test_what_is_common_was_evaluated_in_the_same_batches(grid: PromptGrid, a: int, b: int, limit: int) -> None:
    common = grid.common(a, b, limit)
    assert 0 <= common <= min(limit, b - 1)
    mine = [batch for batch in batches_of(grid, b) if batch[1] <= common]
    assert mine == [batch for batch in batches_of(grid, a) if batch[1] <= common]
    assert (mine[-1][1] if mine else 0) == common
    # And it is the most: the next batch is another, or beyond the limit, or the last.
    ahead = next(batch for batch in batches_of(grid, b) if batch[1] > common)
    assert ahead not in batches_of(grid, a) or ahead[1] > limit or ahead[1] == b


@pytest.mark.parametrize(
    ("n", "ends"),
    [
        (1, [1]),
        (31, [31]),
        (32, [16, 32]),
        (63, [16, 32, 63]),
        (64, [64]),
        (127, [127]),
        (128, [64, 128]),
        (575, [64, 128, 192, 256, 320, 384, 448, 512, 528, 544, 575]),
        (576, [64, 128, 192, 256, 320, 384, 448, 512, 576]),
    ],
)
def test_examples_on_a_cpu(n: int, ends: list[int]) -> None:
    grid = PromptGrid(512, 512, CPU_STEPS)
    assert grid.ends(n).tolist() == ends
    assert grid.last_start(n) == (ends[-2] if len(ends) > 1 else 0)
