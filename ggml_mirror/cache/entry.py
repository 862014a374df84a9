"""What a prefix cache keeps of one prompt, and how much of it another prompt may take."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from ..prompt_grid import PromptGrid

Buffer = Any  # what has the buffer protocol: bytes, or a uint8 array over a file's content


@dataclass(frozen=True)
class Coverage:
    """What of a prompt an entry brings back.

    Attributes:
        n_tokens: positions of the target's state.
        n_prompt: tokens of the prompt that it was evaluated for: they say in which batches (see :mod:`ggml_mirror.prompt_grid`).
        first_row: rows are there for positions ``first_row`` to ``n_tokens - 1``; ``n_tokens``: for none.
        first_cut: earliest position to which the target's state can be cut back once it is loaded: 0 for a KV cache, ``n_tokens`` for
            a running state, and for a window that tokens have slid out of.
        logits: the logits behind the last token are there, so that nothing has to be evaluated for the same prompt.
    """

    n_tokens: int
    n_prompt: int
    first_row: int
    first_cut: int
    logits: bool

    def usable(self, shared: int, n_prompt: int, window: int, grid: PromptGrid) -> int:
        """Tokens of a prompt that need not be evaluated, if the entry is taken.

        A run without a cache has, when it begins to draft, the rows of the last ``window`` positions of its prompt. Those that the
        entry holds come back, those behind the cut are evaluated again; where some would be missing between the two, evaluation
        has to begin where the window does. So the draft sees the same rows, and proposes the same tokens.

        Args:
            shared: tokens that the prompt shares with the entry.
            n_prompt: tokens of the prompt.
            window: rows that the draft attends to; 0: there is no draft.
        """
        begin = max(0, n_prompt - window)
        if self.logits and shared == n_prompt == self.n_tokens and self.first_row <= begin:
            return n_prompt
        keep = grid.common(self.n_prompt, n_prompt, min(shared, self.n_tokens))
        if begin < keep and begin < self.first_row:
            keep = grid.common(self.n_prompt, n_prompt, begin)
        return keep if keep >= self.first_cut else 0

    def covers(self, other: Coverage) -> bool:
        """Does it bring back whatever another of the same tokens does?"""
        mine = (self.n_prompt, self.logits or not other.logits)
        return (
            mine == (other.n_prompt, True) and self.first_row <= other.first_row and self.first_cut <= other.first_cut
        )

    def supersedes(self, beginning: Coverage, grid: PromptGrid) -> bool:
        """Is an entry of the beginning of these tokens no longer worth its bytes?

        Not if it is much shorter: a prompt that shares no more than that is served by it with less to copy.
        """
        last = grid.last_start(beginning.n_prompt)
        return (
            2 * beginning.n_tokens >= self.n_tokens
            and self.first_cut == 0
            and self.first_row <= beginning.first_row
            and 0 < last == grid.common(self.n_prompt, beginning.n_prompt, last)
        )


@dataclass(frozen=True)
class Entry:
    """A prompt: the target's state and the mirror's rows, in storage bytes.

    Attributes:
        key: the tokens (see :func:`ggml_mirror.cache.prefix_index.token_key`).
        target: llama.cpp's state of the sequence.
        rows: uint8 ``[m, row_bytes]``, of positions ``coverage.first_row`` on.
        logits: float32 ``[1, n_vocab]`` behind the last token, or ``[0, n_vocab]``.
        scores: float32 ``[n_tokens, n_vocab]`` of a model with ``logits_all``, else ``[0, n_vocab]``.
    """

    key: bytes
    coverage: Coverage
    target: Buffer
    rows: npt.NDArray[np.uint8]
    logits: npt.NDArray[np.float32]
    scores: npt.NDArray[np.float32]

    @cached_property
    def nbytes(self) -> int:
        """Bytes of memory that the entry holds."""
        return len(self.key) + len(self.target) + self.rows.nbytes + self.logits.nbytes + self.scores.nbytes


def run_start(positions: npt.NDArray[np.int64], stop: int) -> int:
    """First of the adjacent positions that end right before ``stop``; ``stop`` if there are none.

    >>> run_start(np.array([2, 3, 7, 8, 9]), 10)
    7

    Args:
        positions: ascending.
    """
    positions = positions[: np.searchsorted(positions, stop)]
    # In a run, position less index is the same from some index on.
    apart = np.flatnonzero(positions - np.arange(len(positions)) != stop - len(positions))
    first = int(apart[-1]) + 1 if len(apart) else 0
    return int(positions[first]) if first < len(positions) else stop
