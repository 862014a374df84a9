"""An OpenAI-compatible server that drafts: llama-cpp-python's own application with :class:`DFlashLlama` wired in.

Needs the extra ``server``; nothing outside this folder imports it. A request's way through the modules is drawn in docs/SERVER.md.
"""

from __future__ import annotations

import importlib.util

from ..errors import ArgumentError

#: What :mod:`llama_cpp.server` imports, and the metrics.
NEEDED = ("fastapi", "uvicorn", "pydantic_settings", "sse_starlette", "starlette_context", "yaml", "prometheus_client")


class MissingExtraError(ArgumentError):
    """The packages that only the server needs are not installed."""


def require_extra() -> None:
    """Fail now, in one line, if the extra ``server`` is not installed.

    Raises:
        MissingExtraError: names what is missing and how to install it.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f'serving needs packages that are not installed ({", ".join(missing)}): pip install "ggml-mirror[server]"'
        )
