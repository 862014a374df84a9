"""Files and memory that are not what is needed: typed errors, before the target is loaded where they can be known then."""

from __future__ import annotations

import gc
import itertools
import re
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import llama_cpp
import pytest
from resident import growth, resident

import ggml_mirror.dflash as dflash
from ggml_mirror import FeatureMirror, find_device
from ggml_mirror.capture import Hook, attachment
from ggml_mirror.errors import (
    ClosedError,
    DraftMismatchError,
    GgmlMirrorError,
    MirrorMemoryError,
    ModelFileError,
    UnsupportedDraftError,
)

from .pair import N_EMBD, TAPS, Pair, take, tokens_of

# An object that could not be made is finalized without a complaint.
pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def no_target(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a target fails the test."""

    def load(self: object, *args: object, **kwargs: object) -> None:
        pytest.fail("the target was loaded")

    monkeypatch.setattr(llama_cpp.Llama, "__init__", load)


def missing(pair: Pair, folder: Path) -> str:
    return str(folder / "none.gguf")


def empty(pair: Pair, folder: Path) -> str:
    (folder / "empty.gguf").write_bytes(b"")
    return str(folder / "empty.gguf")


def header_cut(pair: Pair, folder: Path) -> str:
    (folder / "cut.gguf").write_bytes(Path(pair.draft()).read_bytes()[:3000])
    return str(folder / "cut.gguf")


def tensors_cut(pair: Pair, folder: Path) -> str:
    whole = Path(pair.draft()).read_bytes()
    (folder / "short.gguf").write_bytes(whole[: len(whole) - 5000])
    return str(folder / "short.gguf")


def text(pair: Pair, folder: Path) -> str:
    (folder / "text.gguf").write_text("not a model at all\n" * 100)
    return str(folder / "text.gguf")


def a_target(pair: Pair, folder: Path) -> str:
    return pair.target("qwen3")


def other_width(pair: Pair, folder: Path) -> str:
    return pair.draft(n_embd=32)


def deeper_taps(pair: Pair, folder: Path) -> str:
    return pair.draft(taps=(1, 3, 30))


@pytest.mark.parametrize(
    ("draft", "error"),
    [
        (missing, ModelFileError),
        (empty, ModelFileError),
        (header_cut, ModelFileError),
        (tensors_cut, ModelFileError),
        (text, ModelFileError),
        (a_target, UnsupportedDraftError),
        (other_width, DraftMismatchError),
        (deeper_taps, DraftMismatchError),
    ],
)
def test_a_wrong_draft_is_known_before_the_target_is_loaded(
    draft: Callable[[Pair, Path], str], error: type[GgmlMirrorError], pair: Pair, tmp_path: Path, no_target: None
) -> None:
    path = draft(pair, tmp_path)
    with pytest.raises(error, match=re.escape(Path(path).name)):
        pair.dflash(draft=path)


def test_a_missing_target_is_a_typed_error(pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="gone"):
        dflash.DFlashLlama(str(tmp_path / "gone.gguf"), draft_path=pair.draft())


def test_a_mirror_that_does_not_fit_names_the_bytes_and_what_would(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """The context is made to look large where the mirror's size is decided: a real one would need its KV cache too."""
    row = len(TAPS) * N_EMBD * 4
    n_ctx = int(1.5 * find_device("cpu").memory_free) // row
    monkeypatch.setattr(dflash.DFlashLlama, "n_ctx", lambda self: n_ctx)
    before = resident()
    with pytest.raises(MirrorMemoryError) as caught:
        pair.dflash(draft_window=n_ctx)
    error = caught.value
    assert error.bytes_needed >= n_ctx * row and error.bytes_free < error.bytes_needed
    assert str(error.bytes_needed) in str(error).replace(",", "")
    assert "q8_0" in error.fitting_dtypes and "q8_0" in str(error)
    assert 0 < error.max_cap < n_ctx
    assert resident() - before < 100 * 2**20


@pytest.mark.soak
@pytest.mark.parametrize("close", [True, False], ids=["closed", "forgotten"])
def test_loading_and_closing_does_not_leak(close: bool, name: str, pair: Pair) -> None:
    """100 cycles. A leaked ring or KV cache is 256 rows or more, 0.3 MB a cycle."""

    def cycle(_: int) -> None:
        llm = pair.dflash(name)
        take(llm, tokens_of(20), 12)
        llm.load_state(llm.save_state())
        generator = llm.generate(tokens_of(20), temp=0.0)
        next(generator)
        if close:
            llm.close()

    assert growth(cycle, 100, warm_up=10) < 3 * 2**20


@pytest.mark.soak
def test_loading_and_closing_the_demo_pair_does_not_leak(demo_target: Path, demo_draft: Path) -> None:
    """100 cycles. A mirror, or keys and values, that stayed would be 3 MB each, weights 20 MB."""

    def cycle(_: int) -> None:
        llm = dflash.DFlashLlama(
            str(demo_target), draft_path=str(demo_draft), n_ctx=256, n_threads=1, n_threads_batch=1, verbose=False
        )
        llm("def fibonacci(n):", max_tokens=8, temperature=0)
        assert llm.stats.draft_steps > 0
        llm.close()

    assert growth(cycle, 100, warm_up=10) < 3 * 2**20


def nothing(llm: dflash.DFlashLlama) -> None:
    pass


def a_generation(llm: dflash.DFlashLlama) -> None:
    take(llm, tokens_of(20), 12)


def a_chat(llm: dflash.DFlashLlama) -> None:
    llm.create_chat_completion([{"role": "user", "content": "Hi"}], max_tokens=5)


def an_abandoned_stream(llm: dflash.DFlashLlama) -> None:
    stream = llm("Once upon", max_tokens=30, temperature=0, stream=True)
    next(stream)
    next(stream)


def a_stream_that_another_call_ended(llm: dflash.DFlashLlama) -> Iterator[int]:
    old = llm.generate(tokens_of(20), temp=0.0)
    next(old)
    take(llm, tokens_of(9), 3)
    with pytest.raises(ClosedError):
        next(old)
    return old


def a_stream_that_outlives_it(llm: dflash.DFlashLlama) -> Iterator[int]:
    generator = llm.generate(tokens_of(20), temp=0.0)
    next(generator)
    return generator


def a_state(llm: dflash.DFlashLlama) -> object:
    take(llm, tokens_of(20), 12)
    state = llm.save_state()
    llm.load_state(state)
    return state


def a_failure(llm: dflash.DFlashLlama) -> None:
    with pytest.raises(ZeroDivisionError):
        take(llm, tokens_of(20), 12, stopping_criteria=lambda ids, scores: 1 // 0)


USES = [
    nothing,
    a_generation,
    a_chat,
    an_abandoned_stream,
    a_stream_that_another_call_ended,
    a_stream_that_outlives_it,
    a_state,
    a_failure,
]


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("use", USES)
def test_a_model_is_freed_with_its_last_reference(
    use: Callable[[dflash.DFlashLlama], object], name: str, pair: Pair, no_collector: None
) -> None:
    """As a plain Llama: no cycle leaves its memory to the collector."""
    llm = pair.dflash(name)
    left = use(llm)
    context, model, batch = llm._ctx, llm._model, llm._batch
    ours = [llm, llm.draft._handle, llm.mirror._handle, Hook.of(llm).handle]
    gone = [weakref.ref(o) for o in ours]
    del llm, ours
    if isinstance(left, Iterator):
        assert (gone[0]() is None) == (use is not a_stream_that_outlives_it)
        assert use is not a_stream_that_outlives_it or len(list(itertools.islice(left, 9))) == 9
        del left  # a stream keeps its model while it waits
    assert [r() for r in gone[:3]] == [None, None, None]
    assert (context.ctx, model.model, batch.batch) == (None, None, None)
    del context
    assert gone[3]() is None


def test_a_model_that_is_freed_while_it_is_captured(pair: Pair, no_collector: None) -> None:
    llm = llama_cpp.Llama(pair.target("llama"), n_ctx=64, verbose=False)
    gone = weakref.ref(llm)
    with FeatureMirror(taps=len(TAPS), n_embd=N_EMBD, cap=64) as mirror, attachment(llm, mirror, TAPS):
        llm.eval(tokens_of(5))
        del llm
        assert gone() is None
        assert mirror.read(start=0, count=5).any()


@pytest.mark.slow
def test_objects_that_could_not_be_made_do_not_leak(pair: Pair) -> None:
    def cycle(_: int) -> None:
        with pytest.raises(GgmlMirrorError):
            pair.dflash(n_batch=4)
        with pytest.raises(GgmlMirrorError):
            pair.dflash(draft=pair.draft(n_embd=32))

    assert growth(cycle, 100, warm_up=10) < 3 * 2**20
