"""Budgets are what is allocated: to the byte where llama.cpp and this package say so themselves, and by what the process really takes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import llama_cpp
import numpy as np
import pytest
from cli_run import Run
from dflash.pair import TARGETS, Pair, take, tokens_of
from llama_cpp import Llama, _logger
from tiny_models import TARGET_ARCHS

from ggml_mirror import mechanism
from ggml_mirror.budget import Budget, make_budget
from ggml_mirror.budget_report import print_budget
from ggml_mirror.device import find_device
from ggml_mirror.dflash import DFlashLlama
from ggml_mirror.dtype import DTYPE_VARIABLE, FeatureDtype
from ggml_mirror.errors import ArgumentError, BudgetError, DtypeError, ModelFileError
from ggml_mirror.ladder import default_margin
from ggml_mirror.memory_parts import Part
from ggml_mirror.report import make_console
from ggml_mirror.target_memory import TargetMemory, breakdown, measure

MIB = 2**20
DRAFT = Path(__file__).parents[1] / "models" / "smollm2-135m-instruct-dflash-q8_0.gguf"


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def log() -> Iterator[list[str]]:
    """llama.cpp's log, line by line."""
    lines: list[str] = []
    keep = llama_cpp.llama_log_callback(lambda level, text, data: lines.append(text.decode()))
    llama_cpp.llama_log_set(keep, None)
    yield lines
    llama_cpp.llama_log_set(_logger.llama_log_callback, None)


def logged(lines: list[str], what: str) -> float:
    """MiB in the last load's lines such as ``CPU KV buffer size = 90.00 MiB``, all buffers together."""
    return sum(float(m[1]) for line in lines if (m := re.search(rf"{what} buffer size = +([\d.]+) MiB", line)))


def sums(budget: Budget) -> Counter[str]:
    out: Counter[str] = Counter()
    for part in budget.parts:
        out[part.id] += part.bytes
    return out


SHAPES: dict[str, dict[str, Any]] = {
    "small": {"n_ctx": 256},
    "odd": {"n_ctx": 2001, "n_batch": 100, "n_ubatch": 33},
    "other types": {"n_ctx": 3000, "type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F16},
    "no flash attention": {"n_ctx": 1024, "flash_attn": False, "n_ubatch": 512},
}


@pytest.mark.parametrize("shape", list(SHAPES))
@pytest.mark.parametrize("arch", [*TARGET_ARCHS, "gemma3-windowed"])
def test_a_target_is_what_llama_cpp_allocates(arch: str, shape: str, pair: Pair, log: list[str]) -> None:
    """Against the loaded model's own account, and against what llama.cpp prints as it allocates."""
    options = {"flash_attn": True, **SHAPES[shape]}
    if arch == "gemma3-windowed":
        options["swa_full"] = False
    path = pair.target(arch.removesuffix("-windowed"))
    counted = sums(make_budget(path, **options))

    log.clear()
    llm = Llama(path, verbose=False, n_threads=1, **options)
    llama_cpp.llama_log_set(_logger.llama_log_callback, None)
    real = breakdown(llm, mapped=True)
    assert counted["target_weights"] == sum(b.weights for b in real)
    assert counted["kv_cache"] == sum(b.context for b in real)
    assert counted["target_compute"] == sum(b.compute for b in real)
    llm.close()


@pytest.mark.parametrize("shape", ["odd", "other types"])
@pytest.mark.parametrize("arch", ["llama", "gemma3-windowed", "qwen35", "mamba"])
def test_a_target_is_what_llama_cpp_prints(arch: str, shape: str, pair: Pair, log: list[str]) -> None:
    options = {"flash_attn": True, **SHAPES[shape], "verbose": True, "n_threads": 1}
    if arch == "gemma3-windowed":
        options["swa_full"] = False
    path = pair.target(arch.removesuffix("-windowed"))
    counted = sums(make_budget(path, **{k: v for k, v in options.items() if k != "verbose"}))
    code = f"import llama_cpp; llama_cpp.Llama({path!r}, **{options!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stderr.splitlines()
    rounded = 0.006 * 4  # two decimals, some buffers
    assert logged(lines, "model") == pytest.approx(counted["target_weights"] / MIB, abs=rounded)
    assert logged(lines, "(?:KV|RS)") == pytest.approx(counted["kv_cache"] / MIB, abs=rounded)
    assert logged(lines, "compute") == pytest.approx(counted["target_compute"] / MIB, abs=rounded)
    assert logged(lines, "output") == pytest.approx(counted["logits"] / MIB, abs=rounded)


VARIANTS: dict[str, dict[str, Any]] = {
    "raw": {},
    "fused": {"feature_rows": "fused"},
    "fused, K and V in q8_0": {"feature_rows": "fused", "draft_kv": "q8_0"},
    "no K and V": {"draft_kv": "off"},
    "taps kept in place": {"mechanism": "outputs"},
}


@pytest.mark.parametrize(("name", "variant"), [*((name, "raw") for name in TARGETS), *(("llama", v) for v in VARIANTS)])
def test_a_pair_is_what_a_dflash_llama_allocates(name: str, variant: str, pair: Pair) -> None:
    """Snapshots of a running state included. The draft is used until its scratch stands."""
    arch, own, means = TARGETS[name]
    options = {"n_ctx": 512, "feature_dtype": "q8_0", "draft_window": 100, "n_batch": 64, "n_ubatch": 32, **own}
    options |= VARIANTS[variant]
    draft = pair.draft(head_dim=32)
    budget = make_budget(pair.target(arch), draft_path=draft, **options)
    counted = sums(budget)
    llm = DFlashLlama(pair.target(arch), draft_path=draft, verbose=False, n_threads=1, **options)
    take(llm, tokens_of(150), 30)
    real = breakdown(llm, mapped=True)
    assert counted["target_weights"] == sum(b.weights for b in real)
    assert counted["kv_cache"] == sum(b.context for b in real)
    assert counted["target_compute"] == sum(b.compute for b in real)
    assert ("state_copy" in counted) == (means == "copies")
    taken = llm.draft.bytes
    ours = [counted[part] for part in ("draft_weights", "draft_kv", "draft_compute")]
    assert ours == [taken.weights, taken.kv, taken.compute]
    waiting = 0 if llm._fuser is None else llm._fuser.staging.size.ring + llm._fuser.staging.size.bookkeeping
    assert counted["raw_rows"] == waiting
    assert counted["mirror"] == llm.mirror.size.ring and counted["mirror_bookkeeping"] == llm.mirror.size.bookkeeping
    assert (budget.draft_window, budget.cap) == (llm.draft_window, llm.mirror.cap)
    assert budget.n_ctx == llm.n_ctx() and budget.mirror_device == llm.mirror.device.name
    llm.close()


def test_the_mechanism_is_the_one_that_will_be_used(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU outputs, unless the graph keeps not all of them in place, or all logits are kept: then what the callback takes."""
    target = pair.target("llama")
    assert measure(target, n_ctx=512).mechanism is None
    monkeypatch.setattr(mechanism, "devices", lambda: [SimpleNamespace(type="GPU")])

    def measured(taps: tuple[int, ...], how: str | None = None, **options: Any) -> TargetMemory:
        found = measure(target, n_draft=7, taps=taps, mechanism=how, n_ctx=512, n_gpu_layers=-1, **options)
        assert found.output_values == (4 if found.mechanism == "outputs" else 1)
        return found

    kept, by_callback = measured((1, 2)), measured((1, 2), "callback")
    assert (kept.mechanism, by_callback.mechanism) == ("outputs", "callback")
    assert sum(b.compute for b in kept.buffers) > sum(b.compute for b in by_callback.buffers)
    for other in (measured((1, 99)), measured((1, 2), logits_all=True)):
        assert (other.mechanism, other.buffers) == (by_callback.mechanism, by_callback.buffers)


def test_a_window_is_never_wider_than_the_context(pair: Pair) -> None:
    budget = make_budget(pair.target("llama"), draft_path=pair.draft(), n_ctx=300, draft_window=10**6)
    assert budget.draft_window == budget.n_ctx == 512  # llama.cpp rounds up


def test_nothing_is_allocated(pair: Pair) -> None:
    """Rings and caches of many GiB: llama.cpp's list of cells (48 bytes each) is all that comes and goes."""
    code = f"""
import resource
from ggml_mirror.budget import make_budget
def resident():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
make_budget({pair.target("llama")!r}, n_ctx=512)
before, n_ctx = resident(), 6_000_000
budget = make_budget({pair.target("llama")!r}, draft_path={pair.draft()!r}, n_ctx=n_ctx, draft_window=n_ctx)
assert sum(p.bytes for p in budget.parts) > 12 << 30
assert resident() - before < 64 * n_ctx, resident() - before
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("type_k", ["f16", "q8_0"])
def test_the_process_takes_what_the_budget_says(type_k: str, demo_target: Path) -> None:
    """The demo pair at work, each row of its ring written: resident memory, less the pages of the mapped file."""
    code = f"""
import gc, json
import llama_cpp, numpy as np
from ggml_mirror import DFlashLlama
from ggml_mirror.budget import make_budget

def resident():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

options = dict(
    n_ctx=8192, n_ubatch=32, feature_dtype="f32", n_threads=2, n_threads_batch=2, draft_window=8192,
    type_k=llama_cpp.GGML_TYPE_{type_k.upper()},
)
target, draft = {str(demo_target)!r}, {str(DRAFT)!r}
budget = make_budget(target, draft_path=draft, **options)
gc.collect()
before = resident()
llm = DFlashLlama(target, draft_path=draft, verbose=False, **options)
for start in range(0, llm.mirror.cap, 1000):
    llm.mirror.write_rows(start=start, rows=np.ones((min(1000, llm.mirror.cap - start), llm.mirror.width), np.float32))
tokens = np.random.default_rng(0).integers(100, 40000, 300).tolist()
list(zip(range(12), llm.generate(tokens, temp=0.0)))
gc.collect()
print(json.dumps([resident() - before, budget.to_json()]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    grown, budget = json.loads(done.stdout)
    counted = sum(part["bytes"] for part in budget["parts"] if not part["mapped"])
    assert grown == pytest.approx(counted, rel=0.03), (grown / MIB, counted / MIB)


# ------------------------------------------------------------------------------------------------------ auto


def limited(free: int, code: str, *arguments: str) -> Any:
    """What ``code`` leaves in ``out``, in a process that may take only so many bytes more than it has when it begins."""
    program = f"""
import json, resource, sys
from ggml_mirror.budget import *
from ggml_mirror.device import host_memory
from ggml_mirror.dflash import DFlashLlama
from ggml_mirror.dtype import FeatureDtype
from ggml_mirror.errors import *
target, draft = sys.argv[1:]
make_budget(target, draft_path=draft, n_ctx=256)  # what the first call loads for good is not what is measured
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + {free}, -1))
{code}
print(json.dumps(out))
"""
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# Llama itself lays out n_batch x n_ctx numbers (and touches few): ulimit counts them.
FEW = "n_batch=8, n_ubatch=8"
N_CTX = 400_000  # of the tiny pair: 391 MiB of cache, and 488 MiB of mirror as f32 over the whole context


def test_auto_steps_down_as_memory_gets_tight(pair: Pair) -> None:
    """Real limits on the process. The sentence gives the numbers of what was refused."""
    code = f"""
out = []
for margin in ("64MiB", "930MiB", "1110MiB", "1300MiB"):
    b = make_budget(
        target, draft_path=draft, feature_dtype="auto", n_ctx={N_CTX}, draft_window={N_CTX}, memory_margin=margin, {FEW}
    )
    out.append([b.dtype, b.reason, b.devices[0].free_after, b.margin, str(b.error)])
"""
    chosen = limited(1800 * MIB, code, pair.target("llama"), pair.draft())
    assert [c[0] for c in chosen] == ["f32", "bf16", "q8_0", None], chosen
    for dtype, reason, left, margin, error in chosen:
        if dtype is not None:
            assert reason.startswith(f"{dtype} leaves ") and left >= margin and error == "None"
    assert (
        "f32 would leave" in chosen[1][1] and "f32 would leave" in chosen[2][1] and "bf16 would leave" in chosen[2][1]
    )
    assert "no dtype leaves 1.27 GiB free on CPU" in chosen[3][1] and "with a draft window of" in chosen[3][4]


def test_what_the_error_offers_is_true(pair: Pair) -> None:
    """Too little for f32: the dtypes that it names fit, others do not; the window that it names fits, a larger one does not."""
    code = f"""
options = dict(draft_path=draft, n_ctx={N_CTX}, {FEW})
b = make_budget(target, feature_dtype="f32", draft_window={N_CTX}, **options)
try:
    b.require_fit()
except BudgetError as error:
    fits = {{d: make_budget(target, feature_dtype=d, draft_window={N_CTX}, **options).error is None for d in FeatureDtype}}
    around = [make_budget(target, feature_dtype="f32", draft_window=int(w * error.max_window), **options).error is None
              for w in (0.98, 1.02)]
    out = [str(error), error.device, error.bytes_needed, error.bytes_free, error.fitting_dtypes, fits, error.max_window, around]
"""
    message, device, needed, free, fitting, fits, window, around = limited(
        900 * MIB, code, pair.target("llama"), pair.draft()
    )
    assert device == "CPU" and needed > free and "ulimit -v" in message
    assert fitting == [d for d, good in fits.items() if good] and "q8_0" in fitting and "f32" not in fitting
    assert f"a draft window of {N_CTX} fits as {', '.join(fitting)}" in message
    assert 1000 < window < N_CTX and f"f32 fits with a draft window of {window}" in message
    assert around == [True, False]


def test_a_target_that_is_too_large_by_itself(pair: Pair) -> None:
    code = f"""
out = []
for draft_path in (None, draft):
    b = make_budget(target, draft_path=draft_path, feature_dtype="auto", n_ctx=1_000_000, {FEW})
    out.append([b.dtype, str(b.error)])
"""
    for dtype, message in limited(800 * MIB, code, pair.target("llama"), pair.draft()):
        assert dtype is None
        assert "KV cache 976.75 MiB" in message and "use a smaller context (n_ctx, -c)" in message
        assert "fits" not in message.replace("no draft window fits", "").replace("it does not fit", "")


def test_mapped_weights_that_do_not_fit_are_a_note(demo_target: Path) -> None:
    code = """
out = []
for use_mmap in (True, False):
    b = make_budget(target, n_ctx=512, use_mmap=use_mmap)
    out.append([b.error is None, list(b.notes)])
"""
    mapped, copied = limited(170 * MIB, code, str(demo_target), str(DRAFT))
    assert mapped[0] and len(mapped[1]) == 1 and "mapped from the file (92.1 MiB)" in mapped[1][0]
    assert not copied[0]


def test_a_dflash_llama_chooses(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """By argument or by the variable; an argument wins."""
    options = {"n_ctx": 256, "verbose": False, "draft_path": pair.draft(), "n_threads": 1}
    target, free = pair.target("llama"), find_device("cpu").memory_total
    assert DFlashLlama(target, feature_dtype="auto", **options).feature_dtype is FeatureDtype.F32
    monkeypatch.setenv(DTYPE_VARIABLE, " Auto ")
    llm = DFlashLlama(target, memory_margin="1MiB", **options)
    assert llm.feature_dtype is FeatureDtype.F32 and llm.mirror.dtype == "f32"
    with pytest.raises(BudgetError, match="no dtype leaves") as refused:
        DFlashLlama(target, memory_margin=free, **options)
    assert isinstance(refused.value, MemoryError) and "f32" in refused.value.fitting_dtypes
    assert DFlashLlama(target, feature_dtype="q8_0", memory_margin=free, **options).feature_dtype is FeatureDtype.Q8_0


def test_a_pickled_choice_stays(pair: Pair) -> None:
    llm = pair.dflash(feature_dtype="auto")
    assert llm.__getstate__()["feature_dtype"] == "f32"


def test_auto_where_nothing_can_be_weighed(monkeypatch: pytest.MonkeyPatch) -> None:
    from ggml_mirror import FeatureMirror, row_bytes

    for call in (lambda: row_bytes("auto", 64), lambda: FeatureMirror(taps=1, n_embd=64, cap=4, dtype="AUTO")):
        with pytest.raises(
            DtypeError, match=r"weighs a target and a draft against memory.*DFlashLlama.*ggml-mirror run"
        ):
            call()
    monkeypatch.setenv(DTYPE_VARIABLE, "auto")
    with pytest.raises(DtypeError, match=f"{DTYPE_VARIABLE}: auto weighs"):
        FeatureMirror(taps=1, n_embd=64, cap=4)


def test_dtypes_that_rows_do_not_fit(tmp_path: Path) -> None:
    """A tap of 48 values: f32 and bf16 remain."""
    from tiny_models import write_tiny_draft, write_tiny_model

    target = write_tiny_model(tmp_path / "t.gguf", n_embd=48, matrix_type="f32")
    draft = write_tiny_draft(tmp_path / "d.gguf", n_embd=48, matrix_type="f32")
    with pytest.raises(DtypeError, match="cannot hold rows of 5 taps x 48 as q8_0; use one of f32, f16, bf16"):
        make_budget(target, draft_path=draft, feature_dtype="q8_0", n_ctx=256)
    budget = make_budget(target, draft_path=draft, feature_dtype="auto", memory_margin=2**50, n_ctx=256)
    assert "q8_0" not in budget.reason and "bf16 would" in budget.reason


def test_bad_arguments(pair: Pair, tmp_path: Path) -> None:
    target = pair.target("llama")
    with pytest.raises(ArgumentError, match="cannot be negative"):
        make_budget(target, draft_path=pair.draft(), memory_margin=-1)
    with pytest.raises(ArgumentError, match="'much' is not a size"):
        make_budget(target, draft_path=pair.draft(), memory_margin="much")
    with pytest.raises(ArgumentError, match="draft_window is 0"):
        make_budget(target, draft_path=pair.draft(), draft_window=0)
    with pytest.raises(ModelFileError):
        make_budget(tmp_path / "none.gguf")
    with pytest.raises(ModelFileError, match="does not divide n_embd_head_k"):
        measure(target, type_k=llama_cpp.GGML_TYPE_Q8_0, flash_attn=True)


def test_the_margin_by_default() -> None:
    cpu = find_device("cpu")
    assert default_margin(cpu) == min(cpu.memory_total // 20, 2**30)


def test_json(pair: Pair) -> None:
    budget = make_budget(pair.target("llama"), draft_path=pair.draft(), feature_dtype="bf16", n_ctx=256)
    value = json.loads(json.dumps(budget.to_json(), allow_nan=False))
    assert value["fits"] and value["feature_dtype"] == "bf16" and value["error"] is None
    (cpu,) = value["devices"]
    assert cpu["needed"] == sum(part["bytes"] for part in value["parts"])
    assert cpu["free_after"] == cpu["free"] - cpu["needed"] > 0
    assert cpu["mapped"] == sum(part["bytes"] for part in value["parts"] if part["id"] == "target_weights")


def test_lora_and_extra_parts_count(pair: Pair, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter.gguf"
    adapter.write_bytes(np.zeros(1000, np.uint8).tobytes())
    extra = Part("prefix_cache", "prefix cache", "CPU", 12345)
    counted = sums(make_budget(pair.target("llama"), lora_path=str(adapter), extra=[extra], n_ctx=256))
    assert (counted["lora"], counted["prefix_cache"]) == (1000, 12345)


def test_commands_that_choose_no_dtype_take_auto_for_none(
    run: Run, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(DTYPE_VARIABLE, "auto")
    assert run("plan", "--width", 64).code == 0
    assert run("inspect", pair.target("llama")).code == 0
    assert run("doctor", "--json").json["default_dtype"] == "auto"
    monkeypatch.setenv(DTYPE_VARIABLE, "automatic")
    assert run("plan", "--width", 64).code == 2


def test_the_table(run: Run, pair: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    """Every part and every total, to the byte; sizes too large are coloured, not left out."""
    budget = make_budget(pair.target("gemma3"), draft_path=pair.draft(), feature_dtype="auto", n_ctx=512)
    print_budget(budget, make_console())
    shown = capsys.readouterr().out
    for part in budget.parts:
        assert re.search(rf"{part.name} .*{part.bytes:,} ", shown), part
    for device in budget.devices:
        for number in (device.needed, device.free, device.free_after):
            assert f"{number:,}" in shown
    assert f"feature dtype auto: {budget.reason}" in shown.replace("\n", "")
