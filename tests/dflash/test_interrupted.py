"""Streams that are cancelled, interrupted, left behind or disturbed in the middle of a block; evaluations that fail."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from typing import Any

import pytest
from llama_cpp._internals import LlamaContext

from ggml_mirror.dflash import DFlashLlama
from ggml_mirror.errors import CaptureError, ClosedError, GgmlMirrorError

from .pair import Pair, script, sometimes, take, tokens_of

PROMPT = tokens_of(14, 3)


@pytest.fixture
def started(name: str, pair: Pair) -> Callable[[int], tuple[DFlashLlama, Any, list[int]]]:
    """``started(n)``: a model, its generator after n tokens, and the plain text. The draft is right at every second step."""

    def start(n: int) -> tuple[DFlashLlama, Any, list[int]]:
        expected = pair.greedy(name, PROMPT, 60)
        llm = pair.dflash(name)
        script(llm, PROMPT + expected, lambda step, i: step % 2 == 0 or i < 3)
        generator = llm.generate(PROMPT, temp=0.0)
        assert [next(generator) for _ in range(n)] == expected[:n]
        return llm, generator, expected

    return start


def test_a_thrown_interrupt_leaves_the_committed_tokens(name: str, started: Any, pair: Pair) -> None:
    for n in range(1, 14):
        llm, generator, expected = started(n)
        with pytest.raises(KeyboardInterrupt):
            generator.throw(KeyboardInterrupt())
        assert llm.input_ids[: llm.n_tokens].tolist() == PROMPT + expected[: n - 1]
        pair.assert_rows_are_fresh(name, llm)
        assert take(llm, expected[n - 1 : n], 8, reset=False) == expected[n : n + 8]
        pair.assert_rows_are_fresh(name, llm)


def test_a_cancelled_stream_of_text(pair: Pair) -> None:
    text = str(pair.plain()("Once upon", max_tokens=40, temperature=0)["choices"][0]["text"])
    for n in range(1, 18):
        llm = pair.dflash()
        ids = llm.tokenize(b"Once upon")
        script(llm, ids + pair.greedy("llama", ids, 50))
        stream = llm("Once upon", max_tokens=40, temperature=0, stream=True)
        said = "".join(str(next(stream)["choices"][0]["text"]) for _ in range(n))
        stream.close()
        assert text.startswith(said)
        pair.assert_rows_are_fresh("llama", llm)
        assert llm("Once upon", max_tokens=40, temperature=0)["choices"][0]["text"] == text


@pytest.mark.parametrize("n", [3, 6, 11])
def test_a_stream_that_was_left_behind_does_no_harm(n: int, name: str, started: Any, pair: Pair) -> None:
    """Another call begins while a stream waits in mid-block; then the old stream is closed, and cannot be taken up again."""
    llm, old, _ = started(n)
    other = tokens_of(25, 8)
    expected = pair.greedy(name, other, 40)
    script(llm, other + expected)
    new = llm.generate(other, temp=0.0)
    head = [next(new) for _ in range(3)]  # in mid-block
    with pytest.raises(ClosedError):
        next(old)
    old.close()
    del old
    gc.collect()
    assert head + [next(new) for _ in range(20)] == expected[:23]
    new.close()
    pair.assert_rows_are_fresh(name, llm)


@pytest.mark.parametrize("n", [2, 5, 9, 12])
def test_a_state_saved_in_mid_stream_holds_what_is_committed(n: int, name: str, started: Any, pair: Pair) -> None:
    """And the stream goes on; the state, taken up later, goes on from the same token."""
    llm, generator, expected = started(n)
    state = llm.save_state()
    assert state.n_tokens == len(PROMPT) + n - 1
    assert [next(generator) for _ in range(20)] == expected[n : n + 20]
    generator.close()
    pair.assert_rows_are_fresh(name, llm)
    llm.load_state(state)
    pair.assert_rows_are_fresh(name, llm)
    assert take(llm, expected[n - 1 : n], 20, reset=False) == expected[n : n + 20]
    pair.assert_rows_are_fresh(name, llm)


@pytest.mark.parametrize("n", [2, 6, 11])
def test_reset_in_mid_stream_goes_on_from_nothing(n: int, name: str, started: Any, pair: Pair) -> None:
    """As in plain Llama: the last token is the first of a new sequence."""
    llm, generator, expected = started(n)
    llm.reset()
    assert len(llm.mirror.positions) == 0
    assert [next(generator) for _ in range(10)] == pair.greedy(name, expected[n - 1 : n], 10)
    generator.close()
    pair.assert_rows_are_fresh(name, llm)


@pytest.mark.parametrize("n", [2, 6, 11])
def test_tokens_evaluated_in_mid_stream_come_behind_the_committed_ones(
    n: int, name: str, started: Any, pair: Pair
) -> None:
    llm, generator, expected = started(n)
    llm.eval([50, 51])
    said = PROMPT + expected[: n - 1] + [50, 51] + expected[n - 1 : n]
    assert [next(generator) for _ in range(10)] == pair.greedy(name, said, 10)
    generator.close()
    pair.assert_rows_are_fresh(name, llm)


# ------------------------------------------------------------------------------------------------ failing evaluations


class Failing:
    """The n-th ``llama_decode`` from now fails: before it, or after the native context has changed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: BaseException, at: int, evaluated: bool) -> None:
        real, calls = LlamaContext.decode, iter(range(10**6))

        def decode(context: Any, batch: Any) -> None:
            fails = next(calls) == at
            if fails and not evaluated:
                raise error
            real(context, batch)
            if fails:
                raise error

        monkeypatch.setattr(LlamaContext, "decode", decode)


@pytest.mark.parametrize("evaluated", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("at", [0, 1, 2, 3, 4])
def test_a_failing_evaluation_leaves_whole_tokens(
    at: int, evaluated: bool, name: str, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the prefill, in a verification, in re-evaluating after a reject. What is left is committed tokens (or nothing, where
    running state was lost), and everything works without a reset."""
    expected = pair.greedy(name, PROMPT, 60)
    for follow, error in (("same", KeyboardInterrupt()), ("append", RuntimeError("llama_decode returned 2"))):
        llm = pair.dflash(name)
        script(llm, PROMPT + expected, sometimes(2, 0.6))
        with monkeypatch.context() as patch:
            Failing(patch, error, at, evaluated)
            with pytest.raises(type(error)):
                take(llm, PROMPT, 40)
        left = llm.input_ids[: llm.n_tokens].tolist()
        assert left == (PROMPT + expected)[: len(left)]
        if name in ("llama", "qwen3", "gemma3") and at > 0:
            assert len(left) >= len(PROMPT)
        pair.assert_rows_are_fresh(name, llm)
        if follow == "same":
            assert take(llm, PROMPT, 20) == expected[:20]
        else:
            more = tokens_of(4, 8)[1:]
            assert take(llm, more, 10, reset=False) == pair.greedy(name, left + more, 10)
        pair.assert_rows_are_fresh(name, llm)


@pytest.mark.parametrize("at", [0, 1, 3])
def test_a_failure_inside_the_eval_callback_is_an_exception(
    at: int, name: str, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The callback is told of fewer rows than the graph gives: it cannot throw through llama.cpp, so the evaluation raises."""
    expected = pair.greedy(name, PROMPT, 40)
    llm = pair.dflash(name)
    script(llm, PROMPT + expected, sometimes(2, 0.6))
    capture_module = sys.modules["ggml_mirror.capture"]  # the package's attribute of that name is the function
    real, calls, failed = capture_module.lib, iter(range(10**6)), []

    class Lib:
        def __getattr__(self, attribute: str) -> Any:
            return getattr(real, attribute)

        def gm_capture_begin(self, handle: Any, start: int, count: int) -> Any:
            if next(calls) >= at and count > 1 and not failed:
                failed.append(count)
                count -= 1
            return real.gm_capture_begin(handle, start, count)

    with monkeypatch.context() as patch:
        patch.setattr(capture_module, "lib", Lib())
        with pytest.raises(GgmlMirrorError) as caught:
            take(llm, PROMPT, 40)
    assert isinstance(caught.value, CaptureError)
    pair.assert_rows_are_fresh(name, llm)
    llm.reset()
    assert take(llm, PROMPT, 30) == expected[:30]
    pair.assert_rows_are_fresh(name, llm)


def test_a_failing_draft_leaves_whole_tokens(name: str, pair: Pair) -> None:
    expected = pair.greedy(name, PROMPT, 60)
    llm = pair.dflash(name)
    script(llm, PROMPT + expected, lambda _, i: i < 3)
    scripted, calls = llm.draft.step, iter(range(100))

    def step(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return scripted(*args, **kwargs)

    llm.draft.step = step  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        take(llm, PROMPT, 40)
    pair.assert_rows_are_fresh(name, llm)
    assert take(llm, PROMPT, 30) == expected[:30]


@pytest.mark.parametrize("at", [0, 4, 9])
def test_a_failing_logits_processor_or_criterion(at: int, name: str, pair: Pair) -> None:
    expected = pair.greedy(name, PROMPT, 60)
    llm = pair.dflash(name)
    script(llm, PROMPT + expected)
    calls = iter(range(100))

    def fails(ids: Any, scores: Any) -> bool:
        if next(calls) == at:
            raise ZeroDivisionError
        return False

    with pytest.raises(ZeroDivisionError):
        take(llm, PROMPT, 40, stopping_criteria=fails)
    pair.assert_rows_are_fresh(name, llm)
    assert take(llm, PROMPT, 30) == expected[:30]


def test_a_closed_mirror_is_a_typed_error(pair: Pair) -> None:
    llm = pair.dflash()
    generator = llm.generate(PROMPT, temp=0.0)
    next(generator)
    llm.mirror.close()
    with pytest.raises(ClosedError):
        list(generator)
    with pytest.raises(ClosedError):
        take(llm, PROMPT, 3)
    llm.close()


def test_a_closed_model_can_be_closed_again_and_its_stream_too(name: str, started: Any) -> None:
    llm, generator, _ = started(4)
    llm.close()
    generator.close()
    llm.close()


def test_models_forgotten_in_mid_stream_are_collected_in_any_order(name: str, started: Any, pair: Pair) -> None:
    """The collector finalizes a cycle's objects in any order: none may use what another has freed. (A sanitizer sees it at once,
    else the heap is corrupt sooner or later.)"""
    for _ in range(5):
        llm, generator, _ = started(4)
        llm.itself = llm
        del llm, generator
        gc.collect()
    assert take(pair.dflash(name), PROMPT, 20) == pair.greedy(name, PROMPT, 20)
