"""Sampling that a request cannot break: llama.cpp ends the process where a grammar does not parse or leaves no token."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
from llama_cpp import LogitsProcessorList

from .errors import RequestError

_CANDIDATE = np.dtype([("id", np.intc), ("logit", np.single), ("p", np.single)], align=True)


def require_grammar(vocab: Any, text: str, root: str, param: str) -> None:
    """Let llama.cpp parse a grammar. llama-cpp-python would put a null pointer into the chain of samplers.

    Raises:
        RequestError: it does not parse; names ``param``. llama.cpp prints why.
    """
    sampler = llama_cpp.llama_sampler_init_grammar(vocab, text.encode(), root.encode())
    if not sampler:
        raise RequestError(
            f"{param}: the grammar does not parse, or has no rule 'root'; the server's log has llama.cpp's reason",
            param=param,
            code="invalid_grammar",
        )
    llama_cpp.llama_sampler_free(sampler)


class GuardedSampler:
    """A chain of samplers with a grammar in it: as ``LlamaSampler.sample``, but a grammar that leaves no token is an error.

    ``llama_sampler_sample`` hands the chosen token to the grammar at once, and the grammar aborts on one that it has ruled out.
    """

    def __init__(self, sampler: Any, n_vocab: int) -> None:
        self._sampler = sampler
        self._candidates = np.zeros(n_vocab, _CANDIDATE)
        self._ids = np.arange(n_vocab, dtype=np.intc)

    def sample(self, ctx: Any, idx: int = -1) -> int:
        """Choose from the logits of output ``idx`` of the last evaluation.

        Raises:
            RequestError: no token is left.
        """
        candidates = self._candidates
        candidates["id"] = self._ids
        candidates["logit"] = np.ctypeslib.as_array(ctx.get_logits_ith(idx), shape=(len(candidates),))
        candidates["p"] = 0.0
        array = llama_cpp.llama_token_data_array(
            data=candidates.ctypes.data_as(ctypes.POINTER(llama_cpp.llama_token_data)),
            size=len(candidates),
            selected=-1,
            sorted=False,
        )
        llama_cpp.llama_sampler_apply(self._sampler.sampler, ctypes.byref(array))
        if not 0 <= array.selected < array.size:
            raise RuntimeError("llama.cpp's samplers chose no token")
        chosen = array.data[array.selected]
        if not math.isfinite(chosen.logit):
            raise RequestError(
                "no token of this model can follow what the grammar (or JSON schema) has let through so far",
                param="grammar",
                code="grammar_dead_end",
            )
        token = int(chosen.id)
        llama_cpp.llama_sampler_accept(self._sampler.sampler, token)
        return token


def with_bias(processors: LogitsProcessorList | None, bias: dict[Any, float]) -> LogitsProcessorList:
    """The processors and OpenAI's ``logit_bias``; ids are inside the vocabulary. (llama-cpp-python would drop both when it joins them.)"""
    ids = np.array([int(token) for token in bias], np.intp)
    values = np.array([float(value) for value in bias.values()], np.single)

    def add(_: npt.NDArray[np.intc], scores: npt.NDArray[np.single]) -> npt.NDArray[np.single]:
        scores[ids] += values
        return scores

    return LogitsProcessorList([*(processors or []), add])
