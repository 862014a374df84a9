"""The seams in llama_cpp.server: these fail when llama-cpp-python changes what hooks.py relies on."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

import llama_cpp
import llama_cpp.server.app as app_module
import llama_cpp.server.model as model_module
import pytest
from llama_cpp import Llama
from llama_cpp.server.errors import RouteErrorHandler
from starlette.testclient import TestClient

from ggml_mirror.server.checks import ROUTES
from ggml_mirror.server.hooks import ServedProxy, create_app
from ggml_mirror.server.model import Served, ServedDFlashLlama, ServedLlama
from ggml_mirror.server.settings import read_settings

THREADS = {"n_threads": 1, "n_threads_batch": 1}


def test_the_model_is_ours_and_nothing_else_is_changed(
    tiny: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    server, models = read_settings({**THREADS, "model": str(tiny[0]), "model_draft": str(tiny[1])})
    monkeypatch.setenv("CONFIG_FILE", str(tmp_path / "nowhere"))  # create_app would read it
    before = (model_module.llama_cpp, model_module.llama_cpp.Llama, app_module.LlamaProxy)
    loaded: list[Served] = []
    app, proxy = create_app(server, models, loaded.append)
    assert (model_module.llama_cpp, model_module.llama_cpp.Llama, app_module.LlamaProxy) == before
    assert before[0] is llama_cpp and before[1] is Llama
    assert os.environ["CONFIG_FILE"] == str(tmp_path / "nowhere")
    assert isinstance(proxy, ServedProxy) and [proxy.current] == loaded
    llm = proxy.current
    assert isinstance(llm, ServedDFlashLlama) and llm.settings is models[0] and llm.n_ctx() == 2048
    with TestClient(app) as client:
        answer = client.post("/v1/completions", json={"prompt": "Hello", "max_tokens": 4}).json()
    assert len(answer["choices"]) == 1 and llm.stats.tokens == 4 and llm.stats.draft_steps > 0
    proxy.free()


def test_routes_that_are_checked_are_those_that_there_are() -> None:
    posts = {
        route.path: route
        for route in app_module.router.routes
        if isinstance(route, RouteErrorHandler) and "POST" in route.methods
    }
    assert set(posts) == set(ROUTES)
    for path, route in posts.items():
        assert route.body_field is not None
        assert ROUTES[path].__name__ in str(inspect.signature(route.endpoint)), path


def test_methods_that_are_overridden_are_those_that_are_called() -> None:
    """Signatures, and that llama_cpp.server reaches text by create_completion, which reaches it by generate and eval."""
    for name in ("create_completion", "generate", "eval", "tokenize", "detokenize", "_init_sampler"):
        assert hasattr(Llama, name) and name in vars(Served), name
    assert "self.create_completion(" in inspect.getsource(Llama.__call__)
    assert "self.generate(" in inspect.getsource(Llama._create_completion)
    assert "self.eval(" in inspect.getsource(Llama.generate)
    assert "self.chat_handler" in inspect.getsource(Llama.create_chat_completion)
    assert "llama_cpp.Llama" in inspect.getsource(model_module.LlamaProxy.load_llama_from_model_settings)
    parameters = inspect.signature(RouteErrorHandler.error_message_wrapper).parameters
    assert len(parameters) == 3


def test_errors_of_another_application_are_explained_by_llama_cpp() -> None:
    handler: Any = RouteErrorHandler.__new__(RouteErrorHandler)
    status, told = handler.error_message_wrapper(error=ValueError("something"))
    assert status == 500 and told["type"] == "internal_server_error"


def test_models_are_exchanged(tiny: tuple[Path, Path]) -> None:
    target, draft = map(str, tiny)
    server, (first,) = read_settings({**THREADS, "model": target, "model_draft": draft, "model_alias": "drafted"})
    _, (second,) = read_settings({**THREADS, "model": target, "model_alias": "plain"})
    loaded: list[Served] = []
    _, proxy = create_app(server, [first, second], loaded.append)
    assert proxy.is_loaded("drafted") and proxy.aliases == ["drafted", "plain"]
    assert isinstance(proxy("plain"), ServedLlama) and proxy.is_loaded("plain")
    assert loaded[0]._ctx.ctx is None, "the first was not closed"
    assert isinstance(proxy("drafted"), ServedDFlashLlama)
    proxy.free()
