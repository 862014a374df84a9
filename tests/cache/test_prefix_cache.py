"""The cache around the tiers: what it is asked, what it counts, and how it fails."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dflash.pair import BLOCK, N_EMBD, TAPS, Pair, take, tokens_of
from llama_cpp import LlamaRAMCache

from ggml_mirror import PrefixCache, row_bytes
from ggml_mirror.dflash import DFlashLlama
from ggml_mirror.errors import ArgumentError

from .runs import run

PROMPT, OTHER = tokens_of(150, 1), tokens_of(150, 2)


def cached(
    pair: Pair, directory: Path | None = None, *, options: dict[str, Any] | None = None, **sizes: Any
) -> DFlashLlama:
    llm = pair.dflash(**{"draft": pair.draft(seed=2), **(options or {})})
    llm.set_cache(PrefixCache(llm, directory=directory, **sizes))
    return llm


def files_in(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


# ------------------------------------------------------------------------------------------------------------- counting


def test_what_is_counted(pair: Pair, tmp_path: Path) -> None:
    restored: list[tuple[str, float, int]] = []
    llm = cached(pair, tmp_path, on_restore=lambda *what: restored.append(what))
    cache = llm.cache
    for prompt in (PROMPT, OTHER, PROMPT, [*PROMPT, 50], tokens_of(20, 3)):
        take(llm, prompt, 5)
    counters = cache.counters
    assert (dict(counters.hits), counters.misses) == ({"ram": 1, "context": 1}, 3)
    assert dict(counters.reused_tokens) == {"ram": 150, "context": 64}
    assert restored == [("ram", counters.restore_s["ram"], 150)] and 0 < restored[0][1] < 1
    assert counters.restores == {"ram": 1} and counters.stored["ram"] == 4
    assert cache.flush() and cache.waiting() == 0
    assert counters.stored["disk"] == 4 and cache.entries_held() == {"ram": 4, "disk": 4}
    assert cache.bytes_held() == {"ram": cache.cache_size, "disk": sum(f.stat().st_size for f in files_in(tmp_path))}
    assert counters.to_dict()["hits"] == {"ram": 1, "context": 1}


def test_bytes_are_those_of_state_rows_and_tokens(pair: Pair) -> None:
    llm = cached(pair, options={"feature_dtype": "q8_0"})
    take(llm, PROMPT, 5)
    (entry,) = (e for _, e in llm.cache.ram.nearest(llm.cache.ram._index._keys[0]))
    n, rows = len(PROMPT), row_bytes("q8_0", N_EMBD) * len(TAPS)
    assert entry.rows.nbytes == n * rows
    assert llm.cache.cache_size == len(entry.target) + n * rows + 4 * n + 4 * llm.n_vocab()


# ------------------------------------------------------------------------------------------------------------- budgets


def test_a_budget_holds_and_what_went_from_memory_comes_from_disk(pair: Pair, tmp_path: Path) -> None:
    llm = cached(pair, tmp_path)
    take(llm, PROMPT, 5)
    size = llm.cache.cache_size
    llm.cache.close()
    llm = cached(pair, tmp_path / "other", ram_bytes=2 * size + size // 2)
    prompts = [tokens_of(150, seed) for seed in range(5)]
    for prompt in prompts:
        take(llm, prompt, 5)
        assert llm.cache.cache_size <= 2 * size + size // 2
    assert llm.cache.entries_held()["ram"] == 2 and llm.cache.counters.evictions == {"ram": 3}
    for prompt in prompts:
        take(llm, prompt, 5)
        assert llm.stats.prefix_reused == 150 and llm.cache.cache_size <= 2 * size + size // 2
    assert llm.cache.counters.hits["disk"] >= 3


def test_more_than_memory_may_take_goes_to_disk_at_once(pair: Pair, tmp_path: Path) -> None:
    llm = cached(pair, tmp_path, ram_bytes=1000)
    take(llm, PROMPT, 5)
    assert llm.cache.counters.not_stored == {"ram_too_large": 1} and len(files_in(tmp_path)) == 1
    take(llm, OTHER, 5)
    take(llm, PROMPT, 5)
    assert llm.cache.counters.hits == {"disk": 1} and llm.cache.cache_size == 0


def test_the_disk_s_cap_holds(pair: Pair, tmp_path: Path) -> None:
    llm = cached(pair, tmp_path / "one")
    take(llm, PROMPT, 5)
    llm.cache.close()
    cap = files_in(tmp_path / "one")[0].stat().st_size * 5 // 2
    llm = cached(pair, tmp_path / "two", disk_bytes=cap)
    for seed in range(6):
        take(llm, tokens_of(150, seed), 5)
        llm.cache.flush()
        assert sum(f.stat().st_size for f in files_in(tmp_path / "two")) == llm.cache.bytes_held()["disk"] <= cap
    assert llm.cache.counters.evictions == {"disk": 4}


def test_sizes_must_not_be_negative(pair: Pair) -> None:
    with pytest.raises(ArgumentError, match="-1"):
        PrefixCache(pair.dflash(), ram_bytes=-1)


# ------------------------------------------------------------------------------------------------- what the model asks


def test_an_entry_must_be_worth_its_copy(pair: Pair) -> None:
    """A long entry of which a prompt shares next to nothing is not put into the model."""
    llm = cached(pair, options={"n_ctx": 1024})
    long = tokens_of(900, 4)
    take(llm, long, 3)
    llm.reset()
    take(llm, long[:40] + tokens_of(10, 5), 3)  # short prompts are evaluated in smaller batches: nothing in common
    assert llm.cache.counters.hits == {}
    llm.reset()
    take(llm, long[:64] + tokens_of(150, 5), 3)
    assert llm.cache.counters.hits == {"ram": 1} and llm.stats.prefix_reused == 64
    from ggml_mirror.cache import prefix_cache

    assert 64 > prefix_cache.COPY_COST * 900 > 16


def test_of_two_that_save_as_much_the_smaller_is_taken(pair: Pair) -> None:
    llm = cached(pair, options={"n_ctx": 1024})
    short, long = tokens_of(200, 4), [*tokens_of(200, 4), *tokens_of(600, 5)]
    take(llm, short, 3)
    take(llm, long, 3)
    llm.reset()
    loaded = []
    load = llm.load_state
    llm.load_state = lambda state: loaded.append(len(state.llama_state)) or load(state)  # type: ignore[method-assign, func-returns-value]
    take(llm, [*short[:150], *tokens_of(100, 6)], 3)
    sizes = sorted(len(e.target) for _, e in llm.cache.ram.nearest(llm.cache.ram._index._keys[0]))
    assert loaded == sizes[:1] and llm.stats.prefix_reused == 128


def test_a_cache_of_another_model_is_refused(pair: Pair) -> None:
    llm, other = cached(pair), pair.dflash()
    with pytest.raises(ArgumentError, match="another model"):
        other.set_cache(llm.cache)
    other.set_cache(LlamaRAMCache())  # llama_cpp's own are not asked
    other.set_cache(None)


def test_it_answers_as_any_cache_of_llama_cpp(pair: Pair) -> None:
    """``in``, ``[]`` and assignment, for those who use them by hand."""
    llm = cached(pair)
    assert PROMPT not in llm.cache
    with pytest.raises(KeyError):
        llm.cache[PROMPT]
    take(llm, PROMPT, 5)
    take(llm, OTHER, 5)
    assert PROMPT in llm.cache and tokens_of(150, 9) not in llm.cache and [] not in llm.cache
    state = llm.cache[PROMPT]
    assert state.n_tokens == 150 and state.input_ids[:150].tolist() == PROMPT
    assert llm.n_tokens > 150, "a question changes nothing"
    llm.load_state(state)
    assert take(llm, [50], 10, reset=False) == pair.greedy("llama", [*PROMPT, 50], 10)

    twin = cached(pair)
    twin.load_state(state)
    twin.cache[PROMPT] = twin.save_state()
    take(twin, OTHER, 5)
    take(twin, PROMPT, 5)
    assert twin.stats.prefix_reused == 64, "a state that was assigned has no logits"
    llm.cache[PROMPT] = llm.save_state()
    assert llm.cache.counters.not_stored == {"not_a_prompt": 1}, "it holds generated tokens"


def test_chunks_of_a_stream_come_before_the_prompt_is_kept(pair: Pair) -> None:
    llm = cached(pair)
    stream = llm.generate(PROMPT, temp=0.0)
    next(stream)
    assert llm.cache.counters.stored == {}
    next(stream)
    assert llm.cache.counters.stored == {"ram": 1}
    stream.close()
    take(llm, OTHER, 1)  # one that ends with its first token is kept too
    assert llm.cache.counters.stored == {"ram": 2}


def test_a_stream_that_was_left_does_not_disturb_the_next(pair: Pair) -> None:
    llm = cached(pair)
    left = llm.generate(PROMPT, temp=0.0)
    next(left)
    first = run(llm, OTHER)
    llm.reset()
    run(llm, OTHER).assert_same(first)
    assert llm.cache.counters.hits == {"ram": 1}


# ------------------------------------------------------------------------------------------------------------- failures


def test_a_damaged_file_is_passed_over_for_the_next_best(pair: Pair, tmp_path: Path, caplog: Any) -> None:
    llm = cached(pair, tmp_path, ram_bytes=0)
    run(llm, PROMPT)
    longer = [*PROMPT, *tokens_of(60, 4)]
    expected = run(llm, longer)
    by_size = sorted(files_in(tmp_path), key=lambda f: f.stat().st_size)
    data = bytearray(by_size[1].read_bytes())
    data[-1000] ^= 1
    by_size[1].write_bytes(data)
    llm = cached(pair, tmp_path, ram_bytes=0)
    run(llm, longer).assert_same(expected)
    assert llm.cache.counters.skipped == {"corrupt": 1} and "corrupt" in caplog.text
    assert llm.cache.counters.hits == {"disk": 1} and llm.stats.prefix_reused == 64


def test_a_state_that_llama_cpp_refuses_is_not_tried_again(pair: Pair, tmp_path: Path, caplog: Any) -> None:
    """Checksums cannot know: here the target's part is cut, and the file is sound."""
    llm = cached(pair, tmp_path)
    expected = run(llm, PROMPT)
    keep = llm.save_state
    llm.save_state = lambda: halved(keep())  # type: ignore[method-assign]
    run(llm, OTHER)
    llm.cache.flush()
    llm.reset()
    other = pair.dflash(draft=pair.draft(seed=2))
    run(llm, OTHER).assert_same(run(other, OTHER))
    assert llm.cache.counters.skipped == {"refused": 1} and llm.cache.counters.hits == {}
    assert "was skipped" in caplog.text
    llm.reset()
    run(llm, PROMPT).assert_same(expected)
    assert llm.cache.counters.hits == {"ram": 1}


def halved(state: Any) -> Any:
    state.llama_state = state.llama_state[: len(state.llama_state) // 2]
    return state


def test_no_memory_for_a_state(pair: Pair, caplog: Any) -> None:
    llm = cached(pair)

    def full() -> Any:
        raise MemoryError

    llm.save_state = full  # type: ignore[method-assign]
    assert take(llm, PROMPT, 10) == pair.greedy("llama", PROMPT, 10)
    assert llm.cache.counters.not_stored == {"failed": 1} and "MemoryError" in caplog.text


def test_a_closed_cache_finds_and_keeps_nothing(pair: Pair, tmp_path: Path) -> None:
    llm = cached(pair, tmp_path)
    first = take(llm, PROMPT, 5)
    assert llm.cache.close() and len(files_in(tmp_path)) == 1, "what waited is written"
    assert llm.cache.close() and llm.cache.cache_size == 0
    take(llm, OTHER, 5)
    assert take(llm, PROMPT, 5) == first
    assert llm.cache.counters.hits == {} and llm.cache.counters.not_stored["closed"] >= 2


def test_model_and_cache_keep_neither_alive(pair: Pair) -> None:
    llm = cached(pair)
    take(llm, PROMPT, 3)
    gone = weakref.ref(llm), weakref.ref(llm.cache)
    llm.close()
    del llm
    gc.collect()
    assert [reference() for reference in gone] == [None, None]


# ------------------------------------------------------------------------------------------------------------- identity

OTHERS: dict[str, dict[str, Any]] = {
    "dtype": {"feature_dtype": "f16"},
    "context": {"n_ctx": 512},
    "cache type": {"type_k": 1},
    "flash attention": {"flash_attn": True},
    "rope": {"rope_freq_base": 20000.0},
    "batch": {"n_batch": 128, "n_ubatch": 128},
    "fused rows": {"feature_rows": "fused"},
    "kv overrides": {"kv_overrides": {"llama.attention.layer_norm_rms_epsilon": 0.5}},
}


@pytest.mark.parametrize("other", [*OTHERS, "draft", "target", "taps", "plain"])
def test_other_models_and_parameters_are_strangers(other: str, pair: Pair, tmp_path: Path) -> None:
    """What one of them wrote is not used, not counted and not removed by the other."""
    theirs: Any
    if other == "draft":
        theirs = cached(pair, tmp_path, options={"draft": pair.draft(seed=5)})
    elif other == "taps":
        theirs = cached(pair, tmp_path, options={"draft": pair.draft(seed=2, taps=(0, 6))})
    elif other == "target":
        theirs = pair.dflash("qwen3", draft=pair.draft(seed=2))
        theirs.set_cache(PrefixCache(theirs, directory=tmp_path))
    elif other == "plain":
        theirs = pair.plain()
        theirs.set_cache(PrefixCache(theirs, directory=tmp_path))
    else:
        theirs = cached(pair, tmp_path, options=OTHERS[other])
    take(theirs, PROMPT, 3)
    theirs.cache.close()
    theirs.set_cache(None)
    before = files_in(tmp_path)
    assert len(before) == 1
    llm = cached(pair, tmp_path)
    take(llm, PROMPT, 3)
    assert llm.cache.counters.skipped == {"identity": 1} and llm.cache.counters.misses == 1
    assert llm.cache.bytes_held()["disk"] == 0 or llm.cache.flush()
    llm.cache.close()
    assert len(files_in(tmp_path)) == 2 and before[0].exists()


def test_the_same_model_elsewhere_is_no_stranger(pair: Pair, tmp_path: Path) -> None:
    """Another path, other numbers of threads, another window of the draft."""
    import shutil

    llm = cached(pair, tmp_path / "cache")
    take(llm, PROMPT, 3)
    llm.cache.close()
    target = shutil.copy(pair.target("llama"), tmp_path / "copy.gguf")
    from dflash.pair import _EXACT, N_CTX

    options = {**_EXACT, "n_threads": 2, "n_threads_batch": 2}
    twin = DFlashLlama(str(target), draft_path=pair.draft(seed=2), n_ctx=N_CTX, draft_window=30, **options)
    twin.set_cache(PrefixCache(twin, directory=tmp_path / "cache"))
    take(twin, PROMPT, 3)
    assert twin.stats.prefix_reused == 150 and twin.mirror.cap == 30 + BLOCK
    held = twin.mirror.positions
    assert held[-1] >= 149 and held[0] >= 150 - twin.mirror.cap
    np.testing.assert_array_equal(np.diff(held), 1)
