"""The draft in torch: llama.cpp's dflash graph, over many blocks at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import InputError
from .target import Target, TargetConfig, rope, rope_table


@dataclass(frozen=True)
class DraftConfig:
    """A draft's shape.

    Attributes:
        taps: 0-based blocks of the target whose outputs a row holds, ascending.
        block_size: tokens in a block, the last committed one included.
        mask_token: stands for those that are to be drafted.
    """

    taps: tuple[int, ...]
    block_size: int
    mask_token: int
    n_layer: int
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int
    head_dim: int
    rms_eps: float
    rope_base: float
    embedding_scale: float

    @classmethod
    def for_target(
        cls,
        target: TargetConfig,
        *,
        taps: Sequence[int] | None,
        n_layer: int,
        block_size: int,
        mask_token: int,
        head_dim: int,
    ) -> DraftConfig:
        """As wide as the target, whose embedding and output matrix it uses.

        Raises:
            InputError: a number that cannot be.
        """
        n_embd = target.n_embd
        if head_dim % 2 or n_embd % head_dim:
            raise InputError(f"heads of {head_dim} do not divide the width of {n_embd}")
        taps = tuple(default_taps(target.n_layer) if taps is None else taps)
        if not taps or list(taps) != sorted(set(taps)) or not 0 <= taps[0] <= taps[-1] < target.n_layer - 1:
            raise InputError(f"taps {taps}: ascending blocks from 0 to {target.n_layer - 2} are possible")
        if not 2 <= block_size <= 64:
            raise InputError(f"a block of {block_size}; 2 to 64 is possible")
        if not 0 <= mask_token < target.n_vocab:
            raise InputError(f"mask token {mask_token}; the target has {target.n_vocab} tokens")
        n_head = n_embd // head_dim
        return cls(
            taps=taps,
            block_size=block_size,
            mask_token=mask_token,
            n_layer=n_layer,
            n_embd=n_embd,
            n_ff=-(-n_embd * 8 // 3 // 64) * 64,
            n_head=n_head,
            n_head_kv=next(n_head // group for group in (2, 3, 1) if n_head % group == 0),
            head_dim=head_dim,
            rms_eps=target.rms_eps,
            rope_base=100000.0,
            embedding_scale=target.embedding_scale,
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> DraftConfig:
        return cls(**{**value, "taps": tuple(value["taps"])})


def default_taps(n_layer: int, n_taps: int = 5) -> list[int]:
    """Evenly from the second block to the third-last, fewer in a model of few blocks; the last is never tapped."""
    first, last = (1, n_layer - 3) if n_layer - 3 >= n_taps else (0, n_layer - 2)
    if last < 0:
        raise InputError(f"a target of {n_layer} block(s) has none to tap")
    return sorted({round(first + k * (last - first) / (n_taps - 1)) for k in range(n_taps)})


class _Layer(nn.Module):
    def __init__(self, c: DraftConfig) -> None:
        super().__init__()
        q_dim, kv_dim = c.n_head * c.head_dim, c.n_head_kv * c.head_dim
        self.attn_norm = nn.Parameter(torch.ones(c.n_embd))
        self.attn_q = _matrix(q_dim, c.n_embd)
        self.attn_k = _matrix(kv_dim, c.n_embd)
        self.attn_v = _matrix(kv_dim, c.n_embd)
        self.attn_output = _matrix(c.n_embd, q_dim, zero=True)
        self.attn_q_norm = nn.Parameter(torch.ones(c.head_dim))
        self.attn_k_norm = nn.Parameter(torch.ones(c.head_dim))
        self.ffn_norm = nn.Parameter(torch.ones(c.n_embd))
        self.ffn_gate = _matrix(c.n_ff, c.n_embd)
        self.ffn_up = _matrix(c.n_ff, c.n_embd)
        self.ffn_down = _matrix(c.n_embd, c.n_ff, zero=True)


def _matrix(n_out: int, n_in: int, *, zero: bool = False) -> nn.Parameter:
    """Branches begin as nothing, so that the first steps change one thing at a time."""
    return nn.Parameter(torch.zeros(n_out, n_in) if zero else torch.randn(n_out, n_in) * n_in**-0.5)


class DraftModel(nn.Module):
    """Parameters are named as the tensors of the GGUF.

    Args:
        dtype: of the matrix products; norms and the residual stream are float32.
        max_length: positions that will be asked for.
    """

    def __init__(self, config: DraftConfig, *, dtype: torch.dtype, max_length: int) -> None:
        super().__init__()
        self.config, self.dtype = config, dtype
        self.fc = _matrix(config.n_embd, len(config.taps) * config.n_embd)
        self.enc_output_norm = nn.Parameter(torch.ones(config.n_embd))
        self.blk = nn.ModuleList(_Layer(config) for _ in range(config.n_layer))
        # In parts of the target's own norm, which fits the head that follows: the draft's is output_norm * output_gain.
        self.output_norm = nn.Parameter(torch.ones(config.n_embd))
        self.register_buffer("output_gain", torch.ones(config.n_embd))
        cos, sin = rope_table(config.head_dim, config.rope_base, max_length, torch.device("cpu"))
        self.register_buffer("_cos", cos, persistent=False)
        self.register_buffer("_sin", sin, persistent=False)

    def forward(self, target: Target, features: Tensor, tokens: Tensor, anchors: Tensor) -> Tensor:
        """Hidden states of blocks, in front of the target's head.

        Args:
            features: rows of the sequences, ``[B, T, n_taps * n_embd]``.
            tokens: of the anchors, ``[B, A]``: each block's first token.
            anchors: their positions, ``[B, A]``. A block attends to the rows before its anchor and to itself.

        Returns:
            ``[B, A, block_size, n_embd]``; what stands at i >= 1 predicts the token i positions behind the anchor.
        """
        c = self.config
        n_rows, n_context = features.shape[:2]
        n_blocks, size = anchors.shape[1], c.block_size
        fused = self._norm(self._linear(features, self.fc), self.enc_output_norm).to(self.dtype)
        steps = torch.arange(size, device=anchors.device)
        ids = torch.full((n_rows, n_blocks, size), c.mask_token, device=tokens.device, dtype=tokens.dtype)
        ids[..., 0] = tokens
        x = target.embed(ids).float().flatten(1, 2)
        positions = (anchors[..., None] + steps).flatten(1)
        context = torch.arange(n_context, device=anchors.device)
        turn = self._cos[positions][:, :, None], self._sin[positions][:, :, None]
        turn_context = self._cos[context][:, None], self._sin[context][:, None]
        bias = self._bias(anchors, n_context)
        for layer in self.blk:
            cur = self._norm(x, layer.attn_norm).to(self.dtype)
            q = self._heads(cur, layer.attn_q, layer.attn_q_norm, turn)
            k = self._heads(fused, layer.attn_k, layer.attn_k_norm, turn_context)
            k = torch.cat([k, self._heads(cur, layer.attn_k, layer.attn_k_norm, turn)], 1)
            both = torch.cat([fused, cur], 1)
            v = self._linear(both, layer.attn_v).unflatten(-1, (-1, c.head_dim))
            group = c.n_head // c.n_head_kv
            k, v = (t.repeat_interleave(group, 2).transpose(1, 2) for t in (k, v))
            cur = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, bias)
            x = x + self._linear(cur.transpose(1, 2).flatten(2), layer.attn_output)
            cur = self._norm(x, layer.ffn_norm).to(self.dtype)
            cur = F.silu(self._linear(cur, layer.ffn_gate)) * self._linear(cur, layer.ffn_up)
            x = x + self._linear(cur, layer.ffn_down)
        return self._norm(x, self.output_norm * self.output_gain).to(self.dtype).unflatten(1, (n_blocks, size))

    def _linear(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight.to(x.dtype))

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), weight, self.config.rms_eps)

    def _heads(self, x: Tensor, weight: Tensor, norm: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        heads = self._norm(self._linear(x, weight).unflatten(-1, (-1, self.config.head_dim)), norm)
        return rope(heads, *turn).to(self.dtype)

    def _bias(self, anchors: Tensor, n_context: int) -> Tensor:
        """``[B, 1, A * size, T + A * size]``: 0 where a query attends, else minus infinity."""
        n_rows, n_blocks = anchors.shape
        size = self.config.block_size
        device = anchors.device
        before = torch.arange(n_context, device=device) < anchors[..., None]  # [B, A, T]
        own = torch.eye(n_blocks, dtype=torch.bool, device=device)  # [A, A]
        before = before[:, :, None].expand(-1, -1, size, -1).flatten(1, 2)
        own = own.repeat_interleave(size, 0).repeat_interleave(size, 1).expand(n_rows, -1, -1)
        seen = torch.cat([before, own], -1)
        bias = torch.zeros(seen.shape, dtype=self.dtype, device=device).masked_fill_(~seen, float("-inf"))
        return bias[:, None]

    def tensors(self) -> dict[str, Tensor]:
        """Each parameter under its name in the GGUF."""
        names = {"fc": "fc.weight", "enc_output_norm": "enc.output_norm.weight", "output_norm": "output_norm.weight"}
        found = {names.get(name, f"{name}.weight"): p.detach() for name, p in self.named_parameters()}
        return {**found, "output_norm.weight": self.output_norm.detach() * self.output_gain}
