"""What a request says, checked before it comes near a model: every answer to a bad one is a 4xx that names the field.

llama_cpp.server's own request classes give types and ranges. Beyond them stand what it would ignore (``n``), misread (``max_tokens`` 0),
or pass on to llama.cpp, which ends the process on ids outside the vocabulary. And what OpenAI's clients send and it does not know is put
into its words.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from llama_cpp.llama_grammar import JSON_GBNF
from llama_cpp.server.types import (
    CreateChatCompletionRequest,
    CreateCompletionRequest,
    CreateEmbeddingRequest,
    DetokenizeInputRequest,
    TokenizeInputRequest,
)
from pydantic import BaseModel, ValidationError

from .errors import RequestError
from .grammar import check_grammar, grammar_of_schema
from .model import Served

MAX_DEPTH = 64
MAX_STOPS, MAX_STOP_CHARS = 64, 1024
MAX_NAME_CHARS = 256
MAX_TOOLS = 128

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

_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_TOOL_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True)
class ModelFacts:
    """What checking needs to know of the model that will answer."""

    n_vocab: int
    n_ctx: int
    max_prompt_bytes: int  # no longer text can fit the context
    logits_all: bool
    embeddings: bool
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
            takes_images=settings.clip_model_path is not None,
            chat_format=settings.chat_format or llm.chat_format or "",
        )


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


def parse(raw: bytes) -> dict[str, Any]:
    """The JSON object of a body.

    Raises:
        RequestError: not JSON, not an object, too deep, or with values that JSON does not have (NaN, lone surrogates).
    """
    try:
        body = json.loads(raw.decode("utf-8"), parse_constant=_no_constant, parse_float=_finite)
    except UnicodeDecodeError as error:
        raise RequestError(f"the body is not UTF-8 text (byte {error.start})", code="invalid_json") from None
    except json.JSONDecodeError as error:
        raise RequestError(
            f"the body is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}", code="invalid_json"
        ) from None
    except RecursionError:
        raise RequestError(f"the body nests more than {MAX_DEPTH} levels", code="invalid_json") from None
    except ValueError as error:  # a number of more digits than Python reads
        raise RequestError(f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(body, dict):
        raise RequestError(f"the body must be a JSON object, not {_name(body)}", code="invalid_json")
    _check_values(body)
    return body


def check(route: str, body: dict[str, Any], facts: ModelFacts) -> Checked:
    """Check a request and put it into llama_cpp.server's words.

    Raises:
        RequestError: names the field.
    """
    # OpenAI's clients send null for what is not set.
    checked = Checked({name: value for name, value in body.items() if value is not None})
    body = checked.body
    if len(str(body.get("model", ""))) > MAX_NAME_CHARS:
        raise _bad("model", f"a name of more than {MAX_NAME_CHARS} characters")
    if route in GENERATING:
        _check_generation(body, checked, facts, chat=route.endswith("/chat/completions"))
    elif route == "/v1/embeddings":
        _check_embedding(body, facts)
    else:
        valid = _validate(ROUTES[route], body)
        if isinstance(valid, DetokenizeInputRequest):
            _check_ids(valid.tokens, "tokens", facts)
        elif isinstance(valid, TokenizeInputRequest):
            checked.text = valid.input
    return checked


# ------------------------------------------------------------------------------------------------- text generation


def _check_generation(body: dict[str, Any], checked: Checked, facts: ModelFacts, *, chat: bool) -> None:
    if "max_completion_tokens" in body:
        body["max_tokens"] = body.pop("max_completion_tokens")
    for name in (*_RANGES, "top_p", "min_p", "presence_penalty", "frequency_penalty", "n", "best_of"):
        if isinstance(body.get(name), bool) and not (chat and name == "logprobs"):
            raise _bad(name, "a number was expected, not a boolean")
    if chat:
        _check_messages(body, facts)
        _check_tools(body, facts)
    else:
        _check_prompt(body, checked, facts)
    _check_constraint(body, checked)
    options = body.pop("stream_options", {})
    if not isinstance(options, dict):
        raise _bad("stream_options", f"an object was expected, not {_name(options)}")
    checked.include_usage = options.get("include_usage") is True

    valid = _validate(CreateChatCompletionRequest if chat else CreateCompletionRequest, body)
    for name, (least, most) in _RANGES.items():
        value = getattr(valid, name, None)
        if value is not None and not isinstance(value, bool) and not least <= value <= most:
            raise _bad(name, f"{value} is out of range; {least} to {most} are allowed")
    for name in ("n", "best_of"):
        if getattr(valid, name, None) not in (None, 1):
            raise _bad(name, f"{getattr(valid, name)} choices; this server makes one")
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
            raise _bad("prompt", f"{len(prompt)} prompts; send them one by one")
        prompt = prompt[0]
    if isinstance(prompt, list):
        _check_ids(prompt, "prompt", facts)
        if len(prompt) >= facts.n_ctx:
            raise _too_long("prompt", f"has {len(prompt)} tokens", facts)
        for name in ("suffix", "echo"):
            if body.get(name):
                raise _bad(name, "not with a prompt of token ids")
        checked.prompt_tokens, prompt = prompt, "ids"
    if not isinstance(prompt, str):
        raise _bad("prompt", f"text or a list of token ids was expected, not {_name(prompt)}")
    _check_length(prompt, "prompt", facts)
    body["prompt"] = prompt
    if not prompt and checked.prompt_tokens is not None:
        raise _bad("prompt", "no tokens")


def _check_messages(body: dict[str, Any], facts: ModelFacts) -> None:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise _bad("messages", "a list of at least one message was expected")
    total = 0
    for i, message in enumerate(messages):
        at = f"messages[{i}]"
        if not isinstance(message, dict):
            raise _bad(at, f"an object was expected, not {_name(message)}")
        role = message.get("role")
        if role not in _ROLES:
            raise _bad(f"{at}.role", f"one of {', '.join(_ROLES)} was expected")
        if role == "developer":
            message["role"] = "system"
        if message.get("tool_calls", 0) is None:
            del message["tool_calls"]
        if message.get("content") is None:
            if role == "user":
                raise _bad(f"{at}.content", "text was expected")
            message["content"] = ""
        if isinstance(message["content"], list):
            message["content"] = _join_parts(message["content"], f"{at}.content", facts)
        if isinstance(message["content"], str):
            total += len(message["content"].encode())
        elif not isinstance(message["content"], list):
            raise _bad(f"{at}.content", f"text or a list of parts was expected, not {_name(message['content'])}")
    if total > facts.max_prompt_bytes:
        raise _too_long("messages", f"have {total} bytes of text", facts)


def _join_parts(parts: list[Any], at: str, facts: ModelFacts) -> str | list[Any]:
    """Templates of text models expect text: parts of text are joined. Images stay parts, and come in the request itself."""
    texts: list[str] = []
    for i, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "image_url":
            if not facts.takes_images:
                raise _bad(f"{at}[{i}]", "this model takes text only")
            image = part.get("image_url")
            url = image.get("url") if isinstance(image, dict) else image
            if not isinstance(url, str) or not url.startswith("data:"):
                raise _bad(f"{at}[{i}].image_url", "an image is sent in a data: URL; this server fetches nothing")
        else:
            raise _bad(f"{at}[{i}].type", "a part of type text was expected")
    return "\n".join(texts) if len(texts) == len(parts) else parts


def _check_tools(body: dict[str, Any], facts: ModelFacts) -> None:
    for name in ("tools", "functions"):
        tools = body.get(name)
        if tools is None:
            continue
        if not isinstance(tools, list):
            raise _bad(name, f"a list was expected, not {_name(tools)}")
        if len(tools) > MAX_TOOLS:
            raise _bad(name, f"{len(tools)} of them; at most {MAX_TOOLS} are taken")
        if not tools:
            del body[name]
        for i, tool in enumerate(tools):
            _check_tool(tool, f"{name}[{i}]", wrapped=name == "tools")
    choice = body.get("tool_choice")
    tools = body.get("tools")
    if tools is None:
        if choice not in (None, "none", "auto"):
            raise _bad("tool_choice", "there are no tools to choose from")
        body.pop("tool_choice", None)
    elif choice is None:
        body["tool_choice"] = "auto"  # OpenAI's default; chatml-function-calling takes its absence for "none"
    elif choice == "required" and not facts.chat_format.startswith("functionary"):
        if len(tools) > 1:
            raise _bad("tool_choice", "required is supported for a single tool; name the one that is to be called")
        body["tool_choice"] = {"type": "function", "function": {"name": tools[0]["function"]["name"]}}
    chosen = body.get("tool_choice")
    if tools is not None and isinstance(chosen, dict):
        _check_choice(chosen.get("function"), [tool["function"] for tool in tools], "tool_choice.function", "tools")
    call = body.get("function_call")
    if isinstance(call, dict):
        _check_choice(call, body.get("functions", []), "function_call", "functions")


def _check_tool(tool: Any, at: str, *, wrapped: bool) -> None:
    function = tool.get("function") if wrapped and isinstance(tool, dict) else tool
    at = f"{at}.function" if wrapped else at
    if not isinstance(function, dict):
        raise _bad(at, f"an object was expected, not {_name(function)}")
    if not isinstance(function.get("name"), str) or not _TOOL_NAME.fullmatch(function["name"]):
        raise _bad(f"{at}.name", "1 to 64 letters, digits, underscores or dashes were expected")
    if function.get("parameters") is None:
        function["parameters"] = {"type": "object", "properties": {}}
    if not isinstance(function["parameters"], dict):
        raise _bad(f"{at}.parameters", f"a JSON schema is an object, not {_name(function['parameters'])}")
    if not isinstance(function.get("description", ""), str):
        function.pop("description")


def _check_choice(choice: Any, functions: list[Any], at: str, among: str) -> None:
    """The function that a request insists on exists, and what it takes can be enforced."""
    name = choice.get("name") if isinstance(choice, dict) else None
    if not isinstance(name, str):
        raise _bad(f"{at}.name", "the name of a function was expected")
    for i, function in enumerate(functions):
        if function["name"] == name:
            inner = ".function" if among == "tools" else ""
            grammar_of_schema(function["parameters"], f"{among}[{i}]{inner}.parameters")
            return
    raise _bad(f"{at}.name", f"{name!r} is not among the {among}")


def _check_constraint(body: dict[str, Any], checked: Checked) -> None:
    """A grammar, a JSON schema or a response format: in the end a grammar that llama.cpp can be given."""
    wanted = [name for name in ("grammar", "json_schema", "response_format") if body.get(name) not in (None, "")]
    grammar = body.pop("grammar", "")
    schema = body.pop("json_schema", None)
    answer = body.pop("response_format", None)
    if isinstance(answer, dict) and answer.get("type") == "text":
        wanted.remove("response_format")
        answer = None
    if len(wanted) > 1:
        raise _bad(wanted[1], f"not together with {wanted[0]}")
    if not wanted:
        return
    checked.grammar_param = param = wanted[0]
    if param == "grammar":
        if not isinstance(grammar, str):
            raise _bad(param, f"a grammar is text, not {_name(grammar)}")
        check_grammar(grammar, param)
        body["grammar"] = grammar
    elif param == "json_schema":
        body["grammar"] = grammar_of_schema(schema, param)
    else:
        body["grammar"] = _grammar_of_format(answer)


def _grammar_of_format(answer: Any) -> str:
    kind = answer.get("type") if isinstance(answer, dict) else None
    if kind == "json_object":
        if answer.get("schema") is None:
            return str(JSON_GBNF)
        return grammar_of_schema(answer["schema"], "response_format.schema")
    if kind == "json_schema":
        inner = answer.get("json_schema")
        if not isinstance(inner, dict):
            raise _bad("response_format.json_schema", f"an object was expected, not {_name(inner)}")
        return grammar_of_schema(inner.get("schema"), "response_format.json_schema.schema")
    raise _bad("response_format.type", "one of text, json_object, json_schema was expected")


def _check_stop(stop: str | list[str] | None) -> None:
    stops = [stop] if isinstance(stop, str) else stop or []
    if len(stops) > MAX_STOPS:
        raise _bad("stop", f"{len(stops)} of them; at most {MAX_STOPS} are taken")
    for text in stops:
        if not text:
            raise _bad("stop", "an empty text would stop before the first token")
        if len(text) > MAX_STOP_CHARS:
            raise _bad("stop", f"a text of {len(text)} characters; at most {MAX_STOP_CHARS} are taken")


def _check_bias(valid: Any, facts: ModelFacts) -> None:
    for token, value in (valid.logit_bias or {}).items():
        if not -100 <= value <= 100:
            raise _bad("logit_bias", f"{value} is out of range; -100 to 100 are allowed")
        if valid.logit_bias_type == "tokens":
            continue
        if not re.fullmatch(r"\d{1,9}", token, re.ASCII) or int(token) >= facts.n_vocab:
            raise _bad("logit_bias", f"{token[:20]!r} is not a token id; this model has 0 to {facts.n_vocab - 1}")


def _check_logprobs(body: dict[str, Any], valid: Any, facts: ModelFacts) -> None:
    top = getattr(valid, "top_logprobs", None)
    if isinstance(valid, CreateChatCompletionRequest):
        if top is not None and not valid.logprobs:
            raise _bad("top_logprobs", "only together with logprobs")
        if valid.logprobs:
            body.setdefault("top_logprobs", 0)
    wanted = valid.logprobs is not None and valid.logprobs is not False
    if wanted and not facts.logits_all:
        raise _bad(
            "logprobs", "this server does not keep the logits of all tokens; start it with --logits_all true for that"
        )


# ------------------------------------------------------------------------------------------------------ the others


def _check_embedding(body: dict[str, Any], facts: ModelFacts) -> None:
    if not facts.embeddings:
        raise RequestError(
            "this server generates text; for embeddings start one with --embedding true and without a draft",
            status=501,
            code="no_embeddings",
        )
    valid: Any = _validate(CreateEmbeddingRequest, body)
    inputs = [valid.input] if isinstance(valid.input, str) else valid.input
    if not inputs or not all(inputs):
        raise _bad("input", "text that is not empty was expected")
    for text in inputs:
        _check_length(text, "input", facts)


def _check_ids(tokens: Any, param: str, facts: ModelFacts) -> None:
    """llama.cpp ends the process on an id that the vocabulary does not have."""
    if not tokens:
        raise _bad(param, "no tokens")
    for i, token in enumerate(tokens):
        if type(token) is not int or not 0 <= token < facts.n_vocab:
            raise _bad(f"{param}[{i}]", f"not a token id; this model has 0 to {facts.n_vocab - 1}")


def _check_length(text: str, param: str, facts: ModelFacts) -> None:
    size = len(text.encode())
    if size > facts.max_prompt_bytes:
        raise _too_long(param, f"has {size} bytes", facts)


def _validate(cls: type[BaseModel], body: dict[str, Any]) -> Any:
    try:
        return cls.model_validate(body)
    except ValidationError as error:
        raise of_validation_error(error.errors(include_url=False), body) from None


def of_validation_error(errors: Iterable[Any], body: Any = None) -> RequestError:
    """The one of pydantic's errors that leads deepest into the request: alternatives of a union each add some."""
    best = max(errors, key=lambda e: len(_path(e["loc"], body)))
    path = _path(best["loc"], body)
    param = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).lstrip(".")
    return RequestError(f"{param or 'body'}: {best['msg']}", param=param or None)


def _path(loc: Iterable[Any], body: Any) -> list[Any]:
    """Steps of pydantic's location that are in the request; the others are names of types."""
    if body is None:
        return [step for step in loc if step != "body"]
    steps = list(loc)
    path, value = [], body
    for i, step in enumerate(steps):
        if isinstance(value, dict) and (step in value or i == len(steps) - 1):
            path.append(step)
            value = value.get(step)
        elif isinstance(value, list) and isinstance(step, int) and step < len(value):
            path.append(step)
            value = value[step]
    return path


def _check_values(body: dict[str, Any]) -> None:
    """No value lies too deep, and every text can be written as UTF-8."""
    todo: list[tuple[Any, str, int]] = [(value, name, 1) for name, value in body.items()]
    for name in body:
        _check_text(name, "body")
    while todo:
        value, at, depth = todo.pop()
        if isinstance(value, str):
            _check_text(value, at)
        elif isinstance(value, dict | list):
            if depth >= MAX_DEPTH:
                raise RequestError(
                    f"{at.split('.')[0][:80]}: nests more than {MAX_DEPTH} levels", param=at.split(".")[0][:80]
                )
            if isinstance(value, list):
                todo.extend(
                    (inner, f"{at}[{i}]", depth + 1) for i, inner in enumerate(value) if not isinstance(inner, int)
                )
            else:
                for key, inner in value.items():
                    _check_text(key, at)
                    todo.append((inner, f"{at}.{key}", depth + 1))


def _check_text(text: str, at: str) -> None:
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RequestError(f"{at[:200]}: half of a surrogate pair is not text", param=at[:200]) from None


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{text[:20]} is beyond any number")
    return value


def _too_long(param: str, what: str, facts: ModelFacts) -> RequestError:
    return RequestError(
        f"{param}: {what}, more than the context of {facts.n_ctx} tokens can hold",
        param=param,
        code="context_length_exceeded",
    )


def _bad(param: str, what: str) -> RequestError:
    return RequestError(f"{param}: {what}", param=param)


def _name(value: Any) -> str:
    """JSON's word for a type."""
    names = {dict: "an object", list: "a list", str: "text", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")
