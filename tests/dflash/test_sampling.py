"""Sampling: each token is drawn by llama.cpp's samplers from the target's own logits at its position."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from .pair import Pair, script, sometimes, take, tokens_of

PROMPT = tokens_of(12, 4)
WIDE = {"temp": 1.6, "top_k": 12, "top_p": 1.0, "min_p": 0.0}


@pytest.mark.parametrize("seed", range(8))
def test_a_seed_gives_plain_llamas_sequence(name: str, seed: int, pair: Pair) -> None:
    """The samplers draw one number per token, in order, so even the sequence is the same: a rejected token costs no draw."""
    plain = pair.plain(name)
    plain.set_seed(seed)
    expected = take(plain, PROMPT, 40, **WIDE)
    llm = pair.dflash(name)
    script(llm, PROMPT + expected, sometimes(seed, 0.8))
    for _ in range(2):
        llm.set_seed(seed)
        assert take(llm, PROMPT, 30, **WIDE) == expected[:30]
        assert llm.stats.accepted > 0
    assert len(set(expected)) > 3
    pair.assert_rows_are_fresh(name, llm)


def softmax_of(pair: Pair, tokens: list[int], top_k: int, temp: float) -> dict[int, float]:
    """By numpy, from the plain target's logits."""
    llm = pair.plain()
    llm.eval(tokens)
    logits = np.ctypeslib.as_array(llm._ctx.get_logits(), shape=(llm.n_vocab(),)).astype(np.float64)
    best = np.argsort(-logits)[:top_k]
    p = np.exp((logits[best] - logits[best].max()) / temp)
    return dict(zip(best.tolist(), (p / p.sum()).tolist(), strict=True))


@pytest.mark.parametrize("position", [1, 2, 3])
def test_frequencies_of_drafted_positions_are_the_targets(position: int, pair: Pair) -> None:
    """Over 500 seeds: the token behind a fixed text, at a block position whose drafted token is the likeliest one. A scheme that
    favoured the draft would favour that token."""
    text = pair.greedy("llama", PROMPT, 12)
    forced = text[: position + 1]
    context = PROMPT + forced
    expected = softmax_of(pair, context, 12, 1.6)
    llm = pair.dflash()
    script(llm, PROMPT + text)
    counts: Counter[int] = Counter()
    n = 500

    def steer(ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        """Fix the tokens up to the position that is looked at."""
        at = len(ids) - len(PROMPT)
        if at < len(forced):
            scores = np.full_like(scores, -1e9)
            scores[forced[at]] = 10.0
        return scores

    for seed in range(n):
        llm.set_seed(seed)
        tokens = take(llm, PROMPT, position + 2, logits_processor=[steer], **WIDE)
        assert tokens[:-1] == forced
        counts[tokens[-1]] += 1
    assert set(counts) <= set(expected)
    # chi-square of the tokens that are expected at least 5 times, the others pooled
    common = [t for t, p in expected.items() if n * p >= 5]
    rest = n * (1 - sum(expected[t] for t in common))
    chi = sum((counts[t] - n * expected[t]) ** 2 / (n * expected[t]) for t in common)
    chi += (n - sum(counts[t] for t in common) - rest) ** 2 / max(rest, 1.0)
    degrees = len(common)
    assert degrees >= 2
    assert chi < degrees + 5 * np.sqrt(2 * degrees), (counts, expected)
