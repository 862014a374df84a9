"""Greedy decoding of one prompt, counted and timed alike for plain decoding and for drafting.

Counts follow llama.cpp's server, so that both can be compared. A drafted token that could not have been emitted, because
the text would have been longer than ``n_predict``, was not proposed. In the block in which a text ends, the tokens before the one that
ends it are accepted, all others are not.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import llama_cpp
import llama_cpp.llama_cpp as bindings
import numpy as np
from llama_cpp import Llama

import ggml_mirror.draft
import ggml_mirror.fuser
import ggml_mirror.mirror
from ggml_mirror import DFlashLlama, FeatureDtype
from ggml_mirror.prompt_run import default_threads
from ggml_mirror.row_kind import RAW, parse_rows


@dataclass(frozen=True)
class Counts:
    """Drafting in numbers; sums of prompts are Counts too.

    ``acceptance`` is accepted / proposed over drafted tokens alone. ``acceptance_with_anchor`` counts each step's first token (the
    anchor, which the target itself chose) as proposed and accepted, as DFlash servers have published it.
    """

    steps: int = 0
    proposed: int = 0
    accepted: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.steps + other.steps, self.proposed + other.proposed, self.accepted + other.accepted)

    @property
    def acceptance(self) -> float:
        return self.accepted / self.proposed if self.proposed else 0.0

    @property
    def acceptance_with_anchor(self) -> float:
        proposed = self.proposed + self.steps
        return (self.accepted + self.steps) / proposed if proposed else 0.0

    @property
    def tau(self) -> float:
        """Mean committed tokens per draft step, the bonus token included."""
        return 1.0 + self.accepted / self.steps if self.steps else 0.0


def count_steps(accepted: Sequence[int], n_draft: int, n_predict: int, plain_steps: int = 0) -> Counts:
    """Counts of one prompt from how many drafted tokens each step accepted.

    Args:
        plain_steps: evaluations without a draft; taken as the first ones.
    """
    counts = Counts()
    emitted = 1 + plain_steps  # the prefill gives the first token
    for n in accepted:
        room = min(n_draft, n_predict - emitted - 1)  # one of the tokens left is the target's own
        if room > 0:
            counts += Counts(1, room, min(n, room))
        emitted += n + 1
    return counts


@dataclass(frozen=True)
class Generation:
    """What one prompt gave.

    Attributes:
        tokens: without the end-of-text token.
        ended: the text ended before ``n_predict`` tokens.
        wall_s: prefill included. decode_s: from the first token on.
        python_s: of ``decode_s``, what was spent outside native calls; None if that was not measured.
    """

    tokens: list[int]
    ended: bool
    counts: Counts
    accepted_by_step: list[int]
    prompt_tokens: int
    wall_s: float
    decode_s: float
    draft_s: float = 0.0
    verify_s: float = 0.0
    capture_s: float = 0.0
    read_s: float = 0.0
    sample_s: float = 0.0
    python_s: float | None = None

    @property
    def generated(self) -> int:
        """Tokens that were decoded, the one that ended the text included."""
        return len(self.tokens) + self.ended

    @property
    def decode_tok_s(self) -> float:
        return (self.generated - 1) / self.decode_s if self.generated > 1 and self.decode_s else 0.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Generation:
        return cls(**{**value, "counts": Counts(**value["counts"])})


@llama_cpp.llama_log_callback
def _errors_only(level: int, text: bytes, _: object) -> None:
    if level == 4:  # GGML_LOG_LEVEL_ERROR; llama_cpp's own verbose=False lets warnings by
        sys.stderr.write(text.decode("utf-8", "replace"))


def storage(text: str) -> str:
    """How a mirror stores rows, in its one spelling: "q8_0" for raw rows, "fused:q8_0" for fused ones.

    Raises:
        ArgumentError, DtypeError: no such rows or dtype.
    """
    rows, dtype = split_storage(text)
    return dtype if rows == RAW else f"{rows}:{dtype}"


def split_storage(text: str) -> tuple[str, str]:
    """(rows, dtype)"""
    rows, colon, dtype = text.strip().rpartition(":")
    return parse_rows(rows) if colon else RAW, FeatureDtype.parse(dtype).value


def load(
    model: str,
    draft: str | None,
    *,
    stored: str = "f32",
    n_ctx: int,
    n_gpu_layers: int,
    n_threads: int,
    n_batch: int = 512,
    **more: Any,
) -> Llama:
    """The target, plain (``draft`` None) or drafting; flash attention is on in both, so that texts can be compared.

    Args:
        stored: rows and dtype of the mirror, see :func:`storage`.
    """
    threads = n_threads or default_threads()
    llama_cpp.llama_log_set(_errors_only, None)
    kwargs: dict[str, Any] = dict(
        n_ctx=n_ctx,
        n_batch=min(n_batch, n_ctx),
        n_gpu_layers=n_gpu_layers,
        n_threads=threads,
        n_threads_batch=threads,
        flash_attn=True,
        verbose=False,
        **more,
    )
    if draft is None:
        return Llama(model, **kwargs)
    rows, dtype = split_storage(stored)
    return DFlashLlama(model, draft_path=draft, feature_dtype=dtype, feature_rows=rows, **kwargs)


def generate(
    llm: Llama, prompt: Sequence[int], n_predict: int, *, cold: bool = True, clock: bool = False
) -> Generation:
    """Up to ``n_predict`` greedy tokens after ``prompt``.

    Args:
        cold: forget the sequence first; else what it shares with the prompt is kept.
        clock: measure ``python_s``; each native call then costs a microsecond more.
    """
    drafting = isinstance(llm, DFlashLlama)
    if cold:
        llm.reset()
    vocab = llama_cpp.llama_model_get_vocab(llm.model)
    tokens: list[int] = []
    ended = False
    with native_clock(enabled=clock) as native:
        started = time.perf_counter()
        stream = llm.generate(list(prompt), temp=0.0, repeat_penalty=1.0)
        first = stopped = started
        at_first = 0.0
        for token in stream:
            stopped = time.perf_counter()
            if not tokens:
                first, at_first = stopped, native()
            if llama_cpp.llama_vocab_is_eog(vocab, token):
                ended = True
                break
            tokens.append(token)
            if len(tokens) == n_predict:
                break
        inside = native() - at_first
    decode_s = stopped - first
    if not drafting:
        stream.close()
        return Generation(
            tokens, ended, Counts(), [], len(prompt), stopped - started, decode_s,
            python_s=max(decode_s - inside, 0.0) if clock else None,
        )  # fmt: skip
    stats = llm.stats
    seconds = {name: getattr(stats, f"{name}_s") for name in ("draft", "verify", "sample")}
    stream.close()  # closes the last step as well
    steps = list(stats.steps)
    return Generation(
        tokens=tokens,
        ended=ended,
        counts=count_steps(steps, llm.n_draft, n_predict, stats.plain_steps),
        accepted_by_step=steps,
        prompt_tokens=len(prompt),
        wall_s=stopped - started,
        decode_s=decode_s,
        draft_s=seconds["draft"],
        verify_s=seconds["verify"],
        sample_s=seconds["sample"],
        capture_s=stats.capture_s,
        read_s=stats.read_s,
        python_s=max(decode_s - inside, 0.0) if clock else None,
    )


class _TimedLibrary:
    """A native library whose calls add to a clock; everything else about it is the library's own."""

    def __init__(self, library: Any, clock: list[float]) -> None:
        self._library, self._clock = library, clock

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._library, name)
        if callable(found):
            found = _timed(found, self._clock)
        setattr(self, name, found)
        return found


def _timed(call: Any, clock: list[float]) -> Any:
    def wrapper(*args: Any) -> Any:
        started = time.perf_counter()
        try:
            return call(*args)
        finally:
            clock[0] += time.perf_counter() - started

    return wrapper


@contextmanager
def native_clock(*, enabled: bool) -> Iterator[Callable[[], float]]:
    """Seconds spent in native calls meanwhile, llama.cpp's and this project's, as a function that tells them."""
    total = [0.0]
    if not enabled:
        yield lambda: 0.0
        return
    names = ("llama_decode", "llama_sampler_sample", "llama_sampler_accept", "llama_memory_seq_rm")
    states = ("llama_state_seq_get_size_ext", "llama_state_seq_get_data_ext", "llama_state_seq_set_data_ext")
    with ExitStack() as stack:

        def replace(module: Any, name: str, value: Any) -> None:
            stack.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, value)

        for module, wanted in ((bindings, names), (llama_cpp, (*states, "llama_synchronize"))):
            for name in wanted:
                replace(module, name, _timed(getattr(module, name), total))
        for module in (ggml_mirror.draft, ggml_mirror.fuser, ggml_mirror.mirror, sys.modules["ggml_mirror.capture"]):
            replace(module, "lib", _TimedLibrary(module.lib, total))
        yield lambda: total[0]


def top_two_gap(llm: Llama, tokens: Sequence[int]) -> float:
    """Difference of the target's two largest logits after ``tokens``."""
    llm.reset()
    llm.eval(list(tokens))
    logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llm.ctx, -1), shape=(llm.n_vocab(),))
    second, first = np.partition(logits, -2)[-2:]
    return float(first - second)


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Index of the first token that differs (a missing one does); None if there is none."""
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return index
    return None if len(a) == len(b) else min(len(a), len(b))
