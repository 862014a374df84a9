"""The target in torch, from its GGUF: what it says next, and what its blocks put out.

One transformer with the parts that the supported architectures switch on or off. To add an architecture: give it an entry in
:data:`_ARCHS`, and let tests/test_train_draft.py compare it with llama.cpp.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import InputError, UnsupportedTargetError


@dataclass(frozen=True)
class _Arch:
    """What the GGUF does not say, since llama.cpp has it in code."""

    interleaved_rope: bool = False  # pairs (0, 1), (2, 3), ...; else value i with value i + head_dim / 2
    gelu: bool = False
    scaled_embedding: bool = False  # by sqrt(n_embd)
    swa_period: int = 0  # every so manieth block attends to everything, the others slide
    swa_rope_base: float = 10000.0


_ARCHS = {
    "llama": _Arch(interleaved_rope=True),
    "qwen2": _Arch(),
    "qwen3": _Arch(),
    "gemma3": _Arch(gelu=True, scaled_embedding=True, swa_period=6),
}


@dataclass(frozen=True)
class TargetConfig:
    """A target's shape, from its metadata."""

    arch: str
    name: str
    n_layer: int
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_ctx: int
    n_vocab: int
    rms_eps: float
    rope_base: float
    rope_scale: float
    n_swa: int
    bos: int | None
    eos: int | None

    @property
    def traits(self) -> _Arch:
        return _ARCHS[self.arch]

    @property
    def embedding_scale(self) -> float:
        return self.n_embd**0.5 if self.traits.scaled_embedding else 1.0

    def slides(self, il: int) -> bool:
        period = self.traits.swa_period
        return bool(self.n_swa and period) and il % period < period - 1

    @property
    def cache_bytes_per_token(self) -> int:
        """Keys and values of all layers in bf16."""
        return self.n_layer * 2 * self.n_head_kv * self.head_dim * 2


class TargetFile:
    """A target's GGUF, opened.

    Raises:
        InputError: it cannot be read as GGUF, or lacks a key.
        UnsupportedTargetError: an architecture or feature that :class:`Target` does not compute.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.reader = gguf.GGUFReader(path)
        except (OSError, ValueError, IndexError, KeyError) as error:
            raise InputError(f"{path} cannot be read as GGUF: {error}") from error
        self.tensors = {t.name: t for t in self.reader.tensors}
        self.config = self._config()

    def key(self, name: str, default: Any = None) -> Any:
        field = self.reader.fields.get(name)
        return default if field is None else field.contents()

    def _config(self) -> TargetConfig:
        arch = self.key("general.architecture")
        if arch not in _ARCHS:
            raise UnsupportedTargetError(
                f"{self.path} is a {arch} model; drafts can be trained for {', '.join(_ARCHS)}"
            )

        def number(name: str, default: Any = None) -> Any:
            value = self.key(f"{arch}.{name}", default)
            if value is None:
                raise InputError(f"{self.path}: lacks {arch}.{name}")
            if isinstance(value, list):
                raise UnsupportedTargetError(f"{self.path}: {arch}.{name} differs between blocks")
            return value

        n_embd, n_head = number("embedding_length"), number("attention.head_count")
        head_dim = number("attention.key_length", n_embd // n_head)
        for what, value in (("rope.dimension_count", head_dim), ("attention.value_length", head_dim)):
            if number(what, value) != head_dim:
                raise UnsupportedTargetError(f"{self.path}: {arch}.{what} is {number(what)}, heads are {head_dim} wide")
        scaling = self.key(f"{arch}.rope.scaling.type", "none")
        if scaling not in ("none", "linear"):
            raise UnsupportedTargetError(f"{self.path}: rope scaling {scaling!r}; none and linear are supported")
        for what in ("final_logit_softcapping", "logit_scale", "expert_count"):
            if self.key(f"{arch}.{what}"):
                raise UnsupportedTargetError(f"{self.path}: {arch}.{what} is not supported")
        if f"{arch}.attention.sliding_window_pattern" in self.reader.fields:
            raise UnsupportedTargetError(f"{self.path}: a sliding window pattern of its own is not supported")
        if "token_embd.weight" not in self.tensors:
            raise InputError(f"{self.path}: has no token_embd.weight")
        return TargetConfig(
            arch=arch,
            name=self.key("general.name", self.path.stem),
            n_layer=number("block_count"),
            n_embd=n_embd,
            n_ff=number("feed_forward_length"),
            n_head=n_head,
            n_head_kv=number("attention.head_count_kv", n_head),
            head_dim=head_dim,
            n_ctx=number("context_length"),
            n_vocab=int(self.tensors["token_embd.weight"].shape[1]),
            rms_eps=number("attention.layer_norm_rms_epsilon"),
            rope_base=number("rope.freq_base", 10000.0),
            rope_scale=1.0 / (number("rope.scaling.factor", 1.0) or 1.0) if scaling == "linear" else 1.0,
            n_swa=number("attention.sliding_window", 0),
            bos=self.key("tokenizer.ggml.bos_token_id"),
            eos=self.key("tokenizer.ggml.eos_token_id"),
        )


class KvCache:
    """Keys and values ``[n_rows, n_head_kv, length, head_dim]`` of each block."""

    def __init__(self, target: Target, n_rows: int, length: int) -> None:
        c = target.config
        shape = (n_rows, c.n_head_kv, length, c.head_dim)
        self.layers = [
            (
                torch.zeros(shape, dtype=target.dtype, device=target.device),
                torch.zeros(shape, dtype=target.dtype, device=target.device),
            )
            for _ in range(c.n_layer)
        ]


@dataclass
class _Block:
    attn_norm: Tensor
    qkv: Tensor  # [(n_head + 2 n_head_kv) * head_dim, n_embd]
    qkv_bias: Tensor | None
    qk_norm: Tensor | None  # [n_head + n_head_kv, head_dim]
    attn_output: Tensor
    post_attention_norm: Tensor | None
    ffn_norm: Tensor
    gate_up: Tensor  # [2 n_ff, n_embd]
    ffn_down: Tensor
    post_ffw_norm: Tensor | None


class Target:
    """The target on one device.

    Args:
        dtype: of weights and activations; bfloat16 on a GPU.
        max_length: positions that will be asked for.
    """

    def __init__(self, file: TargetFile, *, device: str, dtype: torch.dtype, max_length: int) -> None:
        self.config = c = file.config
        self.device, self.dtype = torch.device(device), dtype
        self._file = file
        self.embedding = self._load("token_embd.weight")
        self.output_norm = self._load("output_norm.weight")
        self.head = self._load("output.weight") if "output.weight" in file.tensors else self.embedding
        self._blocks = [self._block(il) for il in range(c.n_layer)]
        factors = self._load("rope_freqs.weight").float() if "rope_freqs.weight" in file.tensors else None
        self._rope = {
            False: self._rope_table(c.rope_base, c.rope_scale, factors, max_length),
            True: self._rope_table(c.traits.swa_rope_base, 1.0, factors, max_length),
        }

    def _load(self, name: str) -> Tensor:
        tensor = self._file.tensors.get(name)
        if tensor is None:
            raise UnsupportedTargetError(
                f"{self._file.path}: has no tensor {name}, which a {self.config.arch} model needs"
            )
        if tensor.tensor_type == gguf.GGMLQuantizationType.Q8_0:
            return self._q8_0(tensor)
        values = np.require(gguf.quants.dequantize(tensor.data, tensor.tensor_type), requirements="W")
        return torch.from_numpy(values).to(self.device, self.dtype)

    def _q8_0(self, tensor: gguf.ReaderTensor) -> Tensor:
        """On the device, since embeddings are large and mostly of this type: blocks of an F16 scale and 32 int8."""
        blocks = torch.from_numpy(np.array(tensor.data)).to(self.device).unflatten(-1, (-1, 34))
        scales = blocks[..., :2].contiguous().view(torch.float16).float()
        return (blocks[..., 2:].view(torch.int8) * scales).flatten(-2).to(self.dtype)

    def _maybe(self, name: str) -> Tensor | None:
        return self._load(name) if name in self._file.tensors else None

    def _block(self, il: int) -> _Block:
        def name(part: str) -> str:
            return f"blk.{il}.{part}.weight"

        c = self.config
        biases = [self._maybe(f"blk.{il}.attn_{x}.bias") for x in "qkv"]
        q_norm, k_norm = self._maybe(name("attn_q_norm")), self._maybe(name("attn_k_norm"))
        qk_norm = None
        if q_norm is not None and k_norm is not None:
            qk_norm = torch.cat([q_norm.expand(c.n_head, -1), k_norm.expand(c.n_head_kv, -1)])
        return _Block(
            attn_norm=self._load(name("attn_norm")),
            qkv=torch.cat([self._load(name(f"attn_{x}")) for x in "qkv"]),
            qkv_bias=torch.cat([b for b in biases if b is not None]) if all(b is not None for b in biases) else None,
            qk_norm=qk_norm,
            attn_output=self._load(name("attn_output")),
            post_attention_norm=self._maybe(name("post_attention_norm")),
            ffn_norm=self._load(name("ffn_norm")),
            gate_up=torch.cat([self._load(name("ffn_gate")), self._load(name("ffn_up"))]),
            ffn_down=self._load(name("ffn_down")),
            post_ffw_norm=self._maybe(name("post_ffw_norm")),
        )

    def _rope_table(self, base: float, scale: float, factors: Tensor | None, length: int) -> tuple[Tensor, Tensor]:
        return rope_table(
            self.config.head_dim, base, length, self.device,
            scale=scale, factors=factors, interleaved=self.config.traits.interleaved_rope,
        )  # fmt: skip

    def embed(self, tokens: Tensor) -> Tensor:
        """Input of the first block, ``[..., n_embd]``."""
        return F.embedding(tokens, self.embedding) * self.config.embedding_scale

    @torch.no_grad()
    def forward(
        self,
        tokens: Tensor,
        *,
        cache: KvCache | None = None,
        rows: slice = slice(None),
        start: int = 0,
        taps: Sequence[int] = (),
        n_blocks: int | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Evaluate ``tokens`` ``[B, T]`` at positions ``start..``.

        Args:
            cache: where keys and values of rows ``rows`` go; positions before ``start`` are there already. Without one, start is 0.
            taps: blocks whose outputs are wanted.
            n_blocks: stop behind so many blocks; None: all.

        Returns:
            What the last block put out, normed for the head, ``[B, T, n_embd]``; and the taps' outputs ``[B, T, n_embd]``.
        """
        c = self.config
        n = tokens.shape[1]
        x = self.embed(tokens)
        outputs = []
        masks = {slides: self._mask(start, n, slides, cache) for slides in (False, True)}
        for il, block in enumerate(self._blocks[:n_blocks]):
            slides = c.slides(il)
            cur = self._norm(x, block.attn_norm)
            cur = self._attention(
                block, cur, start, slides, masks[slides], None if cache is None else cache.layers[il], rows
            )
            if block.post_attention_norm is not None:
                cur = self._norm(cur, block.post_attention_norm)
            x = x + cur
            gate, up = F.linear(self._norm(x, block.ffn_norm), block.gate_up).chunk(2, -1)
            gate = F.gelu(gate, approximate="tanh") if c.traits.gelu else F.silu(gate)
            cur = F.linear(gate * up, block.ffn_down)
            if block.post_ffw_norm is not None:
                cur = self._norm(cur, block.post_ffw_norm)
            x = x + cur
            if il in taps:
                outputs.append(x)
        return self._norm(x, self.output_norm), outputs

    def features(self, tokens: Tensor, taps: Sequence[int]) -> Tensor:
        """Rows of ``tokens`` ``[B, T]``: the taps' outputs side by side, ``[B, T, n_taps * n_embd]``; taps ascend."""
        return torch.cat(self.forward(tokens, taps=taps, n_blocks=max(taps) + 1)[1], -1)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, self.config.rms_eps)

    def _attention(
        self,
        block: _Block,
        x: Tensor,
        start: int,
        slides: bool,
        mask: Tensor | None,
        cache: tuple[Tensor, Tensor] | None,
        rows: slice,
    ) -> Tensor:
        c = self.config
        n_rows, n = x.shape[:2]
        qkv = F.linear(x, block.qkv, block.qkv_bias).view(n_rows, n, -1, c.head_dim)
        qk, v = qkv.split([c.n_head + c.n_head_kv, c.n_head_kv], 2)
        if block.qk_norm is not None:
            qk = F.rms_norm(qk, (c.head_dim,), None, c.rms_eps) * block.qk_norm
        cos, sin = (t[start : start + n, None] for t in self._rope[slides])
        qk = rope(qk, cos, sin, interleaved=c.traits.interleaved_rope)
        q, k = qk.transpose(1, 2).split([c.n_head, c.n_head_kv], 1)  # [B, heads, T, head_dim]
        v = v.transpose(1, 2)
        group = c.n_head // c.n_head_kv
        if cache is not None:
            keys, values = cache
            keys[rows, :, start : start + n] = k
            values[rows, :, start : start + n] = v
            if n == 1:  # the heads that share keys are the queries of one head
                assert mask is not None
                span = mask.shape[-1]
                q = q.reshape(n_rows, c.n_head_kv, group, c.head_dim)
                out = F.scaled_dot_product_attention(q, keys[rows, :, :span], values[rows, :, :span], mask)
                return F.linear(out.reshape(n_rows, 1, -1), block.attn_output)
            if start:
                raise InputError("several tokens behind others are not supported; evaluate them one by one")
        if group > 1:
            k, v = (t.repeat_interleave(group, 1) for t in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)
        return F.linear(out.transpose(1, 2).reshape(n_rows, n, -1), block.attn_output)

    def _mask(self, start: int, n: int, slides: bool, cache: KvCache | None) -> Tensor | None:
        """None: plain causal attention."""
        n_swa = self.config.n_swa if slides and self.config.n_swa else 1 << 30
        if cache is not None and n == 1:
            length = cache.layers[0][0].shape[2]
            span = min(-(-(start + 1) // 64) * 64, length)  # few different shapes, and aligned
            positions = torch.arange(span, device=self.device)
            return self._bias((positions <= start) & (positions > start - n_swa))[None]
        if n <= n_swa:
            return None
        positions = torch.arange(n, device=self.device)
        distance = positions[:, None] - positions[None]
        return self._bias((distance >= 0) & (distance < n_swa))

    def _bias(self, seen: Tensor) -> Tensor:
        """What to add to the scores ``[1, 1, *seen.shape]``: made once, where a boolean mask would be turned into it by each block."""
        bias = torch.zeros(seen.shape, dtype=self.dtype, device=self.device).masked_fill_(~seen, float("-inf"))
        return bias[None, None]


def rope_table(
    head_dim: int,
    base: float,
    length: int,
    device: torch.device,
    *,
    scale: float = 1.0,
    factors: Tensor | None = None,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines ``[length, head_dim]`` for :func:`rope`."""
    half = head_dim // 2
    frequency = base ** (-torch.arange(half, dtype=torch.float64) / half)
    if factors is not None:
        frequency = frequency / factors.double().cpu()
    angle = torch.arange(length, dtype=torch.float64)[:, None] * scale * frequency
    cos, sin = angle.cos(), angle.sin()
    if interleaved:
        cos, sin = cos.repeat_interleave(2, -1), torch.stack([-sin, sin], -1).flatten(-2)
    else:
        cos, sin = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
    return cos.float().to(device), sin.float().to(device)


def rope(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Turn the pairs of each head of ``x`` ``[..., head_dim]``; computed in float32, returned in x's dtype."""
    if interleaved:
        other = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    else:
        other = x.roll(x.shape[-1] // 2, -1)
    return (x * cos + other * sin).to(x.dtype)
