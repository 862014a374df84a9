"""Target, mirror and draft on devices of their own, in each combination that this machine has; and what crosses the bus then.

Everything that runs on a GPU also runs, as one more case, with the CPU in its place.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_cpp import Llama

from ggml_mirror import DFlashLlama, FeatureDtype, devices, find_device
from ggml_mirror.mechanism import CaptureMechanism
from ggml_mirror.mirror import BusBytes, bus_bytes

from .pair import N_EMBD, Pair, take, tokens_of

GPUS = [d.name for d in devices() if d.type in ("GPU", "IGPU")]
WHERE = ["CPU", *GPUS]
HEADS = {"head_dim": 64}  # CUDA's flash attention, which the draft needs, knows no smaller ones


def on(name: str, *, marks: Any = ()) -> Any:
    return pytest.param(name, marks=[*marks, *([pytest.mark.gpu] if name != "CPU" else [])])


def pairs_of(*layers: int) -> list[Any]:
    """(blocks of the target on GPUs, device of draft and mirror): all of them, the CPU alone included."""
    out = []
    for ngl in layers if GPUS else (0,):
        for name in WHERE:
            gpu = ngl != 0 or name != "CPU"
            out.append(pytest.param(ngl, name, id=f"ngl{ngl}-{name}", marks=[pytest.mark.gpu] if gpu else []))
    return out


def crossed(before: BusBytes) -> BusBytes:
    now = bus_bytes()
    return BusBytes(now.to_host - before.to_host, now.to_device - before.to_device)


def assert_rows_agree(rows: np.ndarray, expected: np.ndarray, bound: float) -> None:
    """Each row is within ``bound`` of its own, relative to its length (L2), and nowhere near another's."""
    off = np.linalg.norm(rows - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert off.max() < bound, (
        f"position {off.argmax()} of {len(off)} is off by {off.max():.3g}, the median by {np.median(off):.3g}"
    )
    other = np.linalg.norm(rows - np.roll(expected, 1, axis=0), axis=1) / np.linalg.norm(expected, axis=1)
    assert np.median(other) > 3 * off.max(), "rows of other positions are as close"


def assert_same_but_for_ties(
    plain: Llama, prompt: list[int], text: list[int], expected: list[int], epsilon: float
) -> None:
    """Where two texts part, the plain target's logits of both tokens lie within ``epsilon``."""
    parted = next((i for i, (a, b) in enumerate(zip(text, expected, strict=True)) if a != b), None)
    if parted is None:
        return
    plain.reset()
    plain.eval([*prompt, *expected[:parted]])
    logits = plain._ctx.get_logits()
    gap = abs(logits[text[parted]] - logits[expected[parted]])
    best = max(logits[i] for i in range(plain.n_vocab()))
    assert gap <= epsilon and best - logits[text[parted]] <= epsilon, f"token {parted}: {gap:.3g} apart"


@pytest.mark.parametrize(("n_prompt", "n_batch", "n_ubatch"), [(90, 64, 32), (190, 256, 256)], ids=["cut", "whole"])
@pytest.mark.parametrize("how", list(CaptureMechanism))
@pytest.mark.parametrize("rows", ["raw", "fused"])
@pytest.mark.parametrize(("n_gpu_layers", "device"), pairs_of(-1, 4, 0))
def test_a_tiny_pair_drafts_the_same_wherever_its_parts_lie(
    n_gpu_layers: int,
    device: str,
    rows: str,
    how: CaptureMechanism,
    n_prompt: int,
    n_batch: int,
    n_ubatch: int,
    pair: Pair,
) -> None:
    """A prompt in several micro-batches, and in one of more rows than can wait to be fused by outputs.

    F32 weights and cache. GPUs multiply F32 matrices as TF32, with 10 bits of fraction: 2 % of a row, 0.25 of a logit; rows of other
    positions are more than 100 % off.
    """
    prompt = tokens_of(n_prompt)
    plain = pair.plain("llama")
    expected = take(plain, prompt, 40)
    options: dict[str, Any] = {"n_gpu_layers": n_gpu_layers, "draft_device": device, "mechanism": how}
    draft = pair.draft(**HEADS)
    llm = pair.dflash(draft=draft, feature_rows=rows, n_batch=n_batch, n_ubatch=n_ubatch, **options)
    assert llm.mirror.device.name == device
    text = take(llm, prompt, 40)
    assert llm.stats.draft_steps > 0
    assert_same_but_for_ties(plain, prompt, text, expected, epsilon=0.25)
    committed = llm.input_ids[: llm.n_tokens].tolist()
    alone = pair.dflash(draft=draft, feature_rows=rows, n_batch=n_batch, n_ubatch=n_ubatch)
    alone.eval(committed)
    n = min(len(llm.mirror), len(alone.mirror))
    assert n >= len(committed) - 1
    assert_rows_agree(llm.mirror.read(start=0, count=n), alone.mirror.read(start=0, count=n), 0.02)


@pytest.mark.parametrize("how", list(CaptureMechanism))
@pytest.mark.parametrize(("n_gpu_layers", "device"), pairs_of(-1, 15, 0))
def test_the_demo_pair_drafts_the_same_wherever_its_parts_lie(
    n_gpu_layers: int, device: str, how: CaptureMechanism, demo_target: Path, demo_draft: Path
) -> None:
    """A GPU's kernels round otherwise: logits of this target differ by up to 1.9 (docs/benchmarks/humaneval-h100.md)."""
    shared: dict[str, Any] = {"draft_path": str(demo_draft), "n_ctx": 256, "n_threads": 2, "n_threads_batch": 2}
    alone = DFlashLlama(str(demo_target), **shared, draft_device="cpu", n_gpu_layers=0, verbose=False)
    prompt = alone.tokenize(b"def fibonacci(n):\n    ")
    expected = take(alone, prompt, 32)
    llm = DFlashLlama(
        str(demo_target), **shared, draft_device=device, n_gpu_layers=n_gpu_layers, mechanism=how, verbose=False
    )
    text = take(llm, prompt, 32)
    plain = Llama(str(demo_target), n_ctx=256, n_threads=2, flash_attn=True, verbose=False)
    assert_same_but_for_ties(plain, prompt, text, expected, epsilon=2.0)
    committed = llm.input_ids[: llm.n_tokens].tolist()
    alone.reset()
    alone.eval(committed)
    n = min(len(llm.mirror), len(alone.mirror))
    assert n >= len(committed) - 1
    assert_rows_agree(llm.mirror.read(start=0, count=n), alone.mirror.read(start=0, count=n), 0.2)
    for each in (alone, llm, plain):
        each.close()


# --------------------------------------------------------------------------------------------------------------------- bus


@pytest.mark.parametrize("how", list(CaptureMechanism))
@pytest.mark.parametrize("rows", ["raw", "fused"])
@pytest.mark.parametrize("dtype", list(FeatureDtype), ids=str)
@pytest.mark.parametrize("device", [on(name) for name in WHERE])
def test_no_feature_crosses_the_bus_in_a_step(
    device: str, dtype: FeatureDtype, rows: str, how: CaptureMechanism, pair: Pair
) -> None:
    """With target, mirror and draft on a device: prompt, capture, draft and verification move none. A snapshot moves each row once."""
    support = find_device(device).supports(dtype, taps=1 if rows == "fused" else 5, n_embd=N_EMBD)
    if not (support.capture and support.read):
        pytest.skip(f"{device} cannot hold {dtype}")
    ngl = 0 if device == "CPU" else -1
    llm = pair.dflash(
        feature_dtype=dtype, feature_rows=rows, n_gpu_layers=ngl, draft_device=device, mechanism=how, draft_window=64,
        n_batch=64, n_ubatch=32, draft=pair.draft(**HEADS),
    )  # fmt: skip
    before = bus_bytes()
    take(llm, tokens_of(90), 24)
    assert llm.stats.draft_steps > 3
    assert crossed(before) == BusBytes(0, 0)
    size = 0 if device == "CPU" else len(llm.mirror) * llm.mirror.row_nbytes
    before = bus_bytes()
    shot = llm.mirror.snapshot()
    assert crossed(before) == BusBytes(to_host=size, to_device=0)
    before = bus_bytes()
    llm.mirror.restore(shot)
    assert crossed(before) == BusBytes(to_host=0, to_device=size)
    llm.close()


@pytest.mark.gpu
@pytest.mark.skipif(not GPUS, reason="needs a GPU")
@pytest.mark.parametrize("device", GPUS)
@pytest.mark.parametrize("how", list(CaptureMechanism))
def test_what_lies_apart_crosses_once_as_f32(how: CaptureMechanism, device: str, pair: Pair) -> None:
    """A target on the GPU with its mirror in host memory, and the reverse: each captured row once, in that direction.

    (From 32 tokens on, llama.cpp lets a GPU help a target in host memory, and taps may lie there.)
    """
    for ngl, where in ((-1, "cpu"), (0, device)):
        where_and_how: dict[str, Any] = {"draft_device": where, "mechanism": how, "draft": pair.draft(**HEADS)}
        llm = pair.dflash(n_gpu_layers=ngl, n_batch=64, n_ubatch=16, **where_and_how)
        before = bus_bytes()
        llm.eval(tokens_of(70))
        size = 70 * 5 * N_EMBD * 4
        assert crossed(before) == (BusBytes(size, 0) if ngl else BusBytes(0, size))
        llm.close()
