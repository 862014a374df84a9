"""Both ways in which taps leave the target's graph give the same rows and the same text; which one is taken, and when it cannot be."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from llama_cpp import Llama
from tiny_models import TARGET_ARCHS

from ggml_mirror import FeatureMirror, capture, mechanism
from ggml_mirror.capture import capture_mechanism
from ggml_mirror.errors import ArgumentError, CaptureError
from ggml_mirror.mechanism import MECHANISM_VARIABLE, CaptureMechanism, micro_batches

from .pair import N_CTX, N_EMBD, TAPS, Pair, script, sometimes, take, tokens_of

BOTH = list(CaptureMechanism)


@pytest.fixture
def plain(pair: Pair) -> Callable[..., Llama]:
    """``plain(arch, **options)``: a target that was never captured."""

    def plain(arch: str = "llama", **options: Any) -> Llama:
        defaults = {"n_ctx": N_CTX, "n_batch": N_CTX, "n_ubatch": N_CTX, "n_threads": 1, "n_threads_batch": 1}
        return Llama(pair.target(arch), **{**defaults, **options}, verbose=False)

    return plain


def mirror(dtype: str = "f32", cap: int = N_CTX, taps: int = len(TAPS)) -> FeatureMirror:
    return FeatureMirror(taps=taps, n_embd=N_EMBD, cap=cap, dtype=dtype, n_threads=1)


def graphs_reused(llm: Llama) -> int:
    return int(llama_cpp.llama_perf_context(llm.ctx).n_reused)


# ------------------------------------------------------------------------------------------------------------ the same rows


@pytest.mark.parametrize(("n_batch", "n_ubatch"), [(256, 256), (256, 16), (48, 13), (1, 1)])
@pytest.mark.parametrize("arch", TARGET_ARCHS)
def test_rows_and_text_are_the_same_bit_for_bit(
    arch: str, n_batch: int, n_ubatch: int, plain: Callable[..., Llama]
) -> None:
    """Prefill in micro-batches, a rewind, generated tokens; into rings that hold all, and that wrap. llama.cpp reuses as many graphs."""
    seen, tokens = {}, tokens_of(70)
    for how in BOTH:
        llm = plain(arch, n_batch=n_batch, n_ubatch=n_ubatch)
        with ExitStack() as stack:
            mirrors = [stack.enter_context(mirror(*m)) for m in (("f32",), ("q8_0",), ("f32", 24), ("q8_0", 5))]
            assert stack.enter_context(capture(llm, mirrors, TAPS, mechanism=how)) is how is capture_mechanism(llm)
            text = take(llm, tokens, 12) + take(llm, tokens[:50], 12)
            shots = [m.snapshot() for m in mirrors]
            seen[how] = [text, graphs_reused(llm), *((s.positions.tolist(), s.rows.tobytes()) for s in shots)]
        llm.close()
    assert seen["outputs"] == seen["callback"]
    assert seen["outputs"][1] > 0, "llama.cpp reuses graphs from token to token"


@pytest.mark.parametrize("arch", TARGET_ARCHS)
def test_logits_are_those_of_a_model_that_was_never_captured(arch: str, plain: Callable[..., Llama]) -> None:
    """Bit for bit, of all positions of a batch: the sampler that keeps the outputs takes no part in them."""
    tokens, never, captured = tokens_of(50), plain(arch, logits_all=True), plain(arch, logits_all=True)
    never.eval(tokens)
    with mirror() as m, capture(captured, m, TAPS, mechanism="outputs"):
        captured.eval(tokens)
    np.testing.assert_array_equal(never.scores[:50], captured.scores[:50])


@pytest.mark.slow
@pytest.mark.parametrize(("n_batch", "n_ubatch"), [(512, 512), (512, 96)])
def test_rows_of_the_demo_target_are_the_same(n_batch: int, n_ubatch: int, demo_target: Path) -> None:
    seen, taps = {}, (1, 8, 14, 20, 27)
    for how in BOTH:
        llm = Llama(
            str(demo_target), n_ctx=512, n_batch=n_batch, n_ubatch=n_ubatch, n_threads=2, flash_attn=True, verbose=False
        )
        with FeatureMirror(taps=5, n_embd=576, cap=200, dtype="f32") as m, capture(llm, m, taps, mechanism=how):
            words = llm.tokenize(b"from typing import List\n\n\ndef has_close_elements(numbers: List[float]):\n" * 14)
            seen[how] = take(llm, words, 8), m.snapshot().rows.tobytes()
        llm.close()
    assert seen["outputs"] == seen["callback"]


@pytest.mark.parametrize("rows", ["raw", "fused"])
def test_drafting_is_the_same(rows: str, name: str, pair: Pair) -> None:
    """Text, accepted tokens step by step, and the rows: of each architecture and way of rolling back."""
    prompt, seen = tokens_of(40), {}
    text = prompt + pair.greedy(name, prompt, 60)
    for how in BOTH:
        llm = pair.dflash(name, mechanism=how, feature_rows=rows, draft_window=48, n_batch=64, n_ubatch=32)
        assert llm.capture_mechanism is how
        script(llm, text, sometimes(3))
        tokens = take(llm, prompt, 50)
        seen[how] = tokens, llm.stats.steps, llm.stats.plain_steps, llm.mirror.snapshot().rows.tobytes()
        llm.close()
    assert seen["outputs"] == seen["callback"]
    assert seen["outputs"][0] == text[40:90]


def test_a_mechanism_can_be_exchanged_in_mid_conversation(pair: Pair, plain: Callable[..., Llama]) -> None:
    """And the taps with it: the context is made anew with its state, or its graph is."""
    llm, tokens = plain(n_ubatch=16), tokens_of(60)
    fresh = plain(n_ubatch=16)
    with mirror() as m, mirror() as want:
        with capture(fresh, want, TAPS):
            fresh.eval(tokens)
        expected = want.read(start=0, count=60)
        for end, how, taps in ((20, "outputs", TAPS), (40, "callback", TAPS), (60, "outputs", TAPS)):
            with capture(llm, m, taps, mechanism=how):
                llm.eval(tokens[end - 20 : end])
        np.testing.assert_array_equal(m.read(start=0, count=60), expected)
    with mirror(taps=2) as m:
        llm.reset()
        with capture(llm, m, (5, 2), mechanism="outputs"):
            llm.eval(tokens)
        by_tap = expected.reshape(60, len(TAPS), N_EMBD)
        np.testing.assert_array_equal(
            m.read(start=0, count=60), by_tap[:, [TAPS.index(5), TAPS.index(2)]].reshape(60, -1)
        )


def test_one_write_takes_all_taps(plain: Callable[..., Llama]) -> None:
    """What makes it cheap: a write per micro-batch instead of one per tap."""
    writes = {}
    for how in BOTH:
        llm = plain(n_ubatch=16)
        with mirror() as m, capture(llm, m, TAPS, mechanism=how):
            llm.eval(tokens_of(40))
            writes[how] = m.times().write_calls
    assert writes == {"outputs": 3, "callback": 3 * len(TAPS)}


# ------------------------------------------------------------------------------------------------------------------ choice


def test_a_cpu_takes_the_callback(pair: Pair, plain: Callable[..., Llama]) -> None:
    with mirror() as m, capture(plain(), m, TAPS) as how:
        assert how is CaptureMechanism.CALLBACK
    llm = pair.dflash()
    assert llm.capture_mechanism is CaptureMechanism.CALLBACK


def test_the_environment_decides_where_nothing_is_said(
    plain: Callable[..., Llama], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(MECHANISM_VARIABLE, "outputs")
    with mirror() as m:
        with capture(plain(), m, TAPS) as how:
            assert how == "outputs"
        with capture(plain(), m, TAPS, mechanism="callback") as how:
            assert how == "callback"
    monkeypatch.setenv(MECHANISM_VARIABLE, "hook")
    with pytest.raises(ArgumentError, match=f"{MECHANISM_VARIABLE}=hook.*callback or outputs"):
        mechanism.parse_mechanism(None)
    with pytest.raises(ArgumentError, match="capture mechanism 'x'"):
        mechanism.parse_mechanism("x")


def test_where_outputs_cannot_be_kept_the_callback_takes_over(
    plain: Callable[..., Llama], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block whose output the graph does not name cannot be kept. Named, the mechanism is refused, and the model is as it was."""
    module = sys.modules["ggml_mirror.capture"]  # the package has a function of that name
    monkeypatch.setattr(module, "choose", lambda llm, n_outputs: CaptureMechanism.OUTPUTS)
    monkeypatch.setattr(module, "_checked_taps", lambda llm, taps: list(taps))
    llm = plain()
    llm.eval(tokens_of(10))
    with mirror() as m:
        with pytest.raises(CaptureError, match="no output of block 99"), capture(llm, m, (1, 2, 3, 4, 99)):
            pass
        assert capture_mechanism(llm) is CaptureMechanism.CALLBACK
        with (
            pytest.raises(CaptureError, match=r"4 of the blocks .* stay in place"),
            capture(plain(), m, (1, 2, 3, 4, 99), mechanism="outputs"),
        ):
            pass
        with capture(llm, m, TAPS):
            llm.eval(tokens_of(10)[5:])
        assert m.positions.tolist() == list(range(10, 15))


def test_a_model_whose_other_mechanism_is_refused_can_be_captured_as_before(
    plain: Callable[..., Llama], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = plain()
    with mirror() as m:
        with capture(llm, m, TAPS):
            llm.eval(tokens_of(10))
        monkeypatch.setattr(sys.modules["ggml_mirror.capture"], "_checked_taps", lambda llm, taps: list(taps))
        with pytest.raises(CaptureError, match="stay in place"), capture(llm, m, (1, 2, 3, 4, 99), mechanism="outputs"):
            pass
        with capture(llm, m, TAPS) as how:
            assert how is CaptureMechanism.CALLBACK
            llm.eval(tokens_of(10)[5:])
        assert m.positions.tolist() == list(range(15))


def test_logits_of_several_micro_batches_are_not_for_outputs(pair: Pair, plain: Callable[..., Llama]) -> None:
    llm = plain(n_ubatch=16, logits_all=True)
    assert mechanism.choose(llm) is CaptureMechanism.CALLBACK
    with mirror() as m, capture(llm, m, TAPS, mechanism="outputs"):
        with pytest.raises(CaptureError, match=r"before its last 8 of 40 tokens.*micro-batch of 16"):
            llm.eval(tokens_of(40))
        assert len(m) == 0
        llm.eval(tokens_of(16))
        assert len(m) == 16
    with pytest.raises(CaptureError, match=r"n_ubatch is 4; .* 8 tokens of a block"):
        pair.dflash(mechanism="outputs", n_ubatch=4)
    assert pair.dflash(n_ubatch=4).capture_mechanism is CaptureMechanism.CALLBACK


@pytest.mark.parametrize(
    ("n", "n_ubatch", "tail", "sizes"),
    [
        (40, 64, 0, [40]),
        (40, 16, 0, [16, 16, 8]),
        (33, 16, 8, [16, 9, 8]),
        (48, 16, 8, [16, 16, 16]),
        (17, 16, 8, [9, 8]),
    ],
)
def test_batches_are_cut_as_llama_cpp_cuts_them(n: int, n_ubatch: int, tail: int, sizes: list[int]) -> None:
    """(llama_batch_allocr::split_simple and split_equal, whose ubatches the text above shows to be the same.)"""
    batch = llama_cpp.llama_batch_init(n, 0, 1)
    batch.n_tokens = n
    for i in range(n):
        batch.token[i], batch.pos[i], batch.logits[i] = 100 + i, i, i == n - 1
    pieces = list(micro_batches(batch, n_ubatch, tail))
    assert [p.n_tokens for p in pieces] == sizes
    assert [t for p in pieces for t in p.token[: p.n_tokens]] == list(range(100, 100 + n))
    assert [t for p in pieces for t in p.pos[: p.n_tokens]] == list(range(n))
    assert [t for p in pieces for t in p.logits[: p.n_tokens]] == [0] * (n - 1) + [1]
    llama_cpp.llama_batch_free(batch)


@pytest.mark.parametrize("how", BOTH)
def test_a_model_that_was_captured_can_be_forgotten(how: str, plain: Callable[..., Llama]) -> None:
    """Attached or not: what the context was given outlives it."""
    for attached in (False, True):
        llm = plain()
        m = mirror()
        stack = ExitStack()
        stack.enter_context(capture(llm, m, TAPS, mechanism=how))
        llm.eval(tokens_of(10))
        if not attached:
            stack.close()
            llm.eval(tokens_of(10))
        del llm, m, stack
        gc.collect()
