"""Entries of made-up bytes, for the tiers: they look at tokens, coverage and sizes alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ggml_mirror.cache.entry import Coverage, Entry
from ggml_mirror.cache.prefix_index import token_key
from ggml_mirror.prompt_grid import PromptGrid

GRID = PromptGrid(512, 512, (64, 16))
ROW_BYTES, N_VOCAB = 34, 5


def entry_of(
    tokens: Sequence[int],
    *,
    target_bytes: int = 100,
    first_row: int = 0,
    first_cut: int = 0,
    n_prompt: int | None = None,
    logits: bool = True,
    scored: bool = False,
    seed: int = 0,
) -> Entry:
    n, rng = len(tokens), np.random.default_rng([seed, *tokens[:4], len(tokens)])
    return Entry(
        key=token_key(tokens),
        coverage=Coverage(n, n if n_prompt is None else n_prompt, first_row, first_cut, logits),
        target=rng.bytes(target_bytes),
        rows=rng.integers(0, 256, (n - first_row, ROW_BYTES), np.uint8),
        logits=rng.standard_normal((int(logits), N_VOCAB)).astype(np.float32),
        scores=rng.standard_normal((n * scored, N_VOCAB)).astype(np.float32),
    )


def same_entry(a: Entry, b: Entry) -> bool:
    return (
        (a.key, a.coverage, bytes(a.target)) == (b.key, b.coverage, bytes(b.target))
        and a.rows.tobytes() == b.rows.tobytes()
        and a.rows.shape == b.rows.shape
        and a.logits.tobytes() == b.logits.tobytes()
        and a.scores.tobytes() == b.scores.tobytes()
    )
