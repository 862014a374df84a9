"""The state of a context's one sequence as bytes, and the logits behind it as an array."""

from __future__ import annotations

import ctypes
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
from llama_cpp._internals import LlamaSampler

from .capture import SEQUENCE
from .errors import CaptureError

#: A bytes object that is still to be filled, before anybody sees it: Python's C interface has it so. Others are written twice.
_new_bytes = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_ssize_t)(
    ("PyBytes_FromStringAndSize", ctypes.pythonapi)
)

_token_data = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])


# Of the sequence, not of the context: putting back the latter first clears the whole cache, however little of it is used, and makes
# llama.cpp fill cells from the first on that have slid out of a window. But what has slid out is not in a sequence's state.


def take_sequence(ctx: Any) -> bytes:
    """The sequence's state, in one copy."""
    size = llama_cpp.llama_state_seq_get_size_ext(ctx, SEQUENCE, 0)
    state: bytes = _new_bytes(None, size)
    data = ctypes.cast(ctypes.c_char_p(state), ctypes.POINTER(ctypes.c_uint8))
    written = llama_cpp.llama_state_seq_get_data_ext(ctx, data, size, SEQUENCE, 0)
    if written != size:
        raise CaptureError(f"llama.cpp wrote {written} bytes of the sequence's state, {size} were announced")
    return state


def put_sequence(ctx: Any, state: Any) -> bool:
    """Replace the sequence by one that was taken; False: llama.cpp did not take it whole.

    Args:
        state: anything with the buffer protocol; it is not copied.
    """
    array = np.frombuffer(state, np.uint8)
    data = array.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
    taken: int = llama_cpp.llama_state_seq_set_data_ext(ctx, data, len(array), SEQUENCE, 0)
    return taken == len(array)


def last_logits(ctx: Any, n_vocab: int) -> npt.NDArray[np.float32]:
    """Logits behind the token that was evaluated last, float32 ``[1, n_vocab]``."""
    return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(ctx, -1), shape=(1, n_vocab)).copy()


class KeptLogits:
    """In place of a ``LlamaContext``, for samplers that ask one for logits.

    Args:
        logits: float32 ``[1, n_vocab]``.
    """

    def __init__(self, logits: npt.NDArray[np.float32]) -> None:
        self._logits = np.ascontiguousarray(logits)

    def get_logits_ith(self, i: int) -> Any:
        """Their address."""
        return self._logits.ctypes.data_as(ctypes.POINTER(ctypes.c_float))


def sample_kept(sampler: Any, logits: npt.NDArray[np.float32]) -> int:
    """What ``sampler.sample`` would choose from a context with these logits, float32 ``[1, n_vocab]``."""
    if not isinstance(sampler, LlamaSampler):
        chosen: int = sampler.sample(KeptLogits(logits), -1)
        return chosen
    # This one is native from the context on: what llama_sampler_sample does, but for where it has the logits from.
    data = np.zeros(logits.size, _token_data)
    data["id"], data["logit"] = np.arange(logits.size), logits.ravel()
    candidates = llama_cpp.llama_token_data_array(
        data=data.ctypes.data_as(llama_cpp.llama_token_data_p), size=len(data), selected=-1, sorted=False
    )
    llama_cpp.llama_sampler_apply(sampler.sampler, ctypes.byref(candidates))
    if not 0 <= candidates.selected < candidates.size:
        raise RuntimeError("llama.cpp's samplers chose no token")
    token = int(candidates.data[candidates.selected].id)  # of the array as it is now: samplers may exchange it
    llama_cpp.llama_sampler_accept(sampler.sampler, token)
    return token
