"""A hostile client: each of its requests is refused or answered, by field; none is a 5xx, none ends the process, the next is right."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from llama_cpp.server.types import CreateChatCompletionRequest, CreateCompletionRequest

from .process import ServerProcess

COMPLETION = {"prompt": "Hello", "max_tokens": 2}
CHAT = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
ROUTES: dict[str, tuple[Any, dict[str, Any]]] = {
    "/v1/completions": (CreateCompletionRequest, COMPLETION),
    "/v1/chat/completions": (CreateChatCompletionRequest, CHAT),
}
OURS = ("max_completion_tokens", "stream_options", "json_schema", "nonsense")
VALUES: list[Any] = [
    *(None, True, -1, 0, 2, 2**31, 10**40, -0.5, 1e308, "", "5", "\x00", "é😀", "x" * 50_000),
    *([], [None], [[]], [-1], [10**9], ["a", "b"], [{}], {}, {"a": {"b": []}}, {"1": 1e9}, {"type": "json_schema"}),
    *(
        [{"role": "user", "content": [{"type": "text"}]}],
        [{"type": "function", "function": {"name": "f", "parameters": 5}}],
    ),
]


@pytest.fixture(autouse=True)
def unharmed(server: ServerProcess) -> Iterator[None]:
    """The process lives, and the next answer is what it was."""
    request = {"prompt": "Unharmed?", "max_tokens": 6, "temperature": 0}
    before = server.post("/v1/completions", request).json()["choices"][0]
    yield
    assert server.post("/v1/completions", request).json()["choices"][0] == before


def refused(server: ServerProcess, route: str, body: Any, named: str = "") -> dict[str, Any]:
    """The error object of a request that is refused."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = server.post(route, content=content, headers={"Content-Type": "application/json"})
    assert 400 <= response.status_code < 500, f"{content[:200]!r}: {response.status_code} {response.text[:300]}"
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert named in (error["param"] or "") and named in error["message"], error
    return error


@pytest.mark.parametrize("route", ROUTES)
def test_every_field_with_every_value(route: str, server: ServerProcess) -> None:
    cls, base = ROUTES[route]
    for field in (*cls.model_fields, *OURS):
        for value in VALUES:
            if value is None and field in ("max_tokens", "max_completion_tokens"):
                continue  # as many as fit
            response = server.post(route, {**base, field: value})
            what = f"{field}={value!r:.80}: {response.status_code} {response.text[:300]}"
            if response.status_code == 200:
                if "event-stream" in response.headers["content-type"]:
                    assert response.text.endswith("data: [DONE]\n\n"), what
                else:
                    choice = response.json()["choices"][0]
                    said = choice.get("text") or choice.get("message", {}).get("content")
                    # A token may be half a character, which is no text yet; but something was generated.
                    generated = response.json()["timings"]["predicted_n"]
                    assert said or choice["finish_reason"] == "stop" or generated, what
            else:
                assert 400 <= response.status_code < 500, what
                error = response.json()["error"]
                assert field in error["message"] and (error["param"] or "").startswith(field), what


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{", b"[]", b"null", b'"x"', b'{"prompt": NaN}', b'{"prompt":"x","max_tokens":Infinity}'),
        *(b'{"prompt":"x","temperature":1e999}', b'{"prompt":"x","seed":' + b"9" * 5000 + b"}"),
        *(b"\xff\xfe{}", b'{"prompt":"\xff"}', b'{"prompt":"\\ud800"}', b'{"prompt":"x","\\udfff":1}'),
        *(b"[" * 100_000, b'{"a":' * 100_000, b'{"prompt":"x","user":' + b"[" * 900 + b"]" * 900 + b"}"),
    ],
    ids=lambda body: repr(body[:24]),
)
def test_bodies_that_are_no_request(body: bytes, server: ServerProcess) -> None:
    for route in (*ROUTES, "/extras/tokenize", "/v1/embeddings"):
        refused(server, route, body)


GRAMMARS = {
    "does not parse": 'root ::= ("a"',
    "no rules": "nonsense",
    "no root": 'start ::= "a"',
    "undefined rule": "root ::= nobody",
    "left recursion": 'root ::= root "a" | "b"',
    "hidden left recursion": 'root ::= x root "a" | "b"\nx ::= "c"?',
    "left recursion in parentheses": 'root ::= (root "a")?',
    "token beyond the vocabulary": "root ::= <[999999]>",
    "character that no token has": 'root ::= "\\x00"',
    "deep parentheses": "root ::= " + "(" * 50_000 + '"a"' + ")" * 50_000,
    "long chain of rules": "root ::= r0\n" + "".join(f"r{i} ::= r{i + 1}\n" for i in range(20_000)) + 'r20000 ::= "a"',
    "2^60 ways to begin": "root ::= r0\n"
    + "".join(f"r{i} ::= r{i + 1} | r{i + 1}\n" for i in range(60))
    + 'r60 ::= "a"',
    "2^60 stacks": "root ::= r0\n"
    + "".join(f'r{i} ::= r{i + 1} "a" | r{i + 1} "b"\n' for i in range(60))
    + 'r60 ::= "c"',
    "many repetitions": 'root ::= "a"{1000000000}',
    "repetitions that count backwards": 'root ::= "a"{5,2}',
    "a long text, often": 'root ::= "' + "a" * 1000 + '"{2000}',
    "nothing, without end": 'root ::= ("a"?)*',
    "nothing, without end, by another rule": 'root ::= "x" (a | "b")+\na ::= "c"?',
    "left recursion behind what may be empty": 'root ::= ("é"{2,} | "t"*) root{1,3}',
    "a text that is no token": "root ::= <no such token>",
    "huge": "root ::= " + '"a" ' * 100_000,
    "null character": 'root ::= "a"\0',
}


@pytest.mark.parametrize("text", GRAMMARS.values(), ids=GRAMMARS)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_grammars_that_would_end_the_process(text: str, stream: bool, server: ServerProcess) -> None:
    start = len(server.lines)
    refused(server, "/v1/completions", {**COMPLETION, "grammar": text, "stream": stream}, named="grammar")
    # llama.cpp prints what it cannot parse, whatever that is, beside the log's own lines.
    server.post("/v1/completions", COMPLETION)
    server.wait_for("status=200", after=start)
    assert all(" INFO request " in line for line in server.lines[start:])


SCHEMAS: dict[str, Any] = {
    "not an object": 5,
    "unknown type": {"type": "nothing"},
    "reference to nowhere": {"$ref": "#/definitions/nobody"},
    "reference to a file": {"$ref": "file:///etc/passwd"},
    "reference to a host": {"$ref": "https://example.com/schema.json"},
    "reference that is no text": {"$ref": 5},
    "many items": {"type": "array", "items": {"type": "integer"}, "minItems": 10**9},
    "long text": {"type": "string", "maxLength": 10**9},
    "pattern that repeats": {"type": "string", "pattern": "^a{1000000000}$"},
    "pattern without an end": {"type": "string", "pattern": "^[a$"},
    "2^60 ways to begin": {
        "definitions": {f"r{i}": {"anyOf": [{"$ref": f"#/definitions/r{i + 1}"}] * 2} for i in range(50)}
        | {"r50": {"type": "string"}},
        "$ref": "#/definitions/r0",
    },
    "a thousand optional properties": {
        "type": "object",
        "properties": {f"p{i}": {"type": "null"} for i in range(1200)},
    },
    "endless recursion": {"definitions": {"a": {"$ref": "#/definitions/a"}}, "$ref": "#/definitions/a"},
}


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
def test_schemas_that_cannot_be_enforced(schema: Any, server: ServerProcess) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    refused(server, "/v1/chat/completions", {**CHAT, "response_format": wanted}, named="response_format")
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    body = {**CHAT, "tools": [tool], "tool_choice": {"type": "function", "function": {"name": "f"}}}
    refused(server, "/v1/chat/completions", body, named="tools[0]")


def test_schemas_with_large_bounds(server: ServerProcess) -> None:
    """They become as many parentheses inside one another."""
    schema = {"type": "object", "properties": {"a": {"type": "string", "maxLength": 1000}}, "required": ["a"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    response = server.post("/v1/chat/completions", {**CHAT, "max_tokens": 16, "response_format": wanted})
    assert response.status_code == 200 and response.json()["choices"][0]["message"]["content"].startswith("{")


def test_a_grammar_that_is_complete_ends_the_text(server: ServerProcess) -> None:
    """min_tokens forbids the end, the grammar everything else."""
    body = {**COMPLETION, "max_tokens": 8, "grammar": 'root ::= "ab"', "min_tokens": 8}
    refused(server, "/v1/completions", body, named="grammar")
    answer = server.post("/v1/completions", {**body, "min_tokens": 0}).json()
    assert answer["choices"][0]["text"] == "ab" and answer["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_bytes_that_no_character_begins_with(stream: bool, server: ServerProcess) -> None:
    """llama-cpp-python waits for the rest of the character, beyond max_tokens and beyond the context."""
    for ids in ([0xEB], [0xF0], [0xC3, 65], [0xF5, 0xC0]):
        bias = {str(token): 100 for token in ids}
        body = {"prompt": "x", "max_tokens": 5, "logit_bias": bias, "stream": stream, "temperature": 1.0}
        response = server.post("/v1/completions", body)
        assert response.status_code == 200
        if stream:
            last = json.loads(response.text.split("data: ")[-2])
            assert last["choices"][0]["finish_reason"] == "length" and last["timings"]["predicted_n"] == 5
        else:
            answer = response.json()
            assert answer["choices"][0]["finish_reason"] == "length" and answer["usage"]["completion_tokens"] == 5
            if 65 in ids:
                assert "A" in answer["choices"][0]["text"]
    characters = server.post("/v1/completions", {"prompt": "x", "max_tokens": 5, "grammar": 'root ::= "é€😀"'})
    assert characters.json()["choices"][0]["text"] == "é€"


def test_token_ids_outside_the_vocabulary(server: ServerProcess) -> None:
    for ids in ([-1], [288], [10**12], [1, 2, 1.5], [True], ["a", 1]):
        refused(server, "/v1/completions", {**COMPLETION, "prompt": ids}, named="prompt")
        refused(server, "/extras/detokenize", {"tokens": ids}, named="tokens")
    assert server.post("/extras/detokenize", {"tokens": [72, 105]}).json() == {"text": "Hi"}
    assert refused(server, "/extras/detokenize", {"tokens": [0xF0]})["param"] == "tokens"  # part of a character


def test_an_empty_prompt(server: ServerProcess) -> None:
    response = server.post("/v1/completions", {"prompt": "", "max_tokens": 3})
    assert response.status_code == 200 and response.json()["usage"]["completion_tokens"] > 0
    assert server.post("/v1/completions", {"max_tokens": 3}).status_code == 200


def test_what_a_server_may_refuse_says_how_to_get_it(server: ServerProcess) -> None:
    assert (
        "--logits_all" in refused(server, "/v1/completions", {**COMPLETION, "logprobs": 2}, named="logprobs")["message"]
    )
    assert "--embedding" in refused(server, "/v1/embeddings", {"input": "x"})["message"]


def test_long_texts_are_refused_before_they_are_tokenized(server: ServerProcess) -> None:
    for body in ({"prompt": "a" * 10_000_000}, {"prompt": [1] * 1_000_000}):
        error = refused(server, "/v1/completions", body, named="prompt")
        assert error["code"] == "context_length_exceeded"
    messages = [{"role": "user", "content": "a" * 1000}] * 5000
    assert (
        refused(server, "/v1/chat/completions", {"messages": messages}, "messages")["code"] == "context_length_exceeded"
    )


def test_bodies_of_other_sizes_and_types(server: ServerProcess) -> None:
    response = server.post("/v1/completions", content=b"x" * (17 << 20), headers={"Content-Type": "application/json"})
    assert response.status_code == 413 and "--max-body" in response.json()["error"]["message"]
    chunks = (b"x" * (1 << 20) for _ in range(17))  # no Content-Length
    response = server.post("/v1/completions", content=chunks, headers={"Content-Type": "application/json"})
    assert response.status_code == 413
    assert server.post("/v1/completions", content=b"{}").status_code == 415
    assert server.http.get("/v1/completions").status_code == 405
    assert server.http.get("/../../etc/passwd").json()["error"]["type"] == "not_found_error"
