"""Beyond 256 cells llama.cpp's flash attention rounds a batch otherwise than single tokens, so text may part from plain text.

What holds at any length: every token is the one that plain Llama chooses when it is given the same batches.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from llama_cpp import Llama

import ggml_mirror.rollback
from ggml_mirror.dflash import DFlashLlama

from .pair import take

N = 24
FILLER = 7  # what stands in a batch after the accepted tokens changes no logits before it
OPTIONS = {"n_ctx": 768, "n_threads": 1, "n_threads_batch": 1, "flash_attn": True, "verbose": False}


@pytest.mark.parametrize(("dtype", "length"), [("f32", 300), ("q8_0", 520)])
def test_each_token_is_the_targets_choice_on_the_same_batches(
    dtype: str, length: int, demo_target: Path, demo_draft: Path
) -> None:
    plain = Llama(str(demo_target), logits_all=True, **OPTIONS)
    llm = DFlashLlama(str(demo_target), draft_path=str(demo_draft), feature_dtype=dtype, **OPTIONS)
    try:
        source = Path(ggml_mirror.rollback.__file__).read_text()
        prompt = llm.tokenize(source.encode())[:length]
        text = take(llm, prompt, N)
        steps, block = llm.stats.steps, llm.n_draft + 1
        assert sum(steps) > len(steps) / 2  # drafting went on

        plain.eval(prompt)
        assert int(plain.scores[length - 1].argmax()) == text[0]
        done = 0  # tokens of the text that are committed
        for accepted in steps:
            known = text[done : done + 1 + accepted]
            plain.eval(known + [FILLER] * (block - len(known)))
            chosen = plain.scores[length + done : length + done + len(known)].argmax(axis=1)
            done += len(known)
            plain.n_tokens = length + done
            wanted = text[done - len(known) + 1 : done + 1]
            np.testing.assert_array_equal(chosen[: len(wanted)], wanted)
        assert done >= N - 1
    finally:
        llm.close()
        plain.close()
