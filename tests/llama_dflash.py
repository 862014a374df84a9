"""Two oracles for a draft step: llama.cpp's own dflash graph, and the same arithmetic in numpy."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import numpy.typing as npt
from llama_cpp import Llama

Floats = npt.NDArray[np.float32]

_SEQUENCE = 0


class LlamaDFlash:
    """A draft GGUF (architecture dflash) in a llama.cpp context of its own beside its target's.

    llama.cpp's graph does what the batch says: rows of features become keys and values at their positions; tokens become logits.
    """

    def __init__(self, path: str | Path, target: Llama, *, n_ctx: int = 1024, causal: bool = False) -> None:
        model_params = llama_cpp.llama_model_default_params()
        self._model: Any = llama_cpp.llama_model_load_from_file(str(path).encode(), model_params)
        assert self._model, f"llama.cpp does not load {path}"
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = n_ctx
        params.n_threads = params.n_threads_batch = 1
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.swa_full = True  # every position is kept; the window is the mask's alone
        params.ctx_other = target.ctx
        self._ctx: Any = llama_cpp.llama_init_from_model(self._model, params)
        assert self._ctx, f"llama.cpp gives {path} no context"
        llama_cpp.llama_set_causal_attn(self._ctx, causal)
        self._n_vocab = target.n_vocab()

    def inject(self, start: int, rows: Floats) -> None:
        """Rows ``[n, n_taps * n_embd]`` of positions ``start..`` become keys and values."""
        rows = np.ascontiguousarray(rows, np.float32)
        batch = self._batch(len(rows), start, embd=rows.shape[1])
        ctypes.memmove(batch.embd, rows.ctypes.data, rows.nbytes)
        self._decode(batch)

    def logits(self, n_past: int, block: Sequence[int]) -> Floats:
        """Logits ``[len(block), n_vocab]`` of the block's tokens at positions ``n_past..``."""
        batch = self._batch(len(block), n_past, embd=0)
        for i, token in enumerate(block):
            batch.token[i], batch.logits[i] = token, True
        self._decode(batch)
        memory = llama_cpp.llama_get_logits(self._ctx)
        return np.ctypeslib.as_array(memory, shape=(len(block), self._n_vocab)).copy()

    def close(self) -> None:
        llama_cpp.llama_free(self._ctx)
        llama_cpp.llama_model_free(self._model)

    def _batch(self, n: int, start: int, *, embd: int) -> Any:
        batch = llama_cpp.llama_batch_init(n, embd, 1)
        batch.n_tokens = n
        for i in range(n):
            batch.pos[i], batch.n_seq_id[i], batch.logits[i] = start + i, 1, False
            batch.seq_id[i][0] = _SEQUENCE
        return batch

    def _decode(self, batch: Any) -> None:
        try:
            status = llama_cpp.llama_decode(self._ctx, batch)
            assert status == 0, f"llama_decode returned {status}"
        finally:
            llama_cpp.llama_batch_free(batch)


class NumpyDFlash:
    """The draft's graph in numpy, float64 throughout but for keys and values, which are rounded to F16 as a cache rounds them.

    Shapes are numpy's: a matrix is ``[n_out, n_in]``. Names of either family of files are understood.
    """

    def __init__(self, draft: str | Path, target: str | Path) -> None:
        reader = gguf.GGUFReader(draft)
        self._w = {t.name: gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float64) for t in reader.tensors}
        theirs = {t.name: t for t in gguf.GGUFReader(target).tensors}
        tables = {name: theirs[name] for name in ("token_embd.weight", "output.weight") if name in theirs}
        self._target = {n: gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float64) for n, t in tables.items()}
        arch = reader.fields["general.architecture"].contents()

        def key(name: str, default: Any = None) -> Any:
            found = reader.fields.get(f"{arch}.{name}")
            return default if found is None else found.contents()

        self._n_layer, self._eps = key("block_count"), key("attention.layer_norm_rms_epsilon")
        self._n_head, self._n_head_kv = key("attention.head_count"), key("attention.head_count_kv")
        self._head_dim, self._n_rot = key("attention.key_length"), key("rope.dimension_count")
        self._rope_base = key("rope.freq_base")
        self._causal = bool(key("attention.causal", False))
        self._n_swa = key("attention.sliding_window", 0)
        self._pattern = key("attention.sliding_window_pattern", [False] * self._n_layer)

    def logits(self, start: int, rows: Floats, n_past: int, block: Sequence[int]) -> Floats:
        """Logits of a block at ``n_past`` whose context are ``rows`` of positions ``start..``."""
        w = self._w
        fused = self._norm(rows.astype(np.float64) @ self._first("fc.weight", "dflash.fc.weight", "dflash_fc.weight").T)
        fused = fused * self._first("enc.output_norm.weight", "dflash.hidden_norm.weight", "dflash_hidden_norm.weight")
        context, queries = start + np.arange(len(rows)), n_past + np.arange(len(block))
        positions = np.concatenate([context, queries])
        x = self._target["token_embd.weight"][list(block)]
        for il in range(self._n_layer):
            cur = self._norm(x) * w[f"blk.{il}.attn_norm.weight"]
            both = np.concatenate([fused, cur])
            k, v = self._heads(both, il, "k"), self._heads(both, il, "v", norm=False)
            q = self._rope(self._heads(cur, il, "q"), queries)
            k = self._rope(k, positions).astype(np.float16).astype(np.float64)
            v = v.astype(np.float16).astype(np.float64)
            distance = queries[:, None] - positions[None, :]
            seen = distance >= 0 if self._causal else np.ones_like(distance, bool)
            if self._n_swa and self._pattern[il]:
                seen = seen & (distance < self._n_swa)
            group = self._n_head // self._n_head_kv
            k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
            scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(self._head_dim)
            scores = np.where(seen[None], scores, -np.inf)
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            scores /= scores.sum(-1, keepdims=True)
            cur = np.einsum("hqk,khd->qhd", scores, v).reshape(len(block), -1)
            x = x + cur @ w[f"blk.{il}.attn_output.weight"].T
            cur = self._norm(x) * self._first(f"blk.{il}.ffn_norm.weight", f"blk.{il}.post_attention_norm.weight")
            gate = cur @ w[f"blk.{il}.ffn_gate.weight"].T
            cur = gate / (1 + np.exp(-gate)) * (cur @ w[f"blk.{il}.ffn_up.weight"].T)
            x = x + cur @ w[f"blk.{il}.ffn_down.weight"].T
        x = self._norm(x) * w["output_norm.weight"]
        head = self._target.get("output.weight", self._target["token_embd.weight"])
        return (x @ head.T).astype(np.float32)

    def _first(self, *names: str) -> npt.NDArray[np.float64]:
        return next(self._w[name] for name in names if name in self._w)

    def _norm(self, x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        scaled: npt.NDArray[np.float64] = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + self._eps)
        return scaled

    def _heads(self, x: npt.NDArray[np.float64], il: int, name: str, *, norm: bool = True) -> npt.NDArray[np.float64]:
        """``[n, n_heads, head_dim]``, each head normed."""
        y = (x @ self._w[f"blk.{il}.attn_{name}.weight"].T).reshape(len(x), -1, self._head_dim)
        return self._norm(y) * self._w[f"blk.{il}.attn_{name}_norm.weight"] if norm else y

    def _rope(self, x: npt.NDArray[np.float64], positions: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """NEOX: value i of a head turns with value i + n_rot / 2."""
        half = self._n_rot // 2
        angle = positions[:, None] * self._rope_base ** (-np.arange(half) / half)
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        out = x.copy()
        a, b = x[..., :half], x[..., half : self._n_rot]
        out[..., :half], out[..., half : self._n_rot] = a * cos - b * sin, a * sin + b * cos
        return out


def relative_difference(got: Floats, wanted: Floats) -> float:
    """Largest difference over the largest value."""
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())


def least_cosine(got: Floats, wanted: Floats) -> float:
    """Of the rows' cosines the smallest."""
    a, b = got.astype(np.float64), wanted.astype(np.float64)
    return float(((a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)).min())
