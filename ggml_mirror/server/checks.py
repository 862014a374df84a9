"""What a request says, checked before it comes near a model: every answer to a bad one is a 4xx that names the field.

llama_cpp.server's own request classes give types and ranges. Beyond them stand what it would ignore (``n``), misread (``max_tokens`` 0),
or pass on to llama.cpp, which ends the process on ids outside the vocabulary. And what OpenAI's clients send and it does not know is put
into its words.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from llama_cpp.server.types import (
    CreateChatCompletionRequest,
    CreateCompletionRequest,
    CreateEmbeddingRequest,
    DetokenizeInputRequest,
    TokenizeInputRequest,
)
from pydantic import BaseModel

from .body import bad, name_of, validate
from .chat import check_messages, check_tools
from .errors import RequestError
from .facts import ModelFacts, too_long
from .grammar import take_constraint

MAX_STOPS, MAX_STOP_CHARS = 64, 1024
MAX_NAME_CHARS = 256

ROUTES: dict[str, type[BaseModel]] = {
    "/v1/completions": CreateCompletionRequest,
    "/v1/engines/copilot-codex/completions": CreateCompletionRequest,
    "/v1/chat/completions": CreateChatCompletionRequest,
    "/v1/embeddings": CreateEmbeddingRequest,
    "/extras/tokenize": TokenizeInputRequest,
    "/extras/tokenize/count": TokenizeInputRequest,
    "/extras/detokenize": DetokenizeInputRequest,
}
GENERATING = frozenset(route for route in ROUTES if route.endswith("completions"))
TOKENIZING = frozenset(route for route in ROUTES if route.startswith("/extras"))

_INT = 2**31 - 1
#: Field: least, most. A request class may be stricter.
_RANGES: dict[str, tuple[float, float]] = {
    "max_tokens": (1, _INT),
    "min_tokens": (0, _INT),
    "temperature": (0, 2),
    "top_k": (0, _INT),
    "repeat_penalty": (0.01, 100),  # llama.cpp divides by it
    "seed": (-(2**63), 2**64 - 1),
    "logprobs": (0, 100),
    "top_logprobs": (0, 20),
}
_GREEDY_BELOW = 1e-4  # dividing logits by less leaves float32


@dataclass
class Checked:
    """A request in llama_cpp.server's words, and what it has no words for."""

    body: dict[str, Any]
    stream: bool = False
    include_usage: bool = False
    prompt_tokens: list[int] | None = None
    seed: int | None = None
    grammar_param: str = "grammar"
    text: str | None = None  # to be tokenized


def check(route: str, body: dict[str, Any], facts: ModelFacts) -> Checked:
    """Check a request and put it into llama_cpp.server's words.

    Raises:
        RequestError: names the field.
    """
    # OpenAI's clients send null for what is not set.
    checked = Checked({name: value for name, value in body.items() if value is not None})
    body = checked.body
    if len(str(body.get("model", ""))) > MAX_NAME_CHARS:
        raise bad("model", f"a name of more than {MAX_NAME_CHARS} characters")
    if route in GENERATING:
        renamed = "max_completion_tokens" in body  # OpenAI's newer name
        if renamed:
            body["max_tokens"] = body.pop("max_completion_tokens")
        try:
            _check_generation(body, checked, facts, chat=route.endswith("/chat/completions"))
        except RequestError as error:
            if renamed and error.param == "max_tokens":
                told = str(error).replace("max_tokens", "max_completion_tokens", 1)
                raise RequestError(told, param="max_completion_tokens") from None
            raise
    elif route == "/v1/embeddings":
        _check_embedding(body, facts)
    else:
        valid = validate(ROUTES[route], body)
        if isinstance(valid, DetokenizeInputRequest):
            _check_ids(body["tokens"], "tokens", facts)
        elif isinstance(valid, TokenizeInputRequest):
            checked.text = valid.input
    return checked


# ------------------------------------------------------------------------------------------------- text generation


def _check_generation(body: dict[str, Any], checked: Checked, facts: ModelFacts, *, chat: bool) -> None:
    if facts.no_text is not None:
        raise bad("model", facts.no_text)
    for name in (*_RANGES, "top_p", "min_p", "presence_penalty", "frequency_penalty", "n", "best_of"):
        if isinstance(body.get(name), bool) and not (chat and name == "logprobs"):
            raise bad(name, "a number was expected, not a boolean")
    if chat:
        check_messages(body, facts)
        check_tools(body, facts)
    else:
        _check_prompt(body, checked, facts)
    checked.grammar_param = take_constraint(body)
    options = body.pop("stream_options", {})
    if not isinstance(options, dict):
        raise bad("stream_options", f"an object was expected, not {name_of(options)}")
    checked.include_usage = options.get("include_usage") is True

    valid = validate(CreateChatCompletionRequest if chat else CreateCompletionRequest, body)
    for name, (least, most) in _RANGES.items():
        value = getattr(valid, name, None)
        if value is not None and not isinstance(value, bool) and not least <= value <= most:
            raise bad(name, f"{value} is out of range; {least} to {most} are allowed")
    for name in ("n", "best_of"):
        if getattr(valid, name, None) not in (None, 1):
            raise bad(name, f"{getattr(valid, name)} choices; this server makes one")
    if 0 < valid.temperature < _GREEDY_BELOW:
        body["temperature"] = 0.0
    _check_stop(valid.stop)
    _check_bias(valid, facts)
    _check_logprobs(body, valid, facts)
    checked.stream = bool(valid.stream)
    checked.seed = None if valid.seed is None else valid.seed % 2**32
    if checked.seed is not None:
        body["seed"] = checked.seed


def _check_prompt(body: dict[str, Any], checked: Checked, facts: ModelFacts) -> None:
    """Text, token ids, or a list with one of them. llama_cpp.server knows text only: ids go beside it."""
    prompt = body.get("prompt", "")
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        if len(prompt) > 1:
            raise bad("prompt", f"{len(prompt)} prompts; send them one by one")
        prompt = prompt[0]
    if isinstance(prompt, list):
        _check_ids(prompt, "prompt", facts)
        if len(prompt) >= facts.n_ctx:
            raise too_long("prompt", f"has {len(prompt)} tokens", facts)
        for name in ("suffix", "echo"):
            if body.get(name):
                raise bad(name, "not with a prompt of token ids")
        checked.prompt_tokens, prompt = prompt, "ids"
    if not isinstance(prompt, str):
        raise bad("prompt", f"text or a list of token ids was expected, not {name_of(prompt)}")
    _check_length(prompt, "prompt", facts)
    if isinstance(body.get("suffix"), str):
        _check_length(body["suffix"], "suffix", facts)
    body["prompt"] = prompt
    if not prompt and checked.prompt_tokens is not None:
        raise bad("prompt", "no tokens")


def _check_stop(stop: str | list[str] | None) -> None:
    stops = [stop] if isinstance(stop, str) else stop or []
    if len(stops) > MAX_STOPS:
        raise bad("stop", f"{len(stops)} of them; at most {MAX_STOPS} are taken")
    for text in stops:
        if not text:
            raise bad("stop", "an empty text would stop before the first token")
        if len(text) > MAX_STOP_CHARS:
            raise bad("stop", f"a text of {len(text)} characters; at most {MAX_STOP_CHARS} are taken")


def _check_bias(valid: Any, facts: ModelFacts) -> None:
    for token, value in (valid.logit_bias or {}).items():
        if not -100 <= value <= 100:
            raise bad("logit_bias", f"{value} is out of range; -100 to 100 are allowed")
        if valid.logit_bias_type == "tokens":
            continue
        if not re.fullmatch(r"\d{1,9}", token, re.ASCII) or int(token) >= facts.n_vocab:
            raise bad("logit_bias", f"{token[:20]!r} is not a token id; this model has 0 to {facts.n_vocab - 1}")


def _check_logprobs(body: dict[str, Any], valid: Any, facts: ModelFacts) -> None:
    top = getattr(valid, "top_logprobs", None)
    if isinstance(valid, CreateChatCompletionRequest):
        if top is not None and not valid.logprobs:
            raise bad("top_logprobs", "only together with logprobs")
        if valid.logprobs:
            body.setdefault("top_logprobs", 0)
    wanted = valid.logprobs is not None and valid.logprobs is not False
    if wanted and not facts.logits_all:
        raise bad(
            "logprobs", "this server does not keep the logits of all tokens; start it with --logits_all true for that"
        )


# ------------------------------------------------------------------------------------------------------ the others


def _check_embedding(body: dict[str, Any], facts: ModelFacts) -> None:
    if not facts.embeddings:
        raise RequestError(
            "model: it is not served for embeddings; start a server with --embedding true and without a draft",
            param="model",
            code="no_embeddings",
        )
    valid: Any = validate(CreateEmbeddingRequest, body)
    inputs = [valid.input] if isinstance(valid.input, str) else valid.input
    if not inputs or not all(inputs):
        raise bad("input", "text that is not empty was expected")
    for text in inputs:
        _check_length(text, "input", facts)


def _check_ids(tokens: Any, param: str, facts: ModelFacts) -> None:
    """llama.cpp ends the process on an id that the vocabulary does not have."""
    if not tokens:
        raise bad(param, "no tokens")
    for i, token in enumerate(tokens):
        if type(token) is not int or not 0 <= token < facts.n_vocab:
            raise bad(f"{param}[{i}]", f"not a token id; this model has 0 to {facts.n_vocab - 1}")


def _check_length(text: str, param: str, facts: ModelFacts) -> None:
    size = len(text.encode())
    if size > facts.max_prompt_bytes:
        raise too_long(param, f"has {size} bytes", facts)
