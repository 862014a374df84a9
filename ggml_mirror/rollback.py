"""Cutting a target's state back to an earlier position, by llama.cpp's own means.

Most targets drop the last cells of their KV cache. Recurrent and hybrid ones keep a running state instead: llama.cpp can hold
snapshots of it (``n_rs_seq``) for some architectures; for the others, and for windowed caches without ``swa_full``, the state is
copied before each speculative evaluation and put back, and the accepted tokens are evaluated again.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import llama_cpp

from .capture import SEQUENCE
from .errors import CaptureError

if TYPE_CHECKING:
    from llama_cpp import Llama


def wants_snapshots(llm: Llama) -> bool:
    """Does the model keep a running state, of which llama.cpp should hold snapshots?"""
    return bool(llama_cpp.llama_model_is_recurrent(llm.model) or llama_cpp.llama_model_is_hybrid(llm.model))


class Rollback:
    """How one context is cut back. ``means`` is "cells", "snapshots" or "copies".

    Args:
        block: most positions that a speculative evaluation adds.
    """

    def __init__(self, llm: Llama, block: int) -> None:
        self._llm = llm
        self._saved: Any = None
        ctx = llm.ctx
        if wants_snapshots(llm):
            self.means = "snapshots" if llama_cpp.llama_n_rs_seq(ctx) >= block else "copies"
        else:
            windowed = llama_cpp.llama_model_n_swa(llm.model) > 0 and not llm.context_params.swa_full
            self.means = "copies" if windowed else "cells"

    def before_speculation(self) -> None:
        """Remember the state as it is, if cutting back will need it."""
        if self.means != "copies":
            return
        ctx, flags = self._llm.ctx, llama_cpp.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY
        size = llama_cpp.llama_state_seq_get_size_ext(ctx, SEQUENCE, flags)
        self._saved = (ctypes.c_uint8 * size)()
        if llama_cpp.llama_state_seq_get_data_ext(ctx, self._saved, size, SEQUENCE, flags) != size:
            raise CaptureError(f"llama.cpp did not copy the {size} bytes of its running state")

    def cut(self, position: int, committed: int) -> int:
        """Drop positions >= ``position`` after a speculative evaluation that began at ``committed``.

        Returns:
            The position from which tokens have to be evaluated again (``position``: none).
        """
        context = self._llm._ctx
        if self.means != "copies":
            if not context.kv_cache_seq_rm(SEQUENCE, position, -1):
                raise CaptureError(f"llama.cpp cannot drop positions {position} and later ({self.means})")
            return position
        flags = llama_cpp.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY
        if llama_cpp.llama_state_seq_set_data_ext(context.ctx, self._saved, len(self._saved), SEQUENCE, flags) == 0:
            raise CaptureError("llama.cpp did not take its running state back")
        if not context.kv_cache_seq_rm(SEQUENCE, committed, -1):
            raise CaptureError(f"llama.cpp cannot drop positions {committed} and later ({self.means})")
        return committed
