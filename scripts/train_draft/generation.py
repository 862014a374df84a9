"""The target writes the training data: batches of prompts of similar length, each row at its own temperature."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .errors import InputError
from .sequences import Ints, Prompts, Sequences
from .target import KvCache, Target

# A token is drawn from the groups of the vocabulary that hold the largest logits. The probability that this cuts off is that of
# tokens behind at least _GROUPS better ones.
_GROUP, _GROUPS = 512, 16
_CLOSE = 4  # of the best are compared once more in float32: bfloat16 makes ties of what llama.cpp tells apart

_PREFILL_TOKENS = 1 << 16
_LOOK_EVERY = 32  # tokens, for whether all rows have ended: it makes the host wait for the device


@dataclass(frozen=True)
class Mix:
    """Temperatures and their shares. Greedy text is what a benchmark decodes; sampled text is more varied."""

    temperatures: tuple[float, ...] = (0.0, 0.7, 1.0)
    shares: tuple[float, ...] = (0.5, 0.35, 0.15)

    def draw(self, n: int, rng: np.random.Generator, *, greedy: bool) -> np.ndarray:
        """``n`` temperatures; without ``greedy`` none is 0, for prompts whose greedy text is there already."""
        pairs = [(t, s) for t, s in zip(self.temperatures, self.shares, strict=True) if greedy or t > 0]
        if not pairs:
            raise InputError("every prompt has been gone on from greedily; give more prompts, or sample some of them")
        temperatures, shares = np.array(pairs).T
        return rng.choice(temperatures, n, p=shares / shares.sum()).astype(np.float32)


class Sampler:
    """The next tokens from the hidden states in front of the head."""

    def __init__(self, target: Target, seed: int) -> None:
        self._n_vocab = target.config.n_vocab
        pad = -self._n_vocab % _GROUP
        self._head = torch.nn.functional.pad(target.head, (0, 0, 0, pad)) if pad else target.head
        self._random = torch.Generator(target.device).manual_seed(seed)

    @torch.no_grad()
    def __call__(self, hidden: Tensor, temperatures: Tensor) -> Tensor:
        """Token ids ``[B]`` for hidden states ``[B, n_embd]``; temperature 0 is greedy."""
        logits = hidden @ self._head.T
        logits[:, self._n_vocab :] = float("-inf")
        grouped = logits.view(len(hidden), -1, _GROUP)
        best = grouped.amax(-1).topk(min(_GROUPS, grouped.shape[1]), -1).indices
        candidates = grouped.gather(1, best[..., None].expand(-1, -1, _GROUP)).flatten(1).float()
        ids = (best[..., None] * _GROUP + torch.arange(_GROUP, device=hidden.device)).flatten(1)
        # Gumbel's trick: the largest of logits + temperature * noise is a draw from their softmax.
        noise = (
            torch.empty_like(candidates).exponential_(generator=self._random).clamp_(min=1e-30).log_().neg_()
            * temperatures[:, None]
        )
        close = (candidates + noise).topk(_CLOSE, -1).indices
        ids, noise = ids.gather(1, close), noise.gather(1, close)
        exact = torch.einsum("bkn,bn->bk", self._head[ids].float(), hidden.float()) + noise
        exact = exact.masked_fill(ids >= self._n_vocab, float("-inf"))
        return ids.gather(1, exact.argmax(-1, keepdim=True))[:, 0]


@torch.no_grad()
def continue_prompts(
    target: Target,
    prompts: Sequence[Ints],
    length: int,
    temperatures: np.ndarray,
    *,
    seed: int,
    cache: KvCache | None = None,
) -> Sequences:
    """Each prompt with what the target writes behind it, up to ``length`` tokens.

    Args:
        prompts: of 1 to ``length - 1`` tokens; best of similar lengths, since the shortest says where decoding begins.
        cache: to use again; of at least as many rows and this length.
    """
    n = len(prompts)
    lengths = np.array([len(p) for p in prompts])
    if lengths.min() < 1 or lengths.max() >= length:
        raise InputError(f"prompts have {lengths.min()} to {lengths.max()} tokens; 1 to {length - 1} are possible")
    table = np.zeros((n, length), np.int64)
    for row, prompt in zip(table, prompts, strict=True):
        row[: len(prompt)] = prompt
    tokens = torch.from_numpy(table).to(target.device)
    prompt_lengths = torch.from_numpy(lengths).to(target.device)
    heat = torch.from_numpy(temperatures).to(target.device)
    eos = -1 if target.config.eos is None else target.config.eos
    ends = torch.full_like(prompt_lengths, length)
    cache = cache or KvCache(target, n, length)
    sampler = Sampler(target, seed)

    start = int(lengths.min())
    at_once = max(_PREFILL_TOKENS // start, 1)
    pieces = [slice(i, min(i + at_once, n)) for i in range(0, n, at_once)]
    hidden = torch.cat([target.forward(tokens[rows, :start], cache=cache, rows=rows)[0][:, -1] for rows in pieces])
    for position in range(start, length):
        given = position < prompt_lengths
        token = torch.where(given, tokens[:, position], sampler(hidden, heat))
        tokens[:, position] = token
        ends = torch.where((token == eos) & ~given & (ends == length), position + 1, ends)
        if position + 1 == length or (position % _LOOK_EVERY == 0 and bool((ends < length).all())):
            break
        hidden = target.forward(token[:, None], cache=cache, rows=slice(0, n), start=position)[0][:, -1]
    return Sequences(
        tokens.to(torch.int32).cpu().numpy(),
        lengths.astype(np.int32),
        ends.to(torch.int32).cpu().numpy(),
        temperatures == 0.0,
    )


def batches(prompts: Sequence[Ints], n_rows: int, seed: int) -> list[list[Ints]]:
    """Prompts in batches of similar lengths, the batches in random order."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(prompts))
    order = order[np.argsort([len(prompts[i]) for i in order], kind="stable")]
    cut = [[prompts[i] for i in order[k : k + n_rows]] for k in range(0, len(order), n_rows)]
    return [cut[i] for i in rng.permutation(len(cut))]


def generate(
    target: Target,
    prompts: Prompts,
    folder: Path,
    *,
    length: int,
    n_rows: int,
    seconds: float,
    n_tokens: int,
    mix: Mix,
    seed: int,
    tell: Callable[[int, int, float], None],
) -> None:
    """Write shards ``folder/00000.npz``, ... until time is up or ``n_tokens`` are written; shards that are there count and stay.

    Args:
        n_rows: sequences at once; their cache takes ``n_rows * length * cache_bytes_per_token`` bytes.
        tell: is called after each shard with shards, tokens written in all, and seconds.

    Raises:
        InputError: a prompt is too long, or the folder holds shards of another run.
    """
    plan = batches(prompts.prompts, n_rows, seed)
    excluded = prompts.excluded()
    made_with = {"target": prompts.target, "length": length, "seed": seed, "n_rows": n_rows}
    started = time.monotonic()
    written, longest, cache = 0, 0.0, None
    for shard in range(1 << 20):
        path = folder / f"{shard:05d}.npz"
        if path.exists():
            there, info = Sequences.load(path)
            if info != made_with:
                raise InputError(f"{path} is of another run ({info}, now {made_with}): choose another --work folder")
            written += there.written
            continue
        elapsed = time.monotonic() - started
        if written >= n_tokens or (elapsed + longest > seconds and written):
            break
        again, index = divmod(shard, len(plan))
        heat = mix.draw(len(plan[index]), np.random.default_rng([seed, shard]), greedy=again == 0)
        cache = cache or KvCache(target, min(n_rows, len(prompts.prompts)), length)
        found = continue_prompts(target, plan[index], length, heat, seed=seed * 1000003 + shard, cache=cache)
        found = found.without(excluded)
        found.save(path, **made_with)
        written += found.written
        longest = max(longest, time.monotonic() - started - elapsed)
        tell(shard + 1, written, time.monotonic() - started)


def load_shards(folder: Path, target: str) -> Sequences:
    """All sequences in a folder.

    Raises:
        InputError: there are none, or they are another target's.
    """
    parts = []
    for path in sorted(folder.glob("[0-9]*.npz")):
        part, info = Sequences.load(path)
        if info.get("target") != target:
            raise InputError(f"{path} was written by another target: choose another --work folder")
        parts.append(part)
    return Sequences.join(parts)
