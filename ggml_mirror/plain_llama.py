"""A target without a draft, for where either may run."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from typing import Any

import numpy as np
from llama_cpp import LlamaState

from .cache.cached_llama import CachedLlama
from .capture import put_state, take_state
from .draft_stats import DraftStats


class PlainLlama(CachedLlama):
    """A ``Llama`` that counts as a ``DFlashLlama`` does; its ``stats`` know no draft."""

    stats = DraftStats()
    _evaluated = 0

    def eval(self, tokens: Sequence[int]) -> None:
        self._evaluated += len(tokens)
        super().eval(tokens)

    def save_state(self) -> LlamaState:
        """As ``Llama.save_state``, without a copy of scores that nothing reads."""
        state = take_state(self.ctx)
        return LlamaState(
            input_ids=self.input_ids.copy(),
            scores=np.empty((0, self._n_vocab), np.single),
            n_tokens=self.n_tokens,
            llama_state=state,
            llama_state_size=len(state),
            seed=self._seed,
        )

    def load_state(self, state: LlamaState) -> None:
        if not put_state(self.ctx, state.llama_state):
            self.reset()
            raise RuntimeError("llama.cpp did not take the saved state; the sequence was reset")
        self.input_ids, self.n_tokens = state.input_ids.copy(), state.n_tokens
        self._requires_eval = True

    def generate(self, tokens: Sequence[int], *args: Any, **kwargs: Any) -> Generator[int, Sequence[int] | None, None]:
        stats = self.stats = DraftStats(prompt_tokens=len(tokens))
        before, started = self._evaluated, time.perf_counter()
        generator = super().generate(tokens, *args, **kwargs)
        try:
            token = next(generator)
            stats.prefill_s = time.perf_counter() - started
            stats.prefix_reused = len(tokens) - (self._evaluated - before)
            while True:
                stats.tokens += 1
                sent = yield token
                started = time.perf_counter()
                token = generator.send(sent)
                stats.decode_s += time.perf_counter() - started
        except StopIteration:
            return
        finally:
            generator.close()
