"""llama.cpp's log kept off the terminal, and what it says when a model does not load."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from .errors import GgmlMirrorError, ModelFileError

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


@contextmanager
def explained(path: str | os.PathLike[str], n_ctx: int | None = None, *, verbose: bool = False) -> Iterator[None]:
    """Around the loading of a model: whatever it raises becomes a ModelFileError with llama.cpp's own reason.

    This package's errors, and those of memory, stay what they are.
    """
    import llama_cpp

    with collected_errors(enabled=not verbose) as reasons:
        try:
            yield
        except (GgmlMirrorError, MemoryError):
            raise
        except Exception as error:  # ValueError, RuntimeError, and Jinja's own errors for a bad template
            context = "" if n_ctx is None else f" with a context of {n_ctx}"
            raise ModelFileError(
                f"{path}: llama.cpp (llama-cpp-python {llama_cpp.__version__}) does not load it{context}: "
                f"{reasons[0] if reasons else error}"
            ) from error
