"""Chats as OpenAI's clients hold them: roles, parts, tools and their results, streamed or whole; with the demo target's template and
with llama-cpp-python's function calling."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .process import ServerProcess

WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 10}},
    "required": ["city"],
}
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {"name": "get_weather", "description": "Weather of a city.", "parameters": WEATHER},
    },
    {"type": "function", "function": {"name": "get_time"}},  # without parameters
]
ASK = [{"role": "user", "content": "What is the weather in Paris?"}]


def chat(server: ServerProcess, messages: list[Any], **options: Any) -> dict[str, Any]:
    response = server.post(
        "/v1/chat/completions", {"messages": messages, "max_tokens": 16, "temperature": 0, **options}
    )
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


@pytest.fixture(scope="module")
def calling(demo_target: Path) -> Iterator[ServerProcess]:
    """With the chat format that lets any chatml model call functions."""
    draft = Path(__file__).parents[2] / "models" / "smollm2-135m-instruct-dflash-q8_0.gguf"
    with ServerProcess(
        "-m", demo_target, "-md", draft, "--chat-format", "chatml-function-calling", exact=False
    ) as server:
        yield server


def test_ways_to_say_the_same(demo_server: ServerProcess) -> None:
    plain = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name a\ncolour."}]
    parts = [
        {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
        {
            "role": "user",
            "content": [{"type": "text", "text": "Name a"}, {"type": "text", "text": "colour."}],
            "name": "me",
        },
    ]
    texts = {chat(demo_server, messages)["choices"][0]["message"]["content"] for messages in (plain, plain, parts)}
    assert len(texts) == 1
    # Fields that are null are not given, and fields of OpenAI's that mean nothing here do no harm.
    nothing: dict[str, Any] = dict.fromkeys(
        ("tools", "stop", "top_p", "frequency_penalty", "logit_bias", "response_format", "seed")
    )
    extra = {"store": False, "metadata": {"a": "b"}, "parallel_tool_calls": True, "service_tier": "auto", "n": 1}
    answer = chat(demo_server, plain, **nothing, **extra, max_tokens=None, max_completion_tokens=16)
    assert answer["choices"][0]["message"]["content"] in texts


def test_tools_and_their_results(demo_server: ServerProcess) -> None:
    named = {"type": "function", "function": {"name": "get_weather"}}
    first = chat(demo_server, ASK, tools=TOOLS, tool_choice=named, max_tokens=40)["choices"][0]
    call = first["message"]["tool_calls"][0]
    assert (
        first["finish_reason"] == "tool_calls"
        and call["type"] == "function"
        and call["function"]["name"] == "get_weather"
    )
    assert set(json.loads(call["function"]["arguments"])) == {"city"}
    # What OpenAI's client sends next: its message as it came, null fields and all, and the result.
    said = {**first["message"], "content": None, "refusal": None, "function_call": None, "audio": None}
    result = {"role": "tool", "tool_call_id": call["id"], "content": "Sunny, 21 degrees."}
    follow_up = chat(demo_server, [*ASK, said, result], tools=TOOLS, tool_choice="none")["choices"][0]
    assert follow_up["message"]["content"]
    assert chat(demo_server, ASK, tools=TOOLS)["choices"][0]["message"]["content"]  # "auto" is the default
    timed = chat(
        demo_server, ASK, tools=TOOLS, tool_choice={"type": "function", "function": {"name": "get_time"}}, max_tokens=20
    )
    assert json.loads(timed["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"]) == {}
    legacy = chat(
        demo_server, ASK, functions=[TOOLS[0]["function"]], function_call={"name": "get_weather"}, max_tokens=40
    )
    assert legacy["choices"][0]["message"]["function_call"]["name"] == "get_weather"


def test_function_calling(calling: ServerProcess) -> None:
    """Its choice of a function is a generation of its own: all of a request's generations are in its timings."""
    answer = chat(calling, ASK, tools=TOOLS, max_tokens=60)
    message = answer["choices"][0]["message"]
    assert message["tool_calls"] or message["content"]
    assert answer["timings"]["prompt_n"] + answer["timings"]["cache_n"] > answer["usage"]["prompt_tokens"]
    named = {"type": "function", "function": {"name": "get_weather"}}
    call = chat(calling, ASK, tools=TOOLS, tool_choice=named, max_tokens=40)["choices"][0]["message"]["tool_calls"][0]
    assert set(json.loads(call["function"]["arguments"])) == {"city"}
    assert chat(calling, ASK)["choices"][0]["message"]["content"]
    # It forwards no seed and no limit of its own to some of its generations; the server does.
    refused = calling.post("/v1/chat/completions", {"messages": ASK, "tools": TOOLS, "tool_choice": "required"})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "tool_choice"


def test_json_answers(demo_server: ServerProcess) -> None:
    anything = chat(
        demo_server,
        [{"role": "user", "content": "A JSON object."}],
        response_format={"type": "json_object"},
        max_tokens=200,
    )
    if anything["choices"][0]["finish_reason"] == "stop":
        assert isinstance(json.loads(anything["choices"][0]["message"]["content"]), dict)
    schema = {
        "type": "object",
        "$defs": {"colour": {"enum": ["red", "green"]}},
        "definitions": {"colour": {"enum": ["red", "green"]}},
        "properties": {
            "colour": {"$ref": "#/definitions/colour"},
            "sizes": {"type": "array", "items": {"type": "integer"}, "maxItems": 2},
        },
        "required": ["colour", "sizes"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "thing", "schema": schema}}
    for options in (
        {"response_format": wanted},
        {"json_schema": schema},
        {"response_format": {"type": "json_object", "schema": schema}},
    ):
        answer = chat(demo_server, [{"role": "user", "content": "A thing."}], max_tokens=80, **options)
        thing = json.loads(answer["choices"][0]["message"]["content"])
        assert thing["colour"] in ("red", "green") and len(thing["sizes"]) <= 2
    completion = demo_server.post(
        "/v1/completions", {"prompt": "A thing:", "json_schema": schema, "max_tokens": 80, "temperature": 0}
    )
    assert json.loads(completion.json()["choices"][0]["text"])["colour"] in ("red", "green")


def test_the_earliest_stop_counts(demo_server: ServerProcess) -> None:
    """Also if one token completes several, and they are listed in another order; streamed as whole."""
    body = {"prompt": "one two three four five", "max_tokens": 16, "temperature": 0}
    whole = demo_server.post("/v1/completions", body).json()["choices"][0]["text"]
    word = next(word for word in whole.split() if len(word) > 3)
    stops = [word[2], word[1]]
    cut = min(whole.index(stop) for stop in stops)
    answer = demo_server.post("/v1/completions", {**body, "stop": stops}).json()["choices"][0]
    assert (answer["text"], answer["finish_reason"]) == (whole[:cut], "stop")
    streamed = demo_server.post("/v1/completions", {**body, "stop": stops, "stream": True}).text
    chunks = [json.loads(event[6:]) for event in streamed.split("\n\n") if event.startswith("data: {")]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole[:cut]


def test_echo_and_bias(demo_server: ServerProcess) -> None:
    body = {"prompt": "The sky is", "max_tokens": 4, "temperature": 0}
    assert (
        demo_server.post("/v1/completions", {**body, "echo": True})
        .json()["choices"][0]["text"]
        .startswith("The sky is")
    )
    ids = demo_server.post("/extras/tokenize", {"input": " purple"}).json()["tokens"]
    # Together with min_tokens, which llama-cpp-python would let cancel the bias.
    biased = demo_server.post("/v1/completions", {**body, "logit_bias": {str(ids[0]): 100}, "min_tokens": 2})
    assert biased.json()["choices"][0]["text"].startswith(" purple")
