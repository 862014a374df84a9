"""What checking a request needs to know of the model that will answer it."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import RequestError
from .model import Served


@dataclass(frozen=True)
class ModelFacts:
    """What checking needs to know of the model that will answer."""

    n_vocab: int
    n_ctx: int
    max_prompt_bytes: int  # no longer text can fit the context
    logits_all: bool
    embeddings: bool
    no_text: str | None  # why it generates none
    takes_images: bool
    chat_format: str

    @classmethod
    def of(cls, llm: Served) -> ModelFacts:
        n_vocab = llm.n_vocab()
        longest = max((len(llm._model.token_get_text(i).encode()) for i in range(n_vocab)), default=1)
        settings = llm.settings
        return cls(
            n_vocab=n_vocab,
            n_ctx=llm.n_ctx(),
            max_prompt_bytes=llm.n_ctx() * longest,
            logits_all=llm._logits_all,
            embeddings=settings.embedding,
            no_text=settings.no_text,
            takes_images=settings.clip_model_path is not None,
            chat_format=settings.chat_format or llm.chat_format or "",
        )


def too_long(param: str, what: str, facts: ModelFacts) -> RequestError:
    return RequestError(
        f"{param}: {what}, more than the context of {facts.n_ctx} tokens can hold",
        param=param,
        code="context_length_exceeded",
    )
