"""A plain Llama whose prompts are evaluated as those of a DFlashLlama are, for a prefix cache."""

from __future__ import annotations

import inspect
from collections.abc import Generator, Sequence
from typing import Any

from llama_cpp import Llama


class CachedLlama(Llama):
    """A ``llama_cpp.Llama`` whose ``generate`` asks its :class:`ggml_mirror.PrefixCache`.

    ``Llama`` itself can be served as well: it is given this ``generate`` when a cache is made for it. A class that overrides
    ``generate`` derives from this one instead, so that prompts are evaluated beneath its own.
    """

    def generate(self, tokens: Sequence[int], *args: Any, **kwargs: Any) -> Generator[int, Sequence[int] | None, None]:
        """As ``Llama.generate``."""
        yield from generate_cached(self, super().generate, tokens, *args, **kwargs)


_signature = inspect.signature(Llama.generate)


def generate_cached(
    llm: Llama, generate: Any, tokens: Sequence[int], *args: Any, **kwargs: Any
) -> Generator[int, Sequence[int] | None, None]:
    """What ``generate`` gives once the model's prefix cache, if it has one, has seen to the prompt."""
    reset = _signature.bind(llm, tokens, *args, **kwargs).arguments.get("reset", True)
    cache: Any = llm.cache
    if reset and tokens and hasattr(cache, "serves") and cache.serves(llm):
        cache.evaluate(tokens)
    yield from generate(tokens, *args, **kwargs)
