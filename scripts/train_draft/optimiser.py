"""Muon for matrices and AdamW for norms, in one step.

Muon (Keller Jordan and others, 2024, https://kellerjordan.github.io/posts/muon/): momentum, whose singular values a Newton-Schulz
iteration brings near 1. Matrices of one shape are iterated together, which on a GPU costs little more than one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


class Optimiser:
    """
    Args:
        muon_rate, adam_rate: learning rates, which :meth:`step` scales.
        momentum: Muon's.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        muon_rate: float = 0.02,
        adam_rate: float = 0.003,
        momentum: float = 0.95,
    ) -> None:
        matrices: dict[tuple[int, ...], list[nn.Parameter]] = defaultdict(list)
        others = []
        for p in parameters:
            if p.ndim == 2:
                matrices[tuple(p.shape)].append(p)
            else:
                others.append(p)
        self._matrices = list(matrices.values())
        self._momenta = [[torch.zeros_like(p) for p in group] for group in self._matrices]
        self._muon_rate, self._adam_rate, self._momentum = muon_rate, adam_rate, momentum
        self._adam = torch.optim.AdamW(others, lr=adam_rate, betas=(0.9, 0.95), weight_decay=0.0)
        self._parameters = [*others, *(p for group in self._matrices for p in group)]

    @torch.no_grad()
    def step(self, scale: float, *, max_norm: float = 1.0) -> None:
        """One step at ``scale`` times the rates; gradients are clipped and then forgotten."""
        torch.nn.utils.clip_grad_norm_(self._parameters, max_norm)
        for group, momenta in zip(self._matrices, self._momenta, strict=True):
            gradients = [p.grad for p in group]
            torch._foreach_lerp_(momenta, gradients, 1 - self._momentum)
            ahead = torch.stack(torch._foreach_lerp(gradients, momenta, self._momentum))  # Nesterov
            updates = orthogonal(ahead)
            n_out, n_in = group[0].shape
            rate = self._muon_rate * scale * max(1.0, n_out / n_in) ** 0.5
            torch._foreach_add_(group, list(updates.to(group[0].dtype)), alpha=-rate)
        self._adam.param_groups[0]["lr"] = self._adam_rate * scale
        self._adam.step()
        for p in self._parameters:
            p.grad = None

    def state(self) -> dict[str, Any]:
        return {"momenta": self._momenta, "adam": self._adam.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        for mine, theirs in zip(self._momenta, state["momenta"], strict=True):
            for to, of in zip(mine, theirs, strict=True):
                to.copy_(of)
        self._adam.load_state_dict(state["adam"])


def orthogonal(matrices: Tensor) -> Tensor:
    """Matrices ``[n, rows, columns]`` with their singular values brought near 1, in bfloat16."""
    a, b, c = _NEWTON_SCHULZ
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x
