"""What a prefix cache needs of a model, be it a DFlashLlama or a plain Llama: entries of its states, and states of entries."""

from __future__ import annotations

import weakref
from collections.abc import Generator, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from llama_cpp import Llama, LlamaState

from ..capture import SEQUENCE
from ..dflash import DFlashLlama, DFlashState
from ..errors import ClosedError, GgmlMirrorError
from ..prompt_grid import PromptGrid
from ..rollback import first_cut, has_slid, moves_by_blocks
from ..sequence_state import put_sequence, take_sequence
from ..snapshot import Snapshot, SnapshotHeader
from .cached_llama import CachedLlama, generate_cached
from .entry import Coverage, Entry, run_start
from .prefix_index import key_tokens, shared_length, token_key


class CachedModel:
    """A DFlashLlama, whose states carry the mirror's rows. It is not kept alive."""

    def __init__(self, llm: Llama) -> None:
        self._llm = weakref.ref(llm)
        self.grid = PromptGrid.of(llm)

    @property
    def llm(self) -> Any:
        llm = self._llm()
        if llm is None or llm._ctx.ctx is None:
            raise ClosedError("the model of this cache is closed")
        return llm

    @property
    def window(self) -> int:
        """Rows that the draft attends to."""
        window: int = self.llm.draft_window
        return window

    def reusable(self, tokens: Sequence[int]) -> int:
        """Tokens of a prompt that the model need not evaluate again if nothing is put into it."""
        kept: int = self.llm.reusable(tokens)
        return kept

    def take(self) -> LlamaState | str:
        """The model's state as it is, or why it is not worth keeping."""
        llm = self.llm
        state: LlamaState | str = self.objection(llm.n_tokens, llm._n_exact) or llm.save_state()
        return state

    def objection(self, n_tokens: int, n_exact: int) -> str | None:
        """Why a state of ``n_tokens`` cannot be kept; None: it can.

        Args:
            n_exact: so many of them were evaluated in the batches of a prompt.
        """
        if not 0 < n_tokens <= n_exact:
            return "not_a_prompt"
        if has_slid(self.llm, n_tokens) and not moves_by_blocks(self.llm, n_tokens):
            return "other_order"
        return None

    def entry(self, state: LlamaState, logits: npt.NDArray[np.float32] | None) -> Entry | str:
        """What to keep of a state that :meth:`take` gave, or why not to keep it.

        Args:
            logits: float32 ``[1, n_vocab]`` behind its last token, if the state is that behind a whole prompt.
        """
        if not isinstance(state, DFlashState):
            return "without_rows"
        snapshot, n = state.mirror, state.n_tokens
        complete = snapshot.tap_masks == (1 << snapshot.header.taps) - 1
        first_row = run_start(snapshot.positions[complete], n)
        rows = snapshot.rows[len(snapshot.rows) - (n - first_row) :]
        return self._entry(state, (state.n_prompt, state.n_exact), (first_row, state.first_cut), rows, logits)

    def _entry(
        self,
        state: LlamaState,
        evaluated: tuple[int, int],
        reach: tuple[int, int],
        rows: npt.NDArray[np.uint8],
        logits: npt.NDArray[np.float32] | None,
    ) -> Entry | str:
        n, none = state.n_tokens, np.empty((0, self.llm._n_vocab), np.float32)
        n_prompt, n_exact = evaluated
        return self.objection(n, n_exact) or Entry(
            key=token_key(state.input_ids[:n]),
            coverage=Coverage(n, n_prompt, *reach, logits=logits is not None),
            target=state.llama_state,
            rows=rows,
            logits=none if logits is None else logits,
            scores=state.scores[:n] if self.llm._logits_all else none,
        )

    def state(self, entry: Entry, n_tokens: int) -> LlamaState:
        """The entry's first ``n_tokens`` tokens as a state; the target's part may hold more, which loading cuts off."""
        mirror = self.llm.mirror
        state: DFlashState = self._fill(DFlashState.__new__(DFlashState), entry, n_tokens)
        first = max(n_tokens - mirror.cap, entry.coverage.first_row)
        rows = entry.rows[max(first - entry.coverage.first_row, 0) : max(n_tokens - entry.coverage.first_row, 0)]
        count = len(rows)
        positions = np.arange(first, first + count, dtype=np.int64)
        masks = np.full(count, (1 << mirror.taps) - 1, np.uint64)
        header = SnapshotHeader.of(mirror, positions)
        state.mirror = Snapshot(header, positions, masks, rows.reshape(count, mirror.row_nbytes))
        state.first_cut = entry.coverage.first_cut
        state.n_prompt, state.n_exact = entry.coverage.n_prompt, n_tokens
        return state

    def _fill(self, state: Any, entry: Entry, n_tokens: int) -> Any:
        llm = self.llm
        state.input_ids = np.full(len(llm.input_ids), -1, np.intc)
        state.input_ids[:n_tokens] = key_tokens(entry.key)[:n_tokens]
        state.n_tokens, state.scores = n_tokens, entry.scores[:n_tokens]
        state.llama_state, state.llama_state_size = entry.target, len(entry.target)
        state.seed = llm._seed  # the model's own: a cached prompt must not fix what is sampled after it
        return state

    def load(self, state: LlamaState) -> None:
        """Become the state, or nothing.

        Raises:
            GgmlMirrorError, RuntimeError: it was not taken; the sequence is as it was, or empty.
        """
        self.llm.load_state(state)


class _PlainState(LlamaState):
    n_prompt: int


class PlainModel(CachedModel):
    """A plain Llama. Its ``generate`` is that of a CachedLlama, or becomes it."""

    def __init__(self, llm: Llama) -> None:
        super().__init__(llm)
        # What the model was last given: a prompt's length, and the tokens that were evaluated in the batches of such a prompt.
        self._n_prompt, self._exact = 0, b""
        if not isinstance(llm, CachedLlama):
            own, reference = type(llm).generate, weakref.ref(llm)

            def generate(
                tokens: Sequence[int], *args: Any, **kwargs: Any
            ) -> Generator[int, Sequence[int] | None, None]:
                llm = reference()
                assert llm is not None
                yield from generate_cached(llm, partial(own, llm), tokens, *args, **kwargs)

            llm.generate = generate  # type: ignore[method-assign]

    @property
    def window(self) -> int:
        return 0

    def evaluate(self, cache: Any, tokens: list[int]) -> None:
        """Evaluate a prompt, but for what the model or the cache has of it. ``Llama.generate`` finds it done, and samples."""
        llm = self.llm
        cache.restore(tokens)
        kept = self.reusable(tokens)
        if kept == 0:
            llm.reset()
        llm._ctx.kv_cache_seq_rm(SEQUENCE, kept, -1)
        llm.n_tokens = kept
        ends = self.grid.ends(len(tokens))
        for end in ends[ends > kept].tolist():
            if end == len(tokens) and llm.n_tokens > kept:
                cache.keep()  # without the last batch: that has to be evaluated in any case, since Llama samples from its logits
            llm.eval(tokens[llm.n_tokens : end])
            self._n_prompt, self._exact = len(tokens), token_key(tokens[:end])

    def reusable(self, tokens: Sequence[int]) -> int:
        llm = self.llm
        # Others may have evaluated something since.
        n_exact = shared_length(token_key(llm._input_ids), self._exact)
        live = Coverage(n_exact, self._n_prompt, n_exact, first_cut=0, logits=False)
        kept = live.usable(shared_length(self._exact[: 4 * n_exact], token_key(tokens)), len(tokens), 0, self.grid)
        return kept if kept >= first_cut(llm, llm.n_tokens) else 0

    def take(self) -> LlamaState | str:
        # Llama.save_state copies n_batch x n_vocab scores, which nothing reads again without logits_all, and the state three times.
        llm = self.llm
        why_not = self.objection(llm.n_tokens, len(self._exact) // 4)
        if why_not is not None:
            return why_not
        target = take_sequence(llm.ctx)
        return LlamaState(
            input_ids=llm.input_ids,
            scores=llm._scores.copy() if llm._logits_all else np.empty((0, llm._n_vocab), np.single),
            n_tokens=llm.n_tokens,
            llama_state=target,
            llama_state_size=len(target),
            seed=llm._seed,
        )

    def entry(self, state: LlamaState, logits: npt.NDArray[np.float32] | None) -> Entry | str:
        n_exact = shared_length(token_key(state.input_ids[: state.n_tokens]), self._exact)
        reach, none = (state.n_tokens, first_cut(self.llm, state.n_tokens)), np.empty((0, 0), np.uint8)
        return self._entry(state, (self._n_prompt, n_exact), reach, none, None)

    def state(self, entry: Entry, n_tokens: int) -> LlamaState:
        state: _PlainState = self._fill(_PlainState.__new__(_PlainState), entry, n_tokens)
        state.n_prompt = entry.coverage.n_prompt
        return state

    def load(self, state: Any) -> None:
        llm = self.llm
        if not put_sequence(llm.ctx, state.llama_state):
            llm.reset()
            llm._ctx.kv_cache_seq_rm(SEQUENCE, 0, -1)
            raise GgmlMirrorError("llama.cpp did not take the saved state; the sequence was reset")
        llm._ctx.kv_cache_seq_rm(SEQUENCE, state.n_tokens, -1)
        if llm._logits_all:
            llm.scores[: len(state.scores)] = state.scores
        llm.input_ids, llm.n_tokens, llm._requires_eval = state.input_ids, state.n_tokens, True
        self._n_prompt, self._exact = state.n_prompt, token_key(state.input_ids[: state.n_tokens])


def cached_model(llm: Llama) -> CachedModel:
    return CachedModel(llm) if isinstance(llm, DFlashLlama) else PlainModel(llm)
