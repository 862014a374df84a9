"""Warm equals cold: text, accepted tokens of each step, what the draft sees, and the rows, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from dflash.pair import BLOCK, Pair, tokens_of
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_cpp import LlamaGrammar

from ggml_mirror import PrefixCache
from ggml_mirror.dflash import DFlashLlama
from ggml_mirror.dtype import FeatureDtype

from .runs import run

PROMPT = tokens_of(150, 1)
OTHER = tokens_of(90, 2)

#: Prompts after PROMPT, and tokens of them that it saves.
NEXT = {
    "again": (PROMPT, 150),
    "longer": ([*PROMPT, *tokens_of(40, 3)], 64),
    "parts late": ([*PROMPT[:140], *tokens_of(30, 4)], 64),
    "parts early": ([*PROMPT[:70], *tokens_of(90, 5)], 64),
    "shorter": (PROMPT[:146], 64),
    "much shorter": (PROMPT[:50], 0),  # evaluated in smaller batches
    "another": (OTHER, 0),
}


def pair_options(pair: Pair, window: int | None, **more: Any) -> dict[str, Any]:
    return {"draft": pair.draft(seed=2), "draft_window": window, **more}


@pytest.mark.parametrize(
    ("tier", "window"), [("ram", None), ("ram", 20), ("ram", 100), ("disk", 20)], ids=lambda value: str(value)
)
def test_every_prompt_after_another(tier: str, window: int | None, name: str, pair: Pair, tmp_path: Path) -> None:
    """From memory, and from disk in an object that never saw the prompt. Rings of 20 and 100 rows wrap."""
    options = pair_options(pair, window)
    cold, llm = pair.dflash(name, **options), pair.dflash(name, **options)
    sizes: dict[str, Any] = {"ram_bytes": 1 << 30} if tier == "ram" else {"ram_bytes": 0, "directory": tmp_path}
    llm.set_cache(PrefixCache(llm, **sizes))
    run(llm, PROMPT).assert_same(run(cold, PROMPT))
    assert llm.stats.prefix_reused == 0
    if tier == "disk":
        llm = pair.dflash(name, **options)
        llm.set_cache(PrefixCache(llm, **sizes))
    hits = llm.cache.counters.hits
    for case, (prompt, saved) in NEXT.items():
        if name.startswith("gemma3") and case == "again":
            saved = 64  # behind the prompt, the window's cells would be summed in another order
        llm.reset()
        cold.reset()
        before = hits[tier]
        run(llm, prompt).assert_same(run(cold, prompt))
        assert llm.stats.prefix_reused == saved, case
        assert hits[tier] - before == bool(saved), case
        assert cold.stats.prefix_reused == 0
    assert set(hits) == {tier}


@pytest.mark.parametrize(
    ("dtype", "window", "rows"),
    [
        *((d.value, window, "raw") for d in FeatureDtype for window in (None, 20)),
        *((d, 20, "fused") for d in ("f32", "q8_0", "iq4_nl")),
    ],
    ids=lambda value: str(value),
)
def test_every_dtype(dtype: str, window: int | None, rows: str, pair: Pair, tmp_path: Path) -> None:
    options = pair_options(pair, window, feature_dtype=dtype, feature_rows=rows)
    cold, llm = pair.dflash(**options), pair.dflash(**options)
    with PrefixCache(llm, directory=tmp_path) as cache:
        llm.set_cache(cache)
        run(llm, PROMPT)
        run(llm, OTHER)
        for prompt in (PROMPT, NEXT["longer"][0], OTHER):
            cold.reset()
            run(llm, prompt).assert_same(run(cold, prompt))
        assert cache.counters.hits == {"ram": 2, "context": 1}
    twin = pair.dflash(**options)
    with PrefixCache(twin, directory=tmp_path) as cache:
        twin.set_cache(cache)
        cold.reset()
        run(twin, PROMPT).assert_same(run(cold, PROMPT))
        assert cache.counters.hits == {"disk": 1} and twin.stats.prefix_reused == len(PROMPT)


def test_a_conversation(name: str, pair: Pair) -> None:
    """Each turn has the answers before it. They were generated, hence evaluated in other batches: they are evaluated again."""
    options = pair_options(pair, 40)
    cold, llm = pair.dflash(name, **options), pair.dflash(name, **options)
    cache = PrefixCache(llm)
    llm.set_cache(cache)
    prompt = tokens_of(130, 6)
    for turn in range(4):
        cold.reset()
        expected = run(cold, prompt, 15)
        run(llm, prompt, 15).assert_same(expected)
        assert llm.stats.prefix_reused == (0, 64, 64, 128)[turn], turn
        prompt = [*prompt, *expected.tokens, *tokens_of(17, turn)]
    assert cache.counters.misses == 1 and sum(cache.counters.hits.values()) == 3


def test_the_live_sequence_is_as_good_as_a_cached_one(pair: Pair) -> None:
    """Without any tier, what the model still has is used as far as it comes out the same."""
    options = pair_options(pair, 20)
    cold, llm = pair.dflash(**options), pair.dflash(**options)
    cache = PrefixCache(llm, ram_bytes=0)
    llm.set_cache(cache)
    run(llm, PROMPT, 30)
    for case in ("again", "longer", "parts early"):
        cold.reset()
        run(llm, NEXT[case][0], 30).assert_same(run(cold, NEXT[case][0], 30))
        assert llm.stats.prefix_reused == 64
    assert cache.counters.hits == {"context": 3} and cache.cache_size == 0


def test_a_window_that_has_lost_rows_is_evaluated_again(pair: Pair) -> None:
    """A much shorter prompt attends to rows that the longer one's ring no longer has."""
    options = pair_options(pair, 60)
    cold, llm = pair.dflash(**options), pair.dflash(**options)
    cache = PrefixCache(llm)
    llm.set_cache(cache)
    run(llm, tokens_of(240, 7), 5)
    run(llm, OTHER)
    # Its ring begins at 240 - 60 - BLOCK; the shorter prompt's window at 200 - 60, so evaluation goes back to 128, not to 192.
    assert 240 - 60 - BLOCK > 200 - 60
    short = [*tokens_of(240, 7)[:195], 33, 34, 35, 36, 37]
    run(llm, short).assert_same(run(cold, short))
    assert llm.stats.prefix_reused == 128


def test_sampling_goes_on_as_without_a_cache(pair: Pair) -> None:
    """With a seed, and without: a cached prompt does not fix what is drawn after it."""
    options = pair_options(pair, None)
    cold, llm = pair.dflash(**options, seed=3), pair.dflash(**options, seed=3)
    llm.set_cache(PrefixCache(llm))
    texts: list[list[str]] = [[], []]
    for model, out in ((cold, texts[0]), (llm, texts[1])):
        for seed in (None, None, 11, None, 11):
            model.reset()
            answer = model.create_completion(PROMPT, max_tokens=12, temperature=1.5, seed=seed)
            out.append(answer["choices"][0]["text"])
    assert texts[0] == texts[1]
    assert texts[0][2] == texts[0][4] and len(set(texts[0])) == 4
    assert llm.cache.counters.hits == {"ram": 4}


def test_penalties_and_processors_see_the_prompt(pair: Pair) -> None:
    """On the first token, which comes from kept logits, as well."""
    options = pair_options(pair, None)
    cold, llm = pair.dflash(**options), pair.dflash(**options)
    llm.set_cache(PrefixCache(llm))

    def answer(model: DFlashLlama) -> str:
        model.reset()
        return model.create_completion(
            PROMPT, max_tokens=12, temperature=0, repeat_penalty=1.5, logit_bias={"40": 1.0, "70": -3.0}
        )["choices"][0]["text"]

    expected = answer(cold)
    assert [answer(llm) for _ in range(2)] == [expected] * 2
    assert llm.cache.counters.hits == {"ram": 1}


@pytest.mark.parametrize("guarded", [False, True])
def test_a_grammar_starts_with_the_first_token(guarded: bool, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which comes from kept logits; through llama_cpp's own sampler, and through the server's, which asks a context for them."""
    options = pair_options(pair, None)
    cold, llm = pair.dflash(**options), pair.dflash(**options)
    llm.set_cache(PrefixCache(llm))
    if guarded:
        sampling = pytest.importorskip("ggml_mirror.server.sampling")
        init = DFlashLlama._init_sampler
        monkeypatch.setattr(
            DFlashLlama, "_init_sampler", lambda self, **o: sampling.GuardedSampler(init(self, **o), self._n_vocab)
        )
    grammar = LlamaGrammar.from_string('root ::= "xy" [a-f]+')

    def answer(model: DFlashLlama) -> str:
        model.reset()
        text: str = model.create_completion(PROMPT, max_tokens=12, temperature=0, grammar=grammar)["choices"][0]["text"]
        return text

    expected = answer(cold)
    assert expected.startswith("xy") and [answer(llm) for _ in range(3)] == [expected] * 3
    assert llm.cache.counters.hits == {"ram": 2}


def test_logprobs_of_prompt_and_completion(pair: Pair) -> None:
    """With logits_all: scores come back with the rest."""
    options = pair_options(pair, None, logits_all=True)
    cold, llm = pair.dflash(**options), pair.dflash(**options)
    llm.set_cache(PrefixCache(llm))

    def answer(model: DFlashLlama) -> Any:
        model.reset()
        return model.create_completion("abc " * 30, max_tokens=5, temperature=0, logprobs=3, echo=True)["choices"]

    expected = answer(cold)
    assert [answer(llm) for _ in range(2)] == [expected] * 2
    assert llm.cache.counters.hits == {"ram": 1}


@pytest.mark.parametrize("n_batch", [16, 100, 256])
def test_any_batch_size(n_batch: int, pair: Pair) -> None:
    options = pair_options(pair, 30, n_batch=n_batch, n_ubatch=n_batch)
    cold, llm = pair.dflash(**options), pair.dflash(**options)
    llm.set_cache(PrefixCache(llm))
    for prompt in (PROMPT, OTHER, PROMPT, NEXT["longer"][0], NEXT["parts late"][0]):
        cold.reset()
        run(llm, prompt).assert_same(run(cold, prompt))
    assert llm.cache.counters.hits["ram"] + llm.cache.counters.hits["context"] == 3


@pytest.mark.slow
@settings(max_examples=6)
@given(data=st.data())
def test_random_prompts_in_any_order(data: st.DataObject, pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Prompts that share beginnings of any length, through tiers so small that entries come and go, objects that are replaced."""
    options = pair_options(pair, data.draw(st.sampled_from([None, 15, 60])))
    directory = tmp_path_factory.mktemp("cache")
    cold, llm = pair.dflash(**options), pair.dflash(**options)
    base = tokens_of(200, data.draw(st.integers(0, 3)))

    def cache() -> PrefixCache:
        return PrefixCache(llm, ram_bytes=data.draw(st.sampled_from([0, 400_000, 1 << 30])), directory=directory)

    llm.set_cache(cache())
    for _ in range(8):
        if data.draw(st.integers(0, 4)) == 0:
            llm.cache.close()
            llm = pair.dflash(**options)
            llm.set_cache(cache())
        kept = data.draw(st.integers(1, 200))
        prompt = [*base[:kept], *tokens_of(data.draw(st.integers(1, 40)), kept)]
        n = data.draw(st.integers(2, 25))
        cold.reset()
        run(llm, prompt, n).assert_same(run(cold, prompt, n))
    llm.cache.close()
