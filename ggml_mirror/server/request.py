"""One request while it is being answered: whether anyone still waits for it, and what it has cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from ..draft_stats import DraftStats
from .errors import RequestError


@dataclass
class ServedRequest:
    """Shared by the event loop, which may cancel it, and the thread that generates.

    Attributes:
        prompt_tokens: a prompt that was given as token ids; llama_cpp.server knows text only.
        seed: the request's own; None: a random one.
        grammar_param: the field that its grammar came from.
        tokenized: a text and its tokens, where the tokens are all that is wanted.
        on_cancel: called when it is cancelled while it waits for its turn.
        prompt_made: the chat format has done its part.
        failure: what the answer failed with, if it did.
        text_of, text_n, text: tokens, and the text of so many of them.
        generations: one per call of ``generate``; some chat formats make several.
    """

    id: str
    path: str
    stream: bool = False
    prompt_tokens: list[int] | None = None
    seed: int | None = None
    began: float = field(default_factory=time.perf_counter)
    queue_s: float = 0.0
    first_token_s: float | None = None
    generations: list[DraftStats] = field(default_factory=list)
    ended_at_eos: int = 0
    text_of: list[int] | None = None
    text_n: int = 0
    text: bytearray = field(default_factory=bytearray)
    grammar_param: str = "grammar"
    tokenized: tuple[bytes, list[int]] | None = None
    prompt_made: bool = False
    failure: Exception | None = None
    on_cancel: Callable[[], None] | None = None
    _streams: list[Iterator[Any]] = field(default_factory=list)
    _cancelled: RequestError | None = None
    _interrupted: bool = False

    @property
    def prompt_param(self) -> str:
        """The field that holds what is worked on."""
        names = {"/chat/completions": "messages", "/detokenize": "tokens", "/embeddings": "input"}
        return next((name for end, name in names.items() if self.path.endswith(end)), "prompt")

    # ------------------------------------------------------------- from the event loop

    def cancel(self, why: RequestError) -> None:
        """Generate no further: the next token is the last, whoever chose it."""
        self._cancelled = self._cancelled or why
        if self.on_cancel is not None:
            self.on_cancel()

    def interrupt(self) -> None:
        """End the text here, as if it were complete (llama_cpp.server's ``interrupt_requests``)."""
        self._interrupted = True

    # ---------------------------------------------------- from the thread that generates

    def check(self) -> None:
        """Raises:
        RequestError: what it was cancelled with.
        """
        if self._cancelled is not None:
            raise self._cancelled

    @property
    def interrupted(self) -> bool:
        return self._interrupted

    def token(self) -> None:
        """A token was chosen."""
        if self.first_token_s is None:
            self.first_token_s = time.perf_counter() - self.began

    def keep(self, stream: Iterator[Any]) -> Iterator[Any]:
        """A stream that has to be closed before the model is used again."""
        self._streams.append(stream)
        return stream

    def close(self) -> None:
        """Close what a client has not read to its end. The model is as it was committed."""
        while self._streams:
            close = getattr(self._streams.pop(), "close", None)
            if close is not None:
                close()

    # ----------------------------------------------------------------------- what it cost

    @property
    def stats(self) -> DraftStats:
        """Sums over the generations."""
        total = DraftStats()
        for one in self.generations:
            for name, value in vars(one).items():
                if isinstance(value, (int, float)):
                    setattr(total, name, getattr(total, name) + value)
            total.steps.extend(one.steps)
        return total

    def timings(self) -> dict[str, Any]:
        """llama-server's object of this name, with tau; milliseconds. ``cache_n`` prompt tokens were in the context or the cache."""
        stats = self.stats
        prompt_n, predicted_n = stats.prompt_tokens - stats.prefix_reused, stats.tokens
        prompt_ms, predicted_ms = stats.prefill_s * 1e3, stats.decode_s * 1e3
        out: dict[str, Any] = {
            "cache_n": stats.prefix_reused,
            "prompt_n": prompt_n,
            "prompt_ms": prompt_ms,
            "prompt_per_token_ms": _ratio(prompt_ms, prompt_n),
            "prompt_per_second": _ratio(prompt_n * 1e3, prompt_ms),
            "predicted_n": predicted_n,
            "predicted_ms": predicted_ms,
            "predicted_per_token_ms": _ratio(predicted_ms, predicted_n),
            "predicted_per_second": _ratio(predicted_n * 1e3, predicted_ms),
            "draft_n": stats.proposed,
            "draft_n_accepted": stats.accepted,
            "tau": stats.tau,
        }
        return {name: round(value, 3) if isinstance(value, float) else value for name, value in out.items()}

    def usage(self) -> dict[str, Any]:
        """OpenAI's object of this name."""
        stats = self.stats
        completion = stats.tokens - self.ended_at_eos
        return {
            "prompt_tokens": stats.prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": stats.prompt_tokens + completion,
            "prompt_tokens_details": {"cached_tokens": stats.prefix_reused},
        }


def _ratio(a: float, b: float) -> float:
    return a / b if b else 0.0


#: The request that the running code works for. Worker threads inherit it from the task that called them.
current: ContextVar[ServedRequest | None] = ContextVar("ggml_mirror_request", default=None)
