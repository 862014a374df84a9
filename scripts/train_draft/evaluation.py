"""Acceptance of a draft on greedy text, as a server would see it: the target's text does not depend on the draft."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from .errors import InputError
from .generation import continue_prompts
from .model import DraftModel
from .sequences import Ints, Sequences
from .target import Target

_ROWS = 16  # sequences at once
_HEAD_ROWS = 4096  # hidden states whose logits are computed at once


@dataclass(frozen=True)
class Acceptance:
    """Counts over all prompts. ``tau``: mean committed tokens per draft step, the bonus token included."""

    prompts: int
    tokens: int
    steps: int
    proposed: int
    accepted: int

    @property
    def tau(self) -> float:
        return 1.0 + self.accepted / max(self.steps, 1)

    @property
    def acceptance(self) -> float:
        return self.accepted / max(self.proposed, 1)


def evaluate(draft: DraftModel, target: Target, prompts: list[Ints], n_predict: int) -> Acceptance:
    """Draft along up to ``n_predict`` greedy tokens behind each prompt.

    Raises:
        InputError: no prompt.
    """
    if not prompts:
        raise InputError("there are no prompts to evaluate on")
    prompts = [np.asarray(p) for p in prompts]
    length = max(map(len, prompts)) + n_predict
    length += -length % 8
    order = sorted(prompts, key=len)
    parts = [
        continue_prompts(target, order[i : i + 256], length, np.zeros(len(order[i : i + 256]), np.float32), seed=0)
        for i in range(0, len(order), 256)
    ]
    text = Sequences.join(parts)
    ends = np.minimum(text.lengths, text.prompt_lengths + n_predict)
    steps = proposed = accepted = 0
    for i in range(0, len(text), _ROWS):
        rows = slice(i, i + _ROWS)
        right = _right(draft, target, text.tokens[rows], text.prompt_lengths[rows], n_predict)
        for row, first, end in zip(right, text.prompt_lengths[rows].tolist(), ends[rows].tolist(), strict=True):
            at = first  # of the last committed token: the prefill gives one
            while at < end - 2:
                room = min(draft.config.block_size - 1, end - at - 2)  # one of the tokens left is the target's own
                n = min(int(row[at - first]), room)
                steps, proposed, accepted = steps + 1, proposed + room, accepted + n
                at += n + 1
    return Acceptance(len(text), int((ends - text.prompt_lengths).sum()), steps, proposed, accepted)


@torch.no_grad()
def _right(draft: DraftModel, target: Target, tokens: Ints, first: Ints, n: int) -> np.ndarray:
    """How many drafted tokens are right behind each of the ``n`` positions from ``first`` on, ``[B, n]``."""
    size = draft.config.block_size
    ids = torch.from_numpy(tokens).to(target.device).long()
    begin = torch.from_numpy(first).to(target.device).long()[:, None]
    features = target.features(ids, draft.config.taps)
    out = []
    for start in range(0, n, 32):
        anchors = (begin + torch.arange(start, min(start + 32, n), device=ids.device)).clamp(max=ids.shape[1] - 1)
        hidden = draft(target, features, ids.gather(1, anchors), anchors)[:, :, 1:]
        guess = torch.cat([(h @ target.head.T).argmax(-1) for h in hidden.flatten(0, 2).split(_HEAD_ROWS)])
        where = anchors[..., None] + torch.arange(1, size, device=ids.device)
        wanted = ids.gather(1, where.clamp(max=ids.shape[1] - 1).flatten(1)).view_as(where)
        right = (guess.view_as(where) == wanted) & (where < ids.shape[1])
        out.append(right.long().cumprod(-1).sum(-1))
    return torch.cat(out, 1).cpu().numpy()
