"""Capture: a target's tapped block outputs go straight from the evaluated graph into mirrors.

Both mechanisms (``mechanism.py``) are given to a context as it is made. The first :func:`capture` over a ``llama_cpp.Llama``
therefore remakes its native context, with the same parameters and its state carried over; what was put in then stays, inert, until
the next capture. Positions come from the batch that is evaluated, not from a count of rows.
"""

from __future__ import annotations

import ctypes
import operator
import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from ._native import check, ffi, lib
from .device import Device, devices
from .errors import ArgumentError, CaptureError
from .fuser import Fuser
from .mechanism import CaptureMechanism, Keeper, choose, micro_batches, parse_mechanism
from .mirror import FeatureMirror
from .row_kind import FUSED
from .token_log import TokenLog

if TYPE_CHECKING:
    from llama_cpp import Llama

#: llama_cpp.Llama evaluates one sequence, this one.
SEQUENCE = 0

#: What takes captured rows.
Sink = FeatureMirror | Fuser

_ATTRIBUTE = "_ggml_mirror_capture"

#: Native handles by the id of the object that will still use them. cffi frees a handle as soon as the collector finalizes it,
#: which may be before the objects around it (a Llama that was forgotten, a stream in mid-block); what is held here is not garbage.
in_use: dict[int, Sequence[Any]] = {}


@contextmanager
def capture(
    llm: Llama,
    mirror: Sink | Sequence[Sink],
    taps: Sequence[int] | None = None,
    *,
    mechanism: str | CaptureMechanism | None = None,
) -> Iterator[CaptureMechanism]:
    """Send the outputs of blocks ``taps`` to ``mirror`` (or to each of several) whenever ``llm`` evaluates tokens.

    Each evaluation first forgets rows at and after its first position, so that the mirror follows the sequence through resets
    and reused prefixes. A prefill longer than ``cap`` keeps its tail. Text is the same as without capture.

    Args:
        llm: a ``llama_cpp.Llama``. The first capture remakes its native context (``llm.ctx`` changes; its state is kept, its last
            logits are not: evaluate a token before sampling).
        mirror: mirrors of ``len(taps)`` taps and the model's ``n_embd``, on any device; a mirror of fused rows is filled through a
            :class:`~ggml_mirror.fuser.Fuser`.
        taps: 0-based blocks whose outputs are taken; None takes the DFlash default for the model's depth.
        mechanism: "callback", "outputs" or "auto", see :mod:`ggml_mirror.mechanism`; None takes ``GGML_MIRROR_CAPTURE``, else
            "auto": outputs on a GPU where the model's graph allows it, else the callback. Rows are the same.

    Yields:
        The mechanism that is used.

    Raises:
        CaptureError: a tap does not exist, has another width, or gives no row per token; or a mechanism was named that does not
            work with this model. The model is as it was.
        ArgumentError, ClosedError: the mirrors do not fit the taps, or are closed; there is no such mechanism.

    Inside, an evaluation that did not give every row raises CaptureError; its rows are forgotten.

    Example::

        with FeatureMirror(taps=5, n_embd=576, cap=4112, dtype="q8_0") as m, capture(llm, m, [1, 8, 14, 20, 27]):
            llm.eval(tokens)
            m.read(start=0, count=len(tokens))
    """
    with attachment(llm, mirror, taps, mechanism=mechanism) as used:
        yield used


def capture_mechanism(llm: Llama) -> CaptureMechanism | None:
    """The mechanism with which taps of this model are taken; None if nothing was captured yet."""
    hook: Hook | None = getattr(llm._ctx, _ATTRIBUTE, None)
    return None if hook is None else hook.mechanism


def attachment(
    llm: Llama,
    mirror: Sink | Sequence[Sink],
    taps: Sequence[int] | None = None,
    *,
    mechanism: str | CaptureMechanism | None = None,
) -> AbstractContextManager[CaptureMechanism]:
    """:func:`capture` for a Llama that keeps it itself: what is returned does not refer to the Llama."""
    mirrors: list[Any] = list(mirror) if isinstance(mirror, (list, tuple)) else [mirror]
    layers = _checked_taps(llm, taps)
    _check_mirrors(mirrors, layers)
    hook = Hook.of(llm, layers, mechanism)
    hook.require(layers, mirrors[0].n_embd)
    source = (_fingerprint(llm), tuple(layers))
    for sink in mirrors:
        m = _ring(sink)
        if m._source not in (None, source):
            sink.clear()  # rows of another model, or of other blocks
            m.target = source[0]
        m.target = m.target or source[0]
        m._source = source
    return hook.attached(layers, mirrors)


class Hook:
    """What takes the taps of one native context, and what the model's graph was found to have."""

    def __init__(self, mechanism: CaptureMechanism) -> None:
        self.mechanism = mechanism
        self.keeper: Keeper | None = None
        self.kept: list[int] = []  # blocks whose outputs stay in place
        self.cut = (0, 0)  # n_ubatch, and the tokens at a batch's end that stay together
        out = ffi.new("gm_capture **")
        check(lib.gm_capture_new(out))
        self.handle = ffi.gc(out[0], lib.gm_capture_free)
        self.context_ref: Any = lambda: None  # weak, as is the next: the hook is kept by the Llama's context
        self.llm: Any = lambda: None
        self.found: dict[int, tuple[int, int]] = {}
        self.evaluated = 0
        self.tok_embd = self.output = 0  # addresses of the model's own tensors; 0: not seen
        self.busy = False
        self.sinks: list[Sink] = []

    @classmethod
    def of(
        cls,
        llm: Llama,
        layers: Sequence[int] = (),
        mechanism: str | CaptureMechanism | None = None,
        n_outputs: int = 1,
    ) -> Hook:
        """The hook of the Llama's context; made, with a new native context, at the first call or for another mechanism.

        Args:
            layers: blocks that will be tapped.
            n_outputs: as for :func:`~ggml_mirror.mechanism.choose`.
        """
        wanted = parse_mechanism(mechanism)
        hook: Hook | None = getattr(llm._ctx, _ATTRIBUTE, None)
        if hook is not None and (wanted in (None, hook.mechanism) or hook.busy):
            if layers:
                hook.keep(layers)
            return hook
        if wanted is CaptureMechanism.OUTPUTS and n_outputs > (n_ubatch := llama_cpp.llama_n_ubatch(llm.ctx)):
            raise CaptureError(
                f"n_ubatch is {n_ubatch}; capturing the {n_outputs} tokens of a block with mechanism='outputs' needs "
                f"{n_outputs}: raise it, or take mechanism='callback'"
            )
        hook = cls(wanted or choose(llm, n_outputs))
        try:
            _remake_context(llm, hook, layers)
        except _NotKept as error:
            if wanted is not None:
                raise CaptureError(str(error)) from None
            hook = cls(CaptureMechanism.CALLBACK)
            _remake_context(llm, hook, layers)
        hook.context_ref, hook.llm = weakref.ref(llm._ctx), weakref.ref(llm)
        setattr(llm._ctx, _ATTRIBUTE, hook)
        return hook

    def keep(self, layers: Sequence[int]) -> None:
        """Have these blocks' outputs stay in place from the next evaluation on, if that is how they are taken."""
        if self.mechanism is not CaptureMechanism.OUTPUTS or self.busy or self.kept == list(layers):
            return
        if self.context is None or not set(layers) <= set(self.found):
            return  # `require` says so
        keeper = Keeper(self.handle, layers)
        if not keeper.attach(self.context.ctx):
            raise CaptureError("llama.cpp no longer takes the sampler that keeps block outputs")
        self.keeper, self.kept = keeper, list(layers)

    @property
    def context(self) -> Any:
        """The LlamaContext; None once it is gone."""
        return self.context_ref()

    def discover(self, ctx: Any, n_layer: int, batch_size: int, vocab_token: int) -> None:
        """Evaluate a scratch token or two and see which block outputs the graph has. ``ctx`` is new and stays empty."""
        snapshots = llama_cpp.llama_n_rs_seq(ctx)
        self.cut = (llama_cpp.llama_n_ubatch(ctx), snapshots + 1 if snapshots else 0)
        self.evaluated = min(2, batch_size)
        check(lib.gm_capture_discover(self.handle))
        batch = llama_cpp.llama_batch_init(self.evaluated, 0, 1)
        try:
            batch.n_tokens = self.evaluated
            for i in range(self.evaluated):
                batch.token[i], batch.pos[i], batch.n_seq_id[i] = vocab_token, i, 1
                batch.seq_id[i][0] = SEQUENCE
                # Only the last token's logits: a block whose rows follow the logits shows itself by its count.
                batch.logits[i] = i == self.evaluated - 1
            status = llama_cpp.llama_decode(ctx, batch)
        finally:
            llama_cpp.llama_batch_free(batch)
            check(lib.gm_capture_detach(self.handle))
        if status != 0:
            raise CaptureError(
                f"the model does not evaluate tokens (llama_decode returned {status}); capture needs a decoder"
            )
        memory = llama_cpp.llama_get_memory(ctx)
        if memory is not None:
            llama_cpp.llama_memory_clear(memory, True)
        if self.mechanism is CaptureMechanism.OUTPUTS:
            count = ffi.new("int32_t *")
            check(lib.gm_capture_kept(self.handle, count))
            if count[0] != len(self.kept):
                raise _NotKept(
                    f"outputs of {count[0]} of the blocks {self.kept} stay in place in this model's graph; capture with "
                    "mechanism='callback'"
                )
        tok_embd, output = ffi.new("struct ggml_tensor **"), ffi.new("struct ggml_tensor **")
        check(lib.gm_capture_target_tensors(self.handle, tok_embd, output))
        self.tok_embd, self.output = (int(ffi.cast("uintptr_t", t[0])) for t in (tok_embd, output))
        width, rows = ffi.new("int64_t *"), ffi.new("int64_t *")
        for layer in range(n_layer):
            check(lib.gm_capture_found(self.handle, layer, width, rows))
            if width[0]:
                self.found[layer] = (width[0], rows[0])

    def output_device(self) -> Device:
        """The device on which the model's output matrix lies."""
        index = ffi.new("int32_t *")
        check(lib.gm_tensor_device(ffi.cast("struct ggml_tensor *", self.output), index))
        return devices()[int(index[0])]

    def require(self, layers: Sequence[int], n_embd: int) -> None:
        """Every tap exists, has the mirror's width, and gives a row per token."""
        for layer in layers:
            width, rows = self.found.get(layer, (0, 0))
            if not width:
                known = (
                    f"blocks with a named output: {_spans(self.found)}"
                    if self.found
                    else "its graph names no block outputs (l_out)"
                )
                raise CaptureError(f"the model has no output of block {layer} to tap; {known}")
            if width != n_embd:
                raise CaptureError(f"the output of block {layer} is {width} wide, the mirror's n_embd is {n_embd}")
            if rows != self.evaluated:
                raise CaptureError(
                    f"the output of block {layer} has rows only for tokens whose logits are asked for; tap an earlier block"
                )

    @contextmanager
    def attached(self, layers: Sequence[int], sinks: Sequence[Sink]) -> Iterator[CaptureMechanism]:
        if self.busy:
            raise CaptureError(
                "this model is already being captured; leave that capture first, or give it several mirrors"
            )
        # The handles also keep what they are of alive while it is attached.
        mirrors = [s._open() for s in sinks if isinstance(s, FeatureMirror)]
        fusers = [s._open() for s in sinks if isinstance(s, Fuser)]
        check(
            lib.gm_capture_attach(
                self.handle,
                len(layers),
                ffi.new("int32_t[]", layers),
                len(mirrors),
                ffi.new("gm_mirror *[]", mirrors),
                len(fusers),
                ffi.new("gm_fuser *[]", fusers),
            )
        )
        self.busy = True
        in_use[id(self)] = [self.handle, *([self.keeper.owner] if self.keeper else []), *mirrors, *fusers]
        followed = {
            "decode": self._decode,
            "kv_cache_clear": self._clear,
            "kv_cache_seq_rm": self._remove,
            "kv_cache_seq_shift": self._shift,
        }
        self.sinks = list(sinks)
        vars(self.context).update(followed)
        try:
            yield self.mechanism
        finally:
            context = self.context
            for name in followed if context is not None else ():
                del vars(context)[name]
            self.sinks = []
            self.busy = False
            check(lib.gm_capture_detach(self.handle))
            del in_use[id(self)]

    def _decode(self, batch: Any) -> None:
        """In place of LlamaContext.decode: announce the batch's positions, evaluate, verify that each row came."""
        span = _positions(batch)
        decode = type(self.context).decode
        if span is None:
            decode(self.context, batch)
            return
        if self.mechanism is CaptureMechanism.OUTPUTS:
            self._evaluate_and_take(batch, span)
            return
        self._announce(span)
        try:
            decode(self.context, batch)
        except BaseException:
            lib.gm_capture_cancel(self.handle)
            raise
        check(lib.gm_capture_end(self.handle))
        self._note(span, batch)

    def _evaluate_and_take(self, batch: Any, span: tuple[int, int]) -> None:
        """Micro-batch by micro-batch: the next one's graph would overwrite the outputs of this one's."""
        context = self.context
        decode, ctx = type(context).decode, context.ctx
        pieces = micro_batches(batch.batch, *self.cut)
        try:
            for piece in pieces:
                decode(context, _Piece(piece))
                if piece is pieces[0]:  # a device is at work meanwhile
                    self._announce(span)
                    self._note(span, batch)
                llama_cpp.llama_synchronize(ctx)
                check(lib.gm_capture_take(self.handle, piece.n_tokens))
            check(lib.gm_capture_end(self.handle))
        except BaseException:
            lib.gm_capture_cancel(self.handle)
            self._truncate(span[0])
            raise

    def _announce(self, span: tuple[int, int]) -> None:
        self._forget_other_tokens(span[0])
        check(lib.gm_capture_begin(self.handle, *span))

    # A mirror remembers which tokens its rows are of. A sequence that was exchanged behind its back (a state that was loaded, an
    # evaluation while it was not attached) shows itself by other tokens at the same positions.

    def _forget_other_tokens(self, start: int) -> None:
        llm = self.llm()
        if llm is None or llm.n_tokens != start:
            return  # evaluated past the Llama: it does not know the tokens
        present: npt.NDArray[np.int32] = llm.input_ids[:start]
        for sink in self.sinks:
            mirror = _ring(sink)
            if mirror._tokens is None:
                mirror._tokens = TokenLog(present)
                continue
            other = mirror._tokens.first_difference(present)
            if other < start:
                if not sink.closed:
                    sink.truncate(other)
                mirror._tokens.put(other, present[other:])

    def _note(self, span: tuple[int, int], batch: Any) -> None:
        start, count = span
        tokens = _tokens(batch, count)
        for sink in self.sinks:
            known = _ring(sink)._tokens
            if known is not None:
                known.put(start, tokens)

    # The mirrors follow what is done to the captured sequence's cells, too.

    def _clear(self) -> None:
        type(self.context).kv_cache_clear(self.context)
        self._truncate(0)

    def _remove(self, seq_id: int, p0: int, p1: int) -> bool:
        removed: bool = type(self.context).kv_cache_seq_rm(self.context, seq_id, p0, p1)
        if removed and seq_id in (-1, SEQUENCE):
            self._truncate(p0)
        return removed

    def _shift(self, seq_id: int, p0: int, p1: int, shift: int) -> None:
        type(self.context).kv_cache_seq_shift(self.context, seq_id, p0, p1, shift)
        if seq_id in (-1, SEQUENCE):
            # Rows do not move between slots: those whose positions changed are forgotten.
            self._truncate(min(p0, p0 + shift))

    def _truncate(self, position: int) -> None:
        for sink in self.sinks:
            if not sink.closed:
                sink.truncate(max(position, 0))


class _NotKept(CaptureError):
    """The graph's outputs cannot be kept in place."""


class _Piece:
    """A LlamaBatch as LlamaContext.decode reads it."""

    def __init__(self, batch: Any) -> None:
        self.batch = batch


def _positions(batch: Any) -> tuple[int, int] | None:
    """(first position, count) of the captured sequence in a LlamaBatch; None if the batch is of other sequences only."""
    raw = batch.batch
    start = ffi.new("int64_t *")
    arrays = [
        ffi.cast(kind, _address(array)) for kind, array in zip(_BATCH, (raw.pos, raw.n_seq_id, raw.seq_id), strict=True)
    ]
    check(lib.gm_batch_span(raw.n_tokens, *arrays, SEQUENCE, start))
    return None if start[0] < 0 else (int(start[0]), raw.n_tokens)


_BATCH = tuple(map(ffi.typeof, ("int32_t *", "int32_t *", "int32_t **")))


def _address(pointer: Any) -> int:
    return ctypes.cast(pointer, ctypes.c_void_p).value or 0


def _tokens(batch: Any, count: int) -> npt.NDArray[np.int32]:
    return np.ctypeslib.as_array((ctypes.c_int32 * count).from_address(_address(batch.batch.token)))


def _checked_taps(llm: Llama, taps: Sequence[int] | None) -> list[int]:
    if llm._model.model is None or llm._ctx.ctx is None:
        raise CaptureError("the model is closed")
    n_layer = llama_cpp.llama_model_n_layer(llm.model)
    if taps is None:
        from .model_info import default_taps

        return list(default_taps(n_layer))
    try:
        layers = [operator.index(t) for t in taps]
    except TypeError:
        raise ArgumentError(f"taps {taps!r} must be a sequence of integers") from None
    bad = [t for t in layers if not 0 <= t < n_layer]
    if bad:
        raise CaptureError(f"the model has no block {bad[0]}; its blocks are 0 to {n_layer - 1}")
    if len(set(layers)) != len(layers) or not layers:
        raise ArgumentError(f"taps {layers} must be distinct, one at least")
    return layers


def _ring(sink: Sink) -> FeatureMirror:
    return sink.mirror if isinstance(sink, Fuser) else sink


def _check_mirrors(mirrors: Sequence[Any], layers: Sequence[int]) -> None:
    if not mirrors:
        raise ArgumentError("capture needs a mirror")
    for m in mirrors:
        if not isinstance(m, (FeatureMirror, Fuser)):
            raise ArgumentError(f"capture writes to FeatureMirrors, not to {type(m).__name__}")
        if isinstance(m, FeatureMirror) and m.rows == FUSED:
            raise ArgumentError("a mirror of fused rows is filled through a Fuser, which knows the draft")
        m._open()
        if m.taps != len(layers):
            raise ArgumentError(f"the mirror has {m.taps} taps, capture was given {len(layers)}")
        if m.n_embd != mirrors[0].n_embd:
            raise ArgumentError(f"the mirrors differ in n_embd: {m.n_embd} and {mirrors[0].n_embd}")


def _remake_context(llm: Llama, hook: Hook, layers: Sequence[int]) -> None:
    """Give the Llama a native context with the hook in it, its state carried over. On failure it is as it was."""
    context = llm._ctx
    params = type(llm.context_params).from_buffer_copy(llm.context_params)
    if params.embeddings:
        raise CaptureError("capture works on a model that generates text, not with embedding=True")
    if hook.mechanism is CaptureMechanism.OUTPUTS:
        hook.keeper, hook.kept = Keeper(hook.handle, layers), list(layers)
        hook.keeper.put_into(params)
    else:
        address = int(ffi.cast("uintptr_t", lib.gm_capture_callback()))
        params.cb_eval = ctypes.cast(address, llama_cpp.ggml_backend_sched_eval_callback)
        params.cb_eval_user_data = int(ffi.cast("uintptr_t", hook.handle))

    state = take_state(context.ctx) if llm.n_tokens > 0 else None
    # Two contexts at once would hold the KV cache twice, which may not fit: the old one goes first.
    llama_cpp.llama_free(context.ctx)
    context.ctx = None
    try:
        context.ctx = _new_context(llm, params)
        hook.discover(context.ctx, llama_cpp.llama_model_n_layer(llm.model), params.n_ubatch, _scratch_token(llm))
    except BaseException:
        if context.ctx is not None:
            llama_cpp.llama_free(context.ctx)
        vars(context).pop(_ATTRIBUTE, None)  # the hook of a context that is gone
        context.ctx = _new_context(llm, llm.context_params)
        raise
    finally:
        if context.ctx is not None:
            context.memory = llama_cpp.llama_get_memory(context.ctx)
            if llm._lora_adapter is not None:
                adapters: Any = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(llm._lora_adapter)  # type: ignore[misc]
                llama_cpp.llama_set_adapters_lora(context.ctx, adapters, 1, (ctypes.c_float * 1)(llm.lora_scale))
            if state is not None:
                put_state(context.ctx, state)
        llm._requires_eval = True


def _new_context(llm: Llama, params: Any) -> Any:
    ctx = llama_cpp.llama_init_from_model(llm.model, params)
    if ctx is None:
        raise CaptureError("llama.cpp could not remake the model's context for capture")
    return ctx


def take_state(ctx: Any) -> bytes:
    """A native context's whole state."""
    size = llama_cpp.llama_state_get_size(ctx)
    state = (ctypes.c_uint8 * size)()
    written = llama_cpp.llama_state_get_data(ctx, state, size)
    if written > size:
        raise CaptureError(f"llama.cpp wrote {written} bytes of state, {size} were announced")
    return bytes(memoryview(state)[:written])


def put_state(ctx: Any, state: bytes) -> bool:
    """Give a native context the state back; False: llama.cpp did not take it whole."""
    data = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
    taken: int = llama_cpp.llama_state_set_data(ctx, data, len(state))
    return taken == len(state)


def _scratch_token(llm: Llama) -> int:
    bos = llm.token_bos()
    return bos if bos >= 0 else 0


def _fingerprint(llm: Llama) -> str:
    from .fingerprint import fingerprint

    return fingerprint(llm.model_path)


def _spans(layers: dict[int, tuple[int, int]]) -> str:
    return f"{min(layers)} to {max(layers)}"
