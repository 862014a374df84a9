"""Statistics: counts that agree with each other and with what the draft was made to do; times that add up."""

from __future__ import annotations

import json
import time

import pytest

from ggml_mirror.draft_stats import DraftStats

from .pair import BLOCK, Pair, script, sometimes, take, tokens_of

PROMPT = tokens_of(20, 2)


def require_consistent(s: DraftStats, tokens: int) -> None:
    assert s.tokens == tokens == 1 + s.draft_steps + s.plain_steps + s.accepted
    assert len(s.steps) == s.draft_steps
    assert 0 <= s.accepted == sum(s.steps) == sum(s.accepted_by_position) <= s.proposed
    assert s.accepted_by_position == sorted(s.accepted_by_position, reverse=True)
    assert s.accepted_by_position == [sum(n > i for n in s.steps) for i in range(len(s.accepted_by_position))]
    assert s.acceptance == pytest.approx(s.accepted / s.proposed)
    assert s.acceptance_with_anchor == pytest.approx((s.accepted + s.draft_steps) / (s.proposed + s.draft_steps))
    assert s.tau == pytest.approx((s.accepted + s.draft_steps) / s.draft_steps)
    parts = s.draft_s + s.verify_s + s.sample_s + s.rollback_s
    assert 0 < parts
    assert s.draft_s + s.verify_s <= s.decode_s + 1e-3  # the last rollback is behind the last token
    assert 0 <= s.read_s <= s.draft_s + 1e-3  # 0: rows that are read in place
    assert 0 < s.capture_s <= s.prefill_s + s.verify_s + s.rollback_s + 1e-3


@pytest.mark.parametrize("n", [2, 9, 30, 41])
@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
def test_counts_agree(n: int, share: float, name: str, pair: Pair) -> None:
    expected = pair.greedy(name, PROMPT, n + 9)
    llm = pair.dflash(name)
    script(llm, PROMPT + expected, sometimes(n, share))
    take(llm, PROMPT, n)
    require_consistent(llm.stats, n)
    assert llm.stats.prompt_tokens == len(PROMPT)
    assert json.loads(json.dumps(llm.stats.to_dict()))["steps"] == llm.stats.steps


def test_counts_are_those_of_the_script(pair: Pair) -> None:
    """Two right tokens, then none, then all, and so on: both definitions by hand."""
    rights = [2, 0, 7, 3]
    n = 1 + sum(r + 1 for r in rights)
    expected = pair.greedy("llama", PROMPT, n + 9)
    llm = pair.dflash()
    script(llm, PROMPT + expected, lambda step, i: i < rights[step % 4])
    take(llm, PROMPT, n)
    s = llm.stats
    assert s.steps == rights and s.proposed == 4 * (BLOCK - 1)
    assert s.accepted_by_position == [3, 3, 2, 1, 1, 1, 1]
    assert s.acceptance == 12 / 28
    assert s.acceptance_with_anchor == (12 + 4) / (28 + 4)
    assert s.tau == 1 + 12 / 4


def test_a_prompt_of_one_token_begins_without_a_draft(pair: Pair) -> None:
    """The first token has no row before it only if there is no token before it."""
    llm = pair.dflash()
    take(llm, PROMPT[:1], 12)
    require_consistent(llm.stats, 12)


def test_each_call_counts_anew(pair: Pair) -> None:
    llm = pair.dflash()
    take(llm, PROMPT, 30)
    first = llm.stats
    take(llm, PROMPT, 5)
    require_consistent(llm.stats, 5)
    assert first is not llm.stats and first.tokens == 30


def test_the_consumers_own_time_is_left_out(pair: Pair) -> None:
    llm = pair.dflash()
    for _, _ in zip(range(5), llm.generate(PROMPT, temp=0.0), strict=False):
        time.sleep(0.1)
    assert llm.stats.decode_s < 0.3
    assert llm.stats.decode_tok_s == pytest.approx((llm.stats.tokens - 1) / llm.stats.decode_s)


def test_nothing_done_is_no_division() -> None:
    s = DraftStats()
    assert (s.acceptance, s.acceptance_with_anchor, s.tau, s.prefill_tok_s, s.decode_tok_s) == (0, 0, 0, 0, 0)
