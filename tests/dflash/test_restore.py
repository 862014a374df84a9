"""Saved states and caches carry the rows: warm equals cold, in text and in every step; another pair's state changes nothing."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_cpp import LlamaDiskCache, LlamaRAMCache

from ggml_mirror.dflash import DFlashLlama
from ggml_mirror.errors import SnapshotMismatchError

from .pair import Pair, script, sometimes, take, tokens_of

PROMPT = tokens_of(30, 1)


def go_on(llm: DFlashLlama, token: int, n: int = 25) -> tuple[list[int], list[int], int]:
    """Text, accepted counts per step, and proposed tokens of going on."""
    text = take(llm, [token], n, reset=False)
    return text, llm.stats.steps, llm.stats.proposed


@pytest.mark.parametrize("window", [None, 20], ids=["whole", "wrapped"])
@pytest.mark.parametrize(("dtype", "rows"), [("f32", "raw"), ("q8_0", "raw"), ("q4_0", "fused")])
@pytest.mark.parametrize("where", ["same", "twin"])
def test_warm_equals_cold(where: str, dtype: str, rows: str, window: int | None, name: str, pair: Pair) -> None:
    """In mid-conversation; into the object itself after other work, and into another one. The real draft speaks, and its logits
    are compared: they see the rows."""
    options = {"feature_dtype": dtype, "feature_rows": rows, "draft_window": window, "draft": pair.draft(seed=2)}
    llm = pair.dflash(name, **options)
    said = take(llm, PROMPT, 20)
    state = pickle.loads(pickle.dumps(llm.save_state()))
    cold = go_on(llm, said[-1])
    cold_logits = llm.draft.logits()
    assert cold[0] == pair.greedy(name, PROMPT + said, 25)

    warm = llm if where == "same" else pair.dflash(name, **options)
    take(warm, tokens_of(70, 9), 11)
    warm.load_state(state)
    pair.assert_rows_are_fresh(name, warm)
    assert go_on(warm, said[-1]) == cold
    np.testing.assert_allclose(warm.draft.logits(), cold_logits, atol=0.1 if name.startswith("gemma3") else 1e-2)
    pair.assert_rows_are_fresh(name, warm)


def test_restored_states_can_be_cut_back_anywhere(name: str, pair: Pair) -> None:
    """Prompts that share all but the last few tokens of the restored sequence."""
    said = pair.greedy(name, PROMPT, 30)
    llm = pair.dflash(name)
    script(llm, PROMPT + said)
    take(llm, PROMPT, 20)
    state = llm.save_state()
    whole = PROMPT + said[:19]
    for cut in range(10):
        llm.reset()
        llm.load_state(state)
        prompt = [*whole[: len(whole) - cut], 44]
        expected = pair.greedy(name, prompt, 20)
        script(llm, prompt + expected, sometimes(cut))
        assert take(llm, prompt, 12) == expected[:12], cut
        pair.assert_rows_are_fresh(name, llm)


@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_caches(kind: str, name: str, pair: Pair, tmp_path: Path) -> None:
    def cache() -> Any:
        return LlamaRAMCache() if kind == "ram" else LlamaDiskCache(str(tmp_path / "cache"))

    llm = pair.dflash(name, draft=pair.draft(seed=2))
    llm.set_cache(cache())
    first = llm("Once upon a time", max_tokens=20, temperature=0)["choices"][0]["text"]
    if kind == "disk":
        # A cache on disk serves an object that never saw the conversation.
        llm = pair.dflash(name, draft=pair.draft(seed=2))
        llm.set_cache(cache())
    else:
        llm("Something else entirely", max_tokens=5, temperature=0)
    follow = f"Once upon a time{first} and"
    warm = llm(follow, max_tokens=25, temperature=0)["choices"][0]["text"], llm.stats.steps
    reused = llm.stats.prefix_reused
    cold = pair.dflash(name, draft=pair.draft(seed=2))
    assert warm == (cold(follow, max_tokens=25, temperature=0)["choices"][0]["text"], cold.stats.steps)
    assert reused > 4 and cold.stats.prefix_reused == 0
    pair.assert_rows_are_fresh(name, llm)


def test_a_ram_cache_counts_the_rows(pair: Pair) -> None:
    """Its capacity is compared with ``llama_state_size``; rows can be larger than the target's own state."""
    llm = pair.dflash()
    take(llm, PROMPT, 20)
    state = llm.save_state()
    cache = LlamaRAMCache(capacity_bytes=2**30)
    cache[PROMPT] = state
    assert cache.cache_size >= len(state.llama_state) + state.mirror.nbytes


STRANGERS: dict[str, dict[str, Any]] = {
    "dtype": {"feature_dtype": "f16"},
    "window": {"draft_window": 40},
    "context": {"n_ctx": 512, "draft_window": 256},
}


@pytest.mark.parametrize("stranger", [*STRANGERS, "draft", "target", "plain", "taps"])
def test_a_strange_state_changes_nothing(stranger: str, pair: Pair) -> None:
    llm = pair.dflash(draft=pair.draft(seed=2))
    other: Any
    if stranger == "plain":
        other = pair.plain()
    elif stranger == "target":
        other = pair.dflash("qwen3", draft=pair.draft(seed=2))
    elif stranger == "draft":
        other = pair.dflash(draft=pair.draft(seed=5))
    elif stranger == "taps":
        other = pair.dflash(draft=pair.draft(seed=2, taps=(0, 6)))
    else:
        other = pair.dflash(draft=pair.draft(seed=2), **STRANGERS[stranger])
    take(other, tokens_of(40, 6), 12)
    state = other.save_state()

    said = take(llm, PROMPT, 20)
    before = llm.save_state()
    with pytest.raises(SnapshotMismatchError, match="othing was changed"):
        llm.load_state(state)
    after = llm.save_state()
    assert (after.n_tokens, after.seed, after.llama_state) == (before.n_tokens, before.seed, before.llama_state)
    np.testing.assert_array_equal(after.input_ids, before.input_ids)
    np.testing.assert_array_equal(after.mirror.rows, before.mirror.rows)
    np.testing.assert_array_equal(after.mirror.positions, before.mirror.positions)
    twin = pair.dflash(draft=pair.draft(seed=2))
    assert take(twin, PROMPT, 20) == said
    assert go_on(llm, said[-1]) == go_on(twin, said[-1])
    pair.assert_rows_are_fresh("llama", llm)


def test_a_strange_state_in_mid_stream_changes_nothing(pair: Pair) -> None:
    expected = pair.greedy("llama", PROMPT, 40)
    llm = pair.dflash()
    script(llm, PROMPT + expected)
    generator = llm.generate(PROMPT, temp=0.0)
    head = [next(generator) for _ in range(4)]
    with pytest.raises(SnapshotMismatchError):
        llm.load_state(pair.plain().save_state())
    assert head + [next(generator) for _ in range(20)] == expected[:24]
    generator.close()
    pair.assert_rows_are_fresh("llama", llm)


def test_a_broken_target_state_leaves_target_and_mirror_consistent(pair: Pair) -> None:
    """llama.cpp finds out while reading: the sequence is then empty, never half of one and half of the other."""
    llm = pair.dflash()
    take(llm, PROMPT, 20)
    state = copy.copy(llm.save_state())
    state.llama_state = state.llama_state[: len(state.llama_state) // 2]
    with pytest.raises(RuntimeError):
        llm.load_state(state)
    assert llm.n_tokens == 0 and len(llm.mirror.positions) == 0
    assert take(llm, PROMPT, 20) == pair.greedy("llama", PROMPT, 20)
    pair.assert_rows_are_fresh("llama", llm)


def test_a_broken_snapshot_changes_nothing(pair: Pair) -> None:
    """Its header fits, its arrays do not agree with it."""
    from dataclasses import replace

    from ggml_mirror.errors import SnapshotError

    llm = pair.dflash()
    said = take(llm, PROMPT, 20)
    state = llm.save_state()
    take(llm, tokens_of(20, 7), 9)
    n_tokens, ids = llm.n_tokens, llm.input_ids.copy()
    broken = copy.copy(state)
    broken.mirror = replace(state.mirror, rows=state.mirror.rows[:-1])
    with pytest.raises(SnapshotError):
        llm.load_state(broken)
    assert llm.n_tokens == n_tokens
    np.testing.assert_array_equal(llm.input_ids, ids)
    pair.assert_rows_are_fresh("llama", llm)
    llm.load_state(state)
    assert take(llm, said[-1:], 10, reset=False) == pair.greedy("llama", PROMPT + said, 10)


def test_scores_come_back_with_logits_all(pair: Pair) -> None:
    llm = pair.dflash(logits_all=True)
    take(llm, PROMPT, 20)
    state, scores = llm.save_state(), llm._scores.copy()
    take(llm, tokens_of(60, 7), 9)
    llm.load_state(state)
    np.testing.assert_array_equal(llm._scores, scores)
