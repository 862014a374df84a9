"""Random walks over everything that can happen to a model; after each step the text and the rows are those of a fresh one."""

from __future__ import annotations

from typing import Any

import llama_cpp
import numpy as np
import pytest
from llama_cpp._internals import LlamaContext

from .pair import N_CTX, Pair, script, sometimes, take, tokens_of


class Walk:
    """A model and what it must hold: ``said`` is the committed sequence as it ought to be."""

    def __init__(self, pair: Pair, name: str, seed: int, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
        self.pair, self.name, self.monkeypatch = pair, name, monkeypatch
        self.rng = np.random.default_rng(seed)
        self.llm = pair.dflash(name, draft_window=int(self.rng.choice([24, 100, N_CTX])), **options)
        self.said: list[int] = []
        self.saved: list[tuple[Any, list[int]]] = []

    def check(self) -> None:
        assert self.llm.input_ids[: self.llm.n_tokens].tolist() == self.said
        self.pair.assert_rows_are_fresh(self.name, self.llm, first=self.first_row())

    def first_row(self) -> int:
        """Rows that a window lost by being cut far back do not come back; all others have to be there."""
        llm = self.llm
        if len(self.said) <= llm.draft_window:
            return 0 if llm.mirror.cap >= N_CTX else len(self.said)
        return len(self.said) if llm.mirror.cap < N_CTX else 0

    def generate(self, prompt: list[int], *, reset: bool) -> None:
        whole = prompt if reset else self.said + prompt
        n = int(self.rng.integers(1, 20))
        expected = self.pair.greedy(self.name, whole, n + 9)
        script(
            self.llm, whole + expected, sometimes(int(self.rng.integers(1000)), float(self.rng.choice([0.3, 0.8, 1])))
        )
        assert take(self.llm, prompt, n, reset=reset) == expected[:n]
        self.said = whole + expected[: n - 1]

    def say(self) -> None:
        self.generate(tokens_of(int(self.rng.integers(1, 25)), int(self.rng.integers(100))), reset=True)

    def follow(self) -> None:
        keep = len(self.said) - int(self.rng.integers(0, 12))
        self.generate([*self.said[: max(keep, 1)], *tokens_of(3, int(self.rng.integers(100)))], reset=True)

    def append(self) -> None:
        self.generate(tokens_of(int(self.rng.integers(1, 6)), int(self.rng.integers(100))), reset=False)

    def evaluate(self) -> None:
        tokens = tokens_of(int(self.rng.integers(1, 6)), int(self.rng.integers(100)))
        self.llm.eval(tokens)
        self.said = self.said + tokens

    def reset(self) -> None:
        self.llm.reset()
        self.said = []

    def save(self) -> None:
        self.saved.append((self.llm.save_state(), self.said))

    def load(self) -> None:
        if self.saved:
            state, self.said = self.saved[int(self.rng.integers(len(self.saved)))]
            self.llm.load_state(state)

    def clear(self) -> None:
        self.llm._ctx.kv_cache_clear()
        self.llm.n_tokens = 0
        self.said = []

    def fail(self) -> None:
        real, left = LlamaContext.decode, int(self.rng.integers(0, 4))
        after = bool(self.rng.integers(2))

        def decode(context: Any, batch: Any) -> None:
            nonlocal left
            left -= 1
            if left < 0 and not after:
                raise KeyboardInterrupt
            real(context, batch)
            if left < 0:
                raise KeyboardInterrupt

        prompt = [*self.said[: max(len(self.said) - 3, 0)], *tokens_of(4, 9)]
        expected = self.pair.greedy(self.name, prompt, 60)
        script(self.llm, prompt + expected, sometimes(1, 0.5))
        with self.monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(LlamaContext, "decode", decode)
            take(self.llm, prompt, 50)
        self.said = self.llm.input_ids[: self.llm.n_tokens].tolist()
        assert self.said == (prompt + expected)[: len(self.said)]


ACTIONS = ("say", "follow", "follow", "append", "append", "evaluate", "reset", "save", "load", "load", "clear", "fail")


def walk(pair: Pair, name: str, seed: int, steps: int, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    w = Walk(pair, name, seed, monkeypatch, **options)
    done = []
    for _ in range(steps):
        action = "reset" if len(w.said) > 150 else str(w.rng.choice(ACTIONS))
        done.append(action)
        try:
            getattr(w, action)()
            w.check()
        except BaseException as error:
            raise AssertionError(f"seed {seed}, after {done}") from error


@pytest.mark.parametrize("seed", range(2))
def test_random_walks(seed: int, name: str, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    walk(pair, name, seed, 25, monkeypatch)


@pytest.mark.parametrize("dtype", ["f32", "q4_0"])
def test_random_walks_with_fused_rows(dtype: str, name: str, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with micro-batches smaller than most prompts: rows are fused in mid-evaluation."""
    walk(pair, name, 7, 25, monkeypatch, feature_rows="fused", feature_dtype=dtype, n_batch=32, n_ubatch=16)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(100, 110))
def test_long_random_walks(seed: int, name: str, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    walk(pair, name, seed, 100, monkeypatch)


def test_cells_removed_by_hand_take_their_rows_with_them(pair: Pair) -> None:
    prompt = tokens_of(40)
    llm = pair.dflash()
    take(llm, prompt, 20)
    llm._ctx.kv_cache_seq_rm(0, 30, -1)
    llm.n_tokens = 30
    pair.assert_rows_are_fresh("llama", llm)
    assert take(llm, [60, 61], 15, reset=False) == pair.greedy("llama", [*prompt[:30], 60, 61], 15)
    pair.assert_rows_are_fresh("llama", llm)


def test_a_context_shift_forgets_the_rows_that_moved(pair: Pair) -> None:
    """Positions 8 to 23 are dropped and the rest moves down, in a plain Llama likewise: the same text, and no row of before."""

    def shift(m: llama_cpp.Llama) -> None:
        n = m.n_tokens
        m._ctx.kv_cache_seq_rm(0, 8, 24)
        m._ctx.kv_cache_seq_shift(0, 24, n, -16)
        m.input_ids[8 : n - 16] = m.input_ids[24:n].copy()
        m.n_tokens = n - 16

    prompt = tokens_of(60)
    llm, plain = pair.dflash(), pair.plain()
    for m in (llm, plain):
        m.eval(prompt)
        shift(m)
    assert llm.mirror.positions.tolist() == list(range(8))
    expected = take(plain, [70], 30, reset=False)
    script(llm, prompt[:8] + prompt[24:] + [70] + expected, sometimes(3))
    assert take(llm, [70], 22, reset=False) == expected[:22]
    assert llm.stats.accepted > 0
    assert llm.mirror.positions.tolist() == [*range(8), *range(44, llm.n_tokens)]


@pytest.mark.parametrize("shared", [1, 8, 20, 36])
def test_a_loaded_state_that_went_on_is_cut_back_to_nothing_that_it_lacks(shared: int, name: str, pair: Pair) -> None:
    """What slid out of an attention window is in no saved state, and llama.cpp cuts back past it without a word."""
    prompt = tokens_of(40, 4)
    llm = pair.dflash(name)
    take(llm, prompt, 2)
    llm.load_state(llm.save_state())
    follow = pair.greedy(name, prompt, 12)
    assert take(llm, prompt, 12) == follow
    other = [*prompt[:shared], *tokens_of(6, 9)[1:]]
    assert take(llm, other, 12) == pair.greedy(name, other, 12)
    pair.assert_rows_are_fresh(name, llm)
