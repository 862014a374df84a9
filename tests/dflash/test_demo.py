"""The demo pair: a trained draft, real prompts. Greedy text is plain Llama's; a difference is allowed only at a tie."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from llama_cpp import Llama

from ggml_mirror.dflash import DFlashLlama

from .pair import take

#: A first difference is a tie if the target's two best logits are closer than this. Batches of verification and single tokens
#: round alike on CPU with flash attention; other backends need the room.
TIE = 0.02
N = 24

_STEMS = (
    "def fibonacci(n):\n",
    "def is_prime(n):\n    ",
    "class Stack:\n    def __init__(self):\n",
    "for i in range(10):\n    print(",
    "import numpy as np\n\n",
    "The capital of France is",
    "Once upon a time there was",
    "1, 2, 3, 4,",
    "Water boils at",
    "SELECT name FROM users WHERE",
)
_FRAMES = (
    "{}",
    "# Example\n{}",
    "Question: go on.\n{}",
    "<|im_start|>user\nContinue: {}<|im_end|>\n<|im_start|>assistant\n",
    '"""A short text."""\n\n{}',
)
PROMPTS = [frame.format(stem) for frame in _FRAMES for stem in _STEMS]
OPTIONS = {"n_ctx": 256, "n_threads": 1, "n_threads_batch": 1, "verbose": False}


@pytest.fixture(scope="module")
def plain(demo_target: Path) -> Iterator[Llama]:
    llm = Llama(str(demo_target), flash_attn=True, **OPTIONS)
    yield llm
    llm.close()


def tokens_of(llm: Llama, prompt: str) -> list[int]:
    return llm.tokenize(prompt.encode(), special=True)


def gap_behind(plain: Llama, tokens: list[int]) -> float:
    """Between the target's two best logits after ``tokens``."""
    plain.reset()
    plain.eval(tokens)
    logits = np.ctypeslib.as_array(plain._ctx.get_logits(), shape=(plain.n_vocab(),))
    second, best = np.sort(logits)[-2:]
    return float(best - second)


@pytest.fixture(scope="module")
def expected_of(plain: Llama) -> Callable[[str], list[int]]:
    """Plain Llama's text, from nothing."""

    @cache
    def text(prompt: str) -> list[int]:
        plain.reset()
        return take(plain, tokens_of(plain, prompt), N)

    return text


def compare(
    dtype: str, prompts: list[str], plain: Llama, expected_of: Callable[[str], list[int]], target: Path, draft: Path
) -> None:
    llm = DFlashLlama(str(target), draft_path=str(draft), feature_dtype=dtype, **OPTIONS)
    accepted = steps = differing = 0
    try:
        for prompt in prompts:
            tokens, expected = tokens_of(plain, prompt), expected_of(prompt)
            said = take(llm, tokens, N)
            accepted, steps = accepted + llm.stats.accepted, steps + llm.stats.draft_steps
            if said != expected:
                first = next(i for i in range(N) if said[i] != expected[i])
                gap = gap_behind(plain, tokens + expected[:first])
                assert gap < TIE, f"{prompt!r} differs at token {first}, where the best logit leads by {gap}"
                differing += 1
    finally:
        llm.close()
    assert differing <= len(prompts) // 10
    assert 1 + accepted / steps > 2.0  # tau is 3.6 over HumanEval


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16", "q8_0"])
def test_greedy_text_is_the_targets(
    dtype: str, plain: Llama, expected_of: Callable[[str], list[int]], demo_target: Path, demo_draft: Path
) -> None:
    """Four of the prompts, one from each of several frames; and the draft is really used."""
    compare(dtype, PROMPTS[::13], plain, expected_of, demo_target, demo_draft)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["f32", *(pytest.param(d, marks=pytest.mark.soak) for d in ("bf16", "f16", "q8_0"))])
def test_greedy_text_of_fifty_prompts_is_the_targets(
    dtype: str, plain: Llama, expected_of: Callable[[str], list[int]], demo_target: Path, demo_draft: Path
) -> None:
    assert len(PROMPTS) == 50
    compare(dtype, PROMPTS, plain, expected_of, demo_target, demo_draft)
