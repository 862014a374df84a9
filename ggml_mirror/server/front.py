"""The outermost application: keys, health, props, metrics, and one log line per request. It answers while a model loads or generates."""

from __future__ import annotations

import hashlib
import hmac
import logging
import time
import uuid
from collections.abc import Sequence
from typing import Any

from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response

from .checks import ROUTES
from .errors import RequestError, as_request_error, shutting_down
from .gate import App, Message, Receive, Scope, Send
from .log import log_request
from .metrics import Metrics
from .request import ServedRequest
from .state import ServerState

log = logging.getLogger("ggml_mirror.server")

#: Need no key, as in llama-server.
_PUBLIC = ("/health", "/v1/health")
_QUIET = (*_PUBLIC, "/metrics", "/props")  # polled; logged with --verbose only

#: Paths that are labels of metrics; all else, which a client may choose freely, is "other".
_COUNTED = frozenset((*ROUTES, *_QUIET, "/v1/models"))

_REQUEST_ID = b"x-request-id"
_LOCAL_ORIGIN = r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?"


class Keys:
    """The keys that open the server, kept as hashes. No key: it is open."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._hashes = [_hash(key.encode()) for key in keys]

    def open_for(self, headers: dict[bytes, bytes]) -> bool:
        """Does a request carry one of the keys? As ``Authorization: Bearer KEY`` or ``X-Api-Key: KEY``."""
        if not self._hashes:
            return True
        scheme, _, bearer = headers.get(b"authorization", b"").partition(b" ")
        given = bearer.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")
        hashed = _hash(given)
        # All are compared, each in constant time: neither a key nor its place shows in the time that it takes.
        return any([hmac.compare_digest(hashed, known) for known in self._hashes])


class Front:
    """ASGI application.

    Attributes:
        inner: the gate; None while the first model loads.
    """

    def __init__(self, state: ServerState, keys: Keys, root_path: str = "") -> None:
        self.state = state
        self.metrics = Metrics(state)
        self.inner: App | None = None
        self._keys = keys
        self._root_path = root_path.rstrip("/")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return  # uvicorn's lifespan is off, and there are no websockets
        path = str(scope["path"]).removeprefix(self._root_path) or "/"
        request = ServedRequest(id=_request_id(scope), path=path)
        scope["ggml_mirror.request"] = request
        account = _Account(request, scope, self.metrics)

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                account.status = message["status"]
                headers = [header for header in message["headers"] if header[0].lower() != _REQUEST_ID]
                message = {**message, "headers": [*headers, (_REQUEST_ID, request.id.encode())]}
            elif not message.get("more_body"):
                account.close()  # before the client knows that it has all: who reads the metrics then finds this request in them
            await send(message)

        try:
            await self._answer(path, request, scope, receive, watched)
        except Exception as error:
            request.failure = error
            if account.status == 0:
                await _of_error(as_request_error(error, param=request.prompt_param))(scope, receive, watched)
        account.close()

    async def _answer(self, path: str, request: ServedRequest, scope: Scope, receive: Receive, send: Send) -> None:
        if path in _PUBLIC:
            await self._health()(scope, receive, send)
            return
        if not self._keys.open_for(dict(scope["headers"])):
            raise RequestError("this server needs a key: Authorization: Bearer KEY", status=401, code="invalid_api_key")
        if path == "/metrics":
            content_type = "text/plain; version=0.0.4; charset=utf-8"
            await Response(self.metrics.text(), media_type=content_type)(scope, receive, send)
        elif path == "/props":
            await self._props()(scope, receive, send)
        elif self.state.draining:
            raise shutting_down()
        elif self.inner is None:
            raise self._unavailable()
        else:
            await self.inner(scope, receive, send)

    def _unavailable(self) -> RequestError:
        return RequestError(f"not ready: {self.state.not_ready}", status=503, code="not_ready", retry_after=1)

    def _health(self) -> Response:
        if self.state.draining:
            return _of_error(shutting_down())
        if self.state.not_ready is not None:
            return _of_error(self._unavailable())
        return JSONResponse({"status": "ok"})

    def _props(self) -> Response:
        if self.state.card is None:
            return _of_error(self._unavailable())
        return JSONResponse(self.state.card.to_json())


class _Account:
    """What is said of a request when its answer is complete, once: in the metrics and in the log."""

    def __init__(self, request: ServedRequest, scope: Scope, metrics: Metrics) -> None:
        self.status = 0
        self._request = request
        self._scope = scope
        self._metrics = metrics
        self._closed = False

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        request = self._request
        failure = request.failure
        error = None if failure is None else as_request_error(failure, param=request.prompt_param)
        seconds = time.perf_counter() - request.began
        known = request.path if request.path in _COUNTED else "other"
        self._metrics.observe(request, known, self.status, None if error is None else error.code or error.type, seconds)
        log_request(request, self._scope, self.status, error, seconds, quiet=request.path in _QUIET)


def with_cors(app: Front, origins: str) -> Any:
    """The application for browsers: pages of ``origins`` may call it; "localhost": of this machine, "*": any, as in llama-server."""
    where: dict[str, Any] = {"allow_origins": [origin.strip() for origin in origins.split(",") if origin.strip()]}
    if origins == "localhost":
        where = {"allow_origin_regex": _LOCAL_ORIGIN}
    return CORSMiddleware(app, allow_methods=["*"], allow_headers=["*"], **where)


def _request_id(scope: Scope) -> str:
    """The client's X-Request-ID if that is a UUID, else one of our own. The application is shown only what it takes."""
    given = dict(scope["headers"]).get(_REQUEST_ID, b"")
    try:
        made = uuid.UUID(given.decode("ascii"))
    except ValueError:
        made = uuid.uuid4()
    headers = [header for header in scope["headers"] if header[0] != _REQUEST_ID]
    scope["headers"] = [*headers, (_REQUEST_ID, made.hex.encode())]
    return made.hex


def _of_error(error: RequestError) -> JSONResponse:
    headers = {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    return JSONResponse(error.body(), error.status, headers=headers)


def _hash(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
