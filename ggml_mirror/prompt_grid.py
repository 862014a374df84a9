"""In which batches a prompt is evaluated: always the same ones, so that a part of it can be taken from elsewhere without a trace.

ggml rounds a token's activations differently in batches of different sizes. (On CPU, flash attention takes another path below 64 tokens,
and logits of a model of 135M differ by up to 0.6 between the two; on a GPU, kernels are chosen by shape.) A state that was evaluated in
other batches therefore leads to other text where the model wavers between two tokens. So each prompt is cut at places that depend on its
length alone, and prompts of any length are cut at the same places but near their ends. What two prompts share up to such a place was
evaluated in the same batches, on the same tokens, from the same state: it is the same to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from .device import devices

#: Tokens in a batch: 64 is where ggml's CPU kernels take the path that larger batches take, and no slower per token. Prompts too short
#: for two of them get batches of 16, which take the other path, as the whole prompt in one batch would.
CPU_STEPS = (64, 16)

#: On a GPU, a batch of 256 keeps most of the speed of larger ones, and a shorter prompt costs hardly more than a token.
GPU_STEPS = (256,)


@dataclass(frozen=True)
class PromptGrid:
    """Where prompts are cut.

    llama.cpp's own batches (``n_batch``, and within them ``n_ubatch``) are kept: on CPU, a prompt comes out as in a plain ``Llama``.

    Args:
        steps: tokens of a batch, in order of preference; the last batch of a prompt has up to twice as many, less one.
    """

    n_batch: int
    n_ubatch: int
    steps: tuple[int, ...]

    @classmethod
    def of(cls, llm: Any) -> PromptGrid:
        on_gpu = llm.model_params.n_gpu_layers != 0 and any(d.type != "CPU" for d in devices())
        return cls(llm.n_batch, llama_cpp.llama_n_ubatch(llm.ctx), GPU_STEPS if on_gpu else CPU_STEPS)

    def ends(self, n_prompt: int) -> npt.NDArray[np.int64]:
        """Where the batches of a prompt end, ascending; the last one is ``n_prompt``.

        >>> PromptGrid(512, 512, (64, 16)).ends(200).tolist()
        [64, 128, 200]
        """
        return _ends(self, n_prompt)

    def last_start(self, n_prompt: int) -> int:
        """Where the last batch of a prompt starts."""
        ends = self.ends(n_prompt)
        return int(ends[-2]) if len(ends) > 1 else 0

    def common(self, evaluated: int, n_prompt: int, limit: int) -> int:
        """The last place, at most ``limit``, up to which prompts of both lengths are cut alike; at least a token of the second is left.

        Args:
            evaluated: tokens of the prompt that was evaluated.
            n_prompt: tokens of the prompt that is to be.
            limit: tokens that they share.
        """
        mine, its = self.ends(n_prompt)[:-1], self.ends(evaluated)
        n = min(len(mine), len(its))
        alike = (mine[:n] == its[:n]) & (mine[:n] <= limit)
        count = n if alike.all() else int(alike.argmin())
        return int(mine[count - 1]) if count else 0


@lru_cache(64)
def _ends(grid: PromptGrid, n_prompt: int) -> npt.NDArray[np.int64]:
    ends: list[int] = []
    for batch in range(0, n_prompt, grid.n_batch):
        batch_end = min(batch + grid.n_batch, n_prompt)
        for start in range(batch, batch_end, grid.n_ubatch):
            stop = min(start + grid.n_ubatch, batch_end)
            step = next((s for s in grid.steps if stop - start >= s), stop - start)
            ends += [*range(start + step, stop - step + 1, step), stop]
    found = np.array(ends, np.int64)
    found.setflags(write=False)
    return found
