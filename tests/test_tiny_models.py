"""The random models of the other tests are what they claim to be: llama.cpp runs the targets and loads the drafts."""

from __future__ import annotations

import itertools
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import pytest
from tiny_models import (
    BOS,
    DRAFT_FORMATS,
    LUCEBOX_FORMATS,
    MASK,
    N_VOCAB,
    TARGET_ARCHS,
    write_tiny_draft,
    write_tiny_model,
)

PROMPTS = (b"The quick brown fox", b"Another prompt: 1 + 1 =")


def _load(path: Path) -> llama_cpp.Llama:
    return llama_cpp.Llama(str(path), n_ctx=256, n_batch=64, n_threads=1, logits_all=True, verbose=False)


def _greedy(llm: llama_cpp.Llama, prompt: bytes, n: int) -> list[int]:
    llm.reset()
    return list(itertools.islice(llm.generate(llm.tokenize(prompt), temp=0.0), n))


def _metadata(path: Path) -> dict[str, object]:
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


def _shapes(path: Path) -> dict[str, list[int]]:
    return {tensor.name: tensor.shape.tolist() for tensor in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("arch", TARGET_ARCHS)
def test_llama_cpp_runs_the_target_and_its_text_depends_on_the_prompt(arch: str, tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "target.gguf", arch)
    assert path.stat().st_size < 800_000
    llm = _load(path)
    assert (llama_cpp.llama_model_n_layer(llm.model), llm.n_embd(), llm.n_vocab()) == (8, 64, N_VOCAB)

    last_logits, texts = [], []
    for prompt in PROMPTS:
        tokens = llm.tokenize(prompt)
        llm.reset()
        llm.eval(tokens)
        logits = llm.scores[len(tokens) - 1].copy()
        assert np.isfinite(logits).all() and logits.std() > 1.0
        last_logits.append(logits)
        texts.append(llm.detokenize(_greedy(llm, prompt, 24)))
    assert np.abs(last_logits[0] - last_logits[1]).max() > 0.5
    assert texts[0] != texts[1]
    assert all(text.isascii() and len(set(text)) > 4 for text in texts)


@pytest.mark.parametrize("arch", TARGET_ARCHS)
def test_the_logits_depend_on_the_first_token_of_the_prompt(arch: str, tmp_path: Path) -> None:
    """Blocks mix positions: attention and recurrent state are not washed out."""
    llm = _load(write_tiny_model(tmp_path / "target.gguf", arch))
    logits = []
    for first in b"A", b"Z":
        tokens = llm.tokenize(first + b"nd the rest is the same")
        llm.reset()
        llm.eval(tokens)
        logits.append(llm.scores[len(tokens) - 1].copy())
    assert np.abs(logits[0] - logits[1]).max() > 1e-3


def test_any_text_survives_the_tokenizer(tmp_path: Path) -> None:
    llm = _load(write_tiny_model(tmp_path / "target.gguf"))
    for text in "", "plain", " the  thing\n\ttab", "здравствуй, 世界 ✓ 🦙", "".join(map(chr, range(1, 256))):
        tokens = llm.tokenize(text.encode())
        assert tokens[0] == BOS
        assert llm.detokenize(tokens[1:]).decode() == text  # after BOS, llama_cpp drops a leading space


def test_a_model_is_a_function_of_its_arguments(tmp_path: Path) -> None:
    written = [
        write_tiny_model(tmp_path / "a.gguf", seed=3).read_bytes(),
        write_tiny_model(tmp_path / "b.gguf", seed=3).read_bytes(),
        write_tiny_model(tmp_path / "c.gguf", seed=4).read_bytes(),
    ]
    assert written[0] == written[1]
    assert written[0] != written[2]


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma3", "qwen35"])
def test_other_sizes_and_matrix_types_run_too(arch: str, tmp_path: Path) -> None:
    path = write_tiny_model(
        tmp_path / "target.gguf",
        arch,
        n_layer=5,
        n_embd=128,
        n_head=2,
        n_head_kv=1,
        head_dim=32,
        n_ff=64,
        matrix_type="q8_0",
    )
    llm = _load(path)
    assert (llama_cpp.llama_model_n_layer(llm.model), llm.n_embd()) == (5, 128)
    assert _greedy(llm, PROMPTS[0], 8) != _greedy(llm, PROMPTS[1], 8)


# ------------------------------------------------------------------------------------------------------ drafts


@pytest.mark.parametrize("fmt", DRAFT_FORMATS)
def test_a_draft_has_the_keys_and_shapes_of_its_format(fmt: str, tmp_path: Path) -> None:
    path = write_tiny_draft(tmp_path / "draft.gguf", fmt, taps=(1, 3, 6), block_size=16, n_layer=3)
    metadata, shapes = _metadata(path), _shapes(path)
    assert metadata["general.architecture"] == fmt
    assert metadata[f"{fmt}.block_count"] == 3
    if fmt == "dflash":
        assert metadata["dflash.block_size"] == 16
        assert metadata["dflash.target_layers"] == [2, 4, 7]
        assert metadata["tokenizer.ggml.mask_token_id"] == MASK
        fusion, norm = "fc.weight", "enc.output_norm.weight"
    else:
        assert metadata[f"{fmt}.dflash.block_size"] == 16
        assert metadata[f"{fmt}.dflash.target_layer_ids"] == [1, 3, 6]
        assert metadata[f"{fmt}.dflash.mask_token_id"] == MASK
        dot = "_" if fmt == "dflash-draft" else "."
        fusion, norm = f"dflash{dot}fc.weight", f"dflash{dot}hidden_norm.weight"
    assert shapes.pop(fusion) == [3 * 64, 64]
    assert shapes.pop(norm) == [64]
    assert shapes.pop("output_norm.weight") == [64]
    ffn_norm = "post_attention_norm" if fmt == "dflash-draft" else "ffn_norm"
    assert shapes == {
        f"blk.{i}.{name}.weight": shape
        for i in range(3)
        for name, shape in {
            "attn_norm": [64],
            "attn_q": [64, 64],
            "attn_k": [64, 32],
            "attn_v": [64, 32],
            "attn_output": [64, 64],
            "attn_q_norm": [16],
            "attn_k_norm": [16],
            ffn_norm: [64],
            "ffn_gate": [64, 96],
            "ffn_up": [64, 96],
            "ffn_down": [96, 64],
        }.items()
    }


@pytest.mark.parametrize("fmt", LUCEBOX_FORMATS)
def test_a_lucebox_draft_may_leave_its_taps_unnamed(fmt: str, tmp_path: Path) -> None:
    metadata = _metadata(write_tiny_draft(tmp_path / "draft.gguf", fmt, taps=(1, 3), name_taps=False, target_n_layer=9))
    assert f"{fmt}.dflash.target_layer_ids" not in metadata
    assert metadata[f"{fmt}.dflash.n_target_layers"] == (9 if fmt == "gemma4-dflash-draft" else 2)


@pytest.mark.parametrize("fmt", DRAFT_FORMATS)
def test_a_sliding_window_comes_with_its_pattern(fmt: str, tmp_path: Path) -> None:
    metadata = _metadata(write_tiny_draft(tmp_path / "a.gguf", fmt, n_layer=3, sliding_window=24))
    assert metadata[f"{fmt}.attention.sliding_window"] == 24
    assert metadata[f"{fmt}.attention.sliding_window_pattern"] == [True, True, False]
    pattern = [False, True, False]
    metadata = _metadata(
        write_tiny_draft(tmp_path / "b.gguf", fmt, n_layer=3, sliding_window=24, sliding_window_pattern=pattern)
    )
    assert metadata[f"{fmt}.attention.sliding_window_pattern"] == pattern


@pytest.mark.parametrize(
    "options", [{}, {"sliding_window": 24}, {"causal": True}, {"causal": False, "sliding_window": 8}]
)
def test_llama_cpp_loads_a_dflash_draft_and_makes_a_context_beside_the_target(
    options: dict[str, object], tmp_path: Path
) -> None:
    target = _load(write_tiny_model(tmp_path / "target.gguf"))
    path = write_tiny_draft(tmp_path / "draft.gguf", **options)  # type: ignore[arg-type]
    if "causal" in options:
        assert _metadata(path)["dflash.attention.causal"] is options["causal"]
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
    assert model
    try:
        assert llama_cpp.llama_model_n_layer(model) == 2
        assert llama_cpp.llama_model_n_embd(model) == 64
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.ctx_other = 128, target.ctx
        context = llama_cpp.llama_init_from_model(model, params)
        assert context
        llama_cpp.llama_free(context)
    finally:
        llama_cpp.llama_model_free(model)
