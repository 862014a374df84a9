"""A plain Llama with the same cache: warm equals cold there too."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dflash.pair import _EXACT, N_CTX, TARGETS, Pair, take, tokens_of
from llama_cpp import Llama

from ggml_mirror import CachedLlama, FeatureMirror, PrefixCache, capture
from ggml_mirror.plain_llama import PlainLlama

from .test_warm import NEXT, PROMPT


def plain(pair: Pair, name: str, **options: Any) -> Llama:
    arch, own, _ = TARGETS[name]
    return Llama(pair.target(arch), **{"n_ctx": N_CTX, **_EXACT, **own, **options})


def logits_after(llm: Llama, prompt: list[int]) -> np.ndarray[Any, Any]:
    """Of the last of some tokens that are evaluated behind the prompt: what they attend to shows in them."""
    take(llm, prompt, 6)
    llm.eval([40, 41])
    return np.array(llm._ctx.get_logits()[: llm.n_vocab()])


def test_every_prompt_after_another(name: str, pair: Pair, tmp_path: Path) -> None:
    cold, llm, second = (plain(pair, name) for _ in range(3))
    llm.set_cache(PrefixCache(llm))
    # Without a cache, a plain Llama evaluates a prompt in one batch, which F32 without flash attention rounds as it likes.
    cold.set_cache(PrefixCache(cold, ram_bytes=0))
    expected = {case: logits_after(reset(cold), prompt) for case, (prompt, _) in NEXT.items()}
    np.testing.assert_array_equal(logits_after(llm, PROMPT), expected["again"])
    with PrefixCache(second, directory=tmp_path) as cache:
        second.set_cache(cache)
        take(second, PROMPT, 1)
    second.set_cache(PrefixCache(second, ram_bytes=0, directory=tmp_path))
    for case, (prompt, saved) in NEXT.items():
        for model, tier in ((llm, "ram"), (second, "disk")):
            hits = model.cache.counters.hits
            before = hits[tier]
            np.testing.assert_array_equal(logits_after(reset(model), prompt), expected[case], case)
            assert hits[tier] - before == bool(saved), (case, tier)
            if saved:
                assert model.cache.counters.reused_tokens[tier] == 64 * hits[tier]


def reset(llm: Llama) -> Llama:
    llm.reset()
    return llm


def test_text_is_that_of_a_plain_llama(pair: Pair) -> None:
    """The wrapper changes nothing that a caller sees: sampling, streams that are stopped, tokens that are sent, reset=False."""
    llm, twin = plain(pair, "llama"), pair.plain("llama")
    llm.set_cache(PrefixCache(llm))
    for seed in (1, 2, 1):
        options: Any = dict(max_tokens=15, temperature=1.2, seed=seed)
        assert (
            llm.create_completion(PROMPT, **options)["choices"] == twin.create_completion(PROMPT, **options)["choices"]
        )
    for prompt in (PROMPT, [*PROMPT, *tokens_of(20, 9)], PROMPT[:100]):
        assert take(llm, prompt, 12) == pair.greedy("llama", prompt, 12)
    said = take(llm, PROMPT, 5)
    assert take(llm, [said[-1]], 5, reset=False) == pair.greedy("llama", PROMPT + said, 5)
    assert list(llm.create_completion(PROMPT, max_tokens=3, stream=True))
    assert llm.cache.counters.hits["ram"] + llm.cache.counters.hits["context"] >= 6


def test_tokens_evaluated_behind_its_back_are_noticed(pair: Pair) -> None:
    llm = plain(pair, "llama")
    llm.set_cache(PrefixCache(llm))
    take(llm, PROMPT, 5)
    llm.reset()
    llm.eval(tokens_of(150, 8))
    assert take(llm, PROMPT, 12) == pair.greedy("llama", PROMPT, 12)


def test_logits_all(pair: Pair) -> None:
    llm, twin = plain(pair, "llama", logits_all=True), plain(pair, "llama", logits_all=True)
    llm.set_cache(PrefixCache(llm))
    options: Any = dict(max_tokens=4, temperature=0, logprobs=2, echo=True)

    def answer(model: Llama) -> Any:
        return reset(model).create_completion("a b c d " * 25, **options)["choices"][0]

    (a, b), expected = (answer(llm), answer(llm)), answer(twin)
    assert a == b and a["text"] == expected["text"]
    np.testing.assert_allclose(
        a["logprobs"]["token_logprobs"][1:], expected["logprobs"]["token_logprobs"][1:], atol=1e-4
    )
    assert llm.cache.counters.hits == {"ram": 1}


def test_a_capture_follows_what_is_restored(pair: Pair) -> None:
    """Rows of a prompt that came from the cache are not there; none is of another prompt."""
    llm, fresh = plain(pair, "llama"), plain(pair, "llama")
    llm.set_cache(PrefixCache(llm))
    with FeatureMirror(taps=1, n_embd=64, cap=256) as m, capture(llm, m, [2]):
        take(llm, PROMPT, 3)
        take(llm, tokens_of(150, 2), 3)
        take(llm, PROMPT, 3)
        held = m.positions
        with FeatureMirror(taps=1, n_embd=64, cap=256) as other, capture(fresh, other, [2]):
            fresh.eval(llm.input_ids[: llm.n_tokens].tolist())
            for p in held.tolist():
                np.testing.assert_allclose(m.read(start=p, count=1), other.read(start=p, count=1), atol=2e-3)
    assert llm.cache.counters.hits["ram"] == 1 and 64 in held


def test_neither_keeps_the_other_alive(pair: Pair) -> None:
    llm = plain(pair, "llama")
    cache = PrefixCache(llm)
    llm.set_cache(cache)
    take(llm, PROMPT, 2)
    gone = weakref.ref(llm), weakref.ref(cache)
    del llm, cache
    gc.collect()
    assert [reference() for reference in gone] == [None, None]


def test_a_class_with_its_own_generate_sees_the_prompt_evaluated(pair: Pair) -> None:
    """It derives from CachedLlama: what it does around ``generate`` includes the prompt, as in a Llama without a cache."""

    class Own(CachedLlama):
        evaluated = 0

        def eval(self, tokens: Any) -> None:
            self.evaluated += len(tokens)
            super().eval(tokens)

        def generate(self, tokens: Any, *args: Any, **kwargs: Any) -> Any:
            self.evaluated = 0
            yield from super().generate(tokens, *args, **kwargs)

    arch, own, _ = TARGETS["llama"]
    llm = Own(pair.target(arch), **{"n_ctx": N_CTX, **_EXACT, **own})
    llm.set_cache(PrefixCache(llm))
    first = take(llm, PROMPT, 1)
    assert llm.evaluated == len(PROMPT)
    assert take(reset(llm), PROMPT, 1) == first and llm.evaluated == len(PROMPT) - 64
    assert llm.cache.counters.hits == {"ram": 1}


def test_counts_of_a_plain_llama_that_counts(pair: Pair) -> None:
    arch, own, _ = TARGETS["llama"]
    llm = PlainLlama(pair.target(arch), **{"n_ctx": N_CTX, **_EXACT, **own})
    llm.set_cache(PrefixCache(llm))
    for reused in (0, 64):
        take(reset(llm), PROMPT, 3)
        assert (llm.stats.prompt_tokens, llm.stats.prefix_reused, llm.stats.tokens) == (150, reused, 3)
        assert llm.stats.prefill_s > 0


@pytest.mark.parametrize("closed", [True, False])
def test_without_its_cache_the_model_is_as_before(closed: bool, pair: Pair) -> None:
    llm = plain(pair, "llama")
    cache = PrefixCache(llm)
    llm.set_cache(cache)
    first = take(llm, PROMPT, 5)
    if closed:
        cache.close()
    else:
        llm.set_cache(None)
    assert take(reset(llm), PROMPT, 5) == first
    assert cache.counters.hits == {}
