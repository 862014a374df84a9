"""Fused rows: the same arithmetic as raw ones but for their rounding, in a fraction of the bytes, and only of committed tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ggml_mirror import FeatureMirror, capture
from ggml_mirror.budget import make_budget
from ggml_mirror.dflash import DFlashLlama
from ggml_mirror.errors import (
    ArgumentError,
    CaptureError,
    ClosedError,
    ShapeError,
    SnapshotError,
    SnapshotMismatchError,
    StaleRowError,
)
from ggml_mirror.fuser import Fuser
from ggml_mirror.mechanism import CaptureMechanism
from ggml_mirror.snapshot import Snapshot

from .pair import N_CTX, N_EMBD, TAPS, Pair, fused_rows, script, sometimes, take, tokens_of

DEMO_PROMPTS = ("def fibonacci(n):\n", "class Stack:\n    def __init__(self):\n", "The capital of France is")


def test_in_f32_they_equal_raw_rows(demo_target: Path, demo_draft: Path) -> None:
    """Text, accepted counts per step, and the logits of the last draft step; the window wraps in the last run."""
    seen = {}
    for rows in ("raw", "fused"):
        llm = DFlashLlama(
            str(demo_target), draft_path=str(demo_draft), feature_dtype="f32", feature_rows=rows, draft_window=40,
            n_ctx=256, n_threads=1, n_threads_batch=1, verbose=False,
        )  # fmt: skip
        runs = [(take(llm, llm.tokenize(p.encode()), 32), llm.stats.steps) for p in DEMO_PROMPTS]
        seen[rows] = runs, llm.draft.logits(), llm.mirror.nbytes
        llm.close()
    assert seen["fused"][0] == seen["raw"][0]
    np.testing.assert_allclose(seen["fused"][1], seen["raw"][1], atol=1e-4 * np.abs(seen["raw"][1]).max())
    assert seen["raw"][2] == 5 * seen["fused"][2]


@pytest.mark.parametrize("how", list(CaptureMechanism))
@pytest.mark.parametrize("n_prompt", [20, 190])
def test_rejected_rows_are_never_written(n_prompt: int, how: CaptureMechanism, pair: Pair) -> None:
    """And each that stays is written once, a prompt's that is longer than the staging ring too."""
    prompt = tokens_of(n_prompt)
    expected = pair.greedy("llama", prompt, 60)
    llm = pair.dflash(feature_rows="fused", n_batch=256, n_ubatch=256, mechanism=how)
    assert llm._fuser is not None
    assert llm._fuser.staging.cap == (256 if how is CaptureMechanism.CALLBACK else 128)
    script(llm, prompt + expected, sometimes(1, 0.4))
    assert take(llm, prompt, 40) == expected[:40]
    assert llm.stats.accepted < llm.stats.proposed / 2
    assert llm.mirror.times().write_rows == llm.n_tokens == len(llm.mirror)
    pair.assert_rows_are_fresh("llama", llm)


@pytest.mark.parametrize("dtype", ["f32", "q8_0", "q4_0"])
def test_a_fuser_beside_a_mirror_of_raw_rows(dtype: str, pair: Pair) -> None:
    """One capture, both kinds: each fused row is what numpy makes of the raw one. Micro-batches of 16, staging for one."""
    llm = pair.dflash(feature_rows="fused", draft_window=64)
    draft, taps = llm.draft, llm.draft_spec.taps
    target = pair.plain(n_batch=64, n_ubatch=16)
    with (
        FeatureMirror(taps=len(taps), n_embd=N_EMBD, cap=N_CTX) as raw,
        FeatureMirror(taps=1, n_embd=N_EMBD, cap=50, dtype=dtype, rows="fused") as fused,
        Fuser(draft, fused, staging=16) as fuser,
        capture(target, [raw, fuser], taps),
    ):
        tokens = tokens_of(90)
        target.eval(tokens)
        assert fused.positions.tolist() == list(
            range(max(80 - 50, 0), 80)
        )  # the last micro-batch waits for its outcome
        fuser.truncate(88)
        fuser.commit(88)
        assert fused.positions.tolist() == list(range(38, 88))
        got, expected = fused.read(start=38, count=50), fused_rows(llm.draft_path, raw.read(start=38, count=50))
        quantum = {"f32": 1e-3, "q8_0": 1 / 127, "q4_0": 1 / 8}[dtype]  # the draft multiplies in F16
        assert np.abs(got - expected).max() <= quantum * np.abs(expected).max()
        # The sequence goes on elsewhere: rows follow.
        target.n_tokens = 60
        target.eval(tokens_of(5, seed=3))
        fuser.commit(65)
        assert fused.positions[-1] == 64
        np.testing.assert_allclose(
            fused.read(start=60, count=5),
            fused_rows(llm.draft_path, raw.read(start=60, count=5)),
            atol=quantum * np.abs(expected).max(),
        )


@pytest.mark.parametrize("staging", [8, 11, 64, 200])
def test_a_prompt_passes_a_short_staging_ring_in_pieces(staging: int, pair: Pair) -> None:
    """By outputs. The same rows, to the bit, as through a ring that holds all of them; the last ones wait. (No piece is of one row,
    which ggml multiplies otherwise.)"""
    llm = pair.dflash(feature_rows="fused")
    target, tokens, seen = pair.plain(n_batch=256, n_ubatch=256), tokens_of(170), {}
    for slots in (staging, 256):
        target.reset()
        with (
            FeatureMirror(taps=1, n_embd=N_EMBD, cap=N_CTX, rows="fused", n_threads=1) as fused,
            Fuser(llm.draft, fused, staging=slots, n_threads=1) as fuser,
            capture(target, fuser, TAPS, mechanism="outputs"),
        ):
            target.eval(tokens[:37])
            target.eval(tokens[37:])
            waiting = 170 - len(fused)
            assert fused.positions.tolist() == list(range(170 - waiting))
            assert waiting == {8: 2, 11: 5, 64: 42, 200: 133, 256: 133}[slots]
            fuser.commit(170)
            assert fused.times().write_rows == len(fused) == 170
            seen[slots] = fused.read(start=0, count=170)
            # What was evaluated in vain leaves the mirror, though it was there.
            target.n_tokens = 100
            target.eval(tokens[100:169])
            fuser.truncate(100)
            assert fused.positions.tolist() == list(range(100))
    np.testing.assert_array_equal(seen[staging], seen[256])


def test_taps_that_come_one_after_another_need_room_for_a_micro_batch(pair: Pair) -> None:
    """By the callback. Refused with both numbers: the ring would have kept the last rows alone."""
    llm, target = pair.dflash(feature_rows="fused"), pair.plain(n_batch=64, n_ubatch=16)
    with (
        FeatureMirror(taps=1, n_embd=N_EMBD, cap=N_CTX, rows="fused") as fused,
        Fuser(llm.draft, fused, staging=12) as fuser,
        capture(target, fuser, TAPS, mechanism="callback"),
    ):
        target.eval(tokens_of(12))
        with pytest.raises(CaptureError, match=r"16 rows .*staging ring holds 12: .*staging=16"):
            target.eval(tokens_of(40))
        target.n_tokens = 12
        assert fused.positions.tolist() == list(range(12))
        target.eval(tokens_of(7))
        fuser.commit(19)
        assert fused.positions.tolist() == list(range(19))


def test_what_does_not_fit_is_refused(pair: Pair) -> None:
    llm, raw = pair.dflash(feature_rows="fused"), pair.dflash()
    with pytest.raises(ArgumentError, match="rows are raw, fused or auto"):
        pair.dflash(feature_rows="molten")
    with pytest.raises(ArgumentError, match="one tap"):
        FeatureMirror(taps=2, n_embd=N_EMBD, cap=8, rows="fused")
    with pytest.raises(ArgumentError, match="not a size"):
        pair.dflash(memory_margin="some")
    with pytest.raises(ArgumentError, match="draft_kv"):
        pair.dflash(draft_kv="f64")
    with FeatureMirror(taps=1, n_embd=N_EMBD, cap=8, rows="fused") as fused:
        with pytest.raises(ArgumentError, match="draft is of raw rows"):
            Fuser(raw.draft, fused, staging=8)
        with pytest.raises(ArgumentError, match="through a Fuser"), capture(pair.plain(), fused, [1]):
            pass
        fuser = Fuser(llm.draft, fused, staging=8)
        fuser.close()
        with pytest.raises(ClosedError):
            fuser.commit(1)
        with pytest.raises(ShapeError, match="fused rows of 1 x 64"):
            llm.draft.step(raw.mirror, n_past=1, last_token=1, n_tokens=1)
        with pytest.raises(StaleRowError, match="position 0"):
            llm.draft.fuse(raw.mirror, fused, start=0, count=1)
    with FeatureMirror(taps=1, n_embd=32, cap=8, rows="fused") as narrow, pytest.raises(ShapeError, match="1 x 64"):
        Fuser(llm.draft, narrow, staging=8)


def test_states_and_snapshots_know_what_their_rows_are(pair: Pair, tmp_path: Path) -> None:
    fused = pair.dflash(feature_rows="fused")
    take(fused, tokens_of(20), 10)
    state = fused.save_state()
    raw = pair.dflash()
    take(raw, tokens_of(20), 10)
    before = raw.mirror.snapshot()
    with pytest.raises(SnapshotMismatchError, match=r"rows fused \(mirror: raw\)"):
        raw.load_state(state)
    np.testing.assert_array_equal(raw.mirror.snapshot().rows, before.rows)
    path = tmp_path / "rows.safetensors"
    fused.mirror.snapshot().save(path)
    assert Snapshot.load(path).header.rows == "fused"
    broken = Snapshot(
        **{**vars(Snapshot.load(path)), "header": type(before.header)(**{**vars(before.header), "rows": "fused"})}
    )
    with pytest.raises(SnapshotError):
        fused.mirror.restore(broken)


@pytest.mark.parametrize("kv", ["q8_0", "off"])
def test_keys_and_values_otherwise(kv: str, demo_target: Path, demo_draft: Path) -> None:
    """Off is the same arithmetic. q8_0 rounds: the text stays, and nearly all of the acceptance."""
    options = {"n_ctx": 256, "n_threads": 1, "n_threads_batch": 1, "verbose": False, "feature_rows": "fused"}
    seen = {}
    for name in ("f16", kv):
        llm = DFlashLlama(str(demo_target), draft_path=str(demo_draft), feature_dtype="f32", draft_kv=name, **options)
        runs = [(take(llm, llm.tokenize(p.encode()), 32), llm.stats.steps) for p in DEMO_PROMPTS]
        seen[name] = runs, llm.draft.times().rows_projected, llm.draft.bytes.kv
        llm.close()
    (runs, projected, size), (others, theirs, their_size) = seen["f16"], seen[kv]
    if kv == "off":
        assert others == runs and theirs > 2 * projected
    else:
        assert [text for text, _ in others] == [text for text, _ in runs]
        assert sum(sum(steps) for _, steps in others) > 0.9 * sum(sum(steps) for _, steps in runs)
        assert their_size < 0.6 * size


@pytest.mark.parametrize(
    ("how", "n_ubatch", "slots"),
    [("callback", 32, 32), ("outputs", 32, 32), ("callback", 256, 256), ("outputs", 256, 128), ("outputs", 9, 16)],
)
def test_the_budget_is_what_is_allocated(how: str, n_ubatch: int, slots: int, pair: Pair) -> None:
    """The rows that wait included: of the mechanism that will be used."""
    options = {"feature_dtype": "q4_0", "feature_rows": "fused", "mechanism": how, "n_ubatch": n_ubatch}
    budget = make_budget(pair.target("llama"), draft_path=pair.draft(), n_ctx=N_CTX, **options)
    llm = pair.dflash(**options)
    parts = {part.id: part for part in budget.parts}
    assert parts["mirror"].bytes == llm.mirror.nbytes
    assert parts["draft_kv"].bytes == llm.draft.bytes.kv
    assert llm._fuser is not None
    waiting = llm._fuser.staging
    assert waiting.nbytes == slots * 4 * len(llm.draft_spec.taps) * N_EMBD
    assert parts["raw_rows"].bytes == waiting.size.ring + waiting.size.bookkeeping and not parts["raw_rows"].at_most
    assert f"{slots} that wait" in parts["raw_rows"].detail
    assert pair.dflash(feature_dtype="auto", feature_rows="fused").feature_dtype.value == "f32"
