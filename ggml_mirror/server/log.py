"""The server's log, on standard error: one line per request, as text or as JSON. No line holds a key or a word of a prompt."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

from ..budget import Budget
from ..budget_report import print_budget
from ..report import make_console
from .errors import RequestError
from .request import ServedRequest

_LOG = logging.getLogger("ggml_mirror.server")
_FIELDS = "ggml_mirror_fields"


def start_log(*, as_json: bool, verbose: bool) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if as_json else _Text())
    for name, level in (
        ("ggml_mirror.server", logging.DEBUG if verbose else logging.INFO),
        ("uvicorn", logging.ERROR),
    ):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(level)
        logger.propagate = False


def log_budget(budget: Budget) -> None:
    """A table where people read, an event where programs do."""
    if not _LOG.handlers:
        return
    if isinstance(_LOG.handlers[0].formatter, _Json):
        _LOG.info("budget", extra={_FIELDS: budget.to_json()})
    else:
        print_budget(budget, make_console(stderr=True))


def log_request(
    request: ServedRequest, scope: Any, status: int, error: RequestError | None, seconds: float, *, quiet: bool
) -> None:
    fields: dict[str, Any] = {
        "id": request.id,
        "client": _client(scope),
        "method": scope["method"],
        "path": request.path,
        "status": status,
        "ms": round(seconds * 1e3, 1),
    }
    if request.generations:
        timings = request.timings()
        fields |= {
            "stream": request.stream,
            "queue_ms": round(request.queue_s * 1e3, 1),
            **{name: value for name, value in timings.items() if not name.endswith("_per_token_ms")},
        }
    if error is not None:
        fields |= {"error": error.code or error.type, "message": str(error)}
    level = logging.ERROR if status >= 500 and status != 503 else logging.DEBUG if quiet else logging.INFO
    trace = request.failure if error is not None and error.status == 500 else None
    _LOG.log(level, "request", extra={_FIELDS: fields}, exc_info=trace)


def _client(scope: Any) -> str:
    client = scope.get("client")
    return f"{client[0]}:{client[1]}" if client else "-"


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = getattr(record, _FIELDS, {})
        words = [f"{name}={_word(value)}" for name, value in fields.items()]
        moment = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
        line = " ".join([moment, record.levelname, record.getMessage(), *words])
        return (
            line
            if record.exc_info is None or not record.exc_info[1]
            else f"{line}\n{self.formatException(record.exc_info)}"
        )


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        line = {"time": moment, "level": record.levelname.lower(), "event": record.getMessage()}
        line |= getattr(record, _FIELDS, {})
        if record.exc_info is not None and record.exc_info[1]:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line)


def _word(value: Any) -> str:
    """A value on a line: whatever a client sent, it is one word or quoted."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if text and text.isprintable() and not set(text) & {" ", '"', "="} else json.dumps(text)
