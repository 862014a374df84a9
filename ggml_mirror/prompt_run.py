"""Prompts through a model: loading it, both styles of prompt, prefill and greedy decoding."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import ArgumentError, BackendError, ModelFileError
from .llama_log import collected_errors
from .model_info import ModelInfo
from .prompts import Prompt

if TYPE_CHECKING:
    from llama_cpp import Llama

STYLES = RAW, CHAT, BOTH = ("raw", "chat", "both")
PREFILL, DECODE = "prefill", "decode"

#: ``phase(name, rows)``: a context in which that many rows are evaluated; the name is PREFILL or DECODE.
Phase = Callable[[str, int], AbstractContextManager[None]]


@dataclass(frozen=True)
class Job:
    """A prompt in one style, as tokens; ``cut`` of them did not fit."""

    name: str
    style: str
    tokens: list[int]
    cut: int


@dataclass(frozen=True)
class Run:
    """A job as it ran, and what the model wrote (greedy)."""

    name: str
    style: str
    prompt_tokens: int
    cut_tokens: int
    generated_tokens: int
    text: str


@contextmanager
def load(
    info: ModelInfo,
    *,
    n_ctx: int,
    n_batch: int,
    n_ubatch: int,
    n_threads: int | None,
    n_gpu_layers: int,
    verbose: bool = False,
) -> Iterator[Llama]:
    """The model as a ``llama_cpp.Llama``, closed at the end.

    Raises:
        ModelFileError: llama.cpp cannot load it, or has no room for its context.
    """
    import llama_cpp

    n_batch = min(n_batch, n_ctx)
    threads = n_threads or default_threads()
    with collected_errors(enabled=not verbose) as reasons:
        try:
            llm = llama_cpp.Llama(
                model_path=str(info.path),
                n_ctx=n_ctx,
                n_batch=n_batch,
                n_ubatch=min(n_ubatch, n_batch),
                n_threads=threads,
                n_threads_batch=threads,
                n_gpu_layers=n_gpu_layers,
                logits_all=False,
                verbose=verbose,
            )
        except (
            Exception
        ) as error:  # llama_cpp raises ValueError, RuntimeError, and Jinja's own errors for a bad template
            raise ModelFileError(
                f"{info.path}: llama.cpp (llama-cpp-python {llama_cpp.__version__}) does not load it with a context of"
                f" {n_ctx}: {reasons[0] if reasons else error}. If memory is short, try a smaller -c or -ngl;"
                " --debug shows its whole log"
            ) from error
        try:
            yield llm
        finally:
            llm.close()


def default_threads() -> int:
    """Threads for the model: llama.cpp's own rule where it cannot count physical cores."""
    try:
        cpus = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        cpus = os.cpu_count() or 4
    return cpus if cpus <= 4 else cpus // 2


def make_jobs(llm: Llama, prompts: Sequence[Prompt], style: str, *, limit: int) -> tuple[list[Job], list[str]]:
    """The prompts in the styles that were asked for, cut to ``limit`` tokens, and notes on what was cut or left out.

    Raises:
        ArgumentError: no tokens at all, or "chat" for a model without a chat template.
    """
    jobs, notes = [], []
    if style in (RAW, BOTH):
        # add_bos: llama.cpp then follows the model's own add_bos_token.
        jobs += [(p.name, RAW, llm.tokenize(p.text.encode(), add_bos=True, special=False)) for p in prompts]
    if style in (CHAT, BOTH):
        try:
            wrap = _chat_wrapper(llm)
            jobs += [(p.name, CHAT, llm.tokenize(wrap(p.text).encode(), add_bos=False, special=True)) for p in prompts]
        except _NoTemplate as error:
            if style == CHAT:
                raise ArgumentError(f"chat prompts are not possible: {error}; use --style raw") from error
            notes.append(f"raw prompts only: {error}")
    cut = [f"{name} ({kind}, {len(tokens)} tokens)" for name, kind, tokens in jobs if len(tokens) > limit]
    if cut:
        notes.append(f"cut to {limit} tokens, the context less the tokens to generate: {', '.join(cut)}")
    out = [Job(name, kind, tokens[:limit], max(len(tokens) - limit, 0)) for name, kind, tokens in jobs if tokens]
    if not out:
        raise ArgumentError("no prompt has any tokens")
    return out, notes


def run_job(llm: Llama, job: Job, n_predict: int, phase: Phase) -> Run:
    """Evaluate the job's tokens from position 0 on, then up to ``n_predict`` greedy tokens, each evaluated too."""
    import llama_cpp

    vocab = llama_cpp.llama_model_get_vocab(llm.model)
    written: list[int] = []
    try:
        llm.reset()
        with phase(PREFILL, len(job.tokens)):
            llm.eval(job.tokens)
        while len(written) < n_predict:
            token = llm.sample(temp=0.0)
            if llama_cpp.llama_vocab_is_eog(vocab, token):
                break
            written.append(token)
            with phase(DECODE, 1):
                llm.eval([token])
    except RuntimeError as error:
        if type(error) is not RuntimeError:  # this package's own errors say more
            raise
        raise BackendError(
            f"llama.cpp failed on prompt {job.name} ({job.style}, {len(job.tokens)} tokens): {error}"
        ) from error
    text = llm.detokenize(written).decode("utf-8", errors="replace")
    return Run(job.name, job.style, len(job.tokens), job.cut, len(written), text)


class _NoTemplate(Exception):
    pass


def _chat_wrapper(llm: Llama) -> Callable[[str], str]:
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    template = llm.metadata.get("tokenizer.chat_template")
    if not template:
        raise _NoTemplate("the model has no chat template")

    def text_of(token: int) -> str:
        return llm._model.token_get_text(token) if token != -1 else ""

    def wrap(text: str) -> str:
        try:
            formatter = Jinja2ChatFormatter(template, text_of(llm.token_eos()), text_of(llm.token_bos()))
            return formatter(messages=[{"role": "user", "content": text}]).prompt
        except Exception as error:  # a template is a program from the model file and may raise anything
            raise _NoTemplate(f"the model's chat template fails: {error}") from error

    return wrap
