"""Tiny random targets, a draft that is right as often as a test wants, and the oracles: plain Llama and a fresh capture."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
from llama_cpp import Llama
from tiny_models import BOS, write_tiny_draft, write_tiny_model

from ggml_mirror import FeatureMirror, capture
from ggml_mirror.dflash import DFlashLlama

N_EMBD, N_CTX, BLOCK, TAPS = 64, 256, 8, (1, 2, 3, 4, 5)

#: Architecture, and what rolls it back. gemma3 slides; without swa_full its cache forgets what slid out.
TARGETS = {
    "llama": ("llama", {}, "cells"),
    "qwen3": ("qwen3", {}, "cells"),
    "gemma3": ("gemma3", {"swa_full": True}, "cells"),
    "gemma3-windowed": ("gemma3", {"swa_full": False}, "copies"),
    "qwen35": ("qwen35", {}, "snapshots"),
    "lfm2": ("lfm2", {}, "snapshots"),
    "mamba": ("mamba", {}, "copies"),
}

# F32 weights and cache, and no flash attention, which rounds through F16: what the cut into batches changes is then far below
# any gap between tokens or rows.
_EXACT = {
    "type_k": llama_cpp.GGML_TYPE_F32,
    "type_v": llama_cpp.GGML_TYPE_F32,
    "flash_attn": False,
    "n_threads": 1,
    "n_threads_batch": 1,
    "verbose": False,
}


def tokens_of(n: int, seed: int = 0) -> list[int]:
    return [BOS, *np.random.default_rng(seed).integers(32, 127, n - 1).tolist()]


def take(llm: Llama, tokens: Sequence[int], n: int, **sampling: Any) -> list[int]:
    """The next n tokens, greedy unless told otherwise; the generator is closed behind the last."""
    generator = llm.generate(list(tokens), **{"temp": 0.0, **sampling})
    try:
        return list(itertools.islice(generator, n))
    finally:
        generator.close()


class Pair:
    """Models in a folder, written once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._plain: dict[Any, Llama] = {}

    def target(self, arch: str, **shape: Any) -> str:
        path = self.folder / f"{arch}-{'-'.join(map(str, shape.values()))}.gguf"
        if not path.exists():
            write_tiny_model(path, arch, n_embd=N_EMBD, matrix_type="f32", **shape)
        return str(path)

    def draft(self, **shape: Any) -> str:
        path = self.folder / f"draft-{'-'.join(f'{k}{v}' for k, v in shape.items())}.gguf"
        if not path.exists():
            write_tiny_draft(path, **{"taps": TAPS, "n_embd": N_EMBD, "block_size": BLOCK, **shape})
        return str(path)

    def dflash(self, name: str = "llama", *, draft: str | None = None, **options: Any) -> DFlashLlama:
        arch, own, _ = TARGETS[name]
        return DFlashLlama(
            self.target(arch), draft_path=draft or self.draft(), **{"n_ctx": N_CTX, **_EXACT, **own, **options}
        )

    def plain(self, name: str = "llama", **options: Any) -> Llama:
        """A plain Llama of the same target, empty. gemma3's is the one with the whole cache: what the windowed one must equal."""
        key = (name.removesuffix("-windowed"), *sorted(options.items()))
        if key not in self._plain:
            arch = TARGETS[name][0]
            self._plain[key] = Llama(self.target(arch), **{"n_ctx": N_CTX, **_EXACT, "swa_full": True, **options})
        llm = self._plain[key]
        llm.reset()
        llm._ctx.kv_cache_clear()
        return llm

    def greedy(self, name: str, tokens: Sequence[int], n: int) -> list[int]:
        """What the plain target says after ``tokens``, evaluated from nothing."""
        return take(self.plain(name), tokens, n)

    def assert_rows_are_fresh(self, name: str, llm: DFlashLlama, *, first: int | None = None) -> None:
        """The mirror holds the rows of the committed tokens and no others: as many as fit, equal to a capture from nothing.

        Args:
            first: first position that has to be there; None: all that the window can hold.
        """
        committed = llm.input_ids[: llm.n_tokens].tolist()
        held = llm.mirror.positions
        first = max(0, len(committed) - llm.draft_window) if first is None else first
        assert not len(held) or held[-1] < len(committed), f"rows up to {held[-1]} of {len(committed)} committed tokens"
        assert set(range(first, len(committed))) <= set(held.tolist())
        if not len(held):
            return
        fresh = self.plain(name)
        taps = llm.draft_spec.taps
        with FeatureMirror(taps=len(taps), n_embd=N_EMBD, cap=N_CTX, dtype="f32", n_threads=1) as m:
            with capture(fresh, m, taps):
                fresh.eval(committed)
            row = np.concatenate([llm.mirror.read(start=p, count=n) for p, n in _runs(held.tolist())])
            expected = m.read(start=0, count=len(committed))[held]
        if llm.feature_rows == "fused":
            expected = fused_rows(llm.draft_path, expected)
        quantum = {"f32": 0.0, "bf16": 2**-8, "f16": 2**-10, "q8_0": 1 / 127, "q4_0": 1 / 8}[llm.feature_dtype.value]
        bound = (0.05 if name.startswith("gemma3") else 2e-3) + quantum * np.abs(expected).max(axis=1)
        wrong = held[np.abs(row - expected).max(axis=1) > bound]
        assert not len(wrong), f"rows of positions {wrong.tolist()} are not those of a fresh capture"


def fused_rows(draft: str, raw: np.ndarray) -> np.ndarray:
    """In numpy, what a draft makes of raw rows: rms_norm(fc @ raw) * hidden_norm."""
    tensors = _tensors(draft)
    x = raw.astype(np.float64) @ tensors["fc.weight"].astype(np.float64).T
    x /= np.sqrt((x * x).mean(axis=1, keepdims=True) + 1e-6)
    return (x * tensors["enc.output_norm.weight"]).astype(np.float32)


@functools.cache
def _tensors(draft: str) -> dict[str, np.ndarray]:
    return {t.name: gguf.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(draft).tensors}


def _runs(positions: Sequence[int]) -> list[tuple[int, int]]:
    """(first, count) of each run of adjacent positions."""
    starts = [p for i, p in enumerate(positions) if i == 0 or positions[i - 1] != p - 1]
    return [(p, next(n for n in itertools.count(1) if p + n not in set(positions))) for p in starts]


def script(llm: DFlashLlama, text: Sequence[int], right: Callable[[int, int], bool] = lambda step, i: True) -> None:
    """Let the draft propose ``text`` (ids by position, prompt included): token i of a step truly if ``right(step, i)``, else another.

    The real draft runs too, so that a window that it cannot read still fails. Beyond the text it stays the real one.
    """
    real, steps = type(llm.draft).step, itertools.count()

    def step(mirror: FeatureMirror, *, n_past: int, last_token: int, n_tokens: int) -> tuple[list[int], int]:
        drafted, context = real(llm.draft, mirror, n_past=n_past, last_token=last_token, n_tokens=n_tokens)
        number = next(steps)
        truth = list(text[n_past + 1 : n_past + 1 + n_tokens])
        scripted = [t if right(number, i) else 32 + (t - 31) % 95 for i, t in enumerate(truth)]
        return [*scripted, *drafted[len(scripted) :]], context

    llm.draft.step = step  # type: ignore[method-assign]


def sometimes(seed: int, share: float = 0.7) -> Callable[[int, int], bool]:
    """Right with this probability, the same for a seed."""
    return lambda step, i: bool(np.random.default_rng([seed, step, i]).random() < share)
