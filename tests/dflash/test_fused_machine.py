"""A target that is captured into fused rows, over random histories, against a dictionary of slots whose rows numpy fuses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)
from llama_cpp import Llama
from llama_cpp._internals import LlamaContext

from ggml_mirror import FeatureMirror, Snapshot, capture
from ggml_mirror.draft import Draft
from ggml_mirror.errors import StaleRowError
from ggml_mirror.fuser import Fuser

from .pair import N_CTX, N_EMBD, TAPS, Pair, fused_rows

BATCH, UBATCH = 64, 16
QUANTUM = {"f32": 1e-3, "q8_0": 1 / 127}  # the draft multiplies in F16

#: dtype, cap, slots for rows that wait, how taps are taken. Caps: below a micro-batch, odd, beyond the longest history's half. Slots: by
#: callback for a micro-batch or more; by outputs also for fewer rows than one has.
CONFIGS = [
    ("f32", 7, 16, "callback"),
    ("q8_0", 31, 24, "outputs"),
    ("f32", 48, 9, "outputs"),
    ("f32", 100, 5, "outputs"),
    ("q8_0", 150, 48, "callback"),
]


class FusedMachine(RuleBasedStateMachine):
    """Subclassed with what is made once; ``ran`` counts what was executed over all examples."""

    llm: Llama
    drafts: tuple[Draft, Draft]  # one that keeps keys and values, and one that makes them anew at each step
    fuse: Callable[[np.ndarray], np.ndarray]  # in numpy
    ran: Counter[str]

    saved = Bundle("saved")

    @initialize(config=st.sampled_from(CONFIGS))
    def make(self, config: tuple[str, int, int, str]) -> None:
        self.dtype, self.cap, self.staging, self.mechanism = config
        self.llm.reset()
        self.llm._ctx.kv_cache_clear()
        self.raw = FeatureMirror(taps=len(TAPS), n_embd=N_EMBD, cap=N_CTX, n_threads=1)
        self.fused = FeatureMirror(taps=1, n_embd=N_EMBD, cap=self.cap, dtype=self.dtype, rows="fused", n_threads=1)
        self.fuser = Fuser(self.drafts[0], self.fused, staging=self.staging, n_threads=1)
        self.capture = capture(self.llm, [self.raw, self.fuser], TAPS, mechanism=self.mechanism)
        assert self.capture.__enter__() == self.mechanism
        # The oracle: slot -> position; the first position that waits to be fused, and the first whose raw row is at hand.
        self.slots: dict[int, int] = {}
        self.waiting = self.at_hand = 0

    def teardown(self) -> None:
        if hasattr(self, "capture"):
            self.capture.__exit__(None, None, None)
            for made in (self.fuser, self.fused, self.raw):
                made.close()

    # ------------------------------------------------------------------- oracle

    def _commit(self, end: int) -> None:
        for position in range(max(self.waiting, self.at_hand), end):
            self.slots[position % self.cap] = position
        self.waiting = max(self.waiting, end)

    def _arrive(self, first: int, count: int) -> None:
        """Rows of a micro-batch: others are fused where they do not fit beside them; where more than fit at all, their own older ones."""
        end = first + count
        while first < end:
            n = count if count <= self.staging else min(self.staging - first % self.staging, end - first)
            if first + n - self.waiting > self.staging:
                self._commit(first)
            first += n

    def _truncate(self, start: int) -> None:
        self.slots = {slot: p for slot, p in self.slots.items() if p < start}
        self.waiting, self.at_hand = min(self.waiting, start), min(self.at_hand, start)

    def _held(self) -> list[int]:
        return sorted(self.slots.values())

    def _context(self) -> int:
        """Rows without a gap before the sequence's end."""
        held, n = set(self.slots.values()), 0
        while self.llm.n_tokens - n - 1 in held:
            n += 1
        return min(n, self.drafts[0].window)

    # -------------------------------------------------------------------- rules

    @rule(n=st.one_of(st.integers(1, 9), st.integers(1, 70)), seed=st.integers(0, 999))
    def evaluate(self, n: int, seed: int) -> None:
        start = self.llm.n_tokens
        if start + n > N_CTX:
            return
        self.ran["evaluate"] += 1
        self._commit(start)
        self.llm.eval(np.random.default_rng(seed).integers(32, 127, n).tolist())
        self._truncate(start)
        for first in range(start, start + n, UBATCH):
            if (first - start) % BATCH == 0:
                self._commit(first)
            self._arrive(first, min(UBATCH, start + n - first))
        if n <= self.staging:
            assert max(self.slots.values(), default=-1) < start, "as after a block that may be rejected"

    @precondition(lambda self: self.mechanism == "outputs" and self.llm.n_tokens <= N_CTX - BATCH)
    @rule(good=st.integers(1, 3), n=st.integers(3 * UBATCH + 1, BATCH))
    def fail(self, good: int, n: int) -> None:
        """An evaluation that breaks off after some micro-batches, of which rows may be in the mirror: they leave it, and what they have
        displaced does not come back."""
        self.ran["fail"] += 1
        start, left = self.llm.n_tokens, iter(range(good))
        decode = LlamaContext.decode

        def breaking(context: LlamaContext, batch: Any) -> None:
            if next(left, None) is None:
                raise RuntimeError("out of memory")
            decode(context, batch)

        with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="out of memory"):
            patch.setattr(LlamaContext, "decode", breaking)
            self.llm.eval(np.random.default_rng(n).integers(32, 127, n).tolist())
        self._commit(start)
        self._truncate(start)
        for first in range(start, start + good * UBATCH, UBATCH):
            self._arrive(first, UBATCH)
        self._truncate(start)

    @rule(data=st.data())
    def cut(self, data: st.DataObject) -> None:
        """As after a rejected block, or a prompt that shares a prefix: through the cells of the sequence, or the fuser alone."""
        self.ran["cut"] += 1
        start = max(self.llm.n_tokens - data.draw(st.one_of(st.integers(0, 8), st.integers(0, 300)), "cut"), 0)
        if data.draw(st.booleans(), "by the fuser"):
            self.fuser.truncate(start)
        else:
            self.llm._ctx.kv_cache_seq_rm(0, start, -1)
        self.llm.n_tokens = start
        self._truncate(start)

    @rule(back=st.sampled_from([0, 0, 1, 5]))
    def commit(self, back: int) -> None:
        self.ran["commit"] += 1
        end = max(self.llm.n_tokens - back, 0)
        self.fuser.commit(end)
        self._commit(end)

    @rule(sure=st.integers(0, 4), what=st.sampled_from(["fuser", "mirror"]))
    def clear(self, sure: int, what: str) -> None:
        self.ran["clear"] += 1
        if sure == 0:
            (self.fuser if what == "fuser" else self.fused).clear()
            self.slots, self.waiting, self.at_hand = {}, 0, self.llm.n_tokens

    @rule(target=saved)
    def snapshot(self) -> object:
        self.ran["snapshot"] += 1
        return multiple((self.llm.save_state(), self.raw.snapshot(), self.fused.snapshot(), dict(self.slots)))

    @rule(state=saved)
    def restore(self, state: tuple[Any, Snapshot, Snapshot, dict[int, int]]) -> None:
        if self.fused.cap != state[2].header.cap or self.fused.dtype.value != state[2].header.dtype:
            return
        self.ran["restore"] += 1
        target, raw, fused, slots = state
        self.llm.load_state(target)
        self.raw.restore(raw)
        self.fused.restore(fused)
        self.slots, self.waiting, self.at_hand = dict(slots), 0, self.llm.n_tokens

    @precondition(lambda self: 0 < self.llm.n_tokens <= N_CTX - 8)
    @rule(n=st.integers(1, 7))
    def draft(self, n: int) -> None:
        """Whatever came before: what is remembered of the rows is what they are."""
        self.ran["draft"] += 1
        self.commit(0)
        where = {"n_past": self.llm.n_tokens, "last_token": 107, "n_tokens": n}
        seen = []
        for draft in self.drafts:
            _, context = draft.step(self.fused, **where)
            assert context == self._context()
            seen.append(draft.logits())
        self.ran["rows drafted from"] += context
        np.testing.assert_allclose(seen[0], seen[1], atol=5e-3 * np.abs(seen[1]).max())

    # --------------------------------------------------------------- invariants

    @invariant()
    def same_positions(self) -> None:
        if hasattr(self, "fused"):
            assert self.fused.positions.tolist() == self._held()

    @invariant()
    def same_rows(self) -> None:
        held = self._held() if hasattr(self, "fused") else []
        if not held:
            return
        got = np.concatenate([self.fused.read(start=p, count=1) for p in held])
        want = self.fuse(self.raw.read(start=0, count=self.llm.n_tokens)[held])
        wrong = np.abs(got - want).max(axis=1) > QUANTUM[self.dtype] * np.abs(want).max()
        assert not wrong.any(), f"rows of positions {np.array(held)[wrong].tolist()} are others"
        self.ran["rows read"] += len(held)

    @invariant()
    def what_is_missing_is_named(self) -> None:
        if hasattr(self, "fused"):
            missing = next(p for p in range(N_CTX + 1) if p not in self.slots.values())
            with pytest.raises(StaleRowError) as caught:
                self.fused.read(start=missing, count=1)
            assert caught.value.position == missing


def test_fused_rows_follow_a_sequence_like_a_dictionary_of_slots(pair: Pair) -> None:
    keeping = pair.dflash(feature_rows="fused", draft_window=100)
    anew = pair.dflash(feature_rows="fused", draft_window=100, draft_kv="off")
    made = {
        "llm": pair.plain(n_batch=BATCH, n_ubatch=UBATCH),
        "drafts": (keeping.draft, anew.draft),
        "fuse": staticmethod(lambda raw: fused_rows(keeping.draft_path, raw)),
        "ran": Counter(),
    }
    machine: Any = type("FusedMachineHere", (FusedMachine,), made)
    run_state_machine_as_test(machine, settings=settings(max_examples=90, stateful_step_count=30, deadline=None))
    ran = machine.ran
    print(dict(ran))
    for name in ("evaluate", "fail", "cut", "commit", "restore", "draft"):
        assert ran[name] >= 10, f"{name} was hardly run: {dict(ran)}"
    assert ran["rows read"] > 5000 and ran["rows drafted from"] > 100
