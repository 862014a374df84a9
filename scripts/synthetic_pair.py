"""Writes a random target and a random DFlash draft of any shape, for what does not depend on what they say: memory and time.

    python scripts/synthetic_pair.py --out /tmp/pair                         # 27B shape: n_embd 5,120, 5 draft layers, 5 taps; q8_0
    python scripts/synthetic_pair.py --out /tmp/pair --n-embd 256 --heads 4 --kv-heads 2 --head-dim 64 --ffn 512 --vocab 512

The target (qwen3, target.gguf) has one block more than there are taps, so that a long prompt is evaluated in no time; the draft
(draft.gguf) is llama.cpp's `dflash`. Nothing that is drafted will be accepted, but by chance, so each step commits one token. Matrices
have the variance that keeps activations in range; their values repeat after some millions, since making random numbers would take most
of the time.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import gguf
import numpy as np
import numpy.typing as npt
import typer
from script import run as run_script

from ggml_mirror.errors import ArgumentError

Bytes = npt.NDArray[np.uint8]

_POOL = 1 << 22  # values that matrices are cut from
_BLOCK = 32  # of q8_0: an F16 scale and so many signed bytes
_NORMAL, _CONTROL = 1, 3  # llama.cpp's token types


@dataclass(frozen=True)
class Shape:
    """What both models share, and the draft's own depth. The target's feed-forward is as wide as its hidden state."""

    n_embd: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_ff: int
    n_layer: int
    n_taps: int
    block_size: int
    n_vocab: int
    n_ctx: int

    @property
    def kv_values(self) -> int:
        """Of the draft's keys and values, for each token."""
        return 2 * self.n_layer * self.n_head_kv * self.head_dim

    @property
    def end(self) -> int:
        """The end-of-text token, which is never the likeliest; the mask token comes after it."""
        return self.n_vocab - 2


class Matrices:
    """Random matrices in one storage type."""

    def __init__(self, kind: str, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.kind = gguf.GGMLQuantizationType[kind.upper()]
        if self.kind == gguf.GGMLQuantizationType.Q8_0:
            self._pool = rng.integers(-127, 128, _POOL, np.int8)
            self._std = float(self._pool.astype(np.float32).std())
        elif self.kind == gguf.GGMLQuantizationType.F16:
            self._pool = rng.standard_normal(_POOL, np.float32).astype(np.float16)
        else:
            raise typer.BadParameter(f"{kind}: q8_0 or f16 was expected", param_hint="--type")
        self._shift = 0

    def make(self, n_out: int, n_in: int, std: float, silent: tuple[int, ...] = ()) -> npt.NDArray[Any]:
        """``[n_out, n_in]`` as it is stored; rows ``silent`` are zero."""
        self._shift = (self._shift + 7919 * _BLOCK) % _POOL
        pool = np.roll(self._pool, self._shift)
        values = np.resize(pool, (n_out, n_in))
        if self.kind == gguf.GGMLQuantizationType.F16:
            scaled = np.multiply(values, np.float16(std))
            scaled[list(silent)] = 0
            return scaled
        stored: Bytes = np.empty((n_out, n_in // _BLOCK, 2 + _BLOCK), np.uint8)
        stored[..., :2] = np.frombuffer(np.float16(std / self._std).tobytes(), np.uint8)
        stored[..., 2:] = values.view(np.uint8).reshape(n_out, n_in // _BLOCK, _BLOCK)
        stored[list(silent)] = 0
        return stored.reshape(n_out, -1)


Tensors = Iterator[tuple[str, npt.NDArray[Any], gguf.GGMLQuantizationType]]
_F32 = gguf.GGMLQuantizationType.F32


def _ones(name: str, n: int) -> tuple[str, npt.NDArray[np.float32], gguf.GGMLQuantizationType]:
    return name, np.ones(n, np.float32), _F32


def _block(i: int, s: Shape, m: Matrices, n_ff: int) -> Tensors:
    q, kv = s.n_head * s.head_dim, s.n_head_kv * s.head_dim
    yield _ones(f"blk.{i}.attn_norm.weight", s.n_embd)
    for name, n_out, n_in in (
        ("attn_q", q, s.n_embd),
        ("attn_k", kv, s.n_embd),
        ("attn_v", kv, s.n_embd),
        ("attn_output", s.n_embd, q),
    ):
        yield f"blk.{i}.{name}.weight", m.make(n_out, n_in, n_in**-0.5), m.kind
    for name in ("attn_q_norm", "attn_k_norm"):
        yield _ones(f"blk.{i}.{name}.weight", s.head_dim)
    yield _ones(f"blk.{i}.ffn_norm.weight", s.n_embd)
    for name, n_out, n_in in (("ffn_gate", n_ff, s.n_embd), ("ffn_up", n_ff, s.n_embd), ("ffn_down", s.n_embd, n_ff)):
        yield f"blk.{i}.{name}.weight", m.make(n_out, n_in, n_in**-0.5), m.kind


def _target(s: Shape, m: Matrices) -> Tensors:
    yield "token_embd.weight", m.make(s.n_vocab, s.n_embd, 1.0), m.kind
    for i in range(s.n_taps + 1):
        yield from _block(i, s, m, n_ff=s.n_embd)
    yield _ones("output_norm.weight", s.n_embd)
    # Logits of deviation 3, so that ties are rare.
    yield "output.weight", m.make(s.n_vocab, s.n_embd, 3.0 * s.n_embd**-0.5, silent=(s.end, s.end + 1)), m.kind


def _draft(s: Shape, m: Matrices) -> Tensors:
    width = s.n_taps * s.n_embd
    yield "fc.weight", m.make(s.n_embd, width, width**-0.5), m.kind
    yield _ones("enc.output_norm.weight", s.n_embd)
    for i in range(s.n_layer):
        yield from _block(i, s, m, n_ff=s.n_ff)
    yield _ones("output_norm.weight", s.n_embd)


def _write(path: Path, arch: str, keys: dict[str, Any], tensors: Tensors, s: Shape) -> None:
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name(f"synthetic {arch}")
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(s.n_ctx)
    writer.add_embedding_length(s.n_embd)
    writer.add_head_count(s.n_head)
    writer.add_head_count_kv(s.n_head_kv)
    writer.add_key_length(s.head_dim)
    writer.add_value_length(s.head_dim)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(s.head_dim)
    writer.add_rope_freq_base(1e6)
    writer.add_vocab_size(s.n_vocab)
    for key, value in keys.items():
        name = f"{arch}.{key}"
        if isinstance(value, list):
            writer.add_array(name, value)
        else:
            writer.add_uint32(name, value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    words = [f"w{i}" for i in range(s.n_vocab - 2)]
    writer.add_token_list([*words, "<|end|>", "<|mask|>"])
    writer.add_token_types([_NORMAL] * (s.n_vocab - 2) + [_CONTROL] * 2)
    writer.add_token_merges(["w 1"])
    writer.add_bos_token_id(s.end)
    writer.add_eos_token_id(s.end)
    writer.add_uint32("tokenizer.ggml.mask_token_id", s.end + 1)
    writer.add_add_bos_token(False)
    for name, values, kind in tensors:
        writer.add_tensor(name, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_pair(
    directory: Path, s: Shape, kind: str = "q8_0", sliding_window: int = 0, seed: int = 0
) -> tuple[Path, Path]:
    """target.gguf and draft.gguf in ``directory``, which is made.

    Args:
        sliding_window: of all draft layers but the last; 0: every layer attends to the whole context.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArgumentError(f"{directory} cannot be made: {error.strerror}; name another folder (--out)") from error
    target, draft, matrices = directory / "target.gguf", directory / "draft.gguf", Matrices(kind, seed)
    _write(target, "qwen3", {"block_count": s.n_taps + 1, "feed_forward_length": s.n_embd}, _target(s, matrices), s)
    keys: dict[str, Any] = {
        "block_count": s.n_layer,
        "feed_forward_length": s.n_ff,
        "block_size": s.block_size,
        "target_layers": list(range(1, s.n_taps + 1)),  # the inputs of these blocks
    }
    if sliding_window:
        keys["attention.sliding_window"] = sliding_window
        keys["attention.sliding_window_pattern"] = [i < s.n_layer - 1 for i in range(s.n_layer)]
    _write(draft, "dflash", keys, _draft(s, matrices), s)
    return target, draft


def main(
    out: Annotated[Path, typer.Option(help="Directory for target.gguf and draft.gguf.")],
    n_embd: Annotated[int, typer.Option(help="Hidden state of both.", min=32)] = 5120,
    heads: Annotated[int, typer.Option(min=1)] = 40,
    kv_heads: Annotated[int, typer.Option(min=1)] = 8,
    head_dim: Annotated[int, typer.Option(min=2)] = 128,
    ffn: Annotated[int, typer.Option(help="Feed-forward width of the draft.", min=32)] = 17408,
    layers: Annotated[int, typer.Option(help="Of the draft.", min=1)] = 5,
    taps: Annotated[int, typer.Option(min=1)] = 5,
    block_size: Annotated[int, typer.Option(min=2, max=64)] = 16,
    vocab: Annotated[int, typer.Option(help="Tokens.", min=64)] = 32768,
    ctx_train: Annotated[int, typer.Option(help="Context length in the metadata.", min=1)] = 262144,
    sliding_window: Annotated[int, typer.Option(help="Of all draft layers but the last; 0: none.", min=0)] = 0,
    kind: Annotated[str, typer.Option("--type", help="Of the matrices: q8_0 or f16.")] = "q8_0",
    seed: int = 0,
) -> None:
    if any(n % _BLOCK for n in (n_embd, heads * head_dim, kv_heads * head_dim, ffn)) or heads % kv_heads:
        raise typer.BadParameter(f"widths must be multiples of {_BLOCK}, and the heads of the key heads")
    shape = Shape(n_embd, heads, kv_heads, head_dim, ffn, layers, taps, block_size, vocab, ctx_train)
    started = time.perf_counter()
    for path in write_pair(out, shape, kind, sliding_window, seed):
        print(f"wrote {path}, {path.stat().st_size:,} bytes")
    print(f"{shape.kv_values:,} keys and values per token; {time.perf_counter() - started:.1f} s", file=sys.stderr)


if __name__ == "__main__":
    run_script(main)
