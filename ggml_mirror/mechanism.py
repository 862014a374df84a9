"""How taps leave the target's graph: at a stop for each of them, or together behind the evaluation.

``callback`` is llama.cpp's ``cb_eval``: the scheduler computes up to a tap, waits, and the tap is taken. It needs nothing of the
graph, and costs a stop and a wait per tap, which a GPU feels and a CPU does not.

``outputs`` marks the tapped nodes as outputs of the graph, so that they stay where they are until the next evaluation. llama.cpp
shows each graph that it has built, and not yet given memory, to its *backend samplers*: a sampler of our own, of a sequence that no
batch has, marks them and samples nothing. The graph runs without a stop, and all taps are taken behind it in one write.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from enum import Enum
from typing import Any

import llama_cpp
from llama_cpp import Llama

from ._native import check, ffi, lib
from .device import devices
from .errors import ArgumentError, CaptureError

#: Forces a mechanism where none is named: "auto", "callback" or "outputs".
MECHANISM_VARIABLE = "GGML_MIRROR_CAPTURE"

#: The sequence that the sampler stands for: the last that llama.cpp knows (LLAMA_MAX_SEQ - 1). llama_cpp.Llama evaluates 0.
_NOBODYS_SEQUENCE = 255


class CaptureMechanism(str, Enum):
    """See the module."""

    CALLBACK = "callback"
    OUTPUTS = "outputs"

    def __str__(self) -> str:
        return self.value


#: Words of 4 bytes that llama.cpp keeps in host memory per output and word of the vocabulary. With a backend sampler it makes room for
#: sampled logits, probabilities and candidates beside the logits.
OUTPUT_VALUES = {CaptureMechanism.CALLBACK: 1, CaptureMechanism.OUTPUTS: 4}


def parse_mechanism(name: str | CaptureMechanism | None) -> CaptureMechanism | None:
    """None: "auto", the choice of :func:`choose`. An unnamed one is the environment's.

    Raises:
        ArgumentError: no such mechanism.
    """
    said = os.environ.get(MECHANISM_VARIABLE, "") if name is None else str(name)
    if said.lower() in ("", "auto"):
        return None
    try:
        return CaptureMechanism(said.lower())
    except ValueError:
        where = f"{MECHANISM_VARIABLE}={said}" if name is None else f"capture mechanism {said!r}"
        raise ArgumentError(f"{where}: auto, {' or '.join(CaptureMechanism)} was expected") from None


def choose(llm: Llama, n_outputs: int = 1) -> CaptureMechanism:
    """``outputs`` for a model with layers on a GPU; else ``callback``, which costs nothing measurable on a CPU and takes no memory.

    Args:
        n_outputs: tokens at the end of a batch whose logits are asked for, at most. Where they may be of several micro-batches, as in
            a model that keeps all logits, it is ``callback``: ``outputs`` evaluates each on its own.
    """
    on_gpu = llm.model_params.n_gpu_layers != 0 and any(d.type in ("GPU", "IGPU") for d in devices())
    cut = llm._logits_all or n_outputs > llama_cpp.llama_n_ubatch(llm.ctx)
    return CaptureMechanism.OUTPUTS if on_gpu and not cut else CaptureMechanism.CALLBACK


class Keeper:
    """The sampler of one native context that keeps the outputs of blocks in place.

    Args:
        handle: a ``gm_capture``, which must live as long.
        layers: 0-based blocks.
    """

    def __init__(self, handle: Any, layers: Sequence[int]) -> None:
        check(lib.gm_capture_keep(handle, len(layers), ffi.new("int32_t[]", list(layers))))
        api: Any = llama_cpp
        interface = ctypes.cast(
            int(ffi.cast("uintptr_t", lib.gm_capture_sampler())), ctypes.POINTER(api.llama_sampler_i)
        )
        chain = api.llama_sampler_chain_init(api.llama_sampler_chain_default_params())
        api.llama_sampler_chain_add(chain, api.llama_sampler_init(interface, int(ffi.cast("uintptr_t", handle))))
        self._chain = chain
        address = ctypes.cast(chain, ctypes.c_void_p).value
        # The context does not own it and does not touch it when it is freed.
        free = api.llama_sampler_free
        self.owner = ffi.gc(ffi.cast("void *", address), lambda _: free(chain))
        self._configuration = (api.llama_sampler_seq_config * 1)(
            api.llama_sampler_seq_config(_NOBODYS_SEQUENCE, address)
        )

    def put_into(self, params: Any) -> None:
        """Have a context of these parameters made with it."""
        params.samplers, params.n_samplers = self._configuration, 1

    def attach(self, ctx: Any) -> bool:
        """Give it to a context that there is, in place of another; its next evaluation builds its graph anew."""
        attached: bool = llama_cpp.llama_set_sampler(ctx, _NOBODYS_SEQUENCE, self._chain)
        return attached


def micro_batches(batch: Any, n_ubatch: int, keep_tail: int) -> list[Any]:
    """A ``llama_batch`` of one sequence, cut as llama.cpp cuts it into micro-batches; its arrays are shared.

    Args:
        keep_tail: tokens at the end that must stay together: 1 + the snapshots that llama.cpp keeps of a running state, or 0.

    Raises:
        CaptureError: logits are asked for before the last piece. Each piece is an evaluation of its own, and llama.cpp keeps the
            logits of the last.
    """
    n, start = batch.n_tokens, 0
    if n <= n_ubatch:
        return [batch]
    sizes = []
    while n > start:
        size = min(n_ubatch, n - start)
        left = n - start - size
        if 0 < left < keep_tail:
            size -= keep_tail - left
        sizes.append(size)
        start += size
    if batch.logits and any(batch.logits[: n - sizes[-1]]):
        raise CaptureError(
            f"the batch asks for logits before its last {sizes[-1]} of {n} tokens, beyond one micro-batch of {n_ubatch}; "
            "evaluate fewer tokens at once, raise n_ubatch, or capture with mechanism='callback'"
        )
    names = [name for name, *_ in llama_cpp.llama_batch._fields_[1:]]
    pieces, start = [], 0
    for size in sizes:
        arrays = {name: _from(getattr(batch, name), start) for name in names}
        pieces.append(llama_cpp.llama_batch(n_tokens=size, **arrays))
        start += size
    return pieces


def _from(array: Any, start: int) -> Any:
    """A ctypes pointer, ``start`` elements on."""
    if not array:
        return array
    return ctypes.cast(ctypes.byref(array.contents, start * ctypes.sizeof(array._type_)), type(array))
