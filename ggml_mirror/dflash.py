"""DFlashLlama: a llama_cpp.Llama that drafts with a DFlash draft from a feature mirror."""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections.abc import Generator, Sequence
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
from llama_cpp import Llama, LlamaState

from .cache.entry import Coverage, run_start
from .cache.prefix_index import shared_length, token_key
from .capture import SEQUENCE, Hook, attachment, capture_mechanism, in_use
from .device import find_device
from .draft import Draft, DraftSpec, draft_bytes, require_kv
from .draft_memory import mirror_cap, require_room, row_shape, staging_cap
from .draft_stats import DraftStats
from .dtype import AUTO, FeatureDtype
from .errors import ArgumentError, ClosedError, SnapshotMismatchError
from .fingerprint import fingerprint
from .fuser import Fuser
from .ladder import parse_margin
from .mechanism import CaptureMechanism, parse_mechanism
from .mirror import FeatureMirror
from .model_info import ModelInfo
from .prompt_grid import PromptGrid
from .rollback import Rollback, first_cut, wants_snapshots
from .row_kind import FUSED, RAW, parse_rows_choice
from .sequence_state import last_logits, put_sequence, sample_kept, take_sequence
from .snapshot import Snapshot

#: Context rows that the draft attends to unless told otherwise.
DEFAULT_WINDOW = 4096

#: Arguments of ``Llama`` that drafting sets unless they are given. Without flash attention llama.cpp's CPU backend rounds a batch
#: otherwise than a single token, so verified text would part from plain text at near ties (logits differ by up to 0.6 on SmolLM2-135M
#: Q4_1; with it, by 0 up to 256 cells).
LLAMA_DEFAULTS = {"flash_attn": True}


def resolve_n_draft(n_draft: int | None, spec: DraftSpec) -> int:
    """Tokens to draft per step; None: the whole block."""
    most = spec.block_size - 1
    n_draft = most if n_draft is None else n_draft
    if not 1 <= n_draft <= most:
        raise ArgumentError(f"n_draft is {n_draft}; this draft's block gives 1 to {most} tokens")
    return n_draft


def resolve_window(draft_window: int | None, n_ctx: int) -> int:
    """Context rows that the draft attends to; never more than there is context."""
    if draft_window is not None and draft_window < 1:
        raise ArgumentError(f"draft_window is {draft_window}; it must be positive")
    return min(n_ctx, DEFAULT_WINDOW if draft_window is None else draft_window)


def check_drafting(
    *,
    feature_dtype: str | FeatureDtype | None = None,
    feature_rows: str = RAW,
    draft_window: int | None = None,
    draft_kv: str = "f16",
    memory_margin: int | str | None = None,
    mechanism: str | CaptureMechanism | None = None,
) -> tuple[FeatureDtype | None, str | None]:
    """That these arguments of :class:`DFlashLlama` can be, whatever its files and devices are.

    Returns:
        The dtype and the rows; None: "auto".

    Raises:
        ArgumentError, DtypeError: one of them cannot be.
    """
    resolve_window(draft_window, 1)
    require_kv(draft_kv)
    parse_margin(memory_margin)
    parse_mechanism(mechanism)
    return FeatureDtype.resolve_choice(feature_dtype), parse_rows_choice(feature_rows)


class DFlashState(LlamaState):
    """A saved state of the target together with the mirror's rows in storage bytes.

    Attributes:
        first_cut: earliest position to which the target's state can be cut back.
        n_prompt, n_exact: the first ``n_exact`` tokens were evaluated in the batches of a prompt of ``n_prompt`` tokens.
    """

    mirror: Snapshot
    first_cut: int
    n_prompt = n_exact = 0


class DFlashLlama(Llama):
    """A ``llama_cpp.Llama`` whose decoding is drafted: same methods, same text, same distribution.

    Every emitted token is one that llama.cpp's samplers chose on the target's own logits; the draft only decides how many
    positions are evaluated at once.

    Args:
        model_path: the target.
        draft_path: a DFlash draft made for it.
        feature_dtype: how the mirror stores rows; None takes ``DFLASH_FEATURE_DTYPE``, else f32. "auto" takes the most precise one of
            the ladder that leaves ``memory_margin`` free, see :mod:`ggml_mirror.ladder`.
        draft_window: context rows that the draft attends to; the mirror holds ``draft_window + block_size`` rows. None takes
            4096, or the context if that is smaller.
        draft_device: device of draft and mirror: a ggml device name, or "auto": where the target's output matrix lies.
        n_draft: tokens to draft per step, at most ``block_size - 1`` (the default).
        memory_margin: for "auto": bytes, or text such as "512MiB", to leave free on the mirror's device.
        feature_rows: what the mirror holds: "raw", the tapped outputs, or "fused", what the draft makes of them first. Fused rows are
            as wide as the draft (raw ones ``n_taps`` times the target) and bear fewer bits. "auto": as for ``feature_dtype``; with both,
            the whole ladder is walked.
        draft_kv: type of the draft's keys and values of the window, "f16" or "q8_0"; "off" computes them anew at each step.
        mechanism: how taps leave the target's graph, see :func:`ggml_mirror.capture.capture`.
        llama_kwargs: as for ``llama_cpp.Llama``, but for ``draft_model`` and ``embedding``; ``flash_attn`` is on unless given.

    Raises:
        ModelFileError, UnsupportedDraftError, DraftMismatchError: before anything is allocated.
        MirrorMemoryError: draft or mirror do not fit; names the bytes and what would fit.

    Example::

        llm = DFlashLlama("target.gguf", draft_path="draft.gguf", feature_dtype="q8_0", n_ctx=8192)
        print(llm("def fibonacci(n):", max_tokens=64, temperature=0)["choices"][0]["text"], llm.stats.tau)
    """

    #: The call of ``generate`` that may have speculated beyond the committed tokens.
    _decoder: _Decoder | None = None

    #: Between capture and a mirror of fused rows.
    _fuser: Fuser | None = None

    #: The first ``_n_exact`` tokens were evaluated in the batches in which a prompt of ``_n_prompt`` tokens always is.
    _n_prompt = _n_exact = 0

    def __init__(
        self,
        model_path: str,
        *,
        draft_path: str,
        feature_dtype: str | FeatureDtype | None = None,
        draft_window: int | None = None,
        draft_device: str = "auto",
        n_draft: int | None = None,
        memory_margin: int | str | None = None,
        feature_rows: str = RAW,
        draft_kv: str = "f16",
        mechanism: str | CaptureMechanism | None = None,
        **llama_kwargs: Any,
    ) -> None:
        self._stack = contextlib.ExitStack()  # Llama closes it, also if what follows raises before it has made its own
        for name in ("draft_model", "embedding"):
            if llama_kwargs.get(name):
                raise ArgumentError(f"{name} cannot be given together with draft_path")
        self.draft_path = str(draft_path)
        dtype, rows = check_drafting(
            feature_dtype=feature_dtype,
            feature_rows=feature_rows,
            draft_window=draft_window,
            draft_kv=draft_kv,
            memory_margin=memory_margin,
            mechanism=mechanism,
        )
        self._drafting: dict[str, Any] = {
            "draft_window": draft_window,
            "draft_device": draft_device,
            "n_draft": n_draft,
            "feature_rows": feature_rows,
            "draft_kv": draft_kv,
            "mechanism": mechanism,
        }
        target = ModelInfo.read(model_path)
        self.draft_spec = DraftSpec.read(draft_path, target)
        self.n_draft = resolve_n_draft(n_draft, self.draft_spec)
        self.draft_spec.require_rows(rows)
        if dtype is None or rows is None:
            dtype, rows = self._choose(model_path, AUTO if dtype is None else dtype, memory_margin, llama_kwargs)
        self.feature_dtype, self.feature_rows = dtype, rows
        self._drafting["feature_rows"] = rows
        llama_kwargs = {**LLAMA_DEFAULTS, **llama_kwargs}
        super().__init__(model_path, **llama_kwargs)
        try:
            self._start_drafting(draft_window, draft_device, draft_kv, mechanism)
        except BaseException:
            self.close()
            raise

    def _choose(
        self, model_path: str, dtype: str, memory_margin: int | str | None, llama_kwargs: dict[str, Any]
    ) -> tuple[FeatureDtype, str]:
        from .budget import make_budget

        budget = make_budget(
            model_path,
            draft_path=self.draft_path,
            feature_dtype=dtype,
            memory_margin=memory_margin,
            **self._drafting,
            **llama_kwargs,
        )
        budget.require_fit()
        assert budget.dtype is not None
        return budget.dtype, budget.rows

    def _start_drafting(
        self, draft_window: int | None, draft_device: str, draft_kv: str, mechanism: str | CaptureMechanism | None
    ) -> None:
        if self.n_batch < self.n_draft + 1:
            raise ArgumentError(
                f"n_batch is {self.n_batch}; verifying {self.n_draft} drafted tokens needs {self.n_draft + 1}"
            )
        if wants_snapshots(self, self.n_draft):
            self.context_params.n_rs_seq = self.n_draft
        hook = Hook.of(self, self.draft_spec.taps, mechanism, self.n_draft + 1)
        device = find_device(draft_device) if draft_device != "auto" else hook.output_device()
        self.draft_window = resolve_window(draft_window, self.n_ctx())
        spec = self.draft_spec
        rows = self.feature_rows
        where: dict[str, Any] = {
            "n_vocab": self.n_vocab(),
            "tok_embd": hook.tok_embd,
            "output": hook.output,
            "device_index": device.index,
            "kv": draft_kv,
            "n_ctx": self.n_ctx(),
        }
        staging = staging_cap(llama_cpp.llama_n_ubatch(self.ctx), spec, hook.mechanism)
        require_room(
            spec,
            self.draft_window,
            self.feature_dtype,
            device,
            lambda w, kind: draft_bytes(spec, window=w, rows=kind, **where),
            rows,
            staging,
        )
        # A block is a batch.
        self.draft = Draft(spec, window=self.draft_window, n_threads=self.n_threads_batch, rows=rows, **where)
        self._stack.callback(self.draft.close)
        taps, n_embd = row_shape(spec, rows)
        self.mirror = self._stack.enter_context(
            FeatureMirror(
                taps=taps,
                n_embd=n_embd,
                cap=mirror_cap(spec, self.draft_window),
                dtype=self.feature_dtype,
                device=device.name,
                n_threads=self.n_threads_batch,
                draft=fingerprint(self.draft_path),
                rows=self.feature_rows,
            )
        )
        in_use[id(self)] = [self.draft._handle]
        self._stack.callback(in_use.pop, id(self))
        if rows == FUSED:
            self._fuser = self._stack.enter_context(
                Fuser(self.draft, self.mirror, staging=staging, n_threads=self.n_threads_batch)
            )
        self._stack.enter_context(attachment(self, self._fuser or self.mirror, spec.taps, mechanism=mechanism))
        self._rollback = Rollback(self, self.n_draft)
        self._grid = PromptGrid.of(self)
        self.stats = DraftStats()

    @property
    def capture_mechanism(self) -> CaptureMechanism:
        """How taps leave the target's graph; see :mod:`ggml_mirror.mechanism`."""
        mechanism = capture_mechanism(self)
        assert mechanism is not None
        return mechanism

    def set_cache(self, cache: Any) -> None:
        """As ``Llama.set_cache``: a :class:`ggml_mirror.PrefixCache` of this model, one of llama_cpp's caches, or None.

        Raises:
            ArgumentError: a prefix cache of another model.
        """
        if hasattr(cache, "serves") and not cache.serves(self):
            raise ArgumentError("this PrefixCache was made for another model; make one for this one")
        super().set_cache(cache)

    # ------------------------------------------------------------------ decoding

    def generate(
        self,
        tokens: Sequence[int],
        top_k: int = 40,
        top_p: float = 0.95,
        min_p: float = 0.05,
        typical_p: float = 1.0,
        temp: float = 0.80,
        repeat_penalty: float = 1.0,
        reset: bool = True,
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
        tfs_z: float = 1.0,
        mirostat_mode: int = 0,
        mirostat_tau: float = 5.0,
        mirostat_eta: float = 0.1,
        penalize_nl: bool = True,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        grammar: Any = None,
    ) -> Generator[int, Sequence[int] | None, None]:
        """As ``Llama.generate``: yields tokens, takes further tokens through ``send``."""
        self._mirostat_mu = ctypes.c_float(2.0 * mirostat_tau)
        self._sampler = self._init_sampler(
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            typical_p=typical_p,
            temp=temp,
            repeat_penalty=repeat_penalty,
            frequency_penalty=frequency_penalty,
            presence_penalty=presence_penalty,
            tfs_z=tfs_z,
            mirostat_mode=mirostat_mode,
            mirostat_eta=mirostat_eta,
            mirostat_tau=mirostat_tau,
            penalize_nl=penalize_nl,
            logits_processor=logits_processor,
            grammar=grammar,
        )
        step = _Decoder(self, list(tokens), reset)
        try:
            while True:
                token = step.sample()
                if stopping_criteria is not None and stopping_criteria(
                    self._input_ids, self._scores[-1, :] if self._logits_all else self.scores[0, :]
                ):
                    return
                sent = yield token
                step.feed([token, *(sent or [])])
        finally:
            step.close()

    def eval(self, tokens: Sequence[int]) -> None:
        """As ``Llama.eval``: evaluate tokens after the committed ones."""
        self._settle()
        self._n_exact = min(self._n_exact, self.n_tokens)
        try:
            super().eval(tokens)
        except BaseException:
            self._recover(self.n_tokens)
            raise
        if tokens:
            self._rollback.evaluated(self.n_tokens - (len(tokens) - 1) % self.n_batch - 1)
        self._commit()

    def reset(self) -> None:
        """Forget the sequence, its rows included."""
        if self._decoder is not None:
            self._decoder.forget()
        self._n_exact = 0
        super().reset()
        if hasattr(self, "mirror") and not self.mirror.closed:
            self._ctx.kv_cache_seq_rm(
                SEQUENCE, 0, -1
            )  # a stream may go on from here, and nothing else would remove them
            (self._fuser or self.mirror).clear()

    # ---------------------------------------------------------------------- state

    def save_state(self) -> DFlashState:
        """The target's state and the mirror's rows, in storage bytes."""
        self._settle()
        target, rows = take_sequence(self.ctx), self.mirror.snapshot()
        state = DFlashState(
            input_ids=self.input_ids.copy(),
            # Without logits_all nothing reads old scores; the base class would copy n_batch x n_vocab of them.
            scores=self._scores.copy() if self._logits_all else np.empty((0, self._n_vocab), np.single),
            n_tokens=self.n_tokens,
            llama_state=target,
            llama_state_size=len(target) + rows.nbytes,  # what LlamaRAMCache compares with its capacity
            seed=self._seed,
        )
        state.mirror, state.first_cut = rows, first_cut(self, self.n_tokens)
        state.n_prompt, state.n_exact = self._n_prompt, min(self._n_exact, self.n_tokens)
        return state

    def load_state(self, state: LlamaState) -> None:
        """Become what :meth:`save_state` saved: the target's state and its rows, or nothing.

        Raises:
            SnapshotMismatchError: saved without a mirror, or with another dtype, window, draft or target; nothing was changed.
        """
        snapshot = getattr(state, "mirror", None)
        if not isinstance(snapshot, Snapshot):
            raise SnapshotMismatchError(
                "the state was saved without a mirror; save it with a DFlashLlama. Nothing was changed"
            )
        snapshot.require_fit(self.mirror)
        snapshot._require_sound("the state's snapshot")
        if len(state.input_ids) != len(self.input_ids):
            raise SnapshotMismatchError(
                f"the state is of n_ctx {len(state.input_ids)}, this model has {len(self.input_ids)}; nothing was changed"
            )
        if not put_sequence(self.ctx, state.llama_state):
            # llama.cpp may have taken a part: neither side may be trusted.
            self.reset()
            raise RuntimeError("llama.cpp did not take the saved state; the sequence was reset")
        if self._decoder is not None:
            self._decoder.forget()
        if self._fuser is not None:
            self._fuser.clear()
        self.mirror.restore(snapshot)
        self._ctx.kv_cache_seq_rm(SEQUENCE, state.n_tokens, -1)  # a prefix cache may want less than was saved
        self._rollback.loaded(state.n_tokens)
        self._n_prompt, self._n_exact = getattr(state, "n_prompt", 0), getattr(state, "n_exact", 0)
        if self._logits_all and len(state.scores):
            self.scores[: len(state.scores)] = state.scores
        self.input_ids = state.input_ids.copy()
        self.n_tokens = state.n_tokens
        self._requires_eval = True
        self._seed = state.seed

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        state.pop("draft_model", None)
        return {**state, "draft_path": self.draft_path, "feature_dtype": self.feature_dtype.value, **self._drafting}

    # -------------------------------------------------------------------- steps

    def reusable(self, tokens: Sequence[int]) -> int:
        """How many of a prompt's tokens need not be evaluated if the sequence is cut back to them; at least one is left.

        With a prefix cache, only what would come out the same from nothing: generated tokens were evaluated in other batches, and
        rows that the draft's window would have must still be there.
        """
        shared = min(shared_length(token_key(self._input_ids), token_key(tokens)), len(tokens) - 1)
        if self._prefix_cache is not None:
            first_row = run_start(self.mirror.positions, self.n_tokens)
            live = Coverage(min(self._n_exact, self.n_tokens), self._n_prompt, first_row, first_cut=0, logits=False)
            shared = live.usable(shared, len(tokens), self.draft_window, self._grid)
        return shared if self._rollback.can_drop(shared) else 0

    @property
    def _prefix_cache(self) -> Any:
        """The cache, if it is one that is asked here, and not by ``Llama``; else None."""
        return self.cache if hasattr(self.cache, "serves") else None

    def _begin(self, tokens: list[int]) -> tuple[int, npt.NDArray[np.float32] | None]:
        """Evaluate a prompt, but for what the sequence or a prefix cache has of it.

        Returns:
            How many tokens that is, and the logits behind the prompt if nothing had to be evaluated.
        """
        cache = self._prefix_cache
        if cache is not None:
            logits = cache.restore(tokens)
            if logits is not None:
                return len(tokens), logits
        kept = self._keep_prefix(tokens)
        exact, ends = kept <= self._n_exact, self._grid.ends(len(tokens))
        for end in ends[ends > kept].tolist():
            if (
                cache is not None
                and end == len(tokens)
                and self.n_tokens > kept
                and first_cut(self, end) > self.n_tokens
            ):
                # The state behind the prompt could not be cut back to here, where a longer prompt would go on from.
                cache.keep()
            self.eval(tokens[self.n_tokens : end])
            if exact:
                self._n_prompt, self._n_exact = len(tokens), end
        return kept, None

    def _keep_prefix(self, tokens: list[int]) -> int:
        """Cut the sequence back to what can be used of it for ``tokens``."""
        shared = self.reusable(tokens)
        if shared == 0 or not self._rollback.drop(shared):
            self.reset()
            return 0
        self.n_tokens = shared
        return shared

    def _settle(self) -> None:
        """Leave nothing but committed tokens in the context and the mirror."""
        if self._decoder is not None:
            self._decoder.settle()
        self._commit()

    def _commit(self) -> None:
        """All positions so far are there to stay, and their rows in the mirror."""
        if self._fuser is not None:
            self._fuser.commit(self.n_tokens)

    def _written_ns(self) -> int:
        """Time in which rows were written since the mirror was made."""
        staged = self._fuser.staging.times().write_ns if self._fuser is not None else 0
        return staged + self.mirror.times().write_ns

    def _recover(self, position: int) -> None:
        """An evaluation did not come to its end: keep what was committed before it, or nothing where a running state may have moved on."""
        self.n_tokens = position
        self._requires_eval = True
        if self._rollback.means != "cells" or not self._ctx.kv_cache_seq_rm(SEQUENCE, position, -1):
            self.reset()

    def _evaluate(self, tokens: Sequence[int]) -> None:
        """Evaluate tokens after the sequence, keeping every position's logits; ``n_tokens`` is left to the caller."""
        n_past = self.n_tokens
        self._n_exact = min(self._n_exact, n_past)
        self._batch.set_batch(batch=tokens, n_past=n_past, logits_all=True)
        self._ctx.decode(self._batch)
        self._rollback.evaluated(n_past)
        self.input_ids[n_past : n_past + len(tokens)] = tokens
        if self._logits_all:
            logits = np.ctypeslib.as_array(self._ctx.get_logits(), shape=(len(tokens) * self._n_vocab,))
            self.scores[n_past : n_past + len(tokens), :].reshape(-1)[::] = logits
        self._requires_eval = False


class _Decoder:
    """One call of ``generate``: which positions are evaluated, which of them are committed, and what is speculation."""

    def __init__(self, llm: DFlashLlama, tokens: list[int], reset: bool) -> None:
        llm._settle()
        self.llm = llm
        llm._decoder = self
        self.stats = llm.stats = DraftStats()
        self.sampler: Any = llm._sampler
        self.row = -1  # of the next token's logits in the last evaluation
        self.ahead: list[int] = []  # drafted tokens that are evaluated but not yet confirmed
        self.speculating = False
        self.proposed = self.confirmed = 0
        self.base = 0  # first position of the last speculative evaluation
        self.rows_ns = llm._written_ns()
        self.draft_times = llm.draft.times()
        if not tokens:
            raise ArgumentError("there are no tokens to generate from")
        started = time.perf_counter()
        self.stats.prompt_tokens = len(tokens)
        self.kept_logits: npt.NDArray[np.float32] | None = None  # of the next token, in place of the context's own
        self.prompt_logits: npt.NDArray[np.float32] | None = None  # behind a prompt that a prefix cache is to get
        if reset:
            self.stats.prefix_reused, self.kept_logits = llm._begin(tokens)
            if llm._prefix_cache is not None and self.kept_logits is None:
                self.prompt_logits = last_logits(llm.ctx, llm._n_vocab)
        else:
            llm.eval(tokens)
        self.stats.prefill_s = time.perf_counter() - started

    def sample(self) -> int:
        started = time.perf_counter()
        if self.kept_logits is not None:
            token = sample_kept(self.sampler, self.kept_logits)
            self.kept_logits = None
        else:
            token = self.sampler.sample(self.llm._ctx, self.row)
        elapsed = time.perf_counter() - started
        self.stats.sample_s += elapsed
        if self.stats.tokens:
            self.stats.decode_s += elapsed
        self.stats.tokens += 1
        return token

    def feed(self, tokens: list[int]) -> None:
        """Commit the sampled token (and any that the consumer sent) and have the next one's logits at ``row``."""
        if self.llm._decoder is not self:
            raise ClosedError(
                "this stream ended when the model was called again; streams of one model cannot be interleaved"
            )
        self._keep_prompt()
        started = time.perf_counter()
        try:
            if self.ahead and tokens == self.ahead[:1]:
                # The draft was right: this position is evaluated already.
                self.ahead.pop(0)
                self.llm.n_tokens += 1
                self.row += 1
                self.confirmed += 1
                return
            self.settle()
            self._advance(tokens)
        finally:
            self.stats.decode_s += time.perf_counter() - started

    def _keep_prompt(self) -> None:
        """Give the prompt's state to the cache, as long as it is the state: when the first token is out, which need not wait for it."""
        logits, self.prompt_logits = self.prompt_logits, None
        cache = self.llm._prefix_cache
        if logits is not None and cache is not None and self.llm.n_tokens == self.stats.prompt_tokens:
            cache.keep(logits)

    def _advance(self, tokens: list[int]) -> None:
        llm = self.llm
        limit = llm.n_batch
        while len(tokens) > limit:  # only a consumer that sends many tokens
            llm.eval(tokens[:limit])
            tokens = tokens[limit:]
        drafted = self._draft(tokens) if len(tokens) == 1 else []
        started = time.perf_counter()
        self.base = llm.n_tokens
        try:
            if drafted:
                llm._rollback.before_speculation()
            llm._evaluate([*tokens, *drafted])
            llm.n_tokens += len(tokens)
            self.row = len(tokens) - 1
            self.ahead, self.proposed, self.confirmed = drafted, len(drafted), 0
            self.speculating = bool(drafted)
        except BaseException:
            self.ahead, self.speculating = [], False
            llm._recover(self.base)
            raise
        self.stats.verify_s += time.perf_counter() - started
        if not drafted:
            self.stats.plain_steps += 1

    def _draft(self, tokens: list[int]) -> list[int]:
        llm = self.llm
        # llama.cpp may round n_ctx up; Llama keeps ids for what was asked for.
        room = min(llm.n_draft, len(llm.input_ids) - llm.n_tokens - 1, llm.n_batch - 1)
        if room < 1:
            return []
        started = time.perf_counter()
        llm._commit()
        drafted, context = llm.draft.step(llm.mirror, n_past=llm.n_tokens, last_token=tokens[-1], n_tokens=room)
        self.stats.draft_s += time.perf_counter() - started
        return drafted if context else []

    def settle(self) -> None:
        """Close the last speculative evaluation: positions that were not confirmed never were."""
        if not self.speculating:
            return
        wrong = bool(self.ahead)
        self.forget()
        if wrong:
            started = time.perf_counter()
            self._cut_back()
            self.stats.rollback_s += time.perf_counter() - started

    def forget(self) -> None:
        """As :meth:`settle`, of a sequence that is being replaced: its positions need not be cut."""
        if self.speculating:
            self.stats.add_step(self.proposed, self.confirmed)
        self.ahead, self.speculating = [], False

    def _cut_back(self) -> None:
        llm = self.llm
        keep = llm.n_tokens
        try:
            again = llm._rollback.cut(keep, self.base)  # the mirror follows the cells
            if again < keep:
                llm.n_tokens = again
                llm._evaluate(llm.input_ids[again:keep].tolist())
                llm.n_tokens = keep
        except BaseException:
            llm._recover(keep)
            raise

    def close(self) -> None:
        """The consumer has stopped: leave the sequence as it was committed."""
        llm = self.llm
        if llm._decoder is not self:
            return
        try:
            if llm._ctx.ctx is not None and not llm.mirror.closed:
                self._keep_prompt()
                self.settle()
                llm._commit()
                llm._requires_eval = True  # the last evaluation's logits are no longer those of the last position
                self.stats.capture_s = (llm._written_ns() - self.rows_ns) / 1e9
                self.stats.read_s = (llm.draft.times().read_ns - self.draft_times.read_ns) / 1e9
        finally:
            llm._decoder = None
