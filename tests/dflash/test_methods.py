"""A DFlashLlama is a llama_cpp.Llama: each high-level method gives what plain Llama gives, whatever was accepted."""

from __future__ import annotations

import json
import pickle
from typing import Any

import llama_cpp
import numpy as np
import pytest
from llama_cpp import LlamaGrammar, LogitsProcessorList, StoppingCriteriaList

from ggml_mirror.dflash import DFlashLlama
from ggml_mirror.errors import ArgumentError

from .pair import BLOCK, N_CTX, Pair, script, sometimes, take, tokens_of

PROMPT = "Once upon a time in the"


def both(pair: Pair, call: Any, *, name: str = "llama", **options: Any) -> tuple[Any, Any, DFlashLlama]:
    """``call`` on the plain target and on the pair, whose draft knows most of the plain text."""
    plain = pair.plain(name, **options)
    ids = plain.tokenize(PROMPT.encode())
    text = ids + take(plain, ids, 80)
    plain.reset()
    expected = call(plain)
    llm = pair.dflash(name, **options)
    script(llm, text, sometimes(11, 0.85))
    return call(llm), expected, llm


def text(result: Any) -> str:
    return str(result["choices"][0]["text"])


def without_ids(result: Any) -> Any:
    return {k: v for k, v in result.items() if k not in ("id", "created")}


COMPLETIONS: dict[str, dict[str, Any]] = {
    "plain": {"max_tokens": 30},
    "one token": {"max_tokens": 1},
    "two tokens": {"max_tokens": 2},
    "in mid-block": {"max_tokens": 13},
    "to the end of the context": {"max_tokens": None},
    "echo": {"max_tokens": 12, "echo": True},
    "suffix": {"max_tokens": 12, "suffix": " the end"},
    "repeat penalty": {"max_tokens": 40, "repeat_penalty": 1.5},
    "frequency and presence": {"max_tokens": 40, "frequency_penalty": 0.7, "presence_penalty": 0.9},
    "logit bias": {"max_tokens": 30, "logit_bias": {ord("e"): 6.0, ord("t"): -100.0}},
    "seeded": {"max_tokens": 40, "temperature": 1.0, "seed": 7},
    "seeded, wide": {"max_tokens": 40, "temperature": 2.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 8},
    "mirostat": {"max_tokens": 30, "temperature": 1.0, "mirostat_mode": 1, "seed": 3},
    "mirostat v2": {"max_tokens": 30, "temperature": 1.0, "mirostat_mode": 2, "seed": 3},
}


@pytest.mark.parametrize("case", COMPLETIONS)
def test_completions(case: str, pair: Pair) -> None:
    options = {"temperature": 0.0, **COMPLETIONS[case]}
    result, expected, llm = both(pair, lambda m: m(PROMPT, **options))
    assert text(result) == text(expected)
    assert {**without_ids(result), "model": ""} == {**without_ids(expected), "model": ""}
    pair.assert_rows_are_fresh("llama", llm)


@pytest.mark.parametrize("case", COMPLETIONS)
def test_streamed_completions(case: str, pair: Pair) -> None:
    if COMPLETIONS[case].get("echo") or COMPLETIONS[case].get("suffix"):
        pytest.skip("not of streams")
    options = {"temperature": 0.0, **COMPLETIONS[case]}
    result, expected, llm = both(pair, lambda m: [c["choices"][0] for c in m(PROMPT, stream=True, **options)])
    assert result == expected
    pair.assert_rows_are_fresh("llama", llm)


@pytest.mark.parametrize("at", range(3, 20))
def test_stop_strings_anywhere_in_a_block(at: int, pair: Pair) -> None:
    whole = text(pair.plain()(PROMPT, max_tokens=40, temperature=0))
    stop = [whole[at : at + 2], "never said"]
    result, expected, llm = both(pair, lambda m: m(PROMPT, max_tokens=40, temperature=0, stop=stop))
    assert without_ids(result) == without_ids(expected)
    assert result["choices"][0]["finish_reason"] == "stop" and len(text(result)) <= at
    pair.assert_rows_are_fresh("llama", llm)


@pytest.mark.parametrize("stream", [False, True])
def test_chat(stream: bool, pair: Pair) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROMPT}]

    def call(m: llama_cpp.Llama) -> Any:
        reply = m.create_chat_completion(messages, max_tokens=30, temperature=0, stream=stream)
        choices = [c["choices"][0] for c in reply] if stream else reply["choices"]
        return [{k: c.get(k) for k in ("delta", "message", "finish_reason")} for c in choices]

    result, expected, llm = both(pair, call)
    assert result == expected
    assert llm.stats.draft_steps > 0
    pair.assert_rows_are_fresh("llama", llm)


def test_grammar(pair: Pair) -> None:
    """JSON: most of what the draft says is forbidden; what comes is what the grammar and the target choose."""
    schema = json.dumps({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})
    grammars = [LlamaGrammar.from_json_schema(schema, verbose=False) for _ in range(2)]
    result, expected, llm = both(pair, lambda m: m(PROMPT, max_tokens=60, temperature=0, grammar=grammars.pop()))
    assert text(result) == text(expected)
    assert text(result).lstrip().startswith("{")
    assert llm.stats.draft_steps > 0
    pair.assert_rows_are_fresh("llama", llm)


def test_logits_processors_see_exactly_the_committed_ids(pair: Pair) -> None:
    """And all of them: once per token, in order, as in plain Llama."""
    seen: list[list[list[int]]] = []

    def call(m: llama_cpp.Llama) -> list[int]:
        calls: list[list[int]] = []
        seen.append(calls)

        def processor(ids: Any, scores: Any) -> Any:
            calls.append(np.asarray(ids).tolist())
            scores = np.array(scores)
            scores[ids[-1]] -= 3.0  # depends on what is committed
            return scores

        return take(m, m.tokenize(PROMPT.encode()), 30, logits_processor=LogitsProcessorList([processor]))

    result, expected, _ = both(pair, call)
    assert result == expected
    assert seen[0] == seen[1]


@pytest.mark.parametrize("length", range(30, 40))
def test_stopping_criteria(length: int, pair: Pair) -> None:
    seen: list[list[list[int]]] = []

    def call(m: llama_cpp.Llama) -> str:
        calls: list[list[int]] = []
        seen.append(calls)

        def criterion(ids: Any, logits: Any) -> bool:
            calls.append(np.asarray(ids).tolist())
            return len(ids) >= length

        return text(m(PROMPT, max_tokens=60, temperature=0, stopping_criteria=StoppingCriteriaList([criterion])))

    result, expected, llm = both(pair, call)
    assert result == expected
    committed = llm.n_tokens
    assert [c for c in seen[1] if len(c) <= committed] == [c for c in seen[0] if len(c) <= committed]
    pair.assert_rows_are_fresh("llama", llm)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("max_tokens", [5, 21])
def test_logprobs(max_tokens: int, stream: bool, pair: Pair) -> None:
    def call(m: llama_cpp.Llama) -> list[Any]:
        reply = m(PROMPT, max_tokens=max_tokens, temperature=0, logprobs=3, stream=stream)
        return [c["choices"][0]["logprobs"] for c in reply] if stream else [reply["choices"][0]["logprobs"]]

    result, expected, _ = both(pair, call, logits_all=True)
    assert len(result) == len(expected)
    for got, want in zip(result, expected, strict=True):
        if want is None:
            assert got is None
            continue
        assert got["tokens"] == want["tokens"] and got["text_offset"] == want["text_offset"]
        np.testing.assert_allclose(got["token_logprobs"], want["token_logprobs"], atol=1e-3)
        for a, b in zip(got["top_logprobs"], want["top_logprobs"], strict=True):
            assert a.keys() == b.keys()
            np.testing.assert_allclose(list(a.values()), list(b.values()), atol=1e-3)


def test_logprobs_without_logits_all_are_refused_as_in_plain_llama(pair: Pair) -> None:
    with pytest.raises(ValueError, match="logits_all"):
        pair.dflash()(PROMPT, logprobs=1)


def test_scores_do_not_grow_with_the_context(pair: Pair) -> None:
    llm = pair.dflash(n_batch=16)
    assert llm.scores.shape == (16, llm.n_vocab())
    take(llm, tokens_of(50), 30)
    assert llm.scores.shape == (16, llm.n_vocab())


def test_a_generator_takes_tokens(pair: Pair) -> None:
    """Sent tokens are committed behind the yielded one; what follows is the text after all of them."""
    prompt, sent = tokens_of(15), tokens_of(6, 5)[1:]
    for at in range(12):
        llm = pair.dflash()
        expected = pair.greedy("llama", prompt, 40)
        script(llm, prompt + expected)
        generator = llm.generate(prompt, temp=0.0)
        head = [next(generator) for _ in range(at + 1)]
        tail = [generator.send(sent)]
        tail += [next(generator) for _ in range(9)]
        generator.close()
        assert head == expected[: at + 1]
        assert tail == pair.greedy("llama", prompt + head + sent, 10)
        pair.assert_rows_are_fresh("llama", llm)


def test_a_generator_takes_more_tokens_than_a_batch(pair: Pair) -> None:
    prompt, sent = tokens_of(15), tokens_of(41, 5)[1:]
    llm = pair.dflash(n_batch=16)
    generator = llm.generate(prompt, temp=0.0)
    head = next(generator)
    tail = [generator.send(sent), *(next(generator) for _ in range(9))]
    generator.close()
    assert tail == pair.greedy("llama", [*prompt, head, *sent], 10)
    pair.assert_rows_are_fresh("llama", llm)


def test_reset_forgets_everything(name: str, pair: Pair) -> None:
    prompt = tokens_of(20)
    expected = pair.greedy(name, prompt, 40)
    llm = pair.dflash(name)
    script(llm, prompt + expected, sometimes(2))
    first = take(llm, prompt, 30), llm.stats.steps
    llm.reset()
    assert len(llm.mirror.positions) == 0 and llm.n_tokens == 0
    script(llm, prompt + expected, sometimes(2))
    assert (take(llm, prompt, 30), llm.stats.steps) == first
    assert llm.stats.prefix_reused == 0
    pair.assert_rows_are_fresh(name, llm)


def test_a_shared_prefix_is_reused_and_drafts_as_a_cold_run(pair: Pair) -> None:
    """The second call's steps are those of an object that never saw the first: the real draft, so that lost rows would show."""
    prompt = tokens_of(40)
    llm, cold = pair.dflash(draft=pair.draft(seed=3)), pair.dflash(draft=pair.draft(seed=3))
    said = take(llm, prompt, 25)
    follow = [*prompt, *said[:20], *tokens_of(4, 8)[1:]]
    warm_text = take(llm, follow, 40)
    assert llm.stats.prefix_reused == len(prompt) + 20
    assert warm_text == take(cold, follow, 40)
    assert llm.stats.steps == cold.stats.steps
    assert cold.stats.prefix_reused == 0
    pair.assert_rows_are_fresh("llama", llm)


def test_reuse_after_every_kind_of_prefix(name: str, pair: Pair) -> None:
    """Longer, shorter, equal, a prompt in which one token differs, nothing in common."""
    base = tokens_of(60, 1)
    llm = pair.dflash(name)
    for number, prompt in enumerate(
        [base, base, base[:50], base[:20], [*base[:19], 99, *base[20:]], base, tokens_of(30, 2), base[:1], base[:2]]
    ):
        expected = pair.greedy(name, prompt, 20)
        script(llm, prompt + expected, sometimes(number))
        assert take(llm, prompt, 12) == expected[:12], number
        pair.assert_rows_are_fresh(name, llm)


def test_pickling(pair: Pair) -> None:
    llm = pair.dflash(feature_dtype="q8_0", draft_window=30, n_draft=5)
    twin = pickle.loads(pickle.dumps(llm))
    assert isinstance(twin, DFlashLlama)
    assert (str(twin.feature_dtype), twin.draft_window, twin.n_draft, twin.mirror.cap) == (
        "q8_0",
        30,
        5,
        llm.mirror.cap,
    )
    assert take(twin, tokens_of(20), 20) == take(llm, tokens_of(20), 20)
    assert twin.stats.steps == llm.stats.steps


def test_verbose(pair: Pair, capfd: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    llm = pair.dflash(verbose=True)
    llm.set_cache(llama_cpp.LlamaRAMCache())
    for _ in range(2):
        llm(PROMPT, max_tokens=8, temperature=0)
    state = llm.save_state()
    llm.load_state(state)
    llm.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_batch": BLOCK - 1}, "n_batch is 7; verifying 7 drafted tokens needs 8"),
        ({"n_draft": 0}, "1 to 7"),
        ({"n_draft": BLOCK}, "1 to 7"),
        ({"draft_window": 0}, "draft_window is 0"),
        ({"draft_model": object()}, "draft_model"),
        ({"embedding": True}, "embedding"),
    ],
)
def test_arguments_that_cannot_be(options: dict[str, Any], message: str, pair: Pair) -> None:
    with pytest.raises(ArgumentError, match=message):
        pair.dflash(**options)


def test_no_tokens(pair: Pair) -> None:
    llm = pair.dflash()
    with pytest.raises(ArgumentError):
        take(llm, [], 1)
    assert take(llm, tokens_of(9), 9) == pair.greedy("llama", tokens_of(9), 9)


@pytest.mark.parametrize("n_draft", [1, 3, 7])
@pytest.mark.parametrize("ubatch", [2, 4, 8, 9])
def test_shorter_blocks_and_small_micro_batches(name: str, n_draft: int, ubatch: int, pair: Pair) -> None:
    prompt = tokens_of(30, 4)
    expected = pair.greedy(name, prompt, 40)
    llm = pair.dflash(name, n_draft=n_draft, n_batch=max(8, ubatch), n_ubatch=ubatch)
    script(llm, prompt + expected, sometimes(9))
    assert take(llm, prompt, 30) == expected[:30]
    assert max(llm.stats.steps) <= n_draft
    pair.assert_rows_are_fresh(name, llm)


def test_prompts_that_nearly_fill_the_context(pair: Pair) -> None:
    prompt = tokens_of(N_CTX - 2)
    llm, plain = pair.dflash(), pair.plain()
    result, expected = (m(prompt, max_tokens=50, temperature=0) for m in (llm, plain))
    assert result["choices"] == expected["choices"] and expected["usage"]["completion_tokens"] == 2
    with pytest.raises(ValueError, match="exceed context window"):
        llm(tokens_of(N_CTX), max_tokens=1)
