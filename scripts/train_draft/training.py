"""Training: random anchors in the target's own text, cross-entropy on what follows each, until time is up.

The recipe is DFlash's (https://arxiv.org/abs/2602.06036): weights exp(-(k - 1) / 4) on the k-th drafted token, since a token
counts only if all before it are right.

The learning rate depends on the part of the time budget that is used, so a run of any length ends with a rate of 0.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import InputError
from .model import DraftConfig, DraftModel
from .optimiser import Optimiser
from .sequences import Sequences
from .target import Target
from .work_files import write_whole

_DECAY = 4.0  # tokens, over which a position's weight falls by e
_WARM_UP, _COOL_DOWN = 0.02, 0.4  # parts of the budget
_LOG_EVERY = 20  # steps
_FIRST_LOGIT = 10.0


@dataclass(frozen=True)
class Settings:
    """
    Attributes:
        n_rows: sequences in a step.
        n_anchors: blocks in each of them.
        frequent, random: the loss is over so many of the data's most frequent tokens, and so many others that change at each step:
            those keep the tokens that are rarely right from becoming likely. All, if the vocabulary is no larger.
        seconds, max_steps: the budget; whichever is used up first.
    """

    seconds: float
    max_steps: int = 1 << 40
    n_rows: int = 64
    n_anchors: int = 32
    frequent: int = 16384
    random: int = 4096
    muon_rate: float = 0.02
    adam_rate: float = 0.003
    save_every: float = 60.0
    seed: int = 0


@dataclass
class Progress:
    """Where training is. ``history``: step, seconds, loss, and accuracy of each position, means of the steps since the last entry."""

    step: int = 0
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)


def rate_at(part: float) -> float:
    """Scale of the learning rates when ``part`` of the budget is used."""
    return max(min(part / _WARM_UP, (1.0 - part) / _COOL_DOWN, 1.0), 0.0)


class Vocabulary:
    """The tokens that a step's loss is over."""

    def __init__(
        self, sequences: Sequences, n_vocab: int, mask_token: int, settings: Settings, device: torch.device
    ) -> None:
        counts = np.bincount(sequences.tokens.ravel(), minlength=n_vocab)
        counts[mask_token] = (
            counts.max() + 1
        )  # each block is full of its embedding, so it must be unlearned as an answer
        self._n_random = min(settings.random, max(n_vocab - settings.frequent, 0))
        order = np.argsort(-counts, kind="stable")
        self.frequent = torch.from_numpy(order[: settings.frequent].copy()).to(device)
        self._rest = torch.from_numpy(order[settings.frequent :].copy()).to(device)
        #: Part of the data's tokens that the loss always has.
        counts[mask_token] = 0
        self.coverage = float(counts[order[: settings.frequent]].sum() / max(counts.sum(), 1))
        self._place = torch.full((n_vocab,), -1, dtype=torch.int64, device=device)
        self._place[self.frequent] = torch.arange(len(self.frequent), device=device)

    def draw(self, random: torch.Generator) -> Tensor:
        """Token ids; the frequent ones come first, always at the same places."""
        if not self._n_random:
            return self.frequent
        start = torch.randint(len(self._rest) - self._n_random + 1, (1,), generator=random).item()
        return torch.cat([self.frequent, self._rest[start : start + self._n_random]])

    def place(self, tokens: Tensor) -> Tensor:
        """Where frequent tokens stand in :meth:`draw`; -1 for others, whose positions get no loss."""
        return self._place[tokens]


class Trainer:
    """One draft in training, with its checkpoint.

    Args:
        checkpoint: where it is kept; a file that is there is gone on from.
        target_id: of the target's file.

    Raises:
        InputError: the checkpoint is of another draft or target, or the sequences are too short.
    """

    def __init__(
        self,
        target: Target,
        sequences: Sequences,
        config: DraftConfig,
        settings: Settings,
        checkpoint: Path,
        target_id: str,
    ) -> None:
        self.target, self.settings, self.checkpoint, self.target_id = target, settings, checkpoint, target_id
        # Anchors whose first drafted token the target wrote.
        usable = np.nonzero((sequences.lengths - sequences.prompt_lengths >= 2) & (sequences.prompt_lengths >= 2))[0]
        if not len(usable):
            raise InputError("no sequence has a prompt and two tokens behind it")
        self.device = target.device
        self.sequences = sequences.select(usable)
        self._tokens = torch.from_numpy(self.sequences.tokens).to(self.device)
        self._first = torch.from_numpy(self.sequences.prompt_lengths).to(self.device).long() - 1
        self._ends = torch.from_numpy(self.sequences.lengths).to(self.device).long()
        self._steps = torch.arange(1, config.block_size, device=self.device)
        self._weights = torch.exp(-(self._steps - 1) / _DECAY)
        self.vocabulary = Vocabulary(self.sequences, target.config.n_vocab, config.mask_token, settings, self.device)
        torch.manual_seed(settings.seed)
        self.draft = DraftModel(config, dtype=target.dtype, max_length=self._tokens.shape[1] + config.block_size)
        self.draft.output_gain.copy_(target.output_norm.float())
        self.draft.to(self.device)
        self._optimiser = Optimiser(self.draft.parameters(), muon_rate=settings.muon_rate, adam_rate=settings.adam_rate)
        self.progress = Progress()
        if checkpoint.exists():
            self._resume()
        else:
            self._calibrate()

    def run(self, tell: Callable[[Progress], None]) -> None:
        """Train until the budget is used up; the checkpoint is written on the way and at the end."""
        s, progress = self.settings, self.progress
        before, started = progress.seconds, time.monotonic()
        saved = started
        sums: list[Tensor] = []
        while progress.step < s.max_steps:
            progress.seconds = before + time.monotonic() - started
            part = max(progress.seconds / s.seconds, progress.step / s.max_steps)
            if part >= 1.0:
                break
            sums.append(self._step(rate_at(part)))
            progress.step += 1
            if progress.step % _LOG_EVERY == 0:
                self._log(sums)
                tell(progress)
                if time.monotonic() - saved >= s.save_every:
                    self.save()
                    saved = time.monotonic()
        if sums:
            self._log(sums)
        tell(progress)
        self.save()

    @torch.no_grad()
    def _calibrate(self) -> None:
        """Begin with logits of the size of :data:`_FIRST_LOGIT`: the target's norm makes large ones of a direction that is still wrong."""
        hidden, _, _ = self._hidden(torch.Generator().manual_seed(self.settings.seed))
        largest = (
            (hidden[:4].flatten(0, 2) @ self.target.head[self.vocabulary.frequent].T).float().abs().amax(-1).mean()
        )
        # In the fixed gain: the learned part begins at 1, of which Adam's steps are small parts.
        self.draft.output_gain.mul_(min(1.0, _FIRST_LOGIT / max(float(largest), 1e-6)))

    def _hidden(self, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states of random blocks ``[B, A, block_size - 1, n_embd]``, the tokens that they should predict, and which of those
        the target wrote."""
        rows = torch.randint(len(self._tokens), (self.settings.n_rows,), generator=random).to(self.device)
        tokens = self._tokens[rows].long()
        first, ends = self._first[rows, None], self._ends[rows, None]
        spread = torch.rand(len(rows), self.settings.n_anchors, generator=random).to(self.device)
        anchors = first + (spread * (ends - 1 - first)).long()  # first .. ends - 2
        features = self.target.features(tokens, self.draft.config.taps)
        hidden = self.draft(self.target, features, tokens.gather(1, anchors), anchors)[:, :, 1:]

        where = anchors[..., None] + self._steps
        wanted = tokens.gather(1, where.clamp(max=tokens.shape[1] - 1).flatten(1)).view_as(where)
        return hidden, wanted, where < ends[..., None]

    def _step(self, scale: float) -> Tensor:
        """One step. Sums for the log: weighted loss, its weight, then right and counted per position."""
        random = torch.Generator().manual_seed(self.settings.seed * 1000003 + self.progress.step)
        hidden, wanted, written = self._hidden(random)
        place = self.vocabulary.place(wanted)
        counts = written & (place >= 0)
        weights = torch.where(counts, self._weights, 0.0)
        ids = self.vocabulary.draw(random)
        logits = (hidden @ self.target.head[ids].T).float().flatten(0, 2)
        losses = F.cross_entropy(logits, place.clamp(min=0).flatten(), reduction="none").view_as(place)
        total = (losses * weights).sum()
        (total / weights.sum().clamp(min=1.0)).backward()
        self._optimiser.step(scale)
        with torch.no_grad():
            right = (logits.argmax(-1).view_as(place) == place) & counts
            return torch.cat([total[None], weights.sum()[None], right.sum((0, 1)).float(), counts.sum((0, 1)).float()])

    def _log(self, sums: list[Tensor]) -> None:
        found = torch.stack(sums).double().sum(0).tolist()
        sums.clear()
        n = len(self._steps)
        loss = found[0] / max(found[1], 1e-9)
        if not math.isfinite(loss):
            raise InputError(
                f"the loss is {loss} at step {self.progress.step}: lower the rates (--muon-rate, --adam-rate) and remove "
                f"{self.checkpoint}"
            )
        accuracy = [right / max(count, 1.0) for right, count in zip(found[2 : 2 + n], found[2 + n :], strict=True)]
        entry = {
            "step": self.progress.step,
            "seconds": round(self.progress.seconds, 3),
            "loss": loss,
            "accuracy": accuracy,
        }
        self.progress.history.append(entry)

    def save(self) -> None:
        state = {
            "target": self.target_id,
            "config": self.draft.config.to_json(),
            "draft": self.draft.state_dict(),
            "optimiser": self._optimiser.state(),
            "step": self.progress.step,
            "seconds": self.progress.seconds,
            "history": self.progress.history,
        }
        write_whole(self.checkpoint, lambda file: torch.save(state, file))

    def _resume(self) -> None:
        state = read_checkpoint(self.checkpoint, self.target_id, self.device)
        if state["config"] != self.draft.config.to_json():
            raise InputError(
                f"{self.checkpoint} is of another draft ({state['config']}; asked for {self.draft.config.to_json()}): "
                "choose another --work folder"
            )
        self.draft.load_state_dict(state["draft"])
        self._optimiser.load(state["optimiser"])
        self.progress = Progress(state["step"], state["seconds"], state["history"])


def read_checkpoint(path: Path, target_id: str, device: torch.device) -> dict[str, Any]:
    """
    Raises:
        InputError: there is none, it cannot be read, or it is of a draft for another target.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
        theirs = state["target"]
    except FileNotFoundError:
        raise InputError(f"there is no checkpoint {path}: run the stage train first") from None
    except Exception as error:  # torch raises what its parts raise
        raise InputError(f"{path} is no checkpoint, or cut off: {error}") from error
    if theirs != target_id:
        raise InputError(f"{path} is of a draft for another target: choose another --work folder")
    return state


def load_draft(path: Path, target: Target, target_id: str, *, max_length: int) -> DraftModel:
    """The draft of a checkpoint, on the target's device.

    Raises:
        InputError: as :func:`read_checkpoint`.
    """
    state = read_checkpoint(path, target_id, target.device)
    config = DraftConfig.from_json(state["config"])
    draft = DraftModel(config, dtype=target.dtype, max_length=max_length + config.block_size)
    draft.load_state_dict(state["draft"])
    return draft.to(target.device)
