"""The demo pair through restarts: a second process serves from the files of the first what a third says without them."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_cpp import Llama

import ggml_mirror.mirror
from ggml_mirror import DFlashLlama, FeatureMirror, capture

SOURCE = inspect.getsource(ggml_mirror.mirror)  # text of which the draft guesses some


def serve(target: Path, draft: Path, directory: Path | None, prompts: list[list[int]], **options: Any) -> Any:
    """Answers of a process of its own."""
    work = {
        "options": {"n_ctx": 512, "n_threads": 1, "n_threads_batch": 2, **options},
        "directory": None if directory is None else str(directory),
        "prompts": prompts,
        "n_predict": 24,
    }
    command = [sys.executable, str(Path(__file__).with_name("one_server.py")), str(target), str(draft)]
    done = subprocess.run(command, input=json.dumps(work), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def source(demo_target: Path) -> list[int]:
    vocabulary = Llama(str(demo_target), vocab_only=True, verbose=False)
    tokens = vocabulary.tokenize(SOURCE.encode())
    vocabulary.close()
    return tokens


@pytest.mark.parametrize(
    ("dtype", "window"),
    [
        ("q8_0", 80),
        *(pytest.param(d, 80, marks=pytest.mark.slow) for d in ("f32", "iq4_nl")),
        *(pytest.param(d, 80, marks=pytest.mark.soak) for d in ("f16", "bf16", "q5_1")),
        pytest.param("q8_0", None, marks=pytest.mark.soak),
    ],
)
def test_after_a_restart(
    dtype: str, window: int | None, demo_target: Path, demo_draft: Path, source: list[int], tmp_path: Path
) -> None:
    first, other = source[:135], source[300:340]
    parts = [*source[:120], *source[400:425]]
    options = {"feature_dtype": dtype, "draft_window": window}

    def answers(directory: Path | None, *prompts: list[int]) -> Any:
        return serve(demo_target, demo_draft, directory, list(prompts), **options)

    cold = answers(None, first, parts)["answers"]
    assert answers(tmp_path, first, other)["answers"][0] == cold[0]
    warm = answers(tmp_path, first, parts)
    for got, expected, reused in zip(warm["answers"], cold, (135, 64), strict=True):
        assert got == {**expected, "reused": reused}
        assert sum(expected["steps"]) > 0, "the draft must have guessed something for this to mean anything"
    assert warm["counters"]["hits"]["disk"] == 1 and warm["counters"]["misses"] == 0
    assert not warm["counters"]["skipped"] and not warm["counters"]["disk_errors"]


def test_prompts_come_out_as_in_a_plain_llama(demo_target: Path, demo_draft: Path, source: list[int]) -> None:
    """On a CPU, to the bit, whatever the batches: rows of a DFlashLlama's prompt are those of the prompt in llama.cpp's own batches."""
    options: Any = dict(n_ctx=512, n_batch=128, n_threads=1, n_threads_batch=2, verbose=False, flash_attn=True)
    plain = Llama(str(demo_target), **options)
    llm = DFlashLlama(str(demo_target), draft_path=str(demo_draft), **options)
    taps = llm.draft_spec.taps
    with FeatureMirror(taps=len(taps), n_embd=576, cap=512, dtype="f32") as mirror, capture(plain, mirror, taps):
        for n in (20, 63, 64, 129, 150, 200):
            prompt = source[n : 2 * n]
            plain.reset()
            mirror.clear()
            plain.eval(prompt)
            llm.reset()
            next(iter(llm.generate(prompt, temp=0.0)))
            np.testing.assert_array_equal(
                llm.mirror.read(start=0, count=n), mirror.read(start=0, count=n), f"{n} tokens"
            )
            mine, its = (np.array(m._ctx.get_logits()[: llm.n_vocab()]) for m in (llm, plain))
            np.testing.assert_array_equal(mine, its, f"{n} tokens")
