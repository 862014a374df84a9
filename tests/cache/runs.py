"""One generation, with everything in which a warm run could differ from a cold one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from dflash.pair import take

from ggml_mirror.dflash import DFlashLlama


@dataclass(frozen=True)
class Run:
    """``rows``: bytes of those that the next draft step would see, by position."""

    tokens: list[int]
    steps: list[int]
    proposed: int
    plain_steps: int
    logits: npt.NDArray[np.float32]
    rows: dict[int, bytes]

    def assert_same(self, other: Run) -> None:
        assert self.tokens == other.tokens
        assert (self.steps, self.proposed, self.plain_steps) == (other.steps, other.proposed, other.plain_steps)
        np.testing.assert_array_equal(self.logits, other.logits, "the draft saw other rows")
        assert self.rows == other.rows


def run(llm: DFlashLlama, prompt: Sequence[int], n: int = 20, **sampling: Any) -> Run:
    tokens = take(llm, prompt, n, **sampling)
    snapshot, first = llm.mirror.snapshot(), llm.n_tokens - llm.draft_window
    rows = {
        int(p): row.tobytes() for p, row in zip(snapshot.positions, snapshot.rows, strict=True) if p >= max(first, 0)
    }
    assert len(rows) == min(llm.n_tokens, llm.draft_window)
    return Run(tokens, llm.stats.steps, llm.stats.proposed, llm.stats.plain_steps, llm.draft.logits(), rows)
