"""The one place where llama_cpp.server is reached into. tests/server/test_hooks.py fails if llama-cpp-python changes what is relied on.

1. ``llama_cpp.server.model`` makes models with its module's ``llama_cpp.Llama``: while one is loaded, that is a class of ours.
2. ``llama_cpp.server.app.create_app`` makes a ``LlamaProxy``: while it runs, that is one of ours.
3. Its routes turn exceptions into answers with ``RouteErrorHandler.error_message_wrapper``: for a request of ours, that is done here.
4. Its routes for models and tokens wait for the lock under which text is generated, by the dependency ``get_llama_proxy``: they need not.

Another application of llama_cpp.server in this process is as it was.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import llama_cpp
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from llama_cpp.server.errors import RouteErrorHandler
from llama_cpp.server.model import LlamaProxy
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.cors import CORSMiddleware

from ..llama_log import explained
from .errors import RequestError, as_request_error
from .model import Served, served_class
from .request import current
from .settings import CONFIG_VARIABLE, ServedModelSettings

if TYPE_CHECKING:
    from llama_cpp.server.settings import ServerSettings

# What is reached into is not declared to be anyone's to change.
app_module: Any = importlib.import_module("llama_cpp.server.app")
model_module: Any = importlib.import_module("llama_cpp.server.model")


class _LlamaCpp:
    """The module ``llama_cpp`` with another ``Llama``."""

    def __init__(self, cls: type[Served]) -> None:
        self.Llama = cls

    def __getattr__(self, name: str) -> Any:
        return getattr(llama_cpp, name)


class ServedProxy(LlamaProxy):
    """Loads models of our class, one at a time; another that is named takes the place of the one that is loaded.

    Attributes:
        on_load: called with each model that was loaded, before it serves.
        cache_ram: bytes that a cache of it may take.
    """

    on_load: Callable[[Served], None]
    cache_ram: int

    def load_llama_from_model_settings(self, settings: ServedModelSettings) -> Served:  # type: ignore[override]
        real = model_module.llama_cpp
        model_module.llama_cpp = _LlamaCpp(served_class(settings, self.cache_ram))
        try:
            with explained(settings.model, settings.n_ctx, verbose=settings.verbose):
                llm: Any = LlamaProxy.load_llama_from_model_settings(settings)
        finally:
            model_module.llama_cpp = real
        try:
            self.on_load(llm)
        except BaseException:
            llm.close()
            raise
        assert isinstance(llm, Served)
        return llm

    @property
    def aliases(self) -> list[str]:
        return list(self)

    @property
    def current(self) -> Served | None:
        """The model that is loaded."""
        llm: Any = self._current_model
        return llm if isinstance(llm, Served) else None

    def alias_of(self, name: Any) -> str:
        """Which model answers to a name. A server with one model answers to any, as llama-server does.

        Raises:
            RequestError: there are several, and none of that name.
        """
        aliases = self.aliases
        if not isinstance(name, str | None):
            raise RequestError("model: a name was expected", param="model")
        if name is None or len(aliases) == 1:
            return aliases[0]
        if name not in aliases:
            raise RequestError(
                f"model: there is no {name[:200]!r}; this server has {', '.join(aliases)}",
                status=404,
                param="model",
                code="model_not_found",
            )
        return name

    def is_loaded(self, alias: str) -> bool:
        return self._current_model is not None and self._current_model_alias == alias


def create_app(
    server: ServerSettings, models: list[ServedModelSettings], on_load: Callable[[Served], None], *, cache_ram: int = 0
) -> tuple[FastAPI, ServedProxy]:
    """llama_cpp.server's application over models of ours. Loads the first."""

    def proxy(models: list[ServedModelSettings]) -> ServedProxy:
        made = ServedProxy.__new__(ServedProxy)
        made.on_load, made.cache_ram = on_load, cache_ram
        made.__init__(models)  # type: ignore[misc]
        return made

    with _replaced(app_module, "LlamaProxy", proxy), _without_variable(CONFIG_VARIABLE):
        app: FastAPI = app_module.create_app(server_settings=server, model_settings=models)
    made: ServedProxy = app_module._llama_proxy

    async def unlocked() -> AsyncIterator[ServedProxy]:
        yield made

    app.dependency_overrides[app_module.get_llama_proxy] = unlocked
    # It lets pages of any origin in, with credentials; ours stands around the whole server.
    theirs: list[Any] = app.user_middleware
    app.user_middleware = [middleware for middleware in theirs if middleware.cls is not CORSMiddleware]
    app.add_exception_handler(StarletteHTTPException, _of_http)
    app.add_exception_handler(RequestValidationError, _of_validation)
    return app, made


def _explain(handler: RouteErrorHandler, error: Exception, body: Any = None) -> tuple[int, dict[str, Any]]:
    request = current.get()
    if request is None:
        told: tuple[int, dict[str, Any]] = _explain_as_llama_cpp(handler, error, body)
        return told
    request.failure = error
    explained = as_request_error(error, param=request.prompt_param)
    return explained.status, explained.body()["error"]


_explain_as_llama_cpp: Any = RouteErrorHandler.error_message_wrapper
RouteErrorHandler.error_message_wrapper = _explain  # type: ignore[assignment, method-assign]


async def _of_http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException | StarletteHTTPException)
    told = RequestError(str(error.detail), status=error.status_code)
    return JSONResponse(told.body(), error.status_code, headers=error.headers)


async def _of_validation(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    from .body import of_validation_error

    told = of_validation_error(error.errors())
    return JSONResponse(told.body(), told.status)


@contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    real = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, real)


@contextmanager
def _without_variable(name: str) -> Iterator[None]:
    """create_app would read the file once more, and as llama_cpp.server's."""
    value = os.environ.pop(name, None)
    try:
        yield
    finally:
        if value is not None:
            os.environ[name] = value
