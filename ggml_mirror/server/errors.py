"""What goes wrong with a request, and how a client is told: OpenAI's error object and an HTTP status."""

from __future__ import annotations

import re
from typing import Any

from ..errors import GgmlMirrorError

#: Of OpenAI's error types, by status; any other 4xx is an invalid request.
_TYPES = {401: "authentication_error", 404: "not_found_error", 499: "client_closed_request", 503: "unavailable_error"}

_TOO_LONG = re.compile(r"Requested tokens \((\d+)\) exceed context window of (\d+)")


class RequestError(GgmlMirrorError):
    """A request that cannot be answered; the client is told why.

    Attributes:
        status: HTTP status.
        param: the field at fault, as ``messages[0].content``.
        code: a short name for programs, as ``context_length_exceeded``.
        retry_after: seconds after which it is worth trying again.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.retry_after = retry_after

    @property
    def type(self) -> str:
        default = "invalid_request_error" if self.status < 500 else "server_error"
        return _TYPES.get(self.status, default)

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        return {"error": {"message": str(self), "type": self.type, "param": self.param, "code": self.code}}


def gone(what: str = "the client hung up") -> RequestError:
    """Nobody waits for the answer any more."""
    return RequestError(what, status=499, code="cancelled")


def shutting_down() -> RequestError:
    return RequestError("the server is shutting down", status=503, code="shutting_down")


def as_request_error(error: BaseException, *, param: str = "prompt") -> RequestError:
    """What a client is told of any exception.

    Args:
        param: the field that holds the prompt, the text or the tokens.
    """
    if isinstance(error, RequestError):
        return error
    too_long = _TOO_LONG.search(str(error))
    if too_long:
        count, context = too_long.groups()
        return RequestError(
            f"the prompt has {count} tokens; the context holds {context}, and at least one must be left to generate. "
            "Shorten the prompt or start the server with a larger --ctx-size",
            param=param,
            code="context_length_exceeded",
        )
    if isinstance(error, UnicodeDecodeError) and param == "tokens":
        return RequestError(
            f"tokens: their text is not whole characters ({error.reason} at byte {error.start})", param="tokens"
        )
    if isinstance(error, MemoryError):
        return RequestError(f"out of memory: {error}", status=503, code="out_of_memory", retry_after=1)
    return RequestError(f"{type(error).__name__}: {error}", status=500, code=type(error).__name__)
