"""Every way of rolling back: text is the plain target's, and the mirror's rows are a fresh capture's, whatever was accepted."""

from __future__ import annotations

import pytest

from .pair import BLOCK, TARGETS, Pair, script, sometimes, take, tokens_of


def test_means_of_rolling_back(name: str, pair: Pair) -> None:
    assert pair.dflash(name)._rollback.means == TARGETS[name][2]


@pytest.mark.parametrize("seed", range(3))
def test_a_random_draft_changes_nothing(name: str, seed: int, pair: Pair) -> None:
    prompt, n = tokens_of(20 + 7 * seed, seed), 40
    llm = pair.dflash(name, draft=pair.draft(seed=seed))
    assert take(llm, prompt, n) == pair.greedy(name, prompt, n)
    assert llm.stats.draft_steps > 0 and llm.stats.accepted < llm.stats.proposed
    pair.assert_rows_are_fresh(name, llm)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9, 1.0])
def test_a_draft_that_is_right_sometimes_changes_nothing(name: str, share: float, pair: Pair) -> None:
    prompt, n = tokens_of(24, 5), 60
    expected = pair.greedy(name, prompt, n + BLOCK)
    llm = pair.dflash(name)
    script(llm, prompt + expected, sometimes(1, share))
    assert take(llm, prompt, n) == expected[:n]
    if share == 1.0:
        assert llm.stats.tau == pytest.approx(BLOCK, abs=1)
    if 0 < share < 1:
        assert 0 < llm.stats.accepted < llm.stats.proposed
    pair.assert_rows_are_fresh(name, llm)


@pytest.mark.parametrize("accepted", range(BLOCK))
def test_each_number_of_accepted_tokens(name: str, accepted: int, pair: Pair) -> None:
    prompt, n = tokens_of(17, 2), 3 * (accepted + 1) + 1
    expected = pair.greedy(name, prompt, n + BLOCK)
    llm = pair.dflash(name)
    script(llm, prompt + expected, lambda _, i: i < accepted)
    assert take(llm, prompt, n) == expected[:n]
    # A wrong token behind the script's text may be right by chance, so only whole steps count.
    assert llm.stats.steps == [accepted] * 3
    assert llm.stats.accepted_by_position[:accepted] == [3] * accepted
    pair.assert_rows_are_fresh(name, llm)


@pytest.mark.parametrize("stop", range(1, 13))
def test_stopping_anywhere_leaves_the_sequence_as_committed(name: str, stop: int, pair: Pair) -> None:
    """And going on from there, with the prompt given again or with new tokens appended, is the plain target's text."""
    prompt = tokens_of(12, 3)
    expected = pair.greedy(name, prompt, 40)
    llm = pair.dflash(name)
    script(llm, prompt + expected)
    assert take(llm, prompt, stop) == expected[:stop]
    assert llm.input_ids[: llm.n_tokens].tolist() == prompt + expected[: stop - 1]
    pair.assert_rows_are_fresh(name, llm)

    more = take(llm, expected[stop - 1 : stop], 9, reset=False)
    assert more == expected[stop : stop + 9]
    pair.assert_rows_are_fresh(name, llm)

    again = prompt + expected[: stop - 1] + tokens_of(5, 9)[1:]
    assert take(llm, again, 12) == pair.greedy(name, again, 12)
    pair.assert_rows_are_fresh(name, llm)


def test_prompts_in_several_batches(name: str, pair: Pair) -> None:
    prompt = tokens_of(100, 4)
    expected = pair.greedy(name, prompt, 40)
    llm = pair.dflash(name, n_batch=16, n_ubatch=8)
    script(llm, prompt + expected, sometimes(3))
    assert take(llm, prompt, 30) == expected[:30]
    pair.assert_rows_are_fresh(name, llm)


def test_a_window_that_wraps(name: str, pair: Pair) -> None:
    prompt = tokens_of(50, 6)
    expected = pair.greedy(name, prompt, 110)
    llm = pair.dflash(name, draft_window=20)
    assert llm.mirror.cap == 20 + BLOCK
    script(llm, prompt + expected, sometimes(4))
    assert take(llm, prompt, 100) == expected[:100]
    pair.assert_rows_are_fresh(name, llm)


def test_the_draft_attends_to_its_whole_window_at_each_step(name: str, pair: Pair) -> None:
    """No step finds fewer rows than the sequence and the window have: rows lost to a reject would show here."""
    prompt = tokens_of(10, 7)
    expected = pair.greedy(name, prompt, 80)
    llm = pair.dflash(name, draft_window=32)
    script(llm, prompt + expected, sometimes(5))
    scripted, seen = llm.draft.step, []

    def step(mirror, *, n_past, last_token, n_tokens):  # type: ignore[no-untyped-def]
        drafted, context = scripted(mirror, n_past=n_past, last_token=last_token, n_tokens=n_tokens)
        seen.append((context, min(n_past, 32)))
        return drafted, context

    llm.draft.step = step  # type: ignore[method-assign]
    take(llm, prompt, 60)
    assert seen and all(context == possible for context, possible in seen)


@pytest.mark.parametrize("dtype", ["bf16", "f16", "q8_0"])
def test_small_dtypes(dtype: str, pair: Pair) -> None:
    prompt = tokens_of(30, 8)
    expected = pair.greedy("llama", prompt, 60)
    llm = pair.dflash("llama", feature_dtype=dtype)
    script(llm, prompt + expected, sometimes(6))
    assert take(llm, prompt, 50) == expected[:50]
    pair.assert_rows_are_fresh("llama", llm)


@pytest.mark.parametrize("n_ctx", [64, 100, 256])
def test_the_context_can_be_filled(n_ctx: int, name: str, pair: Pair) -> None:
    """To its last position; the token after it is an error, as in plain Llama, and the object goes on working."""
    prompt = tokens_of(30, 1)
    llm, plain = pair.dflash(name, n_ctx=n_ctx), pair.plain(name, n_ctx=n_ctx)
    expected = take(plain, prompt, n_ctx - len(prompt) + 1)
    script(llm, prompt + expected, sometimes(7))
    assert take(llm, prompt, n_ctx - len(prompt) + 1) == expected
    assert llm.n_tokens == n_ctx
    pair.assert_rows_are_fresh(name, llm)
    if n_ctx == llm.n_ctx() and name != "mamba":  # llama.cpp rounds n_ctx up; a running state has no last position
        for m in (plain, llm):
            with pytest.raises(RuntimeError):
                take(m, [40], 1, reset=False)
    assert take(llm, prompt, 20) == expected[:20]
    pair.assert_rows_are_fresh(name, llm)
