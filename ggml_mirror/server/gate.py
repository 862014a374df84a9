"""The gate before llama_cpp.server's application: requests enter checked and one at a time, answers leave with timings or as errors.

An application of its own kind of ASGI around the other's. It reads the whole body, has it checked, waits for its turn, and runs the
application on what :mod:`.checks` made of it. Of the answer it holds back the status until there is something to answer with: a stream
that fails before its first token is an HTTP error. What the application sends is buffered, so that a client that reads slowly keeps
nobody waiting; one that hangs up ends its generation at the next token.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from contextlib import suppress
from typing import Any

import anyio
from anyio import to_thread

from .body import parse
from .checks import GENERATING, ROUTES, TOKENIZING, Checked, check
from .errors import RequestError, as_request_error, gone
from .facts import ModelFacts
from .hooks import ServedProxy
from .patience import Patience
from .request import ServedRequest, current
from .turns import Turns

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_EVENT_STREAM = b"text/event-stream"
_DONE = b"data: [DONE]\n\n"


class Gate:
    """ASGI application.

    Args:
        app: llama_cpp.server's.
        facts: of each model that has been loaded, by alias.
        max_body: bytes.
        patience: for a client to send its request, and for each pause in taking the answer.
    """

    def __init__(
        self,
        app: App,
        proxy: ServedProxy,
        facts: Mapping[str, ModelFacts],
        turns: Turns,
        *,
        max_body: int,
        patience: Patience,
    ) -> None:
        self.app = app
        self.proxy = proxy
        self.facts = facts
        self.turns = turns
        self.max_body = max_body
        self.patience = patience

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or raise the RequestError that says why not: nothing has been sent then."""
        request: ServedRequest = scope["ggml_mirror.request"]
        route = request.path
        if scope["method"] != "POST" or route not in ROUTES:
            await self.app(scope, receive, send)
            return
        raw = await self._read(scope, receive)
        body = await to_thread.run_sync(parse, raw)
        alias = self.proxy.alias_of(body.get("model"))
        facts = self.facts.get(alias)
        if facts is None:
            async with self.turns.turn(request):
                await to_thread.run_sync(self.proxy, alias)
            facts = self.facts[alias]
        checked = await to_thread.run_sync(check, route, body, facts)
        request.stream, request.seed, request.prompt_tokens = checked.stream, checked.seed, checked.prompt_tokens
        request.grammar_param = checked.grammar_param
        if (
            route in TOKENIZING and len(self.facts) == 1
        ):  # the vocabulary needs no turn, unless its model may be exchanged
            if checked.text is not None:
                request.tokenized = await to_thread.run_sync(self._tokenize, checked.text)
            await self._run(scope, checked, request, send)
        else:
            await self._take_turn(scope, receive, send, request, checked, alias)

    async def _take_turn(
        self, scope: Scope, receive: Receive, send: Send, request: ServedRequest, checked: Checked, alias: str
    ) -> None:
        failure: Exception | None = None
        async with anyio.create_task_group() as group:
            outbox = _Outbox(send, self.patience, request)
            group.start_soon(self._watch, receive, request)
            group.start_soon(outbox.deliver)
            try:
                async with self.turns.turn(request):
                    if not self.proxy.is_loaded(alias):
                        await to_thread.run_sync(self.proxy, alias)
                    await self._run(scope, checked, request, outbox.put)
            except Exception as error:
                failure = error
            await outbox.close()
            group.cancel_scope.cancel()
        if failure is not None:
            raise failure

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        headers: dict[bytes, bytes] = dict(scope["headers"])
        if headers.get(b"content-type", b"").split(b";")[0].strip().lower() != b"application/json":
            raise RequestError("the body must be sent as Content-Type: application/json", status=415)
        length = headers.get(b"content-length", b"0")
        parts: list[bytes] = []
        size = int(length) if length.isdigit() else 0
        received = 0
        with self.patience.wait() as waited:
            while True:
                if max(size, received) > self.max_body:
                    raise RequestError(
                        f"the body has more than {self.max_body} bytes (--max-body)", status=413, code="body_too_large"
                    )
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise gone()
                parts.append(message.get("body", b""))
                received += len(parts[-1])
                if not message.get("more_body"):
                    break
        if waited.cancelled_caught:
            raise RequestError(f"the body did not arrive within {self.patience.seconds:g} s (--timeout)", status=408)
        return b"".join(parts)

    def _tokenize(self, text: str) -> tuple[bytes, list[int]]:
        llm = self.proxy.current
        assert llm is not None
        encoded = text.encode()
        return encoded, llm.tokenize(encoded, special=True)

    @staticmethod
    async def _watch(receive: Receive, request: ServedRequest) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        request.cancel(gone())

    async def _run(self, scope: Scope, checked: Checked, request: ServedRequest, send: Send) -> None:
        """Run the application on what was checked; whatever it left open is closed before this returns."""
        content = json.dumps(checked.body).encode()
        headers = [
            (name, value) for name, value in scope["headers"] if name not in (b"content-length", b"transfer-encoding")
        ]
        headers.append((b"content-length", str(len(content)).encode()))
        sent = False

        async def replay() -> Message:
            nonlocal sent
            if sent:
                await anyio.sleep_forever()  # it is this gate that watches for the client's hanging up
            sent = True
            return {"type": "http.request", "body": content, "more_body": False}

        answer = _Answer(send, request, checked.include_usage)
        token = current.set(request)
        try:
            await self.app({**scope, "headers": headers}, replay, answer.take)
            await answer.finish()
        except Exception as error:
            request.failure = error
            await answer.fail(error)
        finally:
            current.reset(token)
            with anyio.CancelScope(shield=True):
                await to_thread.run_sync(request.close)


class _Answer:
    """What the application answers: held back until it is known to be one, then passed on with timings."""

    def __init__(self, send: Send, request: ServedRequest, include_usage: bool) -> None:
        self._send = send
        self._request = request
        self._include_usage = include_usage
        self._start: Message | None = None  # held back
        self._streams = False
        self._begun = False  # the status has left
        self._body: list[bytes] = []
        self._last: dict[str, Any] = {}

    async def take(self, message: Message) -> None:
        """The application's ``send``."""
        if message["type"] == "http.response.start":
            self._start = message
            self._streams = _header(message, b"content-type").startswith(_EVENT_STREAM)
            return
        body = message.get("body", b"")
        if not self._streams:
            self._body.append(body)
        elif body.startswith(b"data:"):
            await self._pass_on(body)
        elif body and self._begun:
            await self._send({"type": "http.response.body", "body": body, "more_body": True})  # a ping

    async def finish(self) -> None:
        """The application has returned."""
        if self._streams and self._begun:
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})
            return
        if self._start is None or self._streams:
            raise RuntimeError("the application ended without an answer")
        if self._request.failure is not None:
            raise self._request.failure  # the application has made an answer of it, but not all of one
        status, content = self._start["status"], b"".join(self._body)
        if status < 400 and self._request.path in GENERATING:
            answer = json.loads(content)
            answer["timings"] = self._request.timings()
            if isinstance(answer.get("usage"), dict):
                answer["usage"] = {**self._request.usage(), **answer["usage"]}
            content = json.dumps(answer, ensure_ascii=False, separators=(",", ":")).encode()
        headers = [(name, value) for name, value in self._start["headers"] if name.lower() != b"content-length"]
        headers.append((b"content-length", str(len(content)).encode()))
        await self._send({**self._start, "headers": headers})
        await self._send({"type": "http.response.body", "body": content, "more_body": False})

    async def fail(self, error: Exception) -> None:
        """The application has raised. Before the status left, the caller answers; after that, an error is the stream's last event."""
        if not self._begun:
            raise error
        told = as_request_error(error, param=self._request.prompt_param)
        await self._send({"type": "http.response.body", "body": _event(told.body()), "more_body": False})

    async def _pass_on(self, body: bytes) -> None:
        if not self._begun:
            assert self._start is not None
            self._begun = True
            await self._send(self._start)
        if body != _DONE:
            chunk = json.loads(body[len(b"data:") :])
            self._last = chunk
            if any(choice.get("finish_reason") for choice in chunk.get("choices", [])):
                chunk["timings"] = self._request.timings()
                body = _event(chunk)
        elif self._include_usage:
            names = ("id", "object", "created", "model")
            last: dict[str, Any] = {name: self._last[name] for name in names if name in self._last}
            last |= {"choices": [], "usage": self._request.usage(), "timings": self._request.timings()}
            body = _event(last) + body
        await self._send({"type": "http.response.body", "body": body, "more_body": True})


class _Outbox:
    """Takes an answer as fast as it is made and delivers it as fast as the client takes it."""

    def __init__(self, send: Send, patience: Patience, request: ServedRequest) -> None:
        self._send = send
        self._patience = patience
        self._request = request
        self._in, self._out = anyio.create_memory_object_stream[Message](float("inf"))
        self._delivered = anyio.Event()

    async def put(self, message: Message) -> None:
        with suppress(anyio.BrokenResourceError):  # nobody is there any more
            self._in.send_nowait(message)

    async def deliver(self) -> None:
        try:
            async with self._out:
                async for message in self._out:
                    with self._patience.wait() as waited:
                        await self._send(message)
                    if waited.cancelled_caught:
                        self._request.cancel(gone(f"the client took nothing for {self._patience.seconds:g} s"))
                        return
        except OSError:
            self._request.cancel(gone())
        finally:
            self._delivered.set()

    async def close(self) -> None:
        """Wait until everything is delivered, or cannot be."""
        self._in.close()
        await self._delivered.wait()


def _header(message: Message, name: bytes) -> bytes:
    return next((bytes(value) for key, value in message["headers"] if key.lower() == name), b"")


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(content).encode() + b"\n\n"
