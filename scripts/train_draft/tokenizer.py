"""Prompts as the target's tokens, by llama.cpp's own tokenizer."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from .errors import InputError
from .sequences import Ints


class Tokenizer:
    """
    Raises:
        InputError: llama-cpp-python is missing, or does not load the file.
    """

    def __init__(self, path: Path) -> None:
        try:
            from llama_cpp import Llama
        except ImportError as error:
            raise InputError(f"prompts are tokenized by llama-cpp-python, which does not load here: {error}") from error
        try:
            self._llm = Llama(str(path), vocab_only=True, verbose=False)
        except (ValueError, RuntimeError) as error:
            raise InputError(f"llama.cpp does not load {path}: {error}") from error

    def __call__(self, texts: Iterable[str], *, longest: int) -> list[Ints]:
        """Tokens of each text as a raw prompt, with the beginning-of-text token if the target wants one; cut at ``longest``."""
        return [np.array(self._llm.tokenize(t.encode(), add_bos=True)[:longest], np.int32) for t in texts]
