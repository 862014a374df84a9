"""llama.cpp's log, kept off the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_LOG_LEVEL_ERROR = 4  # GGML_LOG_LEVEL_ERROR


@contextmanager
def collected_errors(*, enabled: bool = True) -> Iterator[list[str]]:
    """llama.cpp's log kept off the terminal, its errors in a list. llama_cpp's ``verbose=False`` lets warnings by."""
    import llama_cpp
    from llama_cpp import _logger

    reasons: list[str] = []
    if not enabled:
        yield reasons
        return

    @llama_cpp.llama_log_callback
    def keep(level: int, text: bytes, _: object) -> None:
        if level == _LOG_LEVEL_ERROR:
            reasons.append(text.decode("utf-8", "replace").strip())

    llama_cpp.llama_log_set(keep, None)
    try:
        yield reasons
    finally:
        llama_cpp.llama_log_set(_logger.llama_log_callback, None)
