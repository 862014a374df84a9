"""A synthetic pair is one that llama.cpp and this package run; the context benchmark counts what it says."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

from bench_context import (
    BesideLlama,
    Continued,
    Growth,
    Taken,
    _beside_server,
    _growth,
    _steps,
    app,
    beside_llama,
    draft_calls,
)
from decoding import load
from dflash.pair import take
from intervals import Interval
from synthetic_pair import Shape, write_pair

from ggml_mirror.dflash import DFlashLlama
from ggml_mirror.errors import ArgumentError

SHAPE = Shape(
    n_embd=64, n_head=4, n_head_kv=2, head_dim=32, n_ff=96, n_layer=2, n_taps=3, block_size=8, n_vocab=256, n_ctx=4096
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_pair(tmp_path_factory.mktemp("pair"), SHAPE, sliding_window=64)


@pytest.mark.parametrize("kind", ["q8_0", "f16"])
def test_a_synthetic_pair_drafts(kind: str, tmp_path: Path) -> None:
    """The text is the plain target's, and none of it ends early."""
    target, draft = write_pair(tmp_path, SHAPE, kind)
    plain = load(str(target), None, n_ctx=128, n_gpu_layers=0, n_threads=1)
    expected = take(plain, range(40), 30, repeat_penalty=1.0)
    plain.close()
    llm = load(str(target), str(draft), stored="fused:q4_0", n_ctx=128, n_gpu_layers=0, n_threads=1)
    assert isinstance(llm, DFlashLlama)
    assert take(llm, range(40), 30, repeat_penalty=1.0) == expected and len(set(expected)) > 5
    assert llm.draft_spec.taps == (0, 1, 2) and llm.stats.draft_steps > 0
    prefill_s, steps = _steps(llm, list(range(40)), 20)
    assert prefill_s > 0
    assert len(steps) == llm.stats.draft_steps - 2 or len(steps) == llm.stats.draft_steps - 1
    assert all(0 < drafting < whole for whole, drafting in steps)
    llm.close()


def test_time_over_contexts(models: tuple[Path, Path], tmp_path: Path) -> None:
    flags = ["-m", str(models[0]), "-md", str(models[1]), "-t", "1", "--contexts", "40,700", "--steps", "3"]
    more = [
        "--stored",
        "q8_0,fused:q4_0",
        "--pairs",
        "3",
        "--draft-windows",
        "0,100",
        "--json",
        str(tmp_path / "t.json"),
    ]
    done = CliRunner().invoke(app, ["time", *flags, *more, "--plot", str(tmp_path / "t.svg")])
    assert done.exit_code == 0, (done.output, done.exception)
    found = json.loads((tmp_path / "t.json").read_text())
    cells = {(c["stored"], c["kv"], c["window"], c["context"]): c for c in found["cells"]}
    assert len(cells) == len(found["cells"]) == 2 * 3 * 2 * 2
    for (_, kv, window, context), cell in cells.items():
        rows = min(window, context + 5 * 4)  # two steps that are not counted, and three
        assert cell["attended"] == rows
        assert cell["rows_projected"] == (4 if kv != "off" else pytest.approx(rows, abs=4))
        assert 0 < cell["block_ms"] and cell["least_ms"] <= cell["step_ms"]
    assert [(g["stored"], g["kv"]) for g in found["growth"]] == [
        (stored, kv) for stored in ("q8_0", "fused:q4_0") for kv in ("f16", "q8_0")
    ]
    for g in found["growth"]:
        # Which of two short times is the longer, a busy machine decides.
        assert (g["first"], g["last"], g["pairs"]) == (40, 700, 3) and 0 < g["first_ms"] and 0 < g["last_ms"]
        for part in ("step", "attention", "beyond"):
            assert g[part]["low"] <= g[part]["value"] <= g[part]["high"]
    assert set(found["attention_alone_ms"]) == {"f16", "q8_0"} and (tmp_path / "t.svg").stat().st_size > 1000


def test_memory_of_each_thing(models: tuple[Path, Path], tmp_path: Path) -> None:
    """On a CPU only what does not depend on other processes: each row's own bytes."""
    flags = ["-m", str(models[0]), "-md", str(models[1]), "-t", "1", "-c", "512,2048", "--draft-windows", "512"]
    done = CliRunner().invoke(app, ["memory", *flags, "--json", str(tmp_path / "m.json")])
    assert done.exit_code == 0, (done.output, done.exception)
    taken = json.loads((tmp_path / "m.json").read_text())["taken"]
    assert [t["n_ctx"] for t in taken].count(512) == [t["n_ctx"] for t in taken].count(2048) == len(taken) // 2
    formula = {t["what"]: t["formula"] for t in taken if t["n_ctx"] == 2048}
    rows, per_row = 2048 + 8, {"f32": 4 * 192, "q8_0": 34 * 6, "fused:q8_0": 34 * 2, "fused:q4_0": 18 * 2}
    for stored, size in per_row.items():
        assert formula[f"mirror, {stored}"] == rows * size
    assert formula["llama.cpp draft context, f16"] == 2048 * SHAPE.kv_values * 2
    assert formula["draft K and V, q8_0"] == 512 * SHAPE.kv_values * 34 // 32


def test_memory_beside_llama() -> None:
    """Fused mirrors and keys of the same type and positions, and nothing that was measured beside other processes."""
    taken = [
        Taken(512, "mirror, q8_0", "528 rows, staging", 10, 20),
        Taken(512, "mirror, fused:q8_0", "528 rows, staging", 10, 30),
        Taken(512, "draft K and V, f16", "window 512, scratch", 10, 40),
        Taken(512, "draft K and V, q8_0", "window 512, scratch", 10, 9),
        Taken(512, "llama.cpp draft context, f16", "n_ctx 512, scratch", 10, 60),
        Taken(2048, "llama.cpp draft context, f16", "n_ctx 2,048, scratch", 10, 50),
    ]
    assert beside_llama(taken) == [BesideLlama(512, "fused:q8_0", "f16", "window 512", 70, 60)]


def test_what_llama_server_says_of_its_draft() -> None:
    line = (
        "0.00.348.850 I spec common_specu: statistics     draft-dflash: #calls(b,g,a) =    2     11     11, "
        "#gen drafts =     11, #acc drafts =     0, #gen tokens =     77, #acc tokens =     0, "
        "#mean acc len = 1.00, #acc rate/pos = (), dur(b,g,a) = 0.001, 28.402, 0.003 ms\n"
    )
    assert draft_calls(line.replace("11, 28.4", "9, 20.0") + "other\n" + line) == (11, 28.402)
    with pytest.raises(ArgumentError, match="no statistics of draft-dflash"):
        draft_calls("statistics ngram: nothing")


def test_verdicts() -> None:
    def growth(step: float, attention: float) -> Growth:
        exactly = [Interval(ms, ms, ms) for ms in (step, attention, step - attention)]
        return Growth("f32", "f16", 512, 2048, 9, 1.0, 1.0 + step, *exactly, 0.0, step)

    assert [good for _, good in _growth([growth(0.3, 0.4), growth(0.6, 0.4)])] == [True, False]
    texts = [
        Continued("fused:q4_0, f16", 512, 9, 0, 8.0, 2.0, 0.9), Continued("llama-server, f16", 512, 9, 0, 8.0, 3.0, 1.0),
        Continued("llama-server, q8_0", 512, 9, 0, 8.0, 3.0, 0.1),
    ]  # fmt: skip
    assert [good for _, good in _beside_server(texts)] == [True]
