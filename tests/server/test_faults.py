"""Generations that fail: an HTTP status before the first token, the stream's last event after it; the next answer is right."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from ggml_mirror.errors import BackendError
from ggml_mirror.server.front import Front, Keys
from ggml_mirror.server.gate import Gate
from ggml_mirror.server.hooks import create_app
from ggml_mirror.server.model import ServedDFlashLlama
from ggml_mirror.server.patience import Patience
from ggml_mirror.server.settings import ServeConfig, read_settings
from ggml_mirror.server.state import ServerState

BODY = {"prompt": "Hello", "max_tokens": 24, "temperature": 0}


@pytest.fixture(scope="module")
def served(tiny: tuple[Path, Path]) -> Iterator[tuple[TestClient, ServedDFlashLlama]]:
    """The whole server but for its sockets, in this process, so that its model can be made to fail."""
    fields = {"model": str(tiny[0]), "model_draft": str(tiny[1]), "n_threads": 1, "n_threads_batch": 1, "n_batch": 32}
    config = ServeConfig(*read_settings(fields))
    state = ServerState(config)
    front = Front(state, Keys([]))
    app, proxy = create_app(config.server, config.models, state.loaded)
    front.inner = Gate(app, proxy, state.facts, state.turns, max_body=1 << 20, patience=Patience(60))
    llm = proxy.current
    assert isinstance(llm, ServedDFlashLlama)
    yield TestClient(front), llm
    proxy.free()


def failing(function: Callable[..., Any], at: int, error: Exception) -> Callable[..., Any]:
    """The function, whose call number ``at`` (from 0) fails."""
    calls = count()

    def wrapped(*arguments: Any, **options: Any) -> Any:
        if next(calls) == at:
            raise error
        return function(*arguments, **options)

    return wrapped


def errors(client: TestClient, kind: str) -> float:
    text = client.get("/metrics").text
    return sum(
        float(line.split()[-1])
        for line in text.splitlines()
        if line.startswith(f'ggml_mirror_errors_total{{type="{kind}"}}')
    )


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_before_the_first_token(
    stream: bool,
    served: tuple[TestClient, ServedDFlashLlama],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    client, llm = served
    expected = client.post("/v1/completions", json=BODY).json()["choices"]
    before = errors(client, "RuntimeError")
    with monkeypatch.context() as m:
        m.setattr(llm._ctx, "decode", failing(llm._ctx.decode, 0, RuntimeError("llama_decode returned -3")))
        response = client.post("/v1/completions", json={**BODY, "prompt": "Hello again", "stream": stream})
    assert response.status_code == 500 and response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert error["type"] == "server_error" and "llama_decode returned -3" in error["message"]
    assert errors(client, "RuntimeError") == before + 1
    assert client.post("/v1/completions", json=BODY).json()["choices"] == expected


@pytest.mark.parametrize("route", ["/v1/completions", "/v1/chat/completions"])
def test_after_the_first_token(
    route: str, served: tuple[TestClient, ServedDFlashLlama], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, llm = served
    body: dict[str, Any] = {"max_tokens": 24, "temperature": 0, "prompt": "Hello"}
    if "chat" in route:
        body["messages"] = [{"role": "user", "content": "Hello"}]
    expected = client.post(route, json=body).json()["choices"]
    for stream in (False, True):
        with monkeypatch.context() as m:
            m.setattr(llm.draft, "step", failing(llm.draft.step, 2, BackendError("the device is gone")))
            response = client.post(route, json={**body, "stream": stream})
        if stream:
            assert response.status_code == 200
            *chunks, last = [json.loads(event[6:]) for event in response.text.split("\n\n") if event]
            assert chunks and all("error" not in chunk for chunk in chunks)
            assert last["error"]["code"] == "BackendError" and "the device is gone" in last["error"]["message"]
            assert "[DONE]" not in response.text
        else:
            assert response.status_code == 500 and response.json()["error"]["code"] == "BackendError"
        assert client.post(route, json=body).json()["choices"] == expected


def test_no_memory_is_worth_another_try(
    served: tuple[TestClient, ServedDFlashLlama], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, llm = served
    with monkeypatch.context() as m:
        m.setattr(llm.draft, "step", failing(llm.draft.step, 0, MemoryError("12345 bytes")))
        response = client.post("/v1/completions", json=BODY)
    assert response.status_code == 503 and response.headers["Retry-After"] == "1"
    assert response.json()["error"]["code"] == "out_of_memory"


def test_messages_that_the_template_refuses(
    served: tuple[TestClient, ServedDFlashLlama], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, llm = served
    from ggml_mirror.server.model import _check_chat_format

    def refusing(**arguments: Any) -> Any:
        raise ValueError("Conversation roles must alternate user/assistant")

    monkeypatch.setattr(llm, "chat_handler", refusing)
    _check_chat_format(llm)
    for stream in (False, True):
        response = client.post(
            "/v1/chat/completions", json={"messages": [{"role": "user", "content": "x"}], "stream": stream}
        )
        assert response.status_code == 400 and response.json()["error"]["param"] == "messages"
        assert "must alternate" in response.json()["error"]["message"]


def test_a_cancelled_prompt_ends_between_batches(
    served: tuple[TestClient, ServedDFlashLlama], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tokens that were evaluated stay in the context: the same prompt goes on from there."""
    client, llm = served
    from ggml_mirror.server.errors import gone
    from ggml_mirror.server.request import ServedRequest, current

    request = ServedRequest(id="x", path="/v1/completions")
    evaluated: list[int] = []
    real = llm._ctx.decode

    def decode(batch: Any) -> None:
        real(batch)
        evaluated.append(batch.n_tokens())
        if len(evaluated) == 2:
            request.cancel(gone())

    with monkeypatch.context() as m:
        m.setattr(llm._ctx, "decode", decode)
        token = current.set(request)
        with pytest.raises(Exception, match="hung up"):
            llm.create_completion("abcdefgh" * 40, max_tokens=4)
        current.reset(token)
    assert len(evaluated) == 2 and sum(evaluated) <= 64
    answer = client.post("/v1/completions", json={"prompt": "abcdefgh" * 40, "max_tokens": 4}).json()
    assert answer["timings"]["cache_n"] == sum(evaluated) + 1  # the start token was there before
