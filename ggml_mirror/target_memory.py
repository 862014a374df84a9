"""What a target takes, asked of llama.cpp before anything is allocated.

llama.cpp can load a model with ``no_alloc``: it lays out weights, cache and compute graphs, and allocates none of them (its own
``--fit`` asks it the same way; a recurrent state is small and really made for that moment). The parameters are those that
``llama_cpp.Llama`` makes of its arguments, because it is a ``Llama`` that asks.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import llama_cpp
from llama_cpp import Llama

from ._native import check, ffi, lib, text
from .byte_size import format_bytes
from .device import Device, devices, host_memory
from .errors import MirrorMemoryError, ModelFileError, UnsupportedError
from .llama_log import explained
from .mechanism import OUTPUT_VALUES, CaptureMechanism, Keeper, choose, parse_mechanism
from .rollback import Rollback, wants_snapshots

# C++ functions of libllama, under the names that compilers give them. Declared in llama-ext.h, which is not installed.
_BREAKDOWN = ("_Z26llama_get_memory_breakdownPK13llama_context",)
_OUTPUT_DEVICE = ("_ZNK11llama_model10dev_outputEv",)


@dataclass(frozen=True)
class BufferBytes:
    """Bytes of a target in one type of buffer.

    Attributes:
        buffer: ggml's name of the type: "CPU", "CPU_REPACK", "CUDA0", "CUDA_Host".
        device: name of the device whose memory it is.
        weights, context, compute: the model; its cache and running state; scratch of the largest graph.
        mapped: the weights are pages of the file, which the system drops and reads again as it needs.
    """

    buffer: str
    device: str
    weights: int
    context: int
    compute: int
    mapped: bool


@dataclass(frozen=True)
class TargetMemory:
    """What :func:`measure` found.

    Attributes:
        n_ctx: llama.cpp's own, which may round up what was asked for.
        context_name: what the target keeps of its tokens: "KV cache", "running state", or both.
        cache_types: of keys and of values, as ggml names them.
        output_device: where the output matrix lies.
        copies_state: drafting copies the context to host memory before each block, for want of another way back (see ``rollback``).
        mechanism: how taps will leave the graph; None: nothing is drafted.
    """

    buffers: tuple[BufferBytes, ...]
    n_ctx: int
    n_vocab: int
    n_batch: int
    n_ubatch: int
    context_name: str
    cache_types: tuple[str, str]
    output_device: Device
    copies_state: bool
    mechanism: CaptureMechanism | None

    @property
    def output_values(self) -> int:
        """Words of 4 bytes that llama.cpp keeps in host memory per output and word of the vocabulary."""
        return 1 if self.mechanism is None else OUTPUT_VALUES[self.mechanism]


def measure(
    model_path: str | os.PathLike[str],
    *,
    n_draft: int | None = None,
    taps: Sequence[int] = (),
    mechanism: str | CaptureMechanism | None = None,
    **llama_kwargs: Any,
) -> TargetMemory:
    """What a ``Llama`` (with ``n_draft``: a ``DFlashLlama``) of these arguments would allocate for its target.

    Args:
        n_draft: drafted tokens per step; for targets with a running state llama.cpp then keeps snapshots of it.
        taps: blocks whose outputs are captured.
        mechanism: as for :func:`ggml_mirror.capture.capture`.
        llama_kwargs: as for ``llama_cpp.Llama``.

    Raises:
        ModelFileError: llama.cpp does not load it, or no context can be made for it.
        UnsupportedError: this libllama does not tell.
        MirrorMemoryError: not even to ask is there memory.
    """
    _function(_BREAKDOWN)
    _require_tables(llama_kwargs.get("n_ctx", 0))
    mapped = bool(llama_kwargs.get("use_mmap", True)) and not llama_kwargs.get("lora_path")
    dry = {k: v for k, v in llama_kwargs.items() if k not in _NOT_MEASURED}
    path = os.fspath(model_path)
    try:
        with explained(path), contextlib.closing(_DryLlama(path, **dry, use_mmap=False, verbose=False)) as llm:
            used = None
            if n_draft is not None:
                llm._logits_all = bool(llama_kwargs.get("logits_all"))  # made with it, it would allocate them
                used = _prepare_for_drafting(llm, n_draft, taps, parse_mechanism(mechanism))
            return TargetMemory(
                breakdown(llm, mapped=mapped),
                llm.n_ctx(),
                llm.n_vocab(),
                llm.n_batch,
                llama_cpp.llama_n_ubatch(llm.ctx),
                _context_name(llm),
                (_type_name(llm.context_params.type_k), _type_name(llm.context_params.type_v)),
                _output_device(llm),
                n_draft is not None and Rollback(llm, n_draft).means == "copies",
                used,
            )
    except MemoryError as error:
        raise MirrorMemoryError(f"{path}: not even the tables for its context fit into memory: {error}") from error


def breakdown(llm: Llama, *, mapped: bool) -> tuple[BufferBytes, ...]:
    """What a ``Llama`` has allocated for its target, by llama.cpp's account.

    Raises:
        UnsupportedError: this libllama does not tell.
    """
    function = ffi.cast("void *", ctypes.cast(_function(_BREAKDOWN), ctypes.c_void_p).value)
    context = ffi.cast("void *", _address(llm.ctx))
    count, most = ffi.new("int32_t *"), 64
    entries = ffi.new("gm_target_bytes[]", most)
    check(lib.gm_target_memory(function, context, most, entries, count))
    found = tuple(_entry(entries[i], mapped) for i in range(min(count[0], most)))
    _require_sense(found, llama_cpp.llama_model_size(llm.model))
    return found


#: Arguments that change nothing here, or would make the dry run allocate.
_NOT_MEASURED = (
    "use_mmap",
    "use_mlock",
    "verbose",
    "logits_all",
    "draft_model",
    "lora_path",
    "lora_base",
    "chat_handler",
)


#: Of llama.cpp's table of cells: position, shift, extent and a bit for each of 256 sequences.
_CELL_BYTES = 48


class _DryLlama(Llama):
    """A ``Llama`` that allocates neither weights nor cache, and cannot evaluate."""

    #: What its context was given and does not own.
    lent: Any = None

    @property
    def model_params(self) -> Any:
        return self._dry_params

    @model_params.setter
    def model_params(self, params: Any) -> None:
        params.no_alloc = True
        self._dry_params = params


def _require_tables(n_ctx: int) -> None:
    # Without memory for its cells, llama.cpp still keeps a table of them; asked for enough, it would take the machine down.
    table, free = _CELL_BYTES * n_ctx, host_memory().free
    if table > free // 2:
        raise MirrorMemoryError(
            f"a context of {n_ctx} tokens needs {format_bytes(table)} for llama.cpp's table of cells alone; "
            f"{format_bytes(free)} are free",
            bytes_needed=table,
            bytes_free=free,
        )


def _prepare_for_drafting(
    llm: _DryLlama, n_draft: int, taps: Sequence[int], wanted: CaptureMechanism | None
) -> CaptureMechanism:
    """Make its context as a ``DFlashLlama`` would. As there, the callback is taken where outputs do not stay in place."""
    used = wanted or choose(llm, n_draft + 1)
    if used is CaptureMechanism.OUTPUTS:
        kept = _remake_for_drafting(llm, n_draft, taps)
        if kept == len(taps) or wanted is not None:
            return used
    _remake_for_drafting(llm, n_draft, ())
    return CaptureMechanism.CALLBACK


def _remake_for_drafting(llm: _DryLlama, n_draft: int, layers: Sequence[int]) -> int:
    """A context with snapshots of a running state, and with room for the blocks' outputs to stay in place: of how many they do."""
    snapshots = wants_snapshots(llm, n_draft)
    if not snapshots and not layers and llm.lent is None:
        return 0
    if snapshots:
        llm.context_params.n_rs_seq = n_draft
    params = type(llm.context_params).from_buffer_copy(llm.context_params)
    out = ffi.new("gm_capture **")
    check(lib.gm_capture_new(out))
    handle = ffi.gc(out[0], lib.gm_capture_free)
    keeper = Keeper(handle, layers)
    if layers:
        keeper.put_into(params)
    llama_cpp.llama_free(llm._ctx.ctx)
    llm._ctx.ctx = None
    llm._ctx.ctx = llama_cpp.llama_init_from_model(llm.model, params)
    llm.lent = handle, keeper
    if llm._ctx.ctx is None:
        raise ModelFileError(f"{llm.model_path}: llama.cpp makes no context for drafting {n_draft} tokens")
    # llama.cpp has built its largest graphs, to lay them out.
    count = ffi.new("int32_t *")
    check(lib.gm_capture_kept(handle, count))
    return int(count[0])


def _entry(entry: Any, mapped: bool) -> BufferBytes:
    return BufferBytes(
        buffer=text(entry.buffer),
        device=devices()[entry.device].name,
        weights=entry.weights,
        context=entry.context,
        compute=entry.compute,
        mapped=mapped and entry.mappable and entry.weights > 0,
    )


def _require_sense(found: tuple[BufferBytes, ...], model_bytes: int) -> None:
    # The structure behind the call is not part of llama.cpp's stable interface.
    weights = sum(entry.weights for entry in found)
    if not 0.5 * model_bytes <= weights <= 4 * model_bytes + (64 << 20):
        raise UnsupportedError(
            f"llama.cpp's account of its memory cannot be read: it gives {weights} bytes of weights for a model of "
            f"{model_bytes}; ggml-mirror does not know this version of llama.cpp"
        )


def _context_name(llm: Llama) -> str:
    if llama_cpp.llama_model_is_recurrent(llm.model):
        return "running state"
    return "KV cache and running state" if llama_cpp.llama_model_is_hybrid(llm.model) else "KV cache"


def _type_name(number: int) -> str:
    from gguf.constants import GGMLQuantizationType

    return str(GGMLQuantizationType(number).name.lower())


def _output_device(llm: Llama) -> Device:
    function = _function(_OUTPUT_DEVICE)
    function.argtypes, function.restype = [ctypes.c_void_p], ctypes.c_void_p
    index = ffi.new("int32_t *")
    check(lib.gm_device_index(ffi.cast("void *", function(_address(llm.model))), index))
    return devices()[int(index[0])]


def _address(pointer: Any) -> int:
    return ctypes.cast(pointer, ctypes.c_void_p).value or 0


def _function(names: tuple[str, ...]) -> Any:
    for name in names:
        try:
            return getattr(llama_cpp.llama_cpp._lib, name)
        except AttributeError:
            continue
    raise UnsupportedError(
        f"llama.cpp (llama-cpp-python {llama_cpp.__version__}) does not tell what it would allocate: its library has no {names[0]}"
    )
