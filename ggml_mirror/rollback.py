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


def wants_snapshots(llm: Llama, n_draft: int) -> bool:
    """Should llama.cpp hold snapshots of a running state, ``n_draft`` positions back?"""
    # llama.cpp aborts the process unless the positions with snapshots, and one before and after them, fit into a micro-batch.
    fits = llama_cpp.llama_n_ubatch(llm.ctx) > n_draft + 1
    return _keeps_running_state(llm) and not _slides(llm) and fits


def _keeps_running_state(llm: Llama) -> bool:
    return bool(llama_cpp.llama_model_is_recurrent(llm.model) or llama_cpp.llama_model_is_hybrid(llm.model))


def _slides(llm: Llama) -> bool:
    """Does the cache forget what slid out of an attention window?"""
    return llama_cpp.llama_model_n_swa(llm.model) > 0 and not llm.context_params.swa_full


def has_slid(llm: Llama, n_tokens: int) -> bool:
    """Has something slid out of an attention window by ``n_tokens``?

    A saved sequence lacks that, even where the cache still has it (``swa_full``).
    """
    return bool(0 < llama_cpp.llama_model_n_swa(llm.model) < n_tokens)


def moves_by_blocks(llm: Llama, n_tokens: int) -> bool:
    """Are the cells of a sequence that has slid, saved and loaded again, summed in the order in which they were?

    They are packed anew, from the first cell on. ggml's CPU kernels sum in blocks of 64 cells with flash attention, else of at most 32
    that matter; the order is kept if the cells were moved by whole blocks. (The windows of published models are multiples of 64.)
    """
    block = 64 if llm.context_params.flash_attn_type != llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED else 32
    return bool((n_tokens - llama_cpp.llama_model_n_swa(llm.model)) % block == 0)


def first_cut(llm: Llama, n_tokens: int) -> int:
    """Earliest position to which a sequence of ``n_tokens``, saved and loaded again, can be cut back."""
    return n_tokens if has_slid(llm, n_tokens) or _keeps_running_state(llm) else 0


class Rollback:
    """How one context is cut back. ``means`` is "cells", "snapshots" or "copies".

    Args:
        n_draft: most positions of a speculative evaluation that are cut.
    """

    def __init__(self, llm: Llama, n_draft: int) -> None:
        self._context = llm._ctx  # not the Llama, which keeps this object
        self._saved: Any = None
        self._earliest = 0  # position to which snapshots reach back
        self._window = llama_cpp.llama_model_n_swa(llm.model)
        self._runs = _keeps_running_state(llm)
        if _slides(llm):
            self.means = "copies"
        elif self._runs:
            self.means = "snapshots" if llama_cpp.llama_n_rs_seq(llm.ctx) >= n_draft else "copies"
        else:
            self.means = "cells"

    # llama.cpp's snapshots are of positions inside the last evaluation. It does not refuse to go back further, to whatever it
    # holds there: a cut, an evaluation of fewer tokens or a loaded state leaves snapshots of another past.

    def evaluated(self, start: int) -> None:
        """Tokens from position ``start`` were evaluated, in one batch."""
        self._earliest = start + 1

    def loaded(self, n_tokens: int) -> None:
        """The context took a state of ``n_tokens`` positions."""
        self._earliest = n_tokens

    def can_drop(self, position: int) -> bool:
        """Can the state at ``position`` still be had?"""
        if self._window > 0:
            # llama.cpp cuts back even if what a token at this position attends to has slid out, or was not in a state that was loaded.
            first: int = llama_cpp.llama_memory_seq_pos_min(self._context.memory, SEQUENCE)
            if not 0 <= first <= max(0, position - self._window):
                return False
        if self.means == "snapshots":
            return position >= self._earliest
        last: int = llama_cpp.llama_memory_seq_pos_max(self._context.memory, SEQUENCE)
        return position > last or not self._runs

    def drop(self, position: int) -> bool:
        """Drop positions >= ``position``, if the state there can still be had; else nothing was changed."""
        if (self._window > 0 or self.means == "snapshots") and not self.can_drop(position):
            return False
        if not self._context.kv_cache_seq_rm(SEQUENCE, position, -1):
            return False
        self._earliest = position
        return True

    def before_speculation(self) -> None:
        """Remember the state as it is, if cutting back will need it."""
        if self.means != "copies":
            return
        ctx, flags = self._context.ctx, llama_cpp.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY
        size = llama_cpp.llama_state_seq_get_size_ext(ctx, SEQUENCE, flags)
        self._saved = (ctypes.c_uint8 * size)()
        if llama_cpp.llama_state_seq_get_data_ext(ctx, self._saved, size, SEQUENCE, flags) != size:
            raise CaptureError(f"llama.cpp did not copy the {size} bytes of its running state")

    def cut(self, position: int, committed: int) -> int:
        """Drop positions >= ``position`` after a speculative evaluation that began at ``committed``.

        Returns:
            The position from which tokens have to be evaluated again (``position``: none).
        """
        context = self._context
        if self.means != "copies":
            if not self.drop(position):
                raise CaptureError(f"llama.cpp cannot drop positions {position} and later ({self.means})")
            return position
        flags = llama_cpp.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY
        if llama_cpp.llama_state_seq_set_data_ext(context.ctx, self._saved, len(self._saved), SEQUENCE, flags) == 0:
            raise CaptureError("llama.cpp did not take its running state back")
        if not context.kv_cache_seq_rm(SEQUENCE, committed, -1):
            raise CaptureError(f"llama.cpp cannot drop positions {committed} and later ({self.means})")
        return committed
