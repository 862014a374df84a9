"""A tokenizer that gives every token's text whole."""

from __future__ import annotations

import ctypes
from functools import lru_cache

import llama_cpp
from llama_cpp import Llama
from llama_cpp.llama_tokenizer import LlamaTokenizer


class WholeTokenizer(LlamaTokenizer):
    """As llama-cpp-python's own, which reads 32 bytes of a token and loses those that have more: deep indentation, long rules.

    ``piece(token, special)`` is the text of one token.

    Example::

        llm.tokenizer_ = WholeTokenizer(llm)
    """

    def __init__(self, llm: Llama) -> None:
        super().__init__(llm)
        self.piece = lru_cache(maxsize=None)(self._read_piece)

    def detokenize(self, tokens: list[int], prev_tokens: list[int] | None = None, special: bool = False) -> bytes:
        joined = b"".join(self.piece(token, special) for token in tokens)
        # As the base class: a space that the tokenizer put behind the beginning of the sequence.
        begins = bool(tokens) and tokens[0] == self._model.token_bos() and joined[:1] == b" "
        return joined[1:] if begins else joined

    def _read_piece(self, token: int, special: bool) -> bytes:
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            n = llama_cpp.llama_token_to_piece(self._model.vocab, token, buffer, size, 0, special)
            if n >= 0:
                return buffer.raw[:n]
            size = -n
