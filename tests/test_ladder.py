"""The ladder of rows and dtypes: its order, what "auto" takes of it where memory is short, and what errors offer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cli_run import Run
from dflash.pair import Pair, take, tokens_of
from gguf_edit import edit_gguf
from hypothesis import given
from hypothesis import strategies as st
from test_budget import FEW, MIB, N_CTX, limited, pair  # noqa: F401

from ggml_mirror.budget import make_budget
from ggml_mirror.draft import DraftSpec
from ggml_mirror.dtype import FeatureDtype, row_bytes
from ggml_mirror.errors import ArgumentError, BudgetError, UnsupportedDraftError
from ggml_mirror.ladder import BY_PRECISION, COSTS, Rung, candidates, choose, descending, next_rung
from ggml_mirror.model_info import ModelInfo
from ggml_mirror.plan import plan
from ggml_mirror.row_kind import FUSED, RAW

SIZES = st.integers(0, 2**40)


@given(sizes=st.lists(SIZES, min_size=1, max_size=9), free=SIZES, margin=st.integers(0, 2**36))
def test_the_first_that_leaves_the_margin_is_taken(sizes: list[int], free: int, margin: int) -> None:
    needed = dict(zip(BY_PRECISION, sorted(sizes, reverse=True), strict=False))
    rung, reason = choose(needed, free=free, margin=margin, device="CUDA7")
    good = [r for r, size in needed.items() if free - size >= margin]
    assert rung == (good[0] if good else None)
    refused = [r for r in needed if rung is None or needed[r] > needed[rung]]
    assert "CUDA7" in reason and all(f"{r} would" in reason for r in refused)


@given(st.lists(SIZES, min_size=len(BY_PRECISION), max_size=len(BY_PRECISION)), SIZES, SIZES)
def test_each_rung_is_smaller_than_all_before_it(sizes: list[int], below: int, free: int) -> None:
    """And none is left out but for one that is as precise and no larger."""
    of = dict(zip(BY_PRECISION, sizes, strict=True))
    ladder = descending(BY_PRECISION, of.__getitem__)
    kept = list(ladder)
    assert list(ladder.values()) == sorted(set(ladder.values()), reverse=True)
    assert kept == [r for r in BY_PRECISION if r in ladder]
    for rung in BY_PRECISION:
        before = BY_PRECISION[: BY_PRECISION.index(rung)]
        assert (rung in ladder) == all(of[rung] < of[r] for r in before)
    offered = next_rung(ladder, below, free)
    assert offered == next((r for r in kept if of[r] < below and of[r] <= free), None)


@given(taps=st.integers(1, 8), n_embd=st.integers(1, 200).map(lambda n: 32 * n), cap=st.integers(1, 300_000))
def test_the_ladder_of_a_plan_is_its_bytes(taps: int, n_embd: int, cap: int) -> None:
    ladder = plan(taps=taps, n_embd=n_embd, draft_n_embd=n_embd, cap=cap, device="cpu", dtypes=["f32"], budget=0).ladder
    assert ladder is not None and ladder.chosen is None
    sizes = list(ladder.sizes.values())
    assert sizes == sorted(set(sizes), reverse=True) and next(iter(ladder.sizes)) == Rung(RAW, FeatureDtype.F32)
    for rung, size in ladder.sizes.items():
        width = taps * n_embd if rung.rows == RAW else n_embd
        waiting = 512 * 4 * taps * n_embd if rung.rows == FUSED else 0
        ring = cap * row_bytes(rung.dtype, width) + waiting
        assert ring <= size <= ring + 64 * (cap + 512) + 2 * MIB  # bookkeeping, staging


def test_at_27b_shape() -> None:
    ladder = plan(taps=5, n_embd=5120, cap=262_144, device="cpu", budget="1.5GiB").ladder
    assert ladder is not None
    assert list(map(str, ladder.sizes)) == [
        "f32",
        "fused:f32",
        "fused:bf16",
        "fused:q8_0",
        "fused:q5_1",
        "fused:q4_0",
    ]
    assert ladder.chosen == Rung(FUSED, FeatureDtype.Q8_0)
    # Few rows: the micro-batch that may have to wait to be fused is more than they are.
    few = plan(taps=5, n_embd=5120, cap=64, device="cpu").ladder
    assert few is not None and list(map(str, few.sizes)) == ["f32", "bf16", "q8_0"]
    assert few.waiting == 512 and plan(width=5120, cap=64, rows="fused", device="cpu").ladder.waiting == 0


def test_no_rung_is_measurably_worse_than_a_later_one() -> None:
    for index, rung in enumerate(BY_PRECISION):
        cost = COSTS[rung.rows, rung.dtype]
        assert cost.low <= cost.tau <= cost.high and not cost.measurable
        assert all(cost.high >= COSTS[later.rows, later.dtype].low for later in BY_PRECISION[index + 1 :])
    assert COSTS[RAW, FeatureDtype.Q4_0].measurable and Rung(RAW, FeatureDtype.Q4_0) not in BY_PRECISION
    assert candidates(None, FeatureDtype.Q4_0) == (Rung(RAW, FeatureDtype.Q4_0), Rung(FUSED, FeatureDtype.Q4_0))


def test_auto_walks_down_as_memory_gets_tight(pair: Pair) -> None:  # noqa: F811
    """Real limits on the process. One sort of auto each, then both; what was chosen then fits, by name."""
    code = f"""
options = dict(draft_path=draft, n_ctx={N_CTX}, draft_window={N_CTX}, {FEW})
out = []
for rows, dtype, margin in (
    ("auto", "f32", "64MiB"), ("auto", "f32", "1000MiB"), ("auto", "q8_0", "1200MiB"), ("fused", "auto", "1200MiB"),
    ("auto", "auto", "64MiB"), ("auto", "auto", "1000MiB"), ("auto", "auto", "1200MiB"), ("auto", "auto", "4GiB"),
):
    b = make_budget(target, feature_rows=rows, feature_dtype=dtype, memory_margin=margin, **options)
    named = b.dtype and make_budget(target, feature_rows=b.rows, feature_dtype=b.dtype, **options).devices[0].needed
    out.append([b.rows, b.dtype, named == b.devices[0].needed, list(b.ladder.values()), b.reason, str(b.error)])
"""
    found = limited(1800 * MIB, code, pair.target("llama"), pair.draft())
    chosen = [(rows, dtype) for rows, dtype, *_ in found]
    assert chosen[0] == ("raw", "f32") and chosen[4] == ("raw", "f32")
    assert chosen[1] == ("fused", "f32") and chosen[5] == ("fused", "f32")
    assert chosen[2][1] == "q8_0"
    assert chosen[3][0] == "fused" and chosen[6][0] == "fused" and chosen[7] == ("", None)
    for (rows, dtype), (_, _, same, sizes, reason, error) in zip(chosen, found, strict=True):
        assert sizes == sorted(set(sizes), reverse=True)
        if dtype is not None:
            assert same and error == "None" and reason.startswith(str(Rung(rows, FeatureDtype(dtype))) + " leaves")
    assert "no dtype leaves 4 GiB free" in found[7][4]


def test_errors_offer_the_next_rung_and_it_fits(pair: Pair) -> None:  # noqa: F811
    """Before anything is allocated, and where the draft is made."""
    code = f"""
options = dict(draft_path=draft, n_ctx={N_CTX}, draft_window={N_CTX}, {FEW})
error = make_budget(target, feature_dtype="f32", **options).error
rows, dtype = error.next_rung
again = make_budget(target, feature_rows=rows, feature_dtype=dtype, **options).error
out = [str(error), rows, dtype, again is None]
try:
    DFlashLlama(target, feature_dtype="f32", verbose=False, n_threads=1, **options)
except MirrorMemoryError as error:
    out += [str(error), *error.next_rung]
"""
    message, rows, dtype, fits, later, its_rows, its_dtype = limited(
        900 * MIB, code, pair.target("llama"), pair.draft()
    )
    assert (rows, dtype) == ("fused", "f32") and fits
    for text, names in ((message, (rows, dtype)), (later, (its_rows, its_dtype))):
        cost = COSTS[names[0], FeatureDtype(names[1])]
        assert f"the next rung that fits is feature_rows {names[0]}, feature_dtype {names[1]}: " in text
        assert f"tau {cost} of 3.680" in text


def test_a_dflash_llama_takes_what_was_chosen(pair: Pair) -> None:  # noqa: F811
    """And says so in what is pickled of it; its text is the target's."""
    prompt = tokens_of(30)
    expected = pair.greedy("llama", prompt, 20)
    for rows, dtype, got in (("auto", "q4_0", RAW), ("AUTO", "auto", RAW), ("fused", "auto", FUSED)):
        llm = pair.dflash(feature_rows=rows, feature_dtype=dtype)
        assert (llm.feature_rows, llm.mirror.rows, llm.draft.rows) == (got, got, got)
        state = llm.__getstate__()
        assert (state["feature_rows"], state["feature_dtype"]) == (got, "q4_0" if dtype == "q4_0" else "f32")
        assert take(llm, prompt, 20) == expected
        llm.close()
    with pytest.raises(BudgetError, match="no dtype leaves") as refused:
        pair.dflash(feature_rows="auto", feature_dtype="auto", memory_margin=2**60)
    assert refused.value.next_rung is None


@pytest.mark.parametrize("rows", ["", "fuse", "raw,fused", None, 5])
def test_bad_rows(rows: Any, pair: Pair) -> None:  # noqa: F811
    with pytest.raises(ArgumentError, match="rows are raw, fused or auto, not"):
        make_budget(pair.target("llama"), draft_path=pair.draft(), feature_rows=rows, n_ctx=256)
    with pytest.raises(ArgumentError, match="rows are raw, fused or auto, not"):
        pair.dflash(feature_rows=rows)
    if rows == "":
        with pytest.raises(ArgumentError, match="not 'auto'; auto needs a target and a draft to weigh"):
            plan(width=64, cap=8, rows="auto")


def test_a_draft_without_one_projection_for_all_layers(pair: Pair, tmp_path: Path) -> None:  # noqa: F811
    """Cannot be fused: refused where that was asked for, left out of the ladder."""
    odd = edit_gguf(Path(pair.draft()), tmp_path / "odd.gguf", without=["fc.weight"])
    target = pair.target("llama")
    assert not DraftSpec.read(odd, ModelInfo.read(target)).can_fuse
    with pytest.raises(UnsupportedDraftError, match=r'no projection that all its layers share.*feature_rows="raw"'):
        make_budget(target, draft_path=odd, feature_rows="fused", n_ctx=256)


def test_the_command_line(run: Run, pair: Pair) -> None:  # noqa: F811
    shown = run("plan", "-md", pair.draft(), "--cap", 100_000, "--budget", "20MiB", "--device", "cpu")
    assert shown.code == 0 and "Ladder of auto, on a budget of 20 MiB" in shown.out and "change of tau" in shown.out
    (line,) = [line for line in shown.out.splitlines() if "chosen" in line]
    assert "fused" in line
    asked = run("plan", "-md", pair.draft(), "--cap", 100_000, "--budget", "20MiB", "--device", "cpu", "--json").json
    rungs = asked["ladder"]["rungs"]
    (chosen,) = [r for r in rungs if r["chosen"]]
    assert chosen["bytes"] <= 20 * MIB < rungs[rungs.index(chosen) - 1]["bytes"] and chosen["dtype"] in line
    assert asked["ladder"]["tau"] == 3.680 and chosen["tau_interval"][0] <= chosen["tau_change"]
    flags = ["-m", pair.target("llama"), "-md", pair.draft(), "-c", 256, "--dry-run", "--json"]
    budget = run("run", *flags, "--feature-dtype", "auto", "--feature-rows", "auto").json
    assert (budget["feature_rows"], budget["feature_dtype"]) == ("raw", "f32") and budget["ladder"][0]["chosen"]
    assert run("run", *flags, "--feature-rows", "most").code == 2
    never = run("run", *flags[:-1], "--feature-dtype", "auto", "--feature-rows", "auto", "--memory-margin", "4TiB")
    assert never.code == 3 and "no dtype leaves 4 TiB" in never.err
