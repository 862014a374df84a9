"""A draft step against llama.cpp's own graph and a numpy one; and what keys and values are remembered, and when not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_edit import edit_gguf
from llama_cpp import Llama
from llama_dflash import Floats, LlamaDFlash, NumpyDFlash, least_cosine, relative_difference
from tiny_models import DRAFT_FORMATS, MASK, N_VOCAB, write_tiny_draft, write_tiny_model

from ggml_mirror import FeatureMirror, capture
from ggml_mirror.capture import Hook
from ggml_mirror.device import find_device
from ggml_mirror.draft import Draft, DraftSpec, draft_bytes
from ggml_mirror.errors import ArgumentError, ClosedError, ShapeError
from ggml_mirror.gguf_file import GgufFile
from ggml_mirror.model_info import ModelInfo

TOLERANCE = 1e-3  # of the largest logit
# Flash attention on CPU sums values in F16: llama.cpp's own graph is 1e-3 to 4e-3 away from exact arithmetic. One row of the window
# missing makes ten times that.
EXACT_TOLERANCE = 6e-3
BLOCK, TAPS, N_EMBD = 8, 5, 64
LAST = ord("k")
DEMO_DRAFT = Path(__file__).parent.parent / "models/smollm2-135m-instruct-dflash-q8_0.gguf"


class Bench:
    """A target whose drafts are stepped over rows that the test chooses."""

    def __init__(self, path: Path, n_ctx: int = 64) -> None:
        self.path, self.info = path, ModelInfo.read(path)
        self.llm = Llama(str(path), n_ctx=n_ctx, n_threads=1, n_threads_batch=1, flash_attn=True, verbose=False)
        self.hook: Hook = Hook.of(self.llm)
        self.open = ExitStack()

    def draft(self, path: Path, window: int = 400, rows: str = "raw", kv: str = "f16", n_ctx: int = 0) -> Draft:
        draft = Draft(
            DraftSpec.read(path, self.info),
            n_vocab=self.llm.n_vocab(),
            tok_embd=self.hook.tok_embd,
            output=self.hook.output,
            device_index=self.hook.output_device().index,
            window=window,
            n_threads=1,
            rows=rows,
            kv=kv,
            n_ctx=n_ctx,
        )
        self.open.callback(draft.close)
        return draft

    def oracle(self, path: Path, *, causal: bool = False) -> LlamaDFlash:
        oracle = LlamaDFlash(path, self.llm, causal=causal)
        self.open.callback(oracle.close)
        return oracle

    def mirror(self, cap: int = 512, dtype: str = "f32") -> FeatureMirror:
        return self.open.enter_context(FeatureMirror(taps=TAPS, n_embd=N_EMBD, cap=cap, dtype=dtype, n_threads=1))

    def assert_as_llama_cpp(
        self, got: Floats, path: Path, start: int, rows: Floats, n_past: int, *, causal: bool = False
    ) -> None:
        """Against llama.cpp's own graph over these rows alone, which fill an empty cache. On CPU: to the bit."""
        oracle = LlamaDFlash(path, self.llm, causal=causal)
        try:
            if len(rows):
                oracle.inject(start, rows)
            wanted = oracle.logits(n_past, noise(len(got)))
        finally:
            oracle.close()
        if self.hook.output_device().is_host:
            np.testing.assert_array_equal(got, wanted)
        assert_agree(got, wanted)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    bench = Bench(write_tiny_model(tmp_path_factory.mktemp("target") / "target.gguf"))
    yield bench
    bench.llm.close()


@pytest.fixture
def bench(tiny: Bench) -> Iterator[Bench]:
    with ExitStack() as tiny.open:
        yield tiny


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_draft(tmp_path_factory.mktemp("draft") / "plain.gguf")


def rows_of(n: int, seed: int = 0, width: int = TAPS * N_EMBD) -> Floats:
    return np.random.default_rng(seed).normal(0, 3, (n, width)).astype(np.float32)


def noise(n: int = BLOCK, mask: int = MASK) -> list[int]:
    return [LAST, *[mask] * (n - 1)]


def step(draft: Draft, mirror: FeatureMirror, n_past: int, n_tokens: int = BLOCK - 1) -> tuple[Floats, int]:
    """Logits and context of a step whose tokens are the logits' largest."""
    tokens, context = draft.step(mirror, n_past=n_past, last_token=LAST, n_tokens=n_tokens)
    logits = draft.logits()
    assert logits.shape == (n_tokens + 1, N_VOCAB)
    assert tokens == logits[1:].argmax(-1).tolist()
    return logits, context


def assert_agree(got: Floats, wanted: Floats, tolerance: float = TOLERANCE) -> None:
    assert relative_difference(got, wanted) < tolerance
    assert least_cosine(got, wanted) > 1 - tolerance**2


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "f32": {"matrix_type": "f32"},
    "q8_0": {"matrix_type": "q8_0"},
    "wide heads": {"head_dim": 32, "n_head": 4, "n_head_kv": 1, "n_layer": 3},
    "window": {"sliding_window": 24, "sliding_window_pattern": [True, False, True, False], "n_layer": 4},
    "window of a block": {"sliding_window": 6, "sliding_window_pattern": [True, True]},
    "causal": {"causal": True},
    "causal window": {"causal": True, "sliding_window": 40, "sliding_window_pattern": [True, False]},
}


@pytest.mark.parametrize("n_past", [0, 1, 30, 247, 256, 300])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_llama_cpps_own_graph(kind: str, n_past: int, bench: Bench, tmp_path: Path) -> None:
    path = write_tiny_draft(tmp_path / "draft.gguf", **KINDS[kind])
    draft, oracle = bench.draft(path), bench.oracle(path, causal="causal" in kind)
    mirror, rows = bench.mirror(), rows_of(n_past)
    mirror.write_rows(start=0, rows=rows)
    if n_past:
        oracle.inject(0, rows)
    got, context = step(draft, mirror, n_past)
    assert context == n_past
    assert_agree(got, oracle.logits(n_past, noise()))


def test_tensors_that_are_read_in_several_pieces(bench: Bench, tmp_path: Path) -> None:
    path = write_tiny_draft(
        tmp_path / "draft.gguf", n_ff=70_001, n_layer=1, matrix_type="f32"
    )  # 17 MiB each, no whole pieces
    mirror, rows = bench.mirror(), rows_of(30)
    mirror.write_rows(start=0, rows=rows)
    got, _ = step(bench.draft(path), mirror, 30)
    bench.assert_as_llama_cpp(got, path, 0, rows, 30)


@pytest.mark.parametrize("fmt", DRAFT_FORMATS)
@pytest.mark.parametrize("n_past", [0, 5, 270])
def test_logits_are_those_of_numpy(fmt: str, n_past: int, bench: Bench, tmp_path: Path) -> None:
    kind: dict[str, Any] = {"sliding_window": 24, "n_layer": 3, "sliding_window_pattern": [True, False, True]}
    path = write_tiny_draft(tmp_path / "draft.gguf", fmt, matrix_type="f32", **kind)
    mirror, rows = bench.mirror(), rows_of(n_past)
    mirror.write_rows(start=0, rows=rows)
    got, _ = step(bench.draft(path), mirror, n_past)
    wanted = NumpyDFlash(path, bench.path).logits(0, rows, n_past, noise())
    assert_agree(got, wanted, EXACT_TOLERANCE)


def test_the_comparison_sees_one_row_that_is_missing_or_elsewhere(bench: Bench, plain: Path) -> None:
    rows = rows_of(30)
    mirror = bench.mirror()
    mirror.write_rows(start=0, rows=rows)
    got, _ = step(bench.draft(plain), mirror, 30)
    last_is_another = np.concatenate([rows[:29], rows[:1]])
    for start, given in ((1, rows[1:]), (0, last_is_another), (0, np.roll(rows, 1, axis=0))):
        oracle = bench.oracle(plain)
        oracle.inject(start, given)
        assert relative_difference(got, oracle.logits(30, noise())) > 2 * EXACT_TOLERANCE


FEATURES: dict[str, dict[str, Any]] = {
    "scales": {
        "keys": {
            "dflash.embedding_scale": 2.5,
            "dflash.attention.scale": 0.2,
            "dflash.attention.value_scale": 0.7,
        }
    },
    "gelu": {"keys": {"dflash.hidden_activation": "gelu"}},
    "stretched rope": {"keys": {"dflash.rope.scaling.type": "linear", "dflash.rope.scaling.factor": 4.0}},
    "stretched rope by default": {"keys": {"dflash.rope.scaling.factor": 4.0}},
    "unused rope factor": {"keys": {"dflash.rope.scaling.type": "none", "dflash.rope.scaling.factor": 4.0}},
    "half rope": {"keys": {"dflash.rope.dimension_count": 8}},
    "rope sections": {"keys": {"dflash.rope.dimension_sections": [8, 0, 0, 0]}},
    "values are keys": {"without": ["blk.0.attn_v.weight", "blk.1.attn_v.weight"]},
    "post norms": {
        "tensors": {
            f"blk.{il}.{name}.weight": np.linspace(0.5, 1.5, N_EMBD, dtype=np.float32)
            for il in range(2)
            for name in ("post_attention_norm", "post_ffw_norm")
        }
    },
    "sinks": {"tensors": {f"blk.{il}.attn_sinks.weight": np.array([0.5, -1, 2, 0], np.float32) for il in range(2)}},
    "layer scales": {
        "tensors": {f"blk.{il}.layer_output_scale.weight": np.array([0.6], np.float32) for il in range(2)}
    },
    "rope factors": {"tensors": {"rope_freqs.weight": np.linspace(1, 8, 8, dtype=np.float32)}},
    "own matrices": {
        "tensors": {"token_embd.weight": rows_of(N_VOCAB, 1, N_EMBD), "output.weight": rows_of(N_VOCAB, 2, N_EMBD)}
    },
    "own embedding": {"tensors": {"token_embd.weight": rows_of(N_VOCAB, 1, N_EMBD)}},
}


@pytest.mark.parametrize("feature", FEATURES)
def test_optional_parts_of_a_draft_are_as_in_llama_cpp(feature: str, bench: Bench, plain: Path, tmp_path: Path) -> None:
    path = edit_gguf(plain, tmp_path / "draft.gguf", **FEATURES[feature])
    mirror, rows, oracle = bench.mirror(), rows_of(40), bench.oracle(path)
    mirror.write_rows(start=0, rows=rows)
    oracle.inject(0, rows)
    got, _ = step(bench.draft(path), mirror, 40)
    if feature == "rope sections":  # llama.cpp wants four positions per token there; text has the same in all of them
        assert_agree(got, step(bench.draft(plain), mirror, 40)[0])
        return
    assert_agree(got, oracle.logits(40, noise()))
    plainly, _ = step(bench.draft(plain), mirror, 40)
    assert (relative_difference(plainly, got) < TOLERANCE) == (feature == "unused rope factor")


def test_a_reduced_vocabulary_is_mapped_to_the_targets(bench: Bench, plain: Path, tmp_path: Path) -> None:
    chosen = np.array([70, 10, 100, 101, 33, 44], np.int64)
    path = edit_gguf(
        plain, tmp_path / "draft.gguf", tensors={"output.weight": rows_of(len(chosen), 2, N_EMBD), "d2t": chosen}
    )
    mirror, rows, oracle = bench.mirror(), rows_of(40), bench.oracle(path)
    mirror.write_rows(start=0, rows=rows)
    oracle.inject(0, rows)
    got, _ = step(bench.draft(path), mirror, 40)
    wanted = oracle.logits(40, noise())
    assert np.isneginf(np.delete(got, chosen, axis=1)).all()
    assert_agree(got[:, chosen], wanted[:, chosen])


@pytest.mark.parametrize("n_tokens", range(1, BLOCK))
def test_shorter_blocks(n_tokens: int, bench: Bench, plain: Path) -> None:
    mirror, rows, oracle = bench.mirror(), rows_of(50), bench.oracle(plain)
    mirror.write_rows(start=0, rows=rows)
    oracle.inject(0, rows)
    got, _ = step(bench.draft(plain), mirror, 50, n_tokens)
    assert_agree(got, oracle.logits(50, noise(n_tokens + 1)))


@pytest.mark.parametrize("kind", ["plain", "window"])
def test_a_wrapped_window_is_the_windows_rows_alone(kind: str, bench: Bench, tmp_path: Path) -> None:
    path = write_tiny_draft(
        tmp_path / "draft.gguf", **{**KINDS[kind], **({"sliding_window": 12} if kind == "window" else {})}
    )
    window, rows = 24, rows_of(900)
    draft, mirror = bench.draft(path, window), bench.mirror(cap=window + BLOCK)
    # 7 positions a step: the ring (32 rows) wraps at every phase of a block; keys (512 slots) are moved at 511 and 763.
    compare = {245, 252, 259, 266, 504, 511, 518, 525, 756, 763, 770, 777}
    for n_past in range(7, 800, 7):
        mirror.write_rows(start=n_past - 7, rows=rows[n_past - 7 : n_past])
        got, context = step(draft, mirror, n_past)
        assert context == min(n_past, window)
        if n_past in compare:
            start = n_past - context
            bench.assert_as_llama_cpp(got, path, start, rows[start:n_past], n_past)
            less = bench.oracle(path)
            less.inject(start + 1, rows[start + 1 : n_past])
            assert relative_difference(got, less.logits(n_past, noise())) > 2 * EXACT_TOLERANCE
    assert draft.times().rows_projected == 798  # each row once
    assert draft.times().rows_moved == 504 - 256 + 756 - 512  # each time, from the multiple of 256 before the window on


class Sequence:
    """Rows that come, are cut off and come again as others; and which of them a mirror of ``cap`` still holds."""

    def __init__(self, mirror: FeatureMirror, seed: int) -> None:
        self.mirror, self.rng = mirror, np.random.default_rng(seed)
        self.rows, self.oldest = rows_of(0), 0

    def grow(self, n: int) -> None:
        more = self.rng.normal(0, 3, (n, TAPS * N_EMBD)).astype(np.float32)
        self.mirror.write_rows(start=len(self.rows), rows=more)
        self.rows = np.concatenate([self.rows, more])
        self.oldest = max(self.oldest, len(self.rows) - self.mirror.cap)

    def cut(self, n: int) -> None:
        n = min(n, len(self.rows))
        self.mirror.truncate(len(self.rows) - n)
        self.rows = self.rows[: len(self.rows) - n]
        self.oldest = min(self.oldest, len(self.rows))

    def context(self, window: int) -> int:
        return min(len(self.rows) - self.oldest, window)


@pytest.mark.parametrize("window", [24, 300])
@pytest.mark.parametrize("slack", [BLOCK, 500])  # of the mirror: with little, a cut leaves less than a window
@pytest.mark.parametrize("kind", ["plain", "window", "causal window"])
def test_long_sequences_that_are_cut_and_grow_again(
    kind: str, slack: int, window: int, bench: Bench, tmp_path: Path
) -> None:
    path = write_tiny_draft(tmp_path / "draft.gguf", **KINDS[kind])
    draft, sequence = bench.draft(path, window), Sequence(bench.mirror(cap=window + slack), seed=window + slack)
    cuts = 0
    while len(sequence.rows) < 5 * window + 1200:
        for _ in range(int(sequence.rng.integers(1, 40))):
            # Two at least: ggml multiplies a single row by other means, which round otherwise.
            sequence.grow(int(sequence.rng.integers(2, 12)))
            got, context = step(draft, sequence.mirror, len(sequence.rows), int(sequence.rng.integers(1, BLOCK)))
            assert context == sequence.context(window)
        start, n_past = len(sequence.rows) - context, len(sequence.rows)
        bench.assert_as_llama_cpp(got, path, start, sequence.rows[start:], n_past, causal="causal" in kind)
        if sequence.rng.random() < 0.6:
            sequence.cut(int(sequence.rng.integers(1, 200)))
            cuts += 1
    times = draft.times()
    assert cuts > 3
    assert 0 < times.rows_moved < 9 * times.rows_projected


def test_the_demo_pair_on_features_of_its_target(demo_target: Path) -> None:
    text = b"def largest(numbers):\n    best = None\n    for n in numbers:\n        if best is None or n > best:\n"
    bench = Bench(demo_target, n_ctx=512)
    with bench.open:
        spec = DraftSpec.read(DEMO_DRAFT, bench.info)
        with FeatureMirror(taps=5, n_embd=576, cap=512, dtype="f32", n_threads=1) as mirror:
            tokens = bench.llm.tokenize(text * 12)[:300]
            assert len(tokens) == 300
            with capture(bench.llm, mirror, spec.taps):
                bench.llm.eval(tokens)
            rows = mirror.read(start=0, count=300)
            for n_past in (40, 299):
                draft, oracle = bench.draft(DEMO_DRAFT), bench.oracle(DEMO_DRAFT)
                mirror.truncate(n_past)
                mirror.write_rows(start=0, rows=rows[:n_past])
                drafted, context = draft.step(mirror, n_past=n_past, last_token=tokens[n_past], n_tokens=7)
                assert context == n_past
                oracle.inject(0, rows[:n_past])
                wanted = oracle.logits(n_past, [tokens[n_past], *[spec.mask_token] * 7])
                assert_agree(draft.logits(), wanted)
                assert drafted == wanted[1:].argmax(-1).tolist()
                draft.close()
    bench.llm.close()


# --------------------------------------------------------------------------------------- what is remembered


@pytest.mark.parametrize("dtype", ["f32", "q8_0"])
@pytest.mark.parametrize("change", ["rewrite", "truncate", "clear", "restore", "another mirror"])
def test_after_any_change_of_rows_a_step_is_that_of_a_new_draft(
    change: str, dtype: str, bench: Bench, plain: Path
) -> None:
    draft, mirror, rows, other = bench.draft(plain), bench.mirror(dtype=dtype), rows_of(120), rows_of(120, seed=1)
    mirror.write_rows(start=0, rows=rows)
    saved = mirror.snapshot()
    before, _ = step(draft, mirror, 120)
    projected = 120
    if change == "rewrite":
        mirror.write_rows(start=37, rows=other[37:50])
        projected += 13
    elif change == "truncate":
        mirror.truncate(100)
        mirror.write_rows(start=100, rows=other[100:])
        projected += 20
    elif change == "clear":
        mirror.clear()
        mirror.write_rows(start=0, rows=other)
        projected += 120
    elif change == "restore":
        mirror.write_rows(start=0, rows=other)
        step(draft, mirror, 120)
        mirror.restore(saved)
        projected += 240
    else:
        mirror = bench.mirror(dtype=dtype)
        mirror.write_rows(start=0, rows=other)
        projected += 120
    got, context = step(draft, mirror, 120)
    assert context == 120
    assert draft.times().rows_projected == projected
    np.testing.assert_array_equal(got, step(bench.draft(plain), mirror, 120)[0])
    assert np.array_equal(got, before) == (change == "restore")


def test_the_blocks_noise_is_no_later_steps_context(bench: Bench, plain: Path) -> None:
    draft, mirror, rows = bench.draft(plain), bench.mirror(), rows_of(80)
    mirror.write_rows(start=0, rows=rows[:60])
    step(draft, mirror, 60)
    mirror.write_rows(start=60, rows=rows[60:65])
    got, context = step(draft, mirror, 65)
    assert context == 65
    np.testing.assert_array_equal(got, step(bench.draft(plain), mirror, 65)[0])
    # Back again, as after a reject: positions that the last block covered are rows once more.
    mirror.truncate(61)
    got, context = step(draft, mirror, 61)
    assert context == 61
    np.testing.assert_array_equal(got, step(bench.draft(plain), mirror, 61)[0])


def test_unchanged_rows_are_projected_once(bench: Bench, plain: Path) -> None:
    draft, mirror = bench.draft(plain), bench.mirror()
    mirror.write_rows(start=0, rows=rows_of(300))
    first, _ = step(draft, mirror, 300)
    again, _ = step(draft, mirror, 300)
    np.testing.assert_array_equal(first, again)
    assert draft.times().rows_projected == 300
    draft.reset_times()
    assert draft.times().steps == draft.times().rows_projected == 0


@pytest.mark.parametrize("kind", ["plain", "window", "causal window"])
def test_a_steps_work_does_not_grow_with_its_context(kind: str, bench: Bench, tmp_path: Path) -> None:
    """But for attention: rows made and looked at, and cells of the mask that are written."""
    path = write_tiny_draft(tmp_path / "draft.gguf", **KINDS[kind])
    window, new = 900, 4
    draft, mirror, rows = bench.draft(path, window), bench.mirror(cap=window + BLOCK), rows_of(1800)
    n_past = 0
    for context in (100, 700, 1700):  # at the last, the window slides
        mirror.write_rows(start=n_past, rows=rows[n_past:context])
        n_past = context
        step(draft, mirror, n_past)
        draft.reset_times()
        for _ in range(5):
            mirror.write_rows(start=n_past, rows=rows[n_past : n_past + new])
            n_past += new
            got, attended = step(draft, mirror, n_past)
        assert attended == min(n_past, window)
        start = n_past - attended
        bench.assert_as_llama_cpp(got, path, start, rows[start:n_past], n_past, causal="causal" in kind)
        times, masks = draft.times(), 1 if kind == "plain" else 2
        assert times.rows_projected == 5 * new
        assert times.rows_checked <= 5 * (new + 2 * 16)  # and the neighbours of either end
        assert times.mask_cells <= 5 * masks * 2 * (new + BLOCK) * BLOCK


@pytest.mark.parametrize("window", [100, 700])
def test_a_context_that_ends_needs_room_for_no_more(window: int, bench: Bench, plain: Path) -> None:
    """To its last position it drafts as one without an end does, in fewer bytes where the window reaches back to the beginning."""
    endless, draft, mirror = bench.draft(plain, window), bench.draft(plain, window, n_ctx=700), bench.mirror(cap=720)
    assert draft.bytes.kv <= endless.bytes.kv * (1 if window == 100 else 0.75)
    rows = rows_of(692)
    for n_past in (3, 250, 500, 692):
        mirror.write_rows(start=len(mirror), rows=rows[len(mirror) : n_past])
        np.testing.assert_array_equal(step(draft, mirror, n_past)[0], step(endless, mirror, n_past)[0])
    with pytest.raises(ArgumentError, match="a block of 8 at position 693 ends beyond the context of 700"):
        draft.step(mirror, n_past=693, last_token=LAST, n_tokens=7)
    said = draft_bytes(draft.spec, n_vocab=N_VOCAB, device_index=draft.device.index, window=window, n_ctx=700)
    assert said == draft.bytes


def test_keys_that_are_not_kept_are_made_at_each_step(bench: Bench, plain: Path) -> None:
    kept, off, mirror = bench.draft(plain), bench.draft(plain, kv="off"), bench.mirror()
    mirror.write_rows(start=0, rows=rows_of(300))
    for n_past in (290, 296, 300):
        np.testing.assert_array_equal(step(off, mirror, n_past)[0], step(kept, mirror, n_past)[0])
    assert (kept.times().rows_projected, off.times().rows_projected) == (300, 290 + 296 + 300)


def test_rows_that_are_missing_before_the_block_end_the_context(bench: Bench, plain: Path) -> None:
    draft, rows = bench.draft(plain), rows_of(60)
    mirror = bench.mirror()
    mirror.write_rows(start=0, rows=rows[:30])
    mirror.write(tap=0, start=30, rows=rows[30:31, :N_EMBD])  # a partial row
    mirror.write_rows(start=31, rows=rows[31:60])
    got, context = step(draft, mirror, 60)
    assert context == 29
    oracle = bench.oracle(plain)
    oracle.inject(31, rows[31:60])
    assert_agree(got, oracle.logits(60, noise()))
    # Row 60 itself is not there, nor any right before 70: the block alone.
    for n_past in (61, 70, 31):
        got, context = step(draft, mirror, n_past)
        assert context == 0
        assert_agree(got, bench.oracle(plain).logits(n_past, noise()))
    assert step(draft, mirror, 30)[1] == 30


@pytest.mark.parametrize("dtype", ["bf16", "f16", "q8_0", "q4_0"])
def test_rows_of_other_dtypes_enter_as_they_are_read(dtype: str, bench: Bench, plain: Path) -> None:
    stored, exact = bench.mirror(dtype=dtype), bench.mirror()
    stored.write_rows(start=0, rows=rows_of(300))
    exact.write_rows(start=0, rows=stored.read(start=0, count=300))
    got, _ = step(bench.draft(plain), stored, 300)
    wanted, _ = step(bench.draft(plain), exact, 300)
    np.testing.assert_array_equal(got, wanted)


def test_rows_used_in_place_and_rows_that_were_read_are_the_same(bench: Bench, plain: Path) -> None:
    rows = rows_of(250)
    unwrapped, wrapped = bench.mirror(cap=512), bench.mirror(cap=260)
    drafts = []
    for mirror in (unwrapped, wrapped):
        mirror.write_rows(start=150, rows=rows)  # over slot 260 of one of them
        drafts.append(bench.draft(plain))
    logits = [step(draft, mirror, 400)[0] for draft, mirror in zip(drafts, (unwrapped, wrapped), strict=True)]
    np.testing.assert_array_equal(*logits)
    assert drafts[0].times().read_ns == 0 < drafts[1].times().read_ns
    assert drafts[0].times().rows_projected == drafts[1].times().rows_projected == 250


def test_a_draft_takes_what_was_announced_and_no_more_while_it_works(bench: Bench, plain: Path) -> None:
    spec, window = DraftSpec.read(plain, bench.info), 600
    said = draft_bytes(spec, n_vocab=N_VOCAB, device_index=bench.hook.output_device().index, window=window)
    assert said.kv == 2 * 2 * 1024 * 32 * 2  # layers, keys and values, slots, n_head_kv * head_dim, F16
    weights = sum(t.n_bytes or 0 for t in GgufFile.read(plain).tensors.values())
    assert 0 <= said.weights - weights < 64 * 64  # alignment of each tensor
    assert said.compute > 128 * TAPS * N_EMBD * 4  # rows to be projected
    draft, mirror, rows = bench.draft(plain, window=window), bench.mirror(cap=700), rows_of(1200)
    assert draft.bytes == said
    rng = np.random.default_rng(3)
    for _ in range(4):
        mirror.clear()
        n_past = 0
        while n_past < 1150:
            more = int(rng.integers(1, 40))
            mirror.write_rows(start=n_past, rows=rows[n_past : n_past + more])
            n_past += more
            step(draft, mirror, n_past, int(rng.integers(1, BLOCK)))
    assert draft.bytes == said


def test_logits_stay_while_rows_are_fused(bench: Bench, plain: Path) -> None:
    """Graphs share their scratch; what a step has given does not lie in it."""
    draft, raw = bench.draft(plain, rows="fused"), bench.mirror()
    fused = bench.open.enter_context(FeatureMirror(taps=1, n_embd=N_EMBD, cap=512, rows="fused", n_threads=1))
    raw.write_rows(start=0, rows=rows_of(300))
    draft.fuse(raw, fused, start=0, count=40)
    logits, context = step(draft, fused, 40)
    assert context == 40
    draft.fuse(raw, fused, start=40, count=260)
    np.testing.assert_array_equal(draft.logits(), logits)


@pytest.mark.parametrize("cap", [300, 130, 97])
def test_rows_fused_where_they_lie_and_rows_that_are_read_are_the_same(cap: int, bench: Bench, plain: Path) -> None:
    """Around the ring's end, in pieces and whole; those that are not F32 are read, a few at a time. None takes more memory."""
    draft = bench.draft(plain, rows="fused")
    said, rows = draft.bytes, rows_of(300).astype(np.float16).astype(np.float32)
    fused = {}
    for name, size, dtype in (("whole", 512, "f32"), ("wrapped", cap, "f32"), ("read", 512, "f16")):
        raw, out = bench.mirror(cap=size, dtype=dtype), FeatureMirror(taps=1, n_embd=N_EMBD, cap=512, rows="fused")
        bench.open.enter_context(out)
        for start in range(170, 470, min(size, 100)):
            n = min(470 - start, size, 100)
            raw.write_rows(start=start, rows=rows[start - 170 : start - 170 + n])
            before = draft.times().read_ns
            draft.fuse(raw, out, start=start, count=n)
            assert (draft.times().read_ns > before) == (dtype == "f16")
        fused[name] = out.read(start=170, count=300)
    np.testing.assert_array_equal(fused["wrapped"], fused["whole"])
    np.testing.assert_array_equal(fused["read"], fused["whole"])
    assert draft.bytes == said


def test_rows_to_be_fused_take_no_scratch(tmp_path: Path) -> None:
    """A draft of 32 taps, whose raw rows would outweigh all else."""
    taps = 32
    target = ModelInfo.read(write_tiny_model(tmp_path / "target.gguf", n_layer=taps + 1))
    path = write_tiny_draft(tmp_path / "draft.gguf", taps=range(taps))
    spec, cpu = DraftSpec.read(path, target), find_device("cpu").index
    said = {r: draft_bytes(spec, n_vocab=N_VOCAB, device_index=cpu, window=400, rows=r) for r in ("raw", "fused")}
    assert said["raw"].compute > 128 * taps * N_EMBD * 4 > said["fused"].compute > 0


# ------------------------------------------------------------------------------------------------ bad input


def test_impossible_steps_are_refused_and_change_nothing(bench: Bench, plain: Path) -> None:
    draft, mirror = bench.draft(plain), bench.mirror()
    with pytest.raises(ArgumentError, match="no draft step"):
        draft.logits()
    mirror.write_rows(start=0, rows=rows_of(20))
    wanted, _ = step(draft, mirror, 20)
    bad: list[dict[str, int]] = [
        {"n_tokens": 0},
        {"n_tokens": BLOCK},
        {"n_tokens": -1},
        {"last_token": -1},
        {"last_token": N_VOCAB},
        {"n_past": -1},
        {"n_past": 2**31},
        {"n_past": 2**62},
    ]
    for change in bad:
        with pytest.raises(ArgumentError):
            draft.step(mirror, **{"n_past": 20, "last_token": LAST, "n_tokens": 7, **change})
    for taps, n_embd in ((4, N_EMBD), (TAPS, 32), (10, 32)):
        with (
            FeatureMirror(taps=taps, n_embd=n_embd, cap=32) as other,
            pytest.raises(ShapeError, match=f"{taps} x {n_embd}"),
        ):
            draft.step(other, n_past=0, last_token=LAST, n_tokens=7)
    np.testing.assert_array_equal(step(draft, mirror, 20)[0], wanted)


def test_closed_drafts_and_mirrors(bench: Bench, plain: Path) -> None:
    draft, mirror = bench.draft(plain), bench.mirror()
    mirror.close()
    with pytest.raises(ClosedError):
        step(draft, mirror, 0)
    draft.close()
    draft.close()
    for use in (draft.logits, draft.times, draft.reset_times, lambda: draft.bytes):
        with pytest.raises(ClosedError):
            use()
