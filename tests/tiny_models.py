"""Random GGUF models of a few hundred kilobytes, for tests: targets that llama.cpp runs, and DFlash drafts for them.

The weights depend on (seed, tensor name) alone: a model with fewer blocks has the first blocks of the longer one. All
models share one vocabulary, so that any draft here fits any target: the 256 bytes of byte-level BPE, some merges, then
:data:`BOS`, :data:`EOS` and :data:`MASK`.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

_MERGES = "Ġ t,Ġ a,h e,i n,o n,e r,a t,o r,e n,i s,Ġt he,i t,Ġ s,Ġ i,in g,Ġ o".split(",")
_NORMAL, _CONTROL = 1, 3  # llama.cpp's token types


def _byte_letters() -> list[str]:
    """The letter for each byte in byte-level BPE (GPT-2): itself if printable, else the next one from 256."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


_PIECES = [*_byte_letters(), *(merge.replace(" ", "") for merge in _MERGES)]
BOS, EOS, MASK = len(_PIECES), len(_PIECES) + 1, len(_PIECES) + 2
N_VOCAB = 288  # the rest is control tokens without a meaning
TOKENS = [*_PIECES, "<|bos|>", "<|eos|>", "<|mask|>", *(f"<|spare{i}|>" for i in range(N_VOCAB - len(_PIECES) - 3))]

# Bytes that are not ASCII text, and control tokens. Their logits are 0, never the largest: greedy text is legible, and
# does not end.
_SILENT = [
    *(byte for byte in range(256) if byte != ord("\n") and not ord(" ") <= byte <= ord("~")),
    *range(BOS, N_VOCAB),
]

TARGET_ARCHS = ("llama", "qwen3", "gemma3", "qwen35", "lfm2", "gpt2", "mamba")
LUCEBOX_FORMATS = ("qwen35-dflash-draft", "dflash-draft", "gemma4-dflash-draft")
DRAFT_FORMATS = ("dflash", *LUCEBOX_FORMATS)


@dataclass(frozen=True)
class _Shape:
    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_ff: int
    n_ctx: int

    @property
    def q_dim(self) -> int:
        return self.n_head * self.head_dim

    @property
    def kv_dim(self) -> int:
        return self.n_head_kv * self.head_dim

    def metadata(self) -> dict[str, Any]:
        """Keys that every transformer has, without the architecture's prefix."""
        return {
            "context_length": self.n_ctx,
            "embedding_length": self.n_embd,
            "block_count": self.n_layer,
            "feed_forward_length": self.n_ff,
            "attention.head_count": self.n_head,
            "attention.head_count_kv": self.n_head_kv,
            "attention.key_length": self.head_dim,
            "attention.value_length": self.head_dim,
            "attention.layer_norm_rms_epsilon": 1e-6,
            "rope.dimension_count": self.head_dim,
            "rope.freq_base": 10000.0,
        }


class _Weights:
    """The tensors of one file. Shapes are numpy's: ggml's, reversed."""

    def __init__(self, seed: int, matrix_type: str) -> None:
        self._seed = seed
        self._matrix_type = gguf.GGMLQuantizationType[matrix_type.upper()]
        self.tensors: dict[str, tuple[npt.NDArray[Any], gguf.GGMLQuantizationType]] = {}

    def rng(self, name: str) -> np.random.Generator:
        return np.random.default_rng([self._seed, zlib.crc32(name.encode())])

    def raw(self, name: str, values: npt.NDArray[Any]) -> None:
        """A tensor that llama.cpp wants in F32: norms, biases, convolution kernels, scan parameters."""
        self.tensors[name] = (values.astype(np.float32), gguf.GGMLQuantizationType.F32)

    def matrix(self, name: str, n_out: int, n_in: int, *, std: float | None = None, silent: Sequence[int] = ()) -> None:
        """``[n_out, n_in]``, of std ``1 / sqrt(n_in)`` unless told; rows ``silent`` are zero."""
        values = self.rng(name).normal(0.0, n_in**-0.5 if std is None else std, (n_out, n_in)).astype(np.float32)
        values[list(silent)] = 0.0
        self.tensors[name] = (gguf.quants.quantize(values, self._matrix_type), self._matrix_type)

    def norm(self, name: str, n: int, mean: float = 1.0) -> None:
        self.raw(name, self.rng(name).uniform(mean - 0.3, mean + 0.3, n))

    def bias(self, name: str, n: int) -> None:
        self.raw(name, self.rng(name).normal(0.0, 0.1, n))

    def kernel(self, name: str, channels: int, size: int) -> None:
        self.raw(name, self.rng(name).normal(0.0, 0.5, (channels, size)))

    def token_embedding(self, n_embd: int, std: float = 1.0) -> None:
        self.matrix("token_embd.weight", N_VOCAB, n_embd, std=std)

    def output(self, n_embd: int) -> None:
        # Logits of std 3, so that ties are rare.
        self.matrix("output.weight", N_VOCAB, n_embd, std=3.0 * n_embd**-0.5, silent=_SILENT)

    def attention(self, block: str, s: _Shape, *, q_dim: int | None = None, head_norms: bool) -> None:
        self.matrix(f"{block}.attn_q.weight", q_dim or s.q_dim, s.n_embd, std=2.0 * s.n_embd**-0.5)
        self.matrix(f"{block}.attn_k.weight", s.kv_dim, s.n_embd, std=2.0 * s.n_embd**-0.5)
        self.matrix(f"{block}.attn_v.weight", s.kv_dim, s.n_embd)
        self.matrix(f"{block}.attn_output.weight", s.n_embd, s.q_dim, std=2.0 * s.q_dim**-0.5)
        if head_norms:
            # Above 1, so that attention is far from uniform and the text depends on the whole prompt.
            self.norm(f"{block}.attn_q_norm.weight", s.head_dim, mean=1.6)
            self.norm(f"{block}.attn_k_norm.weight", s.head_dim, mean=1.6)

    def feed_forward(self, block: str, s: _Shape) -> None:
        self.matrix(f"{block}.ffn_gate.weight", s.n_ff, s.n_embd)
        self.matrix(f"{block}.ffn_up.weight", s.n_ff, s.n_embd)
        self.matrix(f"{block}.ffn_down.weight", s.n_embd, s.n_ff)


# ----------------------------------------------------------------------------------------------------- targets

# Each adds the tensors of one architecture and returns its metadata, keys without the architecture's prefix.


def _llama(w: _Weights, s: _Shape) -> dict[str, Any]:
    w.token_embedding(s.n_embd)
    for i in range(s.n_layer):
        w.norm(f"blk.{i}.attn_norm.weight", s.n_embd)
        w.attention(f"blk.{i}", s, head_norms=False)
        w.norm(f"blk.{i}.ffn_norm.weight", s.n_embd)
        w.feed_forward(f"blk.{i}", s)
    w.norm("output_norm.weight", s.n_embd)
    w.output(s.n_embd)
    return {**s.metadata(), "vocab_size": N_VOCAB}


def _qwen3(w: _Weights, s: _Shape) -> dict[str, Any]:
    w.token_embedding(s.n_embd)
    for i in range(s.n_layer):
        w.norm(f"blk.{i}.attn_norm.weight", s.n_embd)
        w.attention(f"blk.{i}", s, head_norms=True)
        w.norm(f"blk.{i}.ffn_norm.weight", s.n_embd)
        w.feed_forward(f"blk.{i}", s)
    w.norm("output_norm.weight", s.n_embd)
    w.output(s.n_embd)
    return s.metadata()


def _gemma3(w: _Weights, s: _Shape) -> dict[str, Any]:
    w.token_embedding(s.n_embd, std=s.n_embd**-0.5)  # the graph scales embeddings by sqrt(n_embd)
    for i in range(s.n_layer):
        w.norm(f"blk.{i}.attn_norm.weight", s.n_embd)
        w.attention(f"blk.{i}", s, head_norms=True)
        w.norm(f"blk.{i}.post_attention_norm.weight", s.n_embd)
        w.norm(f"blk.{i}.ffn_norm.weight", s.n_embd)
        w.feed_forward(f"blk.{i}", s)
        w.norm(f"blk.{i}.post_ffw_norm.weight", s.n_embd)
    w.norm("output_norm.weight", s.n_embd)
    w.output(s.n_embd)
    return {**s.metadata(), "attention.sliding_window": 32}  # five sliding blocks, one full, and so on


def _qwen35(w: _Weights, s: _Shape) -> dict[str, Any]:
    """Gated delta nets, every fourth block attention with a gate beside each query head."""
    interval, d_state, n_key_heads, n_value_heads, kernel = 4, 16, 2, 4, 4
    key_dim, value_dim = d_state * n_key_heads, d_state * n_value_heads
    w.token_embedding(s.n_embd)
    for i in range(s.n_layer):
        block = f"blk.{i}"
        w.norm(f"{block}.attn_norm.weight", s.n_embd)
        if (i + 1) % interval == 0:
            w.attention(block, s, q_dim=2 * s.q_dim, head_norms=True)
        else:
            w.matrix(f"{block}.attn_qkv.weight", 2 * key_dim + value_dim, s.n_embd)
            w.matrix(f"{block}.attn_gate.weight", value_dim, s.n_embd)
            w.kernel(f"{block}.ssm_conv1d.weight", 2 * key_dim + value_dim, kernel)
            w.bias(f"{block}.ssm_dt.bias", n_value_heads)
            w.raw(f"{block}.ssm_a", -w.rng(f"{block}.ssm_a").uniform(0.01, 0.3, n_value_heads))  # decay: below zero
            w.matrix(f"{block}.ssm_beta.weight", n_value_heads, s.n_embd)
            w.matrix(f"{block}.ssm_alpha.weight", n_value_heads, s.n_embd)
            w.norm(f"{block}.ssm_norm.weight", d_state)
            w.matrix(f"{block}.ssm_out.weight", s.n_embd, value_dim, std=2.0 * value_dim**-0.5)
        w.norm(f"{block}.post_attention_norm.weight", s.n_embd)
        w.feed_forward(block, s)
    w.norm("output_norm.weight", s.n_embd)
    w.output(s.n_embd)
    pairs = s.head_dim // 2
    return {
        **s.metadata(),
        "rope.dimension_sections": [pairs - 2 * (pairs // 3), pairs // 3, pairs // 3, 0],
        "full_attention_interval": interval,
        "ssm.conv_kernel": kernel,
        "ssm.inner_size": value_dim,
        "ssm.state_size": d_state,
        "ssm.time_step_rank": n_value_heads,
        "ssm.group_count": n_key_heads,
    }


def _lfm2(w: _Weights, s: _Shape) -> dict[str, Any]:
    """Short convolutions, every third block attention."""
    kernel = 3
    attends = [i % 3 == 2 for i in range(s.n_layer)]
    w.token_embedding(s.n_embd)
    for i in range(s.n_layer):
        block = f"blk.{i}"
        w.norm(f"{block}.attn_norm.weight", s.n_embd)
        if attends[i]:
            w.attention(block, s, head_norms=True)
        else:
            w.kernel(f"{block}.shortconv.conv.weight", s.n_embd, kernel)
            w.matrix(f"{block}.shortconv.in_proj.weight", 3 * s.n_embd, s.n_embd)
            w.matrix(f"{block}.shortconv.out_proj.weight", s.n_embd, s.n_embd)
        w.norm(f"{block}.ffn_norm.weight", s.n_embd)
        w.feed_forward(block, s)
    w.norm("token_embd_norm.weight", s.n_embd)  # llama.cpp's name for this architecture's output norm
    w.output(s.n_embd)
    return {
        **s.metadata(),
        "attention.head_count_kv": [s.n_head_kv if a else 0 for a in attends],
        "shortconv.l_cache": kernel,
        "vocab_size": N_VOCAB,
    }


def _gpt2(w: _Weights, s: _Shape) -> dict[str, Any]:
    w.token_embedding(s.n_embd)
    w.matrix("position_embd.weight", s.n_ctx, s.n_embd, std=0.5)
    for i in range(s.n_layer):
        block = f"blk.{i}"
        for name, n_out, n_in in (
            ("attn_qkv", 3 * s.n_embd, s.n_embd),
            ("attn_output", s.n_embd, s.n_embd),
            ("ffn_up", s.n_ff, s.n_embd),
            ("ffn_down", s.n_embd, s.n_ff),
        ):
            w.matrix(f"{block}.{name}.weight", n_out, n_in, std=1.5 * n_in**-0.5)
            w.bias(f"{block}.{name}.bias", n_out)
        for name in ("attn_norm", "ffn_norm"):
            w.norm(f"{block}.{name}.weight", s.n_embd)
            w.bias(f"{block}.{name}.bias", s.n_embd)
    w.norm("output_norm.weight", s.n_embd)
    w.bias("output_norm.bias", s.n_embd)
    w.output(s.n_embd)
    return {
        "context_length": s.n_ctx,
        "embedding_length": s.n_embd,
        "block_count": s.n_layer,
        "feed_forward_length": s.n_ff,
        "attention.head_count": s.n_head,
        "attention.layer_norm_epsilon": 1e-5,
    }


def _mamba(w: _Weights, s: _Shape) -> dict[str, Any]:
    d_inner, d_state, dt_rank, kernel = 2 * s.n_embd, 16, max(s.n_embd // 16, 1), 4
    w.token_embedding(s.n_embd)
    for i in range(s.n_layer):
        block = f"blk.{i}"
        w.norm(f"{block}.attn_norm.weight", s.n_embd)
        w.matrix(f"{block}.ssm_in.weight", 2 * d_inner, s.n_embd)
        w.kernel(f"{block}.ssm_conv1d.weight", d_inner, kernel)
        w.bias(f"{block}.ssm_conv1d.bias", d_inner)
        w.matrix(f"{block}.ssm_x.weight", dt_rank + 2 * d_state, d_inner)
        w.raw(f"{block}.ssm_dt.weight", w.rng(f"{block}.ssm_dt").normal(0, dt_rank**-0.5, (d_inner, dt_rank)))
        w.bias(f"{block}.ssm_dt.bias", d_inner)
        w.raw(f"{block}.ssm_a", np.tile(-np.arange(1.0, d_state + 1), (d_inner, 1)))
        w.raw(f"{block}.ssm_d", np.ones(d_inner))
        w.matrix(f"{block}.ssm_out.weight", s.n_embd, d_inner, std=2.0 * d_inner**-0.5)
    w.norm("output_norm.weight", s.n_embd)
    w.output(s.n_embd)
    return {
        "context_length": s.n_ctx,
        "embedding_length": s.n_embd,
        "block_count": s.n_layer,
        "feed_forward_length": 0,
        "attention.head_count": 0,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "ssm.conv_kernel": kernel,
        "ssm.inner_size": d_inner,
        "ssm.state_size": d_state,
        "ssm.time_step_rank": dt_rank,
    }


_TARGETS: dict[str, Callable[[_Weights, _Shape], dict[str, Any]]] = {
    "llama": _llama,
    "qwen3": _qwen3,
    "gemma3": _gemma3,
    "qwen35": _qwen35,
    "lfm2": _lfm2,
    "gpt2": _gpt2,
    "mamba": _mamba,
}


def write_tiny_model(
    path: str | Path,
    arch: str = "llama",
    *,
    seed: int = 0,
    n_layer: int = 8,
    n_embd: int = 64,
    n_head: int = 4,
    n_head_kv: int = 2,
    head_dim: int | None = None,
    n_ff: int = 96,
    n_ctx: int = 512,
    matrix_type: str = "f16",
) -> Path:
    """Write a random target that llama.cpp loads.

    Args:
        arch: one of :data:`TARGET_ARCHS`.
        head_dim: None: ``n_embd / n_head``. Only llama, qwen3, gemma3 and qwen35 take another.
        n_ctx: context length of the metadata (rows of position embeddings for gpt2).
        matrix_type: "f32", "f16", "bf16", "q8_0": what the matrices are stored as.
    """
    shape = _Shape(n_layer, n_embd, n_head, n_head_kv, head_dim or n_embd // n_head, n_ff, n_ctx)
    weights = _Weights(seed, matrix_type)
    metadata = _TARGETS[arch](weights, shape)
    return _write(path, arch, f"tiny {arch} {seed}", metadata, weights, _tokenizer())


# ------------------------------------------------------------------------------------------------------ drafts


def write_tiny_draft(
    path: str | Path,
    fmt: str = "dflash",
    *,
    taps: Sequence[int] = (1, 2, 3, 4, 5),
    n_embd: int = 64,
    block_size: int = 8,
    n_layer: int = 2,
    seed: int = 0,
    n_head: int = 4,
    n_head_kv: int = 2,
    head_dim: int | None = None,
    n_ff: int = 96,
    n_ctx: int = 512,
    sliding_window: int | None = None,
    sliding_window_pattern: Sequence[bool] | None = None,
    causal: bool | None = None,
    name_taps: bool = True,
    target_n_layer: int = 8,
    matrix_type: str = "f16",
) -> Path:
    """Write a random DFlash draft for any target of ``n_embd`` from :func:`write_tiny_model`.

    Args:
        fmt: one of :data:`DRAFT_FORMATS`: llama.cpp's ``dflash``, or an architecture of lucebox.
        taps: 0-based target blocks whose outputs are read.
        sliding_window: tokens; None for full attention in every block.
        sliding_window_pattern: per block, True for a sliding one; None: all slide but the last.
        causal: attention inside the block; None leaves the key out, which means not causal. dflash only.
        name_taps: False leaves out the list of taps, which lucebox files may lack. lucebox only.
        target_n_layer: gemma4-dflash-draft only: its files give the *target's* depth as ``n_target_layers``.
    """
    shape = _Shape(n_layer, n_embd, n_head, n_head_kv, head_dim or n_embd // n_head, n_ff, n_ctx)
    w = _Weights(seed, matrix_type)
    lucebox = fmt in LUCEBOX_FORMATS
    if not lucebox and fmt != "dflash":
        raise ValueError(f"{fmt!r} is none of {', '.join(DRAFT_FORMATS)}")

    dot = "_" if fmt == "dflash-draft" else "."  # both spellings are in the wild
    w.matrix(f"dflash{dot}fc.weight" if lucebox else "fc.weight", n_embd, len(taps) * n_embd)
    w.norm(f"dflash{dot}hidden_norm.weight" if lucebox else "enc.output_norm.weight", n_embd)
    for i in range(n_layer):
        w.norm(f"blk.{i}.attn_norm.weight", n_embd)
        w.attention(f"blk.{i}", shape, head_norms=True)
        w.norm(f"blk.{i}.post_attention_norm.weight" if fmt == "dflash-draft" else f"blk.{i}.ffn_norm.weight", n_embd)
        w.feed_forward(f"blk.{i}", shape)
    w.norm("output_norm.weight", n_embd)

    metadata = {**shape.metadata(), "vocab_size": N_VOCAB}
    if lucebox:
        metadata["dflash.block_size"] = block_size
        metadata["dflash.mask_token_id"] = MASK
        metadata["dflash.n_target_layers"] = target_n_layer if fmt == "gemma4-dflash-draft" else len(taps)
        if name_taps:
            metadata["dflash.target_layer_ids"] = list(taps)
    else:
        metadata["block_size"] = block_size
        metadata["target_layers"] = [tap + 1 for tap in taps]  # layer inputs
        if causal is not None:
            metadata["attention.causal"] = causal
    if sliding_window is not None:
        pattern = sliding_window_pattern or [i < n_layer - 1 for i in range(n_layer)]
        metadata["attention.sliding_window"] = sliding_window
        metadata["attention.sliding_window_pattern"] = [bool(slides) for slides in pattern]

    # The published gemma4 drafts have no tokenizer of their own.
    tokenizer = {} if fmt == "gemma4-dflash-draft" else _tokenizer()
    if not lucebox:
        tokenizer["tokenizer.ggml.mask_token_id"] = MASK
    return _write(path, fmt, f"tiny {fmt} {seed}", metadata, w, tokenizer)


# --------------------------------------------------------------------------------------------------- the file


def _tokenizer() -> dict[str, Any]:
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [_NORMAL if i < BOS else _CONTROL for i in range(N_VOCAB)],
        "tokenizer.ggml.merges": _MERGES,
        "tokenizer.ggml.bos_token_id": BOS,
        "tokenizer.ggml.eos_token_id": EOS,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_space_prefix": False,
    }


def _write(
    path: str | Path, arch: str, name: str, metadata: dict[str, Any], weights: _Weights, tokenizer: dict[str, Any]
) -> Path:
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name(name)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in {**{f"{arch}.{key}": value for key, value in metadata.items()}, **tokenizer}.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for tensor_name, (values, dtype) in weights.tensors.items():
        writer.add_tensor(tensor_name, values, raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(path)
