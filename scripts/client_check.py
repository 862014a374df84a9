"""Drive a running server as clients do, with OpenAI's own package, and say what is wrong with it.

    python scripts/client_check.py http://127.0.0.1:8000
    python scripts/client_check.py http://host:8000 --key KEY --json check.json

Each check is a promise of docs/SERVER.md. They are made for `ggml-mirror serve`, generate a few thousand tokens, and expect to be the only
client: counts of /metrics are compared. LLAMA_API_KEY is taken for --key. What a small model says is not judged, only that it is said
rightly: the same text streamed or not, text that a JSON schema lets through, nothing beyond a stop, the same again after a client hung up.

Exit codes: 0 all well (skipped ones aside), 1 something is wrong, 2 there is no server.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import httpx
import openai
import typer
from rich import box
from rich.table import Table

from ggml_mirror.output import STDOUT, check_writable, write_json
from ggml_mirror.report import make_console

WORDS = "Apple Bread Cloud Dance Eagle Flute Grass Honey Iron Jewel Knife Lemon Mouse Night Ocean Piano".split()
N_CONCURRENT = len(WORDS)
WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "days": {"type": "integer"}},
    "required": ["city", "days"],
}
TOOL = {
    "type": "function",
    "function": {"name": "get_weather", "description": "Weather of a city.", "parameters": WEATHER},
}
TIMINGS = {
    *("cache_n", "prompt_n", "prompt_ms", "prompt_per_second", "predicted_n", "predicted_ms", "predicted_per_second"),
    *("draft_n", "draft_n_accepted", "tau"),
}

#: A field, a value that it cannot have, on the route for text (T), chat (C) or both.
ABSURD: list[tuple[str, Any, str]] = [
    ("max_tokens", 0, "TC"),
    ("max_tokens", -1, "TC"),
    ("max_tokens", "many", "TC"),
    ("max_tokens", 10**30, "TC"),
    ("temperature", -0.1, "TC"),
    ("temperature", 99, "TC"),
    ("temperature", "hot", "TC"),
    ("top_p", 1.5, "TC"),
    ("top_p", -1, "TC"),
    ("min_p", 2, "TC"),
    ("top_k", -5, "TC"),
    ("top_k", 2**40, "TC"),
    ("n", 2, "TC"),
    ("n", 0, "TC"),
    ("best_of", 4, "T"),
    ("stop", [""], "TC"),
    ("stop", 5, "TC"),
    ("presence_penalty", 3, "TC"),
    ("frequency_penalty", -3, "TC"),
    ("repeat_penalty", 0, "TC"),
    ("seed", 10**30, "TC"),
    ("seed", "lucky", "TC"),
    ("stream", "perhaps", "TC"),
    ("logit_bias", {"-1": 1}, "TC"),
    ("logit_bias", {"999999999": 1}, "TC"),
    ("logit_bias", {"1": 1e9}, "TC"),
    ("logit_bias", [1], "TC"),
    ("mirostat_mode", 3, "TC"),
    ("grammar", "root ::= (", "TC"),
    ("grammar", 'root ::= root "a"', "TC"),
    ("grammar", "no rules", "TC"),
    ("model", 5, "TC"),
    ("model", "m" * 1000, "TC"),
    ("prompt", 5, "T"),
    ("prompt", {"a": 1}, "T"),
    ("prompt", ["one", "two"], "T"),
    ("prompt", [-1], "T"),
    ("prompt", [999999999], "T"),
    ("prompt", [], "T"),
    ("messages", [], "C"),
    ("messages", "hello", "C"),
    ("messages", [{"role": "nobody", "content": "x"}], "C"),
    ("messages", [{"role": "user", "content": 5}], "C"),
    ("messages", [{"role": "user"}], "C"),
    (
        "messages",
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}],
        "C",
    ),
    ("response_format", {"type": "xml"}, "C"),
    ("response_format", {"type": "json_schema", "json_schema": {"name": "x", "schema": 5}}, "C"),
    ("response_format", {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}, "C"),
    ("tools", [{"type": "function", "function": {"name": 'a"b'}}], "C"),
    ("tools", "hammer", "C"),
    ("tool_choice", {"type": "function", "function": {"name": "nobody"}}, "C"),
    ("top_logprobs", 5, "C"),
]
MALFORMED = (
    "",
    "{",
    "nonsense",
    "[]",
    '"text"',
    '{"prompt": NaN}',
    '{"prompt": "\\ud800"}',
    '{"a":' * 5000 + "1" + "}" * 5000,
)


class Wrong(AssertionError):
    """What a check found."""


class Skipped(Exception):
    """Why a check does not apply to this server."""


@dataclass
class Outcome:
    name: str
    ok: bool | None  # None: skipped
    detail: str
    seconds: float


class Server:
    """A server, and its clients."""

    def __init__(self, url: str, key: str | None = None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.key = key
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.http = httpx.Client(base_url=self.url, timeout=600, headers=headers)
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=key or "none", timeout=600, max_retries=0)
        self.props: dict[str, Any] = self.http.get("/props").raise_for_status().json()
        self.model: str = self.client.models.list().data[0].id

    @property
    def n_ctx(self) -> int:
        return int(self.props["default_generation_settings"]["n_ctx"])

    def chat(self, content: str = "Write one sentence about the sea.", **options: Any) -> Any:
        options = {"max_tokens": 24, "temperature": 0, **options}
        return self.client.chat.completions.create(
            model=self.model, messages=[{"role": "user", "content": content}], **options
        )

    def text(self, prompt: str = "The capital of France is", **options: Any) -> str:
        options = {"max_tokens": 24, "temperature": 0, **options}
        return str(self.client.completions.create(model=self.model, prompt=prompt, **options).choices[0].text)

    def settled(self, prompt: str, **options: Any) -> str:
        """The text once the prompt is cached. A GPU may round a prompt that is evaluated otherwise than its cached beginning, and
        from then on draft, and round, otherwise."""
        for _ in range(2):
            self.text(prompt, **options)
        return self.text(prompt, **options)

    def metric(self, name: str) -> float:
        text = self.http.get("/metrics").raise_for_status().text
        return sum(float(value) for value in re.findall(rf"^ggml_mirror_{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE))

    def refused(self, path: str, body: Any, param: str | None = None, **options: Any) -> httpx.Response:
        """Post what cannot be answered. It is a 4xx, in OpenAI's form, that names the field."""
        content = body if isinstance(body, str | bytes) else json.dumps(body)
        headers = {"Content-Type": "application/json", **options.pop("headers", {})}
        response = self.http.post(path, content=content, headers=headers, **options)
        what = f"{path} {content[:120]!r}"
        require(400 <= response.status_code < 500, f"{what}: {response.status_code} {response.text[:200]!r}")
        error = response.json().get("error")
        require(isinstance(error, dict) and error.get("message"), f"{what}: no error object in {response.text[:200]!r}")
        if param is not None:
            named = f"{error.get('param') or ''} {error['message']}"
            require(param in named, f"{what}: {param} is not named in {error}")
        return response


def require(good: bool, otherwise: str) -> None:
    if not good:
        raise Wrong(otherwise)


def pieces(stream: Any) -> Iterator[Any]:
    """Chunks of a stream, and the check that the one that says why it ended has timings."""
    ended = False
    for chunk in stream:
        if chunk.choices and chunk.choices[0].finish_reason:
            require(TIMINGS <= set(getattr(chunk, "timings", {})), "the last chunk of a stream has no timings")
            ended = True
        yield chunk
    require(ended, "a stream ended without a finish_reason")


# --------------------------------------------------------------------------------------------------------- checks


def health_and_props(server: Server) -> str:
    require(server.http.get("/health").json() == {"status": "ok"}, "/health is not ok")
    drafting, mirror, draft = (server.props[name] for name in ("drafting", "mirror", "draft"))
    require(drafting["reason"] != "", "/props does not say why it drafts or does not")
    if not drafting["on"]:
        return f"plain: {drafting['reason']}"
    require({"dtype", "cap", "window", "bytes", "device"} <= set(mirror), f"/props: mirror is {mirror}")
    require({"name", "fingerprint", "block_size", "taps"} <= set(draft), f"/props: draft is {draft}")
    require(mirror["cap"] >= mirror["window"] + draft["block_size"], "the mirror has no slack for an unverified block")
    require(server.metric("mirror_bytes") == mirror["bytes"], "/metrics and /props give other bytes of the mirror")
    return f"{draft['name']}, {mirror['dtype']}, {mirror['bytes']:,} bytes"


def chat(server: Server) -> str:
    answer = server.chat()
    message, timings, usage = answer.choices[0].message, answer.timings, answer.usage
    require(bool(message.content), "no text")
    require(set(timings) >= TIMINGS, f"timings are {timings}")
    require(timings["cache_n"] + timings["prompt_n"] == usage.prompt_tokens, f"{timings} against {usage}")
    require(0 <= timings["predicted_n"] - usage.completion_tokens <= 1, f"{timings} against {usage}")
    require(timings["draft_n_accepted"] <= timings["draft_n"], f"timings are {timings}")
    if server.props["drafting"]["on"]:
        require(timings["tau"] >= 1, f"tau is {timings['tau']}")
    return f"tau {timings['tau']:.2f}, {timings['predicted_per_second']:.1f} tok/s"


def chat_streamed(server: Server) -> str:
    server.chat()  # from here on the prompt is in the context
    whole = server.chat().choices[0]
    stream = server.chat(stream=True, stream_options={"include_usage": True})
    chunks = list(pieces(stream))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    require(text == whole.message.content, f"streamed {text!r}, whole {whole.message.content!r}")
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    require(reasons[-1] == whole.finish_reason, f"streamed {reasons[-1]}, whole {whole.finish_reason}")
    require(chunks[-1].usage is not None and not chunks[-1].choices, "no usage at the end")
    require(TIMINGS <= set(chunks[-1].timings), "the very last chunk has no timings")
    return f"{len(chunks)} chunks"


def completion(server: Server) -> str:
    whole = server.text()
    stream = server.client.completions.create(
        model=server.model, prompt="The capital of France is", max_tokens=24, temperature=0, stream=True
    )
    streamed = "".join(chunk.choices[0].text for chunk in pieces(stream))
    require(streamed == whole, f"streamed {streamed!r}, whole {whole!r}")
    ids = server.http.post("/extras/tokenize", json={"input": "The capital of France is"}).json()["tokens"]
    by_ids = server.client.completions.create(model=server.model, prompt=ids, max_tokens=24, temperature=0)
    require(by_ids.choices[0].text == whole, f"from token ids {by_ids.choices[0].text!r}, from text {whole!r}")
    return repr(whole[:40])


def tool_call(server: Server) -> str:
    choice = {"type": "function", "function": {"name": "get_weather"}}
    options: dict[str, Any] = {"tools": [TOOL], "tool_choice": choice, "max_tokens": 64}
    answer = server.chat("What is the weather in Paris for 3 days?", **options).choices[0]
    call = answer.message.tool_calls[0]
    require(call.function.name == "get_weather", f"called {call.function.name}")
    arguments = json.loads(call.function.arguments)
    _conforms(arguments)
    streamed = ""
    for chunk in pieces(server.chat("What is the weather in Paris for 3 days?", stream=True, **options)):
        for part in chunk.choices[0].delta.tool_calls or []:
            streamed += part.function.arguments or ""
    require(json.loads(streamed) == arguments, f"streamed {streamed!r}, whole {arguments}")
    required = server.chat("Weather in Paris?", **{**options, "tool_choice": "required"}).choices[0].message
    require(required.tool_calls[0].function.name == "get_weather", "tool_choice required called nothing")
    return call.function.arguments.strip()


def json_schema(server: Server) -> str:
    wanted = {"type": "json_schema", "json_schema": {"name": "weather", "schema": WEATHER, "strict": True}}
    answer = server.chat("Weather in Rome for 2 days, as JSON.", response_format=wanted, max_tokens=64)
    _conforms(json.loads(answer.choices[0].message.content))
    sampled = server.chat("Weather.", response_format=wanted, max_tokens=64, temperature=1.5, seed=1)
    _conforms(json.loads(sampled.choices[0].message.content))
    grammar = server.text(extra_body={"grammar": 'root ::= ("yes" | "no") "."'})
    require(grammar in ("yes.", "no."), f"the grammar let {grammar!r} through")
    return str(answer.choices[0].message.content).strip()


def _conforms(value: Any) -> None:
    good = isinstance(value, dict) and set(value) == {"city", "days"}
    require(good and isinstance(value["city"], str) and isinstance(value["days"], int), f"{value!r} breaks the schema")


def stop(server: Server) -> str:
    whole = server.settled("Count: one, two, three,", max_tokens=32)
    middle = len(whole) // 2
    word = whole[middle : middle + 3]
    for stops in (word, ["never said", word]):
        answer = server.client.completions.create(
            model=server.model, prompt="Count: one, two, three,", max_tokens=32, temperature=0, stop=stops
        )
        require(answer.choices[0].finish_reason == "stop", f"stop {word!r} in {whole!r} did not stop")
        require(
            answer.choices[0].text == whole[: whole.index(word)],
            f"{answer.choices[0].text!r} of {whole!r}, stop {word!r}",
        )
    stream = server.client.completions.create(
        model=server.model, prompt="Count: one, two, three,", max_tokens=32, temperature=0, stop=word, stream=True
    )
    streamed = "".join(chunk.choices[0].text for chunk in pieces(stream))
    require(streamed == whole[: whole.index(word)], f"streamed {streamed!r} of {whole!r}, stop {word!r}")
    return repr(word)


def seed(server: Server) -> str:
    server.settled("Once upon a time", temperature=1.0, seed=1, max_tokens=16)
    texts = {n: server.text("Once upon a time", temperature=1.0, seed=n, max_tokens=16) for n in (1, 2, 3)}
    again = server.text("Once upon a time", temperature=1.0, seed=1, max_tokens=16)
    require(again == texts[1], f"seed 1 gave {texts[1]!r}, then {again!r}")
    require(len(set(texts.values())) > 1, "three seeds, one text")
    unseeded = {server.text("Once upon a time", temperature=1.0, max_tokens=16) for _ in range(4)}
    require(len(unseeded) > 1, "without a seed the text is always the same")
    return f"{len(set(texts.values()))} texts of 3 seeds"


def long_prompt(server: Server) -> str:
    prompt = _text_of(server, min(server.n_ctx // 2, 1500))
    first = server.client.completions.create(model=server.model, prompt=prompt, max_tokens=8, temperature=0)
    again = server.client.completions.create(model=server.model, prompt=prompt, max_tokens=8, temperature=0)
    # Not necessarily the same text: llama.cpp may round a token that it evaluates alone otherwise than in a batch.
    require(bool(first.choices[0].text and again.choices[0].text), "no text")
    cached = again.timings["cache_n"]
    require(cached > 0, "nothing of a prompt that was just seen was reused")
    return f"{first.usage.prompt_tokens} tokens; {cached} cached the second time"


def concurrent(server: Server) -> str:
    """Texts are the same alone and among others, where both evaluated the prompt alike.

    A GPU rounds a token otherwise in another batch, so a text may be another one where more of its prompt was in the context, which
    "cache_n" tells. Hence prompts that begin unlike each other, with another between those alone and those together.
    """
    prompts = [f"{word} is a word that" for word in WORDS]

    def ask(prompt: str) -> Any:
        return server.client.completions.create(model=server.model, prompt=prompt, max_tokens=12, temperature=0)

    for _ in range(2):  # with a cache of prefixes, the second time begins as the third will
        alone = [ask(prompt) for prompt in prompts]
    ask("Quite another thing")
    slowest = 0.0
    with ThreadPoolExecutor(N_CONCURRENT) as pool:
        waiting = [pool.submit(ask, prompt) for prompt in prompts]
        while not all(one.done() for one in waiting):
            started = time.perf_counter()
            server.http.get("/health").raise_for_status()
            server.http.get("/metrics").raise_for_status()
            slowest = max(slowest, time.perf_counter() - started)
            time.sleep(0.05)
        together = [one.result() for one in waiting]
    alike = 0
    for prompt, one, other in zip(prompts, alone, together, strict=True):
        mine, its = one.choices[0].text, other.choices[0].text
        whole = other.choices[0].finish_reason in ("length", "stop") and (bool(its) or not mine)
        require(whole, f"{prompt!r}: {its!r} is no whole answer")
        if one.timings["cache_n"] == other.timings["cache_n"]:
            alike += 1
            require(mine == its, f"{prompt!r}: alone {mine!r}, among {N_CONCURRENT} {its!r}")
    require(2 * alike > N_CONCURRENT, f"only {alike} of {N_CONCURRENT} prompts were evaluated as they were alone")
    require(slowest < 2, f"/health and /metrics took {slowest:.1f} s meanwhile")
    return f"{N_CONCURRENT} at once, {alike} evaluated as alone: same texts; /health and /metrics within {slowest * 1e3:.0f} ms"


def disconnect(server: Server) -> str:
    prompt, block = "A long story: once", (server.props["draft"] or {"block_size": 1})["block_size"]
    server.settled(prompt, max_tokens=24)
    whole = server.client.completions.create(model=server.model, prompt=prompt, temperature=0, max_tokens=24)
    expected, step_s = whole.choices[0].text, whole.timings["predicted_ms"] / whole.timings["predicted_n"] / 1e3
    endless: dict[str, Any] = {
        "prompt": prompt,
        "temperature": 0.8,
        "max_tokens": server.n_ctx,
        "min_tokens": server.n_ctx,
    }
    # A step that was under way, the tokens that were on their way to the client, and half a second for the news to arrive.
    late = 2 * block + 0.5 / step_s

    before = server.metric("generated_tokens_total")
    with server.http.stream("POST", "/v1/completions", json={**endless, "stream": True}) as response:
        for read, _ in enumerate(response.iter_lines(), start=1):
            if read == 5:
                break
    waited = _until_idle(server)
    made = server.metric("generated_tokens_total") - before
    require(made <= read + late, f"{made:.0f} tokens were generated for a client that hung up after {read}")

    before, patience = before + made, 0.5 + 20 * step_s
    try:
        server.http.post("/v1/completions", json=endless, timeout=httpx.Timeout(600, read=patience))
        raise Skipped(f"{server.n_ctx} tokens are done before a client can hang up")
    except httpx.ReadTimeout:  # as meant: the connection is closed
        _until_idle(server)
    unread = server.metric("generated_tokens_total") - before
    require(
        unread <= patience / step_s * 2 + late,
        f"{unread:.0f} tokens were generated for a client that waited {patience:.1f} s",
    )

    again = server.text(prompt)
    require(again == expected, f"after a client hung up: {again!r}, before: {expected!r}")
    return f"hung up after {read} lines: {made:.0f} tokens, idle {waited * 1e3:.0f} ms later; unstreamed: {unread:.0f} tokens"


def wrong_key(server: Server) -> str:
    if not server.key:
        raise Skipped("the server has no key (--key)")
    for key in ("wrong", server.key[:-1], server.key + "x", ""):
        headers = {"Authorization": f"Bearer {key}"} if key else {"Authorization": ""}
        for path in ("/v1/models", "/metrics", "/props", "/docs"):
            response = server.http.get(path, headers=headers)
            require(response.status_code == 401, f"{path} with a wrong key: {response.status_code}")
    try:
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0).models.list()
    except openai.AuthenticationError as error:
        require(server.key not in str(error), "the answer has the key in it")
    else:
        raise Wrong("a wrong key was accepted")
    require(httpx.get(f"{server.url}/health").status_code == 200, "/health needs a key")
    return "401"


def malformed(server: Server) -> str:
    for path in ("/v1/completions", "/v1/chat/completions", "/extras/tokenize"):
        for body in (*MALFORMED, b'{"prompt": "\xff"}'):
            server.refused(path, body)
        server.refused(path, "a=b", headers={"Content-Type": "application/x-www-form-urlencoded"})
    return f"{3 * (len(MALFORMED) + 2)} bodies"


def absurd(server: Server) -> str:
    expected = server.text()
    base: dict[str, dict[str, Any]] = {
        "T": {"prompt": "Hello", "max_tokens": 4},
        "C": {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4, "tools": [TOOL]},
    }
    path = {"T": "/v1/completions", "C": "/v1/chat/completions"}
    asked = 0
    for field, value, routes in ABSURD:
        for route in routes:
            for stream in (False, True):
                server.refused(path[route], {**base[route], "stream": stream, field: value}, param=field)
                asked += 1
    require(server.text() == expected, "the next answer is another one than before")
    return f"{asked} requests"


def over_long_prompt(server: Server) -> str:
    prompt = _text_of(server, server.n_ctx + 1)
    for body in (prompt, prompt * 1000):
        for stream in (False, True):
            response = server.refused("/v1/completions", {"prompt": body, "stream": stream}, param="prompt")
            require(response.json()["error"]["code"] == "context_length_exceeded", response.text)
    try:
        server.chat(prompt)
    except openai.BadRequestError as error:
        require(error.code == "context_length_exceeded" and error.param == "messages", str(error))
        return str(error.body["message"])[:60]  # type: ignore[index]
    raise Wrong("a prompt that is longer than the context was answered")


def failed_generation(server: Server) -> str:
    """A grammar with a dead end: at once, and after two tokens."""
    body = {"prompt": "Hello", "max_tokens": 8, "grammar": 'root ::= "\\x00"'}
    for stream in (False, True):
        server.refused("/v1/completions", {**body, "stream": stream}, param="grammar")
    body["grammar"] = 'root ::= "ab" "c" "d" "\\x00"'
    server.refused("/v1/completions", body, param="grammar")
    try:
        for _ in server.client.completions.create(model=server.model, prompt="Hello", stream=True, extra_body=body):
            pass
    except openai.APIError as error:
        require("grammar" in str(error), str(error))
        return "HTTP error, or the stream's last event"
    raise Wrong("a generation that failed in mid-stream ended as if all were well")


def metrics_count(server: Server) -> str:
    names = ("generated_tokens_total", "drafted_tokens_total", "accepted_tokens_total", "prompt_tokens_total")
    before = {name: server.metric(name) for name in names}
    errors = server.metric("errors_total")
    timings = server.chat("Say something else.", max_tokens=20).timings
    server.refused("/v1/completions", {"prompt": 5})
    grown = {name: server.metric(name) - before[name] for name in names}
    expected = {
        "generated_tokens_total": timings["predicted_n"],
        "drafted_tokens_total": timings["draft_n"],
        "accepted_tokens_total": timings["draft_n_accepted"],
        "prompt_tokens_total": timings["prompt_n"] + timings["cache_n"],
    }
    require(grown == expected, f"/metrics grew by {grown}, the answer says {expected}")
    require(server.metric("errors_total") == errors + 1, "a refused request is not counted as an error")
    return f"{server.metric('generated_tokens_total'):.0f} tokens so far"


def _text_of(server: Server, n_tokens: int) -> str:
    """Text of at least so many tokens, without much repetition."""
    words = [f"word{i * 7919 % 10007}" for i in range(n_tokens)]
    low, high = 1, n_tokens
    while low < high:
        middle = (low + high) // 2
        count = server.http.post("/extras/tokenize/count", json={"input": " ".join(words[:middle])}).json()["count"]
        low, high = (low, middle) if count >= n_tokens else (middle + 1, high)
    return " ".join(words[:low])


def _until_idle(server: Server, timeout: float = 60) -> float:
    started = time.perf_counter()
    while server.metric("requests_running"):
        require(time.perf_counter() - started < timeout, "the server goes on for a client that hung up")
        time.sleep(0.01)
    return time.perf_counter() - started


CHECKS: list[Callable[[Server], str]] = [
    health_and_props,
    chat,
    chat_streamed,
    completion,
    tool_call,
    json_schema,
    stop,
    seed,
    long_prompt,
    concurrent,
    disconnect,
    wrong_key,
    malformed,
    absurd,
    over_long_prompt,
    failed_generation,
    metrics_count,
]


def run_check(check: Callable[[Server], str], server: Server) -> Outcome:
    started = time.perf_counter()
    ok: bool | None = True
    try:
        detail = check(server)
    except Skipped as reason:
        ok, detail = None, str(reason)
    except Exception as error:
        ok, detail = False, str(error) if isinstance(error, Wrong) else f"{type(error).__name__}: {error}"
    return Outcome(check.__name__, ok, detail, time.perf_counter() - started)


def main(
    url: Annotated[str, typer.Argument(help="As http://127.0.0.1:8000.")] = "http://127.0.0.1:8000",
    key: Annotated[str | None, typer.Option(help="Better in LLAMA_API_KEY.")] = None,
    only: Annotated[str | None, typer.Option(help="Comma-separated names of checks. Default: all.")] = None,
    json_file: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write the outcomes; -: to standard output.")
    ] = None,
) -> None:
    if json_file is not None:
        check_writable(json_file)
    known = {check.__name__: check for check in CHECKS}
    names = list(known) if only is None else only.split(",")
    unknown = [name for name in names if name not in known]
    if unknown:
        print(f"error: no check is called {', '.join(unknown)}; there are {', '.join(known)}", file=sys.stderr)
        raise typer.Exit(2)
    try:
        server = Server(url, key or os.environ.get("LLAMA_API_KEY"))
    except (httpx.HTTPError, openai.OpenAIError, KeyError, ValueError) as error:
        print(f"error: {url} does not answer as ggml-mirror serve does: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    outcomes = [run_check(known[name], server) for name in names]
    failed = [one.name for one in outcomes if one.ok is False]
    if json_file is not None:
        report = {
            "url": server.url,
            "ok": not failed,
            "props": server.props,
            "checks": [asdict(one) for one in outcomes],
        }
        write_json(report, json_file)
    if json_file != STDOUT:
        _print(outcomes, server)
    raise typer.Exit(1 if failed else 0)


def _print(outcomes: list[Outcome], server: Server) -> None:
    table = Table(title=f"{server.model} on {server.url}", box=box.SIMPLE, title_justify="left")
    table.add_column("check")
    table.add_column("")
    table.add_column("s", justify="right")
    table.add_column("found", overflow="fold")
    words = {True: "[green]good[/]", False: "[red]wrong[/]", None: "[yellow]skipped[/]"}
    for one in outcomes:
        table.add_row(one.name, words[one.ok], f"{one.seconds:.1f}", one.detail.replace("[", r"\["))
    make_console().print(table)


if __name__ == "__main__":
    typer.run(main)
