"""The probe against features that a Python eval callback copies out of llama.cpp, and the gguf package's quantiser."""

from __future__ import annotations

import ctypes
import importlib
import io
import json
import math
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import numpy.typing as npt
import pytest
from dflash.pair import fused_rows
from matplotlib.text import Annotation, Text
from rich.console import Console
from tiny_models import TARGET_ARCHS, write_tiny_model

from ggml_mirror.dtype import FeatureDtype
from ggml_mirror.errors import ArgumentError, CaptureError, GgmlMirrorError
from ggml_mirror.fidelity import Snr, SnrMeter, TapMeter
from ggml_mirror.gguf_file import GgufFile
from ggml_mirror.plot import draw, write_plot
from ggml_mirror.probe import probe
from ggml_mirror.probe_report import ProbeReport, Speed
from ggml_mirror.prompt_run import make_jobs
from ggml_mirror.prompts import DEFAULT_PROMPTS, Prompt
from ggml_mirror.report import print_probe

Rows = npt.NDArray[np.float32]
TAPS = (1, 8, 14, 20, 27)
CODE = DEFAULT_PROMPTS[0]
SHORT = (Prompt("a", "Once upon a time"), Prompt("b", "def f(x):"))


@pytest.fixture(scope="module")
def demo_report(demo_target: Path) -> ProbeReport:
    """Two prompts in both styles through the demo target, all dtypes."""
    return probe(demo_target, prompts=DEFAULT_PROMPTS[:2], n_predict=8, n_threads=1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny.gguf", n_layer=8, n_embd=64)


# ----------------------------------------------------------------------------------------- an oracle of its own


def _block_outputs(path: Path, text: str, layers: tuple[int, ...]) -> Rows:
    """[n, layers * n_embd]: what llama.cpp computes, copied by a Python eval callback in a context of its own."""
    base = ctypes.CDLL(str(next((Path(llama_cpp.__file__).parent / "lib").glob("libggml-base.*"))))
    base.ggml_get_name.restype, base.ggml_get_name.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
    base.ggml_nbytes.restype, base.ggml_nbytes.argtypes = ctypes.c_size_t, [ctypes.c_void_p]
    base.ggml_backend_tensor_get.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
    base.ggml_backend_tensor_get.restype = None
    wanted = {f"l_out-{layer}".encode(): layer for layer in layers}
    found: dict[int, Rows] = {}

    @ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p)
    def on_node(tensor: int, ask: bool, _: object) -> bool:
        layer = wanted.get(base.ggml_get_name(tensor))
        if not ask and layer is not None:
            found[layer] = np.empty(base.ggml_nbytes(tensor) // 4, np.float32)
            base.ggml_backend_tensor_get(tensor, found[layer].ctypes.data, 0, found[layer].nbytes)
        return layer is not None if ask else True

    llm = llama_cpp.Llama(str(path), n_ctx=512, n_batch=512, n_threads=1, n_threads_batch=1, verbose=False)
    params = type(llm.context_params).from_buffer_copy(llm.context_params)
    params.cb_eval = ctypes.cast(on_node, llama_cpp.ggml_backend_sched_eval_callback)
    context = llama_cpp.llama_init_from_model(llm.model, params)
    tokens = llm.tokenize(text.encode())
    assert len(tokens) <= 512
    array = (llama_cpp.llama_token * len(tokens))(*tokens)
    assert llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(array, len(tokens))) == 0
    llama_cpp.llama_free(context)
    rows = [found[layer].reshape(len(tokens), -1) for layer in layers]
    llm.close()
    return np.concatenate(rows, axis=1)


def _reference_snr(rows: Rows, dtype: str) -> npt.NDArray[np.float64]:
    """dB per row, by the gguf package's quantiser and numpy alone."""
    kind = gguf.GGMLQuantizationType[dtype.upper()]
    back = gguf.quants.dequantize(gguf.quants.quantize(rows, kind), kind).astype(np.float64)
    signal, noise = np.sum(rows.astype(np.float64) ** 2, axis=1), np.sum((rows - back) ** 2, axis=1)
    ratios: npt.NDArray[np.float64] = 10 * np.log10(signal / noise)
    return ratios


def test_figures_are_those_of_independently_captured_and_quantised_features(demo_target: Path) -> None:
    rows = _block_outputs(demo_target, CODE.text, TAPS)
    report = probe(demo_target, prompts=[CODE], style="raw", n_predict=0, n_threads=1)
    assert [tap.layer for tap in report.taps] == list(TAPS)
    assert report.rows == len(rows)
    taps = np.split(rows, len(TAPS), axis=1)
    for profile, tap in zip(report.taps, taps, strict=True):
        assert profile.abs_max == np.abs(tap).max()
        energy = np.sum(tap.astype(np.float64) ** 2, axis=0)
        assert profile.top_channel == energy.argmax()
        assert profile.top_channel_energy == pytest.approx(energy.max() / energy.sum())
        assert (profile.over_f16, profile.nan, profile.inf) == (0, 0, 0)
    by_name = {d.dtype.value: d for d in report.dtypes}
    for name in ("f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"):
        expected = _reference_snr(rows, name)
        assert by_name[name].snr.median == pytest.approx(np.median(expected), abs=0.1), name
        assert by_name[name].snr.p5 == pytest.approx(np.percentile(expected, 5), abs=0.3), name
        for snr, tap in zip(by_name[name].tap_snr, taps, strict=True):
            assert snr.median == pytest.approx(np.median(_reference_snr(tap, name)), abs=0.15), name


def test_fused_rows_are_measured_as_the_draft_makes_them(demo_target: Path, demo_draft: Path) -> None:
    rows = fused_rows(str(demo_draft), _block_outputs(demo_target, CODE.text, TAPS))
    report = probe(
        demo_target, draft=demo_draft, rows="fused", prompts=[CODE], style="raw", n_predict=0, n_ctx=512, n_threads=1
    )
    assert (report.row_kind, report.width, report.layers, report.rows) == ("fused", 576, TAPS, len(rows))
    (profile,) = report.taps
    energy = np.sum(rows.astype(np.float64) ** 2, axis=0)
    assert profile.layer is None and profile.top_channel == energy.argmax()
    assert profile.abs_max == pytest.approx(np.abs(rows).max(), rel=0.03)
    assert profile.top_channel_energy == pytest.approx(energy.max() / energy.sum(), rel=0.03)
    for d in report.dtypes:
        assert (d.prefill.rows, d.decode.rows, d.read.rows) == (len(rows), 0, len(rows))
        if d.dtype.value in ("f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"):
            expected = np.median(_reference_snr(rows, d.dtype.value))
            assert d.snr.median == pytest.approx(expected, abs=0.2), d.dtype
    print_probe(report, Console(file=io.StringIO()))


def test_fused_rows_need_a_draft_and_a_draft_names_its_taps(demo_target: Path, demo_draft: Path, tiny: Path) -> None:
    with pytest.raises(ArgumentError, match="-md"):
        probe(demo_target, rows="fused")
    with pytest.raises(ArgumentError, match="raw or fused"):
        probe(demo_target, draft=demo_draft, rows="molten")
    with pytest.raises(ArgumentError, match="leave the taps out"):
        probe(demo_target, draft=demo_draft, taps=[1, 2])
    with pytest.raises(GgmlMirrorError, match="576"):
        probe(tiny, draft=demo_draft)


# ------------------------------------------------------------------------------------------------ the demo target


def test_f32_is_measured_and_exact_and_no_other_dtype_is(demo_report: ProbeReport) -> None:
    for d in demo_report.dtypes:
        is_f32 = d.dtype is FeatureDtype.F32
        for snr in (d.snr, *d.tap_snr):
            assert snr.exact == is_f32
            assert math.isinf(snr.median) == math.isinf(snr.energy) == is_f32


def test_every_dtype_is_reported_with_its_bytes(demo_report: ProbeReport) -> None:
    assert [d.dtype for d in demo_report.dtypes] == list(FeatureDtype)
    for d in demo_report.dtypes:
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[d.dtype.value.upper()]]
        assert d.row_bytes == 5 * 576 // block * size
        assert d.context_bytes == d.row_bytes * 8192
        assert len(d.tap_snr) == len(d.clamped) == 5


def test_more_bits_give_more_decibels(demo_report: ProbeReport) -> None:
    median = {d.dtype.value: d.snr.median for d in demo_report.dtypes}
    order = ["f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "iq4_nl", "q4_0"]
    assert sorted(order, key=lambda name: -median[name]) == order


def test_both_styles_run_and_all_their_rows_are_measured(demo_report: ProbeReport) -> None:
    runs = demo_report.runs
    assert [(r.name, r.style) for r in runs] == [(p.name, s) for s in ("raw", "chat") for p in DEFAULT_PROMPTS[:2]]
    assert runs[2].prompt_tokens > runs[0].prompt_tokens  # the template adds turns
    assert demo_report.rows == sum(r.prompt_tokens + r.generated_tokens for r in runs)
    for d in demo_report.dtypes:
        assert d.prefill.rows == sum(r.prompt_tokens for r in runs)
        assert d.decode.rows == sum(r.generated_tokens for r in runs) > 0
        assert d.read.rows == demo_report.rows
        for speed in (d.prefill, d.decode, d.read):
            assert speed.us_per_row > 0
            assert speed.gb_per_s == pytest.approx((4 * 2880 + d.row_bytes) / (speed.us_per_row * 1000))


def test_the_text_is_what_the_model_writes_without_a_probe(demo_report: ProbeReport, demo_target: Path) -> None:
    llm = llama_cpp.Llama(str(demo_target), n_ctx=4096, n_threads=1, n_threads_batch=1, verbose=False)
    for run, prompt in zip(demo_report.runs, DEFAULT_PROMPTS[:2], strict=False):
        expected = llm.create_completion(prompt.text, max_tokens=8, temperature=0.0)
        assert run.text == expected["choices"][0]["text"]
    chat = llm.create_chat_completion([{"role": "user", "content": CODE.text}], max_tokens=8, temperature=0.0)
    assert demo_report.runs[2].text == chat["choices"][0]["message"]["content"]
    assert demo_report.runs[2].prompt_tokens == chat["usage"]["prompt_tokens"]


def test_json_is_strict_and_says_what_it_means(demo_report: ProbeReport) -> None:
    def refuse(literal: str) -> None:
        raise AssertionError(f"{literal} is not JSON")

    text = json.dumps(demo_report.to_json(), allow_nan=False)
    back = json.loads(text, parse_constant=refuse)
    assert back["reference"] == "f32"
    assert back["dtypes"]["f32"]["snr"] == {"median_db": None, "p5_db": None, "energy_db": None, "exact": True}
    q8 = back["dtypes"]["q8_0"]
    assert q8["snr"]["exact"] is False and q8["snr"]["p5_db"] <= q8["snr"]["median_db"]
    assert [tap["layer"] for tap in q8["tap_snr"]] == list(TAPS)
    assert {"snr", "gb_per_s", "us_per_row", "reference"} <= set(back["definitions"])


# -------------------------------------------------------------------------------------------------- any other model


@pytest.mark.parametrize("arch", TARGET_ARCHS)
def test_every_architecture_runs_without_a_chat_template(arch: str, tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "t.gguf", arch, n_layer=8, n_embd=64, n_ctx=512)
    report = probe(path, n_predict=4, n_threads=1)
    assert [tap.layer for tap in report.taps] == [1, 2, 3, 4, 5]
    assert {r.style for r in report.runs} == {"raw"}
    assert any("no chat template" in note for note in report.notes)
    assert report.dtypes[0].snr.exact
    assert 30 < next(d for d in report.dtypes if d.dtype == "q8_0").snr.median < 60
    # The long passage does not fit into 512 tokens.
    longest = max(report.runs, key=lambda run: run.prompt_tokens)
    assert longest.cut_tokens > 0 and longest.prompt_tokens == 512 - 4
    assert any("cut to 508 tokens" in note and "story" in note for note in report.notes)


def test_widths_that_some_blocks_do_not_divide_leave_those_dtypes_out(tmp_path: Path) -> None:
    report = probe(write_tiny_model(tmp_path / "odd.gguf", n_embd=48), prompts=SHORT, n_predict=1, n_threads=1)
    assert [d.dtype.value for d in report.dtypes] == ["f32", "f16", "bf16"]
    assert any("q8_0" in note and "48" in note for note in report.notes)


def test_long_prompts_in_small_batches_give_the_same_rows(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "t.gguf", matrix_type="f32")
    prompts = [Prompt("long", "word " * 60)]
    whole = probe(path, prompts=prompts, n_predict=0, n_threads=1)
    parts = probe(path, prompts=prompts, n_predict=0, n_threads=1, n_batch=48, n_ubatch=13)
    assert whole.rows == parts.rows > 48
    for a, b in zip(whole.taps, parts.taps, strict=True):
        assert a.abs_max == pytest.approx(b.abs_max, rel=1e-3)


def test_taps_are_reported_in_the_order_given(tiny: Path) -> None:
    kept = [probe(tiny, taps=taps, prompts=SHORT, n_predict=0, n_threads=1) for taps in ((1, 5), (5, 1))]
    assert [tap.layer for tap in kept[1].taps] == [5, 1]
    assert kept[0].taps == tuple(reversed(kept[1].taps))
    assert kept[0].taps[0].abs_max != kept[0].taps[1].abs_max
    for a, b in zip(kept[0].dtypes, kept[1].dtypes, strict=True):
        assert a.tap_snr == tuple(reversed(b.tap_snr))


def test_features_beyond_f16_are_counted_per_tap_and_clamped(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "t.gguf", matrix_type="f32")
    _scale_embeddings(path, 3e4)
    report = probe(path, prompts=SHORT, n_predict=0, n_threads=1)
    rows = _block_outputs(path, SHORT[0].text, (1, 2)), _block_outputs(path, SHORT[1].text, (1, 2))
    for tap in (0, 1):
        expected = sum(int(np.count_nonzero(np.abs(r[:, 64 * tap : 64 * tap + 64]) > 65504)) for r in rows)
        assert report.taps[tap].over_f16 == expected > 0
        f16, q8_0 = (next(d for d in report.dtypes if d.dtype == name) for name in ("f16", "q8_0"))
        assert f16.clamped[tap] == expected
        assert math.isfinite(f16.tap_snr[tap].energy) and f16.tap_snr[tap].median < 40
        assert q8_0.clamped[tap] == 0 and q8_0.tap_snr[tap].median > 35


def test_nan_features_are_counted_and_the_report_stays_valid(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "t.gguf", matrix_type="f32")
    _scale_embeddings(path, math.nan)
    report = probe(path, prompts=SHORT, n_predict=0, n_threads=1)
    assert all(tap.nan == report.rows * 64 and tap.abs_max == 0 for tap in report.taps)
    json.dumps(report.to_json(), allow_nan=False)


def _scale_embeddings(path: Path, factor: float) -> None:
    tensor = GgufFile.read(path).tensors["token_embd.weight"]
    count = math.prod(tensor.shape)
    assert tensor.n_bytes == 4 * count
    values = np.memmap(path, np.float32, "r+", tensor.offset, (count,))
    values *= np.float32(factor)
    values.flush()


def test_a_tap_whose_output_the_graph_does_not_name_is_a_capture_error(tiny: Path, monkeypatch: Any) -> None:
    hook = importlib.import_module("ggml_mirror.capture").Hook  # the package's own `capture` is the function
    monkeypatch.setattr(hook, "discover", lambda self, *_: None)
    with pytest.raises(CaptureError, match="block 1"):
        probe(tiny, prompts=SHORT, n_threads=1)


def test_progress_rises_to_its_total(tiny: Path) -> None:
    seen: list[tuple[int, int]] = []
    probe(tiny, prompts=SHORT, n_predict=2, n_threads=1, progress=lambda done, total, _: seen.append((done, total)))
    assert seen[0][0] == 0 and seen[-1][0] == seen[-1][1] > 0
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_a_chat_template_that_fails_leaves_raw_prompts_or_is_an_error(tiny: Path) -> None:
    llm = llama_cpp.Llama(str(tiny), n_ctx=64, n_threads=1, verbose=False)
    for template in ("{{ raise_exception('needs a system turn') }}", "{% if %}", "{{ messages[7].content }}"):
        llm.metadata["tokenizer.chat_template"] = template
        jobs, notes = make_jobs(llm, SHORT, "both", limit=60)
        assert [job.style for job in jobs] == ["raw", "raw"]
        assert "template fails" in notes[0]
        with pytest.raises(ArgumentError, match="--style raw"):
            make_jobs(llm, SHORT, "chat", limit=60)
    llm.metadata["tokenizer.chat_template"] = "[{{ messages[0].content }}]"
    jobs, notes = make_jobs(llm, SHORT, "chat", limit=60)
    assert notes == [] and llm.detokenize(jobs[0].tokens) == b"[Once upon a time]"


# ------------------------------------------------------------------------------------------------------ arithmetic


def _snr(rows: Any, stored: Any) -> Snr:
    meter = SnrMeter()
    meter.add(np.asarray(rows, np.float32), np.asarray(stored, np.float32))
    return meter.result()


def test_a_tenth_off_is_20_db() -> None:
    rows = np.random.default_rng(0).standard_normal((50, 64)).astype(np.float32)
    snr = _snr(rows, rows * np.float32(1.1))
    assert (snr.median, snr.p5, snr.energy) == pytest.approx((20, 20, 20), abs=1e-4)
    assert not snr.exact


def test_large_rows_dominate_the_energy_ratio_and_not_the_median() -> None:
    rows = [[1000.0], [1.0], [1.0]]
    snr = _snr(rows, [[900.0], [1.0 + 2**-10], [1.0 + 2**-10]])
    assert snr.energy == pytest.approx(20, abs=1e-3)
    assert snr.median == pytest.approx(60.206, abs=1e-3)
    assert snr.p5 == pytest.approx(20, abs=1e-3)


def test_zero_rows_that_stay_zero_lost_nothing() -> None:
    assert _snr(np.zeros((3, 4)), np.zeros((3, 4))) == Snr(math.inf, math.inf, math.inf, exact=True)
    snr = _snr(np.zeros((1, 4)), np.ones((1, 4)))
    assert snr.median == -math.inf and snr.to_json()["median_db"] is None


def test_exact_means_the_same_bits() -> None:
    assert not _snr([[0.0, 1.0]], [[-0.0, 1.0]]).exact
    mixed = _snr([[1.0], [1.0], [1.0]], [[1.0], [1.0], [0.5]])
    assert mixed.median == math.inf and not mixed.exact and math.isfinite(mixed.energy)


def test_a_tap_profile_counts_what_f16_cannot_hold() -> None:
    meter = TapMeter(3)
    meter.add(np.array([[65504.0, -65505.0, 1.0], [0.0, -9e4, np.finfo(np.float32).max]], np.float32))
    profile = meter.result(7, nan=0, inf=1)
    assert (profile.layer, profile.abs_max, profile.over_f16, profile.inf) == (7, 9e4, 2, 1)


def test_the_crest_tells_one_channel_from_many() -> None:
    rng = np.random.default_rng(5)
    normal, spike = TapMeter(640), TapMeter(640)
    normal.add(rng.normal(size=(200, 640)).astype(np.float32))
    rows = np.zeros((3, 640), np.float32)
    rows[:2, 7] = 9.0  # and a row of zeros, which says nothing
    spike.add(rows)
    assert normal.result(0, nan=0, inf=0).crest == pytest.approx(2.4, abs=0.1)
    assert spike.result(0, nan=0, inf=0).crest == pytest.approx(math.sqrt(32))
    odd = TapMeter(48)
    odd.add(np.ones((1, 48), np.float32))
    assert odd.result(0, nan=0, inf=0).crest == 0.0


def test_speed_is_the_median_weighted_by_rows() -> None:
    # 1 of 101 rows took 1 ms, the 100 others 2 us each.
    assert Speed.of([(1, 1_000_000), (100, 200_000)], 4000) == Speed(101, 2.0, 4000)
    assert Speed.of([(1, 10), (1, 20), (1, 90)], 8).us_per_row == 0.02
    assert Speed.of([(100, 200_000)], 4000).gb_per_s == 2.0
    assert Speed.of([], 4000).to_json() is None


# --------------------------------------------------------------------------------------------- table, files, picture


def test_the_plots_labels_overlap_neither_each_other_nor_a_point(demo_report: ProbeReport) -> None:
    figure = draw(demo_report)
    (axes,) = figure.axes
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    notes = [t for t in axes.texts if isinstance(t, Annotation)]
    boxes = {t.get_text().split()[0].rstrip(":"): Text.get_window_extent(t, renderer) for t in notes}
    assert sorted(boxes) == sorted(d.value for d in FeatureDtype)
    names = list(boxes)
    for i, a in enumerate(names):
        assert axes.bbox.x0 <= boxes[a].x0 and boxes[a].x1 <= axes.bbox.x1
        for b in names[i + 1 :]:
            assert not boxes[a].overlaps(boxes[b]), (a, b)
    points = axes.collections[1].get_offsets()
    for x, y in axes.transData.transform(points):
        assert not any(box.contains(x, y) for box in boxes.values())


def test_the_plot_is_written_in_the_format_of_its_name(demo_report: ProbeReport, tmp_path: Path) -> None:
    for suffix, magic in ((".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")):
        path = tmp_path / f"plot{suffix}"
        write_plot(demo_report, path)
        assert path.read_bytes().startswith(magic)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_plot_of_f32_alone_or_of_one_dtype_works(tiny: Path, tmp_path: Path) -> None:
    for dtypes in (["f32"], ["q8_0"]):
        write_plot(probe(tiny, dtypes=dtypes, prompts=SHORT, n_predict=0, n_threads=1), tmp_path / "p.png")
        assert (tmp_path / "p.png").stat().st_size > 5000


def _command(*arguments: object, **streams: Any) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-c", "from ggml_mirror.cli import main; main()", "probe", *map(str, arguments)]
    return subprocess.run(command, timeout=300, **streams)


def test_the_command_prints_tables_and_writes_its_files(tiny: Path, tmp_path: Path) -> None:
    files = tmp_path / "p.json", tmp_path / "p.png"
    done = _command("-m", tiny, "-n", 2, "-t", 1, "--json", files[0], "--plot", files[1], capture_output=True)
    shown = done.stdout.decode()
    assert done.returncode == 0 and done.stderr == b""
    for text in ("∞ (exact)", "iq4_nl", "overflows", "GB/s", "note:", f"wrote {files[0]}", f"wrote {files[1]}"):
        assert text in shown
    assert list(json.loads(files[0].read_text())["dtypes"]) == [d.value for d in FeatureDtype]
    assert files[1].read_bytes().startswith(b"\x89PNG")


def test_a_narrow_terminal_folds_figures_and_loses_none(demo_report: ProbeReport) -> None:
    for width in (80, 60):
        console = Console(width=width, file=io.StringIO())
        print_probe(demo_report, console)
        shown = console.file.getvalue()  # type: ignore[attr-defined]
        assert "…" not in shown
        assert max(map(len, shown.splitlines())) <= width
        assert width == 60 or all(text in shown for text in ("∞ (exact)", "11,520", "23.91 MiB"))


def test_bare_json_is_all_there_is_on_standard_output(tiny: Path) -> None:
    done = _command("--json", "-m", tiny, "-n", 0, "-t", 1, "--dtypes", "q8_0,f32", capture_output=True)
    assert done.returncode == 0 and done.stderr == b""
    assert list(json.loads(done.stdout)["dtypes"]) == ["q8_0", "f32"]


def test_progress_is_shown_on_a_terminal_only(tiny: Path) -> None:
    ours, theirs = pty.openpty()
    done = _command("--json", "-m", tiny, "-n", 0, "-t", 1, stdout=subprocess.PIPE, stderr=theirs)
    os.close(theirs)
    shown = os.read(ours, 65536)
    os.close(ours)
    assert done.returncode == 0 and json.loads(done.stdout)
    assert b"story, raw" in shown or b"loading the model" in shown
