"""A conversation with a model: messages, streamed answers, and what each of them took."""

from __future__ import annotations

import secrets
import traceback
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import llama_cpp

from ..capture import SEQUENCE
from ..dflash import DFlashLlama
from ..draft_stats import DraftStats
from ..errors import ArgumentError, BackendError, GgmlMirrorError
from ..plain_llama import PlainLlama

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"

#: Why an answer ended: by itself, at a limit, or because it was stopped.
STOP, LENGTH, STOPPED = "stop", "length", "stopped"

Message = dict[str, str]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; llama.cpp's names and defaults. ``n_predict``: tokens of an answer at most; None: what the context holds."""

    temp: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    n_predict: int | None = None

    def arguments(self) -> dict[str, Any]:
        """As ``Llama.create_chat_completion`` takes them."""
        return {
            "temperature": self.temp,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "repeat_penalty": self.repeat_penalty,
            "max_tokens": self.n_predict,
        }


@dataclass(frozen=True)
class AnswerStats:
    """Counts and seconds of one answer, or of several. ``prompt_tokens`` are all of the conversation's, ``reused`` those of them that
    were evaluated already. The draft's counts are 0 without a draft; see :class:`DraftStats` for what they mean."""

    answers: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    reused: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    draft_steps: int = 0
    proposed: int = 0
    accepted: int = 0

    @classmethod
    def of(cls, s: DraftStats) -> AnswerStats:
        return cls(
            answers=1,
            tokens=s.tokens,
            prompt_tokens=s.prompt_tokens,
            reused=s.prefix_reused,
            prefill_s=s.prefill_s,
            decode_s=s.decode_s,
            draft_steps=s.draft_steps,
            proposed=s.proposed,
            accepted=s.accepted,
        )

    def __add__(self, other: AnswerStats) -> AnswerStats:
        return AnswerStats(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    @property
    def prefill_tok_s(self) -> float:
        return (self.prompt_tokens - self.reused) / self.prefill_s if self.prefill_s > 0 else 0.0

    @property
    def decode_tok_s(self) -> float:
        """Tokens per second after the first one of each answer."""
        return max(self.tokens - self.answers, 0) / self.decode_s if self.decode_s > 0 else 0.0

    @property
    def acceptance(self) -> float:
        return self.accepted / self.proposed if self.proposed else 0.0

    @property
    def tau(self) -> float:
        return 1.0 + self.accepted / self.draft_steps if self.draft_steps else 0.0


class Chat:
    """A conversation with a model through its own chat template.

    Args:
        llm: the model; it evaluates nothing else meanwhile.
        system: the system prompt.
        seed: answers with the same seed, messages and sampling are the same; negative: any.

    Attributes:
        messages: the conversation, the system prompt first.
        last: of the last answer; None if it did not come to generating.
        finish: why the last answer ended.

    Example::

        chat = Chat(DFlashLlama("target.gguf", draft_path="draft.gguf"), system="Be brief.")
        for piece in chat.answer("Hello!"):
            print(piece, end="", flush=True)
        print(chat.last.tau)
    """

    def __init__(
        self,
        llm: DFlashLlama | PlainLlama,
        *,
        system: str | None = None,
        sampling: Sampling | None = None,
        seed: int = -1,
    ) -> None:
        self.llm = llm
        self.sampling = sampling or Sampling()
        self.seed = seed if seed >= 0 else secrets.randbits(31)
        self.messages: list[Message] = [] if system is None else [{"role": SYSTEM, "content": _sendable(system)}]
        self.last: AnswerStats | None = None
        self.total = AnswerStats()
        self.finish = ""

    @property
    def drafts(self) -> bool:
        return isinstance(self.llm, DFlashLlama)

    def answer(self, text: str) -> Generator[str, None, None]:
        """Say ``text`` and yield the answer in pieces.

        An iterator that is closed, or thrown into, leaves what was said so far as the answer; one without a word is as if nothing
        had been asked.

        Raises:
            ArgumentError: the conversation does not fit into the context, or its template refuses it; it is as it was before.
            BackendError: llama.cpp failed; so it is then.
        """
        self.messages.append({"role": USER, "content": _sendable(text)})
        said: list[str] = []
        finish = STOPPED
        before, self.last = self.llm.stats, None
        try:
            for chunk in self._stream():
                choice = chunk["choices"][0]
                finish = choice.get("finish_reason") or finish
                piece = choice["delta"].get("content")
                if piece:
                    said.append(piece)
                    yield piece
        except (GeneratorExit, KeyboardInterrupt, GgmlMirrorError):
            raise
        except Exception as error:
            raise self._explained(error) from error
        finally:
            self._conclude("".join(said), finish)
            self.finish = finish
            if self.llm.stats is not before and self.llm.stats.tokens:
                self.last = AnswerStats.of(self.llm.stats)
                self.total += self.last

    def reset(self) -> None:
        """Begin anew: only the system prompt stays."""
        self.messages = [m for m in self.messages if m["role"] == SYSTEM]
        self.llm.reset()

    def _stream(self) -> Any:
        # A seed of its own for each answer, which a conversation that is taken up again knows as well.
        seed = (self.seed + len(self.messages)) % (2**32 - 1)  # 2^32 - 1 means: any
        messages: Any = self.messages
        return self.llm.create_chat_completion(messages=messages, stream=True, seed=seed, **self.sampling.arguments())

    def _conclude(self, said: str, finish: str) -> None:
        if said or finish != STOPPED:
            self.messages.append({"role": ASSISTANT, "content": said})
        else:
            self.messages.pop()
        if not self._whole():
            self.llm.reset()

    def _whole(self) -> bool:
        """Does the model know what it has evaluated? An interrupt may have come between the two."""
        memory = llama_cpp.llama_get_memory(self.llm.ctx)
        return bool(llama_cpp.llama_memory_seq_pos_max(memory, SEQUENCE) == self.llm.n_tokens - 1)

    def _explained(self, error: Exception) -> GgmlMirrorError:
        said = str(error)
        if isinstance(error, ValueError) and "exceed context window" in said:
            return ArgumentError(
                f"the conversation no longer fits into the context ({said}); /reset it, or give a larger -c"
            )
        if _came_through(error, "jinja2"):  # a template is a program, which may raise anything
            return ArgumentError(f"the model's chat template refuses this conversation: {said}")
        if type(error) is RuntimeError:
            return BackendError(f"llama.cpp failed: {said}")
        return GgmlMirrorError(f"the answer failed: {type(error).__name__}: {said}")


def _sendable(text: str) -> str:
    # Lone surrogates are how Python hands on bytes that are no UTF-8, from a pipe or a command line; a tokenizer takes none.
    return text.encode("utf-8", "replace").decode()


def _came_through(error: Exception, package: str) -> bool:
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(frame.f_globals.get("__name__", "").split(".")[0] == package for frame in frames)
