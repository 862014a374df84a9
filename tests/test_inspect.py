"""`ggml-mirror inspect`: what it says about targets, drafts and pairs, and its exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from cli_run import Run
from gguf_edit import edit_gguf
from tiny_models import DRAFT_FORMATS, MASK, N_VOCAB, TARGET_ARCHS, write_tiny_draft, write_tiny_model

from ggml_mirror import row_bytes
from ggml_mirror.dtype import FeatureDtype
from ggml_mirror.model_info import default_taps

DEMO_DRAFT = Path(__file__).parent.parent / "models/smollm2-135m-instruct-dflash-q8_0.gguf"


@pytest.fixture
def run(run: Run) -> Run:
    return lambda *arguments: run("inspect", *arguments)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("target") / "target.gguf", n_layer=8, n_embd=64, n_ctx=384)


@pytest.mark.parametrize("arch", TARGET_ARCHS)
def test_a_target(arch: str, run: Run, tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "t.gguf", arch, n_layer=8, n_embd=64, n_ctx=384)
    result = run(path, "--json")
    assert result.code == 0
    assert result.json == {
        "path": str(path),
        "arch": arch,
        "family": "target",
        "name": f"tiny {arch} 0",
        "n_layer": 8,
        "n_embd": 64,
        "n_ctx_train": 384,
        "n_vocab": N_VOCAB,
        "file_bytes": path.stat().st_size,
        "row": {
            "taps": list(default_taps(8)),
            "n_taps": 5,
            "tap_width": 64,
            "width": 320,
            "row_bytes": {d.value: row_bytes(d, 320) for d in FeatureDtype},
        },
        "draft": None,
        "fit": None,
    }
    shown = run(path)
    assert shown.code == 0 and shown.err == ""
    for part in (str(path), f"{arch} (target)", "384 tokens", "288 tokens", "1, 2, 3, 4, 5", "320 values", "1,280"):
        assert part in shown.out


@pytest.mark.parametrize("fmt", DRAFT_FORMATS)
def test_a_draft(fmt: str, run: Run, tmp_path: Path) -> None:
    path = write_tiny_draft(
        tmp_path / "d.gguf",
        fmt,
        taps=(0, 3, 6),
        n_layer=3,
        block_size=6,
        sliding_window=24,
        sliding_window_pattern=[True, False, True],
    )
    found = run(path, "--json").json
    assert (found["arch"], found["family"]) == (fmt, "llama.cpp draft" if fmt == "dflash" else "lucebox draft")
    assert (found["row"]["taps"], found["row"]["width"]) == ([0, 3, 6], 192)
    assert found["row"]["row_bytes"]["q8_0"] == row_bytes("q8_0", 192)
    draft = found["draft"]
    tensors = gguf.GGUFReader(path).tensors
    assert draft.pop("weights") == {
        kind.name.lower(): {
            "tensors": sum(t.tensor_type == kind for t in tensors),
            "params": sum(int(t.n_elements) for t in tensors if t.tensor_type == kind),
            "bytes": sum(int(t.n_bytes) for t in tensors if t.tensor_type == kind),
        }
        for kind in (gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.F32)
    }
    assert draft == {
        "taps_in_file": [1, 4, 7] if fmt == "dflash" else [0, 3, 6],
        "block_size": 6,
        "mask_token": MASK,
        "causal": False,
        "sliding_window": 24,
        "sliding_layers": [0, 2],
        "n_params": sum(int(t.n_elements) for t in tensors),
    }
    shown = run(path).out
    numbered = "1, 4, 7 (layer inputs)" if fmt == "dflash" else "0, 3, 6 (block outputs)"
    for part in (numbered, "6 tokens", str(MASK), "bidirectional", "24 positions in layers 0, 2", "f16", "0, 3, 6"):
        assert part in shown
    assert "fit" not in shown


def test_a_causal_draft_without_a_window(run: Run, tmp_path: Path) -> None:
    shown = run(write_tiny_draft(tmp_path / "d.gguf", causal=True)).out
    assert "causal" in shown and "bidirectional" not in shown
    assert "none" in shown


def test_taps_that_are_not_named_come_from_the_target(run: Run, target: Path, tmp_path: Path) -> None:
    path = write_tiny_draft(tmp_path / "d.gguf", "dflash-draft", name_taps=False)
    alone, paired = run(path, "--json").json, run(path, "--json", "--target", target).json
    assert (alone["row"]["taps"], alone["row"]["n_taps"], alone["draft"]["taps_in_file"]) == (None, 5, None)
    assert paired["row"]["taps"] == list(default_taps(8))
    assert "5, not named" in run(path).out


def test_a_pair_that_fits(run: Run, target: Path, tmp_path: Path) -> None:
    path = write_tiny_draft(tmp_path / "d.gguf")
    result = run(path, "--target", target, "--json")
    assert (result.code, result.json["fit"]) == (0, {"target": str(target), "fits": True, "reason": None})
    shown = run(path, "-m", target)
    assert shown.code == 0 and f"fits {target}" in shown.out


def test_a_pair_that_does_not_fit_says_why_and_exits_with_1(run: Run, target: Path, tmp_path: Path) -> None:
    path = write_tiny_draft(tmp_path / "d.gguf", taps=(1, 2, 9))
    result = run(path, "--target", target, "--json")
    assert (result.code, result.json["fit"]["fits"]) == (1, False)
    assert "taps block 9, the target has blocks 0 to 7" in result.json["fit"]["reason"]
    shown = run(path, "--target", target)
    assert shown.code == 1 and "does not fit" in shown.out and "taps block 9" in shown.out
    assert run(path, "--target", path, "--json").json["fit"]["reason"].endswith("is itself a draft")


def test_a_width_that_blocks_do_not_divide(run: Run, tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "t.gguf", n_embd=48, n_head=4, n_head_kv=2)
    sizes = run(path, "--json").json["row"]["row_bytes"]
    assert (sizes["f32"], sizes["q8_0"]) == (960, None)
    assert "not possible" in run(path).out


def test_json_into_a_file_and_the_table_beside_it(run: Run, target: Path, tmp_path: Path) -> None:
    result = run(target, "--json", tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text())["family"] == "target"
    assert "320 values" in result.out


def test_what_cannot_be_inspected_is_bad_input(run: Run, target: Path, tmp_path: Path) -> None:
    draft = write_tiny_draft(tmp_path / "d.gguf")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(draft.read_bytes()[:5000])
    spark = edit_gguf(draft, tmp_path / "s.gguf", tensors={"markov_w1.weight": np.zeros((2, 2), np.float32)})
    yarn = edit_gguf(draft, tmp_path / "y.gguf", keys={"dflash.rope.scaling.type": "yarn"})
    for arguments, says in (
        ((tmp_path / "none.gguf",), "no such file"),
        ((tmp_path,), "directory"),
        ((cut,), "truncated"),
        ((spark,), "DSpark"),
        ((yarn,), "yarn"),
        ((draft, "--target", tmp_path / "none.gguf"), "no such file"),
        ((target, "--target", target), "only drafts fit"),
        ((target, "--json", tmp_path / "no" / "out.json"), "no directory"),
    ):
        result = run(*arguments)
        assert result.code == 2, arguments
        assert result.out == "" and result.err.startswith("error: ") and says in result.err
        assert result.err.count("\n") == 1


def test_the_demo_pair_fits(run: Run, demo_target: Path) -> None:
    found = run(DEMO_DRAFT, "--target", demo_target, "--json").json
    assert found["fit"]["fits"]
    assert (found["row"]["taps"], found["draft"]["taps_in_file"]) == ([1, 8, 14, 20, 27], [2, 9, 15, 21, 28])
    assert (found["draft"]["block_size"], found["draft"]["mask_token"]) == (8, 16)
    assert found["file_bytes"] == DEMO_DRAFT.stat().st_size
