"""The draft: a DFlash GGUF of either family, checked against its target, and its native graph."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ._native import check, ffi, lib
from .byte_size import format_bytes
from .device import devices
from .errors import (
    ArgumentError,
    ClosedError,
    DraftMismatchError,
    MirrorMemoryError,
    ModelFileError,
    UnsupportedDraftError,
)
from .gguf_file import GgufFile
from .mirror import FeatureMirror, _int32
from .model_info import ModelInfo, default_taps
from .row_kind import FUSED, RAW, parse_rows

#: How a draft keeps the keys and values of its window; "off" computes them at each step, into f16.
DRAFT_KV = {"f16": "f16", "q8_0": "q8_0", "off": "f16"}


def require_kv(kv: str) -> None:
    """Raise ArgumentError unless a draft can keep its keys and values so."""
    if kv not in DRAFT_KV:
        raise ArgumentError(f"draft_kv is {kv!r}; use one of {', '.join(DRAFT_KV)}")


#: Names of the projection that all layers share.
_FUSION = ("fc.weight", "dflash.fc.weight", "dflash_fc.weight")

_ROPE_SCALING = ("none", "linear")
_MAX_LAYERS = 64  # the native layer keeps a bit for each


@dataclass(frozen=True)
class DraftSpec:
    """A draft's shape and conventions, the same for both families of files.

    Attributes:
        taps: 0-based blocks of the target whose *outputs* a row holds.
        block_size: tokens in a block, the last committed one included.
        swa_layers: draft layers with a sliding window of ``n_swa`` positions.
        causal: attention inside the block looks back only.
        can_fuse: all layers read one projection of a row, so that it can be kept in place of the row.
    """

    path: Path
    arch: str
    name: str
    taps: tuple[int, ...]
    n_embd_target: int
    block_size: int
    mask_token: int
    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_rot: int
    rms_eps: float
    rope_base: float
    rope_scale: float
    embedding_scale: float
    attention_scale: float
    attention_value_scale: float
    gelu: bool
    causal: bool
    n_swa: int
    swa_layers: tuple[int, ...]
    can_fuse: bool

    @classmethod
    def read(cls, path: str | os.PathLike[str], target: ModelInfo) -> DraftSpec:
        """Read a draft's header and check it against its target; nothing is allocated.

        Raises:
            ModelFileError: missing, truncated or foreign file, or a key that is needed is absent.
            UnsupportedDraftError: a DFlash2 or DSpark draft, or a feature that the graph does not have.
            DraftMismatchError: a draft for another target; names both numbers.
        """
        info = ModelInfo.read(path)
        if info.draft is None:
            raise UnsupportedDraftError(
                f"{path} is a {info.arch} model, not a DFlash draft (general.architecture dflash, qwen35-dflash-draft, "
                "dflash-draft or gemma4-dflash-draft)"
            )
        if target.is_draft:
            raise DraftMismatchError(f"{path} does not fit {target.path.name}: {target.path.name} is itself a draft")
        file = GgufFile.read(path)
        taps = info.draft.taps
        if taps is None:
            taps = default_taps(max(target.n_layer, 2), info.draft.n_taps)
        spec = cls.of_file(file, info, taps)
        spec._check(info, target, has_embedding="token_embd.weight" in file.tensors)
        return spec

    @classmethod
    def of_file(cls, file: GgufFile, info: ModelInfo, taps: tuple[int, ...]) -> DraftSpec:
        """What a draft's file says by itself, checked against no target.

        Args:
            taps: those to take where the file names none.

        Raises:
            ModelFileError, UnsupportedDraftError: as :meth:`read`.
        """
        assert info.draft is not None
        meta, arch = file.metadata, info.arch

        def number(key: str, default: float | None = None) -> Any:
            value = meta.get(f"{arch}.{key}", default)
            if value is None:
                raise ModelFileError(f"{file.path}: lacks {arch}.{key}")
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 2**31:
                raise UnsupportedDraftError(f"{file.path}: {arch}.{key} is {value!r}, a number was expected")
            return value

        if info.n_layer > _MAX_LAYERS:
            raise UnsupportedDraftError(
                f"{file.path}: {info.n_layer} layers; drafts of up to {_MAX_LAYERS} are supported"
            )
        n_head = int(number("attention.head_count"))
        head_dim = int(number("attention.key_length", info.n_embd // max(n_head, 1)))
        scaling = meta.get(f"{arch}.rope.scaling.type", "linear")  # llama.cpp's default, by a factor of 1
        if scaling not in _ROPE_SCALING:
            raise UnsupportedDraftError(
                f"{file.path}: rope scaling {scaling!r} is not supported in drafts; {_ROPE_SCALING} are"
            )
        factor = number("rope.scaling.factor", 1.0) if scaling == "linear" else 1.0
        activation = meta.get(f"{arch}.hidden_activation", "silu")
        if activation not in ("silu", "gelu", "gelu_pytorch_tanh"):
            raise UnsupportedDraftError(f"{file.path}: activation {activation!r} is not supported; silu and gelu are")
        n_swa = int(number("attention.sliding_window", 0))
        pattern = meta.get(f"{arch}.attention.sliding_window_pattern", [True] * info.n_layer)
        if not isinstance(pattern, list):
            raise UnsupportedDraftError(
                f"{file.path}: {arch}.attention.sliding_window_pattern is {pattern!r}; a list, one entry a layer, was expected"
            )
        return cls(
            path=file.path,
            arch=arch,
            name=info.name,
            taps=taps if info.draft.taps is None else info.draft.taps,
            n_embd_target=info.draft.row_width // info.draft.n_taps,
            block_size=info.draft.block_size or 0,
            mask_token=-1 if info.draft.mask_token_id is None else info.draft.mask_token_id,
            n_layer=info.n_layer,
            n_embd=info.n_embd,
            n_head=n_head,
            n_head_kv=int(number("attention.head_count_kv", n_head)),
            head_dim=head_dim,
            n_rot=int(number("rope.dimension_count", head_dim)),
            rms_eps=float(number("attention.layer_norm_rms_epsilon")),
            rope_base=float(number("rope.freq_base", 10000.0)),
            rope_scale=1.0 / float(factor or 1.0),
            embedding_scale=float(number("embedding_scale", 0.0)),
            attention_scale=float(number("attention.scale", 0.0)),
            attention_value_scale=float(number("attention.value_scale", 0.0)),
            gelu=activation != "silu",
            causal=bool(meta.get(f"{arch}.attention.causal", False)),
            n_swa=n_swa,
            swa_layers=tuple(i for i, on in enumerate(pattern[: info.n_layer]) if on and n_swa),
            can_fuse=any(name in file.tensors for name in _FUSION),
        )

    def require_rows(self, rows: str | None) -> None:
        """Raise UnsupportedDraftError if such rows cannot be kept for this draft."""
        if rows == FUSED and not self.can_fuse:
            raise UnsupportedDraftError(
                f"{self.path} has no projection that all its layers share ({_FUSION[0]}), so its rows cannot be kept fused; "
                f'use feature_rows="{RAW}"'
            )

    def _check(self, info: ModelInfo, target: ModelInfo, *, has_embedding: bool) -> None:
        assert info.draft is not None

        def require(good: bool, message: str) -> None:
            if not good:
                raise DraftMismatchError(f"{self.path} does not fit {target.path.name}: {message}")

        require(
            self.n_embd_target == target.n_embd,
            f"it reads taps {self.n_embd_target} wide, the target's hidden state is {target.n_embd} wide",
        )
        require(
            has_embedding or self.n_embd == target.n_embd,
            f"it is {self.n_embd} wide and has no embedding of its own, the target's is {target.n_embd} wide",
        )
        require(
            len(self.taps) == info.draft.n_taps,
            f"it reads {info.draft.n_taps} taps that it does not name, a target of {target.n_layer} blocks has {len(self.taps)}",
        )
        twice = [t for t in self.taps if self.taps.count(t) > 1]
        require(not twice, f"it taps block {twice[0] if twice else 0} more than once")
        beyond = [t for t in self.taps if t >= target.n_layer]
        require(
            not beyond, f"it taps block {beyond[0] if beyond else 0}, the target has blocks 0 to {target.n_layer - 1}"
        )
        size = info.draft.block_size
        require(
            2 <= self.block_size <= 64,
            f"its block size is {'not given' if size is None else size}; 2 to 64 is possible",
        )
        require(self.mask_token >= 0, "it names no mask token")
        if target.n_vocab is not None:
            require(
                self.mask_token < target.n_vocab,
                f"mask token {self.mask_token} is outside the target's {target.n_vocab} tokens",
            )
            if info.n_vocab is not None:
                require(
                    info.n_vocab == target.n_vocab,
                    f"its vocabulary has {info.n_vocab} tokens, the target's {target.n_vocab}",
                )


@dataclass(frozen=True)
class DraftBytes:
    """Device bytes: weights, keys and values of the window, and scratch of the graphs. They do not grow while a draft works."""

    weights: int
    kv: int
    compute: int

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.compute


@dataclass(frozen=True)
class DraftTimes:
    """Work of a draft since it was made, or :meth:`Draft.reset_times`; nanoseconds.

    Attributes:
        rows_projected: made into keys and values.
        rows_moved: whose keys and values were copied so that the window's lie in the order of their positions.
        rows_checked: that were asked whether they have changed.
        mask_cells: of the attention mask, that were written.
    """

    steps: int
    rows_projected: int
    rows_moved: int
    rows_checked: int
    mask_cells: int
    read_ns: int
    fuse_ns: int
    project_ns: int
    block_ns: int


class Draft:
    """A draft's weights and graphs on one device.

    Args:
        spec: what to load.
        n_vocab: tokens of the target.
        tok_embd, output: addresses of the target's own embedding and output matrix (0: the draft has its own).
        device_index: device of the mirrors that it reads.
        window: context rows that the draft attends to, at most.
        n_threads: for host devices; 0 takes all cores.
        rows: what its mirror holds: "raw" or "fused" rows.
        kv: type of the window's keys and values, "f16" or "q8_0"; "off": they are made anew at each step.
        n_ctx: positions that there will be, at most; 0: any number, for which more keys and values need room.

    Raises:
        MirrorMemoryError: it does not fit; names the bytes needed and free, and what would help.
        DeviceError, UnsupportedError, ArgumentError: as for a mirror.
    """

    def __init__(
        self,
        spec: DraftSpec,
        *,
        n_vocab: int,
        tok_embd: int,
        output: int,
        device_index: int,
        window: int,
        n_threads: int = 0,
        rows: str = RAW,
        kv: str = "f16",
        n_ctx: int = 0,
    ) -> None:
        self.spec, self.n_vocab, self.window, self.rows, self.kv = spec, n_vocab, window, parse_rows(rows), kv
        self.device = devices()[device_index]
        self._handle: Any = None
        params = draft_params(
            spec,
            n_vocab=n_vocab,
            device_index=device_index,
            window=window,
            tok_embd=tok_embd,
            output=output,
            n_threads=n_threads,
            rows=rows,
            kv=kv,
            n_ctx=n_ctx,
        )
        out = ffi.new("gm_draft **")
        try:
            check(lib.gm_draft_new(params.struct, out))
        except MirrorMemoryError as error:
            raise _with_advice(error, params.struct) from None
        self._handle = ffi.gc(out[0], lib.gm_draft_free)
        self._tokens = ffi.new("int32_t[]", spec.block_size)
        self._context = ffi.new("int64_t *")
        self._last_rows = 0

    def step(self, mirror: FeatureMirror, *, n_past: int, last_token: int, n_tokens: int) -> tuple[list[int], int]:
        """Draft ``n_tokens`` tokens after ``last_token``, which is at position ``n_past``.

        Returns:
            The tokens, and how many context rows were attended to: the complete rows right before ``n_past``, up to the window.
        """
        check(
            lib.gm_draft_step(self._open(), mirror._open(), n_past, last_token, n_tokens, self._tokens, self._context)
        )
        self._last_rows = n_tokens + 1
        return list(self._tokens[0:n_tokens]), int(self._context[0])

    def fuse(self, raw: FeatureMirror, fused: FeatureMirror, *, start: int, count: int) -> None:
        """Fused rows of positions ``start..start + count - 1`` of ``raw`` into ``fused``, on the draft's device.

        Raises:
            StaleRowError: names the first position that ``raw`` does not hold whole.
            ShapeError, ArgumentError: rows of another kind than this draft's.
        """
        check(lib.gm_draft_fuse(self._open(), raw._open(), start, count, fused._open()))

    def logits(self) -> npt.NDArray[np.float32]:
        """Logits of the last step, float32 ``[n_tokens + 1, n_vocab]``; row 0 is the last committed token's, row i predicts token i."""
        out = np.empty((self._last_rows, self.n_vocab), np.float32)
        check(lib.gm_draft_logits(self._open(), out.size, ffi.cast("float *", out.ctypes.data)))
        return out

    @property
    def bytes(self) -> DraftBytes:
        b = ffi.new("gm_draft_bytes *")
        check(lib.gm_draft_get_bytes(self._open(), b))
        return DraftBytes(b.weights, b.kv, b.compute)

    def times(self) -> DraftTimes:
        t = ffi.new("gm_draft_times *")
        check(lib.gm_draft_get_times(self._open(), t))
        return DraftTimes(*(getattr(t, field.name) for field in fields(DraftTimes)))

    def reset_times(self) -> None:
        check(lib.gm_draft_reset_times(self._open()))

    def close(self) -> None:
        self._handle = None

    def _open(self) -> Any:
        if self._handle is None:
            raise ClosedError("this draft is closed")
        return self._handle


@dataclass(frozen=True)
class _Params:
    struct: Any
    path: Any  # owns the C string that the struct points to


def draft_params(
    spec: DraftSpec,
    *,
    n_vocab: int,
    device_index: int,
    window: int,
    tok_embd: int = 0,
    output: int = 0,
    n_threads: int = 0,
    rows: str = RAW,
    kv: str = "f16",
    n_ctx: int = 0,
) -> _Params:
    require_kv(kv)
    p = ffi.new("gm_draft_params *")
    path = ffi.new("char[]", os.fsencode(spec.path))
    p.path, p.device, p.n_threads = path, device_index, n_threads
    for name in (
        "n_layer",
        "n_embd",
        "n_head",
        "n_head_kv",
        "head_dim",
        "n_rot",
        "n_embd_target",
        "block_size",
        "mask_token",
        "n_swa",
    ):
        setattr(p, name, _int32(getattr(spec, name), f"{spec.path}: {name}"))
    for name in ("rms_eps", "rope_base", "rope_scale", "embedding_scale", "attention_scale", "attention_value_scale"):
        setattr(p, name, getattr(spec, name))
    p.n_taps, p.n_vocab = len(spec.taps), _int32(n_vocab, "n_vocab")
    p.gelu, p.causal = spec.gelu, spec.causal
    p.swa_layers = sum(1 << il for il in spec.swa_layers)
    p.window, p.n_ctx = window, n_ctx
    p.tok_embd, p.output = (ffi.cast("struct ggml_tensor *", t) for t in (tok_embd, output))
    p.fused_rows = parse_rows(rows) == FUSED
    p.kv_type, p.keep_kv = lib.gm_type_from_name(DRAFT_KV[kv].encode()), kv != "off"
    return _Params(p, path)


def draft_bytes(
    spec: DraftSpec,
    *,
    n_vocab: int,
    device_index: int,
    window: int,
    tok_embd: int = 0,
    output: int = 0,
    rows: str = RAW,
    kv: str = "f16",
    n_ctx: int = 0,
) -> DraftBytes:
    """The device bytes that a :class:`Draft` would allocate, without allocating.

    Args:
        tok_embd, output: as for the draft; 0: taken to lie on its device.
    """
    params = draft_params(  # it owns the path
        spec,
        n_vocab=n_vocab,
        device_index=device_index,
        window=window,
        tok_embd=tok_embd,
        output=output,
        rows=rows,
        kv=kv,
        n_ctx=n_ctx,
    )
    return _size_of(params.struct)


def _size_of(params: Any) -> DraftBytes:
    b = ffi.new("gm_draft_bytes *")
    check(lib.gm_draft_size_of(params, b))
    return DraftBytes(b.weights, b.kv, b.compute)


def _with_advice(error: MirrorMemoryError, params: Any) -> MirrorMemoryError:
    """The same error with what would help."""
    from .draft_memory import room_elsewhere
    from .plan import largest

    needed, free, asked = error.bytes_needed, error.bytes_free, params.window
    if not needed:  # a small piece was refused, by an allocator that names no sizes
        needed, free = _size_of(params).total, devices()[params.device].memory_free

    def fits(window: int) -> bool:
        params.window = window
        return _size_of(params).total <= free

    if needed <= free:
        window, advice = 0, ["try a smaller window"]  # refused all the same, for what may be any reason
    else:
        window = largest(asked - 1, fits)
        advice = [f"a window of {window} fits" if window else "no window is small enough"]
    advice += room_elsewhere(params.device, needed)
    message = f"{error} (needed {format_bytes(needed)}, free {format_bytes(free)}); {'; '.join(advice)}"
    return MirrorMemoryError(message, bytes_needed=needed, bytes_free=free, max_window=window)
